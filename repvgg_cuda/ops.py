# SPDX-License-Identifier: MIT
"""The public functions. Each is a thin, documented layer over ``torch.ops.repvgg_cuda.*``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from repvgg_cuda import _ext, _registration, reference
from repvgg_cuda.branches import Branches, require

Activation = Literal["identity", "relu"]

assert _registration.NAMESPACE == "repvgg_cuda"  # importing _registration is what makes torch.ops.repvgg_cuda complete


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: Activation = "identity",
    algorithm: str = "auto",
) -> Tensor:
    """3x3 convolution with bias and activation: ``act(F.conv2d(x, weight, bias, stride, padding=1, groups=groups))``.

    Args:
        x: ``[N, C_in, H, W]``; float64, float32, float16 or bfloat16; any strides.
        weight: ``[C_out, C_in / groups, 3, 3]``, dtype and device of ``x``.
        bias: ``[C_out]`` or None; the dtype of ``x``, or float32 where ``x`` is float16 or bfloat16.
        stride: 1 or 2.
        groups: divides ``C_in`` and ``C_out``.
        activation: ``"identity"`` or ``"relu"``.
        algorithm: ``"auto"``, or a name from :func:`algorithms`. A named one runs or raises; it is never swapped.
    Returns:
        ``[N, C_out, P, Q]`` with ``P = (H - 1) // stride + 1`` (Q likewise); dtype of ``x``; channels_last if ``x`` is
        dense channels_last, else contiguous.
    Raises:
        RuntimeError: arguments disagree, or the named ``algorithm`` refuses them; the message says which and why.
    Note:
        Sums in float32 or wider (float64 for float64). NaN and Inf go where F.conv2d and relu put them. Differentiable,
        twice; works under ``torch.func.vmap`` (not ``torch.func.grad``, which torch.library's autograd does not know).
        Under autocast ``x`` and ``weight`` take the autocast dtype. Source: RepVGG, arXiv:2101.03697, sec. 3.3.
    """
    _require_strided("conv3x3: x", x)
    _require_strided("conv3x3: weight", weight)
    if bias is not None:
        _require_strided("conv3x3: bias", bias)
    y: Tensor = torch.ops.repvgg_cuda.conv3x3(x, weight, bias, stride, groups, activation, algorithm)
    return y


def fuse_weights(
    branches: Branches, *, dtype: torch.dtype | None = None, bias_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Folds a block, any sum of 3x3, 1x1 and identity branches with their BatchNorms, into one 3x3 kernel and one bias.

    ``weight = sum_b scale_b * pad(K_b)`` and ``bias = sum_b scale_b * (b_b - mean_b) + beta_b`` with
    ``scale_b = gamma_b / sqrt(var_b + eps_b)``; the BatchNorm on the sum, if any, is applied to both.

    Args:
        branches: the block; its tensors may differ in float dtype (float32 statistics beside float16 kernels).
        dtype: of the weight; default: the dtype of the first kernel.
        bias_dtype: of the bias; default: ``dtype``. ``conv3x3`` takes a float32 bias beside a 16-bit weight.
    Returns:
        ``(weight [C_out, C_in / groups, 3, 3], bias [C_out])``, contiguous, on the device of the branches.
    Raises:
        RuntimeError: a tensor does not fit; the message names it.
    Note:
        Folds in float64 and rounds once. Differentiable in every tensor. Source: RepVGG, arXiv:2101.03697, sec. 3.3,
        formulas 3 and 4.
    """
    tensors, *geometry = branches.op_args()
    for tensor in tensors:
        _require_strided("fuse_weights: every tensor", tensor)
    weight, bias = torch.ops.repvgg_cuda.fuse_weights(tensors, *geometry, dtype, bias_dtype)
    return weight, bias


def algorithms(device: str | torch.device = "cpu") -> list[str]:
    """The names that ``conv3x3(algorithm=...)`` takes on such a device, in the order ``"auto"`` considers them."""
    device_type = torch.device(device).type
    if _ext.module is None or device_type not in ("cpu", "cuda"):
        return ["aten"]
    return [*_ext.module.algorithms(device_type), "aten"]


def refusal(
    algorithm: str,
    x: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: Activation = "identity",
) -> str | None:
    """Why ``algorithm`` would not run ``conv3x3`` on these arguments; None if it would.

    Raises:
        RuntimeError: the arguments themselves disagree, or the name is unknown.
    """
    reference.check_conv3x3(x, weight, None, stride, groups, activation, algorithm)
    names = algorithms(x.device)
    require(
        algorithm in names,
        f"conv3x3: algorithm '{algorithm}' is not available on {x.device.type}; available: {', '.join(names)}",
    )
    if algorithm == "aten":
        return None
    assert _ext.module is not None
    reason: str | None = _ext.module.refusal(
        algorithm,
        x.device.type,
        0 if x.device.index is None else x.device.index,
        tuple(x.shape),
        weight.shape[0],
        stride,
        groups,
        str(x.dtype).removeprefix("torch."),
        reference.output_format(x) == torch.channels_last,
        activation,
    )
    return reason


def _require_strided(what: str, tensor: Tensor) -> None:
    # The dispatcher answers other types and layouts with a page about overloads or backends; say it in a line before.
    # On the path of every call: no message is built unless it is needed.
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise RuntimeError(f"{what} must be a dense tensor, got layout {layout}; convert it with .to_dense()")
