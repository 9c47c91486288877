# SPDX-License-Identifier: MIT
"""Compiled part of repvgg_cuda. Arrays are any objects with DLPack: NumPy, CuPy, torch, ..."""

from collections.abc import Sequence
from typing import Any

class DLPackArray:
    """A result for any library: pass it to that library's ``from_dlpack``."""

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def algorithms(device_type: str) -> list[str]:
    """Names of the rows of a device's table, without ``"aten"``."""

def refusal(
    algorithm: str,
    device_type: str,
    device_index: int,
    x_shape: Sequence[int],
    out_channels: int,
    stride: int,
    groups: int,
    dtype: str,
    channels_last: bool,
    activation: str,
) -> str | None:
    """Why a row refuses a problem; None if it accepts. ``device_index`` -1: no device at hand."""

def explain(
    prepared: bool,
    low_memory: bool,
    device_type: str,
    device_index: int,
    capability: int,
    multiprocessors: int,
    x_shape: Sequence[int],
    out_channels: int,
    stride: int,
    groups: int,
    dtype: str,
    channels_last: bool,
    activation: str,
) -> list[tuple[str, str | None, float | None, int, bool]]:
    """Every row and ``"aten"``: name, refusal, predicted seconds, bytes of packed weights, whether "auto" takes it.

    With ``device_index`` -1 ``capability`` (80 for 8.0) and ``multiprocessors`` describe a GPU that is not at hand; 0:
    unknown.
    """

def launch_plan(
    algorithm: str,
    capability: int,
    multiprocessors: int,
    x_shape: Sequence[int],
    out_channels: int,
    stride: int,
    groups: int,
    dtype: str,
    channels_last: bool,
    activation: str,
) -> dict[str, int] | None:
    """How a CUDA row would launch on such a GPU, the fields of ``repvgg::LaunchPlan``; None where it refuses."""

def build_info() -> str:
    """How this module was built, as JSON."""

def cpu_targets() -> list[str]:
    """Instruction sets that the CPU kernels are compiled for and this machine has, the least capable first."""

def cpu_target() -> str:
    """The one of them that runs: the most capable, or at most what REPVGG_CUDA_CPU_ISA names."""

def cpu_multiply_adds(rounds: int) -> float:
    """Multiply-adds in registers and nothing else, in one thread, for the ceiling. Returns their operations."""

def conv3x3(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: str = "identity",
    algorithm: str = "auto",
) -> Any:
    """``repvgg_cuda.conv3x3`` for arrays; NumPy and CuPy arrays come back as such, else a :class:`DLPackArray`."""

def fuse_weights(
    arrays: Sequence[Any | None], bn_eps: Sequence[float], in_channels: int, out_channels: int, groups: int = 1
) -> tuple[Any, Any]:
    """Folds a block given as six arrays or None per branch (kernel, bias, BatchNorm weight, bias, mean, var), and four
    more for a BatchNorm on the sum. Returns ``(weight, bias)``."""
