# SPDX-License-Identifier: MIT
"""The demo's data set and network: scikit-learn's scans of handwritten digits and a small RepVGG trained on them.

The data are the 1797 test scans of the UCI "Optical Recognition of Handwritten Digits" set, 8x8 pixels of 17 greys,
written by 13 people. ``examples/train_digits.py`` trains the network; the weights are shipped in ``repvgg_cuda/data``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from repvgg_cuda import checkpoint
from repvgg_cuda.models import RepVGG

#: The trained multi-branch weights, official key names, float32.
WEIGHTS = Path(__file__).with_name("data") / "digits_repvgg.safetensors"

#: The scans are enlarged to this size, because a RepVGG halves its input five times.
IMAGE_SIZE = 32

#: Of each class, in the order of the data set, every fourth scan is held out: no random numbers, so that the split is
#: the same in every version of every library. (The same people wrote both parts.)
HELD_OUT_EVERY = 4


@dataclass(frozen=True)
class Digits:
    """``scans`` is ``[N, 1, 8, 8]`` float32 in 0..1, ``labels`` is ``[N]`` int64."""

    scans: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_digits() -> tuple[Digits, Digits]:
    """``(train, held_out)``: 1352 and 445 scans.

    Raises:
        RuntimeError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load_from_sklearn
    except ImportError:
        raise RuntimeError("the digits come with scikit-learn: install it with `pip install scikit-learn`") from None
    bunch = load_from_sklearn()
    scans = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero().flatten()[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    return Digits(scans[~held_out], labels[~held_out]), Digits(scans[held_out], labels[held_out])


def preprocess(scans: Tensor) -> Tensor:
    """``[N, 1, 8, 8]`` in 0..1 -> the network's input ``[N, 1, 32, 32]``, enlarged bilinearly, about zero mean."""
    return F.interpolate(scans, size=IMAGE_SIZE, mode="bilinear", align_corners=False) * 2 - 0.6


def build_model(*, deploy: bool = False) -> RepVGG:
    """A RepVGG of seven blocks and 89 thousand parameters: 1 -> 16, 16, 32 32, 48 48, 64 channels, ten classes."""
    return RepVGG(
        num_blocks=[1, 2, 2, 1],
        num_classes=10,
        width_multiplier=[16 / 64, 32 / 128, 48 / 256, 64 / 512],
        deploy=deploy,
        in_channels=1,
    )


def load_trained(path: Path = WEIGHTS) -> RepVGG:
    """The trained multi-branch network, in eval mode."""
    model = build_model()
    checkpoint.load_into(model, checkpoint.load_state_dict_file(path))
    return model.eval()


def weights_metadata(path: Path = WEIGHTS) -> dict[str, str]:
    """What the training script noted in the file: held-out accuracy, split, seed, torch version."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@torch.inference_mode()
def predict(model: torch.nn.Module, digits: Digits, device: torch.device | None = None) -> Tensor:
    """The network's logits ``[N, 10]`` for all scans in one batch, on the CPU."""
    logits: Tensor = model(preprocess(digits.scans).to(device or "cpu"))
    return logits.cpu()
