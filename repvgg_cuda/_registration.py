# SPDX-License-Identifier: MIT
"""What the operators need besides kernels: fake kernels, autograd, autocast and vmap rules; and, where the compiled
module is missing, the operators themselves in pure PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repvgg_cuda import _ext, reference
from repvgg_cuda.branches import TENSORS_PER_BRANCH, BatchNorm, Branches, check_fused_dtype

NAMESPACE = "repvgg_cuda"

#: What csrc/ops/library.cpp defines; used to define the operators where the compiled module is missing.
SCHEMAS = {
    "conv3x3": "(Tensor x, Tensor weight, Tensor? bias=None, int stride=1, int groups=1, "
    'str activation="identity", str algorithm="auto") -> Tensor',
    "fuse_weights": "(Tensor[] tensors, float[] bn_eps, int in_channels, int out_channels, int groups, "
    "ScalarType? dtype, ScalarType? bias_dtype) -> (Tensor weight, Tensor bias)",
}


def _checked_branches(tensors: list[Tensor], *args: Any) -> tuple[Branches, torch.dtype | None, torch.dtype | None]:
    """The operator's arguments of ``fuse_weights`` as a checked block and the two output dtypes."""
    *geometry, dtype, bias_dtype = args
    branches = Branches.from_op_args(tensors, *geometry)
    branches.check()
    check_fused_dtype(dtype)
    check_fused_dtype(bias_dtype)
    return branches, dtype, bias_dtype


def _fuse_weights_python(*args: Any) -> tuple[Tensor, Tensor]:
    return reference.fuse_weights(*_checked_branches(*args))


def _fuse_weights_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return reference.fuse_weights_fake(*_checked_branches(*args))


# --------------------------------------------------------------------------------------------------------- autograd


def _conv3x3_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.stride, ctx.groups, ctx.activation, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, output if ctx.activation == "relu" else None)


def _conv3x3_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiable itself, so double backward works."""
    x, weight, y = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [ctx.stride] * 2, [1, 1], [1, 1], False, [0, 0], ctx.groups, [need_x, need_weight, False]
    )
    grad_bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype) if need_bias else None
    return grad_x, grad_weight, grad_bias, None, None, None, None


def _fuse_weights_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, *ctx.geometry, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _fuse_weights_backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Any, ...]:
    """The chain rule through ``reference.fold_fp64``, in float64 and differentiable itself.

    A branch contributes ``scale * K`` and ``scale * (b - mean) + beta`` with ``scale = gamma / sqrt(var + eps)``.
    """
    tensors = ctx.saved_tensors
    branches = Branches.from_op_args(list(tensors), *ctx.geometry)
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
    return grads, None, None, None, None, None, None


# --------------------------------------------------------------------------------------------------- autocast, vmap


def _conv3x3_autocast(device_type: str) -> Callable[..., Tensor]:
    """Under autocast ``x`` and ``weight`` go to the autocast dtype, as for F.conv2d; a float32 bias stays float32."""
    autocast_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == device_type
        return tensor.to(dtype) if eligible else tensor

    def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        if bias is not None and bias.dtype != torch.float32:
            bias = cast(bias, dtype)
        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            y: Tensor = torch.ops.repvgg_cuda.conv3x3(cast(x, dtype), cast(weight, dtype), bias, *args, **kwargs)
        return y

    return conv3x3


def _conv3x3_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    groups: int = 1,
    activation: str = "identity",
    algorithm: str = "auto",
) -> tuple[Tensor, int]:
    """Over ``x`` alone the mapped dimension B joins the batch; over weight or bias it joins the groups."""
    x_dim, weight_dim, bias_dim = (*in_dims, None)[:3]
    size = info.batch_size
    op = torch.ops.repvgg_cuda.conv3x3

    if x_dim is not None and weight_dim is None and bias_dim is None:
        y = op(x.movedim(x_dim, 0).flatten(0, 1), weight, bias, stride, groups, activation, algorithm)
        return y.unflatten(0, (size, -1)), 0

    def in_front(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    x = in_front(x, x_dim).movedim(0, 1).flatten(1, 2)  # [N, B * C_in, H, W]
    weight = in_front(weight, weight_dim).flatten(0, 1)  # [B * C_out, C_in / groups, 3, 3]
    bias = None if bias is None else in_front(bias, bias_dim).flatten(0, 1)
    y = op(x, weight, bias, stride, size * groups, activation, algorithm)
    return y.unflatten(1, (size, -1)), 1


def _fuse_weights_vmap(*args: Any) -> Any:
    raise RuntimeError(
        "fuse_weights: vmap is not supported; fuse the blocks one after another, or use "
        "repvgg_cuda.reference.fuse_weights"
    )


# -------------------------------------------------------------------------------------------------------- register


def _library(kind: str) -> Any:
    return torch.library.Library(NAMESPACE, kind)  # type: ignore[no-untyped-call]


def _register() -> list[Any]:
    """Registers everything. The returned libraries own the registrations: dropping them would undo these."""
    libraries = []
    if _ext.module is None:
        library = _library("DEF")
        for name, schema in SCHEMAS.items():
            library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        library.impl("conv3x3", reference.conv3x3, "CompositeExplicitAutograd")
        library.impl("fuse_weights", _fuse_weights_python, "CompositeExplicitAutograd")
        libraries.append(library)

    torch.library.register_fake(f"{NAMESPACE}::conv3x3", reference.conv3x3_fake)
    torch.library.register_fake(f"{NAMESPACE}::fuse_weights", _fuse_weights_fake)
    torch.library.register_autograd(f"{NAMESPACE}::conv3x3", _conv3x3_backward, setup_context=_conv3x3_setup_context)
    torch.library.register_autograd(
        f"{NAMESPACE}::fuse_weights", _fuse_weights_backward, setup_context=_fuse_weights_setup_context
    )
    torch.library.register_vmap(f"{NAMESPACE}::conv3x3", _conv3x3_vmap)
    torch.library.register_vmap(f"{NAMESPACE}::fuse_weights", _fuse_weights_vmap)

    library = _library("IMPL")
    library.impl("conv3x3", _conv3x3_autocast("cpu"), "AutocastCPU")
    library.impl("conv3x3", _conv3x3_autocast("cuda"), "AutocastCUDA")
    return [*libraries, library]


_libraries = _register()
