# SPDX-License-Identifier: MIT
"""The parts of ``gpu-check`` that touch the GPU, each in a process of its own, and what reads the other tools' results.

A part gets so many seconds, looks at the clock before every step, and writes all that it has found after each.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from repvgg_cuda import ceilings, devices, environment, gpu_model, gpus, runner, suites, testing
from repvgg_cuda.comparison import Candidate, Plan, Row
from repvgg_cuda.files import write_text_atomically
from repvgg_cuda.ops import algorithms, conv3x3, refusal

#: Set to 1 it tells tests/test_cuda.py to run on stand-ins.
DRY_RUN_VARIABLE = "REPVGG_CUDA_DRY_RUN"

#: What is measured, in this order, as far as the time goes: these layers before the others, each as (batch, mode of the
#: performance model).
FIRST_LAYERS = ("stem", "A0-stage2", "A0-stage3", "B1-stage3", "B1g4-stage3")
LAYER_RUNS = (
    (1, "fp16"), (32, "fp16"), (32, "fp32"), (1, "fp32"), (32, "bf16"), (32, "tf32"), (1, "bf16"), (1, "tf32"),
)  # fmt: skip
NETWORK_RUNS = (
    ("RepVGG-A0", 1, "fp16"), ("RepVGG-A0", 32, "fp16"), ("RepVGG-B1", 32, "fp16"), ("RepVGG-A0", 32, "fp32"),
    ("RepVGG-B1", 1, "fp16"), ("RepVGG-A0", 1, "fp32"), ("RepVGG-A0", 32, "tf32"), ("RepVGG-B1g4", 32, "fp16"),
    ("RepVGG-B1", 32, "fp32"), ("RepVGG-A0", 32, "bf16"), ("RepVGG-A0", 128, "fp16"), ("RepVGG-B1", 32, "bf16"),
)  # fmt: skip

#: Samples per row: what an interval needs at least.
ROUNDS = 9

#: Of a rehearsal: sizes that take no time.
DRY_LAYER = testing.Case("rehearsal", 1, 8, 6, 6, 8)
DRY_LAYER_RUNS = ((1, "fp16"), (2, "fp32"))

#: For the sanitizers, which slow a kernel down by hundreds: edges, several tiles and chunks, strides, groups.
SMOKE_CASES = (
    testing.Case("odd", 2, 5, 7, 9, 6),
    testing.Case("even", 2, 16, 16, 18, 16, stride=2),
    testing.Case("wide", 1, 72, 15, 33, 80),
    testing.Case("images", 5, 32, 14, 14, 48),
    testing.Case("groups", 1, 64, 9, 11, 128, groups=4),
    testing.Case("stem", 1, 3, 33, 31, 48, stride=2),
    testing.Case("deep", 1, 256, 7, 7, 32),
)

#: What the probes of a rehearsal print.
DRY_PROBES = '{"capability": 80, "probes": {"copy": {"compare": "bits", "in": [1, 2], "out": [2, 1]}}}'

#: Results of the probes whose rounding the PTX ISA leaves open may differ by so much of the largest: 16 products, each
#: sum cut off rather than rounded.
CLOSE = 16 * 2.0**-22


@dataclass
class Part:
    """One part at work. ``found`` is what the parent reads; :meth:`save` writes it."""

    name: str
    out: Path
    deadline: float
    dry_run: bool
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> devices.Device:
        return devices.device_for("cuda", dry_run=self.dry_run)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        write_text_atomically(self.out / f"{self.name}.part.json", json.dumps(self.found) + "\n")


def run_part(name: str, out: Path, seconds: float, *, dry_run: bool) -> int:
    """Runs one of :data:`PARTS`. Returns the exit status: 1 if something that it ran is wrong."""
    part = Part(name, out, time.monotonic() + seconds, dry_run)
    wrong = PARTS[name](part)
    part.save()
    for text in wrong:
        print(text, file=sys.stderr)
    return int(bool(wrong))


# ------------------------------------------------------------------------------------------------------------- machine


def machine(part: Part) -> list[str]:
    """What it is, what it can do at most, and what a call of ours costs the host."""
    device = part.device
    part.found["environment"] = environment.collect(device.torch_device) | device.facts() | {"state": device.state()}
    part.save()
    part.found["ceilings"] = ceilings.measure(device).to_dict()
    part.save()
    x, weight, _ = (t.to(device.torch_device) for t in testing.Case("call", 1, 8, 8, 8, 8).tensors())
    calls = {}
    with torch.inference_mode():
        for name in algorithms(device.torch_device):
            if refusal(name, x, weight) is None:
                calls[name] = ceilings.best(partial(conv3x3, x, weight, algorithm=name), device.clock()) / 1e3
    part.found["call_us"] = calls
    part.found["environment"]["state_after"] = device.state()
    return []


# --------------------------------------------------------------------------------------------------------------- smoke


def smoke(part: Part) -> list[str]:
    """Every row once on every small case it takes; the device does nothing else, and the host checks the results."""
    device, wrong = part.device.torch_device, []
    runs = part.found["runs"] = []
    for case in SMOKE_CASES[:2] if part.dry_run else SMOKE_CASES:
        for dtype in testing.DTYPES:
            x, weight, bias = case.tensors(dtype)
            want = testing.conv3x3_fp64(x, weight, bias, case.stride, case.groups, "relu")
            for algorithm, like in _smoke_runs(case, x, device):
                where = [t.to(device) for t in (weight, bias)]
                y = conv3x3(
                    like, *where, stride=case.stride, groups=case.groups, activation="relu", algorithm=algorithm
                ).cpu()
                bound = testing.error_bound(x, weight, bias, case.stride, case.groups, algorithm)
                runs.append([algorithm, str(case), str(dtype)[6:]])
                if not bool(((y.double() - want).abs() <= bound).all()):
                    wrong.append(f"{algorithm}, {case}, {dtype}: {testing.worst(y, want, bound)}")
            part.save()
    return wrong


def _smoke_runs(case: testing.Case, x: torch.Tensor, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Our rows and layouts that take the case, with its input there."""
    weight = torch.empty(case.weight_size, dtype=x.dtype, device=device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        there = x.contiguous(memory_format=memory_format).to(device)
        for algorithm in algorithms(device)[:-1]:
            if refusal(algorithm, there, weight, stride=case.stride, groups=case.groups, activation="relu") is None:
                yield algorithm, there


# -------------------------------------------------------------------------------------------------- layers and networks


def layers(part: Part) -> list[str]:
    """Every layer in every way; torch.compile, which takes seconds to build, is left to the networks."""
    jobs: list[tuple[str, Job]] = []
    first = [case for case in testing.REPVGG_LAYERS if case.name in FIRST_LAYERS]
    rest = [case for case in testing.REPVGG_LAYERS if case.name not in FIRST_LAYERS]
    for cases in [[DRY_LAYER]] if part.dry_run else [first, rest]:
        for batch, mode in DRY_LAYER_RUNS if part.dry_run else LAYER_RUNS:
            for case in cases:
                sized = dataclasses.replace(case, N=batch)
                jobs.append((mode, Job(partial(_layer_case, sized), (sized,))))
    return _measure(part, "layers", jobs)


def networks_part(part: Part) -> list[str]:
    """Whole networks."""
    if part.dry_run:
        return _measure(part, "models", [("fp32", Job(partial(_network_case, "digits", 1), ()))])
    jobs = []
    for name, batch, mode in NETWORK_RUNS:
        layer_cases = tuple(dataclasses.replace(case, N=batch) for case in gpu_model.network(name))
        jobs.append((mode, Job(partial(_network_case, name, batch), layer_cases)))
    return _measure(part, "models", jobs)


def _layer_case(case: testing.Case, setup: suites.Setup) -> suites.Case:
    return suites.layer_case(setup, case)


def _network_case(name: str, batch: int, setup: suites.Setup) -> suites.Case:
    return suites.network_case(setup, name, batch)


@dataclass(frozen=True)
class Job:
    """A case to measure, and the layers that the model is asked about."""

    case: Callable[[suites.Setup], suites.Case]
    layers: Sequence[testing.Case]


def _measure(part: Part, suite: str, jobs: Sequence[tuple[str, Job]]) -> list[str]:
    """Job after job while there is time for another one like the longest. Returns the rows of ours that are wrong."""
    device, wrong, longest = part.device, [], 0.0
    limits = _known_ceilings(part)
    known = _gpu_of(part)
    entries = part.found["cases"] = []
    left_out = part.found["not_measured"] = []
    part.found["state_before"] = device.state()
    for mode_name, job in jobs:
        mode = gpu_model.MODES[mode_name]
        against = ("eager", "channels_last", "cudnn-relu", "graph", *(["compile"] if suite == "models" else []))
        setup = suites.Setup(device.torch_device, mode.dtype, against=against, dry_run=part.dry_run)
        case = job.case(setup)
        if part.left() < 1.3 * longest:
            left_out.append([mode_name, case.name])
            continue
        begin = time.monotonic()
        with runner.torch_settings(None, mode_name == "tf32"):
            trimmed = dataclasses.replace(case, build=partial(_trimmed, case.build))
            rows = runner.run_case(suite, trimmed, setup, Plan(device.clock(), ROUNDS, repeat_first=True), limits)
        longest = max(longest, time.monotonic() - begin)
        predicted = None if known is None else predict(known, job.layers, mode)
        torch.cuda.empty_cache()  # graphs had pools of their own
        entries.append(
            {
                "suite": suite, "case": case.name, "mode": mode_name, "batch": case.batch,
                "tf32": mode_name == "tf32", "predicted": predicted, "rows": [dataclasses.asdict(row) for row in rows],
            }
        )  # fmt: skip
        wrong += [f"{mode_name}, {row.case}, {row.candidate}: {row.status}: {row.note}" for row in rows if _is_bad(row)]
        part.save()
        print(f"{mode_name} {case.name}: {len(rows)} rows in {time.monotonic() - begin:.1f} s", flush=True)
    part.found["state_after"] = device.state()
    return wrong


def _is_bad(row: Row) -> bool:
    """What fails the stage: a row of ours. A baseline that raises is a row of the report that says so."""
    return row.own and row.status in ("wrong", "error")


def _trimmed(build: Callable[[], suites.Built]) -> suites.Built:
    """Without the forms of torch.compile that take long to build and lose: NCHW."""
    built = build()

    def wanted(candidate: Candidate) -> bool:
        return not candidate.name.startswith("torch.compile") or "channels_last" in candidate.name

    return built._replace(candidates=[candidate for candidate in built.candidates if wanted(candidate)])


def predict(gpu: gpus.Gpu, cases: Sequence[testing.Case], mode: gpu_model.Mode) -> dict[str, Any] | None:
    """The model's sums over the layers, in microseconds; None where the GPU has no such mode or there is no layer.

    ``ours_us`` has eager F.conv2d in layers that our rows refuse, whose number is ``aten``.
    """
    found = [gpu_model.predict(gpu, case, mode) for case in cases]
    present = [layer for layer in found if layer is not None]
    if not present or len(present) < len(found):
        return None
    own = [layer.own for layer in present]
    return {
        "gpu": gpu.name,
        "floor_us": sum(layer.floor_us for layer in present),
        "ours_us": sum(layer.ours_us for layer in present),
        "auto_us": sum(layer.auto_us for layer in present),
        "estimate_us": sum(row.estimate_us or 0.0 for row in own if row is not None),
        "aten": sum(row is None for row in own),
        "algorithms": sorted({row.algorithm for row in own if row is not None}),
        "plan": str(own[0].plan) if len(own) == 1 and own[0] is not None else None,
        "fused_us": sum(layer.fused.us for layer in present),
        "compiled_us": sum(layer.compiled_us for layer in present),
        "eager_us": sum(layer.eager_us for layer in present),
    }


def _known_ceilings(part: Part) -> ceilings.Ceilings:
    """Those that the part before has left in the report, else measured now."""
    try:
        report = json.loads((part.out / "gpu-check.json").read_text())
        return ceilings.Ceilings.from_dict(report["results"]["parts"]["machine"]["ceilings"])
    except (OSError, ValueError, KeyError):
        return ceilings.measure(part.device)


def _gpu_of(part: Part) -> gpus.Gpu | None:
    """The model's data of this GPU. A rehearsal takes an A100's."""
    if part.dry_run:
        return gpus.GPUS["A100"]
    facts = part.device.facts()
    return gpus.known_gpu(facts["gpu"], facts["multiprocessors"])


PARTS: Mapping[str, Callable[[Part], list[str]]] = {
    "machine": machine,
    "smoke": smoke,
    "layers": layers,
    "networks": networks_part,
}


# ------------------------------------------------------------------------------------------------ other tools' results


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, failures with their first line, and how often each reason to skip was given."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": [], "skip_reasons": {}}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        found["seconds"] = round(found["seconds"] + float(case.get("time", 0)), 2)
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        skip = case.find("skipped")
        if problem is not None:
            found["failed"] += 1
            found["failures"].append({"name": name, "message": (problem.get("message") or "").partition("\n")[0][:500]})
        elif skip is not None:
            found["skipped"] += 1
            reason = skip.get("message") or ""
            found["skip_reasons"][reason] = found["skip_reasons"].get(reason, 0) + 1
        else:
            found["passed"] += 1
    return found


def compare_probes(here: Mapping[str, Any], stand_in: Mapping[str, Any]) -> list[str]:
    """What differs between the GPU's probes and the host stand-in's: a line per probe, with the first word."""
    differing = []
    names = set(here["probes"]) | set(stand_in["probes"])
    for name in sorted(names):
        ours, theirs = here["probes"].get(name), stand_in["probes"].get(name)
        if ours is None or theirs is None:
            differing.append(f"{name}: only {'the stand-in' if ours is None else 'the GPU'} has it")
        elif ours["in"] != theirs["in"] or len(ours["out"]) != len(theirs["out"]):
            differing.append(f"{name}: the two ran on different inputs")
        else:
            bad = _differing_words(ours["out"], theirs["out"], ours["compare"] == "close")
            if bad:
                i = bad[0]
                differing.append(
                    f"{name}: {len(bad)} of {len(ours['out'])} words differ, the first at {i}: "
                    f"{ours['out'][i]:#010x} on the GPU, {theirs['out'][i]:#010x} on the stand-in"
                )
    return differing


def _differing_words(ours: Sequence[int], theirs: Sequence[int], close: bool) -> list[int]:
    if not close:
        return [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    a, b = (torch.tensor(_as_floats(words), dtype=torch.float64) for words in (ours, theirs))
    largest = torch.cat([a, b]).nan_to_num(0.0, 0.0, 0.0).abs().max()
    same = ((a - b).abs() <= CLOSE * largest) | (a == b) | (a.isnan() & b.isnan())
    return [int(i) for i in (~same).nonzero().flatten()]


def _as_floats(words: Sequence[int]) -> tuple[float, ...]:
    return struct.unpack(f"{len(words)}f", struct.pack(f"{len(words)}I", *words))
