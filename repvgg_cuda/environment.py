# SPDX-License-Identifier: MIT
"""What a measured figure depends on: machine, threads, versions, how this copy was built, flags, load."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from repvgg_cuda._ext import build_info
from repvgg_cuda._version import __version__


def collect(device: torch.device) -> dict[str, Any]:
    """All of it, of types that JSON has. Takes a moment, in which it watches how busy the machine is."""
    record: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "repvgg_cuda": __version__,
        "git": git_revision(),
        "build": build_info(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "busy_cpus": busy_cpus(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cudnn: Any = torch.backends.cudnn
        record |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": cudnn.version(),
            "tf32": cudnn.allow_tf32,
        }
    return record


def machine(record: Mapping[str, Any]) -> str:
    """The :func:`collect`-ed record's processor in a few words."""
    return str(record.get("gpu") or f"{record['cpu']}, {record['threads']} threads")


def cpu_name() -> str:
    """The CPU's model name as Linux reports it, else whatever ``platform`` knows."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
