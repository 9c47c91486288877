# SPDX-License-Identifier: MIT
"""What a measured figure depends on: machine, threads, versions, how this copy was built, flags, load."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from repvgg_cuda import _ext
from repvgg_cuda._ext import build_info
from repvgg_cuda._version import __version__


def collect(device: torch.device) -> dict[str, Any]:
    """All of it, of types that JSON has. Takes a moment, in which it watches how busy the machine is."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "repvgg_cuda": __version__,
        "git": git_revision(),
        "build": build_info(),
        "torch": torch.__version__,
        "torch_debug": bool(torch.version.debug),
        "python": platform.python_version(),
        "python_debug": hasattr(sys, "gettotalrefcount"),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_target": cpu_target(),
        "governor": cpu_governor(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "busy_cpus": busy_cpus(),
        "device": str(device),
    }


def machine(record: Mapping[str, Any]) -> str:
    """The :func:`collect`-ed record's processor in a few words."""
    threads = record["threads"]
    return str(record.get("gpu") or f"{record['cpu']}, {threads} thread{'' if threads == 1 else 's'}")


def cpu_name() -> str:
    """The CPU's model name as Linux reports it, else whatever ``platform`` knows."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_target() -> str | None:
    """The instruction set of this library's CPU kernels; None without the compiled module."""
    return None if _ext.module is None else str(_ext.module.cpu_target())


def cpu_governor() -> str | None:
    """Linux's frequency policy of the first CPU, such as "performance"; None where it does not say."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return None


def load_average() -> float | None:
    """Runnable threads over the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def busy_cpus(seconds: float = 0.3) -> float | None:
    """How many CPUs other programs keep busy right now, measured while this one sleeps; None where Linux does not say.

    The load average lags by a minute; and where threads wait for each other, one stolen CPU stalls them all.
    """

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # all, idle and waiting for input/output

    try:
        total, idle = ticks()
        time.sleep(seconds)
        total_after, idle_after = ticks()
    except (OSError, ValueError, IndexError):
        return None
    elapsed = max(total_after - total, 1)
    return round((elapsed - (idle_after - idle)) / elapsed * (os.cpu_count() or 1), 2)


def pace() -> float:
    """Microseconds of CPU time that a fixed piece of work takes now: it changes where the processor's clock does."""

    def once() -> int:
        start = time.process_time_ns()
        sum(range(100_000))
        return time.process_time_ns() - start

    return min(once() for _ in range(5)) / 1e3


def warnings(record: Mapping[str, Any]) -> list[str]:
    """What in the :func:`collect`-ed record makes times untrue, in words."""
    load = load_warning(record)
    return [*([] if load is None else [load]), *debug_warnings(record), *throttle_warnings(record.get("state", {}))]


def debug_warnings(record: Mapping[str, Any]) -> list[str]:
    """Builds that are slower than what users run."""
    builds = {
        "repvgg_cuda is a debug build (REPVGG_CUDA_DEBUG=1): rebuild it without": record["build"].get("debug"),
        "repvgg_cuda has no compiled module here, and runs in pure PyTorch": record["build"]["build"] == "python",
        "torch is a debug build": record.get("torch_debug"),
        "Python is a debug build": record.get("python_debug"),
    }
    return [text for text, is_so in builds.items() if is_so]


def throttle_warnings(state: Mapping[str, Any]) -> list[str]:
    """What a GPU's :meth:`repvgg_cuda.devices.CudaDevice.state` says about clocks that are held down."""
    if not state.get("throttle"):
        return []
    at = f" at {state['clock_mhz']:.0f} MHz" if "clock_mhz" in state else ""
    return [f"the GPU is throttled{at}: {', '.join(state['throttle'])}; let it cool down, or raise its power limit"]


def load_warning(record: Mapping[str, Any]) -> str | None:
    """A line to show before timing if the :func:`collect` says that other programs are using the CPU."""
    load, busy, cpus = record["load_average"], record["busy_cpus"], record["cpu_count"] or 1
    if (load or 0) <= 0.5 * cpus and (busy or 0) <= 0.25 * cpus:
        return None
    return (
        f"other programs are running (load average {load}, {busy} of {cpus} CPUs busy): threads wait for each other, "
        "so times may be many times too long; run again on a quiet machine, or with OMP_NUM_THREADS=1"
    )


def git_revision() -> str | None:
    """The commit this package is run from (with ``-dirty``), or None if it is not run from its checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
