# SPDX-License-Identifier: MIT
"""unfuse: the block computes what the convolution did, folds back to it, and can be trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repvgg_cuda import RepConv3x3, RepVGGBlock, reparameterize, testing, unfuse, verify
from repvgg_cuda.blocks import find_blocks
from repvgg_cuda.tracing import trace

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"in_channels": 6, "out_channels": 6},
    "stride 2": {"in_channels": 6, "out_channels": 6, "stride": 2},
    "channels": {"in_channels": 4, "out_channels": 6},
    "groups": {"in_channels": 6, "out_channels": 6, "groups": 3},
    "depthwise": {"in_channels": 6, "out_channels": 6, "groups": 6},
    "groups, stride 2": {"in_channels": 4, "out_channels": 8, "groups": 2, "stride": 2},
    "no bias": {"in_channels": 6, "out_channels": 6, "bias": False},
}


def make(kind: str, geometry: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    if kind == "ours":
        return RepConv3x3(**geometry, activation="relu", dtype=dtype).eval()
    return nn.Conv2d(kernel_size=3, padding=1, dtype=dtype, **geometry).eval()


def images(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(3, channels, 9, 8, generator=torch.Generator().manual_seed(1)) * 3 + 1
    return x.to(dtype)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", ["ours", "torch"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_folding_it_again_gives_it_back(geometry: str, kind: str, calibrated: bool, dtype: torch.dtype) -> None:
    conv = make(kind, GEOMETRIES[geometry], dtype)
    x = images(conv.in_channels, dtype)
    block = unfuse(conv, x if calibrated else None)
    assert (block.rbr_identity is not None) == (conv.in_channels == conv.out_channels and conv.stride in (1, (1, 1)))
    assert {tensor.dtype for tensor in block.parameters()} == {dtype}
    assert block.training == conv.training

    folded = find_blocks(trace(block))[0].folded
    assert folded is not None
    again = reparameterize(block, strict=True).model.rbr_reparam
    # Beside the fold, gamma and beta of each branch are rounded once.
    rounding = 2 * testing.unit_roundoff(dtype)
    weight_bound, bias_bound = folded.fold_bound(dtype)
    weight_bound, bias_bound = (
        weight_bound + rounding * folded.weight_magnitude,
        bias_bound + rounding * folded.bias_magnitude,
    )
    bias = torch.zeros_like(again.bias) if conv.bias is None else conv.bias
    assert ((again.weight.double() - conv.weight.double()).abs() <= weight_bound).all()
    assert ((again.bias.double() - bias.double()).abs() <= bias_bound).all()
    assert again.activation == ("relu" if kind == "ours" else "identity")
    assert verify(block, reparameterize(block, strict=True).model, x).ok


def test_the_output_is_that_of_the_convolution() -> None:
    for kind in ("ours", "torch"):
        conv = make(kind, GEOMETRIES["groups"], torch.float64)
        x = images(6, torch.float64)
        torch.testing.assert_close(unfuse(conv)(x), conv(x))
        torch.testing.assert_close(unfuse(conv, x)(x), conv(x))


def test_calibrated_it_computes_the_same_in_training_mode() -> None:
    conv = make("torch", GEOMETRIES["plain"])
    x = images(6)
    block = unfuse(conv, x).train()
    torch.testing.assert_close(block(x), conv(x), rtol=1e-2, atol=1e-2)  # batch statistics: N, not N - 1
    assert not torch.allclose(unfuse(conv).train()(x), conv(x), atol=0.1)


def test_it_trains() -> None:
    conv = make("ours", GEOMETRIES["plain"]).requires_grad_(False)
    x = images(6)
    target = torch.relu(conv(x)) * 0.5
    block = unfuse(conv, x).train()
    assert all(parameter.requires_grad for parameter in block.parameters())
    optimiser = torch.optim.SGD(block.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (block(x) - target).square().mean()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in block.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    block.eval()
    assert verify(block, reparameterize(block, strict=True).model, x).ok


def test_a_deployed_network_goes_back_and_forth() -> None:
    trained = nn.Sequential(RepVGGBlock(3, 6, stride=2), RepVGGBlock(6, 6)).eval()
    deployed = reparameterize(trained, strict=True).model
    again = nn.Sequential(*(unfuse(block.rbr_reparam) for block in deployed)).eval()
    assert list(again.state_dict()) == list(trained.state_dict())
    x = images(3)
    torch.testing.assert_close(again(x), trained(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Linear(3, 3), "conv must be a RepConv3x3 or an nn.Conv2d, got Linear"),
        (nn.Conv2d(3, 3, 5, padding=2), r"must be 3x3 .* got kernel_size \(5, 5\)"),
        (nn.Conv2d(3, 3, 3), r"padding \(0, 0\)"),
        (nn.Conv2d(3, 3, 3, padding=2, dilation=2), r"dilation \(2, 2\)"),
        (nn.Conv2d(3, 3, 3, padding=1, stride=(1, 2)), r"stride \(1, 2\)"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "reflect"),
    ],
    ids=["linear", "5x5", "padding", "dilation", "stride", "mode"],
)
def test_what_cannot_go_back_is_refused(conv: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^unfuse: .*{message}"):
        unfuse(conv)


def test_an_example_that_does_not_fit_is_refused() -> None:
    conv = make("ours", GEOMETRIES["plain"])
    for x in (torch.zeros(1, 5, 4, 4), torch.zeros(6, 4, 4), torch.zeros(1, 6, 1, 1)):
        with pytest.raises(RuntimeError, match=r"^unfuse: example_input must be \[N, 6, H, W\]"):
            unfuse(conv, x)
