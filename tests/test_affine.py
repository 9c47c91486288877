# SPDX-License-Identifier: MIT
"""The algebra of folding: sums and compositions of random affine layers against the layers themselves, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg_cuda import affine, testing
from repvgg_cuda.affine import Affine
from repvgg_cuda.structure import UnfoldableError

CHANNELS = 12


def conv(size: Any, padding: Any, stride: int = 1, dilation: int = 1, groups: int = 1, bias: bool = True) -> Affine:
    size, padding = ((each, each) if isinstance(each, int) else each for each in (size, padding))
    weight = torch.randn(CHANNELS, CHANNELS // groups, *size)
    shift = torch.randn(CHANNELS) if bias else None
    return affine.convolution(weight, shift, (stride, stride), padding, (dilation, dilation), groups)


def image(height: int = 11, width: int = 8) -> Tensor:
    return torch.randn(2, CHANNELS, height, width, dtype=torch.float64)


def assert_same(folded: Affine, x: Tensor, want: Tensor) -> None:
    got = folded(x)
    assert got.shape == want.shape
    bound = 2 * folded.evaluation_bound(x)
    assert ((got - want).abs() <= bound).all(), testing.worst(got, want, bound)


@st.composite
def aligned_convs(draw: st.DrawFn) -> list[Affine]:
    """Branches of one stride whose outputs line up: "same", or all off it by one amount."""
    stride = draw(st.sampled_from([1, 2, 3]))
    off = draw(st.sampled_from([0, 0, 0, 1, 2]))
    branches = []
    for _ in range(draw(st.integers(1, 4))):
        sides = []
        dilation = draw(st.sampled_from([1, 1, 2, 3]))
        for _ in range(2):
            size = draw(
                st.sampled_from([k for k in range(1, 8) if (dilation * (k - 1) - off) % 2 == 0 and k > off] or [1])
            )
            sides.append((size, (dilation * (size - 1) - off) // 2))
        if any(padding < 0 or dilation * (size - 1) - 2 * padding != off for size, padding in sides):
            continue
        groups = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
        (height, pad_h), (width, pad_w) = sides
        branches.append(conv((height, width), (pad_h, pad_w), stride, dilation, groups))
    if stride == 1 and off == 0 and draw(st.booleans()):
        branches.append(affine.identity(CHANNELS))
    return branches


@settings(max_examples=60, deadline=None)
@given(aligned_convs(), st.integers(0, 2**31))
def test_sums_of_branches(branches: list[Affine], seed: int) -> None:
    torch.manual_seed(seed)
    if not branches:
        return
    x = image(17, 15)
    total, want = branches[0], branches[0](x)
    for branch in branches[1:]:
        total, want = affine.added(total, branch), want + branch(x)
    assert_same(total, x, want)


def test_a_common_dilation_is_kept() -> None:
    total = affine.added(conv(3, 2, dilation=2), affine.identity(CHANNELS))
    assert (total.kernel_size, total.dilation, total.padding) == ((3, 3), (2, 2), (2, 2))
    total = affine.added(total, conv(3, 1))
    assert (total.kernel_size, total.dilation, total.padding) == ((5, 5), (1, 1), (2, 2))


COMPOSABLE: dict[str, tuple[Affine, Affine]] = {
    "1x1 after 3x3": (conv(1, 0, groups=2), conv(3, 1, groups=3)),
    "strided 1x1 after strided 5x5": (conv(1, 0, stride=2), conv(5, 2, stride=2, groups=6)),
    "unpadded 3x3 after 1x1": (conv(3, 0), conv(1, 0)),
    "padded 3x3 after 1x1 without bias": (conv(3, 1, stride=2, groups=4), conv(1, 0, bias=False)),
    "1x1 after 1x1": (conv(1, 0), conv(1, 0, groups=12)),
    "pooling after 1x1 without bias": (affine.average_pool(CHANNELS, (3, 3), (1, 1), (1, 1)), conv(1, 0, bias=False)),
    "unpadded 3x3 after padded 1x1": (conv(3, 0, groups=3), conv(1, 1)),
    "1x1 after padded 1x1": (conv(1, 0), conv(1, 2)),
    "1x1 after pooling": (conv(1, 0), affine.average_pool(CHANNELS, (2, 2), (2, 2), (0, 0))),
}


@pytest.mark.parametrize("kind", COMPOSABLE)
def test_compositions(kind: str) -> None:
    outer, inner = COMPOSABLE[kind]
    x = image()
    assert_same(affine.composed(outer, inner), x, outer(inner(x)))


@pytest.mark.parametrize(
    ("outer", "inner", "reason"),
    [
        (conv(3, 1), conv(1, 0), "pads with zeros what a 1x1 layer with a bias"),
        (conv(3, 1), conv(3, 1, bias=False), "follows one of 3x3"),
        (conv(3, 0), conv(3, 0), "follows one of 3x3"),
        (conv(3, 1), conv(1, 1, bias=False), "follows one of 1x1"),
        (conv(3, 1), conv(1, 0, stride=2, bias=False), "follows one of 1x1, stride"),
    ],
    ids=["bias", "3x3", "unpadded", "padded twice", "stride"],
)
def test_compositions_that_no_convolution_computes(outer: Affine, inner: Affine, reason: str) -> None:
    with pytest.raises(UnfoldableError, match=reason):
        affine.composed(outer, inner)


def test_layers_behind_a_convolution() -> None:
    x, inner = image(), conv(3, 1, groups=3)
    bn = testing.random_batchnorm(CHANNELS, torch.Generator().manual_seed(0))
    layer = nn.BatchNorm2d(CHANNELS, eps=bn.eps).double().eval()
    layer.load_state_dict(
        {"weight": bn.weight, "bias": bn.bias, "running_mean": bn.mean, "running_var": bn.var}, strict=False
    )
    assert_same(affine.normalised(inner, bn), x, layer(inner(x)))
    gamma = torch.randn(CHANNELS)
    assert_same(affine.scaled(inner, gamma), x, inner(x) * gamma.reshape(-1, 1, 1))
    assert_same(affine.shifted(inner, torch.tensor(0.3)), x, inner(x) + torch.tensor(0.3).double())
    with pytest.raises(UnfoldableError, match="a constant of 5 numbers meets 12 channels"):
        affine.scaled(inner, torch.ones(5))


def test_groups_are_spread() -> None:
    x, depthwise = image(), conv(3, 1, groups=12)
    for groups in (1, 2, 3, 4, 6):
        spread = affine.with_groups(depthwise, groups)
        assert spread.weight.shape == (CHANNELS, CHANNELS // groups, 3, 3)
        assert torch.equal(spread(x) == 0, depthwise(x) == 0)
        assert_same(spread, x, depthwise(x))
