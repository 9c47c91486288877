# SPDX-License-Identifier: MIT
"""The report of ``gpu-check`` as Markdown, and what its page of pictures is drawn from: made from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from repvgg_cuda import environment
from repvgg_cuda.baselines import CHANNELS_LAST, CUDA_GRAPH, CUDNN_BENCHMARK
from repvgg_cuda.ceilings import Ceilings
from repvgg_cuda.comparison import AGAIN, Row
from repvgg_cuda.gpu_model import MODES
from repvgg_cuda.networks import OWN_PREFIX
from repvgg_cuda.records import Run
from repvgg_cuda.tables import duration

Report = Mapping[str, Any]

NO_MEANING = "**A rehearsal without a GPU: the CPU stood in, and no figure here means anything.**"


def render(report: Report) -> str:
    """The whole report; whatever has not been found yet is left out."""
    results = report["results"]
    parts = results.get("parts", {})
    lines = ["# repvgg_cuda on this GPU", ""]
    if report["dry_run"]:
        lines += [NO_MEANING, ""]
    lines += [f"{verdict(report)} Started {report['started']}.", ""]
    lines += stages(report)
    lines += machine(parts.get("machine", {}))
    lines += tests(results)
    cases = [case for name in ("layers", "networks") for case in parts.get(name, {}).get("cases", [])]
    lines += measured(cases)
    lines += calibration(cases)
    lines += not_measured(parts)
    return "\n".join(lines).rstrip() + "\n"


def verdict(report: Report) -> str:
    failed = [stage["name"] for stage in report["stages"] if stage["status"] == "failed"]
    if failed:
        return f"**Failed: {', '.join(failed)}.**"
    if report["finished"] is None:
        return "Not finished."
    skipped = [stage["name"] for stage in report["stages"] if stage["status"] == "skipped"]
    return "Every stage that ran is in order." + (f" Skipped: {', '.join(skipped)}." if skipped else "")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    yield ""


def stages(report: Report) -> Iterator[str]:
    rows = [(s["name"], s["status"], f"{s['seconds']:.0f} s", s["note"][:300]) for s in report["stages"]]
    yield from table(("stage", "", "took", "note"), rows)
    for stage in report["stages"]:
        if stage.get("log"):
            yield f"<details><summary>the end of what {stage['name']} printed</summary>"
            yield from ("", "```", *stage["log"], "```", "", "</details>", "")


def machine(found: Mapping[str, Any]) -> Iterator[str]:
    record = found.get("environment")
    if record is None:
        return
    yield "## The machine"
    yield ""
    facts = {
        "GPU": f"{environment.machine(record)}, compute capability {record['compute_capability']}, "
        f"{record['multiprocessors']} multiprocessors",
        "driver, CUDA, cuDNN": f"{record['state'].get('driver', 'unknown')}, {record['cuda']}, {record['cudnn']}",
        "torch, repvgg_cuda": f"{record['torch']}, {record['repvgg_cuda']} ({record['git'] or 'no git'})",
        "before": flat(record["state"]),
        "after the ceilings": flat(record.get("state_after", {})),
    }
    limits = found.get("ceilings")
    if limits is not None:
        rates = ", ".join(f"{name} {gflops / 1e3:.1f}" for name, gflops in limits["gflops"].items())
        facts["TFLOP/s"] = f"{rates} ({limits['gflops_source']})"
        facts["GB/s"] = ", ".join(f"{rate:.0f} ({size / 1e6:.3g} MB)" for size, rate in limits["bandwidth"])
        facts["a launch"] = f"{limits['launch_us']:.2f} us, in a CUDA graph {limits['graph_launch_us']:.2f} us"
    if found.get("call_us"):
        facts["a call of conv3x3"] = ", ".join(f"{name} {us:.1f} us" for name, us in found["call_us"].items())
    yield from table(("", ""), list(facts.items()))


def flat(state: Mapping[str, Any]) -> str:
    shown = (f"{key} {', '.join(value) if isinstance(value, list) else value}" for key, value in state.items())
    return "; ".join(shown) or "nvidia-smi says nothing"


def tests(results: Mapping[str, Any]) -> Iterator[str]:
    found = results.get("tests")
    if found is not None:
        yield "## Tests"
        yield ""
        yield f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped."
        yield ""
        for failure in found["failures"]:
            yield f"- `{failure['name']}`: {failure['message']}"
        for reason, count in found["skip_reasons"].items():
            yield f"- skipped {count}: {reason}"
        yield ""
    for name, result in results.get("sanitizer", {}).items():
        yield f"- compute-sanitizer {name}: {result.get('error') or result['summary'] or 'no problem'}"
    if results.get("probes"):
        probed = results["probes"]
        bad = "; ".join(probed["differing"]) or "none"
        yield f"- probes of instructions against the host stand-in: {probed['probes']}, differing: {bad}"
    yield ""


# ------------------------------------------------------------------------------------------------------------ measured


def fastest(case: Mapping[str, Any], begins: str, *, graph: bool, own: bool = False) -> Mapping[str, Any] | None:
    """The fastest right row whose name begins so, in a CUDA graph or not."""
    rows = [
        row
        for row in case["rows"]
        if row["median_us"] is not None
        and row["candidate"].startswith(begins)
        and not row["candidate"].endswith(AGAIN)
        and row["candidate"].endswith(CUDA_GRAPH) == graph
        and row["own"] == own
    ]
    return min(rows, key=lambda row: row["median_us"], default=None)


#: What a table shows of PyTorch's ways: how their names begin, and what the column is called.
WAYS = (
    ("cudnn_convolution_relu", "cuDNN fused"),
    ("torch.compile", "torch.compile"),
    ("fused F.conv2d", "eager"),
)


def cell(row: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> str:
    """A time and how many times as long as ours it is."""
    if row is None:
        return ""
    text = duration(row["median_us"])
    return text if ours is None else f"{text} ({row['median_us'] / ours['median_us']:.2f}x)"


def short(name: str) -> str:
    return name.removeprefix(OWN_PREFIX).replace(CUDNN_BENCHMARK, ", searched").replace(CHANNELS_LAST, ", NHWC")


def measured(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table per suite, mode, and with or without graphs: ours beside the fastest of each of PyTorch's ways."""
    if not cases:
        return
    yield "## Measured"
    yield ""
    yield (
        "Medians; in brackets how many times as long as ours. Of each of PyTorch's ways the fastest form is shown: "
        "NCHW or channels_last, cuDNN's search off or on. Caches are warm. fp32 is exact: TF32 is off but in tables "
        "called tf32. The JSON has every row with its samples."
    )
    yield ""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for case in cases:
        groups.setdefault((case["suite"], case["mode"]), []).append(case)
    for (suite, mode), group in groups.items():
        for graph in (True, False):
            yield f"### {suite}, {mode}, {'in CUDA graphs' if graph else 'launched one by one'}"
            yield ""
            rows = []
            for case in group:
                ours = fastest(case, OWN_PREFIX, graph=graph, own=True)
                name = f"{duration(ours['median_us'])} {short(ours['candidate'])}" if ours else "none"
                floor = next((row["floor_us"] for row in case["rows"] if row["floor_us"] is not None), None)
                others = (cell(fastest(case, begins, graph=graph), ours) for begins, _ in WAYS)
                rows.append((case["case"], "" if floor is None else duration(floor), name, *others))
            yield from table(("case", "floor", "ours", *(title for _, title in WAYS)), rows)
    bad = [
        (case["mode"], case["case"], row["candidate"], row["status"], row["note"])
        for case in cases
        for row in case["rows"]
        if row["status"] in ("wrong", "error")
    ]
    if bad:
        yield "Rows without a time because they are wrong or raised:"
        yield ""
        yield from table(("mode", "case", "row", "", "why"), bad)


#: What the model predicts of PyTorch's ways, and how the names of the rows begin that it is about.
PREDICTIONS = (
    ("fused_us", "cudnn_convolution_relu"),
    ("compiled_us", "torch.compile"),
    ("eager_us", "fused F.conv2d"),
)


def calibration(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The model's predictions beside the measurements, as measured / predicted. It assumes launches from a graph."""
    rows = []
    for case in cases:
        predicted = case["predicted"]
        if predicted is None:
            continue
        if predicted["plan"] is not None:  # one layer: the row that the model speaks of
            name, key = predicted["algorithms"][0], "ours_us"
        else:
            name, key = "prepared", "auto_us"
        cells = [compared(predicted[key], fastest(case, OWN_PREFIX + name, graph=True, own=True))]
        cells += [compared(predicted[key], fastest(case, begins, graph=True)) for key, begins in PREDICTIONS]
        estimate = f"{predicted['estimate_us']:.1f}" if predicted["estimate_us"] else ""
        rows.append((case["mode"], case["case"], f"{predicted['floor_us']:.1f}", name, *cells, estimate))
    if rows:
        yield "## The model beside the measurement"
        yield ""
        yield (
            "Predicted / measured in microseconds, and how many times as long it took as predicted "
            "(`docs/gpu-model.md`). The last column is what `auto` goes by."
        )
        yield ""
        columns = ("mode", "case", "floor", "ours", "", "cuDNN fused", "compiled", "eager", "auto's estimate")
        yield from table(columns, rows)


def compared(predicted: float, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return f"{predicted:.1f} / -"
    return f"{predicted:.1f} / {row['median_us']:.1f} = {row['median_us'] / predicted:.2f}x"


def not_measured(parts: Mapping[str, Any]) -> Iterator[str]:
    left = [each for name in ("layers", "networks") for each in parts.get(name, {}).get("not_measured", [])]
    if left:
        yield f"Not measured for want of time: {', '.join(f'{mode} {case}' for mode, case in left)}."


# ---------------------------------------------------------------------------------------------------------------- page


def as_run(report: Report) -> Run | None:
    """What was measured in one precision as a record of the benchmark, for its page; None where nothing was.

    float16 where there is any: it is what these kernels are for. A page of pictures is about one dtype.
    """
    parts = report["results"].get("parts", {})
    record = parts.get("machine", {}).get("environment")
    cases = [case for name in ("layers", "networks") for case in parts.get(name, {}).get("cases", [])]
    if record is None or not cases:
        return None
    modes = [case["mode"] for case in cases]
    mode = "fp16" if "fp16" in modes else modes[0]
    rows = [
        Row(**{**fields, "samples_ns": tuple(fields["samples_ns"])})
        for case in cases
        if case["mode"] == mode
        for fields in case["rows"]
    ]
    limits = parts["machine"].get("ceilings")
    options = {"dtype": str(MODES[mode].dtype).removeprefix("torch."), "rounds": max(row.rounds for row in rows)}
    environment = {**record, "dry_run": report["dry_run"], "tf32": mode == "tf32"}
    return Run(options, environment, None if limits is None else Ceilings.from_dict(limits), [], rows)
