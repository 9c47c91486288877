# SPDX-License-Identifier: MIT
"""benchmarks/bench_cpu.py: its statistics on planted numbers, wrong results, missing peers, its files. No times."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from repvgg_cuda import RepConv3x3, digits, reparameterize

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[Any, Any]]:
    """``(bench_cpu, peers)``, which lie beside each other and outside the package."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("bench_cpu"), importlib.import_module("peers")
    sys.path.remove(str(BENCHMARKS))


def test_a_planted_factor_of_two_is_found(scripts: tuple[Any, Any]) -> None:
    bench_cpu, _ = scripts
    ours = [100.0 + i % 5 for i in range(20)]
    ratio, low, high = bench_cpu.ratio_interval(ours, [2 * time for time in ours])
    assert ratio == low == high == 2  # rounds are resampled as pairs: what both share cancels
    ratio, low, high = bench_cpu.ratio_interval(ours, list(reversed(ours)))
    assert ratio == 1
    assert low < 1 < high


def test_relative_error(scripts: tuple[Any, Any]) -> None:
    bench_cpu, _ = scripts
    want = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert bench_cpu.relative_error(torch.tensor([1.0, -3.0]), want) == 0.25
    assert bench_cpu.relative_error(torch.tensor([1.0]), want) == math.inf
    assert bench_cpu.relative_error(torch.tensor([1.0, math.nan]), want) == math.inf


def test_goals_speak_of_every_case(scripts: tuple[Any, Any]) -> None:
    bench_cpu, _ = scripts
    ratios = [1.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    rows = [
        bench_cpu.Row("layers", f"{c}@{s}", 1, 1, "ncnn", "ok", ratio=ratio)
        for (c, s), ratio in zip(bench_cpu.LAYERS, ratios, strict=True)
    ]
    rows.append(bench_cpu.Row("models", "RepVGG-B1", 1, 2, "ncnn", "ok", ratio=1.5))
    measured = {goal: ratio for goal in bench_cpu.GOALS if (ratio := bench_cpu.goal_ratio(rows, goal)) is not None}
    assert {(goal.case, goal.threads): ratio for goal, ratio in measured.items()} == {
        ("geometric mean", 1): pytest.approx(2),
        ("slowest", 1): 1,
        ("RepVGG-B1", 2): 1.5,
    }
    # With one layer missing neither the mean nor the slowest is known.
    assert [goal.case for goal in bench_cpu.GOALS if bench_cpu.goal_ratio(rows[1:], goal) is not None] == ["RepVGG-B1"]


def test_what_would_fail_late_is_refused_before_timing(
    scripts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_cpu, _ = scripts
    monkeypatch.setattr(bench_cpu, "time_case", lambda *_: pytest.fail("timed"))
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--out", str(tmp_path / "file")], "--out must be a directory"),
        (["--out", str(tmp_path), "--batch", "0"], "must be at least 1"),
        (["--out", str(tmp_path), "--pause", "-1"], "--pause must not be negative"),
    ):
        assert bench_cpu.main(["--quick", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_results_of_the_cases_before_a_crash_are_there(
    scripts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_cpu, _ = scripts
    pytest.importorskip("matplotlib")
    row = bench_cpu.Row("layers", "first", 1, 1, "eager", "ok", ratio=2.0)
    results = iter([[row]])
    monkeypatch.setattr(bench_cpu, "LAYERS", ((4, 4), (8, 4)))
    monkeypatch.setattr(bench_cpu, "time_case", lambda *_: next(results))
    with pytest.raises(StopIteration):
        bench_cpu.main(["--suite", "layers", "--out", str(tmp_path)])
    assert "layers,first,1,1,eager" in (tmp_path / "bench_cpu.csv").read_text()


def test_a_model_is_prepared_as_a_copy(scripts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, peers = scripts
    deployed: Any = reparameterize(digits.load_trained()).model
    prepared: list[torch.nn.Module] = []
    prepare = peers.prepare

    def note(model: torch.nn.Module, *args: Any, **options: Any) -> object:
        prepared.append(model)
        return prepare(model, *args, **options)

    monkeypatch.setattr(peers, "prepare", note)
    x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        y = peers.ours(peers.Network([], deployed=deployed), x, 1)()
        torch.testing.assert_close(y, deployed(x))
    (copy,) = prepared
    assert prepared_layers(copy) == len(deployed.blocks())
    assert prepared_layers(deployed) == 0


def prepared_layers(model: torch.nn.Module) -> int:
    return sum(isinstance(module, RepConv3x3) and module.prepared is not None for module in model.modules())


def test_building_a_candidate_leaves_compiled_ones_alone(
    scripts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would be compiled again in the warm-up of the timing, which may end before they are warm."""
    bench_cpu, peers = scripts
    network, x = bench_cpu.stack(4, 4, 1, depth=1)
    compilations = 0

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend=backend, dynamic=False))
    with torch.inference_mode():
        runs = [peers.compiled(network, x, 1), peers.compiled_max(network, x, 1)]
        for run in runs:
            run()
        needed = compilations
        assert needed > 0
        peers.compiled(network, x, 1)  # built, and not run
        for run in runs:
            run()
    assert compilations == needed


def test_files_noise_row_missing_and_wrong_candidates(
    scripts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_cpu, peers = scripts
    pytest.importorskip("matplotlib")
    broken = peers.Peer("broken", lambda network, x, threads: lambda: network.reference(x) + 1)
    absent = peers.Peer("absent", peers.ncnn, "no_such_engine", "no-such-engine")
    mine = [peer for peer in peers.PEERS if peer.name in (peers.OURS, peers.EAGER)]
    monkeypatch.setattr(peers, "PEERS", (*mine, broken, absent))
    assert bench_cpu.main(["--suite", "layers", "--quick", "--out", str(tmp_path)]) == 1  # one is wrong
    lines = [line for line in (tmp_path / "bench_cpu.csv").read_text().splitlines() if not line.startswith("# ")]
    rows = {row["candidate"]: row for row in csv.DictReader(lines)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "ours": "ok",
        "eager": "ok",
        "broken": "wrong",
        "absent": "missing",
        "ours (again)": "ok",
    }
    assert "pip install no-such-engine" in rows["absent"]["note"]
    assert rows["broken"]["median_us"] == ""
    assert float(rows["ours (again)"]["ratio"]) > 0
    assert (tmp_path / "bench_cpu.png").stat().st_size > 0
    assert (tmp_path / "bench_cpu.json").exists()
