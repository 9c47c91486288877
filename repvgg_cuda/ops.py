# SPDX-License-Identifier: MIT
"""The public functions. Each is a thin, documented layer over ``torch.ops.repvgg_cuda.*``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from repvgg_cuda import _ext, _registration, reference
from repvgg_cuda._fold_rules import numbered
from repvgg_cuda.branches import Branches, dtype_name, require
from repvgg_cuda.explanation import Explanation, Place, explain_rows, layer_text, place_of, place_text
from repvgg_cuda.gpus import gpu_named

Activation = Literal["identity", "relu"]
Memory = Literal["fast", "low"]

assert _registration.NAMESPACE == "repvgg_cuda"  # importing _registration is what makes torch.ops.repvgg_cuda complete

# The overloads themselves: to look one up in every call takes longer than to call it.
_conv3x3 = torch.ops.repvgg_cuda.conv3x3.default
_conv3x3_chain = torch.ops.repvgg_cuda.conv3x3_chain.default

#: For exporters, which translate operators by their overloads.
OVERLOADS = {"conv3x3": _conv3x3, "conv3x3_chain": _conv3x3_chain}


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: Activation = "identity",
    algorithm: str = "auto",
    packed: Tensor | None = None,
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
        packed: what :func:`prepack` made of ``weight``, None: an algorithm that packs weights does so in every call.
            The algorithm is then the one it was packed for, whatever the size of ``x``.
    Returns:
        ``[N, C_out, P, Q]`` with ``P = (H - 1) // stride + 1`` (Q likewise); dtype of ``x``; channels_last if ``x`` is
        dense channels_last, else contiguous.
    Raises:
        RuntimeError: arguments disagree, or the named ``algorithm`` refuses them; the message says which and why.
    Note:
        Sums in float32 or wider (float64 for float64). NaN and Inf go where F.conv2d and relu put them, but a
        Winograd row may make every output of a tile NaN that has one such input. Differentiable,
        twice; works under ``torch.func.vmap`` (not ``torch.func.grad``, which torch.library's autograd does not know).
        Under autocast ``x`` and ``weight`` take the autocast dtype. Source: RepVGG, arXiv:2101.03697, sec. 3.3.
    """
    _require_strided("conv3x3: x", x)
    _require_strided("conv3x3: weight", weight)
    if bias is not None:
        _require_strided("conv3x3: bias", bias)
    if packed is not None:
        _require_strided("conv3x3: packed", packed)
    y: Tensor = _conv3x3(x, weight, bias, stride, groups, activation, algorithm, packed)
    return y


def prepack(
    weight: Tensor,
    input_size: Sequence[int],
    *,
    stride: int = 1,
    groups: int = 1,
    algorithm: str = "auto",
    memory: Memory = "fast",
) -> Tensor:
    """Transforms and packs weights once, for ``conv3x3(..., packed=...)``. Not differentiable.

    Args:
        weight: ``[C_out, C_in / groups, 3, 3]``, as for :func:`conv3x3`.
        input_size: ``[N, C_in, H, W]`` of the inputs to come; the choice of ``"auto"`` is made for it. The result
            works for every other N, H and W too.
        stride, groups: as for :func:`conv3x3`.
        algorithm: ``"auto"`` takes the one predicted to be fastest; or a name from :func:`algorithms`.
        memory: ``"low"`` passes over algorithms whose packed weights are larger than ``weight``.
    Returns:
        1-D uint8, on the CPU: a header of 128 bytes that names the algorithm, and the packed weights (none for
        algorithms that read weights as they are). It is for this version, and for the instruction set it was made on:
        on a machine with another one the algorithm stays and weights are packed in every call. For a ``weight`` on a
        GPU it is the header alone, which owns the weights packed in the GPU's memory; with a copy of it weights are
        packed in every call. Inputs of 16-bit types on a GPU are taken to be channels_last when ``"auto"`` chooses.
    Raises:
        RuntimeError: arguments disagree, or the named ``algorithm`` refuses them; the message says which and why.
    Note:
        A large result is aligned to huge pages, which ``clone()`` and saving do not keep. Using it after ``weight``
        has changed raises, as far as 16 samples of the weight show it.
    """
    _require_strided("prepack: weight", weight)
    packed: Tensor = torch.ops.repvgg_cuda.prepack(weight, list(input_size), stride, groups, algorithm, memory)
    return packed


class ChainLayer(NamedTuple):
    """One layer of :func:`conv3x3_chain`: the arguments of :func:`conv3x3` but for ``x`` and ``algorithm``."""

    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    groups: int = 1
    activation: Activation = "identity"
    packed: Tensor | None = None


def conv3x3_chain(x: Tensor, layers: Sequence[ChainLayer], *, algorithm: str = "auto") -> Tensor:
    """Consecutive layers in one call: ``for layer in layers: x = conv3x3(x, *layer)``, without what lies in between.

    On a CPU neighbouring layers whose algorithms share the inner layout keep it between them, so that layout
    conversion is left at the ends. The numbers are bit for bit those of :func:`conv3x3` with the same algorithms.

    Args:
        x: ``[N, C_in, H, W]``, as for :func:`conv3x3`.
        layers: at least one; each reads what the one before it wrote.
        algorithm: for the layers that are not packed.
    Returns:
        The output of the last layer; channels_last if ``x`` is dense channels_last, else contiguous.
    Raises:
        RuntimeError: as :func:`conv3x3`; the message says which layer.
    Note:
        Differentiable, twice; the backward pass computes the activations between the layers again. Autocast and vmap
        as for :func:`conv3x3`.
    """
    _require_strided("conv3x3_chain: x", x)
    none = torch.empty(0, dtype=x.dtype, device=x.device)
    weights, biases, packed = [], [], []
    for i, (weight, bias, _, _, activation, pack) in enumerate(layers):
        for name, tensor in (("weight", weight), ("bias", bias), ("packed", pack)):
            if not _is_strided(tensor) and (tensor is not None or name == "weight"):
                _require_strided(f"conv3x3_chain: layer {i}: {name}", tensor)
        if activation not in reference.ACTIVATION_CODES:
            names = ", ".join(reference.ACTIVATIONS)
            raise RuntimeError(f"conv3x3_chain: layer {i}: activation must be one of {names}, got '{activation}'")
        weights.append(weight)
        biases.append(none if bias is None else bias)
        packed.append(none if pack is None else pack)
    strides, groups = [layer.stride for layer in layers], [layer.groups for layer in layers]
    activations = [layer.activation for layer in layers]
    return run_chain(x, weights, biases, packed, strides, groups, activations, algorithm)


def run_chain(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    packed: list[Tensor],
    strides: list[int],
    groups: list[int],
    activations: list[Activation],
    algorithm: str = "auto",
) -> Tensor:
    """:func:`conv3x3_chain` in the operator's own terms, for callers that know their tensors: empty ones say "none"."""
    codes = [reference.ACTIVATION_CODES[activation] for activation in activations]
    y: Tensor = _conv3x3_chain(x, weights, biases, packed, strides, groups, codes, algorithm)
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


def fuse_weights_batch(
    blocks: Sequence[Branches], *, dtype: torch.dtype | None = None, bias_dtype: torch.dtype | None = None
) -> list[tuple[Tensor, Tensor]]:
    """:func:`fuse_weights` for many blocks in one call: on a GPU one launch folds up to 67 blocks of three branches.

    Args:
        blocks: all on one device; may be empty.
        dtype, bias_dtype: as for :func:`fuse_weights`, for every block.
    Returns:
        What :func:`fuse_weights` gives for each block, bit for bit.
    Raises:
        RuntimeError: a tensor does not fit; the message names the block and the tensor.
    Note:
        Differentiable in every tensor. On a GPU neither waits for the device nor copies to it: can be captured in a
        CUDA graph. Source: RepVGG, arXiv:2101.03697, sec. 3.3, formulas 3 and 4.
    """
    if not blocks:
        return []
    arguments = _lists_of("fuse_weights_batch", blocks)
    weights, biases = torch.ops.repvgg_cuda.fuse_weights_batch(*arguments, dtype, bias_dtype)
    return list(zip(weights, biases, strict=True))


class FusedLayer(NamedTuple):
    """What :func:`fuse_and_prepack` makes of a block: arguments of ``conv3x3``, beside stride and groups."""

    weight: Tensor
    bias: Tensor
    packed: Tensor


def fuse_and_prepack(
    blocks: Sequence[Branches],
    input_sizes: Sequence[Sequence[int]],
    *,
    strides: Sequence[int] | None = None,
    algorithm: str = "auto",
    memory: Memory = "fast",
    dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
) -> list[FusedLayer]:
    """:func:`fuse_weights_batch`, then :func:`prepack` of each weight. On a GPU one launch writes the weights of both
    orders, where the algorithm reads the tensor cores' order (``"mma"``, ``"mma_tf32"``).

    For weights that are folded again and again: after every epoch, after every step of an averaged model.

    Args:
        blocks: all on one device; may be empty.
        input_sizes: ``[N, C_in, H, W]`` of each block, as for :func:`prepack`.
        strides: of each block; None: all are 1.
        algorithm, memory: as for :func:`prepack`, for every block.
        dtype, bias_dtype: as for :func:`fuse_weights`, for every block.
    Returns:
        For each block what :func:`fuse_weights` gives, and what :func:`prepack` makes of it, bit for bit.
    Raises:
        RuntimeError: a tensor or a size does not fit, or ``algorithm`` refuses a block; the message names the block.
    Note:
        Weights and biases are differentiable in every tensor. On a GPU waits for the device at the end: cannot be
        captured in a CUDA graph. Source: RepVGG, arXiv:2101.03697, sec. 3.3, formulas 3 and 4.
    """
    strides = [1] * len(blocks) if strides is None else list(strides)
    for name, values in (("input_sizes", input_sizes), ("strides", strides)):
        require(
            len(values) == len(blocks),
            f"fuse_and_prepack: {name} must have one entry for each of the {len(blocks)} blocks, got {len(values)}",
        )
    for i, size in enumerate(input_sizes):
        require(
            len(size) == 4,
            f"fuse_and_prepack: block {i}: input_size must be [N, C_in, H, W], got {len(size)} numbers",
        )
    if not blocks:
        return []
    sizes = [extent for size in input_sizes for extent in size]
    weights, biases, packed = torch.ops.repvgg_cuda.fuse_and_prepack(
        *_lists_of("fuse_and_prepack", blocks),
        dtype,
        bias_dtype,
        sizes,
        strides,
        algorithm,
        memory,
    )
    return [FusedLayer(*layer) for layer in zip(weights, biases, packed, strict=True)]


def _lists_of(op: str, blocks: Sequence[Branches]) -> list[list[Any]]:
    """Blocks as the first arguments of an operator for many: tensors, tensors_per_block, bn_eps, geometry."""
    arguments = []
    for i, block in enumerate(blocks):
        with numbered(op, i, "fuse_weights: "):
            arguments.append(block.op_args())
    tensors = [tensor for block_tensors, *_ in arguments for tensor in block_tensors]
    for tensor in tensors:
        _require_strided(f"{op}: every tensor", tensor)
    counts = [len(block_tensors) for block_tensors, *_ in arguments]
    bn_eps = [eps for _, block_eps, *_ in arguments for eps in block_eps]
    geometry = [list(values) for values in zip(*(block[2:] for block in arguments), strict=True)]
    return [tensors, counts, bn_eps, *geometry]


def algorithms(device: str | torch.device = "cpu") -> list[str]:
    """The names that ``conv3x3(algorithm=...)`` takes on such a device; :func:`explain` says which one "auto" takes."""
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


def explain(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: Activation = "identity",
    prepared: bool = False,
    memory: Memory = "fast",
    gpu: str | None = None,
) -> Explanation:
    """Which algorithm ``conv3x3(algorithm="auto")`` runs on these arguments, and why not the others.

    Args:
        x, weight, stride, groups, activation: as for :func:`conv3x3`; only shapes, dtype, device and layout are read.
        prepared: as if ``weight`` were packed already, which is what :func:`prepack` asks.
        memory: as for :func:`prepack`.
        gpu: as if the arguments were on such a GPU, one of ``repvgg_cuda.gpus.GPUS``; none need be at hand.
    Returns:
        Per algorithm its refusal or its predicted time, the size of its packed weights and, on a GPU, how it launches.
        Print it.
    Raises:
        RuntimeError: the arguments disagree.
    """
    reference.check_conv3x3(x, weight, None, stride, groups, activation, "auto")
    known = None if gpu is None else gpu_named(gpu)
    place = place_of(x.device) if known is None else Place("cuda", -1, known.capability, known.multiprocessors)
    candidates = explain_rows(
        weight,
        tuple(x.shape),
        stride,
        groups,
        prepared=prepared,
        memory=memory,
        channels_last=reference.output_format(x) == torch.channels_last,
        activation=activation,
        place=place,
    )
    where = place_text(weight) if known is None else f"{dtype_name(weight.dtype)} on {known.name}, none at hand"
    text = f"{layer_text(tuple(x.shape), weight, stride, groups)}, {where}"
    text += ", times of one thread" if place.type == "cpu" else ""
    return Explanation(text, candidates, weight.numel() * weight.element_size(), prepared, memory, place)


def _is_strided(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.layout is torch.strided


def _require_strided(what: str, tensor: object) -> None:
    # The dispatcher answers other types and layouts with a page about overloads or backends; say it in a line before.
    # On the path of every call: no message is built unless it is needed.
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise RuntimeError(f"{what} must be a dense tensor, got layout {layout}; convert it with .to_dense()")
