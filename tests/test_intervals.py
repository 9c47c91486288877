# SPDX-License-Identifier: MIT
"""Intervals of ratios, on samples with known answers; and two runs compared, with planted changes. No clock."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg_cuda import intervals, regression
from repvgg_cuda.comparison import AGAIN, Row
from repvgg_cuda.records import Run
from repvgg_cuda.regression import compare_pairs, compare_runs

# ---------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(("count", "rank"), [(8, 0), (9, 0), (12, 1), (20, 3), (40, 11), (100, 36)])
def test_the_sign_test_leaves_the_right_order_statistics(count: int, rank: int) -> None:
    def outside(k: int) -> float:
        return 2 * sum(math.comb(count, i) for i in range(k + 1)) / 2**count

    assert intervals.sign_test_rank(count) == rank
    assert outside(rank) <= 1 - intervals.LEVEL < outside(rank + 1)


def test_fewest_rounds_is_where_all_on_one_side_is_rare_enough() -> None:
    n = intervals.fewest_rounds()
    assert 2 / 2**n <= 1 - intervals.LEVEL < 2 / 2 ** (n - 1)


def loaded_machine(rng: np.random.Generator, rounds: int, candidates: int) -> np.ndarray[Any, Any]:
    """``[rounds, candidates]`` of times in the order of measuring: calm, then spells of load that last for rounds."""
    noise, spell = np.empty((rounds, candidates)), 0.0
    for index in np.ndindex(rounds, candidates):
        spell = 0.97 * spell + 0.2 * rng.standard_normal()
        noise[index] = math.exp(0.05 * rng.standard_normal() + max(spell, 0.0) * (rng.random() < 0.5))
    return noise


@pytest.mark.parametrize("rounds", [9, 40])
def test_the_same_twice_under_lasting_load_is_called_the_same(rounds: int) -> None:
    rng = np.random.default_rng(rounds)
    hits, experiments = 0, 400
    for _ in range(experiments):
        times = loaded_machine(rng, rounds, 2)
        shuffled = rng.permuted(times, axis=1)  # the random order within a round
        found = intervals.paired_ratio(shuffled[:, 0], shuffled[:, 1])
        assert found is not None
        hits += found.contains_one
    # At 99 % fewer than 97 % of 400 has a chance of 3e-4, and the seed is fixed.
    assert hits >= 0.97 * experiments


def test_resampling_single_rounds_would_be_too_sure_of_a_drifting_ratio() -> None:
    """The reason for blocks: the ratio of two kernels drifts with the machine, and rounds are not independent."""
    rng = np.random.default_rng(3)
    block, single = 0, 0
    for _ in range(100):
        drift = np.zeros(100)
        for i in range(1, 100):
            drift[i] = 0.8 * drift[i - 1] + rng.standard_normal()
        low, high = np.quantile(intervals.bootstrap_medians(drift), [0.005, 0.995])
        block += low <= 0 <= high
        drawn = np.median(drift[rng.integers(100, size=(500, 100))], axis=1)
        low, high = np.quantile(drawn, [0.005, 0.995])
        single += low <= 0 <= high
    assert block > single


def test_what_both_share_cancels() -> None:
    ours = [100.0 + 30 * (i % 5) for i in range(20)]
    assert intervals.paired_ratio([2 * time for time in ours], ours) == (2.0, 2.0, 2.0)
    assert intervals.ratio([8.0, 3.0, 3.0, 4.0, 5.0], [4.0, 1.0, 3.0, 2.0, 5.0]) == 2.0


@given(st.lists(st.floats(1e-3, 1e6), min_size=8, max_size=30), st.floats(1e-3, 1e3))
def test_the_interval_holds_its_value_and_scales(times: list[float], factor: float) -> None:
    found = intervals.paired_ratio(times, [1.0] * len(times))
    assert found is not None
    assert found.low <= found.value <= found.high
    assert min(times) <= found.low
    assert found.high <= max(times)
    scaled = intervals.paired_ratio([factor * time for time in times], [1.0] * len(times))
    assert scaled is not None
    assert scaled == pytest.approx([factor * each for each in found])


def test_samples_of_different_runs_are_refused() -> None:
    with pytest.raises(RuntimeError, match="one sample per round, got 2 and 3"):
        intervals.paired_ratio([1.0, 2.0], [1.0, 2.0, 3.0])


# --------------------------------------------------------------------------------------------------------- regression

CONTROLS = {"three branches": 9.0, "fused F.conv2d": 5.0, "ncnn": 3.0}


def make_run(
    seed: int, ours: float = 2.0, pace: float = 1.0, rounds: int = 100, status: Any = "ok", **environment: Any
) -> Run:
    """One case with three controls and a row of ours, 1 % of noise in each and load that all of them share."""
    rng = np.random.default_rng(seed)
    shared = loaded_machine(rng, rounds, 1)[:, 0]
    rows = []
    for name, cost in {**CONTROLS, f"three branches{AGAIN}": 9.0, "fused conv3x3 prepared": ours}.items():
        own = name.startswith("fused conv3x3")
        samples = cost * pace * 1e5 * shared * np.exp(0.01 * rng.standard_normal(rounds))
        row = Row("s", "c", name, status if own else "ok", own=own, threads=1, clock="cpu", rounds=rounds)
        median = float(np.median(samples)) / 1e3
        timed = dataclasses.replace(row, samples_ns=tuple(samples), median_us=median)
        rows.append(timed if row.status == "ok" else dataclasses.replace(row, note="worst element 3"))
    return Run({}, {"cpu": "x", "threads": 1, "torch": "2", "python": "3", **environment}, rows=rows)


def test_five_percent_are_found_also_when_the_machine_got_faster() -> None:
    found, alarms, blind = 0, 0, 0
    for seed in range(12):
        before = make_run(seed)
        slower = compare_runs(before, make_run(seed + 100, ours=2.1, pace=0.8))
        found += [change.candidate for change in slower.regressions] == ["fused conv3x3 prepared"]
        alarms += bool(compare_runs(before, make_run(seed + 200, pace=1.3)).regressions)
        blind += bool(compare_runs(before, make_run(seed + 100, ours=2.1, pace=0.8), absolute=True).regressions)
    assert found >= 11
    assert alarms == 0
    assert blind == 0  # as they are, the times say that everything got faster


def test_what_controls_show_of_the_noise_between_runs_widens_the_interval() -> None:
    calm = compare_runs(make_run(1), make_run(2)).changes
    restless = make_run(2)
    for i, factor in ((0, 1.06), (1, 0.95)):
        row = restless.rows[i]
        restless.rows[i] = dataclasses.replace(row, samples_ns=tuple(factor * each for each in row.samples_ns))
    wide = compare_runs(make_run(1), restless).changes

    def width(changes: tuple[regression.Change, ...]) -> float:
        (ratio,) = [change.ratio for change in changes if change.own]
        assert ratio is not None
        return ratio.high / ratio.low

    assert width(wide) > 1.2 > 1.05 > width(calm)


def test_faster_same_and_no_regression() -> None:
    changes = {change.candidate: change for change in compare_runs(make_run(1), make_run(2, ours=1.8)).changes}
    assert {name: change.verdict for name, change in changes.items()} == {
        "three branches": "same", "fused F.conv2d": "same", "ncnn": "same", "fused conv3x3 prepared": "faster",
    }  # fmt: skip
    assert changes["fused conv3x3 prepared"].controls == 3
    tolerant = compare_runs(make_run(1), make_run(2, ours=2.1), tolerance=0.1)
    assert tolerant.regressions == ()


@pytest.mark.parametrize("status", ["wrong", "error"])
def test_what_is_not_right_any_more_is_a_regression(status: str) -> None:
    (change,) = compare_runs(make_run(1), make_run(2, status=status)).regressions
    assert (change.verdict, change.ratio) == ("slower", None)
    assert change.note == f"ok before, {status} after: worst element 3"
    assert compare_runs(make_run(1, status=status), make_run(2)).regressions == ()


def test_few_rounds_are_unknown_and_another_torch_is_said() -> None:
    assert {change.verdict for change in compare_runs(make_run(1, rounds=5), make_run(2)).changes} == {"unknown"}
    found = compare_runs(make_run(1), make_run(2, torch="3", cpu="y"))
    assert [text.partition(";")[0] for text in found.warnings] == [
        "cpu differs: x before, y after", "torch differs: 2 before, 3 after",
    ]  # fmt: skip
    assert {change.controls for change in found.changes} == {0}


def test_pairs_tell_what_one_pair_does_not() -> None:
    """Controls that differ by 3 % from run to run, each, often hide 5 % in one pair; eight pairs show them."""

    def pair(seed: int, ours: float) -> tuple[Run, Run]:
        runs = make_run(2 * seed, rounds=30), make_run(2 * seed + 1, ours=ours, rounds=30)
        rng = np.random.default_rng(seed)
        for run in runs:
            for i, row in enumerate(run.rows[:3]):
                factor = float(np.exp(0.03 * rng.standard_normal()))
                run.rows[i] = dataclasses.replace(row, samples_ns=tuple(factor * each for each in row.samples_ns))
        return runs

    found, alone, alarms = 0, 0, 0
    for start in range(0, 80, 8):
        slower = [pair(seed, 2.1) for seed in range(start, start + 8)]
        (change,) = [each for each in compare_pairs(slower).changes if each.own]
        assert change.ratio is not None
        found += change.verdict == "slower"
        alone += bool(compare_runs(*slower[0]).regressions)
        alarms += bool(compare_pairs([pair(seed, 2.0) for seed in range(start, start + 8)]).regressions)
    assert found >= 9
    assert alone <= 5
    assert alarms == 0


def test_pairs_keep_what_one_of_them_lost_and_must_be_enough() -> None:
    pairs = [(make_run(seed), make_run(seed + 50)) for seed in range(4)]
    assert {change.verdict for change in compare_pairs(pairs).changes} == {"same"}
    assert compare_pairs(pairs[:1]) == compare_runs(*pairs[0])
    pairs[2] = (pairs[2][0], make_run(9, status="wrong"))
    (lost,) = compare_pairs(pairs).regressions
    assert lost.note == "ok before, wrong after: worst element 3"
    with pytest.raises(RuntimeError, match="takes one pair of records or at least 4, got 3"):
        compare_pairs(pairs[:3])


@pytest.mark.parametrize(("freedom", "want"), [(3, 5.8409), (4, 4.6041), (5, 4.0321), (7, 3.4995), (30, 2.7500)])
def test_student_quantile(freedom: int, want: float) -> None:
    """Tables give these for 99.5 %."""
    assert intervals.student_quantile(0.995, freedom) == pytest.approx(want, rel=0.01)
    with pytest.raises(RuntimeError, match="freedom must be at least 3, got 2"):
        intervals.student_quantile(0.995, 2)


def test_records_without_a_row_in_common_are_refused() -> None:
    other = make_run(2)
    other.rows = [dataclasses.replace(row, case="another") for row in other.rows]
    with pytest.raises(RuntimeError, match="no row in common"):
        compare_runs(make_run(1), other)
    with pytest.raises(RuntimeError, match="tolerance must not be negative, got -1"):
        compare_runs(make_run(1), make_run(2), tolerance=-1)
