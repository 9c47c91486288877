# SPDX-License-Identifier: MIT
"""What one re-parameterizable block is: a sum of branches. Data and its checks only; no arithmetic, no ``nn.Module``.

A *branch* is ``BN(conv(x) + bias)`` where the convolution is 3x3, 1x1 or the identity and the BatchNorm may be absent.
A *block* is the sum of its branches; a BatchNorm may follow the sum (QARepVGG, arXiv:2212.01593). All branches of a
block share stride and groups, and pad so that their outputs line up (3x3: padding 1, 1x1: padding 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: As many as the CUDA kernel's parameter block holds; csrc/core/fold.h says the same.
MAX_BRANCHES = 32


def require(condition: bool, message: str) -> None:
    """Raises RuntimeError(message), as the C++ checks do with the same texts."""
    if not condition:
        raise RuntimeError(message)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_name(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


@dataclass(frozen=True)
class BatchNorm:
    """A BatchNorm in eval mode: ``(v - mean) / sqrt(var + eps) * weight + bias``, each ``[C_out]``.

    ``weight`` and ``bias`` (gamma and beta) are None with ``affine=False``. ``eps`` has no default: RepVGG and timm
    train with 1e-5, the YOLO family with 1e-3, and a wrong one silently ruins the fold.
    """

    mean: Tensor
    var: Tensor
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Branch:
    """``BN(conv(x) + bias)``.

    ``kernel`` is ``[C_out, C_in/groups, 3, 3]``, ``[C_out, C_in/groups, 1, 1]``, or None for the identity. ``bias`` is
    ``[C_out]`` or None, ``bn`` is the branch's own BatchNorm or None.
    """

    kernel: Tensor | None
    bias: Tensor | None = None
    bn: BatchNorm | None = None


#: Tensors per branch in the operator's list: kernel, bias, BatchNorm weight, bias, mean, var.
TENSORS_PER_BRANCH = 6
#: And for a BatchNorm on the sum: weight, bias, mean, var.
TENSORS_PER_BATCHNORM = 4
_BATCHNORM_NAMES = ("BatchNorm weight", "BatchNorm bias", "BatchNorm mean", "BatchNorm var")


@dataclass(frozen=True)
class Branches:
    """A block: the sum of ``parts``, then ``post_bn`` if there is one."""

    parts: tuple[Branch, ...]
    in_channels: int
    out_channels: int
    groups: int = 1
    post_bn: BatchNorm | None = None

    def _slots(self) -> Iterator[tuple[str, Tensor | None]]:
        """Every place a tensor may stand in, with its name for messages, in the order of the operator's list."""

        def batchnorm_slots(where: str, bn: BatchNorm | None) -> Iterator[tuple[str, Tensor | None]]:
            values = (bn.weight, bn.bias, bn.mean, bn.var) if bn else (None,) * TENSORS_PER_BATCHNORM
            yield from ((f"{where}: {name}", value) for name, value in zip(_BATCHNORM_NAMES, values, strict=True))

        for i, part in enumerate(self.parts):
            yield f"branch {i}: kernel", part.kernel
            yield f"branch {i}: bias", part.bias
            yield from batchnorm_slots(f"branch {i}", part.bn)
        if self.post_bn is not None:
            yield from batchnorm_slots("the sum", self.post_bn)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the block, in the order of the operator's list."""
        return [value for _, value in self._slots() if value is not None]

    def default_dtype(self) -> torch.dtype:
        """The dtype of the first kernel; of the first other tensor where every branch is an identity."""
        return next((part.kernel.dtype for part in self.parts if part.kernel is not None), self.tensors()[0].dtype)

    def op_args(self) -> tuple[list[Tensor], list[float], int, int, int]:
        """This block as arguments of ``torch.ops.repvgg_cuda.fuse_weights``: tensors, bn_eps, in/out_channels, groups.

        Six tensors per branch (see TENSORS_PER_BRANCH), four more if a BatchNorm follows the sum; an empty tensor
        stands for one that is absent, because autograd knows lists of tensors but not lists of optional tensors.
        """
        self._require_tensors()
        bns = [part.bn for part in self.parts] + ([self.post_bn] if self.post_bn else [])
        slots = [value for _, value in self._slots()]
        absent = next(value for value in slots if value is not None).new_empty(0)
        tensors = [absent if value is None else value for value in slots]
        return tensors, [bn.eps if bn else 0.0 for bn in bns], self.in_channels, self.out_channels, self.groups

    def _require_tensors(self) -> None:
        n = len(self.parts)
        require(1 <= n <= MAX_BRANCHES, f"fuse_weights: a block must have 1 to {MAX_BRANCHES} branches, got {n}")
        require(len(self.tensors()) > 0, "fuse_weights: at least one branch must hold a tensor")

    @staticmethod
    def from_op_args(
        tensors: list[Tensor], bn_eps: list[float], in_channels: int, out_channels: int, groups: int
    ) -> Branches:
        """The inverse of :meth:`op_args`. Raises RuntimeError if the list does not describe a block."""
        n, rest = divmod(len(tensors), TENSORS_PER_BRANCH)
        require(
            n >= 1 and rest in (0, TENSORS_PER_BATCHNORM),
            "fuse_weights: tensors must hold six per branch (kernel, bias, BatchNorm weight, bias, mean, var) and four "
            f"more for a BatchNorm on the sum, got {len(tensors)}",
        )
        expected = n + (1 if rest else 0)
        require(
            len(bn_eps) == expected,
            f"fuse_weights: bn_eps must have one entry per branch and one for a BatchNorm on the sum ({expected}), "
            f"got {len(bn_eps)}",
        )
        slots = [tensor if tensor.numel() else None for tensor in tensors]

        def batchnorm(where: str, start: int, eps: float, required: bool) -> BatchNorm | None:
            weight, bias, mean, var = slots[start : start + TENSORS_PER_BATCHNORM]
            if mean is not None and var is not None:
                return BatchNorm(mean, var, eps, weight, bias)
            require(
                mean is var and weight is None and bias is None and not required,
                f"fuse_weights: {where}: BatchNorm mean and var must be given together, and with its weight and bias",
            )
            return None

        parts = []
        for i in range(n):
            start = i * TENSORS_PER_BRANCH
            bn = batchnorm(f"branch {i}", start + 2, bn_eps[i], required=False)
            parts.append(Branch(slots[start], slots[start + 1], bn))
        post_bn = batchnorm("the sum", n * TENSORS_PER_BRANCH, bn_eps[n], required=True) if rest else None
        return Branches(tuple(parts), in_channels, out_channels, groups, post_bn)

    def check(self) -> None:
        """Raises RuntimeError, naming the part and the remedy, unless every tensor fits. Same texts as csrc/ops."""
        c_in, c_out, groups = self.in_channels, self.out_channels, self.groups
        self._require_tensors()
        require(
            c_in >= 1 and c_out >= 1 and groups >= 1 and c_in % groups == 0 and c_out % groups == 0,
            f"fuse_weights: groups must divide in_channels and out_channels, got groups={groups}, "
            f"in_channels={c_in}, out_channels={c_out}",
        )
        tensors = self.tensors()
        kernel_sizes = [(c_out, c_in // groups, 3, 3), (c_out, c_in // groups, 1, 1)]
        for name, value in self._slots():
            if value is None:
                require(
                    not name.endswith("kernel") or c_in == c_out,
                    f"fuse_weights: {name} is an identity, which needs in_channels == out_channels, "
                    f"got {c_in} and {c_out}",
                )
                continue
            if name.endswith("kernel"):
                require(
                    tuple(value.shape) in kernel_sizes,
                    f"fuse_weights: {name} must be [{c_out}, {c_in // groups}, 3, 3] or "
                    f"[{c_out}, {c_in // groups}, 1, 1], got {shape_name(value)}",
                )
            else:
                require(
                    tuple(value.shape) == (c_out,), f"fuse_weights: {name} must be [{c_out}], got {shape_name(value)}"
                )
            require(
                value.dtype in FLOAT_DTYPES,
                f"fuse_weights: {name} must be float64, float32, float16 or bfloat16, got {dtype_name(value.dtype)}; "
                "convert it with .float()",
            )
            require(
                value.device == tensors[0].device,
                f"fuse_weights: {name} must be on the device of the first tensor ({tensors[0].device}), "
                f"got {value.device}; move it with .to()",
            )
        for i, eps in enumerate(self.op_args()[1]):
            require(eps >= 0, f"fuse_weights: bn_eps[{i}] must be at least 0, got {eps:g}")


def check_fused_dtype(dtype: torch.dtype | None) -> None:
    """Raises RuntimeError unless ``dtype`` is None or one the fused weight or bias may have."""
    require(
        dtype is None or dtype in FLOAT_DTYPES,
        "fuse_weights: dtype and bias_dtype must be float64, float32, float16 or bfloat16, "
        f"got {dtype_name(dtype) if dtype else None}",
    )
