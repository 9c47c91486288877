# SPDX-License-Identifier: MIT
"""The scripts in benchmarks/: goals on planted numbers, records joined, experiments that can fail. No times."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from repvgg_cuda import bench, ceilings, digits, networks, records, reparameterize
from repvgg_cuda.baselines import Workload, convolutions
from repvgg_cuda.comparison import Row
from repvgg_cuda.records import Run

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[Any, Any]]:
    """``(bench_cpu, aa_experiment)``, which lie outside the package."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("bench_cpu"), importlib.import_module("aa_experiment")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the ceilings takes seconds."""
    known = ceilings.Ceilings({"float32": 100.0}, "a guess", ((1e6, 10.0),))
    monkeypatch.setattr(ceilings, "measure", lambda device: known)


def row(suite: str, group: str, candidate: str, nanoseconds: float, threads: int = 1) -> Row:
    samples = tuple(nanoseconds * (1 + i % 5) for i in range(10))  # what both share cancels
    return Row(suite, f"{group}-1", candidate, "ok", group=group, threads=threads, samples_ns=samples)


def test_goals_speak_of_every_case(scripts: tuple[Any, Any]) -> None:
    bench_cpu, _ = scripts
    rows = []
    for (channels, size), ratio in zip(bench_cpu.suites.CHAINS, [1.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0], strict=True):
        rows += [row("chains", f"{channels}@{size}", bench_cpu.OURS, 5.0)]
        rows += [row("chains", f"{channels}@{size}", "ncnn", 5.0 * ratio)]
    rows += [
        row("models", "RepVGG-B1", bench_cpu.OURS, 2.0, threads=2),
        row("models", "RepVGG-B1", "ncnn", 3.0, threads=2),
    ]
    measured = {goal: ratio for goal in bench_cpu.GOALS if (ratio := bench_cpu.goal_ratio(rows, goal)) is not None}
    assert {(goal.case, goal.threads): ratio for goal, ratio in measured.items()} == {
        ("geometric mean", 1): pytest.approx(2),
        ("slowest", 1): 1,
        ("RepVGG-B1", 2): 1.5,
    }
    # With one chain missing neither the mean nor the slowest is known.
    assert [goal.case for goal in bench_cpu.GOALS if bench_cpu.goal_ratio(rows[1:], goal) is not None] == ["RepVGG-B1"]


@pytest.mark.usefixtures("quick_start")
def test_every_number_of_threads_is_in_one_record(
    scripts: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_cpu, _ = scripts
    path = tmp_path / "cpu.jsonl"
    options = ["--suite", "chains", "--quick", "--rounds", "1", "--against", "eager", "--json", str(path)]
    assert bench_cpu.main([*options, "--threads", "1", "2"]) == 0
    run = records.read(path)
    assert {each.threads for each in run.rows} == {1, 2}
    assert [each.candidate for each in run.rows if each.threads == 1][:2] == [
        "fused F.conv2d + relu", "fused F.conv2d + relu (again)",
    ]  # fmt: skip
    assert bench_cpu.main(["--from", str(path)]) == 0
    assert "not measured" in capsys.readouterr().out


def test_what_would_fail_late_is_refused_before_timing(
    scripts: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_cpu, _ = scripts
    for arguments, message in (
        (["--json", str(tmp_path / "none" / "file")], "create it first"),
        (["--from", str(tmp_path / "none")], "No such file"),
        (["--batch", "0"], "must be at least 1"),
    ):
        assert bench_cpu.main(["--quick", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("quick_start")
def test_results_of_the_cases_before_a_crash_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from repvgg_cuda import runner

    measured = iter([[row("chains", "first", "eager", 1.0)]])
    monkeypatch.setattr(runner, "run_case", lambda *_: next(measured))
    monkeypatch.setattr("repvgg_cuda.suites.CHAINS", ((4, 4), (8, 4)))
    parser = argparse.ArgumentParser()
    bench.add_run_arguments(parser)
    with pytest.raises(StopIteration):
        bench.collect(
            parser.parse_args(["--suite", "chains", "--json", str(tmp_path / "a.jsonl")]), bench.Console(quiet=True)
        )
    assert [each.group for each in records.read(tmp_path / "a.jsonl").rows] == ["first"]


def test_a_model_is_prepared_as_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    deployed: Any = reparameterize(digits.load_trained()).model
    prepared: list[torch.nn.Module] = []
    prepare = networks.prepare

    def note(model: torch.nn.Module, *args: Any, **options: Any) -> object:
        prepared.append(model)
        return prepare(model, *args, **options)

    monkeypatch.setattr(networks, "prepare", note)
    x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        y: Any = networks.prepared(Workload(deployed, x))()
        torch.testing.assert_close(y, deployed(x))
    (copy,) = prepared
    assert [conv.prepared is not None for conv in convolutions(copy)] == [True] * len(deployed.blocks())
    assert all(conv.prepared is None for conv in convolutions(deployed))


def test_building_a_candidate_leaves_compiled_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would be compiled again in the warm-up of the timing, which may end before they are warm."""
    from repvgg_cuda import baselines, suites

    work = suites.chain_workload(suites.Setup(torch.device("cpu"), torch.float32), 4, 4, 1)
    compilations = 0

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend=backend, dynamic=False))
    with torch.inference_mode():
        runs = [baselines.TorchForm(compile_mode=mode)(work) for mode in ("default", "max-autotune")]
        for run in runs:
            run()
        needed = compilations
        assert needed > 0
        baselines.TorchForm(compile_mode="default")(work)  # built, and not run
        for run in runs:
            run()
    assert compilations == needed


# -------------------------------------------------------------------------------------------------------- experiments


def test_the_noise_experiment_counts_and_can_fail(
    scripts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, experiment = scripts

    def run_case(suite: str, case: Any, setup: Any, plan: Any, limits: Any) -> list[Row]:
        low = 1.2 if plan.seed % 2 else 0.9
        again = "x (again)"
        return [Row("s", "c", again, "ok", speedup=1.3, speedup_low=low, speedup_high=1.5)]

    monkeypatch.setattr(experiment.runner, "run_case", run_case)
    assert experiment.main(["noise", "--runs", "4", "--case", "notebook"]) == 1
    out = capsys.readouterr().out
    assert '"contain_1": 2' in out
    assert '"passed": false' in out


def test_the_planted_experiment_counts_what_is_found_and_false_alarms(
    scripts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, experiment = scripts

    def one_process(args: Any, factor: float, out: Path) -> None:
        cost = {"three branches": 9.0, "fused F.conv2d": 5.0, experiment.PLANTED: 2.0 * factor}
        rows = [row("notebook", "n", name, value) for name, value in cost.items()]
        mine = [each.candidate == experiment.PLANTED for each in rows]
        Run({}, {}, rows=[Row(**{**vars(each), "own": own}) for each, own in zip(rows, mine, strict=True)]).write(out)

    monkeypatch.setattr(experiment, "one_process", one_process)
    assert experiment.main(["planted", "--trials", "3"]) == 0
    assert '"found": 3' in capsys.readouterr().out
    assert experiment.main(["planted", "--trials", "3", "--factor", "1.0"]) == 1
    out = capsys.readouterr().out
    assert '"found": 0' in out
    assert '"trials_with_an_alarm_between_the_same_code": 0' in out
    with pytest.raises(SystemExit, match="--pairs must be even and at least 8, got 3"):
        experiment.main(["planted", "--pairs", "3"])


def test_the_planted_row_takes_longer_by_its_share(scripts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, experiment = scripts
    now = 0

    def clock() -> int:
        nonlocal now
        now += 1
        return now

    def run() -> str:
        nonlocal now
        now += 1000
        return "output"

    monkeypatch.setattr(experiment.time, "perf_counter_ns", clock)
    assert experiment.slowed(run, 1.05)() == "output"
    assert 1050 <= now <= 1060
