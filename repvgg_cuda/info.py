# SPDX-License-Identifier: MIT
"""What ``repvgg-cuda info`` shows: versions, how this copy was built, the machine, and which algorithms run on it.

:func:`collect` gathers it as plain data for ``--json`` and bug reports, :func:`render` makes it text.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

from repvgg_cuda import _ext, environment, testing
from repvgg_cuda._version import __version__
from repvgg_cuda.branches import dtype_name
from repvgg_cuda.explanation import Candidate
from repvgg_cuda.ops import algorithms, explain

#: The layers on which an algorithm is asked whether it runs here, of RepVGG-A0 at 224 px: it answers for the first that
#: it takes.
PROBES = [
    next(case for case in testing.REPVGG_LAYERS if case.name == name) for name in ("A0-stage2", "A0-stage1.0", "stem")
]


def collect() -> dict[str, Any]:
    """Everything ``info`` shows, of types that JSON has. Asks for CUDA devices, which may initialise CUDA."""
    return {
        "versions": {
            "repvgg_cuda": __version__,
            "torch": torch.__version__,
            "torch CUDA": torch.version.cuda,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "build": _ext.build_info(),
        "extension": {"loaded": _ext.module is not None, "why_missing": _ext.why_missing or None},
        "cpu": {
            "model": environment.cpu_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": _usable_cores(),
            "threads": torch.get_num_threads(),
            "kernels": _ext.module.cpu_target() if _ext.module else None,
        },
        "cuda": {"available": torch.cuda.is_available(), "why_missing": _why_no_cuda(), "devices": _cuda_devices()},
        "algorithms": {device: [_algorithm(name, device) for name in algorithms(device)] for device in ("cpu", "cuda")},
    }


def _usable_cores() -> int:
    """The cores this process may run on, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _why_no_cuda() -> str | None:
    if torch.cuda.is_available():
        return None
    return "no NVIDIA GPU or driver is found" if torch.version.cuda else "this torch is built without CUDA"


def _cuda_devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
            }
        )
    return devices


def _algorithm(name: str, device: str) -> dict[str, Any]:
    """Whether an algorithm runs on this machine: the dtypes it takes for one of :data:`PROBES`, why it refuses others.

    ``packed``: how many times the bytes of the weight its packed weights have; 0 where it packs none.
    """
    why_not = _why_no_cuda() if device == "cuda" else None
    if why_not is not None:
        refusals: dict[str, str | None] = {dtype_name(dtype): why_not for dtype in testing.DTYPES}
        return _row(name, refusals, 0.0)
    candidates = [_candidate(name, device, torch.float32, probe) for probe in PROBES]
    index = next((i for i, candidate in enumerate(candidates) if candidate.refusal is None), 0)
    refusals = {dtype_name(dtype): _candidate(name, device, dtype, PROBES[index]).refusal for dtype in testing.DTYPES}
    weight_bytes = 4 * PROBES[index].K * PROBES[index].terms
    return _row(name, refusals, round(candidates[index].packed_bytes / weight_bytes, 2))


def _row(name: str, refusals: Mapping[str, str | None], packed: float) -> dict[str, Any]:
    return {
        "name": name,
        "available": not all(refusals.values()),
        "dtypes": [dtype for dtype, why in refusals.items() if why is None],
        "refusals": {dtype: why for dtype, why in refusals.items() if why is not None},
        "packed": packed,
    }


def _candidate(name: str, device: str, dtype: torch.dtype, probe: testing.Case) -> Candidate:
    x, weight = (torch.empty(size, dtype=dtype, device=device) for size in (probe.x_size, probe.weight_size))
    return explain(x, weight, stride=probe.stride, groups=probe.groups)[name]


# ------------------------------------------------------------------------------------------------------------ text


def render(info: Mapping[str, Any]) -> str:
    """The result of :func:`collect` as text, one fact a line."""
    extension, cuda = info["extension"], info["cuda"]
    cuda_facts = {"available": "yes" if cuda["available"] else f"no: {cuda['why_missing']}"}
    for i, device in enumerate(cuda["devices"]):
        cuda_facts[f"cuda:{i}"] = (
            f"{device['name']}, compute capability {device['capability']}, "
            f"{device['multiprocessors']} multiprocessors, {device['memory_bytes'] / 2**30:.1f} GiB"
        )
    sections = [
        _section("Versions", info["versions"]),
        _section("Build", info["build"]),
        _section(
            "Compiled module",
            {"_C": "loaded" if extension["loaded"] else f"not loaded: {extension['why_missing']}"},
        ),
        _section("CPU", info["cpu"]),
        _section("CUDA", cuda_facts),
    ]
    for device, rows in info["algorithms"].items():
        facts = {row["name"]: _algorithm_text(row) for row in rows}
        if list(facts) == ["aten"]:
            facts["others"] = f"none: {_why_only_aten(info, device)}"
        title = f"Algorithms on {device}, each on a layer of RepVGG-A0 that it takes"
        sections.append(_section(title, facts))
    return "\n\n".join(sections)


def _section(title: str, facts: Mapping[str, Any]) -> str:
    width = max(map(len, facts), default=0)
    return "\n".join([title, *(f"  {name:{width}}  {_plain(value)}" for name, value in facts.items())])


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(_plain, value)) or "none"
    return str(value)


def _algorithm_text(row: Mapping[str, Any]) -> str:
    """The dtypes an algorithm takes, then those it refuses, grouped by reason."""
    dtypes_by_reason: dict[str, list[str]] = {}
    for dtype, why in row["refusals"].items():
        dtypes_by_reason.setdefault(why, []).append(dtype)
    if not row["available"] and len(dtypes_by_reason) == 1:
        return f"not available: {next(iter(dtypes_by_reason))}"
    refused = [f"not {', '.join(dtypes)}: {why}" for why, dtypes in dtypes_by_reason.items()]
    packed = [f"packed weights {row['packed']:.2g}x"] if row["packed"] else []
    return "; ".join([", ".join(row["dtypes"]) or "not available", *refused, *packed])


def _why_only_aten(info: Mapping[str, Any], device: str) -> str:
    """Why ``aten``, that is F.conv2d, stands alone."""
    if not info["extension"]["loaded"]:
        return f"the compiled module is not loaded ({info['extension']['why_missing']})"
    return f"this copy has no kernels of its own for {device}"
