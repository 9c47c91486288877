# SPDX-License-Identifier: MIT
"""The operators that fold: in plain PyTorch, as fake kernels, their gradients. _registration.py registers them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from repvgg_cuda import reference
from repvgg_cuda.branches import TENSORS_PER_BRANCH, BatchNorm, Branches, check_fused_dtype, require


def _checked_branches(tensors: list[Tensor], *args: Any) -> tuple[Branches, torch.dtype | None, torch.dtype | None]:
    """The operator's arguments of ``fuse_weights`` as a checked block and the two output dtypes."""
    *geometry, dtype, bias_dtype = args
    branches = Branches.from_op_args(tensors, *geometry)
    branches.check()
    check_fused_dtype(dtype)
    check_fused_dtype(bias_dtype)
    return branches, dtype, bias_dtype


def fuse_weights_python(*args: Any) -> tuple[Tensor, Tensor]:
    return reference.fuse_weights(*_checked_branches(*args))


def fuse_weights_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return reference.fuse_weights_fake(*_checked_branches(*args))


_Block = tuple[list[Tensor], list[float], int, int, int]


def _require_entries(op: str, name: str, values: Sequence[object], size: int) -> None:
    require(
        len(values) == size, f"{op}: {name} must have {size} entries for these tensors_per_block, got {len(values)}"
    )


def _blocks(
    op: str,
    tensors: list[Tensor],
    tensors_per_block: Sequence[int],
    bn_eps: Sequence[float],
    in_channels: Sequence[int],
    out_channels: Sequence[int],
    groups: Sequence[int],
) -> list[_Block]:
    """The lists of an operator for many blocks as the first arguments of ``fuse_weights``, block by block."""
    for count in tensors_per_block:
        require(count >= 1, f"{op}: tensors_per_block must be at least 1, got {count}")
    batchnorms = [-(-count // TENSORS_PER_BRANCH) for count in tensors_per_block]
    _require_entries(op, "tensors", tensors, sum(tensors_per_block))
    _require_entries(op, "bn_eps", bn_eps, sum(batchnorms))
    for name, values in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
        _require_entries(op, name, values, len(tensors_per_block))
    all_tensors, all_eps = iter(tensors), iter(bn_eps)
    return [
        (list(islice(all_tensors, count)), list(islice(all_eps, eps)), C, K, g)
        for count, eps, C, K, g in zip(tensors_per_block, batchnorms, in_channels, out_channels, groups, strict=True)
    ]


@contextmanager
def numbered(op: str, block: int, prefix: str) -> Iterator[None]:
    """Errors say the operator and the block in place of ``prefix``."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{op}: block {block}: {str(error).removeprefix(prefix)}") from None


def _fuse_each(op: str, fuse: Callable[..., tuple[Tensor, Tensor]], *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """``fuse_weights_batch`` by an implementation of ``fuse_weights``."""
    *lists, dtype, bias_dtype = args
    weights, biases = [], []
    for i, (tensors, *geometry) in enumerate(_blocks(op, *lists)):
        with numbered(op, i, "fuse_weights: "):
            weight, bias = fuse(tensors, *geometry, dtype, bias_dtype)
        weights.append(weight)
        first = weights[0].device
        require(
            weight.device == first,
            f"{op}: block {i} must be on the device of block 0 ({first}), got {weight.device}; "
            "fuse it in a call of its own",
        )
        biases.append(bias)
    return weights, biases


def fuse_weights_batch_python(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    return _fuse_each("fuse_weights_batch", fuse_weights_python, *args)


def fuse_weights_batch_fake(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    return _fuse_each("fuse_weights_batch", fuse_weights_fake, *args)


def fuse_and_prepack(
    fuse: Callable[..., tuple[Tensor, Tensor]], prepack: Callable[..., Tensor], *args: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """``fuse_and_prepack`` by implementations of ``fuse_weights`` and ``prepack``."""
    op, groups = "fuse_and_prepack", args[5]
    batch, (input_sizes, strides, *choice) = args[:8], args[8:]
    weights, biases = _fuse_each(op, fuse, *batch)
    _require_entries(op, "input_sizes", input_sizes, 4 * len(weights))
    _require_entries(op, "strides", strides, len(weights))
    packed = []
    for i, weight in enumerate(weights):
        with numbered(op, i, "prepack: "):
            packed.append(prepack(weight, input_sizes[4 * i : 4 * i + 4], strides[i], groups[i], *choice))
    return weights, biases, packed


# --------------------------------------------------------------------------------------------------------- autograd


def fuse_weights_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, *ctx.geometry, _, _ = inputs
    ctx.save_for_backward(*tensors)


def fuse_weights_backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Any, ...]:
    grads = _fold_gradients((list(ctx.saved_tensors), *ctx.geometry), grad_weight, grad_bias)
    return grads, None, None, None, None, None, None


def batch_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Of ``fuse_weights_batch`` and ``fuse_and_prepack``, which begin with the same lists."""
    tensors, *ctx.lists = inputs[:6]
    ctx.save_for_backward(*tensors)


def batch_backward(
    ctx: Any, grad_weights: Sequence[Tensor], grad_biases: Sequence[Tensor], *grad_packed: Any
) -> tuple[Any, ...]:
    grads: list[Tensor | None] = []
    blocks = _blocks("fuse_weights_batch", list(ctx.saved_tensors), *ctx.lists)
    for block, *outputs in zip(blocks, grad_weights, grad_biases, strict=True):
        grads += _fold_gradients(block, *outputs)
    return grads, *[None] * (len(ctx.needs_input_grad) - 1)


def _fold_gradients(block: _Block, grad_weight: Tensor, grad_bias: Tensor) -> list[Tensor | None]:
    """The chain rule through ``reference.fold_fp64``, in float64 and differentiable itself.

    A branch contributes ``scale * K`` and ``scale * (b - mean) + beta`` with ``scale = gamma / sqrt(var + eps)``.
    """
    tensors = block[0]
    branches = Branches.from_op_args(*block)
    grads: list[Tensor | None] = [None] * len(tensors)

    def store(i: int, grad: Tensor) -> None:
        if tensors[i].numel():
            grads[i] = grad.to(tensors[i].dtype)

    def through_batchnorm(bn: BatchNorm, start: int, kernel: Tensor, bias: Tensor | float) -> Tensor:
        """Stores the gradients of ``bn`` (its slots begin at ``start``), which was applied to kernel and bias."""
        inv_std = torch.rsqrt(bn.var.double() + bn.eps)
        gamma = torch.ones_like(inv_std) if bn.weight is None else bn.weight.double()
        g_scale = (g_kernel * kernel).sum((1, 2, 3)) + g_bias * (bias - bn.mean.double())
        store(start, g_scale * inv_std)
        store(start + 1, g_bias)
        store(start + 2, -g_bias * gamma * inv_std)
        store(start + 3, g_scale * gamma * inv_std**3 * -0.5)
        return gamma * inv_std

    g_kernel, g_bias = grad_weight.double(), grad_bias.double()
    if branches.post_bn is not None:
        kernel_sum, bias_sum = reference.fold_fp64(dataclasses.replace(branches, post_bn=None))
        start = len(branches.parts) * TENSORS_PER_BRANCH
        scale = through_batchnorm(branches.post_bn, start, kernel_sum, bias_sum)
        g_kernel, g_bias = g_kernel * scale.reshape(-1, 1, 1, 1), g_bias * scale
    for i, part in enumerate(branches.parts):
        start = i * TENSORS_PER_BRANCH
        scale = torch.ones_like(g_bias)
        if part.bn is not None:
            kernel = reference.as_3x3(part.kernel, branches.out_channels, branches.groups, g_kernel).double()
            scale = through_batchnorm(part.bn, start + 2, kernel, 0.0 if part.bias is None else part.bias.double())
        g_taps = g_kernel[:, :, 1:2, 1:2] if tensors[start].shape[-1] == 1 else g_kernel
        store(start, g_taps * scale.reshape(-1, 1, 1, 1))
        store(start + 1, g_bias * scale)
    return grads
