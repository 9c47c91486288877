# SPDX-License-Identifier: MIT
"""Diverse branch blocks (arXiv:2103.13425): 1x1 -> kxk, exact as the BatchNorm between pads with its value of zero."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from repvgg_cuda import deploy, reparameterize
from repvgg_cuda.networks import randomise_


class PaddedBatchNorm(nn.Module):
    """Assigns to slices, which no tracer follows."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.bn, self.padding = nn.BatchNorm2d(channels), padding

    def border(self) -> Tensor:
        zero = torch.zeros(1, self.bn.num_features, 1, 1, dtype=self.bn.weight.dtype, device=self.bn.weight.device)
        y: Tensor = self.bn(zero)
        return y

    def forward(self, x: Tensor) -> Tensor:
        p = self.padding
        y = F.pad(self.bn(x), [p] * 4)
        for rows in (slice(None, p), slice(-p, None)):
            y[:, :, rows] = self.border()
            y[:, :, :, rows] = self.border()
        return y


class NearIdentity(nn.Conv2d):
    """A 1x1 convolution whose weight is an offset from the identity."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        index = torch.arange(channels)
        self.offset = torch.zeros_like(self.weight)
        self.offset[index, index % (channels // groups)] = 1

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + self.offset.to(self.weight.device), None, groups=self.groups)


def named(**layers: nn.Module) -> nn.Sequential:
    branch = nn.Sequential()
    for name, layer in layers.items():
        branch.add_module(name, layer)
    return branch


class DiverseBranchBlock(nn.Module):
    def __init__(self, c: int, k: int, size: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding, options = size // 2, {"groups": groups, "bias": False}
        wide = nn.Conv2d(c, k, size, stride, padding, groups=groups, bias=False)
        self.dbb_origin = named(conv=wide, bn=nn.BatchNorm2d(k))
        self.dbb_1x1 = named(conv=nn.Conv2d(c, k, 1, stride, **options), bn=nn.BatchNorm2d(k))  # type: ignore[arg-type]
        self.dbb_avg = named(
            conv=nn.Conv2d(c, k, 1, **options),  # type: ignore[arg-type]
            bn=PaddedBatchNorm(k, padding),
            avg=nn.AvgPool2d(size, stride),
            avgbn=nn.BatchNorm2d(k),
        )
        first = NearIdentity(c, groups) if c == k else nn.Conv2d(c, c, 1, **options)  # type: ignore[arg-type]
        self.dbb_1x1_kxk = named(
            first=first,
            bn1=PaddedBatchNorm(c, padding),
            conv2=nn.Conv2d(c, k, size, stride, **options),  # type: ignore[arg-type]
            bn2=nn.BatchNorm2d(k),
        )

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "dbb_reparam"):
            return torch.relu(self.dbb_reparam(x))
        y = self.dbb_origin(x)
        y += self.dbb_1x1(x)
        y += self.dbb_avg(x)
        y += self.dbb_1x1_kxk(x)
        return torch.relu(y)


def image() -> Tensor:
    return torch.randn(2, 8, 11, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "arguments", [(8, 8), (8, 16), (8, 8, 3, 2), (8, 12, 3, 1, 4), (8, 8, 3, 1, 2), (8, 8, 5)], ids=str
)
def test_the_whole_block_is_one_convolution(arguments: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    block = randomise_(DiverseBranchBlock(*arguments)).eval()
    deployed, report = deploy(block, image(), strict=True)
    size = arguments[2] if len(arguments) > 2 else 3
    kxk = f"{size}x{size}"
    assert [entry.branches for entry in report.fused] == [f"{kxk}+1x1+1x1-avg{kxk}+1x1-{kxk}"]
    assert "all 2 rows within their bounds" in report.verification
    assert list(deployed.state_dict()) == ["dbb_reparam.weight", "dbb_reparam.bias"]
    assert type(deployed) is DiverseBranchBlock  # its own forward knows the deployed form
    torch.testing.assert_close(pickle.loads(pickle.dumps(deployed))(image()), block(image()), rtol=1e-4, atol=1e-4)


class Clipped(PaddedBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-50, 50)


class OtherBorder(PaddedBatchNorm):
    def border(self) -> Tensor:
        return super().border() + 1


class Cropped(PaddedBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :, 1:]


class Picky(PaddedBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] < 5:
            raise ValueError("too small")
        return super().forward(x)


def _hook(block: Any) -> None:
    block.dbb_avg.bn.bn.register_forward_hook(lambda module, args, y: y * 2)


def _bias(block: Any) -> None:
    block.dbb_avg.conv.bias = nn.Parameter(torch.ones(8))


def _swap(kind: type[PaddedBatchNorm]) -> Callable[[Any], None]:
    def swap(block: Any) -> None:
        bn = kind(8, 1).eval()
        bn.bn = block.dbb_avg.bn.bn
        block.dbb_avg.bn = bn
        if kind is Cropped:
            block.dbb_avg.avg = nn.AvgPool2d((2, 3), 1)

    return swap


OTHERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "clipped": (_swap(Clipped), "compute something else than their fold"),
    "another border": (_swap(OtherBorder), "compute something else than their fold"),
    "cropped": (_swap(Cropped), "dbb_avg.bn does more than normalise and pad"),
    "picky": (_swap(Picky), "dbb_avg.bn cannot be run by itself: ValueError: too small"),
    "hooks": (_hook, "dbb_avg.bn has hooks in it"),
    "bias": (_bias, "zeros are padded to what is not a 1x1 convolution of stride 1 without bias"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_only_looks_like_it_is_left(kind: str) -> None:
    torch.manual_seed(0)
    block = randomise_(DiverseBranchBlock(8, 8)).eval()
    change, reason = OTHERS[kind]
    change(block)
    want = block(image())
    with pytest.warns(UserWarning, match=reason):
        converted, _ = reparameterize(block)
    torch.testing.assert_close(converted(image()), want, rtol=1e-4, atol=1e-3)


def test_on_the_meta_device_it_is_left() -> None:
    with torch.device("meta"):
        block = DiverseBranchBlock(8, 16).eval()
    with pytest.warns(UserWarning, match="dbb_avg.bn cannot be traced, and on the meta device not be tried out"):
        reparameterize(block)


class Padded(nn.Module):
    def __init__(self, pad: nn.Module) -> None:
        super().__init__()
        self.pad, self.wide, self.narrow = pad, nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.wide(self.pad(x)) + self.narrow(x))


class Function(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1))


@pytest.mark.parametrize("pad", [nn.ZeroPad2d(1), Function()], ids=["module", "function"])
def test_padding_before_a_convolution_joins_it(pad: nn.Module) -> None:
    model = Padded(pad).eval()
    deployed, report = deploy(model, image(), strict=True)
    assert [entry.branches for entry in report.fused] == ["3x3+1x1"]
    torch.testing.assert_close(deployed(image()), model(image()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("pad", "reason"),
    [
        (nn.ZeroPad2d((0, 2, 1, 1)), r"pads \(0, 2, 1, 1\), with other numbers on opposite sides"),
        (nn.Sequential(nn.BatchNorm2d(8), nn.ZeroPad2d(1)), "zeros are padded to what is not a 1x1 convolution"),
    ],
)
def test_padding_that_no_convolution_has_is_left(pad: nn.Module, reason: str) -> None:
    model = randomise_(Padded(pad)).eval()
    with pytest.warns(UserWarning, match=reason):
        converted, _ = reparameterize(model, chains=False)
    torch.testing.assert_close(converted(image()), model(image()))
