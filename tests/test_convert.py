# SPDX-License-Identifier: MIT
"""Conversion of models: our blocks, other libraries' blocks by structure, what is kept, what is refused and why."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from repvgg_cuda import RepConv3x3, RepVGGBlock, create_model, reparameterize, testing, verify
from repvgg_cuda.models import RepVGG, RepVGGplus
from repvgg_cuda.modules import RepVGGplusBlock, SEBlock
from repvgg_cuda.networks import randomise_


def tiny(**kwargs: Any) -> Any:
    options: dict[str, Any] = {"num_classes": 7, "width_multiplier": [0.25, 0.25, 0.125, 0.125], **kwargs}
    return randomise_(RepVGG([1, 2, 2, 1], **options)).eval()


def images(channels: int = 3, height: int = 17, width: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return list(state) == list(before) and all(torch.equal(value, before[key]) for key, value in state.items())


# ------------------------------------------------------------------------------------------- blocks of other libraries


def conv_bn(c_in: int, c_out: int, size: int | tuple[int, int], named: bool = True, **kwargs: Any) -> nn.Sequential:
    padding = size // 2 if isinstance(size, int) else (size[0] // 2, size[1] // 2)
    conv = nn.Conv2d(c_in, c_out, size, **{"padding": padding, "bias": False, **kwargs})
    branch = nn.Sequential(conv, nn.BatchNorm2d(c_out))
    if named:
        branch = nn.Sequential()
        branch.add_module("conv", conv)
        branch.add_module("bn", nn.BatchNorm2d(c_out))
    return branch


class OfficialLike(nn.Module):
    """A block with the attribute names of the official code and nothing of this package."""

    def __init__(
        self,
        c_in: int = 6,
        c_out: int = 6,
        stride: int = 1,
        groups: int = 1,
        se: nn.Module | None = None,
        nonlinearity: nn.Module | None = None,
        named: bool = True,
    ) -> None:
        super().__init__()
        self.nonlinearity = nn.ReLU() if nonlinearity is None else nonlinearity
        self.se = nn.Identity() if se is None else se
        has_identity = c_in == c_out and stride == 1
        self.rbr_identity = nn.BatchNorm2d(c_in) if has_identity else None
        self.rbr_dense = conv_bn(c_in, c_out, 3, named, stride=stride, groups=groups)
        self.rbr_1x1 = conv_bn(c_in, c_out, 1, named, stride=stride, groups=groups)

    def summed(self, x: Tensor) -> Tensor:
        y: Tensor = self.rbr_dense(x) + self.rbr_1x1(x)
        return y if self.rbr_identity is None else y + self.rbr_identity(x)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.nonlinearity(self.se(self.summed(x)))
        return y


def foreign(block: nn.Module) -> Any:
    return randomise_(block).eval()


def assert_verified(trained: nn.Module, deployed: nn.Module, x: Tensor) -> None:
    result = verify(trained, deployed, x)
    assert result.ok, str(result)
    assert not result.not_compared, str(result)


FOLDABLE: dict[str, Callable[[], nn.Module]] = {
    "identity": lambda: OfficialLike(),
    "stride 2": lambda: OfficialLike(6, 8, stride=2),
    "groups": lambda: OfficialLike(6, 6, groups=3),
    "depthwise": lambda: OfficialLike(6, 6, groups=6),
    "pre-activation SE": lambda: OfficialLike(6, 6, se=SEBlock(6, 2)),
    "PReLU": lambda: OfficialLike(nonlinearity=nn.PReLU(6)),
    "SiLU": lambda: OfficialLike(nonlinearity=nn.SiLU()),
    "ReLU6": lambda: OfficialLike(nonlinearity=nn.ReLU6()),
    "no activation": lambda: OfficialLike(nonlinearity=nn.Identity()),
    "unnamed layers": lambda: OfficialLike(named=False),
}


@pytest.mark.parametrize("kind", FOLDABLE)
def test_official_structure_folds(kind: str) -> None:
    """Found by structure, in a model of another library, and loadable where the official deploy form is expected."""
    block = foreign(FOLDABLE[kind]())
    model = nn.Sequential(nn.Conv2d(3, 6, 1), block, nn.Flatten()).eval()
    deployed, report = reparameterize(model, strict=True)
    assert [(entry.path, entry.family, entry.status) for entry in report.entries] == [("1", "OfficialLike", "fused")]
    assert_verified(model, deployed, images())
    kept = {f"1.{key}" for key in block.state_dict() if key.startswith(("se.", "nonlinearity."))}
    assert {key for key in deployed.state_dict() if key.startswith("1.")} == {
        "1.rbr_reparam.weight",
        "1.rbr_reparam.bias",
        *kept,
    }
    assert isinstance(deployed[1], OfficialLike)
    assert isinstance(deployed[1].rbr_reparam, RepConv3x3)


def test_activation_joins_the_convolution_where_nothing_stands_between() -> None:
    fused = {kind: reparameterize(foreign(FOLDABLE[kind]()), strict=True).model for kind in FOLDABLE}
    assert {kind for kind, block in fused.items() if block.rbr_reparam.activation == "relu"} == {
        "identity",
        "stride 2",
        "groups",
        "depthwise",
        "unnamed layers",
    }


class FunctionalReLU(OfficialLike):
    def __init__(self) -> None:
        super().__init__()
        del self.nonlinearity, self.se

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.summed(x))


class YoloStyle(OfficialLike):
    def __init__(self) -> None:
        super().__init__(named=False)
        del self.nonlinearity, self.se
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.summed(x))
        return y


class PlainBranches(OfficialLike):
    """A bias in one branch, no BatchNorm in another, the bare input in the third."""

    def __init__(self) -> None:
        super().__init__()
        self.rbr_dense = conv_bn(6, 6, 3, bias=True)
        self.rbr_1x1 = nn.Conv2d(6, 6, 1)
        self.rbr_identity = nn.Identity()


class PlusLike(OfficialLike):
    """As the blocks of the official RepVGGplus: SE after the activation."""

    def __init__(self) -> None:
        super().__init__()
        del self.se
        self.post_se = SEBlock(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.post_se(self.nonlinearity(self.summed(x)))
        return y


class PostSE(OfficialLike):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.se(self.nonlinearity(self.summed(x)))
        return y


class Clipped(OfficialLike):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=100)


class WithPostBN(OfficialLike):
    """As QARepVGG: the same names, and a BatchNorm on the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.nonlinearity(self.bn(self.summed(x)))
        return y


class WithScale(OfficialLike):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((6, 1, 1), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class WithLayerScale(OfficialLike):
    """A constant factor on one branch, another and a constant on the sum, and a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((6,), 0.3))
        self.register_buffer("shift", torch.full((1, 6, 1, 1), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        dense = self.rbr_dense(x) * self.gamma.view(1, -1, 1, 1)
        y: Tensor = self.nonlinearity((dense - self.rbr_1x1(x)) / 2.5 + self.shift - x)
        return y


class Summed(OfficialLike):
    def forward(self, x: Tensor) -> Tensor:
        return self.summed(x)


def with_branches(dense: nn.Module, one: nn.Module | None = None, identity: nn.Module | None = None) -> OfficialLike:
    block = OfficialLike()
    block.rbr_dense, block.rbr_1x1, block.rbr_identity = dense, one or conv_bn(6, 6, 1), identity
    return block


def pooled(stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 6, 1, stride=stride, bias=False), nn.BatchNorm2d(6), nn.AvgPool2d(1))


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    **{
        kind.__name__: kind
        for kind in (FunctionalReLU, YoloStyle, PlainBranches, PlusLike, Clipped, WithPostBN, WithScale, Summed)
    },
    "post-activation SE": lambda: PostSE(se=SEBlock(6, 2)),
    "dilation": lambda: with_branches(conv_bn(6, 6, 3, padding=2, dilation=2)),
    "dilation beside none": lambda: with_branches(conv_bn(6, 6, 3, padding=2, dilation=2), conv_bn(6, 6, 3)),
    "5x5": lambda: with_branches(conv_bn(6, 6, 5)),
    "even kernel": lambda: with_branches(conv_bn(6, 6, 4, padding=1), conv_bn(6, 6, 2, padding=0)),
    "1x3 beside 3x1": lambda: with_branches(
        conv_bn(6, 6, (1, 3), padding=(0, 1)), conv_bn(6, 6, (3, 1), padding=(1, 0)), nn.BatchNorm2d(6)
    ),
    "stride 3": lambda: with_branches(conv_bn(6, 6, 3, stride=3), conv_bn(6, 6, 1, stride=3)),
    "groups that differ": lambda: with_branches(conv_bn(6, 6, 3), conv_bn(6, 6, 1, groups=2)),
    "average pooling": lambda: with_branches(conv_bn(6, 6, 3), nn.AvgPool2d(3, 1, 1)),
    "average pooling and BatchNorm": lambda: with_branches(
        conv_bn(6, 6, 3), nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(6))
    ),
    "pooling of one pixel": lambda: with_branches(conv_bn(6, 6, 3), pooled(1)),
    "3x3 then 1x1": lambda: with_branches(nn.Sequential(*conv_bn(6, 6, 3), *conv_bn(6, 6, 1, groups=2))),
    "1x1 then 3x3, no bias": lambda: with_branches(
        nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), *conv_bn(6, 6, 3, groups=3))
    ),
    "padding by name": lambda: with_branches(conv_bn(6, 6, 3, padding="same"), conv_bn(6, 6, 1, padding="valid")),
    "a sum in a branch": lambda: with_branches(Summed(), conv_bn(6, 6, 5), nn.Identity()),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_variants_of_the_structure_fold(kind: str) -> None:
    block = foreign(VARIANTS[kind]())
    deployed, report = reparameterize(block, strict=True)
    assert [(entry.kind, entry.path) for entry in report.fused] == [("sum", "")]
    assert isinstance(deployed, type(block))
    assert_verified(block, deployed, images(6))
    kept = {key for key in deployed.state_dict() if not key.startswith("rbr_reparam.")}
    assert kept == {key for key in block.state_dict() if key.startswith(("post_se.", "se.", "scale"))}


def test_constant_scales_fold() -> None:
    block = foreign(WithLayerScale())
    deployed, report = reparameterize(block, strict=True)
    assert [(entry.kind, entry.branches) for entry in report.fused] == [("sum", "3x3+1x1+id")]
    assert_verified(block, deployed, images(6))
    assert {"gamma", "shift", "rbr_dense.conv.weight"}.isdisjoint(deployed.state_dict())


class TwoInputs(OfficialLike):
    def forward(self, x: Tensor, penalty: Tensor) -> Tensor:
        return super().forward(x) + penalty


class ReturnsPair(OfficialLike):
    def forward(self, x: Tensor, with_sum: bool = True) -> Any:
        y = self.summed(x)
        return (F.relu(y), y if with_sum else None)


def test_other_arguments_and_results_are_kept() -> None:
    x = images(6)
    block = foreign(TwoInputs())
    deployed = reparameterize(block, strict=True).model
    torch.testing.assert_close(deployed(x, penalty=x * 3), block(x, penalty=x * 3))
    pair = foreign(ReturnsPair())
    deployed = reparameterize(pair, strict=True).model
    for got, want in zip(deployed(x), pair(x), strict=True):
        torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="with_sum must be True, which the module was converted for"):
        deployed(x, with_sum=False)


UNFOLDABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "padding": (
        lambda: with_branches(conv_bn(6, 6, 3, padding=0)),
        r"do not line up: a 3x3 kernel with padding \(0, 0\)",
    ),
    "padding of 1x1": (lambda: with_branches(conv_bn(6, 6, 3), conv_bn(6, 6, 1, padding=1)), "do not line up"),
    "padding_mode": (lambda: with_branches(conv_bn(6, 6, 3, padding_mode="reflect")), "padding_mode 'reflect'"),
    "one-sided padding": (
        lambda: with_branches(conv_bn(6, 6, 2, padding="same"), conv_bn(6, 6, 1)),
        "rbr_dense.conv: padding='same' is one-sided",
    ),
    "strides": (
        lambda: with_branches(conv_bn(6, 6, 3, stride=3), conv_bn(6, 6, 1, stride=2)),
        r"the branches disagree: one has stride \(3, 3\), another \(2, 2\)",
    ),
    "channels": (lambda: with_branches(conv_bn(6, 1, 3)), "one has out_channels 1, another 6"),
    "average pooling without padding": (
        lambda: with_branches(conv_bn(6, 6, 3), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        "rbr_1x1 does not count its padding",
    ),
    "pooling with ceil_mode": (
        lambda: with_branches(conv_bn(6, 6, 3), nn.AvgPool2d(3, 1, 1, ceil_mode=True)),
        "ceil_mode or divisor_override",
    ),
    "1x1 with BatchNorm then 3x3": (
        lambda: with_branches(nn.Sequential(*conv_bn(6, 6, 1), *conv_bn(6, 6, 3))),
        "a 3x3 kernel pads with zeros what a 1x1 layer with a bias or BatchNorm computes",
    ),
    "3x3 then 3x3": (
        lambda: with_branches(nn.Sequential(*conv_bn(6, 6, 3), *conv_bn(6, 6, 3))),
        "a 3x3 kernel follows one of 3x3",
    ),
    "BatchNorm then 3x3": (
        lambda: with_branches(nn.Sequential(nn.BatchNorm2d(6), *conv_bn(6, 6, 3))),
        "pads with zeros what a 1x1 layer with a bias or BatchNorm computes",
    ),
    "depthwise beside dense": (
        lambda: with_branches(conv_bn(6, 6, 5, groups=6), conv_bn(6, 6, 1)),
        "one convolution would need 4.8 times the weights of its branches, 900 instead of 186",
    ),
}


@pytest.mark.parametrize("kind", UNFOLDABLE)
def test_what_cannot_be_folded_is_left_with_its_reason(kind: str) -> None:
    make, reason = UNFOLDABLE[kind]
    model = nn.Sequential(foreign(make())).eval()
    before = snapshot(model)
    with pytest.warns(UserWarning, match=f"cannot fold 1 block: 0: .*{reason}"):
        converted, report = reparameterize(model, chains=False)
    assert not report.fused
    assert [(entry.path, entry.status) for entry in report.left] == [("0", "left")]
    assert unchanged(converted, before)
    with pytest.raises(RuntimeError, match=f"cannot fold 1 block: 0: .*{reason}"):
        reparameterize(model, strict=True, inplace=True, chains=False)
    assert unchanged(model, before)


class WrongEps(OfficialLike):
    """Normalises with another eps than its layer says: structure alone cannot show it."""

    def forward(self, x: Tensor) -> Tensor:
        bn = self.rbr_identity
        identity = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps * 10)
        y: Tensor = self.nonlinearity(self.rbr_dense(x) + self.rbr_1x1(x) + identity)
        return y


class Subclassed(RepVGGBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class SameInASubclass(RepVGGBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0


@pytest.mark.parametrize("make", [WrongEps, lambda: Subclassed(6, 6), lambda: SameInASubclass(6, 6)])
def test_what_the_forward_does_counts(make: Callable[[], nn.Module]) -> None:
    """Not what layers or class names say."""
    block = foreign(make())
    deployed = reparameterize(block, strict=True).model
    torch.testing.assert_close(
        deployed.double()(images(6).double()), block.double()(images(6).double()), rtol=0, atol=1e-5
    )


def test_a_forward_set_on_the_instance_counts() -> None:
    block = foreign(RepVGGBlock(6, 6))
    block.forward = lambda x: x
    with pytest.warns(UserWarning, match="found nothing to fold"):
        reparameterize(block, chains=False)


def test_proving_leaves_no_trace() -> None:
    """No random numbers are drawn, no statistics move, no gradient mode changes."""
    block = foreign(OfficialLike(nonlinearity=nn.PReLU(6)))
    before, state = snapshot(block), torch.get_rng_state()
    reparameterize(block, strict=True)
    assert unchanged(block, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_blocks_on_the_meta_device_fold_in_shape() -> None:
    deployed = reparameterize(foreign(OfficialLike()).to("meta"), strict=True).model
    assert {(tuple(p.shape), p.device.type) for p in deployed.parameters()} == {((6, 6, 3, 3), "meta"), ((6,), "meta")}


# ---------------------------------------------------------------------------------------------------------- our models


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"use_se": True, "width_multiplier": [0.25] * 4}, {"override_groups_map": {2: 2, 4: 4}}],
    ids=["plain", "se", "groups"],
)
def test_our_networks_convert_and_load(kwargs: dict[str, Any]) -> None:
    trained = tiny(**kwargs)
    deployed, report = reparameterize(trained, strict=True)
    assert_verified(trained, deployed, images())
    assert [entry.path for entry in report.fused] == [
        "stage0",
        "stage1.0",
        "stage2.0",
        "stage2.1",
        "stage3.0",
        "stage3.1",
        "stage4.0",
    ]
    assert [entry.branches for entry in report.fused][2:4] == ["3x3+1x1", "3x3+1x1+id"]
    options = {"num_classes": 7, "width_multiplier": [0.25, 0.25, 0.125, 0.125], "deploy": True, **kwargs}
    fresh = RepVGG([1, 2, 2, 1], **options).eval()
    fresh.load_state_dict(deployed.state_dict())
    assert torch.equal(fresh(images()), deployed(images()))
    assert repr(fresh) == repr(deployed)


def test_a_whole_official_model_loads_after_conversion() -> None:
    trained = randomise_(create_model("RepVGG-A0")).eval()
    deployed = reparameterize(trained, strict=True).model
    create_model("RepVGG-A0", deploy=True).load_state_dict(deployed.state_dict())


def test_blocks_of_every_kind_anywhere() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"a": RepVGGBlock(3, 6, stride=2), "b": nn.ModuleList([RepVGGplusBlock(6, 6)])})
            self.tail = nn.Sequential(OfficialLike(), nn.Conv2d(6, 2, 1))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.tail(self.body["b"][0](self.body["a"](x)))
            return y

    model = foreign(Nested())
    deployed, report = reparameterize(model, strict=True)
    assert [(entry.path, entry.family) for entry in report.fused] == [
        ("body.a", "RepVGGBlock"),
        ("body.b.0", "RepVGGplusBlock"),
        ("tail.0", "OfficialLike"),
    ]
    assert type(deployed) is Nested
    assert_verified(model, deployed, images())


@pytest.mark.parametrize(
    "block", [RepVGGBlock(6, 6), RepVGGplusBlock(6, 6), OfficialLike()], ids=lambda b: type(b).__name__
)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_bare_block_converts(block: nn.Module, inplace: bool) -> None:
    """timm walks the children only, and silently does nothing."""
    block = foreign(copy.deepcopy(block))
    trained = copy.deepcopy(block)
    deployed, report = reparameterize(block, inplace=inplace, strict=True)
    assert report.fused[0].path == ""
    assert "(the model itself)" in str(report)
    assert_verified(trained, deployed, images(6))


@pytest.mark.parametrize("outer", [RepVGGBlock, OfficialLike])
@pytest.mark.parametrize("inner", [RepVGGBlock, OfficialLike])
def test_blocks_inside_of_blocks_convert(outer: Callable[..., nn.Module], inner: Callable[..., nn.Module]) -> None:
    block = outer(6, 6)
    block.se = inner(6, 6)
    foreign(block)
    deployed, report = reparameterize(block, strict=True)
    assert [entry.name for entry in report.fused] == ["(the model itself)", "se"]
    assert {key.rsplit(".", 1)[0] for key in deployed.state_dict()} == {"rbr_reparam", "se.rbr_reparam"}
    assert_verified(block, deployed, images(6))


def test_a_block_in_a_branch_converts_where_its_holder_cannot() -> None:
    block = foreign(with_branches(RepVGGBlock(6, 6))).double()
    deployed, report = reparameterize(block, strict=True)
    assert [entry.path for entry in report.fused] == ["rbr_dense", "rbr_1x1.conv"]
    x = images(6, dtype=torch.float64)
    torch.testing.assert_close(deployed(x), block(x))


def test_the_trained_model_is_untouched_unless_asked() -> None:
    for model in (tiny(), nn.Sequential(foreign(OfficialLike()))):
        model.eval()
        before = snapshot(model)
        deployed = reparameterize(model).model
        assert unchanged(model, before)
        pointers = {parameter.data_ptr() for parameter in model.parameters()}
        assert pointers.isdisjoint(parameter.data_ptr() for parameter in deployed.parameters())
        assert reparameterize(model, inplace=True).model is model
        assert not unchanged(model, before)


def test_shared_blocks_stay_shared() -> None:
    for block in (foreign(RepVGGBlock(6, 6)), foreign(OfficialLike())):
        model = nn.Sequential(block, nn.Sequential(block, nn.ReLU()), block).eval()
        deployed, report = reparameterize(model, strict=True)
        assert len(report.fused) == 1
        assert deployed[0] is deployed[1][0] is deployed[2]
        assert isinstance(deployed[0].rbr_reparam, RepConv3x3)
        want = model.double()(images(6).double())
        exact = reparameterize(model, strict=True).model
        torch.testing.assert_close(exact(images(6).double()), want)


def test_what_stands_outside_the_blocks_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), foreign(OfficialLike()), foreign(RepVGGBlock(6, 6)), nn.Dropout(0.5))
    model.eval()
    model.note = {"trained": "yes"}
    model[0].requires_grad_(False)
    model[3].train()
    calls: list[str] = []
    model[0].register_forward_hook(lambda *args: calls.append("conv"))
    model[2].register_forward_hook(lambda *args: calls.append("block"))
    deployed = reparameterize(model, strict=True).model
    deployed(images())
    assert calls == ["conv", "block"]
    assert deployed.note == {"trained": "yes"}
    assert not deployed[0].weight.requires_grad
    assert [module.training for module in deployed] == [False, False, False, True]
    assert {name for name, module in deployed.named_modules() if module.training} == {"3"}


@pytest.mark.parametrize("make", [RepVGGBlock, OfficialLike])
def test_frozen_stays_frozen(make: Callable[..., nn.Module]) -> None:
    """Elsewhere frozen parameters become trainable by conversion."""
    model = nn.Sequential(foreign(make(3, 6)), foreign(make(6, 6))).eval()
    model[0].requires_grad_(False)
    deployed = reparameterize(model, strict=True).model
    flags = [{parameter.requires_grad for parameter in block.parameters()} for block in deployed]
    assert flags == [{False}, {True}]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("make", [RepVGGBlock, OfficialLike])
def test_every_dtype_and_channels_last(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    model = nn.Sequential(foreign(make(3, 6, stride=2)), foreign(make(6, 6))).eval()
    model = model.to(dtype).to(memory_format=torch.channels_last)
    deployed = reparameterize(model, strict=True).model
    assert {tensor.dtype for tensor in deployed.state_dict().values()} == {dtype}
    weights = [block.rbr_reparam.weight for block in deployed]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    x = images(dtype=dtype).to(memory_format=torch.channels_last)
    assert_verified(model, deployed, x)
    assert deployed(x).is_contiguous(memory_format=torch.channels_last)


def test_half_convolutions_beside_float_statistics_fold() -> None:
    block = foreign(RepVGGBlock(6, 6))
    for conv in (block.rbr_dense.conv, block.rbr_1x1.conv):
        conv.half()
    deployed = reparameterize(block, strict=True).model
    assert deployed.rbr_reparam.weight.dtype == torch.float16


def test_a_fold_that_overflows_is_left() -> None:
    block = foreign(RepVGGBlock(6, 6)).half()
    with torch.no_grad():
        block.rbr_dense.bn.weight.fill_(6e4)
        block.rbr_dense.bn.running_var.zero_()
    with pytest.warns(UserWarning, match="it folds to NaN or infinity in float16"):
        report = reparameterize(block).report
    assert report.left


# -------------------------------------------------------------------------------------------------------- batch norms


@pytest.mark.parametrize("make", [RepVGGBlock, OfficialLike])
def test_training_mode_is_refused_with_the_path(make: Callable[..., nn.Module]) -> None:
    """The first cause of "outputs differ after conversion" elsewhere. Nothing is converted by half."""
    model = nn.Sequential(foreign(make(3, 6)), nn.Sequential(foreign(make(6, 6)))).eval()
    model[1][0].rbr_1x1.train()
    before = snapshot(model)
    for inplace in (False, True):
        with pytest.raises(RuntimeError, match=r"^1\.0\.rbr_1x1\.bn: .*training mode.*call model\.eval\(\) first"):
            reparameterize(model, inplace=inplace)
        assert unchanged(model, before)


def test_missing_running_statistics_are_refused_with_the_path() -> None:
    model = nn.Sequential(foreign(RepVGGBlock(6, 6)))
    model[0].rbr_identity = nn.BatchNorm2d(6, track_running_stats=False)
    with pytest.raises(RuntimeError, match=r"^0\.rbr_identity: .*no running statistics.*track_running_stats=True"):
        reparameterize(model.eval())


@pytest.mark.parametrize("make", [RepVGGBlock, OfficialLike])
def test_eps_affine_and_sync_batchnorm(make: Callable[..., nn.Module]) -> None:
    """YOLO models have eps 1e-3: folding with 1e-5 is off by more than the result where variances are small."""
    block = foreign(make(6, 6))
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
            module.running_var.mul_(1e-3)
    block.rbr_identity = nn.BatchNorm2d(6, eps=1e-3, affine=False).eval()
    assert_verified(block, reparameterize(block, strict=True).model, images(6))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block)).eval()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synced.modules())
    deployed = reparameterize(synced, strict=True).model
    assert_verified(block, deployed, images(6))


# --------------------------------------------------------------------------------------------------- hooks, wrappers


@pytest.mark.parametrize("make", [RepVGGBlock, OfficialLike])
def test_hooks_inside_a_block_are_not_lost(make: Callable[..., nn.Module]) -> None:
    block = foreign(make(6, 6))
    prune.l1_unstructured(block.rbr_dense.conv, "weight", amount=0.5)
    prune.remove(block.rbr_dense.conv, "weight")
    handle = block.rbr_dense.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="0.rbr_dense has hooks, which folding would lose; remove them first"):
        reparameterize(nn.Sequential(block))
    handle.remove()
    assert reparameterize(block, strict=True).report.fused


def test_hooks_on_a_block_are_kept() -> None:
    block = foreign(OfficialLike())
    block.register_forward_hook(lambda module, args, y: y * 2)
    block.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    deployed = reparameterize(nn.Sequential(block), strict=True).model
    torch.testing.assert_close(deployed(images(6)), block(images(6)), rtol=1e-4, atol=1e-4)


def test_hooks_on_se_are_kept() -> None:
    block = foreign(RepVGGBlock(16, 16, use_se=True))
    calls: list[int] = []
    block.se.register_forward_hook(lambda *args: calls.append(1))
    reparameterize(block, strict=True).model(images(16))
    assert calls == [1]


def test_parametrized_weights_fold() -> None:
    block = foreign(RepVGGBlock(6, 6))
    nn.utils.parametrizations.weight_norm(block.rbr_dense.conv)
    block.eval()
    deployed = reparameterize(block, inplace=False, strict=True).model
    assert set(deployed.state_dict()) == {"rbr_reparam.weight", "rbr_reparam.bias"}
    assert_verified(block, deployed, images(6))


def test_data_parallel_converts() -> None:
    model = nn.DataParallel(tiny()).eval()
    deployed, report = reparameterize(model, strict=True)
    assert isinstance(deployed, nn.DataParallel)
    assert report.fused[0].path == "module.stage0"
    assert_verified(model, deployed, images())


def test_plus_loses_its_auxiliary_heads_wherever_it_is() -> None:
    inner = randomise_(RepVGGplus([1, 1, 2, 1], 7, [0.25] * 4, use_post_se=True)).eval()
    model = nn.ModuleDict({"net": inner}).eval()
    deployed, report = reparameterize(model, strict=True)
    assert report.dropped == ("net.stage1_aux", "net.stage2_aux", "net.stage3_first_aux")
    assert "dropped net.stage1_aux" in str(report)
    assert_verified(inner, deployed["net"], images())


# ------------------------------------------------------------------------------------------------------------- report


def test_the_report_counts_and_explains() -> None:
    crooked = with_branches(conv_bn(6, 6, 3), nn.AvgPool2d(3, 1, 1, count_include_pad=False))
    model = nn.Sequential(foreign(RepVGGBlock(3, 6)), foreign(crooked), RepVGGBlock(6, 6, deploy=True)).eval()
    with pytest.warns(UserWarning, match="cannot fold 1 block: 1: 1.rbr_1x1 does not count its padding") as caught:
        deployed, report = reparameterize(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [(entry.path, entry.status) for entry in report.entries] == [
        ("2", "deployed"),
        ("0", "fused"),
        ("1.rbr_dense.conv", "fused"),
        ("1", "left"),
    ]
    fused = report.fused[0]
    assert (fused.parameters_before, fused.parameters_after) == (3 * 6 * 10 + 4 * 6, 3 * 6 * 9 + 6)
    assert (fused.conv, fused.kind, fused.denormals) == ("0.rbr_reparam", "sum", 0)
    weight = deployed[0].rbr_reparam.weight
    trained = max(float(model[0].get_submodule(name).conv.weight.abs().max()) for name in ("rbr_dense", "rbr_1x1"))
    assert fused.range_growth == pytest.approx(float(weight.abs().max()) / trained)
    total = sum(parameter.numel() for parameter in deployed.parameters())
    assert report.parameters_after == total
    assert report.parameters_before == sum(parameter.numel() for parameter in model.parameters())
    lines = str(report).splitlines()
    assert lines[1].split()[:3] == ["2", "RepVGGBlock", "330"]
    assert lines[1].endswith("in deploy form already")
    assert lines[2].split()[:6] == ["0", "RepVGGBlock", "3x3+1x1", "204", "->", "168"]
    assert lines[4].endswith(
        "left: 1.rbr_1x1 does not count its padding (count_include_pad=False): no convolution does that"
    )
    counts = "fused 1 of 2 blocks, fused 1 of 1 conv-BatchNorm chains, 1 in deploy form already, left 1; "
    assert lines[5].startswith(counts)
    loaded = json.loads(report.to_json())
    assert loaded == json.loads(json.dumps(report.to_dict()))
    assert loaded["entries"][3]["reason"].startswith("1.rbr_1x1 does not count its padding")


def test_deployed_models_convert_to_themselves() -> None:
    deployed = reparameterize(tiny()).model
    before = snapshot(deployed)
    again, report = reparameterize(deployed, strict=True)
    assert not report.fused
    assert not report.left
    assert len(report.deployed) == 7
    assert unchanged(again, before)


def test_nothing_to_fuse_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)).eval()
    with pytest.warns(UserWarning, match="found nothing to fold: no sum of affine branches of one tensor, no conv"):
        converted, report = reparameterize(model)
    assert str(report) == report.summary()
    assert repr(converted) == repr(model)
    with pytest.raises(RuntimeError, match="reparameterize: found nothing to fold"):
        reparameterize(model, strict=True)


def test_success_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reparameterize(tiny())
        reparameterize(foreign(OfficialLike()))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# ------------------------------------------------------------------------------------------- life after conversion


def test_deployed_models_copy_pickle_and_reload() -> None:
    deployed = reparameterize(nn.Sequential(tiny(features_only=True, out_indices=(2,))), strict=True).model
    x = images()
    want = deployed(x)[0]
    assert torch.equal(copy.deepcopy(deployed)(x)[0], want)
    assert torch.equal(pickle.loads(pickle.dumps(deployed))(x)[0], want)
    other = reparameterize(nn.Sequential(tiny(features_only=True, out_indices=(2,)))).model
    randomise_(other)
    other.load_state_dict(deployed.state_dict())
    assert torch.equal(other(x)[0], want)
    tensors = [value for module in deployed.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    assert not tensors  # nothing cached beside the parameters


def test_deployed_models_can_be_trained_on() -> None:
    deployed = reparameterize(tiny()).model.train()
    deployed(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in deployed.parameters())
    assert all(isinstance(block.rbr_reparam, RepConv3x3) for block in deployed.blocks())


@pytest.mark.parametrize("kwargs", [{}, {"use_se": True, "width_multiplier": [0.25] * 4}], ids=["plain", "se"])
def test_deployed_models_compile_and_export(kwargs: dict[str, Any]) -> None:
    deployed = reparameterize(tiny(**kwargs), strict=True).model.double().requires_grad_(False)
    compiled = torch.compile(deployed, fullgraph=True, backend="aot_eager")
    x = images(dtype=torch.float64)
    torch.testing.assert_close(compiled(x), deployed(x))
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(deployed, (images(3, 70, 66, torch.float64),), dynamic_shapes=(sizes,))
    for shape in ((3, 3, 97, 65), (5, 3, 66, 130)):
        other = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(program.module()(other), deployed(other))


def test_compiled_models_convert() -> None:
    model = torch.compile(tiny(), backend="eager")
    deployed, report = reparameterize(model, strict=True)
    assert report.fused[0].path == "_orig_mod.stage0"
    assert_verified(model, deployed, images())
    assert deployed(images()).shape == (2, 7)
