# SPDX-License-Identifier: MIT
"""The choice of an algorithm by measurement, and what a measured time depends on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from repvgg_cuda import _ext, environment, ops, timing
from repvgg_cuda._version import __version__
from repvgg_cuda.branches import dtype_name, require
from repvgg_cuda.devices import CudaDevice
from repvgg_cuda.explanation import Candidate
from repvgg_cuda.tuning_cache import TuningCache

#: Samples of each candidate.
TUNE_ROUNDS = 15

#: Calls in a CUDA graph, so that launching it does not take longer than it runs.
CALLS_PER_GRAPH = 20


@dataclass(frozen=True)
class Problem:
    """One layer, and the size of what it reads."""

    weight: Tensor
    bias: Tensor | None
    input_size: tuple[int, ...]
    stride: int
    groups: int
    activation: ops.Activation

    @property
    def channels_last(self) -> bool:
        """Of the input: as networks run, that is for 16-bit types on a GPU."""
        return self.weight.device.type == "cuda" and self.weight.element_size() == 2

    def key(self) -> str:
        """All that a time depends on: the machine, the software, the layer."""
        n, c, h, w = self.input_size
        weight = self.weight
        as_krsc = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        facts = (
            dtype_name(weight.dtype),
            "channels_last" if self.channels_last else "contiguous",
            f"N{n} C{c} H{h} W{w} K{weight.shape[0]} stride {self.stride} groups {self.groups}",
            self.activation,
            "no bias" if self.bias is None else f"bias {dtype_name(self.bias.dtype)}",
            "weight channels_last" if as_krsc else "weight contiguous",
        )
        return f"{_place(weight.device)} | {', '.join(facts)}"


def tuned_rows(
    problem: Problem, rows: Sequence[Candidate], memory: ops.Memory, cache: TuningCache
) -> tuple[Candidate, ...]:
    """``rows`` with measured times instead of predicted ones; the fastest is chosen.

    Every row that "auto" may take is measured, ``aten`` too: not those that it never takes, because they are less
    accurate. Known times are used if they are of just the rows that run now; else all are measured anew, side by side.
    The layer is measured alone; in a chain of layers conversions of layout fall away.
    """
    weight_bytes = problem.weight.numel() * problem.weight.element_size()
    runnable = {row.name: row for row in rows if row.refusal is None and row.seconds != float("inf")}
    allowed = [name for name, row in runnable.items() if memory == "fast" or row.packed_bytes <= weight_bytes]
    key = problem.key()
    times = cache.find(key)
    if times is None or not set(allowed) <= times.keys() <= runnable.keys():
        times = _measure(problem, allowed, memory)
        cache.store(key, times)
    fastest = min(allowed, key=lambda name: times[name])
    return tuple(replace(row, seconds=times.get(row.name, row.seconds), chosen=row.name == fastest) for row in rows)


def _measure(problem: Problem, names: Sequence[str], memory: ops.Memory) -> dict[str, float]:
    """Seconds per call of each algorithm on random inputs, interleaved."""
    device = problem.weight.device
    require(
        device.type != "cuda" or not torch.cuda.is_current_stream_capturing(),
        "prepare: tune=True would measure now, at the first forward, which is being captured in a CUDA graph; give "
        "prepare() an example, or run the model once before it is captured",
    )
    x = torch.randn(problem.input_size, device=device).to(problem.weight.dtype)
    if problem.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    layer: dict[str, Any] = {"stride": problem.stride, "groups": problem.groups}

    def run(name: str) -> timing.Run:
        packed = ops.prepack(problem.weight, problem.input_size, **layer, algorithm=name, memory=memory)
        return lambda: ops.conv3x3(
            x, problem.weight, problem.bias, **layer, activation=problem.activation, packed=packed
        )

    if device.type != "cuda":
        return _seconds(
            timing.measure({name: run(name) for name in names}, timing.clock_for(device), rounds=TUNE_ROUNDS)
        )
    with torch.cuda.device(device):
        return measure_graphs(CudaDevice(device.index), {name: run(name) for name in names})


def measure_graphs(gpu: CudaDevice, runs: Mapping[str, timing.Run]) -> dict[str, float]:
    """Seconds per call, from CUDA graphs of many calls: kernels alone, without what the host takes to launch them.

    Captured on a stream of their own, so that nobody's work is captured; replayed, and timed by events, on the current.
    """
    graphs = {name: gpu.capture(_repeated(run)) for name, run in runs.items()}
    times = _seconds(timing.measure(graphs, gpu.clock(), rounds=TUNE_ROUNDS))
    return {name: seconds / CALLS_PER_GRAPH for name, seconds in times.items()}


def _repeated(run: timing.Run) -> timing.Run:
    def runs() -> object:
        for _ in range(CALLS_PER_GRAPH - 1):
            run()
        return run()

    return runs


def _seconds(timings: Mapping[str, timing.Timing]) -> dict[str, float]:
    return {name: each.median / 1e9 for name, each in timings.items()}


# --------------------------------------------------------------------------------------------------------------- places


def _place(device: torch.device) -> str:
    """The machine and the software, as far as a time depends on them."""
    software = f"torch {torch.__version__}, repvgg_cuda {__version__} {_build()}"
    if device.type == "cuda":
        return f"{_gpu(device)}, {_cudnn()}, {software}"
    cpu = f"{environment.cpu_name()}, {environment.cpu_target()}, threads {torch.get_num_threads()}"
    return f"{cpu}, {software} {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def _gpu(device: torch.device) -> str:
    gpu, torch_c = CudaDevice(device.index), cast(Any, torch._C)
    facts, driver = gpu.facts(), gpu.state().get("driver")  # of nvidia-smi, if there is one: it takes a while
    if driver is None:
        driver = f"for CUDA {torch_c._cuda_getDriverVersion()}"
    return (
        f"{facts['gpu']}, capability {facts['compute_capability']}, {facts['multiprocessors']} multiprocessors, "
        f"driver {driver}"
    )


def _cudnn() -> str:
    """And its switches, which decide what ``aten`` runs."""
    cudnn: Any = torch.backends.cudnn
    switches = [name for name in ("enabled", "allow_tf32", "benchmark", "deterministic") if getattr(cudnn, name)]
    return f"cuDNN {cudnn.version()} {' '.join(switches)}"


@functools.cache
def _build() -> str:
    """Tells one compiled module from another, as two builds of one version may have other kernels."""
    file = None if _ext.module is None else _ext.module.__file__
    if file is None:
        return "without a compiled module"
    with contextlib.suppress(OSError):
        return hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
    return "of an unknown build"
