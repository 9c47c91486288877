# SPDX-License-Identifier: MIT
"""gpu-check without a GPU: its rehearsal from end to end, and what becomes of stages that fail, hang or die."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from repvgg_cuda import _ext, cli, gpu_check, gpu_model, gpu_report, gpu_stages, gpus, testing
from repvgg_cuda.gpu_check import Check, Stage, StageError, StageSkipped

needs_module = pytest.mark.skipif(_ext.module is None, reason=f"no compiled module: {_ext.why_missing}")


# ----------------------------------------------------------------------------------------------------------- rehearsal


@needs_module
def test_the_rehearsal(tmp_path: Path) -> None:
    """Every stage, every part, every baseline, on the CPU. What is skipped for want of a package says so."""
    assert cli.main(["gpu-check", "--dry-run", "--scale", "5", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / gpu_check.REPORT).read_text())
    assert report["dry_run"] is True
    assert report["exit_code"] == 0
    statuses = {stage["name"]: stage["status"] for stage in report["stages"]}
    assert list(statuses) == [stage.name for stage in gpu_check.STAGES]
    assert {name for name, status in statuses.items() if status != "ok"} <= {"pictures"}
    results = report["results"]
    assert results["tests"]["passed"] > 50
    assert results["tests"]["failed"] == 0
    for kind in ("memcheck", "racecheck"):
        assert results["sanitizer"][kind]["runs"] > 5
    assert results["parts"]["machine"]["ceilings"]["gflops"].keys() == {"float32", "tf32", "float16", "bfloat16"}
    for part in ("layers", "networks"):
        assert results["parts"][part]["not_measured"] == []
        for case in results["parts"][part]["cases"]:
            assert {row["status"] for row in case["rows"]} <= {"ok", "refused"}
            names = [row["candidate"] for row in case["rows"] if row["status"] == "ok"]
            for begins, _ in gpu_report.WAYS[::2]:
                for graph in (False, True):
                    assert any(n.startswith(begins) and ("CUDA graph" in n) == graph for n in names), (begins, graph)
    compiled = [
        row["candidate"] for row in results["parts"]["networks"]["cases"][0]["rows"] if "compile" in row["candidate"]
    ]
    assert compiled == ["torch.compile, channels_last", "torch.compile, channels_last, CUDA graph"]
    assert any(case["predicted"] for case in results["parts"]["layers"]["cases"]) == _ext.has_cuda_kernels()

    text = (tmp_path / gpu_check.PAGE).read_text()
    assert gpu_report.NO_MEANING in text
    assert "| layers | ok |" in text
    assert "## Measured" in text
    assert "## The model beside the measurement" in text
    if statuses["pictures"] == "ok":
        assert "rehearsal without a GPU" in (tmp_path / gpu_check.PICTURES).read_text()
    assert {path.name for path in tmp_path.iterdir()} <= {gpu_check.REPORT, gpu_check.PAGE, gpu_check.PICTURES}


# --------------------------------------------------------------------------------------------------------- the borders


def stages(*bodies: Callable[[Check, float], dict[str, Any]], seconds: float = 5.0) -> list[Stage]:
    return [Stage(body, seconds) for body in bodies]


def good(check: Check, seconds: float) -> dict[str, Any]:
    """Works."""
    return {"seconds": seconds}


def fails(check: Check, seconds: float) -> dict[str, Any]:
    """Says what is wrong."""
    check.log = "line\n" * 100 + "the last line"
    raise StageError("a reason")


def raises(check: Check, seconds: float) -> dict[str, Any]:
    """Has a bug."""
    raise KeyError("oops")


def skips(check: Check, seconds: float) -> dict[str, Any]:
    """Does not apply."""
    raise StageSkipped("no such tool")


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    report = gpu_check.run_stages(Check(tmp_path, True), stages(fails, raises, skips, good))
    assert [stage["status"] for stage in report["stages"]] == ["failed", "failed", "skipped", "ok"]
    assert [stage["note"] for stage in report["stages"]] == ["a reason", "KeyError: 'oops'", "no such tool", ""]
    assert report["exit_code"] == 1
    assert json.loads((tmp_path / gpu_check.REPORT).read_text()) == report
    text = (tmp_path / gpu_check.PAGE).read_text()
    assert "**Failed: fails, raises.**" in text
    assert "the last line" in text
    assert report["stages"][0]["log"][-1] == "the last line"
    assert len(report["stages"][0]["log"]) == gpu_check.LOG_LINES


def test_what_is_skipped_is_no_failure(tmp_path: Path) -> None:
    assert gpu_check.run_stages(Check(tmp_path, True), stages(skips, good))["exit_code"] == 0


def test_the_report_is_there_before_the_next_stage(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def looks(check: Check, seconds: float) -> dict[str, Any]:
        """Reads the report."""
        seen.append(json.loads((tmp_path / gpu_check.REPORT).read_text()))
        return {}

    gpu_check.run_stages(Check(tmp_path, True), stages(good, looks))
    assert [stage["status"] for stage in seen[0]["stages"]] == ["ok", "not run"]
    assert seen[0]["finished"] is None
    assert seen[0]["results"]["good"]["seconds"] > 0


def test_time_that_is_left_over_goes_to_the_next_stage(tmp_path: Path) -> None:
    got: list[float] = []

    def slow(check: Check, seconds: float) -> dict[str, Any]:
        """Takes longer than it may."""
        got.append(seconds)
        time.sleep(0.2)
        return {}

    def late(check: Check, seconds: float) -> dict[str, Any]:
        """Has what is left."""
        got.append(seconds)
        return {}

    gpu_check.run_stages(Check(tmp_path, True), [Stage(good, 3.0), Stage(slow, 0.1), Stage(late, 1.0)])
    assert 3.0 < got[0] <= 3.1
    assert got[0] - 0.2 >= got[1] - 1.0 > 2.0


def test_the_stages_fit_into_eight_minutes() -> None:
    assert sum(stage.seconds for stage in gpu_check.STAGES) <= 480


# ---------------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("background", [False, True])
def test_a_command_that_hangs_is_ended_with_all_its_children(background: bool, tmp_path: Path) -> None:
    """Also as a background job of a shell, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler)
    try:
        hang_and_look(tmp_path)
        assert signal.getsignal(signal.SIGINT) is (signal.SIG_IGN if background else signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, before)


def hang_and_look(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    program = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    check = Check(tmp_path, True)
    begin = time.monotonic()
    assert check.command([sys.executable, "-c", program], 1.0) is None
    assert time.monotonic() - begin < gpu_check.GRACE_S
    assert check.log.startswith("begun")
    time.sleep(2.5)
    assert not mark.exists()
    assert check.command([sys.executable, "-c", "print('fine')"], 60) == 0
    assert check.log == "fine\n"
    assert list(tmp_path.iterdir()) == []


def fake_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Check:
    """A check whose parts are this program, given the path of the file that a part writes."""
    path = str(tmp_path / "layers.part.json")
    program = f"import os, pathlib, sys, time\nfound = pathlib.Path({path!r})\n{body}"
    check = Check(tmp_path, True)
    real = check.command
    monkeypatch.setattr(check, "command", lambda arguments, seconds: real([sys.executable, "-c", program], seconds))
    return check


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("found.write_text('{\"cases\": [1]}'); os.kill(os.getpid(), 11)", "exit status -11"),
        (
            "found.write_text('{\"cases\": [1]}'); sys.exit('an illegal memory access')",
            "illegal memory access",
        ),
        ("found.write_text('{\"cases\": [1]}'); time.sleep(60)", "did not end within"),
        ("pass", "left no result"),
    ],
)
def test_a_part_that_dies_leaves_what_it_had_found(
    body: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.5)
    check = fake_part(tmp_path, monkeypatch, body)
    with pytest.raises(StageError, match=why):
        check.part("layers", 1.0 if "sleep" in body else 60.0)
    assert check.results["parts"]["layers"] == ({} if body == "pass" else {"cases": [1]})


def test_a_wrong_row_fails_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit status of a part is what its rows of ours deserve."""
    monkeypatch.setitem(gpu_stages.PARTS, "layers", lambda part: ["fp16, a case, ours: wrong: off by one"])  # type: ignore[index]
    assert gpu_stages.run_part("layers", tmp_path, 5.0, dry_run=True) == 1
    monkeypatch.setitem(gpu_stages.PARTS, "layers", lambda part: [])  # type: ignore[index]
    assert gpu_stages.run_part("layers", tmp_path, 5.0, dry_run=True) == 0


@needs_module
def test_a_planted_fault_is_found_by_the_smoke_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_stages.conv3x3
    monkeypatch.setattr(gpu_stages, "conv3x3", lambda *args, **options: real(*args, **options) * 1.01)
    assert gpu_stages.run_part("smoke", tmp_path, 60.0, dry_run=True) == 1


@needs_module
def test_what_there_is_no_time_for_is_listed(tmp_path: Path) -> None:
    part = gpu_stages.Part("layers", tmp_path, time.monotonic() - 1.0, True)
    assert gpu_stages.layers(part) == []
    assert len(part.found["not_measured"]) == len(gpu_stages.DRY_LAYER_RUNS)
    assert part.found["cases"] == []


# --------------------------------------------------------------------------------------------------- results of others


def test_junit(tmp_path: Path) -> None:
    path = tmp_path / "results.xml"
    path.write_text(
        """<testsuites><testsuite><testcase classname="tests.a" name="one" time="0.5"/>
        <testcase classname="tests.a" name="two" time="1"><failure message="assert 1 == 2&#10;and more"/></testcase>
        <testcase classname="tests.a" name="three"><skipped message="one GPU"/></testcase>
        <testcase classname="tests.a" name="four"><error message="fixture"/></testcase></testsuite></testsuites>"""
    )
    found = gpu_stages.read_junit(path)
    assert (found["passed"], found["failed"], found["skipped"], found["seconds"]) == (1, 2, 1, 1.5)
    assert found["failures"][0] == {"name": "tests.a::two", "message": "assert 1 == 2"}
    assert found["skip_reasons"] == {"one GPU": 1}


def probe(out: list[int], compare: str = "bits", given: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    return {"compare": compare, "in": list(given), "out": out}


def word(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32).item()) & 0xFFFFFFFF


def test_probes_are_compared_bit_by_bit() -> None:
    def compare(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
        return gpu_stages.compare_probes({"probes": here}, {"probes": there})

    assert compare({"a": probe([1, 2])}, {"a": probe([1, 2])}) == []
    assert compare({"a": probe([1, 2])}, {"a": probe([1, 3])}) == [
        "a: 1 of 2 words differ, the first at 1: 0x00000002 on the GPU, 0x00000003 on the stand-in"
    ]
    assert compare({"a": probe([1])}, {}) == ["a: only the GPU has it"]
    assert compare({}, {"a": probe([1])}) == ["a: only the stand-in has it"]
    assert compare({"a": probe([1])}, {"a": probe([1], given=(1, 3))}) == ["a: the two ran on different inputs"]
    near, off = word(1.0 + 2**-20), word(1.0 + 2**-10)
    assert compare({"a": probe([word(1.0)], "close")}, {"a": probe([near], "close")}) == []
    assert len(compare({"a": probe([word(1.0)], "close")}, {"a": probe([off], "close")})) == 1
    nan, inf = word(float("nan")), word(float("inf"))
    assert compare({"a": probe([nan, inf], "close")}, {"a": probe([nan, inf], "close")}) == []
    assert len(compare({"a": probe([nan], "close")}, {"a": probe([inf], "close")})) == 1


@needs_module
def test_the_prediction_of_a_network_is_the_sum_over_its_layers() -> None:
    if not _ext.has_cuda_kernels():
        pytest.skip("this build has no CUDA rows to ask")
    cases, gpu, mode = gpu_model.network("RepVGG-A0"), gpus.GPUS["A100"], gpu_model.MODES["fp32"]
    found = gpu_stages.predict(gpu, cases, mode)
    assert found is not None
    singles = [gpu_stages.predict(gpu, [case], mode) for case in cases]
    for key in ("floor_us", "ours_us", "fused_us", "eager_us"):
        assert found[key] == pytest.approx(sum(single[key] for single in singles if single is not None))
    assert gpu_stages.predict(gpus.GPUS["T4"], cases, gpu_model.MODES["bf16"]) is None
    assert gpu_stages.predict(gpu, [], mode) is None


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpu-check", "--scale", "0", "--out", str(tmp_path)]) == 1
    assert "--scale must be positive" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["gpu-check", "--only", "everything"])
    parser = argparse.ArgumentParser()
    gpu_check.add_arguments(parser)
    assert "--part" not in parser.format_help()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    assert cli.main(["gpu-check", "--only", "build", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / gpu_check.REPORT).read_text())
    assert "torch finds no CUDA GPU" in report["stages"][0]["note"]
    assert "--dry-run" in report["stages"][0]["note"]


def test_smoke_cases_reach_every_kind_of_layer() -> None:
    assert {case.stride for case in gpu_stages.SMOKE_CASES} == {1, 2}
    assert any(case.groups > 1 for case in gpu_stages.SMOKE_CASES)
    assert any(case.C == 3 for case in gpu_stages.SMOKE_CASES)
    assert all(case.flops < 2e8 for case in gpu_stages.SMOKE_CASES)
    assert isinstance(gpu_stages.DRY_LAYER, testing.Case)
