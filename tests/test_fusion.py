# SPDX-License-Identifier: MIT
"""Weight fusion: the fold against its float64 oracle, the fused convolution against the three-branch reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import repvgg_cuda
from repvgg_cuda import BatchNorm, Branch, Branches, reference, testing


def double(branches: Branches) -> Branches:
    """The same block in float64."""
    tensors, *geometry = branches.op_args()
    return Branches.from_op_args([t.double() for t in tensors], *geometry)


def assert_fold(branches: Branches, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Folds, and checks weight and bias against the float64 fold."""
    weight, bias = repvgg_cuda.fuse_weights(branches, dtype=dtype)
    want_weight, want_bias = reference.fold_fp64(branches)
    weight_bound, bias_bound = testing.fold_bound(branches, dtype)
    assert weight.dtype == bias.dtype == dtype
    assert ((weight.double() - want_weight).abs() <= weight_bound).all(), testing.worst(
        weight, want_weight, weight_bound
    )
    assert ((bias.double() - want_bias).abs() <= bias_bound).all(), testing.worst(bias, want_bias, bias_bound)
    return weight, bias


def assert_same_function(branches: Branches, stride: int = 1) -> None:
    """The float64 fold computes what the float64 branches compute: the algebra, with rounding out of the way."""
    x = torch.randn(2, branches.in_channels, 7, 9, dtype=torch.float64)
    exact = double(branches)
    weight, bias = repvgg_cuda.fuse_weights(exact)
    y = repvgg_cuda.conv3x3(x, weight, bias, stride=stride, groups=branches.groups)
    want = reference.multi_branch(x, exact, stride)
    # Both round in float64: each within the bound of its own sum.
    bound = testing.multi_branch_bound(x, exact, stride) + testing.error_bound(x, weight, bias, stride, branches.groups)
    assert ((y - want).abs() <= bound).all(), testing.worst(y, want, bound)


BLOCKS = {
    "repvgg": testing.random_branches(6, 6),
    "repvgg-stride": testing.random_branches(4, 6, identity=False),
    "no-bn": testing.random_branches(6, 6, bn=False),
    "conv-bias": testing.random_branches(6, 6, bias=True),
    "conv-bias-no-bn": testing.random_branches(6, 6, bias=True, bn=False),
    "not-affine": testing.random_branches(6, 6, affine=False),
    "mobileone": testing.random_branches(8, 8, n_3x3=4, n_1x1=1),
    "mobileone-depthwise": testing.random_branches(8, 8, groups=8, n_3x3=4, n_1x1=1),
    "many-1x1": testing.random_branches(6, 6, n_3x3=0, n_1x1=3),
    "identity-only": testing.random_branches(6, 6, n_3x3=0, n_1x1=0),
    "g2": testing.random_branches(8, 8, groups=2),
    "g4": testing.random_branches(8, 12, groups=4),
    "depthwise": testing.random_branches(8, 8, groups=8),
    "depthwise-multiplier": testing.random_branches(4, 12, groups=4),
    "qarepvgg": testing.random_branches(6, 6, post_bn=True),
    "qarepvgg-v2": testing.random_branches(6, 6, bn=False, post_bn=True),
    "yolo-eps": testing.random_branches(6, 6, eps=1e-3),
    "one-channel": testing.random_branches(1, 1),
    "most-branches": testing.random_branches(4, 4, n_3x3=16, n_1x1=15),
}


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_fold_is_rounded_once(block: Branches, dtype: torch.dtype) -> None:
    assert_fold(block, dtype)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_fused_is_the_sum_of_the_branches(block: Branches, stride: int) -> None:
    if stride == 2 and any(part.kernel is None for part in block.parts):
        block = dataclasses.replace(block, parts=tuple(p for p in block.parts if p.kernel is not None))
    if block.parts:
        assert_same_function(block, stride)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sum_of_branches(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 3]), "groups")
    width = groups * data.draw(st.integers(1, 3), "C/groups")
    block = testing.random_branches(
        width,
        data.draw(st.sampled_from([width, groups * 2]), "K"),
        groups,
        data.draw(st.integers(0, 2**31), "seed"),
        n_3x3=data.draw(st.integers(0, 3), "n_3x3"),
        n_1x1=data.draw(st.integers(1, 3), "n_1x1"),
        bias=data.draw(st.booleans(), "bias"),
        bn=data.draw(st.booleans(), "bn"),
        affine=data.draw(st.booleans(), "affine"),
        post_bn=data.draw(st.booleans(), "post_bn"),
        eps=data.draw(st.sampled_from([0.0, 1e-5, 1e-3, 1.0]), "eps"),
    )
    assert_fold(block, data.draw(st.sampled_from(testing.DTYPES), "dtype"))
    assert_same_function(block)


def test_the_notebook() -> None:
    """(1, 2, 256, 256): 3x3 + 1x1 + identity as one convolution; equal to about 1e-6, not to allclose's defaults."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 256, 256, generator=generator)
    conv3 = torch.randn(2, 2, 3, 3, generator=generator)
    conv1 = torch.randn(2, 2, 1, 1, generator=generator)
    branches = Branches((Branch(conv3), Branch(conv1), Branch(None)), 2, 2)

    want = F.conv2d(x, conv3, padding=1) + F.conv2d(x, conv1) + x
    weight, bias = repvgg_cuda.fuse_weights(branches)
    y = repvgg_cuda.conv3x3(x, weight, bias)

    padded = F.pad(conv1, [1, 1, 1, 1])
    identity = torch.zeros(2, 2, 3, 3)
    identity[0, 0, 1, 1] = identity[1, 1, 1, 1] = 1
    assert torch.equal(weight, conv3 + padded + identity)
    assert (bias == 0).all()
    difference = (y - want).abs().max().item()
    assert 0 < difference < 4e-6  # outputs reach 20, where a float32 step is 1.9e-6
    assert not torch.allclose(y, want)
    torch.testing.assert_close(y, want)
    oracle = reference.multi_branch(x.double(), double(branches))
    assert ((y.double() - oracle).abs() <= testing.error_bound(x, weight, None)).all()


def test_batchnorm_eps_is_the_layers_own() -> None:
    """tensorrtx#1444: the wrong eps ruins channels with a small variance."""
    block = testing.random_branches(4, 4, identity=False, n_1x1=0)
    bn = block.parts[0].bn
    assert bn is not None
    small = dataclasses.replace(bn, var=bn.var * 1e-4)
    weights = {}
    for eps in (1e-5, 1e-3):
        part = dataclasses.replace(block.parts[0], bn=dataclasses.replace(small, eps=eps))
        weights[eps], _ = assert_fold(dataclasses.replace(block, parts=(part,)))
    assert not torch.allclose(weights[1e-5], weights[1e-3], rtol=0.5)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_grouped_identity(groups: int) -> None:
    """yolov7's fuse_repvgg_block fills the diagonal of a [C, C/groups] matrix: wrong for every group but the first."""
    block = Branches((Branch(torch.zeros(8, 8 // groups, 3, 3)), Branch(None)), 8, 8, groups)
    weight, bias = repvgg_cuda.fuse_weights(block)
    x = torch.randn(1, 8, 5, 6)
    assert torch.equal(repvgg_cuda.conv3x3(x, weight, bias, groups=groups), x)


def test_mixed_dtypes_fold_in_float64() -> None:
    """Half kernels beside float32 statistics, as after model.half() with BatchNorm kept in float32."""
    block = testing.random_branches(6, 6)
    parts = tuple(
        dataclasses.replace(part, kernel=None if part.kernel is None else part.kernel.half()) for part in block.parts
    )
    mixed = dataclasses.replace(block, parts=parts)
    weight, bias = repvgg_cuda.fuse_weights(mixed, bias_dtype=torch.float32)
    assert weight.dtype == torch.float16
    assert bias.dtype == torch.float32
    assert_fold(mixed, torch.float16)


def test_identity_only_without_batchnorm_is_refused_in_words() -> None:
    with pytest.raises(RuntimeError, match="at least one branch must hold a tensor"):
        repvgg_cuda.fuse_weights(Branches((Branch(None),), 4, 4))


def test_strided_tensors() -> None:
    block = testing.random_branches(6, 6)
    want = repvgg_cuda.fuse_weights(block)
    kernel = block.parts[0].kernel
    assert kernel is not None
    strided = dataclasses.replace(block.parts[0], kernel=kernel.contiguous(memory_format=torch.channels_last))
    got = repvgg_cuda.fuse_weights(dataclasses.replace(block, parts=(strided, *block.parts[1:])))
    assert torch.equal(got[0], want[0])
    assert got[0].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_round_to_nearest_even_of_every_kind_of_value(dtype: torch.dtype) -> None:
    """The integer conversions of csrc/core/dtype.h, through a 1x1 kernel that nothing else changes."""
    info = torch.finfo(dtype)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).float()
    below, above = torch.nextafter(values, torch.tensor(-torch.inf)), torch.nextafter(values, torch.tensor(torch.inf))
    midpoints = (values[:-1].double() + values[1:].double()).div(2).float()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, info.max * 1.001, 1e-45, -1e-45])
    samples = torch.cat([values, below, above, midpoints, special])
    block = Branches((Branch(samples.reshape(-1, 1, 1, 1)),), 1, samples.numel())
    weight, _ = repvgg_cuda.fuse_weights(block, dtype=dtype)
    got, want = weight[:, 0, 1, 1], samples.to(dtype)
    same = (got == want) | (got.isnan() & want.isnan())
    assert same.all(), (samples[~same][:5], got[~same][:5], want[~same][:5])


TENSOR, VECTOR = torch.randn(4, 4, 3, 3), torch.ones(4)
BN = BatchNorm(VECTOR, VECTOR, 1e-5, VECTOR, VECTOR)
BAD_BLOCKS = {
    "no-branches": (Branches((), 4, 4), "fuse_weights: a block must have 1 to 32 branches, got 0"),
    "too-many": (
        Branches((Branch(TENSOR),) * 33, 4, 4),
        "fuse_weights: a block must have 1 to 32 branches, got 33",
    ),
    "groups": (
        Branches((Branch(TENSOR),), 4, 4, 3),
        "fuse_weights: groups must divide in_channels and out_channels, got groups=3, in_channels=4, out_channels=4",
    ),
    "5x5": (
        Branches((Branch(torch.randn(4, 4, 5, 5)),), 4, 4),
        "fuse_weights: branch 0: kernel must be [4, 4, 3, 3] or [4, 4, 1, 1], got [4, 4, 5, 5]",
    ),
    "channels": (
        Branches((Branch(TENSOR), Branch(torch.randn(4, 2, 1, 1))), 4, 4),
        "fuse_weights: branch 1: kernel must be [4, 4, 3, 3] or [4, 4, 1, 1], got [4, 2, 1, 1]",
    ),
    "identity": (
        Branches((Branch(torch.randn(8, 4, 3, 3)), Branch(None)), 4, 8),
        "fuse_weights: branch 1: kernel is an identity, which needs in_channels == out_channels, got 4 and 8",
    ),
    "vector-length": (
        Branches((Branch(TENSOR, torch.ones(3)),), 4, 4),
        "fuse_weights: branch 0: bias must be [4], got [3]",
    ),
    "bn-length": (
        Branches((Branch(TENSOR, None, dataclasses.replace(BN, var=torch.ones(5))),), 4, 4),
        "fuse_weights: branch 0: BatchNorm var must be [4], got [5]",
    ),
    "post-bn-length": (
        Branches((Branch(TENSOR),), 4, 4, 1, dataclasses.replace(BN, weight=torch.ones(5))),
        "fuse_weights: the sum: BatchNorm weight must be [4], got [5]",
    ),
    "int": (
        Branches((Branch(TENSOR.int()),), 4, 4),
        "fuse_weights: branch 0: kernel must be float64, float32, float16 or bfloat16, got int32; "
        "convert it with .float()",
    ),
    "device": (
        Branches((Branch(TENSOR, VECTOR.to("meta")),), 4, 4),
        "fuse_weights: branch 0: bias must be on the device of the first tensor (cpu), got meta; move it with .to()",
    ),
    "eps": (
        Branches((Branch(TENSOR, None, dataclasses.replace(BN, eps=-1.0)),), 4, 4),
        "fuse_weights: bn_eps[0] must be at least 0, got -1",
    ),
    "sparse": (
        Branches((Branch(TENSOR.to_sparse()),), 4, 4),
        "fuse_weights: every tensor must be a dense tensor, got layout sparse_coo; convert it with .to_dense()",
    ),
}


@pytest.mark.parametrize(("block", "message"), BAD_BLOCKS.values(), ids=BAD_BLOCKS.keys())
def test_error_texts(block: Branches, message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        repvgg_cuda.fuse_weights(block)
    assert str(error.value) == message


SAME_IN_THE_OPERATOR = [name for name in BAD_BLOCKS if name not in ("no-branches", "device", "sparse")]


@pytest.mark.parametrize("name", SAME_IN_THE_OPERATOR)
def test_the_operator_raises_the_same_errors(name: str) -> None:
    """torch.ops callers pass by Branches.check(): the compiled checks say the same."""
    block, message = BAD_BLOCKS[name]
    with pytest.raises(RuntimeError) as error:
        torch.ops.repvgg_cuda.fuse_weights(*block.op_args(), None, None)
    assert str(error.value) == message


EMPTY = torch.empty(0)
BAD_OP_CALLS = {
    "seven-tensors": (
        ([TENSOR] + [EMPTY] * 6, [0.0], 4, 4, 1, None, None),
        "fuse_weights: tensors must hold six per branch (kernel, bias, BatchNorm weight, bias, mean, var) and four "
        "more for a BatchNorm on the sum, got 7",
    ),
    "no-eps": (
        ([TENSOR] + [EMPTY] * 5, [], 4, 4, 1, None, None),
        "fuse_weights: bn_eps must have one entry per branch and one for a BatchNorm on the sum (1), got 0",
    ),
    "mean-without-var": (
        ([TENSOR, EMPTY, EMPTY, EMPTY, VECTOR, EMPTY], [0.0], 4, 4, 1, None, None),
        "fuse_weights: branch 0: BatchNorm mean and var must be given together, and with its weight and bias",
    ),
    "gamma-alone": (
        ([TENSOR, EMPTY, VECTOR, EMPTY, EMPTY, EMPTY], [0.0], 4, 4, 1, None, None),
        "fuse_weights: branch 0: BatchNorm mean and var must be given together, and with its weight and bias",
    ),
    "empty-post-bn": (
        ([TENSOR] + [EMPTY] * 9, [0.0, 0.0], 4, 4, 1, None, None),
        "fuse_weights: the sum: BatchNorm mean and var must be given together, and with its weight and bias",
    ),
    "int-output": (
        ([TENSOR] + [EMPTY] * 5, [0.0], 4, 4, 1, torch.int32, None),
        "fuse_weights: dtype and bias_dtype must be float64, float32, float16 or bfloat16, got int32",
    ),
}


@pytest.mark.parametrize("meta", [False, True], ids=["kernel", "fake"])
@pytest.mark.parametrize(("arguments", "message"), BAD_OP_CALLS.values(), ids=BAD_OP_CALLS.keys())
def test_malformed_operator_arguments(arguments: tuple[object, ...], message: str, meta: bool) -> None:
    tensors, *rest = arguments
    assert isinstance(tensors, list)
    with pytest.raises(RuntimeError) as error:
        torch.ops.repvgg_cuda.fuse_weights([t.to("meta") if meta else t for t in tensors], *rest)
    assert str(error.value) == message


# ---------------------------------------------------------------------------------------------------------------- batch


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["default", "float16"])
def test_a_batch_is_its_blocks_folded_one_by_one(dtype: torch.dtype | None) -> None:
    blocks = [*BLOCKS.values(), double(BLOCKS["repvgg"])]
    folded = repvgg_cuda.fuse_weights_batch(blocks, dtype=dtype, bias_dtype=torch.float32)
    assert len(folded) == len(blocks)
    for block, (weight, bias) in zip(blocks, folded, strict=True):
        want_weight, want_bias = repvgg_cuda.fuse_weights(block, dtype=dtype, bias_dtype=torch.float32)
        assert (weight.dtype, bias.dtype) == (want_weight.dtype, torch.float32)
        assert torch.equal(weight, want_weight)
        assert torch.equal(bias, want_bias)


def test_an_empty_batch() -> None:
    assert repvgg_cuda.fuse_weights_batch([]) == []


def fuse_and_prepack(blocks: list[Branches]) -> list[repvgg_cuda.FusedLayer]:
    """With inputs that fit."""
    return repvgg_cuda.fuse_and_prepack(blocks, [[1, block.in_channels, 14, 14] for block in blocks])


def test_batch_errors_name_the_block() -> None:
    good, (bad, message) = BLOCKS["repvgg"], BAD_BLOCKS["eps"]
    with pytest.raises(RuntimeError) as error:
        repvgg_cuda.fuse_weights_batch([good, good, bad])
    assert str(error.value) == message.replace("fuse_weights: ", "fuse_weights_batch: block 2: ")


@pytest.mark.parametrize("fuse", [repvgg_cuda.fuse_weights_batch, fuse_and_prepack], ids=["fused", "packed"])
def test_a_batch_names_the_block_that_has_no_branches(fuse: Callable[..., object]) -> None:
    good = BLOCKS["repvgg"]
    with pytest.raises(RuntimeError, match=r": block 1: a block must have 1 to 32 branches, got 0$"):
        fuse([good, dataclasses.replace(good, parts=())])


BATCH = ([TENSOR] + [EMPTY] * 5, [6], [0.0], [4], [4], [1])
BAD_BATCHES = {
    "no-tensors-in-a-block": ((BATCH[0], [6, 0], [0.0], [4], [4], [1]), "tensors_per_block must be at least 1, got 0"),
    "too-few-tensors": (([TENSOR], *BATCH[1:]), "tensors must have 6 entries for these tensors_per_block, got 1"),
    "no-eps": ((*BATCH[:2], [], *BATCH[3:]), "bn_eps must have 1 entries for these tensors_per_block, got 0"),
    "in-channels": (
        (*BATCH[:3], [4, 4], *BATCH[4:]),
        "in_channels must have 1 entries for these tensors_per_block, got 2",
    ),
    "out-channels": ((*BATCH[:4], [], BATCH[5]), "out_channels must have 1 entries for these tensors_per_block, got 0"),
    "groups": ((*BATCH[:5], []), "groups must have 1 entries for these tensors_per_block, got 0"),
    "a-bad-block": (
        (*BATCH[:5], [3]),
        "block 0: groups must divide in_channels and out_channels, got groups=3, in_channels=4, out_channels=4",
    ),
}


@pytest.mark.parametrize("meta", [False, True], ids=["kernel", "fake"])
@pytest.mark.parametrize(("arguments", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_malformed_batches(arguments: tuple[list[object], ...], message: str, meta: bool) -> None:
    tensors, *rest = arguments
    tensors = [t.to("meta") if meta else t for t in tensors if isinstance(t, Tensor)]
    with pytest.raises(RuntimeError) as error:
        torch.ops.repvgg_cuda.fuse_weights_batch(tensors, *rest, None, None)
    assert str(error.value) == f"fuse_weights_batch: {message}"


# ----------------------------------------------------------------------------------------------------- fold and prepack

SIZES = {"repvgg": [1, 24, 14, 14], "stem": [2, 3, 32, 32], "groups": [1, 24, 7, 9]}
PACKED_BLOCKS = {
    "repvgg": testing.random_branches(24, 24),
    "stem": testing.random_branches(3, 8, identity=False),
    "groups": testing.random_branches(24, 24, groups=2),
}
STRIDES = [1, 2, 1]


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["default", "float16"])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_fuse_and_prepack_is_both_one_after_the_other(
    memory: Literal["fast", "low"], dtype: torch.dtype | None
) -> None:
    blocks = list(PACKED_BLOCKS.values())
    layers = repvgg_cuda.fuse_and_prepack(blocks, list(SIZES.values()), strides=STRIDES, memory=memory, dtype=dtype)
    assert len(layers) == len(blocks)
    for block, size, stride, layer in zip(blocks, SIZES.values(), STRIDES, layers, strict=True):
        weight, bias = repvgg_cuda.fuse_weights(block, dtype=dtype)
        packed = repvgg_cuda.prepack(weight, size, stride=stride, groups=block.groups, memory=memory)
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.bias, bias)
        assert torch.equal(layer.packed, packed)
        x = torch.randn(size, dtype=weight.dtype)
        options = {"stride": stride, "groups": block.groups, "activation": "relu"}
        want = repvgg_cuda.conv3x3(x, weight, bias, packed=packed, **options)
        assert torch.equal(repvgg_cuda.conv3x3(x, **layer._asdict(), **options), want)


def test_fuse_and_prepack_of_nothing() -> None:
    assert repvgg_cuda.fuse_and_prepack([], []) == []


BAD_PACKING = {
    "sizes": ({"input_sizes": [[1, 24, 14, 14]]}, "input_sizes must have one entry for each of the 2 blocks, got 1"),
    "strides": ({"strides": [1]}, "strides must have one entry for each of the 2 blocks, got 1"),
    "extents": (
        {"input_sizes": [[1, 24, 14, 14], [1, 24]]},
        "block 1: input_size must be [N, C_in, H, W], got 2 numbers",
    ),
    "memory": ({"memory": "none"}, "block 0: memory must be one of fast, low, got 'none'"),
    "algorithm": ({"algorithm": "no"}, "block 0: algorithm 'no' is not available on cpu"),
    "a-stride": ({"strides": [1, 3]}, "block 1: stride must be 1 or 2, got 3"),
    "channels": (
        {"input_sizes": [[1, 24, 14, 14], [1, 25, 14, 14]]},
        "block 1: input_size has C_in=25 channels, but weight [24, 24, 3, 3] with groups=1 expects 24",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_PACKING.values(), ids=BAD_PACKING.keys())
def test_fuse_and_prepack_errors_name_the_block(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"input_sizes": [[1, 24, 14, 14]] * 2, **options}
    with pytest.raises(RuntimeError) as error:
        repvgg_cuda.fuse_and_prepack([PACKED_BLOCKS["repvgg"]] * 2, **arguments)
    assert str(error.value).startswith(f"fuse_and_prepack: {message}")


@pytest.mark.parametrize("meta", [False, True], ids=["kernel", "fake"])
def test_fuse_and_prepack_operator_checks_its_lists(meta: bool) -> None:
    tensors, *rest = BATCH
    tensors = [t.to("meta") if meta else t for t in tensors]
    for sizes, strides, text in (
        ([1, 4, 8], [1], "input_sizes must have 4 entries for these tensors_per_block, got 3"),
        ([1, 4, 8, 8], [], "strides must have 1 entries for these tensors_per_block, got 0"),
    ):
        with pytest.raises(RuntimeError) as error:
            torch.ops.repvgg_cuda.fuse_and_prepack(tensors, *rest, None, None, sizes, strides)
        assert str(error.value) == f"fuse_and_prepack: {text}"
