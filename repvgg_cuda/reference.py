# SPDX-License-Identifier: MIT
"""The operators in plain PyTorch: the oracle of the tests, the fallback without the compiled module, the fake kernels.

Written to be read: every step of the RepVGG algebra (arXiv:2101.03697, sec. 3.3) is a line here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg_cuda.branches import FLOAT_DTYPES, BatchNorm, Branches, dtype_name, require, shape_name

ACTIVATIONS = ("identity", "relu")


# --------------------------------------------------------------------------------------------------------- conv3x3


def check_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int, activation: str, algorithm: str
) -> None:
    """Raises RuntimeError if the arguments of ``conv3x3`` disagree. Checks, order and texts of csrc/ops/tensors.h."""
    require(
        x.dim() == 4,
        f"conv3x3: x must be [N, C_in, H, W], got {x.dim()} dimensions; add a batch dimension with x.unsqueeze(0)",
    )
    require(
        x.dtype in FLOAT_DTYPES,
        f"conv3x3: x must be float64, float32, float16 or bfloat16, got {dtype_name(x.dtype)}; "
        "convert it with x.float()",
    )
    require(
        weight.dim() == 4 and weight.shape[2] == 3 and weight.shape[3] == 3,
        f"conv3x3: weight must be [C_out, C_in / groups, 3, 3], got {shape_name(weight)}; "
        "use F.conv2d for other kernel sizes",
    )
    require(
        weight.dtype == x.dtype,
        f"conv3x3: weight must have the dtype of x ({dtype_name(x.dtype)}), got {dtype_name(weight.dtype)}; "
        "convert one of them with .to()",
    )
    require(
        weight.device == x.device,
        f"conv3x3: weight must be on the device of x ({x.device}), got {weight.device}; move it with .to(x.device)",
    )
    require(stride in (1, 2), f"conv3x3: stride must be 1 or 2, got {stride}; use F.conv2d for other strides")
    require(groups >= 1, f"conv3x3: groups must be at least 1, got {groups}")
    require(
        x.shape[1] >= 1 and x.shape[1] % groups == 0 and weight.shape[0] >= 1 and weight.shape[0] % groups == 0,
        f"conv3x3: groups must divide C_in and C_out, got groups={groups}, C_in={x.shape[1]}, C_out={weight.shape[0]}",
    )
    require(
        weight.shape[1] * groups == x.shape[1],
        f"conv3x3: x has C_in={x.shape[1]} channels, but weight {shape_name(weight)} with groups={groups} "
        f"expects {weight.shape[1] * groups}",
    )
    require(
        x.shape[2] >= 1 and x.shape[3] >= 1,
        f"conv3x3: x must have H >= 1 and W >= 1, got {shape_name(x)}",
    )
    if bias is not None:
        require(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            f"conv3x3: bias must be [C_out] = [{weight.shape[0]}], got {shape_name(bias)}",
        )
        require(
            bias.dtype == x.dtype or (bias.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)),
            f"conv3x3: bias must have the dtype of x ({dtype_name(x.dtype)}), or float32 where x is float16 or "
            f"bfloat16, got {dtype_name(bias.dtype)}; convert it with .to()",
        )
        require(
            bias.device == x.device,
            f"conv3x3: bias must be on the device of x ({x.device}), got {bias.device}; move it with .to(x.device)",
        )
    require(
        activation in ACTIVATIONS,
        f"conv3x3: activation must be one of {', '.join(ACTIVATIONS)}, got '{activation}'",
    )
    require(algorithm != "", "conv3x3: algorithm must be 'auto' or a name from repvgg_cuda.algorithms(), got ''")


def output_format(x: Tensor) -> torch.memory_format:
    """channels_last if ``x`` is dense channels_last and not dense NCHW as well (as C = 1 would be), else contiguous."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    groups: int = 1,
    activation: str = "identity",
    algorithm: str = "auto",
) -> Tensor:
    """``activation(F.conv2d(x, weight, bias, stride, padding=1, groups=groups))`` in the memory format of ``x``."""
    check_conv3x3(x, weight, bias, stride, groups, activation, algorithm)
    require(
        algorithm in ("auto", "aten"),
        f"conv3x3: algorithm '{algorithm}' is not available on {x.device.type}; available: aten",
    )
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding=1, groups=groups)
    y = y.contiguous(memory_format=output_format(x))
    return y.relu_() if activation == "relu" else y


def conv3x3_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    groups: int = 1,
    activation: str = "identity",
    algorithm: str = "auto",
) -> Tensor:
    """Shape, dtype and strides of the result, for ``torch.compile``, ``torch.export`` and meta tensors."""
    check_conv3x3(x, weight, bias, stride, groups, activation, algorithm)
    size = (x.shape[0], weight.shape[0], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
    return x.new_empty(size).contiguous(memory_format=output_format(x))


# ---------------------------------------------------------------------------------------------------- weight fusion


def pad_1x1_to_3x3(kernel: Tensor) -> Tensor:
    """``[C_out, C_in/groups, 1, 1]`` -> ``[C_out, C_in/groups, 3, 3]`` with the tap in the centre."""
    return F.pad(kernel, [1, 1, 1, 1])


def identity_kernel(channels: int, groups: int, like: Tensor) -> Tensor:
    """The kernel ``[channels, channels/groups, 3, 3]`` that returns its input; dtype and device of ``like``."""
    kernel = like.new_zeros(channels, channels // groups, 3, 3)
    index = torch.arange(channels, device=like.device)
    kernel[index, index % (channels // groups), 1, 1] = 1
    return kernel


def as_3x3(kernel: Tensor | None, channels: int, groups: int, like: Tensor) -> Tensor:
    """Any branch's kernel (None: the identity) as a 3x3 kernel."""
    if kernel is None:
        return identity_kernel(channels, groups, like)
    return pad_1x1_to_3x3(kernel) if kernel.shape[2] == 1 else kernel


def scale_and_shift(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """``BN(v) = v * scale + shift`` in float64; ``scale = gamma / sqrt(var + eps)``, ``shift = beta - mean * scale``"""
    scale = 1 / torch.sqrt(bn.var.double() + bn.eps)
    scale = scale if bn.weight is None else bn.weight.double() * scale
    shift = -bn.mean.double() * scale
    return scale, shift if bn.bias is None else bn.bias.double() + shift


def fold_batchnorm(kernel: Tensor, bias: Tensor, bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """The kernel and bias of ``BN(conv(x) + bias)``."""
    scale, shift = scale_and_shift(bn)
    return kernel * scale.reshape(-1, 1, 1, 1), bias * scale + shift


def fold_fp64(branches: Branches) -> tuple[Tensor, Tensor]:
    """The fold in float64, step by step: each branch to 3x3, its BatchNorm into it, the sum, the sum's BatchNorm."""
    like = branches.tensors()[0].double()
    kernel_sum = like.new_zeros(branches.out_channels, branches.in_channels // branches.groups, 3, 3)
    bias_sum = like.new_zeros(branches.out_channels)
    for part in branches.parts:
        kernel = as_3x3(part.kernel, branches.out_channels, branches.groups, like).double()
        bias = like.new_zeros(branches.out_channels) if part.bias is None else part.bias.double()
        if part.bn is not None:
            kernel, bias = fold_batchnorm(kernel, bias, part.bn)
        kernel_sum, bias_sum = kernel_sum + kernel, bias_sum + bias
    if branches.post_bn is not None:
        kernel_sum, bias_sum = fold_batchnorm(kernel_sum, bias_sum, branches.post_bn)
    return kernel_sum, bias_sum


def fuse_weights(
    branches: Branches, dtype: torch.dtype | None = None, bias_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """One 3x3 kernel and one bias for a block: :func:`fold_fp64`, rounded once."""
    weight, bias = fold_fp64(branches)
    dtype = dtype or branches.default_dtype()
    return weight.to(dtype), bias.to(bias_dtype or dtype)


def fuse_weights_fake(
    branches: Branches, dtype: torch.dtype | None = None, bias_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of :func:`fuse_weights`."""
    like, dtype = branches.tensors()[0], dtype or branches.default_dtype()
    size = (branches.out_channels, branches.in_channels // branches.groups, 3, 3)
    return like.new_empty(size, dtype=dtype), like.new_empty(size[0], dtype=bias_dtype or dtype)


def multi_branch(x: Tensor, branches: Branches, stride: int = 1) -> Tensor:
    """The block before fusion, in the dtype of ``x``: the sum of its branches, each as it was trained (eval mode).

    This is the three-branch reference of the tests and the baseline of the benchmarks.
    """

    def batch_norm(value: Tensor, bn: BatchNorm | None) -> Tensor:
        if bn is None:
            return value
        return F.batch_norm(value, bn.mean, bn.var, bn.weight, bn.bias, training=False, eps=bn.eps)

    outputs = []
    for part in branches.parts:
        if part.kernel is None:
            value = x if part.bias is None else x + part.bias.reshape(1, -1, 1, 1)
        else:
            value = F.conv2d(x, part.kernel, part.bias, stride, part.kernel.shape[2] // 2, 1, branches.groups)
        outputs.append(batch_norm(value, part.bn))
    total = outputs[0]
    for value in outputs[1:]:
        total = total + value
    return batch_norm(total, branches.post_bn)
