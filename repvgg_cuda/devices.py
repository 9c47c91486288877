# SPDX-License-Identifier: MIT
"""The device that a benchmark runs on, behind one interface: the CPU, a CUDA GPU, or a rehearsal of one on the CPU.

Everything that exists on a GPU alone (events, graphs, cuDNN's fused call, nvidia-smi) is a method of
:class:`CudaDevice`. :class:`DryRunDevice` answers the same calls on the CPU, so that a machine without a GPU can run
every line above this file: its figures are no measurement of anything, and say so.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg_cuda.branches import require
from repvgg_cuda.timing import Clock, CpuClock, CudaClock, Run, WallClock

ContextManager = contextlib.AbstractContextManager[object]

#: Written to push everything else out of a CPU's caches, whose size no portable call tells.
CPU_FLUSH_BYTES = 192 << 20

#: What nvidia-smi is asked for, and the name that each figure gets here.
SMI_FIELDS = {
    "driver_version": "driver",
    "clocks.sm": "clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.sm": "max_clock_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "clocks_throttle_reasons.active": "throttle",
    "ecc.mode.current": "ecc",
    "utilization.gpu": "utilization_percent",
}

#: The bits of nvidia-smi's active throttle reasons that make a figure untrue: idle and user-set clocks do not.
THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class CpuDevice:
    """The CPU. ``kind`` decides which baselines there are; ``torch_device`` is where the tensors are."""

    kind = "cpu"
    dry_run = False
    torch_device = torch.device("cpu")

    def clock(self, name: str = "auto") -> Clock:
        """``"cpu"`` is the CPU time of this process, ``"wall"`` the wall clock; ``"auto"``: CPU time of one thread."""
        return CpuClock() if name == "cpu" or (name == "auto" and torch.get_num_threads() == 1) else WallClock()

    def synchronize(self) -> None:
        """Waits for all work."""

    def flush(self) -> Callable[[], None]:
        """A function that leaves nothing of earlier calls in the caches."""
        buffer = torch.zeros(CPU_FLUSH_BYTES // 4)

        def flush() -> None:
            buffer.add_(1.0)

        return flush

    def compile(self, module: nn.Module, mode: str) -> Callable[[Tensor], Any]:
        return torch.compile(module, mode=mode, dynamic=False)

    def capture(self, run: Run) -> Run:
        raise RuntimeError("CUDA graphs need a CUDA device")

    def side_streams(self, count: int) -> contextlib.AbstractContextManager[list[ContextManager]]:
        raise RuntimeError("streams need a CUDA device")

    def conv_relu(self, x: Tensor, weight: Tensor, bias: Tensor, stride: int, groups: int) -> Tensor:
        raise RuntimeError("cudnn_convolution_relu needs a CUDA device")

    def facts(self) -> dict[str, Any]:
        """What the record says about the device, beyond the CPU's part of :mod:`repvgg_cuda.environment`."""
        return {}

    def state(self) -> dict[str, Any]:
        """Clocks, power and temperature right now, as far as the system says."""
        return {}


class CudaDevice(CpuDevice):
    """A CUDA GPU, the current one unless ``index`` says which."""

    kind = "cuda"

    def __init__(self, index: int | None = None) -> None:
        require(
            torch.cuda.is_available(),
            "bench: --device cuda needs a CUDA GPU and a PyTorch built for it, and torch.cuda.is_available() is False; "
            "use --device cpu, or --dry-run to rehearse it",
        )
        self.torch_device = torch.device("cuda", torch.cuda.current_device() if index is None else index)

    def clock(self, name: str = "auto") -> Clock:
        return WallClock() if name == "wall" else CudaClock()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def flush(self) -> Callable[[], None]:
        properties: Any = self._properties()
        buffer = torch.zeros(max(4 * int(properties.L2_cache_size), 64 << 20) // 4, device=self.torch_device)

        def flush() -> None:
            buffer.add_(1.0)

        return flush

    def capture(self, run: Run) -> Run:
        """``run`` as one CUDA graph, whose replay leaves the output where the capture put it."""
        stream: Any = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # what happens once (cuDNN's search, compilation) cannot be captured
                run()
        torch.cuda.current_stream(self.torch_device).wait_stream(stream)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()

        def replay() -> object:
            graph.replay()
            return output

        return replay

    @contextlib.contextmanager
    def side_streams(self, count: int) -> Iterator[list[ContextManager]]:
        """So many new streams, each to be entered once: they follow what was launched before, and what follows waits
        for them."""
        before = torch.cuda.current_stream(self.torch_device)
        streams: list[Any] = [torch.cuda.Stream(self.torch_device) for _ in range(count)]  # type: ignore[no-untyped-call]
        for stream in streams:
            stream.wait_stream(before)
        yield [torch.cuda.stream(stream) for stream in streams]
        for stream in streams:
            before.wait_stream(stream)

    def conv_relu(self, x: Tensor, weight: Tensor, bias: Tensor, stride: int, groups: int) -> Tensor:
        """cuDNN's convolution, bias and ReLU in one call: the strongest baseline PyTorch has."""
        return torch.cudnn_convolution_relu(x, weight, bias, [stride] * 2, [1, 1], [1, 1], groups)

    def facts(self) -> dict[str, Any]:
        properties: Any = self._properties()
        cudnn: Any = torch.backends.cudnn
        return {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": cudnn.version(),
            "tf32": cudnn.allow_tf32,
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        }

    def state(self) -> dict[str, Any]:
        properties: Any = self._properties()
        return query_smi(f"GPU-{properties.uuid}")

    def _properties(self) -> Any:
        return torch.cuda.get_device_properties(self.torch_device)


class RehearsalClock:
    """Runs once what is to be timed, and says that every call took a millisecond: no load makes a rehearsal longer."""

    name, resolution = "rehearsal", 1.0

    def time(self, run: Run, calls: int) -> float:
        run()
        return 1e6 * calls


class DryRunDevice(CudaDevice):
    """Every call of :class:`CudaDevice`, answered on the CPU by the nearest thing: for tests and rehearsals only."""

    dry_run = True
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        pass

    def clock(self, name: str = "auto") -> Clock:
        return RehearsalClock()

    def synchronize(self) -> None:
        pass

    def flush(self) -> Callable[[], None]:
        return lambda: None

    def compile(self, module: nn.Module, mode: str) -> Callable[[Tensor], Any]:
        return torch.compile(module, backend="eager", dynamic=False)

    def capture(self, run: Run) -> Run:
        """Keeps the first output, as a graph does, and overwrites it."""
        for _ in range(3):
            run()
        output = run()

        def replay() -> object:
            again = run()
            if isinstance(output, Tensor) and isinstance(again, Tensor):
                output.copy_(again)
            return output

        return replay

    @contextlib.contextmanager
    def side_streams(self, count: int) -> Iterator[list[ContextManager]]:
        yield [contextlib.nullcontext() for _ in range(count)]

    def conv_relu(self, x: Tensor, weight: Tensor, bias: Tensor, stride: int, groups: int) -> Tensor:
        return F.conv2d(x, weight, bias, stride, 1, 1, groups).relu_()

    def facts(self) -> dict[str, Any]:
        return {
            "gpu": "dry run: no GPU, and these times mean nothing",
            "compute_capability": "0.0",
            "multiprocessors": 1,
            "gpu_memory_bytes": 0,
            "l2_bytes": 0,
            "cuda": torch.version.cuda,
            "cudnn": None,
            "tf32": bool(torch.backends.cudnn.allow_tf32),
            "tf32_matmul": False,
        }

    def state(self) -> dict[str, Any]:
        return parse_smi(", ".join(["0"] * len(SMI_FIELDS)))


Device = CpuDevice


def device_for(name: str, *, dry_run: bool = False) -> Device:
    """``"cpu"`` or ``"cuda"``; with ``dry_run``, a rehearsal of the latter. Raises RuntimeError without such a GPU."""
    require(name in ("cpu", "cuda"), f"device must be cpu or cuda, got {name}")
    require(not dry_run or name == "cuda", f"a dry run rehearses a GPU, got device {name}; add --device cuda")
    if name == "cpu":
        return CpuDevice()
    return DryRunDevice() if dry_run else CudaDevice()


def query_smi(uuid: str) -> dict[str, Any]:
    """What nvidia-smi says about the GPU now; empty where there is no nvidia-smi or it refuses."""
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_smi(done.stdout)


def parse_smi(text: str) -> dict[str, Any]:
    """One line of nvidia-smi's CSV in the order of :data:`SMI_FIELDS`; fields it does not support are left out."""
    values = [value.strip() for value in text.strip().partition("\n")[0].split(",")]
    if len(values) != len(SMI_FIELDS):
        return {}
    state: dict[str, Any] = {}
    for name, value in zip(SMI_FIELDS.values(), values, strict=True):
        if value.startswith("[") or value == "N/A":
            continue
        if name == "throttle":
            state[name] = [reason for bit, reason in THROTTLES.items() if int(value, 0) & bit]
            continue
        try:
            state[name] = float(value)
        except ValueError:
            state[name] = value
    return state
