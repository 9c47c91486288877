# SPDX-License-Identifier: MIT
"""Trains the demo's digit classifier from scratch, in about a minute on one CPU core.

    python examples/train_digits.py                       # writes repvgg_cuda/data/digits_repvgg.safetensors
    python examples/train_digits.py --out mine.safetensors --epochs 80 --seed 1

The network trains in its multi-branch form; converting it is the demo's job. One thread and fixed seeds make a run
repeatable: the same PyTorch on the same kind of CPU gives the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn

from repvgg_cuda import digits, files


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 12 degrees, scaled by up to 12 % and moved by up to 3 of its 32 pixels."""

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(len(images), *shape, generator=generator) * 2 - 1) * limit

    angle, scale = uniform(math.radians(12)), 1 + uniform(0.12)
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = angle.cos() * scale
    theta[:, 0, 1] = -angle.sin() * scale
    theta[:, 1, 0] = angle.sin() * scale
    theta[:, :, 2] = uniform(6 / images.shape[-1], 2)  # the grid spans 2, from -1 to 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def accuracy(model: nn.Module, data: digits.Digits) -> tuple[int, int]:
    """``(right, all)`` in eval mode; leaves the model in eval mode."""
    right = digits.predict(model.eval(), data).argmax(1) == data.labels
    return int(right.sum()), len(data)


def train(model: nn.Module, data: digits.Digits, *, epochs: int, batch_size: int, lr: float, seed: int) -> None:
    """AdamW with warm-up and cosine decay, cross entropy with label smoothing; weight decay on kernels only."""
    generator = torch.Generator().manual_seed(seed)
    images = digits.preprocess(data.scans)
    kernels = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": kernels, "weight_decay": 1e-2}, {"params": vectors, "weight_decay": 0.0}])
    batches = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * batches, pct_start=0.1)
    with Progress() as progress:
        task = progress.add_task("training", total=epochs)
        for _ in range(epochs):
            model.train()
            total = 0.0
            order = torch.randperm(len(images), generator=generator)[: batches * batch_size]
            for index in order.split(batch_size):
                logits = model(augment(images[index], generator))
                loss = F.cross_entropy(logits, data.labels[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
            progress.update(task, advance=1, description=f"training, loss {total / batches:.3f}")


def save(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Writes the state_dict under a temporary name and renames it, so that ``path`` is never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=digits.WEIGHTS, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of initialisation, order, augmentation (default: %(default)s)"
    )
    args = parser.parse_args()
    try:
        files.require_writable(args.out)
        training_set, held_out = digits.load_digits()
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    model = digits.build_model()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(training_set)} scans to train on, {len(held_out)} held out; {parameters} parameters")
    train(model, training_set, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed)
    right, total = accuracy(model, held_out)
    print(f"held-out accuracy: {right} of {total} ({right / total:.2%})")
    metadata = {
        "held_out_correct": str(right),
        "held_out_total": str(total),
        "split": f"of each class every {digits.HELD_OUT_EVERY}th scan held out",
        "seed": str(args.seed),
        "epochs": str(args.epochs),
        "torch": torch.__version__,
    }
    save(model, args.out, metadata)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1024:.0f} KiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
