# SPDX-License-Identifier: MIT
"""Whether an output is right: against the truth in float64, with a derived bound, before anything is timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from repvgg_cuda import testing
from repvgg_cuda.branches import dtype_name, shape_name
from repvgg_cuda.verification import NETWORK_FACTOR, verify

#: TF32 keeps 10 bits of each factor, and may cut the rest off.
TF32_UNIT = 2.0**-10

#: An output of another engine further off than this, relative to the largest value, is that of another computation.
#: Far above the error of any float32 algorithm: how exact an engine is stands beside its time, and is no reason to
#: leave it out.
FOREIGN = 1e-2

Check = Callable[[Any], str]


def as_tensor(output: Any) -> Tensor:
    """What a candidate returned, as one tensor: of torch, NumPy, or ncnn's list of images."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list):
        return torch.stack([torch.as_tensor(image.numpy() if hasattr(image, "numpy") else image) for image in output])
    return torch.as_tensor(output)


def relative_error(output: Tensor, want: Tensor) -> float:
    """The largest difference relative to the largest value; infinite where the shape differs or NaN turns up."""
    if output.numel() != want.numel():
        return math.inf
    if want.numel() == 0:
        return 0.0
    largest = (output.reshape(want.shape).double() - want).abs().max()
    error = float(largest / want.abs().max()) if float(largest) > 0 else float(largest)
    return error if math.isfinite(error) else math.inf


def check_close(want: Tensor, bound: Tensor, dtype: torch.dtype) -> Check:
    """A check that the output has the shape of ``want``, the given dtype, and lies within ``bound`` everywhere."""

    def check(y: Tensor) -> str:
        if y.shape != want.shape or y.dtype != dtype:
            expected = f"{shape_name(want)} {dtype_name(dtype)}"
            return f"expected {expected}, got {shape_name(y)} {dtype_name(y.dtype)}"
        return "" if bool(((y.double() - want).abs() <= bound).all()) else testing.worst(y, want, bound)

    return check


def with_tf32(bound: Tensor, terms: int, tf32: bool) -> Tensor:
    """``bound``, which is at least ``terms`` float32 units of the sum of magnitudes, with both factors in TF32."""
    if not tf32:
        return bound
    in_units = (2 * TF32_UNIT + TF32_UNIT**2) / (terms * testing.unit_roundoff(torch.float32))
    return bound * (1 + in_units)


class Truth:
    """What a case's output should be, ``want`` in float64, and how far a float kernel may be from it."""

    def __init__(self, want: Callable[[], Tensor], bound: Callable[[], Tensor], dtype: torch.dtype) -> None:
        self._want, self._bound, self.dtype = want, bound, dtype

    @cached_property
    def want(self) -> Tensor:
        return self._want()

    @cached_property
    def bound(self) -> Tensor:
        return self._bound()

    def error(self, output: Any) -> float:
        return relative_error(as_tensor(output), self.want)

    def check(self, output: Any) -> str:
        return check_close(self.want, self.bound, self.dtype)(output)

    def check_foreign(self, output: Any) -> str:
        """Another engine's output: what it returns it in is its own affair, and so is how it rounds."""
        y = as_tensor(output)
        if y.numel() != self.want.numel():
            return f"expected {shape_name(self.want)}, got {shape_name(y)}"
        error = relative_error(y, self.want)
        return "" if error <= FOREIGN else f"another result: relative error {error:.2g}"

    def remark_foreign(self, output: Any) -> str:
        """How far another engine's output lies outside the bound of float32 arithmetic; "" if it does not."""
        y = as_tensor(output).reshape(self.want.shape).double()
        times = float(((y - self.want).abs() / self.bound.clamp_min(torch.finfo(torch.float64).tiny)).max())
        return "" if times <= 1 else f"inexact: {times:.1f} times the bound of float32 arithmetic"


def network_truth(model: nn.Module, peer: nn.Module, x: Tensor, *, tf32: bool = False) -> Truth:
    """Of a network's output: ``model`` itself in float64.

    An evaluation may be off by what :func:`repvgg_cuda.verify` allows: a small multiple of the error of ``peer``,
    another evaluation of the same network, in the dtype of ``x``; with ``tf32``, of the rounding of factors to TF32.
    """
    unit = TF32_UNIT if tf32 else testing.unit_roundoff(x.dtype)

    @torch.inference_mode()
    def want() -> Tensor:
        y: Tensor = copy.deepcopy(model).double()(x.double())
        return y

    @torch.inference_mode()
    def bound() -> Tensor:
        peer_error = (peer(x).double() - truth.want).abs().max()
        allowed = NETWORK_FACTOR * torch.maximum(peer_error, unit * truth.want.abs().max())
        return allowed.expand_as(truth.want)

    truth = Truth(want, bound, x.dtype)
    return truth


def check_layers(trained: nn.Module, model: nn.Module, x: Tensor) -> Check:
    """A check that every layer of the deployed ``model``, and its output, is right: :func:`verification.verify`."""

    def check(y: Tensor) -> str:
        if not bool(y.isfinite().all()):
            return "the output holds NaN or infinity"
        row = verify(trained, model, x).first_failure
        return "" if row is None else f"{row.name}: error {row.error:.3g}, bound {row.bound:.3g}"

    return check
