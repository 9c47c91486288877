# SPDX-License-Identifier: MIT
"""Layers: geometry, keys, initialisation, folding one block, squeeze-and-excitation, and what is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from repvgg_cuda import RepConv3x3, RepVGGBlock, testing
from repvgg_cuda.modules import RepVGGplusBlock, SEBlock
from repvgg_cuda.networks import randomise_
from repvgg_cuda.structure import UnfoldableError, batchnorm_of, conv_geometry, read_branches

#: in_channels, out_channels, stride, groups: identity or not, stem, stride 2, groups up to depthwise.
GEOMETRIES = [
    (6, 6, 1, 1),
    (3, 8, 2, 1),
    (6, 9, 1, 3),
    (8, 8, 1, 2),
    (8, 8, 1, 4),
    (8, 8, 2, 4),
    (8, 8, 1, 8),
    (1, 1, 1, 1),
]


def trained_block(*args: Any, **kwargs: Any) -> RepVGGBlock:
    block = randomise_(RepVGGBlock(*args, **kwargs)).eval()
    assert isinstance(block, RepVGGBlock)
    return block


def images(channels: int, height: int = 7, width: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def assert_same_sum(block: RepVGGBlock, conv: RepConv3x3, x: Tensor) -> None:
    """``conv`` computes the sum of the branches of ``block`` (with the ReLU, if it has it), within derived bounds."""
    branches, stride = read_branches(copy.deepcopy(block).double())
    exact = x.double()
    weight_bound, bias_bound = testing.fold_bound(branches, conv.weight.dtype)
    bound = (
        testing.error_bound(x, conv.weight, conv.bias, stride, branches.groups)
        + testing.conv3x3_fp64(exact.abs(), weight_bound, bias_bound, stride, branches.groups)
        + testing.multi_branch_bound(exact, branches, stride)
    )
    oracle = copy.deepcopy(block).double()
    want = oracle.rbr_dense(exact) + oracle.rbr_1x1(exact)
    if oracle.rbr_identity is not None:
        want = want + oracle.rbr_identity(exact)
    want = want.relu() if conv.activation == "relu" else want
    got = conv(x)
    assert got.dtype == x.dtype
    assert ((got.double() - want).abs() <= bound).all(), testing.worst(got, want, bound)


# -------------------------------------------------------------------------------------------------------- RepConv3x3


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize(("c_in", "c_out", "stride", "groups"), GEOMETRIES)
def test_conv_computes_the_operator(c_in: int, c_out: int, stride: int, groups: int, activation: Any) -> None:
    conv = RepConv3x3(c_in, c_out, stride=stride, groups=groups, activation=activation)
    x = images(c_in)
    want = testing.conv3x3_fp64(x, conv.weight, conv.bias, stride, groups, activation)
    bound = testing.error_bound(x, conv.weight, conv.bias, stride, groups)
    assert ((conv(x).double() - want).abs() <= bound).all()


def test_conv_has_the_keys_and_the_initialisation_of_conv2d() -> None:
    torch.manual_seed(0)
    ours = RepConv3x3(6, 8, groups=2)
    torch.manual_seed(0)
    theirs = nn.Conv2d(6, 8, 3, groups=2)
    assert list(ours.state_dict()) == ["weight", "bias"]
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.bias is not None
    assert theirs.bias is not None
    assert torch.equal(ours.bias, theirs.bias)
    assert list(RepConv3x3(6, 8, bias=False).state_dict()) == ["weight"]


def test_conv_shows_what_differs_from_the_default() -> None:
    assert repr(RepConv3x3(6, 8)) == "RepConv3x3(6, 8, stride=1)"
    conv = RepConv3x3(6, 8, stride=2, groups=2, bias=False, activation="relu", algorithm="aten")
    assert repr(conv) == "RepConv3x3(6, 8, stride=2, groups=2, bias=False, activation=relu, algorithm=aten)"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"groups": 4}, "groups must divide in_channels and out_channels, got groups=4, in_channels=6, out_channels=8"),
        ({"groups": 0}, "groups must divide in_channels and out_channels, got groups=0"),
        ({"stride": 3}, "stride must be 1 or 2, got 3; use nn.Conv2d for other strides"),
        ({"activation": "gelu"}, "activation must be one of identity, relu, got 'gelu'"),
    ],
)
def test_conv_refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"RepConv3x3: {message}"):
        RepConv3x3(6, 8, **kwargs)


def test_from_branches_takes_over_dtype_format_and_trainability() -> None:
    block = trained_block(8, 8).half().to(memory_format=torch.channels_last)
    conv = RepConv3x3.from_branches(block.branches())
    assert conv.weight.dtype == torch.float16
    assert conv.bias is not None
    assert conv.bias.dtype == torch.float16
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.is_contiguous()
    assert conv.weight.requires_grad
    assert conv.weight.is_leaf
    block.requires_grad_(False)
    frozen = RepConv3x3.from_branches(block.branches(), dtype=torch.float32)
    assert frozen.weight.dtype == torch.float32
    assert not frozen.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_from_branches_draws_no_random_numbers_and_shares_no_memory() -> None:
    kernel = nn.Conv2d(4, 4, 3).weight
    block = trained_block(4, 4)
    branches = testing.Branches((testing.Branch(kernel),), 4, 4)  # nothing to fold: the result equals its input
    before = torch.get_rng_state()
    conv = RepConv3x3.from_branches(branches)
    RepConv3x3.from_branches(block.branches())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(conv.weight, kernel)
    assert conv.weight.data_ptr() != kernel.data_ptr()


# ------------------------------------------------------------------------------------------------------- RepVGGBlock


@pytest.mark.parametrize("use_se", [False, True])
@pytest.mark.parametrize(("c_in", "c_out", "stride", "groups"), [*GEOMETRIES[:5], (16, 16, 1, 16)])
def test_deploying_keeps_the_function(c_in: int, c_out: int, stride: int, groups: int, use_se: bool) -> None:
    """Grouped identities up to depthwise, where other libraries are off by whole units."""
    c_in, c_out = (c_in * 16, c_out * 16) if use_se and c_out < 16 else (c_in, c_out)
    block = trained_block(c_in, c_out, stride=stride, groups=groups, use_se=use_se)
    assert (block.rbr_identity is not None) == (c_in == c_out and stride == 1)
    deployed = copy.deepcopy(block)
    deployed.switch_to_deploy()
    x = images(c_in)
    assert deployed.rbr_reparam.activation == ("identity" if use_se else "relu")
    assert_same_sum(block, deployed.rbr_reparam, x)
    exact = copy.deepcopy(block).double()
    want = exact(x.double())
    exact.switch_to_deploy()
    torch.testing.assert_close(exact(x.double()), want)
    assert deployed(x).min() >= 0  # the ReLU is still there where it moved into the convolution


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_every_dtype_deploys(dtype: torch.dtype) -> None:
    """The official block answers float16 with "expected scalar type Half but found Float"."""
    block = trained_block(6, 6).to(dtype)
    deployed = copy.deepcopy(block)
    deployed.switch_to_deploy()
    assert {tensor.dtype for tensor in deployed.state_dict().values()} == {dtype}
    assert_same_sum(block, deployed.rbr_reparam, images(6).to(dtype))


def test_keys_are_the_official_ones() -> None:
    statistics = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    train = [f"{name}.conv.weight" for name in ("rbr_dense", "rbr_1x1")]
    train += [f"{name}.bn.{key}" for name in ("rbr_dense", "rbr_1x1") for key in statistics]
    se = ["se.down.weight", "se.down.bias", "se.up.weight", "se.up.bias"]
    deploy = ["rbr_reparam.weight", "rbr_reparam.bias"]
    identity = [f"rbr_identity.{key}" for key in statistics]
    assert set(RepVGGBlock(16, 16).state_dict()) == {*train, *identity}
    assert set(RepVGGBlock(16, 16, stride=2).state_dict()) == set(train)
    assert set(RepVGGBlock(16, 16, use_se=True).state_dict()) == {*train, *identity, *se}
    assert set(RepVGGBlock(16, 16, use_se=True, deploy=True).state_dict()) == {*deploy, *se}
    post = {f"post_{key}" for key in se}
    assert set(RepVGGplusBlock(16, 16, use_post_se=True).state_dict()) == {*train, *identity, *post}
    assert set(RepVGGplusBlock(16, 16, use_post_se=True, deploy=True).state_dict()) == {*deploy, *post}


def test_a_switched_block_is_one_built_deployed() -> None:
    for kwargs in ({}, {"use_se": True}, {"stride": 2, "groups": 4}):
        switched, built = trained_block(16, 16, **kwargs), RepVGGBlock(16, 16, deploy=True, **kwargs).eval()
        switched.switch_to_deploy()
        assert repr(switched) == repr(built)
        assert switched.deploy
        assert built.deploy
        built.load_state_dict(switched.state_dict())
        x = images(16)
        assert torch.equal(built(x), switched(x))


def test_deploying_leaves_nothing_behind() -> None:
    """timm keeps an id_tensor per block, 18 MB in RepVGG-A0; the official code caches one while folding."""
    block = trained_block(16, 16)
    attributes = {name for name, value in vars(block).items() if isinstance(value, Tensor)}
    block.branches()
    block.switch_to_deploy()
    assert {name for name, value in vars(block).items() if isinstance(value, Tensor)} == attributes == set()
    assert not any(hasattr(block, name) for name in ("rbr_dense", "rbr_1x1", "rbr_identity", "id_tensor"))
    buffer = io.BytesIO()
    torch.save(block, buffer)
    assert buffer.getbuffer().nbytes < 16 * 16 * 9 * 4 + 8192
    block.switch_to_deploy()  # a second time does nothing
    assert block.deploy


def test_deploying_keeps_flags_and_format() -> None:
    block = trained_block(8, 8).to(memory_format=torch.channels_last).requires_grad_(False)
    block.training = True  # the BatchNorms are in eval mode, as when fine-tuning with frozen statistics
    block.switch_to_deploy()
    conv = block.rbr_reparam
    assert block.training
    assert conv.training
    assert not conv.weight.requires_grad
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    x = images(8).to(memory_format=torch.channels_last)
    assert block(x).is_contiguous(memory_format=torch.channels_last)


def test_construction_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    RepVGGBlock(4, 4).eval().switch_to_deploy()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kernel_size": 5, "padding": 2}, "kernel_size must be 3, got 5"),
        ({"kernel_size": (3, 1)}, r"kernel_size must be 3, got \(3, 1\)"),
        ({"padding": 0}, "padding must equal dilation, .*, got padding=0 and dilation=1"),
        ({"dilation": 2}, "padding must equal dilation"),
        ({"dilation": 2, "padding": 2}, "dilation must be 1, got 2; the deployed 3x3 operator has no dilation"),
        ({"padding_mode": "reflect"}, "padding_mode must be 'zeros', got 'reflect'"),
        ({"stride": 3}, "stride must be 1 or 2, the same in both directions, got 3"),
        ({"stride": (1, 2)}, r"stride must be 1 or 2, the same in both directions, got \(1, 2\)"),
        ({"stride": "2"}, "stride must be an int or a pair of ints, got '2'"),
        ({"use_se": True}, "use_se needs out_channels >= 16"),
    ],
)
@pytest.mark.parametrize("deploy", [False, True])
def test_block_refuses_what_the_deployed_form_cannot_be(kwargs: dict[str, Any], message: str, deploy: bool) -> None:
    """The official block takes dilation and padding_mode, and trains without but deploys with them."""
    with pytest.raises(RuntimeError, match=f"RepVGGBlock: {message}"):
        RepVGGBlock(8, 8, deploy=deploy, **kwargs)


def test_pairs_are_accepted() -> None:
    block = RepVGGBlock(8, 8, (3, 3), (2, 2), (1, 1), (1, 1))
    assert block.rbr_dense.conv.stride == (2, 2)
    assert block.rbr_identity is None


def test_branches_of_a_deployed_block_are_refused() -> None:
    block = RepVGGBlock(8, 8, deploy=True)
    with pytest.raises(RuntimeError, match="the block is deployed"):
        block.branches()
    with pytest.raises(RuntimeError, match="the block is deployed"):
        block.custom_l2()
    with pytest.raises(RuntimeError, match="deployed already"):
        block.folded()


def test_training_mode_is_refused_and_changes_nothing() -> None:
    block = trained_block(8, 8)
    block.rbr_1x1.train()
    keys = list(block.state_dict())
    with pytest.raises(RuntimeError, match=r"rbr_1x1\.bn: the BatchNorm is in training mode.*call model\.eval\(\)"):
        block.switch_to_deploy()
    assert list(block.state_dict()) == keys


def test_a_batchnorm_without_statistics_is_refused() -> None:
    block = trained_block(8, 8)
    block.rbr_identity = nn.BatchNorm2d(8, track_running_stats=False).eval()
    with pytest.raises(RuntimeError, match=r"rbr_identity: the BatchNorm has no running statistics"):
        block.branches()


def test_hooks_in_the_way_are_refused() -> None:
    block = trained_block(8, 8)
    prune.l1_unstructured(block.rbr_dense.conv, "weight", amount=0.5)
    with pytest.raises(RuntimeError, match=r"rbr_dense\.conv has hooks, which folding would lose"):
        block.switch_to_deploy()
    prune.remove(block.rbr_dense.conv, "weight")
    block.switch_to_deploy()


def test_biases_eps_and_missing_affine_are_read_from_the_layers() -> None:
    """Other libraries drop the bias silently (diff 0.18), assume eps 1e-5, and crash on affine=False."""
    block = trained_block(6, 6)
    block.rbr_dense.conv.bias = nn.Parameter(torch.randn(6))
    block.rbr_1x1.bn.eps = 1e-3
    block.rbr_1x1.bn.running_var.fill_(1e-4)
    block.rbr_identity = nn.BatchNorm2d(6, affine=False).eval()
    block.rbr_identity.running_mean.normal_()
    deployed = copy.deepcopy(block)
    deployed.switch_to_deploy()
    assert_same_sum(block, deployed.rbr_reparam, images(6))


def test_sync_batchnorm_folds() -> None:
    block = trained_block(6, 6)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert isinstance(synced.rbr_identity, nn.SyncBatchNorm)
    synced.switch_to_deploy()
    assert_same_sum(block, synced.rbr_reparam, images(6))


def test_fusion_is_differentiable_through_branches() -> None:
    from repvgg_cuda import fuse_weights

    block = trained_block(4, 4)
    weight, bias = fuse_weights(block.branches())
    (weight.square().sum() + bias.sum()).backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_training_updates_every_parameter_and_statistic() -> None:
    block = RepVGGBlock(4, 4).train()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    block(images(4)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(value, before[key]) for key, value in block.state_dict().items())


# ------------------------------------------------------------------------------------------------ squeeze-excitation


@pytest.mark.parametrize("size", [(12, 8), (8, 12), (16, 8), (1, 1), (1, 5)])
def test_se_takes_any_size(size: tuple[int, int]) -> None:
    """The official SE crashes where W > H, and mixes up rows and batch where H is a multiple of W."""
    se = SEBlock(32, 2).double()
    x = images(32, *size, dtype=torch.float64)
    alone = torch.cat([se(x[:1]), se(x[1:])])
    assert se(x).shape == x.shape
    torch.testing.assert_close(se(x), alone)
    hidden = (se.down.weight[:, :, 0, 0] @ x.mean((2, 3)).T + se.down.bias[:, None]).relu()
    gate = (se.up.weight[:, :, 0, 0] @ hidden + se.up.bias[:, None]).sigmoid().T
    torch.testing.assert_close(se(x), x * gate[:, :, None, None])


def test_se_stands_before_the_relu_and_in_plus_after_it() -> None:
    x = images(16, dtype=torch.float64)
    block = trained_block(16, 16, use_se=True).double()
    summed = block.rbr_dense(x) + block.rbr_1x1(x) + block.rbr_identity(x)
    torch.testing.assert_close(block(x), block.se(summed).relu())
    assert block.se.down.out_channels == 1
    plus = randomise_(RepVGGplusBlock(16, 16, use_post_se=True)).eval().double()
    summed = plus.rbr_dense(x) + plus.rbr_1x1(x) + plus.rbr_identity(x)
    torch.testing.assert_close(plus(x), plus.post_se(summed.relu()))
    assert plus.post_se.down.out_channels == 4
    want = plus(x)
    plus.switch_to_deploy()
    assert plus.rbr_reparam.activation == "relu"
    torch.testing.assert_close(plus(x), want)


def test_plus_block_refuses_se_without_hidden_channels() -> None:
    with pytest.raises(RuntimeError, match="use_post_se needs out_channels >= 4"):
        RepVGGplusBlock(2, 2, use_post_se=True)


def test_another_activation_stays() -> None:
    block = trained_block(6, 6).double()
    block.nonlinearity = nn.SiLU()
    x = images(6, dtype=torch.float64)
    want = block(x)
    block.switch_to_deploy()
    assert block.rbr_reparam.activation == "identity"
    assert isinstance(block.nonlinearity, nn.SiLU)
    torch.testing.assert_close(block(x), want)


def test_custom_l2_is_the_official_penalty() -> None:
    block = trained_block(3, 5).double()
    dense, one = block.rbr_dense, block.rbr_1x1
    want = torch.zeros((), dtype=torch.float64)
    for k in range(5):
        t3 = dense.bn.weight[k].item() / (dense.bn.running_var[k].item() + dense.bn.eps) ** 0.5
        t1 = one.bn.weight[k].item() / (one.bn.running_var[k].item() + one.bn.eps) ** 0.5
        kernel = dense.conv.weight[k]
        want += (kernel**2).sum() - (kernel[:, 1, 1] ** 2).sum()
        want += ((kernel[:, 1, 1] * t3 + one.conv.weight[k, :, 0, 0] * t1) ** 2).sum() / (t3**2 + t1**2)
    torch.testing.assert_close(block.custom_l2(), want)
    block.custom_l2().backward()
    assert dense.conv.weight.grad is not None
    assert dense.bn.weight.grad is None


# ------------------------------------------------------------------------------------------------- reading of layers


def test_same_and_valid_padding_are_read_as_numbers() -> None:
    assert conv_geometry(nn.Conv2d(4, 4, 3, padding="same")).padding == (1, 1)
    assert conv_geometry(nn.Conv2d(4, 4, 3, padding="same", dilation=2)).padding == (2, 2)
    assert conv_geometry(nn.Conv2d(4, 4, 1, padding="valid")).padding == (0, 0)
    geometry = conv_geometry(nn.Conv2d(4, 8, (3, 1), (2, 1), (1, 0), groups=2, padding_mode="reflect"))
    assert geometry == (4, 8, (3, 1), (2, 1), (1, 0), (1, 1), 2, "reflect")


class StandardizedConv2d(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.std(), bias)


class ScaledBranch(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        (StandardizedConv2d(4, 4, 3, padding=1), "rbr_dense is a StandardizedConv2d, not a plain Conv2d"),
        (ScaledBranch(), "rbr_dense has parameters besides those of its convolution and BatchNorm"),
        (nn.Sequential(), "rbr_dense is a Sequential, not a plain Conv2d"),
    ],
)
def test_only_plain_convolutions_are_read(branch: nn.Module, reason: str) -> None:
    block = trained_block(4, 4)
    block.rbr_dense = branch.eval()
    with pytest.raises(UnfoldableError, match=reason):
        block.branches()


class ActivatedBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("layer", [nn.GroupNorm(1, 4), nn.InstanceNorm2d(4), ActivatedBatchNorm(4), nn.ReLU()])
def test_only_plain_batchnorms_are_read(layer: nn.Module) -> None:
    with pytest.raises(UnfoldableError, match=f"here is a {type(layer).__name__}, not a plain BatchNorm2d"):
        batchnorm_of(layer.eval(), "here")


class FrozenBatchNorm2d(nn.Module):
    """As torchvision, timm and detectron2 define it: every number is a buffer, and training mode changes nothing."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = bn.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(bn, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def test_frozen_batchnorms_fold() -> None:
    block = trained_block(6, 6)
    frozen = copy.deepcopy(block)
    frozen.rbr_identity = FrozenBatchNorm2d(block.rbr_identity)
    frozen.rbr_dense.bn = FrozenBatchNorm2d(block.rbr_dense.bn)
    frozen.rbr_identity.train()
    frozen.switch_to_deploy()
    assert_same_sum(block, frozen.rbr_reparam, images(6))
