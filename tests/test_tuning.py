# SPDX-License-Identifier: MIT
"""prepare(tune=True): the choice by measurement, what a time depends on, and the file that keeps times."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_networks import X, images, layer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import repvgg_cuda
from repvgg_cuda import RepConv3x3, _ext, packed, prepared, testing, timing, tuning, tuning_cache
from repvgg_cuda.devices import CudaDevice, DryRunDevice
from repvgg_cuda.explanation import Candidate

needs_module = pytest.mark.skipif(_ext.module is None, reason=f"the compiled module {_ext.why_missing}")


class FakeClock:
    """A clock on which an algorithm takes as long as the test says."""

    resolution = 1.0

    def __init__(self, milliseconds: dict[str, float]) -> None:
        self.milliseconds = milliseconds
        self.timed: list[str] = []

    def time(self, run: timing.Run, calls: int) -> float:
        with Packings() as mode:
            run()
        self.timed.append(mode.algorithm)
        return 1e6 * self.milliseconds.get(mode.algorithm, 1000.0) * calls


class Packings(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.repvgg_cuda.conv3x3.default:
            self.algorithm = packed.read(args[7]).algorithm
        return func(*args, **(kwargs or {}))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock({})
    monkeypatch.setattr(timing, "clock_for", lambda device: fake)
    monkeypatch.setattr(tuning, "TUNE_ROUNDS", 1)
    return fake


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tuning cache of the test's own, that is not there yet."""
    path = tmp_path / "caches" / "tuning.json"
    monkeypatch.setenv(tuning_cache.VARIABLE, str(path))
    monkeypatch.setattr(tuning_cache, "_warned", set())
    return path


def tuned(conv: RepConv3x3, tune: tuning_cache.Tune = True, **kwargs: Any) -> str | None:
    (entry,) = conv.prepare(X, tune=tune, **kwargs).entries
    return entry.algorithm


# ---------------------------------------------------------------------------------------------------------- the choice


@needs_module
@pytest.mark.parametrize("winner", ["direct", "aten", "planar", "winograd2"])
def test_tuning_takes_the_fastest(winner: str, clock: FakeClock) -> None:
    clock.milliseconds[winner] = 10.0
    conv = layer()
    report = conv.prepare(X, tune=True)
    (entry,) = report.entries
    assert entry.algorithm == winner
    assert entry.seconds == pytest.approx(10e-3)
    assert "measured" in str(report)
    explanation = repvgg_cuda.explain(X, conv.weight)
    runnable = {c.name for c in explanation.candidates if c.refusal is None and c.seconds != float("inf")}
    assert set(clock.timed) == runnable
    assert "winograd6" not in runnable
    assert torch.equal(conv(X), repvgg_cuda.conv3x3(X, conv.weight, conv.bias, activation="relu", algorithm=winner))


@needs_module
def test_a_tuned_choice_stays_with_new_values_and_in_copies(clock: FakeClock) -> None:
    clock.milliseconds["winograd2"] = 10.0
    conv = layer()
    conv.prepare(X, tune=True)
    clock.timed.clear()
    with torch.no_grad():
        conv.weight.mul_(2)
    for each in (conv, copy.deepcopy(conv)):
        assert prepared.algorithm_for(each, X) == "winograd2"
    assert clock.timed == []
    loaded = pickle.loads(pickle.dumps(conv))  # perhaps on another machine
    clock.milliseconds = {"direct": 1.0}
    assert prepared.algorithm_for(loaded, X) == "direct"
    conv.double()
    assert prepared.algorithm_for(conv, X.double()) == "aten"


@needs_module
def test_equal_layers_are_measured_once(clock: FakeClock) -> None:
    model = nn.Sequential(*(layer(testing.Case("same", 1, 16, 8, 8, 16)) for _ in range(4))).eval()
    repvgg_cuda.prepare(model, images(1, 8, 8, 16), tune=True)
    alone = len(clock.timed)
    clock.timed.clear()
    repvgg_cuda.prepare(model[:1], images(1, 8, 8, 16), tune=True)
    assert len(clock.timed) == alone


@needs_module
def test_tuning_keeps_to_low_memory(clock: FakeClock) -> None:
    clock.milliseconds["winograd4"] = 1.0
    conv = layer()
    report = conv.prepare(X, memory="low", tune=True)
    assert report.packed_bytes <= report.weight_bytes
    assert "winograd4" not in clock.timed


def test_tuning_with_the_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TUNE_ROUNDS", 1)
    monkeypatch.setattr(timing, "WARM_UP_NS", 1e5)
    conv = layer()
    (entry,) = conv.prepare(X, tune=True).entries
    assert entry.seconds is not None
    assert entry.seconds > 0
    want = repvgg_cuda.conv3x3(X, conv.weight, conv.bias, activation="relu", algorithm=entry.algorithm or "")
    assert torch.equal(conv(X), want)


# ---------------------------------------------------------------------------------------------------------- known times


@needs_module
def test_a_layer_is_measured_once_for_all_processes(clock: FakeClock, file: Path) -> None:
    clock.milliseconds["direct"] = 10.0
    assert tuned(layer()) == "direct"
    assert clock.timed
    clock.timed.clear()
    clock.milliseconds = {"planar": 1.0}
    report = layer().prepare(X, tune=True)
    assert clock.timed == []
    assert report.entries[0].algorithm == "direct"
    assert report.entries[0].seconds == pytest.approx(10e-3)
    content = json.loads(file.read_text())
    assert (content["format"], content["version"]) == (tuning_cache.FORMAT, tuning_cache.VERSION)
    (key,) = content["times"]
    assert "float32, contiguous, N2 C16 H15 W14 K24 stride 1 groups 1, relu, bias float32" in key
    assert content["times"][key]["direct"] == pytest.approx(10e-3)
    assert sorted(os.listdir(file.parent)) == ["tuning.json", "tuning.json.lock"]


@needs_module
def test_a_path_names_another_file(clock: FakeClock, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    clock.milliseconds["direct"] = 10.0
    assert tuned(layer(), other) == tuned(layer(), str(other)) == "direct"
    assert json.loads(other.read_text())["times"]
    assert not file.exists()
    with pytest.raises(RuntimeError, match=r"tune must be True, False or the path of a file, got ''"):
        layer().prepare(X, tune="")


@needs_module
def test_the_first_forward_uses_known_times(clock: FakeClock, file: Path) -> None:
    clock.milliseconds["direct"] = 10.0
    tuned(layer())
    clock.timed.clear()
    conv = layer()
    conv.prepare(tune=True)
    assert prepared.algorithm_for(conv, X) == "direct"
    assert clock.timed == []


@needs_module
def test_low_memory_uses_the_times_of_all(clock: FakeClock, file: Path) -> None:
    clock.milliseconds |= {"winograd4": 1.0, "direct": 2.0}
    assert tuned(layer()) == "winograd4"
    clock.timed.clear()
    assert tuned(layer(), memory="low") == "direct"
    assert clock.timed == []


@needs_module
def test_times_of_low_memory_are_not_enough_for_all(clock: FakeClock, file: Path) -> None:
    clock.milliseconds |= {"winograd4": 1.0, "direct": 2.0}
    assert tuned(layer(), memory="low") == "direct"
    assert tuned(layer()) == "winograd4"


def problem(**changes: Any) -> tuning.Problem:
    weight = changes.pop("weight", torch.empty(24, 16, 3, 3))
    facts = {"bias": torch.empty(24), "input_size": (2, 16, 15, 14), "stride": 1, "groups": 1, "activation": "relu"}
    return tuning.Problem(weight=weight, **{**facts, **changes})


def test_what_a_time_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    same = problem().key()
    assert problem().key() == same
    others = [
        problem(weight=torch.empty(24, 16, 3, 3, dtype=torch.float16)),
        problem(weight=torch.empty(32, 16, 3, 3)),
        problem(weight=torch.empty(24, 16, 3, 3).contiguous(memory_format=torch.channels_last)),
        problem(weight=torch.empty(24, 8, 3, 3), groups=2),
        problem(bias=None),
        problem(bias=torch.empty(24, dtype=torch.float64)),
        *(problem(input_size=size) for size in ((1, 16, 15, 14), (2, 16, 14, 14), (2, 16, 15, 15))),
        problem(stride=2),
        problem(activation="identity"),
    ]
    keys = {other.key() for other in others}
    assert len(keys | {same}) == len(others) + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert problem().key() != same
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "_build", lambda: "another")
    assert problem().key() != same


def test_what_a_time_depends_on_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CudaDevice", lambda index: DryRunDevice())
    tuning._gpu.cache_clear()
    try:
        place = tuning._place(torch.device("cuda", 0))
        assert "capability 0.0, 1 multiprocessors, driver" in place
        assert torch.__version__ in place
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
        assert tuning._place(torch.device("cuda", 0)) != place
    finally:
        tuning._gpu.cache_clear()


@needs_module
def test_a_row_that_is_refused_now_is_measured_anew(
    clock: FakeClock, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.milliseconds |= {"direct": 1.0, "planar": 2.0}
    assert tuned(layer()) == "direct"
    explain_rows = prepared.explain_rows

    def without_direct(*args: Any, **kwargs: Any) -> tuple[Candidate, ...]:
        rows = explain_rows(*args, **kwargs)
        return tuple(
            Candidate(row.name, "not today", None, row.packed_bytes, False) if row.name == "direct" else row
            for row in rows
        )

    monkeypatch.setattr(prepared, "explain_rows", without_direct)
    clock.timed.clear()
    assert tuned(layer()) == "planar"
    assert "direct" not in clock.timed
    assert "planar" in clock.timed
    monkeypatch.undo()


# ------------------------------------------------------------------------------------------------------------- the file


def test_entries_of_several_writers_are_merged(file: Path) -> None:
    first, second = tuning_cache.cache_for(True), tuning_cache.cache_for(True)
    assert first.find("a") is second.find("b") is None  # both have read the file
    first.store("a", {"direct": 1.0})
    second.store("b", {"aten": 2.0})
    assert set(json.loads(file.read_text())["times"]) == {"a", "b"}
    assert tuning_cache.cache_for(True).find("a") == {"direct": 1.0}


def write_some(file: Path, name: str) -> None:
    for i in range(20):
        tuning_cache.TuningCache(file).store(f"{name} {i}", {"direct": 1.0})


@pytest.mark.skipif(tuning_cache.fcntl is None, reason="this system has no lock between processes")
def test_processes_side_by_side_lose_nothing(file: Path) -> None:
    writers = [multiprocessing.get_context("fork").Process(target=write_some, args=(file, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(json.loads(file.read_text())["times"]) == 60


FOREIGN = {
    "not JSON": "once upon a time",
    "nothing": "",
    "half a file": '{"format": "repvgg_cuda tuning", "version": 1, "ti',
    "deep": "[" * 100_000,
    "a list": "[1, 2]",
    "another program's": '{"format": "something else", "times": {}}',
    "a later version": '{"format": "repvgg_cuda tuning", "version": 2, "times": {}}',
    "no times": '{"format": "repvgg_cuda tuning", "version": 1, "times": 3}',
    "not text": b"\xff\xfe\x00",
}


@needs_module
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_a_cache_is_ignored_and_kept(content: str | bytes, clock: FakeClock, file: Path) -> None:
    before = content if isinstance(content, bytes) else content.encode()
    file.parent.mkdir()
    file.write_bytes(before)
    clock.milliseconds["direct"] = 10.0
    with pytest.warns(RuntimeWarning, match=r"tuning\.json.*measured times are not kept.*delete it") as caught:
        assert [tuned(layer()), tuned(layer())] == ["direct", "direct"]
    assert len([each for each in caught if "tuning.json" in str(each.message)]) == 1
    assert file.read_bytes() == before


@needs_module
@pytest.mark.parametrize(
    "times",
    [
        "x",
        {},
        {"direct": -1.0},
        {"direct": True},
        {"direct": "1"},
        {"direct": float("nan")},
        {"direct": 10**400},
        {"unknown": 1.0},
    ],
    ids=lambda times: str(times)[:20],
)
def test_an_entry_without_sense_is_measured_anew(times: Any, clock: FakeClock, file: Path) -> None:
    clock.milliseconds["direct"] = 10.0
    tuned(layer())
    content = json.loads(file.read_text())
    (key,) = content["times"]
    content["times"] |= {key: times, "another": {"aten": 1.0}}
    file.write_text(json.dumps(content))
    clock.timed.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned(layer()) == "direct"
    assert clock.timed
    content = json.loads(file.read_text())
    assert content["times"][key]["direct"] == pytest.approx(10e-3)
    assert content["times"]["another"] == {"aten": 1.0}


@needs_module
def test_a_file_that_cannot_be_written_is_a_warning(clock: FakeClock, file: Path) -> None:
    file.parent.write_text("a file where the directory should be")
    clock.milliseconds["direct"] = 10.0
    with pytest.warns(RuntimeWarning, match="measured times are not kept") as caught:
        assert tuned(layer()) == "direct"
    assert len([each for each in caught if "tuning.json" in str(each.message)]) == 1


def test_a_writer_that_fails_leaves_the_file_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning_cache.cache_for(True).store("a", {"direct": 1.0})
    before = file.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.warns(RuntimeWarning, match="No space left"):
            tuning_cache.cache_for(True).store("b", {"direct": 1.0})
    assert file.read_bytes() == before
    assert sorted(os.listdir(file.parent)) == ["tuning.json", "tuning.json.lock"]


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning_cache.default_path() is None  # the variable is empty in tests
    monkeypatch.setenv(tuning_cache.VARIABLE, "some.json")
    assert tuning_cache.default_path() == Path("some.json")
    monkeypatch.delenv(tuning_cache.VARIABLE)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning_cache.default_path() == tmp_path / "xdg" / "repvgg_cuda" / "tuning.json"
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert tuning_cache.default_path() == tmp_path / ".cache" / "repvgg_cuda" / "tuning.json"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tuning_cache.default_path() == tmp_path / "Library" / "Caches" / "repvgg_cuda" / "tuning.json"

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert tuning_cache.default_path() is None
    assert tuning_cache.cache_for(True).find("a") is None


# ------------------------------------------------------------------------------------------------------------ on a GPU


def test_graphs_of_many_calls_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TUNE_ROUNDS", 1)
    calls = {"a": 0, "b": 0}

    def run(name: str) -> timing.Run:
        def count() -> torch.Tensor:
            calls[name] += 1
            return torch.zeros(1)

        return count

    seconds = tuning.measure_graphs(DryRunDevice(), {name: run(name) for name in calls})
    assert seconds == {name: pytest.approx(1e-3 / tuning.CALLS_PER_GRAPH) for name in calls}
    assert all(count >= tuning.CALLS_PER_GRAPH for count in calls.values())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tuning_on_a_gpu(dtype: torch.dtype, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TUNE_ROUNDS", 2)
    conv = layer().to("cuda", dtype)
    x = X.to("cuda", dtype)
    report = conv.prepare(x, tune=True)
    times = {each.name: each.seconds for each in report.entries[0].candidates if each.refusal is None}
    assert times["aten"] is not None
    assert 0 < times["aten"] < 1
    (key,) = json.loads(file.read_text())["times"]
    assert CudaDevice().facts()["gpu"] in key
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_measure", None)  # it would raise
        assert layer().to("cuda", dtype).prepare(x, tune=True).entries[0].algorithm == report.entries[0].algorithm
    want = testing.conv3x3_fp64(x, conv.weight, conv.bias, activation="relu")
    bound = testing.error_bound(x, conv.weight, conv.bias, algorithm=report.entries[0].algorithm or "")
    assert ((conv(x).double() - want).abs() <= bound).all()


@pytest.mark.cuda
def test_nothing_is_measured_while_a_graph_is_captured() -> None:
    conv, x = layer().cuda(), X.cuda()
    conv.prepare(tune=True)
    with pytest.raises(RuntimeError, match="being captured in a CUDA graph"), torch.no_grad():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            conv(x)
