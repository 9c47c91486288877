# SPDX-License-Identifier: MIT
"""The benchmark: what it times and refuses to time, its arithmetic on a fake clock, its files and errors. No times."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from repvgg_cuda import Branch, Branches, bench, environment, fuse_weights, suites, testing, timing
from repvgg_cuda.timing import Candidate

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class FakeClock:
    """Every call advances it by what its callable says, so each figure has one right value."""

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
    rows = timing.compare("suite", "case", candidates, timing.WallClock(), rounds=3, tick=steps.append)
    assert [row.status for row in rows] == ["ok", "wrong", "ok"]
    assert rows[1] == timing.Row("suite", "case", "liar", "wrong", "got 2.0")
    assert rows[0].speedup == 1.0
    assert rows[2].rounds == 3
    assert rows[2].p10_us <= rows[2].median_us <= rows[2].p90_us  # type: ignore[operator]
    assert sum(steps) == timing.steps(candidates, 3)


def test_refusals_and_exceptions_become_rows() -> None:
    def fail() -> None:
        raise RuntimeError("out of memory\nwith a long story")

    candidates = [
        fixed("base", 1.0),
        fixed("choosy", 1.0, refusal="groups must be 1"),
        Candidate("crash", fail, lambda y: ""),
    ]
    rows = timing.compare("suite", "case", candidates, timing.WallClock(), rounds=1)
    assert [(row.status, row.note) for row in rows] == [
        ("ok", ""), ("refused", "groups must be 1"), ("error", "out of memory"),
    ]  # fmt: skip
    assert rows[1].median_us is rows[2].median_us is None


def test_without_a_right_baseline_there_is_no_speedup() -> None:
    rows = timing.compare("s", "c", [fixed("base", 1.0, right=False), fixed("good", 1.0)], timing.WallClock(), rounds=1)
    assert rows[1].status == "ok"
    assert rows[1].speedup is None


def test_repeat_first_times_the_baseline_twice() -> None:
    candidates = [fixed("base", 1.0), fixed("good", 1.0)]
    steps: list[int] = []
    rows = timing.compare("s", "c", candidates, timing.WallClock(), rounds=2, repeat_first=True, tick=steps.append)
    assert [row.candidate for row in rows] == ["base", "base (again)", "good"]
    assert rows[1].speedup is not None
    assert sum(steps) == timing.steps(candidates, 2, repeat_first=True)


# -------------------------------------------------------------------------------------------------- command and files

ROW_TYPES = {
    "suite": str, "case": str, "candidate": str, "status": str, "note": str, "rounds": int, "calls_per_sample": int,
    "median_us": float, "p10_us": float, "p90_us": float, "speedup": float,
}  # fmt: skip


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "report.json"
    assert (
        bench.run(parse("--suite", "notebook", "fusion", "--rounds", "1", "--quick", "--aa", "--json", str(path))) == 0
    )
    return path


def test_json_has_its_schema(report_file: Path) -> None:
    report = json.loads(report_file.read_text())
    assert list(report) == ["schema", "options", "environment", "rows"]
    assert report["schema"] == bench.SCHEMA
    assert report["options"] == {
        "suites": ["notebook", "fusion"], "dtype": "float32", "rounds": 1, "quick": True, "seed": 0,
    }  # fmt: skip
    for row in report["rows"]:
        assert set(row) == set(ROW_TYPES)
        if "polyphase" in row["candidate"]:  # the notebook's stride is 1
            assert row["status"] == "refused", row
            assert row["median_us"] is None, row
            continue
        assert row["status"] == "ok", row
        assert {key: type(value) for key, value in row.items()} == {key: ROW_TYPES[key] for key in row}
    machine = report["environment"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__
    assert machine["build"]["build"] in ("cuda", "cpu", "python")
    assert {"cpu", "load_average", "busy_cpus", "git", "device", "time"} <= set(machine)
    names = [row["candidate"] for row in report["rows"] if row["suite"] == "notebook"]
    assert names[:4] == ["three branches", "three branches (again)", "three 3x3 convolutions", "fused F.conv2d"]
    assert "fused conv3x3 aten" in names
    assert [path.name for path in report_file.parent.iterdir()] == ["report.json"]  # no temporary file left


def test_a_wrong_result_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def suite(setup: suites.Setup) -> suites.Cases:
        yield "a case", [fixed("base", 1.0), fixed("liar", 2.0, right=False)]

    monkeypatch.setitem(bench.SUITES, "notebook", suite)
    assert bench.run(parse("--suite", "notebook", "--rounds", "1")) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "liar" in line)
    assert "wrong" in line
    assert "got 2.0" in line
    assert "us" not in line


def test_threads_and_tf32_are_set_for_the_run_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def suite(setup: suites.Setup) -> suites.Cases:
        seen.append((torch.get_num_threads(), torch.backends.cudnn.allow_tf32))
        yield "a case", [fixed("base", 1.0)]

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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "bench: --rounds must be at least 1, got 0"),
        (["--threads", "-1"], "bench: --threads must be at least 1, got -1"),
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
    bench.write_text_atomically(path, "old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(bench.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        bench.write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_durations_keep_three_digits() -> None:
    values = [0.123, 9.9951, 99.951, 999.4, 999.6, 12345.6, 2.5e6, 4e9]
    assert [bench.duration(value) for value in values] == [
        "0.12 us", "10.0 us", "100 us", "999 us", "1.00 ms", "12.3 ms", "2.50 s", "4000 s",
    ]  # fmt: skip


def test_a_busy_machine_is_announced() -> None:
    quiet = {"load_average": 0.1, "busy_cpus": 0.1, "cpu_count": 2}
    assert environment.load_warning(quiet) is None
    assert environment.load_warning({"load_average": None, "busy_cpus": None, "cpu_count": None}) is None
    assert "load average 1.7" in str(environment.load_warning({**quiet, "load_average": 1.7}))
    assert "1.0 of 2 CPUs busy" in str(environment.load_warning({**quiet, "busy_cpus": 1.0}))


# ---------------------------------------------------------------------------------------------------------- scripts


def test_plot_draws_a_report(report_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    plot = load_script("benchmarks/plot.py")
    out = tmp_path / "bars.png"
    assert plot.main([str(report_file), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"schema": 99}')
    for name, message in [("broken.json", "is not JSON"), ("other.json", "got schema 99"), ("none.json", "none.json")]:
        assert plot.main([str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_bench_conv3x3_writes_json_and_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def suite(setup: suites.Setup) -> suites.Cases:
        yield "a case", [fixed("base", 1.0), fixed("choosy", 1.0, refusal="groups must be 1")]

    monkeypatch.setitem(bench.SUITES, "layers", suite)
    script = load_script("benchmarks/bench_conv3x3.py")
    files = {"json": tmp_path / "rows.json", "csv": tmp_path / "rows.csv"}
    options = ["--json", str(files["json"]), "--csv", str(files["csv"])]
    assert script.main(["--device", "cpu", "--rounds", "1", *options]) == 0
    rows = json.loads(files["json"].read_text())["rows"]
    assert [row["candidate"] for row in rows] == ["base", "base (again)", "choosy"]
    lines = files["csv"].read_text().splitlines()
    assert lines[0] == ",".join(rows[0])
    assert lines[3].startswith("layers,a case,choosy,refused,groups must be 1,,,,,0,0")
    if not torch.cuda.is_available():
        capsys.readouterr()
        assert script.main(options) == 1
        assert "error: bench: --device cuda needs a CUDA GPU" in capsys.readouterr().err


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
