# SPDX-License-Identifier: MIT
"""The operators in plain PyTorch: the oracle of the tests, the fallback without the compiled module, the fake kernels.

Written to be read: every step of the RepVGG algebra (arXiv:2101.03697, sec. 3.3) is a line here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg_cuda.branches import FLOAT_DTYPES, BatchNorm, Branches, dtype_name, require, shape_name
from repvgg_cuda.packed import MEMORY, check_made_for, check_tensor, header_only

ACTIVATIONS = ("identity", "relu")


# --------------------------------------------------------------------------------------------------------- conv3x3


def check_weight_shape(weight: Tensor, where: str) -> None:
    require(
        weight.dim() == 4 and weight.shape[2] == 3 and weight.shape[3] == 3,
        f"{where}: weight must be [C_out, C_in / groups, 3, 3], got {shape_name(weight)}; "
        "use F.conv2d for other kernel sizes",
    )


def check_geometry(size: Sequence[int], weight: Tensor, stride: int, groups: int, where: str, what: str = "x") -> None:
    """Raises RuntimeError unless a layer with ``weight`` can read ``what``, of ``size`` ``[N, C_in, H, W]``."""
    _, in_channels, height, width = size
    require(stride in (1, 2), f"{where}: stride must be 1 or 2, got {stride}; use F.conv2d for other strides")
    require(groups >= 1, f"{where}: groups must be at least 1, got {groups}")
    require(
        in_channels >= 1 and in_channels % groups == 0 and weight.shape[0] >= 1 and weight.shape[0] % groups == 0,
        f"{where}: groups must divide C_in and C_out, got groups={groups}, C_in={in_channels}, C_out={weight.shape[0]}",
    )
    require(
        weight.shape[1] * groups == in_channels,
        f"{where}: {what} has C_in={in_channels} channels, but weight {shape_name(weight)} with groups={groups} "
        f"expects {weight.shape[1] * groups}",
    )
    require(
        height >= 1 and width >= 1,
        f"{where}: {what} must have H >= 1 and W >= 1, got [{', '.join(map(str, size))}]",
    )


def check_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    groups: int,
    activation: str,
    algorithm: str,
    packed: Tensor | None = None,
    where: str = "conv3x3",
) -> None:
    """Raises RuntimeError if the arguments of ``conv3x3`` disagree. Checks, order and texts of csrc/ops/tensors.h.

    Of ``packed`` only what a fake kernel can know. ``where`` begins the messages.
    """
    require(
        x.dim() == 4,
        f"{where}: x must be [N, C_in, H, W], got {x.dim()} dimensions; add a batch dimension with x.unsqueeze(0)",
    )
    require(
        x.dtype in FLOAT_DTYPES,
        f"{where}: x must be float64, float32, float16 or bfloat16, got {dtype_name(x.dtype)}; "
        "convert it with x.float()",
    )
    check_weight_shape(weight, where)
    require(
        weight.dtype == x.dtype,
        f"{where}: weight must have the dtype of x ({dtype_name(x.dtype)}), got {dtype_name(weight.dtype)}; "
        "convert one of them with .to()",
    )
    require(
        weight.device == x.device,
        f"{where}: weight must be on the device of x ({x.device}), got {weight.device}; move it with .to(x.device)",
    )
    check_geometry(tuple(x.shape), weight, stride, groups, where)
    if bias is not None:
        require(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            f"{where}: bias must be [C_out] = [{weight.shape[0]}], got {shape_name(bias)}",
        )
        require(
            bias.dtype == x.dtype or (bias.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)),
            f"{where}: bias must have the dtype of x ({dtype_name(x.dtype)}), or float32 where x is float16 or "
            f"bfloat16, got {dtype_name(bias.dtype)}; convert it with .to()",
        )
        require(
            bias.device == x.device,
            f"{where}: bias must be on the device of x ({x.device}), got {bias.device}; move it with .to(x.device)",
        )
    require(
        activation in ACTIVATIONS,
        f"{where}: activation must be one of {', '.join(ACTIVATIONS)}, got '{activation}'",
    )
    require(algorithm != "", f"{where}: algorithm must be 'auto' or a name from repvgg_cuda.algorithms(), got ''")
    if packed is not None:
        check_tensor(packed, where)


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
    packed: Tensor | None = None,
) -> Tensor:
    """``activation(F.conv2d(x, weight, bias, stride, padding=1, groups=groups))`` in the memory format of ``x``."""
    return _conv3x3(x, weight, bias, stride, groups, activation, algorithm, packed, "conv3x3")


def _conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    groups: int,
    activation: str,
    algorithm: str,
    packed: Tensor | None,
    where: str,
) -> Tensor:
    check_conv3x3(x, weight, bias, stride, groups, activation, algorithm, packed, where)
    if packed is not None:
        algorithm = check_made_for(packed, weight, stride, groups, algorithm, where).algorithm
    require_aten(algorithm, x, where)
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding=1, groups=groups)
    y = y.contiguous(memory_format=output_format(x))
    return y.relu_() if activation == "relu" else y


def require_aten(algorithm: str, like: Tensor, where: str) -> None:
    """Raises RuntimeError if ``algorithm`` is one of the compiled ones, which plain PyTorch does not have."""
    require(
        algorithm in ("auto", "aten"),
        f"{where}: algorithm '{algorithm}' is not available on {like.device.type}; available: aten",
    )


def conv3x3_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    groups: int = 1,
    activation: str = "identity",
    algorithm: str = "auto",
    packed: Tensor | None = None,
    where: str = "conv3x3",
) -> Tensor:
    """Shape, dtype and strides of the result, for ``torch.compile``, ``torch.export`` and meta tensors."""
    check_conv3x3(x, weight, bias, stride, groups, activation, algorithm, packed, where)
    size = (x.shape[0], weight.shape[0], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
    return x.new_empty(size).contiguous(memory_format=output_format(x))


# ------------------------------------------------------------------------------------------------ prepack, chains


def check_prepack(
    weight: Tensor, input_size: Sequence[int], stride: int, groups: int, algorithm: str, memory: str
) -> None:
    """Raises RuntimeError if the arguments of ``prepack`` disagree. Checks, order and texts of csrc/ops."""
    where = "prepack"
    require(len(input_size) == 4, f"{where}: input_size must be [N, C_in, H, W], got {len(input_size)} numbers")
    require(
        weight.dtype in FLOAT_DTYPES,
        f"{where}: weight must be float64, float32, float16 or bfloat16, got {dtype_name(weight.dtype)}; "
        "convert it with weight.float()",
    )
    require(input_size[0] >= 0, f"{where}: input_size must have N >= 0, got {input_size[0]}")
    check_weight_shape(weight, where)
    check_geometry(input_size, weight, stride, groups, where, "input_size")
    require(memory in MEMORY, f"{where}: memory must be one of {', '.join(MEMORY)}, got '{memory}'")
    require(algorithm != "", f"{where}: algorithm must be 'auto' or a name from repvgg_cuda.algorithms(), got ''")


def prepack(
    weight: Tensor,
    input_size: Sequence[int],
    stride: int = 1,
    groups: int = 1,
    algorithm: str = "auto",
    memory: str = "fast",
) -> Tensor:
    """The header alone: F.conv2d reads weights as they are."""
    check_prepack(weight, input_size, stride, groups, algorithm, memory)
    require_aten(algorithm, weight, "prepack")
    return header_only("aten", weight, stride, groups)


#: What ``conv3x3_chain`` calls the activations.
ACTIVATION_CODES = {"identity": 0, "relu": 1}
_NAMES_OF_CODES = {code: name for name, code in ACTIVATION_CODES.items()}

#: One layer of a chain as arguments of ``conv3x3``: weight, bias, stride, groups, activation, algorithm, packed.
LayerArguments = tuple[Tensor, Tensor | None, int, int, str, str, Tensor | None]


def chain_layers(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    packed: Sequence[Tensor],
    strides: Sequence[int],
    groups: Sequence[int],
    activations: Sequence[int],
    algorithm: str = "auto",
) -> Iterator[tuple[str, LayerArguments]]:
    """The layers of a chain, each with what its messages begin with. An empty tensor stands for None.

    Raises:
        RuntimeError: lengths differ, or there is no layer, or no such activation. Texts of csrc/ops/conv3x3.cpp.
    """
    where = "conv3x3_chain"
    require(len(weights) > 0, f"{where}: weights must hold at least one layer, got none")
    lists = {"biases": biases, "packed": packed, "strides": strides, "groups": groups, "activations": activations}
    for name, values in lists.items():
        require(
            len(values) == len(weights),
            f"{where}: {name} must have one entry per layer ({len(weights)}), got {len(values)}",
        )

    def given(tensor: Tensor) -> Tensor | None:
        return None if tensor.numel() == 0 else tensor

    for i, (weight, bias, pack) in enumerate(zip(weights, biases, packed, strict=True)):
        activation = _NAMES_OF_CODES.get(activations[i])
        here = f"{where}: layer {i}"
        require(activation is not None, f"{here}: activation must be 0 (identity) or 1 (relu), got {activations[i]}")
        assert activation is not None
        given_packed = given(pack)
        # The algorithm is for layers that are not packed.
        named = algorithm if given_packed is None else "auto"
        yield here, (weight, given(bias), strides[i], groups[i], activation, named, given_packed)


def conv3x3_chain(x: Tensor, *lists: Any) -> Tensor:
    """``conv3x3`` layer by layer."""
    for where, arguments in chain_layers(*lists):
        x = _conv3x3(x, *arguments, where)
    return x


def conv3x3_chain_fake(x: Tensor, *lists: Any) -> Tensor:
    """Shape, dtype and strides of :func:`conv3x3_chain`."""
    for where, arguments in chain_layers(*lists):
        x = conv3x3_fake(x, *arguments, where)
    return x


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
