# SPDX-License-Identifier: MIT
"""What this machine can do at most, measured: arithmetic, memory at several sizes, launches on a GPU.

So a row can say its share of the limit. The floor of a case is that of a *direct* convolution: its operations at the
peak rate or its bytes at the memory's, whichever takes longer. A Winograd algorithm multiplies less, so its share may
exceed 100 %.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from repvgg_cuda import _ext
from repvgg_cuda.comparison import Caches, Work
from repvgg_cuda.devices import Device
from repvgg_cuda.timing import Clock, Run

#: Working sets of the bandwidth on a CPU: in the L2, in the L3, in memory.
CPU_SIZES = (1 << 19, 1 << 23, 1 << 28)

#: A measurement is the best of so many, each at least so long.
REPEATS, SAMPLE_NS = 5, 2e7

#: Of the square matrices whose product gives a GPU's rate.
GPU_MATRIX = 8192


@dataclass(frozen=True)
class Ceilings:
    """Measured limits.

    Args:
        gflops: by dtype; "tf32" is float32 with cuDNN's and cuBLAS's TF32 allowed.
        gflops_source: what the rate was measured with.
        bandwidth: (bytes of the working set, GB/s), the sizes ascending.
        launch_us, graph_launch_us: of an empty kernel, by itself and as a node of a CUDA graph; None on a CPU.
    """

    gflops: Mapping[str, float]
    gflops_source: str
    bandwidth: tuple[tuple[float, float], ...]
    launch_us: float | None = None
    graph_launch_us: float | None = None

    def rate(self, dtype: torch.dtype, tf32: bool = False) -> float | None:
        return self.gflops.get("tf32" if tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch."))

    def memory(self, size: float) -> float:
        """GB/s for a working set of ``size`` bytes: that of the next smaller one measured, which is no slower."""
        return next((rate for bound, rate in reversed(self.bandwidth) if bound <= size), self.bandwidth[0][1])

    def floors(self, work: Work | None, dtype: torch.dtype, tf32: bool = False) -> dict[Caches, float]:
        """The least microseconds for ``work`` with warm and with cold caches; empty where no rate was measured."""
        rate = self.rate(dtype, tf32)
        if work is None or rate is None:
            return {}
        arithmetic = work.flops / rate / 1e3
        return {
            "warm": max(arithmetic, work.bytes / self.memory(work.bytes) / 1e3),
            "cold": max(arithmetic, work.bytes / self.bandwidth[-1][1] / 1e3),
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bandwidth": [list(pair) for pair in self.bandwidth]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Ceilings:
        pairs = tuple((float(size), float(rate)) for size, rate in fields["bandwidth"])
        return cls(**{**fields, "bandwidth": pairs})


def measure(device: Device) -> Ceilings:
    """Takes about two seconds. Uses as many threads as torch does."""
    with torch.inference_mode():
        return _measure_cuda(device) if device.kind == "cuda" else _measure_cpu(device)


def best(run: Run, clock: Clock) -> float:
    """Nanoseconds per call of the fastest of :data:`REPEATS` samples."""
    calls = 1
    while (elapsed := clock.time(run, calls)) < SAMPLE_NS and calls < 1 << 20:
        calls = max(calls + 1, min(calls * 10, int(1.2 * calls * SAMPLE_NS / max(elapsed, 1.0))))
    return min(clock.time(run, calls) for _ in range(REPEATS)) / calls


# ---------------------------------------------------------------------------------------------------------------- CPU


def _measure_cpu(device: Device) -> Ceilings:
    clock, threads = device.clock(), torch.get_num_threads()
    bandwidth = tuple((float(size), _bandwidth(size, device, clock)) for size in CPU_SIZES)
    if _ext.module is None:
        x = torch.ones(512, 512)
        nanoseconds = best(lambda: x @ x, clock)
        return Ceilings({"float32": 2 * 512**3 / nanoseconds}, "torch matmul of 512 x 512", bandwidth)
    multiply_adds: Callable[[int], float] = _ext.module.cpu_multiply_adds
    rounds = 100_000
    with ThreadPoolExecutor(threads) as pool:

        def run() -> None:
            list(pool.map(multiply_adds, [rounds] * threads))

        nanoseconds = best(run, clock)
    source = f"multiply-adds in registers, {_ext.module.cpu_target()}, {threads} threads"
    return Ceilings({"float32": threads * multiply_adds(rounds) / nanoseconds}, source, bandwidth)


def _bandwidth(size: int, device: Device, clock: Clock) -> float:
    """GB/s of reading two tensors or of copying one into the other, ``size`` bytes together: the faster."""
    x, y = (torch.ones(size // 8, device=device.torch_device) for _ in range(2))
    return size / min(best(lambda: y.copy_(x), clock), best(lambda: torch.dot(x, y), clock))


# --------------------------------------------------------------------------------------------------------------- CUDA


def _measure_cuda(device: Device) -> Ceilings:
    clock, facts = device.clock(), device.facts()
    n, memory = (64, 1 << 16) if device.dry_run else (GPU_MATRIX, 1 << 30)
    gflops = {}
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("float16", torch.float16, False),
        ("bfloat16", torch.bfloat16, False),
    ):
        x = torch.randn(n, n, device=device.torch_device).to(dtype)
        with _matmul_tf32(tf32):
            gflops[name] = 2 * n**3 / best(lambda x=x: x @ x, clock)  # type: ignore[misc]
    in_cache = max(int(facts["l2_bytes"]) // 4, 1 << 14)
    bandwidth = tuple((float(size), _bandwidth(size, device, clock)) for size in (in_cache, memory))
    one = torch.zeros(1, device=device.torch_device)
    launch = best(lambda: one.add_(1), clock)

    def hundred() -> object:
        for _ in range(100):
            one.add_(1)
        return one

    in_graph = best(device.capture(hundred), clock) / 100
    return Ceilings(gflops, f"torch matmul of {n} x {n}", bandwidth, launch / 1e3, in_graph / 1e3)


@contextlib.contextmanager
def _matmul_tf32(allowed: bool) -> Iterator[None]:
    flags: Any = torch.backends.cuda.matmul
    before = flags.allow_tf32
    flags.allow_tf32 = allowed
    try:
        yield
    finally:
        flags.allow_tf32 = before
