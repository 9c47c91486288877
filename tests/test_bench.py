# SPDX-License-Identifier: MIT
"""The benchmark: what it times and refuses to time, its arithmetic on a fake clock, its files and errors. No times."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from repvgg_cuda import (
    Branch,
    Branches,
    bench,
    cli,
    comparison,
    devices,
    environment,
    files,
    fuse_weights,
    intervals,
    records,
    runner,
    suites,
    tables,
    testing,
    timing,
)
from repvgg_cuda.comparison import Candidate, Plan

ROOT = Path(__file__).resolve().parent.parent


pytestmark = pytest.mark.usefixtures("one_thread")


class FakeClock:
    """Every call advances it by what its callable says, so each figure has one right value."""

    name = "fake"
    resolution = 1.0

    def __init__(self, cost: dict[str, Callable[[int], float]]) -> None:
        self.cost = cost
        self.now = 0.0
        self.calls: Counter[str] = Counter()
        self.order: list[tuple[str, int]] = []

    def candidate(self, name: str) -> Callable[[], object]:
        def run() -> None:
            self.now += self.cost[name](self.calls[name])
            self.calls[name] += 1

        run.__name__ = name
        return run

    def time(self, run: Callable[[], object], calls: int) -> float:
        start = self.now
        for _ in range(calls):
            run()
        self.order.append((run.__name__, calls))
        return self.now - start


def fixed(name: str, value: float, *, right: bool = True, **options: object) -> Candidate:
    return Candidate(name, lambda: value, lambda y: "" if right else f"got {y}", **options)  # type: ignore[arg-type]


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(argv)


def one_case(candidates: list[Candidate], name: str = "a case") -> Callable[[suites.Setup], suites.Cases]:
    """A suite of one case."""
    return lambda setup: [suites.Case(name, lambda: suites.Built(candidates))]


def compare(candidates: list[Candidate], rounds: int, **options: Any) -> list[comparison.Row]:
    tick = options.pop("tick", lambda steps: None)
    plan = Plan(timing.WallClock(), rounds, **options)
    return comparison.compare("suite", "case", candidates, plan, tick=tick)


def load_script(path: str) -> ModuleType:
    """A script that is not part of the package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------ timing core


def test_statistics_are_those_of_the_samples() -> None:
    timing_ = timing.Timing((4.0, 1.0, 3.0, 2.0, 5.0), calls=7)
    assert (timing_.median, timing_.p10, timing_.p90) == pytest.approx((3.0, 1.4, 4.6))
    assert timing.Timing((2.0,), 1).p90 == 2.0
    # Within rounds: 8/4, 3/1, 3/3, 4/2, 5/5, although the medians alone would say 4/3.
    assert timing_.speedup_over(timing.Timing((8.0, 3.0, 3.0, 4.0, 5.0), calls=1)) == 2.0


def test_measure_finds_the_cost_of_each_candidate() -> None:
    clock = FakeClock({"slow": lambda i: 2e6, "fast": lambda i: 1000.0})
    got = timing.measure({name: clock.candidate(name) for name in clock.cost}, clock, rounds=6)
    assert got["slow"].samples == (2e6,) * 6
    assert got["fast"].samples == (1000.0,) * 6
    assert got["fast"].speedup_over(got["slow"]) == 1 / got["slow"].speedup_over(got["fast"]) == 0.0005 * 1e6 * 4


def test_samples_are_long_enough_for_the_clock() -> None:
    clock = FakeClock({"a": lambda i: 30.0})
    clock.resolution = 1e4
    calls = timing.measure({"a": clock.candidate("a")}, clock, rounds=1)["a"].calls
    assert calls * 30.0 >= timing.RESOLUTIONS_PER_SAMPLE * clock.resolution > timing.MIN_SAMPLE_NS
    clock = FakeClock({"a": lambda i: timing.MIN_SAMPLE_NS})
    assert timing.measure({"a": clock.candidate("a")}, clock, rounds=1)["a"].calls == 1


def test_rounds_are_interleaved_in_changing_order() -> None:
    names = ["a", "b", "c"]
    clock = FakeClock({name: lambda i: 1e6 for name in names})
    runs = {name: clock.candidate(name) for name in names}
    timing.measure(runs, clock, rounds=12, seed=3)
    timed = [name for name, _ in clock.order[-36:]]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(one) == names for one in rounds)
    assert len(set(rounds)) > 2
    clock.order.clear()
    timing.measure(runs, clock, rounds=12, seed=3)
    assert [name for name, _ in clock.order[-36:]] == timed  # the seed decides


def test_warm_up_waits_until_the_time_is_stable() -> None:
    clock = FakeClock({"a": lambda i: 1e6 * max(1.0, 10.0 - i)})  # settles after nine calls
    got = timing.measure({"a": clock.candidate("a")}, clock, rounds=4)
    assert got["a"].samples == (1e6,) * 4
    growing = FakeClock({"a": lambda i: 1e6 * 1.5**i})  # never settles: the warm-up must give up
    assert timing.warm_up(growing.candidate("a"), growing) == 1
    assert growing.now < 3 * timing.WARM_UP_NS


def test_measure_runs_under_inference_mode_and_within_the_context() -> None:
    seen = []

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        seen.append("enter")
        yield
        seen.append("exit")

    clock = FakeClock({"a": lambda i: seen.append(torch.is_inference_mode_enabled()) or 1e6})  # type: ignore[func-returns-value]
    timing.measure({"a": clock.candidate("a")}, clock, rounds=2, contexts={"a": context})
    assert seen[:2] == ["enter", True]
    assert seen[-6:] == ["enter", True, "exit"] * 2
    assert False not in seen


def test_the_wall_clock_counts_nanoseconds() -> None:
    clock = timing.WallClock()
    assert 0 < clock.resolution < 1e6
    calls: list[int] = []
    assert clock.time(lambda: calls.append(1), 5) > 0
    assert len(calls) == 5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_cuda_clock_waits_for_the_work() -> None:
    x = torch.rand(2048, 2048, device="cuda")
    clock = timing.clock_for(x.device)
    clock.time(lambda: x @ x, 10)
    assert clock.time(lambda: x @ x, 50) > clock.time(lambda: x @ x, 1) > 0


# ---------------------------------------------------------------------------------------------------------- compare


def test_a_wrong_candidate_gets_a_row_and_no_time() -> None:
    candidates = [fixed("base", 1.0), fixed("liar", 2.0, right=False), fixed("good", 3.0)]
    steps: list[int] = []
    rows = compare(candidates, 3, tick=steps.append)
    assert [row.status for row in rows] == ["ok", "wrong", "ok"]
    assert (rows[1].candidate, rows[1].note, rows[1].median_us, rows[1].samples_ns) == ("liar", "got 2.0", None, ())
    assert rows[0].speedup == 1.0
    assert rows[2].rounds == len(rows[2].samples_ns) == 3
    assert rows[2].p10_us <= rows[2].median_us <= rows[2].p90_us  # type: ignore[operator]
    assert sum(steps) == Plan(timing.WallClock(), 3).steps(candidates)


def test_refusals_and_exceptions_become_rows() -> None:
    def fail() -> None:
        raise RuntimeError("out of memory\nwith a long story")

    candidates = [
        fixed("base", 1.0),
        fixed("choosy", 1.0, refusal="groups must be 1"),
        Candidate("crash", fail, lambda y: ""),
        Candidate("cannot be built", None, lambda y: "", build=lambda: fail),
        Candidate("strange", lambda: {}["key"], lambda y: ""),  # engines raise anything
    ]
    rows = compare(candidates, 1)
    assert [(row.status, row.note) for row in rows] == [
        ("ok", ""), ("refused", "groups must be 1"), ("error", "out of memory"), ("error", "out of memory"),
        ("error", "'key'"),
    ]  # fmt: skip
    assert [row.median_us for row in rows[1:]] == [None] * 4


def test_without_a_right_baseline_there_is_no_speedup() -> None:
    rows = compare([fixed("base", 1.0, right=False), fixed("good", 1.0)], 1)
    assert rows[1].status == "ok"
    assert rows[1].speedup is None


def test_repeat_first_times_the_baseline_twice() -> None:
    candidates = [fixed("base", 1.0), fixed("good", 1.0)]
    steps: list[int] = []
    rows = compare(candidates, 2, repeat_first=True, tick=steps.append)
    assert [row.candidate for row in rows] == ["base", "base (again)", "good"]
    assert rows[1].speedup is not None
    assert sum(steps) == Plan(timing.WallClock(), 2, repeat_first=True).steps(candidates)


def test_a_candidate_is_built_when_its_turn_comes_and_within_its_context() -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        seen.append("enter")
        yield
        seen.append("exit")

    def build() -> Callable[[], object]:
        seen.append("build")
        return lambda: 1.0

    lazy = Candidate(
        "lazy", None, lambda y: "", build=build, context=context, error=lambda y: 0.25, remark=lambda y: "hm"
    )
    rows = compare([fixed("base", 1.0), lazy], 1)
    assert seen[:3] == ["enter", "build", "exit"]
    assert seen.count("build") == 1
    assert (rows[1].error, rows[1].note, rows[1].status) == (0.25, "hm", "ok")


def test_cold_caches_are_flushed_before_every_single_call() -> None:
    flushed: list[int] = []
    calls: list[int] = []
    candidates = [Candidate("base", lambda: calls.append(len(flushed)), lambda y: "")]
    rows = compare(candidates, 4, flush=lambda: flushed.append(1))
    assert [(row.caches, row.rounds) for row in rows] == [("warm", 4), ("cold", 4)]
    assert rows[1].calls_per_sample == 1
    assert len(flushed) == 4
    assert calls[-4:] == [1, 2, 3, 4]


def test_what_is_slower_is_told_from_what_is_the_same() -> None:
    cost = {"base": lambda i: 1e6 * (1 + i % 7 / 70), "same": lambda i: 1e6 * (1 + (i + 3) % 7 / 70),
            "slow": lambda i: 1.3e6 * (1 + i % 5 / 50)}  # fmt: skip
    clock = FakeClock(cost)
    candidates = [Candidate(name, clock.candidate(name), lambda y: "") for name in cost]
    plan = Plan(clock, 40, repeat_first=True)
    rows = {row.candidate: row for row in comparison.compare("s", "c", candidates, plan)}
    assert rows["same"].within_noise
    assert rows["base (again)"].within_noise
    assert rows["slow"].within_noise is False
    assert rows["slow"].speedup_low < 1 / 1.3 < rows["slow"].speedup_high  # type: ignore[operator]
    assert rows["base"].interval is None
    assert rows["base"].clock == "fake"


def test_with_few_rounds_there_is_no_interval() -> None:
    few = intervals.fewest_rounds() - 1
    assert compare([fixed("base", 1.0), fixed("good", 1.0)], few)[1].interval is None
    assert compare([fixed("base", 1.0), fixed("good", 1.0)], few + 1)[1].interval is not None


# -------------------------------------------------------------------------------------------------- command and files

ROW_TYPES = {
    "kind": str, "suite": str, "case": str, "candidate": str, "status": str, "note": str, "rounds": int,
    "calls_per_sample": int, "median_us": float, "p10_us": float, "p90_us": float, "speedup": float, "own": bool,
    "caches": str, "batch": int, "group": str, "threads": int, "clock": str, "samples_ns": list,
}  # fmt: skip
#: Not there for every row: an interval needs rounds, a limit needs a rate for the dtype, the fold has no one error.
OPTIONAL = {"speedup_low", "speedup_high", "within_noise", "error", "flops", "bytes", "floor_us", "share"}


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "report.json"
    assert (
        bench.run(parse("--suite", "notebook", "fusion", "--rounds", "1", "--quick", "--aa", "--json", str(path))) == 0
    )
    return path


def test_json_lines_have_their_schema(report_file: Path) -> None:
    head, *rows = [json.loads(line) for line in report_file.read_text().splitlines()]
    assert list(head) == ["kind", "schema", "options", "environment", "ceilings", "warnings"]
    assert head["schema"] == records.SCHEMA
    options = head["options"]
    assert (options["suites"], options["dtype"], options["rounds"]) == (["notebook", "fusion"], "float32", 1)
    assert (options["quick"], options["seed"], options["full"]) == (True, 0, False)
    for row in rows:
        assert set(row) == set(ROW_TYPES) | OPTIONAL
        if "polyphase" in row["candidate"]:  # the notebook's stride is 1
            assert row["status"] == "refused", row
            assert row["median_us"] is None, row
            continue
        assert row["status"] == "ok", row
        assert {key: type(row[key]) for key in ROW_TYPES} == ROW_TYPES
        assert len(row["samples_ns"]) == 1
    machine = head["environment"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__
    assert machine["build"]["build"] in ("cuda", "cpu", "python")
    assert {"cpu", "load_average", "busy_cpus", "git", "device", "time", "cpu_target", "governor"} <= set(machine)
    assert machine["pace_us"][0] > 0
    assert head["ceilings"]["gflops"]["float32"] > 0
    assert [size for size, _ in head["ceilings"]["bandwidth"]] == sorted(
        size for size, _ in head["ceilings"]["bandwidth"]
    )
    notebook = [row for row in rows if row["suite"] == "notebook"]
    names = [row["candidate"] for row in notebook]
    assert names[:4] == ["three branches", "three branches (again)", "three 3x3 convolutions", "fused F.conv2d"]
    assert {"fused conv3x3 prepared", "fused conv3x3 aten"} <= set(names)
    assert all(0 <= row["error"] < 1e-5 and row["flops"] == 2 * 256 * 256 * 2 * 18 for row in notebook if row["error"])
    assert [path.name for path in report_file.parent.iterdir()] == ["report.json"]  # no temporary file left


def test_a_record_is_read_as_it_was_written(report_file: Path, tmp_path: Path) -> None:
    run = records.read(report_file)
    run.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == report_file.read_text()
    assert not run.failed
    run.write(tmp_path / "rows.csv")
    lines = [line for line in (tmp_path / "rows.csv").read_text().splitlines() if not line.startswith("# ")]
    assert len(lines) == 1 + len(run.rows)
    assert "samples_ns" not in lines[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not JSON; give the file that"),
        ("", "is empty"),
        ("[]", "must be a JSON object, got list"),
        ('{"kind": "run", "schema": 99}', "must begin a benchmark record of schema 2, got schema 99"),
        ('{"kind": "run", "schema": 2, "options": {}}', "line 1 lacks a field"),
        ("HEAD\n{}", "line 2 is not a row"),
    ],
)
def test_what_is_no_record_is_an_error_that_names_the_line(
    report_file: Path, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text(text.replace("HEAD", report_file.read_text().splitlines()[0]))
    with pytest.raises(RuntimeError, match=message):
        records.read(path)


@pytest.mark.usefixtures("no_ceilings")
def test_a_wrong_result_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    candidates = [fixed("base", 1.0), fixed("liar", 2.0, right=False)]
    monkeypatch.setitem(bench.SUITES, "notebook", one_case(candidates))
    assert bench.run(parse("--suite", "notebook", "--rounds", "1")) == 1
    lines = capsys.readouterr().out.splitlines()
    place = next(i for i, line in enumerate(lines) if "liar" in line)
    assert "wrong" in lines[place]
    assert "us" not in lines[place]
    assert "got 2.0" in lines[place + 1]


@pytest.mark.usefixtures("no_ceilings")
def test_threads_and_tf32_are_set_for_the_run_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def suite(setup: suites.Setup) -> suites.Cases:
        seen.append((torch.get_num_threads(), torch.backends.cudnn.allow_tf32))
        return one_case([fixed("base", 1.0)])(setup)

    monkeypatch.setitem(bench.SUITES, "notebook", suite)
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    bench.run(parse("--suite", "notebook", "--rounds", "1", "--threads", "1"))
    bench.run(parse("--suite", "notebook", "--rounds", "1", "--threads", "1", "--tf32"))
    assert seen == [(1, False), (1, True)]
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_cuda_without_a_gpu_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="--device cuda needs a CUDA GPU .*; use --device cpu"):
        bench.run(parse("--device", "cuda"))


@pytest.mark.usefixtures("no_ceilings")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gpu_is_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    path = tmp_path / "dry.jsonl"
    options = ["--suite", "notebook", "--rounds", "1", "--dtype", dtype, "--against", "channels_last", "graph"]
    assert bench.run(parse("--device", "cuda", "--dry-run", "--tf32", *options, "--json", str(path))) == 0
    run = records.read(path)
    assert run.environment["dry_run"] is True
    assert {"driver", "clock_mhz", "throttle"} <= set(run.environment["state"])
    assert "dry run: no GPU, and these times mean nothing" in capsys.readouterr().out
    names = {row.candidate: row.status for row in run.rows}
    assert names["fused F.conv2d, cudnn.benchmark, channels_last, CUDA graph"] == "ok"
    assert names["fused conv3x3 prepared, CUDA graph"] == "ok"
    assert names["cudnn_convolution_relu, CUDA graph"] == "refused"  # the notebook's block has no ReLU


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "bench: --rounds must be at least 1, got 0"),
        (["--threads", "-1"], "bench: --threads must be at least 1, got -1"),
        (["--batch", "0"], "bench: --batch must be at least 1, got 0"),
        (["--pause", "-1"], "bench: --pause must not be negative, got -1"),
        (
            ["--against", "eager", "cudnn-relu"],
            "bench: --against must be among three-branches, .* on cpu, got cudnn-relu",
        ),
        (["--dry-run"], "a dry run rehearses a GPU, got device cpu; add --device cuda"),
        (["--model", "RepVGG-Q"], "bench: --model must be one of digits, RepVGG-A0, .*, got RepVGG-Q"),
    ],
)
def test_bad_options_are_errors_before_any_work(argv: list[str], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        bench.run(parse(*argv))


def test_an_unwritable_file_is_an_error_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no directory .*missing; create it first"):
        bench.run(parse("--json", str(tmp_path / "missing" / "report.json")))
    with pytest.raises(IsADirectoryError, match="is a directory; name a file in it"):
        bench.run(parse("--json", str(tmp_path)))


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    files.write_text_atomically(path, "old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_durations_keep_three_digits() -> None:
    values = [0.123, 9.9951, 99.951, 999.4, 999.6, 12345.6, 2.5e6, 4e9]
    assert [tables.duration(value) for value in values] == [
        "0.12 us", "10.0 us", "100 us", "999 us", "1.00 ms", "12.3 ms", "2.50 s", "4000 s",
    ]  # fmt: skip


def test_a_busy_machine_is_announced() -> None:
    quiet = {"load_average": 0.1, "busy_cpus": 0.1, "cpu_count": 2}
    assert environment.load_warning(quiet) is None
    assert environment.load_warning({"load_average": None, "busy_cpus": None, "cpu_count": None}) is None
    assert "load average 1.7" in str(environment.load_warning({**quiet, "load_average": 1.7}))
    assert "1.0 of 2 CPUs busy" in str(environment.load_warning({**quiet, "busy_cpus": 1.0}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"build": {"build": "cpu", "debug": True}}, "repvgg_cuda is a debug build"),
        ({"build": {"build": "python"}}, "pure PyTorch"),
        ({"torch_debug": True}, "torch is a debug build"),
        ({"state": {"throttle": ["power cap"], "clock_mhz": 900.0}}, "the GPU is throttled at 900 MHz: power cap"),
        ({"load_average": 9.0}, "other programs are running"),
    ],
)
def test_what_makes_times_untrue_is_announced_or_refused(change: dict[str, Any], message: str) -> None:
    sound = {"load_average": 0.1, "busy_cpus": 0.1, "cpu_count": 2, "build": {"build": "cpu", "debug": False}}
    assert environment.warnings(sound) == []
    (warning,) = environment.warnings({**sound, **change})
    assert message in warning


@pytest.mark.usefixtures("no_ceilings")
def test_strict_refuses_instead_of_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "warnings", lambda record: ["hot"])
    monkeypatch.setitem(bench.SUITES, "notebook", one_case([fixed("base", 1.0)]))
    with pytest.raises(RuntimeError, match=r"refusing to measure \(--strict\): hot"):
        bench.run(parse("--suite", "notebook", "--rounds", "1", "--strict"))
    assert bench.collect(parse("--suite", "notebook", "--rounds", "1"), Console(quiet=True)).warnings[0] == "hot"


def test_a_changed_pace_and_a_coarse_clock_are_announced() -> None:
    assert runner.pace_warnings([100.0, 105.0]) == []
    assert "changed by 20 %" in runner.pace_warnings([100.0, 120.0])[0]
    assert runner.clock_warnings(500.0) == []
    assert "1000 us" in runner.clock_warnings(1e6)[0]
    assert environment.pace() > 0


def test_full_runs_time_cold_caches_and_quick_ones_have_enough_rounds_for_an_interval() -> None:
    full, quick = bench.make_settings(parse("--full")), bench.make_settings(parse("--quick"))
    assert (full.cold, full.rounds, quick.cold) == (True, bench.FULL_ROUNDS, False)
    assert full.plan(devices.CpuDevice(), foreign=False).regimes == ("warm", "cold")
    assert intervals.fewest_rounds() <= quick.rounds < full.rounds
    with pytest.raises(SystemExit):
        parse("--full", "--quick")


def test_the_clock_fits_the_threads() -> None:
    device = devices.CpuDevice()
    assert device.clock().name == "cpu"  # one thread, as this module sets
    assert device.clock("wall").name == "wall"
    torch.set_num_threads(2)
    assert device.clock().name == "wall"
    torch.set_num_threads(1)
    spinning = runner.Settings(9).plan(device, foreign=True)
    assert spinning.pause == 0


# ---------------------------------------------------------------------------------------------------------- scripts


def test_the_commands_of_the_page_are_ones_that_there_are() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("repvgg-cuda bench")]
    assert len(commands) >= 6
    for line in commands:
        cli._parser().parse_args(shlex.split(line.partition("   ")[0])[1:])
    keys = {key for keys in bench._keys().values() for key in keys}
    assert all(f"`{key}`" in text for key in keys)
    assert all(f"| `{suite}` |" in text for suite in bench.SUITES)


def test_the_notebook_example_says_what_the_notebook_showed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["notebook.py", "--rounds", "1"])
    assert load_script("examples/notebook.py").main() == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "one convolution and three branches" in line)
    difference = float(line.split("max difference ")[1].split(",")[0])
    torch.manual_seed(0)  # the script's inputs again: an image, a 3x3 and a 1x1 convolution
    image = torch.randn(1, 2, 256, 256)
    conv, pointwise = torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.Conv2d(2, 2, 1)
    parts = (Branch(conv.weight, conv.bias), Branch(pointwise.weight, pointwise.bias), Branch(None))
    block = suites.block_to(Branches(parts, 2, 2), image.device, image.dtype)
    before, after = testing.multi_branch_bound(image, block), testing.error_bound(image, *fuse_weights(block))
    folding = testing.conv3x3_fp64(image.abs(), *testing.fold_bound(block, image.dtype))
    assert 0 < difference <= (before + after + folding).max()
    assert line.endswith("torch.allclose: False")
    assert "assert_close" in out
    assert "fused conv3x3 aten" in out
