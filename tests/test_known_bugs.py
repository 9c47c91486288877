# SPDX-License-Identifier: MIT
"""Blocks on which converters of other libraries go wrong: each converts exactly here, or is refused with the reason.

The structures are written anew from what those libraries' code does. A test's name says what went wrong elsewhere.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_blocks import ConvBN
from torch import Tensor, nn

from repvgg_cuda import RepVGGBlock, create_model, deploy, reparameterize, verify
from repvgg_cuda.models import RepVGGplus
from repvgg_cuda.modules import SEBlock
from repvgg_cuda.networks import randomise_


class Block(nn.Module):
    """``act(post(sum of branches))``; the names of the branches say nothing."""

    def __init__(self, *branches: nn.Module, post: nn.Module | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(branches)
        self.post = nn.Identity() if post is None else post
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.parts[0](x)
        for part in self.parts[1:]:
            y = y + part(x)
        z: Tensor = self.act(self.post(y))
        return z


def images(channels: int = 8, height: int = 11, width: int = 9) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def trained(block: nn.Module) -> Any:
    """With random weights and BatchNorms, and biases too."""
    torch.manual_seed(0)
    randomise_(block)
    for module in block.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    return block.eval()


def assert_converts(block: nn.Module, x: Tensor, sums: int = 1) -> Any:
    before = {key: value.clone() for key, value in block.state_dict().items()}
    deployed, report = reparameterize(block, strict=True)
    assert sum(entry.kind == "sum" for entry in report.fused) == sums
    result = verify(block, deployed, x)
    assert result.ok, str(result)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    return deployed


def scaled(conv: nn.Module, channels: int = 8) -> nn.Module:
    class Scale(nn.Module):
        """As a "linear" block's scale layer: a learnt factor per channel, in the place of a BatchNorm."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.weight = conv, nn.Parameter(torch.linspace(0.5, 2, channels))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x) * self.weight.view(1, -1, 1, 1)
            return y

    return Scale()


def conv(size: Any, **kwargs: Any) -> nn.Conv2d:
    padding = size // 2 if isinstance(size, int) else (size[0] // 2, size[1] // 2)
    return nn.Conv2d(8, 8, size, **{"padding": padding, **kwargs})


def se_with_square_pooling() -> nn.Module:
    class SquareSE(nn.Module):
        """Pools a window as large as the width in both directions."""

        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.avg_pool2d(x, kernel_size=x.size(3))
            return x * torch.sigmoid(self.up(F.relu(self.down(y)))).view(-1, 8, 1, 1)

    return SquareSE()


CONVERTIBLE: dict[str, Callable[[], nn.Module]] = {
    # (structure that a converter dropped, miscounted or mixed up)
    "no BatchNorm in any branch": lambda: Block(conv(3), conv(1), nn.Identity()),
    "a convolution's bias was dropped": lambda: Block(
        nn.Sequential(conv(3), nn.BatchNorm2d(8)), nn.Sequential(conv(1), nn.BatchNorm2d(8)), nn.BatchNorm2d(8)
    ),
    "identity of 2 groups was that of 1": lambda: Block(
        ConvBN(8, 8, 3, groups=2), ConvBN(8, 8, 1, groups=2), nn.BatchNorm2d(8)
    ),
    "identity of 4 groups was that of 1": lambda: Block(
        ConvBN(8, 8, 3, groups=4), ConvBN(8, 8, 1, groups=4), nn.BatchNorm2d(8)
    ),
    "depthwise identity raised": lambda: Block(ConvBN(8, 8, 3, groups=8), ConvBN(8, 8, 1, groups=8), nn.BatchNorm2d(8)),
    "dilation was lost": lambda: Block(conv(3, padding=2, dilation=2), conv(1), nn.Identity()),
    "kernels other than 3x3": lambda: Block(ConvBN(8, 8, 5), ConvBN(8, 8, 1), nn.BatchNorm2d(8)),
    "scale layers had no converter": lambda: Block(scaled(conv(3)), scaled(conv(1)), scaled(nn.Identity())),
    "BatchNorm on the sum": lambda: Block(ConvBN(8, 8, 3), conv(1, bias=False), nn.Identity(), post=nn.BatchNorm2d(8)),
    "SE between the sum and its BatchNorm": lambda: Block(
        ConvBN(8, 8, 3), conv(1), nn.Identity(), post=nn.Sequential(SEBlock(8, 2), nn.BatchNorm2d(8))
    ),
    "average pooling branch": lambda: Block(
        ConvBN(8, 8, 3), ConvBN(8, 8, 1), nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(8))
    ),
    "asymmetric branches": lambda: Block(
        *(nn.Sequential(conv(size, bias=False), nn.BatchNorm2d(8)) for size in (3, (1, 3), (3, 1)))
    ),
    "1x1 before 3x3, no BatchNorm between": lambda: Block(
        ConvBN(8, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), conv(3, bias=False), nn.BatchNorm2d(8))
    ),
    "no identity branch though one would fit": lambda: Block(ConvBN(8, 8, 3), ConvBN(8, 8, 1)),
    "the identity is a trained 1x1 convolution": lambda: Block(ConvBN(8, 8, 3), conv(1, bias=False), ConvBN(8, 8, 1)),
    "several branches of each kind": lambda: Block(*(ConvBN(8, 8, 3) for _ in range(4)), ConvBN(8, 8, 1)),
    "eps 1e-3 beside small variances": lambda: Block(
        ConvBN(8, 8, 3, eps=1e-3), ConvBN(8, 8, 1, eps=1e-3), nn.BatchNorm2d(8, eps=1e-3)
    ),
}


@pytest.mark.parametrize("kind", CONVERTIBLE)
def test_converts_exactly(kind: str) -> None:
    block = trained(CONVERTIBLE[kind]())
    if "small variances" in kind:
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.mul_(1e-3)
    deployed = assert_converts(block, images())
    left = [module for module in deployed.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(left) == (1 if kind.startswith("SE between") else 0)


def test_batchnorm_without_gamma_and_beta_was_a_type_error() -> None:
    block = trained(Block(ConvBN(8, 8, 3), conv(1), nn.BatchNorm2d(8)))
    plain = nn.BatchNorm2d(8, affine=False).eval()
    plain.load_state_dict(
        {key: value for key, value in block.parts[2].state_dict().items() if "running" in key}, strict=False
    )
    block.parts[2] = plain
    assert_converts(block, images())


def test_synchronised_and_frozen_batchnorms() -> None:
    block = trained(Block(ConvBN(8, 8, 3), ConvBN(8, 8, 1), nn.BatchNorm2d(8)))
    assert_converts(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block)), images())

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, bn: nn.BatchNorm2d) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, getattr(bn, name).detach().clone())
            self.eps = bn.eps

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)

    frozen = copy.deepcopy(block)
    frozen.parts[2] = FrozenBatchNorm2d(frozen.parts[2]).eval()
    assert_converts(frozen, images())
    FrozenBatchNorm2d.__name__ = "AnotherName"  # then its arithmetic is read
    assert_converts(frozen, images())


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "padding modes were taken for zeros": (
        lambda: Block(conv(3, padding_mode="circular"), conv(1), nn.Identity()),
        "padding_mode 'circular'; the folded convolution pads zeros",
    ),
    "1x1 with BatchNorm before a padded 3x3": (
        lambda: Block(ConvBN(8, 8, 3), nn.Sequential(ConvBN(8, 8, 1), ConvBN(8, 8, 3))),
        "pads with zeros what a 1x1 layer with a bias or BatchNorm computes",
    ),
    "1x1 with BatchNorm before a padded average": (
        lambda: Block(ConvBN(8, 8, 3), nn.Sequential(ConvBN(8, 8, 1), nn.AvgPool2d(3, 1, 1))),
        "pads with zeros what a 1x1 layer with a bias or BatchNorm computes",
    ),
    "an average that leaves out its padding": (
        lambda: Block(ConvBN(8, 8, 3), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        "does not count its padding",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_is_refused_where_no_convolution_is_the_same(kind: str) -> None:
    make, reason = REFUSED[kind]
    block = trained(make())
    with pytest.raises(RuntimeError, match=reason):
        reparameterize(block, strict=True)
    with pytest.warns(UserWarning, match=reason):
        deployed = deploy(block, images()).model  # which verifies what remains
    torch.testing.assert_close(deployed(images()), block(images()), rtol=1e-4, atol=1e-4)


def test_training_mode_was_folded_silently() -> None:
    block = trained(Block(ConvBN(8, 8, 3), ConvBN(8, 8, 1)))
    block.train()
    with pytest.raises(RuntimeError, match=r"^parts\.0\.bn: the BatchNorm is in training mode.*call model\.eval"):
        reparameterize(block)
    with pytest.raises(RuntimeError, match="call model.eval"):
        deploy(block, images())


def test_missing_statistics_were_a_type_error() -> None:
    unknown = nn.BatchNorm2d(8, track_running_stats=False).eval()
    block = trained(Block(ConvBN(8, 8, 3), nn.Identity()))
    block.parts[1] = unknown
    with pytest.raises(RuntimeError, match=r"^parts\.1: the BatchNorm has no running statistics"):
        reparameterize(block)
    chain = nn.Sequential(nn.Conv2d(8, 8, 3), unknown, nn.ReLU()).eval()
    with pytest.warns(UserWarning, match="0: 1: the BatchNorm has no running statistics"):
        reparameterize(chain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_half_precision_crashed_or_mixed_dtypes(dtype: torch.dtype) -> None:
    block = trained(Block(ConvBN(8, 8, 3), ConvBN(8, 8, 1), nn.BatchNorm2d(8))).to(dtype)
    deployed = assert_converts(block, images().to(dtype))
    assert {tensor.dtype for tensor in deployed.state_dict().values()} == {dtype}


def test_a_bare_block_was_left() -> None:
    deployed = assert_converts(trained(Block(ConvBN(8, 8, 3), ConvBN(8, 8, 1))), images())
    assert len(deployed.state_dict()) == 2


def test_frozen_parameters_became_trainable() -> None:
    block = trained(Block(ConvBN(8, 8, 3), ConvBN(8, 8, 1))).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in reparameterize(block).model.parameters())


def test_kernels_were_cached_beside_the_parameters() -> None:
    model = trained(create_model("RepVGG-A0", num_classes=3))
    deployed = deploy(model, torch.randn(1, 3, 32, 32)).model
    buffer = io.BytesIO()
    torch.save(deployed, buffer)
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in deployed.state_dict().values())
    assert buffer.tell() < 1.02 * tensors + 200_000


def test_square_pooling_in_se_is_none_of_ours() -> None:
    """Ours takes any size, and one image stays one; that of others stays as it is, and the fold beside it is exact."""
    block = trained(RepVGGBlock(16, 16, use_se=True))
    deployed = assert_converts(block, images(16, 12, 8))
    assert deployed(images(16, 16, 8)[:1]).shape == (1, 16, 16, 8)
    assert_converts(trained(Block(ConvBN(8, 8, 3), conv(1), post=se_with_square_pooling())), images(8, 9, 9))


def test_plus_crashed_after_conversion() -> None:
    model = trained(RepVGGplus([1, 1, 2, 1], 7, [0.25] * 4, use_post_se=True))
    deployed = reparameterize(model, strict=True).model
    assert deployed(images(3, 33, 33)).shape == (2, 7)


def test_converting_in_place_broke_training_that_went_on() -> None:
    block = trained(Block(ConvBN(8, 8, 3), ConvBN(8, 8, 1)))
    deploy(block, images())
    block.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_half_a_model_was_converted_silently() -> None:
    model = nn.Sequential(
        Block(ConvBN(8, 8, 3), ConvBN(8, 8, 1)), Block(conv(3, padding_mode="reflect"), ConvBN(8, 8, 1))
    )
    model = trained(model)
    with pytest.warns(UserWarning, match="cannot fold 1 block: 1: 1.parts.0 has padding_mode 'reflect'"):
        report = reparameterize(model).report
    assert [(entry.path, entry.status) for entry in report.entries if entry.kind == "sum"] == [
        ("0", "fused"),
        ("1", "left"),
    ]
