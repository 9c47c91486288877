# SPDX-License-Identifier: MIT
"""Reads existing layers: which convolution and BatchNorm a module holds, and the sum of branches they make.

Whatever cannot be read as such a sum is refused with the reason; nothing is guessed from class names or positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn as nn
from torch import Tensor

from repvgg_cuda.branches import BatchNorm, Branch, Branches, require


class UnfoldableError(RuntimeError):
    """A module is not a sum of foldable branches. The message says which part is in the way and why."""


class ConvGeometry(NamedTuple):
    """What a convolution does apart from its weights; sizes are (height, width)."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str


def pair(name: str, value: object) -> tuple[int, int]:
    """``value`` as (height, width). Raises RuntimeError unless it is an int or a sequence of two ints."""
    numbers = (value, value) if isinstance(value, int) else value
    if isinstance(numbers, (tuple, list)) and len(numbers) == 2 and all(isinstance(n, int) for n in numbers):
        return int(numbers[0]), int(numbers[1])
    raise RuntimeError(f"{name} must be an int or a pair of ints, got {value!r}")


def conv_geometry(conv: nn.Conv2d) -> ConvGeometry:
    """The geometry of ``conv``, with ``padding="same"`` and ``"valid"`` as numbers."""
    kernel_size, dilation = pair("kernel_size", conv.kernel_size), pair("dilation", conv.dilation)
    if conv.padding == "valid":
        padding = (0, 0)
    elif conv.padding == "same":
        if any(d * (k - 1) % 2 for d, k in zip(dilation, kernel_size, strict=True)):
            raise UnfoldableError(f"padding='same' is one-sided for kernel_size {kernel_size} and dilation {dilation}")
        padding = (dilation[0] * (kernel_size[0] - 1) // 2, dilation[1] * (kernel_size[1] - 1) // 2)
    else:
        padding = pair("padding", conv.padding)
    stride = pair("stride", conv.stride)
    return ConvGeometry(
        conv.in_channels, conv.out_channels, kernel_size, stride, padding, dilation, conv.groups, conv.padding_mode
    )


_BATCHNORM_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


def is_batchnorm(module: nn.Module | None) -> bool:
    """True for BatchNorm2d, SyncBatchNorm and the FrozenBatchNorm2d that torchvision, timm and detectron2 each define.

    Subclasses with a ``forward`` of their own (BatchNormAct2d, say) are not plain BatchNorms: what they do is unknown.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return type(module).forward in _BATCHNORM_FORWARDS
    return type(module).__name__ == "FrozenBatchNorm2d"


TRAINING_MODE = (
    "the BatchNorm is in training mode, where it normalises by the batch and cannot be folded; call model.eval() first"
)
NO_STATISTICS = (
    "the BatchNorm has no running statistics (track_running_stats=False), so it normalises by the batch and cannot be "
    "folded; train with track_running_stats=True"
)


def batchnorm_of(module: nn.Module, path: str) -> BatchNorm:
    """The numbers of a BatchNorm layer in eval mode.

    Raises:
        UnfoldableError: it is not a BatchNorm that :func:`is_batchnorm` knows.
        RuntimeError: it is in training mode, or has no running statistics; the message names ``path`` and the remedy.
    """
    if not is_batchnorm(module):
        raise UnfoldableError(f"{path} is a {type(module).__name__}, not a plain BatchNorm2d or SyncBatchNorm")
    mean, var = module.running_mean, module.running_var
    require(isinstance(mean, Tensor) and isinstance(var, Tensor), f"{path}: {NO_STATISTICS}")
    frozen = not isinstance(module, nn.modules.batchnorm._BatchNorm)
    require(frozen or not module.training, f"{path}: {TRAINING_MODE}")
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    weight, bias = module.weight, module.bias
    assert weight is None or isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return BatchNorm(mean, var, float(str(module.eps)), weight, bias)


def is_plain_conv(module: nn.Module) -> bool:
    """True for a Conv2d, not for a subclass that computes something else (weight standardization, "same" padding)."""
    if not isinstance(module, nn.Conv2d):
        return False
    kind = type(module)
    return kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward


def _conv_and_batchnorm(module: nn.Module, path: str) -> tuple[nn.Conv2d, str, nn.Module | None, str]:
    """The convolution and the BatchNorm (or None) of a branch, each with its path; found by type, not by name."""
    named = list(module.named_children()) if not isinstance(module, nn.Conv2d) else []
    layers = [(f"{path}.{name}", child) for name, child in named if type(child) is not nn.Identity] or [(path, module)]
    if not is_plain_conv(layers[0][1]):
        raise UnfoldableError(f"{layers[0][0]} is a {type(layers[0][1]).__name__}, not a plain Conv2d")
    if len(layers) > 2 or (len(layers) == 2 and not is_batchnorm(layers[1][1])):
        extra = layers[2] if len(layers) > 2 else layers[1]
        raise UnfoldableError(
            f"{extra[0]} is a {type(extra[1]).__name__}; a branch is a Conv2d and at most one BatchNorm"
        )
    if named and any(True for _ in module.parameters(recurse=False)):
        raise UnfoldableError(f"{path} has parameters besides those of its convolution and BatchNorm")
    conv = layers[0][1]
    assert isinstance(conv, nn.Conv2d)
    return (conv, layers[0][0], layers[1][1], layers[1][0]) if len(layers) == 2 else (conv, layers[0][0], None, "")


def _check_alignment(path: str, geometry: ConvGeometry) -> None:
    """Raises UnfoldableError unless this convolution is one that a 3x3 kernel with padding 1 can stand for."""
    size = geometry.kernel_size
    if size not in ((3, 3), (1, 1)):
        raise UnfoldableError(f"{path} has kernel_size {size[0]}x{size[1]}; only 3x3 and 1x1 fold into a 3x3 kernel")
    if size == (3, 3) and geometry.dilation != (1, 1):
        raise UnfoldableError(f"{path} has dilation {geometry.dilation}; the deployed convolution has dilation 1 only")
    want = (size[0] // 2, size[1] // 2)
    if geometry.padding != want:
        raise UnfoldableError(f"{path} has padding {geometry.padding}; a {size[0]}x{size[1]} branch needs {want}")
    if geometry.padding_mode != "zeros" and want != (0, 0):
        raise UnfoldableError(f"{path} has padding_mode '{geometry.padding_mode}'; the deployed convolution pads zeros")
    if geometry.stride not in ((1, 1), (2, 2)):
        raise UnfoldableError(f"{path} has stride {geometry.stride}; the deployed convolution has stride 1 or 2")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def read_branches(block: nn.Module, path: str = "") -> tuple[Branches, int]:
    """The branches and the stride of a block that keeps them as ``rbr_dense``, ``rbr_1x1`` and ``rbr_identity``.

    ``rbr_dense`` and ``rbr_1x1`` are a Conv2d (its bias allowed), or a module of a Conv2d and at most one BatchNorm;
    ``rbr_identity`` is a BatchNorm, nn.Identity, None or absent. What the layers say counts, not what the block says.

    Raises:
        UnfoldableError: the layers are others, or disagree in channels, groups, stride or padding.
        RuntimeError: a BatchNorm is in training mode or has no running statistics.
    """
    parts: list[Branch] = []
    seen: list[tuple[str, ConvGeometry]] = []
    for name in ("rbr_dense", "rbr_1x1"):
        child = getattr(block, name, None)
        if child is None:
            continue
        if not isinstance(child, nn.Module):
            raise UnfoldableError(f"{_join(path, name)} is a {type(child).__name__}, not a module")
        conv, conv_path, bn, bn_path = _conv_and_batchnorm(child, _join(path, name))
        geometry = conv_geometry(conv)
        _check_alignment(conv_path, geometry)
        seen.append((conv_path, geometry))
        parts.append(Branch(conv.weight, conv.bias, None if bn is None else batchnorm_of(bn, bn_path)))
    if not seen:
        raise UnfoldableError(f"{path or 'the block'} has no convolution in rbr_dense or rbr_1x1")

    first_path, first = seen[0]
    for other_path, other in seen[1:]:
        for field in ("in_channels", "out_channels", "groups", "stride"):
            a, b = getattr(first, field), getattr(other, field)
            if a != b:
                raise UnfoldableError(f"the branches disagree: {first_path} has {field} {a}, {other_path} has {b}")

    identity = getattr(block, "rbr_identity", None)
    if identity is not None:
        where = _join(path, "rbr_identity")
        if first.stride != (1, 1) or first.in_channels != first.out_channels:
            raise UnfoldableError(f"{where} needs stride 1 and in_channels == out_channels, {first_path} has others")
        bn_of_identity = None if type(identity) is nn.Identity else batchnorm_of(identity, where)
        parts.append(Branch(None, None, bn_of_identity))
    return Branches(tuple(parts), first.in_channels, first.out_channels, first.groups), first.stride[0]


def has_hooks(module: nn.Module) -> bool:
    """Whether something of its own happens when ``module`` is called, before, after or in the backward pass."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def refuse_hooks(block: nn.Module, path: str = "") -> None:
    """Raises UnfoldableError if a submodule of ``block`` has hooks, which would be lost with it.

    Pruning and the old weight_norm and spectral_norm are such hooks: they compute the weight at each forward. SE stays
    as it is, with its hooks.
    """
    for name, module in block.named_modules():
        if name and name.split(".")[0] not in ("se", "post_se") and has_hooks(module):
            raise UnfoldableError(f"{_join(path, name)} has hooks, which folding would lose; remove them first")
