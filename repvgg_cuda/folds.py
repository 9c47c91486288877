# SPDX-License-Identifier: MIT
"""The fold of a block's weights as a benchmark: this library's against the steps that implementations write out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg_cuda import reference, testing
from repvgg_cuda.branches import BatchNorm, Branch, Branches
from repvgg_cuda.checks import Check, check_close
from repvgg_cuda.comparison import Candidate
from repvgg_cuda.ops import fuse_weights

#: The row of this library's fold.
FUSE_WEIGHTS = "fuse_weights"


def fold_candidates(branches: Branches, dtype: torch.dtype) -> list[Candidate]:
    """The fold of one block, step by step in PyTorch and by :func:`repvgg_cuda.fuse_weights`."""
    like = branches.tensors()[0]
    square = branches.in_channels == branches.out_channels
    identity = reference.identity_kernel(branches.in_channels, branches.groups, like) if square else None
    want, once = reference.fold_fp64(branches), testing.fold_bound(branches, dtype)
    # Step by step in float32 every operation rounds, not only the last: as many as fold_bound counts for float64.
    roundings = 2 * (6 + len(branches.parts))
    always = [a + roundings * b for a, b in zip(once, testing.fold_bound(branches, torch.float32), strict=True)]
    return [
        Candidate(
            "step by step in PyTorch",
            lambda: fold_step_by_step(branches, identity, dtype),
            _check_fold(want, always, dtype),
        ),
        Candidate(FUSE_WEIGHTS, lambda: fuse_weights(branches, dtype=dtype), _check_fold(want, once, dtype), own=True),
    ]


def fold_step_by_step(branches: Branches, identity: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The fold as a user writes it, in the dtype of the branches: BatchNorm into each kernel, each kernel to 3x3, add.

    ``identity`` is the identity's 3x3 kernel, prepared once, as implementations cache it.
    """

    def fold(part: Branch) -> tuple[Tensor, Tensor]:
        kernel, bn = identity if part.kernel is None else part.kernel, part.bn
        assert kernel is not None
        assert isinstance(bn, BatchNorm)
        assert bn.weight is not None
        assert bn.bias is not None
        scale = bn.weight / (bn.var + bn.eps).sqrt()
        kernel = kernel * scale.reshape(-1, 1, 1, 1)
        return F.pad(kernel, [1, 1, 1, 1]) if kernel.shape[2] == 1 else kernel, bn.bias - bn.mean * scale

    weight, bias = fold(branches.parts[0])
    for part in branches.parts[1:]:
        kernel, shift = fold(part)
        weight, bias = weight + kernel, bias + shift
    return weight.to(dtype), bias.to(dtype)


def _check_fold(want: tuple[Tensor, Tensor], bounds: Sequence[Tensor], dtype: torch.dtype) -> Check:
    def check(folded: tuple[Tensor, Tensor]) -> str:
        for what, got, truth, bound in zip(("weight", "bias"), folded, want, bounds, strict=True):
            if problem := check_close(truth, bound, dtype)(got):
                return f"{what}: {problem}"
        return ""

    return check
