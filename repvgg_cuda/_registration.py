# SPDX-License-Identifier: MIT
"""What the operators need besides kernels: fake kernels, autograd, autocast and vmap rules; and, where the compiled
module is missing, the operators themselves in pure PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from repvgg_cuda import _ext, _fold_rules, reference
from repvgg_cuda.branches import require
from repvgg_cuda.explanation import explain_rows
from repvgg_cuda.packed import HEADER_BYTES

NAMESPACE = "repvgg_cuda"

#: What csrc/ops/library.cpp defines; used to define the operators where the compiled module is missing.
SCHEMAS = {
    "conv3x3": "(Tensor x, Tensor weight, Tensor? bias=None, int stride=1, int groups=1, "
    'str activation="identity", str algorithm="auto", Tensor? packed=None) -> Tensor',
    "prepack": "(Tensor weight, int[] input_size, int stride=1, int groups=1, "
    'str algorithm="auto", str memory="fast") -> Tensor',
    "conv3x3_chain": "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] packed, int[] strides, int[] groups, "
    'int[] activations, str algorithm="auto") -> Tensor',
    "fuse_weights": "(Tensor[] tensors, float[] bn_eps, int in_channels, int out_channels, int groups, "
    "ScalarType? dtype, ScalarType? bias_dtype) -> (Tensor weight, Tensor bias)",
    "fuse_weights_batch": "(Tensor[] tensors, int[] tensors_per_block, float[] bn_eps, int[] in_channels, "
    "int[] out_channels, int[] groups, ScalarType? dtype, ScalarType? bias_dtype) -> (Tensor[] weights, "
    "Tensor[] biases)",
    "fuse_and_prepack": "(Tensor[] tensors, int[] tensors_per_block, float[] bn_eps, int[] in_channels, "
    "int[] out_channels, int[] groups, ScalarType? dtype, ScalarType? bias_dtype, int[] input_sizes, int[] strides, "
    'str algorithm="auto", str memory="fast") -> (Tensor[] weights, Tensor[] biases, Tensor[] packed)',
}


def _prepack_fake(
    weight: Tensor,
    input_size: Sequence[int],
    stride: int = 1,
    groups: int = 1,
    algorithm: str = "auto",
    memory: str = "fast",
) -> Tensor:
    """How large packed weights are is the table's to say; where they lie is always the CPU."""
    reference.check_prepack(weight, input_size, stride, groups, algorithm, memory)
    rows = explain_rows(weight, input_size, stride, groups, prepared=True, memory=memory)
    names = [row.name for row in rows]
    require(
        algorithm == "auto" or algorithm in names,
        f"prepack: algorithm '{algorithm}' is not available on {weight.device.type}; available: {', '.join(names)}",
    )
    taken = next(row for row in rows if (row.chosen if algorithm == "auto" else row.name == algorithm))
    device = "meta" if weight.is_meta else "cpu"
    payload = 0 if weight.is_cuda else taken.packed_bytes  # of weights on a GPU it stays there
    return weight.new_empty(HEADER_BYTES + payload, dtype=torch.uint8, device=device)


# --------------------------------------------------------------------------------------------------------- autograd


def _conv3x3_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.stride, ctx.groups, ctx.activation, _, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, output if ctx.activation == "relu" else None)


def _conv3x3_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiable itself, so double backward works. Packed weights are a copy: their gradient is the weight's."""
    x, weight, y = ctx.saved_tensors
    needed = (*ctx.needs_input_grad, False)[:3]  # arguments at their defaults are not among the inputs
    gradients = _layer_gradients(grad, x, weight, y, ctx.stride, ctx.groups, ctx.bias_dtype, needed)
    return *gradients, None, None, None, None, None


def _layer_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    stride: int,
    groups: int,
    bias_dtype: torch.dtype | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, weight and bias, those of them that are needed. ``y`` is the layer's output if it ends in a ReLU."""
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, [*needed[:2], False]
    )
    return grad_x, grad_weight, grad.sum((0, 2, 3), dtype=bias_dtype) if needed[2] else None


def _chain_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, biases, packed, *ctx.geometry = inputs
    ctx.save_for_backward(x, *weights, *biases, *packed, output)


def _chain_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The activations between the layers are not kept: ``conv3x3`` computes them again, with the same bits."""
    x, *tensors, output = ctx.saved_tensors
    n = len(tensors) // 3
    weights, biases, packed = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
    need_x, need_weights, need_biases = ctx.needs_input_grad[:3]
    layers = [arguments for _, arguments in reference.chain_layers(weights, biases, packed, *ctx.geometry)]
    inputs = [x]
    for arguments in layers[:-1]:
        inputs.append(torch.ops.repvgg_cuda.conv3x3(inputs[-1], *arguments))

    grad_weights: list[Tensor | None] = [None] * n
    grad_biases: list[Tensor | None] = [None] * n
    running: Tensor | None = grad
    for i in reversed(range(n)):
        weight, bias, stride, groups, activation, _, _ = layers[i]
        need_below = need_x or any(need_weights[:i]) or any(need_biases[:i])
        y = None if activation == "identity" else output if i == n - 1 else inputs[i + 1]
        assert running is not None
        running, grad_weights[i], grad_biases[i] = _layer_gradients(
            running,
            inputs[i],
            weight,
            y,
            stride,
            groups,
            None if bias is None else bias.dtype,
            (need_below, need_weights[i], need_biases[i] and bias is not None),
        )
        if not need_below:
            break
    gradients = (running, grad_weights, grad_biases, [None] * n, None, None, None, None)
    return gradients[: len(ctx.needs_input_grad)]  # arguments at their defaults are not among the inputs


# --------------------------------------------------------------------------------------------------- autocast, vmap


class _Autocast:
    """Under autocast ``x`` and ``weight`` go to the autocast dtype, as for F.conv2d; a float32 bias stays float32.

    Packed weights are those of the weight as it was: they are left out where it is cast.
    """

    _KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    def _cast(self, tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        if not eligible or tensor.device.type != self.device_type:
            return tensor
        return tensor.to(torch.get_autocast_dtype(self.device_type))

    def _cast_bias(self, bias: Tensor) -> Tensor:
        return bias if bias.dtype == torch.float32 else self._cast(bias)

    def conv3x3(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int = 1,
        groups: int = 1,
        activation: str = "identity",
        algorithm: str = "auto",
        packed: Tensor | None = None,
    ) -> Tensor:
        cast = self._cast(weight)
        bias = None if bias is None else self._cast_bias(bias)
        packed = packed if cast.dtype == weight.dtype else None
        with torch._C._ExcludeDispatchKeyGuard(self._KEYS):
            y: Tensor = torch.ops.repvgg_cuda.conv3x3(
                self._cast(x), cast, bias, stride, groups, activation, algorithm, packed
            )
        return y

    def conv3x3_chain(
        self, x: Tensor, weights: list[Tensor], biases: list[Tensor], packed: list[Tensor], *rest: Any
    ) -> Tensor:
        cast = [self._cast(weight) for weight in weights]
        changed = [new.dtype != old.dtype for new, old in zip(cast, weights, strict=True)]
        if any(changed) and len(packed) == len(weights):
            packed = [torch.empty_like(p[:0]) if new else p for new, p in zip(changed, packed, strict=True)]
        with torch._C._ExcludeDispatchKeyGuard(self._KEYS):
            y: Tensor = torch.ops.repvgg_cuda.conv3x3_chain(
                self._cast(x), cast, [self._cast_bias(bias) for bias in biases], packed, *rest
            )
        return y


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
    packed: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Over ``x`` alone the mapped dimension B joins the batch; over weight or bias it joins the groups.

    Then the weight is another one, and packed weights are left out.
    """
    x_dim, weight_dim, bias_dim = (*in_dims, None)[:3]
    packed_dim = in_dims[7] if len(in_dims) > 7 else None
    size = info.batch_size
    op = torch.ops.repvgg_cuda.conv3x3

    if x_dim is not None and weight_dim is None and bias_dim is None and packed_dim is None:
        y = op(x.movedim(x_dim, 0).flatten(0, 1), weight, bias, stride, groups, activation, algorithm, packed)
        return y.unflatten(0, (size, -1)), 0

    def in_front(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    x = in_front(x, x_dim).movedim(0, 1).flatten(1, 2)  # [N, B * C_in, H, W]
    weight = in_front(weight, weight_dim).flatten(0, 1)  # [B * C_out, C_in / groups, 3, 3]
    bias = None if bias is None else in_front(bias, bias_dim).flatten(0, 1)
    y = op(x, weight, bias, stride, size * groups, activation, algorithm)
    return y.unflatten(1, (size, -1)), 1


def _chain_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    packed: list[Tensor],
    *rest: Any,
) -> tuple[Tensor, int]:
    """Over ``x`` alone the mapped dimension joins the batch; else layer by layer."""
    x_dim, *list_dims = in_dims[:4]
    dims = [[None] * len(weights) if each is None else list(each) for each in list_dims]
    if not any(dim is not None for each in dims for dim in each):
        folded = x.movedim(x_dim, 0).flatten(0, 1)
        y = torch.ops.repvgg_cuda.conv3x3_chain(folded, weights, biases, packed, *rest)
        return y.unflatten(0, (info.batch_size, -1)), 0
    for i, (_, arguments) in enumerate(reference.chain_layers(weights, biases, packed, *rest)):
        layer_dims = (x_dim, dims[0][i], dims[1][i], None, None, None, None, dims[2][i])
        x, x_dim = _conv3x3_vmap(info, layer_dims, x, *arguments)
    return x, x_dim


def _refuse_vmap(message: str) -> Callable[..., Any]:
    def rule(*args: Any) -> Any:
        raise RuntimeError(message)

    return rule


# -------------------------------------------------------------------------------------------------------- register


def _library(kind: str) -> Any:
    return torch.library.Library(NAMESPACE, kind)  # type: ignore[no-untyped-call]


#: For each operator: in plain PyTorch, and as a fake kernel.
_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "conv3x3": (reference.conv3x3, reference.conv3x3_fake),
    "prepack": (reference.prepack, _prepack_fake),
    "conv3x3_chain": (reference.conv3x3_chain, reference.conv3x3_chain_fake),
    "fuse_weights": (_fold_rules.fuse_weights_python, _fold_rules.fuse_weights_fake),
    "fuse_weights_batch": (_fold_rules.fuse_weights_batch_python, _fold_rules.fuse_weights_batch_fake),
    "fuse_and_prepack": (
        partial(_fold_rules.fuse_and_prepack, _fold_rules.fuse_weights_python, reference.prepack),
        partial(_fold_rules.fuse_and_prepack, _fold_rules.fuse_weights_fake, _prepack_fake),
    ),
}
_AUTOGRAD: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "conv3x3": (_conv3x3_setup_context, _conv3x3_backward),
    "conv3x3_chain": (_chain_setup_context, _chain_backward),
    "fuse_weights": (_fold_rules.fuse_weights_setup_context, _fold_rules.fuse_weights_backward),
    "fuse_weights_batch": (_fold_rules.batch_setup_context, _fold_rules.batch_backward),
    "fuse_and_prepack": (_fold_rules.batch_setup_context, _fold_rules.batch_backward),
}
_VMAP: dict[str, Callable[..., Any]] = {
    "conv3x3": _conv3x3_vmap,
    "prepack": _refuse_vmap("prepack: vmap is not supported; pack the weights one after another"),
    "conv3x3_chain": _chain_vmap,
    "fuse_weights": _refuse_vmap(
        "fuse_weights: vmap is not supported; fuse the blocks one after another, or use "
        "repvgg_cuda.reference.fuse_weights"
    ),
    "fuse_weights_batch": _refuse_vmap("fuse_weights_batch: vmap is not supported; fuse the blocks one after another"),
    "fuse_and_prepack": _refuse_vmap("fuse_and_prepack: vmap is not supported; fuse the blocks one after another"),
}


def _register() -> list[Any]:
    """Registers everything. The returned libraries own the registrations: dropping them would undo these."""
    libraries = []
    if _ext.module is None:
        library = _library("DEF")
        for name, schema in SCHEMAS.items():
            library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
            library.impl(name, _IMPLEMENTATIONS[name][0], "CompositeExplicitAutograd")
        libraries.append(library)
    for name in SCHEMAS:
        torch.library.register_fake(f"{NAMESPACE}::{name}", _IMPLEMENTATIONS[name][1])
        torch.library.register_vmap(f"{NAMESPACE}::{name}", _VMAP[name])
    for name, (setup_context, backward) in _AUTOGRAD.items():
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)
    library = _library("IMPL")
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        autocast = _Autocast(device_type)
        library.impl("conv3x3", autocast.conv3x3, key)
        library.impl("conv3x3_chain", autocast.conv3x3_chain, key)
    return [*libraries, library]


_libraries = _register()
