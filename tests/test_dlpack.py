# SPDX-License-Identifier: MIT
"""The kernels for arrays of other libraries: repvgg_cuda._C over DLPack, with NumPy in and out."""

from __future__ import annotations

import gc
import sys
from typing import Any

import numpy as np
import pytest
import torch

import repvgg_cuda
from repvgg_cuda import _ext, testing

if _ext.module is None:
    pytest.skip(f"the compiled module {_ext.why_missing}", allow_module_level=True)
_C: Any = _ext.module


def numpy_sample(case: testing.Case = testing.EDGE_CASES[3]) -> tuple[np.ndarray, ...]:
    return tuple(t.numpy() for t in case.tensors())


def test_numpy_in_and_out() -> None:
    x, weight, bias = numpy_sample()
    y = _C.conv3x3(x, weight, bias, stride=2, activation="relu")
    assert isinstance(y, np.ndarray)
    want = repvgg_cuda.conv3x3(*map(torch.from_numpy, (x, weight, bias)), stride=2, activation="relu")
    assert np.array_equal(y, want.numpy())
    y += 1  # the result is the caller's own


def test_strided_read_only_and_half_arrays() -> None:
    x, weight, bias = numpy_sample()
    want = _C.conv3x3(x, weight, bias)
    wide = np.repeat(x, 2, axis=3)[..., ::2]
    assert np.array_equal(_C.conv3x3(wide, weight, bias), want)
    x.flags.writeable = False
    assert np.array_equal(_C.conv3x3(x, weight, bias), want)
    assert _C.conv3x3(x.astype(np.float16), weight.astype(np.float16)).dtype == np.float16


def test_torch_tensors_and_plain_dlpack_consumers() -> None:
    x, weight, bias = testing.EDGE_CASES[3].tensors()
    result = _C.conv3x3(x, weight, bias)
    assert result.__dlpack_device__() == (1, 0)
    want = repvgg_cuda.conv3x3(x, weight, bias)
    assert torch.equal(torch.from_dlpack(result), want)
    assert np.array_equal(np.from_dlpack(result), want.numpy())
    torch.from_dlpack(result.__dlpack__())  # the capsule of DLPack before 1.0


def test_results_outlive_their_producer_and_free_their_memory() -> None:
    x, weight, bias = numpy_sample()
    y = _C.conv3x3(x, weight, bias)
    want = y.copy()
    references = sys.getrefcount(x)
    for _ in range(50):
        _C.conv3x3(x, weight, bias)
        _C.conv3x3(torch.from_numpy(x), torch.from_numpy(weight)).__dlpack__()  # a capsule that nobody consumes
    gc.collect()
    assert sys.getrefcount(x) == references
    assert np.array_equal(y, want)


def test_fuse_weights() -> None:
    block = testing.random_branches(6, 6, bias=True, post_bn=True)
    tensors, bn_eps, *geometry = block.op_args()
    arrays = [t.numpy() if t.numel() else None for t in tensors]
    weight, bias = _C.fuse_weights(arrays, bn_eps, *geometry)
    want_weight, want_bias = torch.ops.repvgg_cuda.fuse_weights(tensors, bn_eps, *geometry, None, None)
    assert np.array_equal(weight, want_weight.numpy())
    assert np.array_equal(bias, want_bias.numpy())


def test_error_texts() -> None:
    x, weight, bias = numpy_sample()
    with pytest.raises(
        TypeError, match=r"^x must support DLPack \(__dlpack__\), got list; pass a NumPy, CuPy or torch"
    ):
        _C.conv3x3([1.0], weight)
    with pytest.raises(
        TypeError, match="^weight must be float64, float32, float16 or bfloat16, got DLPack type code 0"
    ):
        _C.conv3x3(x, weight.astype(np.int32))
    with pytest.raises(RuntimeError, match="^x must have strides of at least 0, got -.*; make it contiguous first$"):
        _C.conv3x3(x[::-1], weight)
    with pytest.raises(RuntimeError, match=r"^conv3x3: bias must be \[C_out\] = \[6\], got \[5\]$"):
        _C.conv3x3(x, weight, bias[:5])
    with pytest.raises(RuntimeError, match="^fuse_weights: at least one branch must hold an array$"):
        _C.fuse_weights([None] * 6, [0.0], 4, 4)
    with pytest.raises(BufferError):
        _C.conv3x3(torch.from_numpy(x).requires_grad_(), torch.from_numpy(weight))
