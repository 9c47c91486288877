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


def test_goals_are_geometric_means_over_all_layers(scripts: tuple[Any, Any]) -> None:
    bench_cpu, _ = scripts
    ratios = [1.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    rows = [
        bench_cpu.Row("layers", f"{c}@{s}", 1, 1, "ncnn", "ok", ratio=ratio)
        for (c, s), ratio in zip(bench_cpu.LAYERS, ratios, strict=True)
    ]
    ((_, ratio, reach, beyond),) = bench_cpu.goal_rows(rows)
    assert ratio == pytest.approx(2)
    assert (reach, beyond) == (1.8, 2.1)
    assert bench_cpu.goal_rows(rows[1:]) == []


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
