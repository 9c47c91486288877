# SPDX-License-Identifier: MIT
"""The command line: what it prints, what it refuses in a line, its exit status, and that no half file is ever left."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import repvgg_cuda
from repvgg_cuda import _ext, checkpoint, cli, info, testing
from repvgg_cuda.models import CONFIGS, Config, RepVGG, create_model

ROOT = Path(repvgg_cuda.__file__).parent.parent

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def error_of(capsys: Capture, *arguments: object) -> str:
    """The text of the one line that a refused command prints to stderr."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


def randomised_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict with BatchNorm statistics as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = model.state_dict()
    for key, value in state.items():
        if key.endswith("running_var"):
            bn = testing.random_batchnorm(len(value), generator)
            assert bn.weight is not None
            assert bn.bias is not None
            prefix = key.removesuffix("running_var")
            state |= {f"{prefix}running_mean": bn.mean, f"{prefix}running_var": bn.var}
            state |= {f"{prefix}weight": bn.weight, f"{prefix}bias": bn.bias}
    return state


@pytest.fixture(scope="module")
def tiny() -> dict[str, Tensor]:
    """A state_dict in train form, of no model with a name."""
    return randomised_state(RepVGG([1, 1, 1, 1], num_classes=3, width_multiplier=[0.1] * 4))


@pytest.fixture
def trained(tmp_path: Path, tiny: dict[str, Tensor]) -> Path:
    checkpoint.save_state_dict_file(tiny, tmp_path / "trained.pth")
    return tmp_path / "trained.pth"


@pytest.fixture(scope="module")
def a0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in train form of a RepVGG-A0 with three classes."""
    path = tmp_path_factory.mktemp("a0") / "trained.pth"
    checkpoint.save_state_dict_file(create_model("RepVGG-A0", num_classes=3).state_dict(), path)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with trained.pth and deployed.pth of "RepVGG-small", a name that exists only in the test."""
    monkeypatch.setitem(
        cast("dict[str, Config]", CONFIGS), "RepVGG-small", Config((1, 2, 1, 1), (0.25, 0.25, 0.25, 0.25))
    )
    dtype = getattr(request, "param", torch.float32)
    state = randomised_state(create_model("RepVGG-small", num_classes=3))
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    checkpoint.save_state_dict_file(state, tmp_path / "trained.pth")
    checkpoint.save_state_dict_file(checkpoint.fuse_state_dict(state).state, tmp_path / "deployed.pth")
    return tmp_path


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------- command line


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"repvgg-cuda {repvgg_cuda.__version__}\n"


def test_help_names_every_subcommand(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in ("info", "explain", "convert", "verify", "bench", "demo"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: SUBCOMMAND"),
        (["fold"], "invalid choice: 'fold'"),
        (["convert", "in.pth"], "the following arguments are required: OUT"),
        (["convert", "in.pth", "out.pth", "--eps", "small"], "argument --eps: invalid float value: 'small'"),
        (["convert", "in.pth", "out.pth", "--model", "RepVGG-Z9"], "argument --model: invalid choice: 'RepVGG-Z9'"),
        (["explain"], "the following arguments are required: --layer"),
        (["explain", "--layer", "1,3,8,8"], "argument --layer: must be five numbers N,C,H,W,K, got 1,3,8,8"),
        (["explain", "--layer", "1,3,8,-8,4"], "argument --layer: must be five numbers N,C,H,W,K, got 1,3,8,-8,4"),
        (["explain", "--layer", "0,3,8,8,4"], "argument --layer: must be at least 1, got 0"),
        (["verify", "a.pth", "b.pth"], "the following arguments are required: --model"),
        (["verify", "a.pth", "b.pth", "--model", "RepVGG-A0", "--batch", "0"], "argument --batch: must be at least 1"),
    ],
)
def test_wrong_command_lines(capsys: Capture, arguments: list[str], expected: str) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(arguments)
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bench", "demo"])
def test_delegation(capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[argparse.Namespace] = []

    def record(args: argparse.Namespace) -> int:
        seen.append(args)
        return 7

    monkeypatch.setattr(getattr(cli, name), "run", record)
    assert run(capsys, name, "--quick")[0] == 7
    assert seen[0].quick is True


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("two\n  lines"), "two lines"),
        (RuntimeError(), "RuntimeError"),
        (OSError(28, "No space left on device", "out.pth"), "out.pth: No space left on device"),
        (OSError("no number"), "no number"),
        (ImportError("install pillow"), "install pillow"),
    ],
)
def test_errors_are_one_line_without_a_traceback(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    monkeypatch.setattr(info, "collect", raise_on_call(error))
    assert error_of(capsys, "info") == expected


@pytest.mark.parametrize("arguments", [["--traceback", "info"], ["info", "--traceback"]])
def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(info, "collect", raise_on_call(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        cli.main(arguments)


def test_errors_of_this_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "collect", raise_on_call(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["info"])


def test_interrupt(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "collect", raise_on_call(KeyboardInterrupt()))
    assert run(capsys, "info") == (130, "", "interrupted\n")


def raise_on_call(error: BaseException) -> Callable[..., Any]:
    def function(*args: object, **kwargs: object) -> None:
        raise error

    return function


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "repvgg_cuda", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


def test_as_a_program() -> None:
    with start("info", "--json", stdout=subprocess.PIPE) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(out)["versions"]["repvgg_cuda"] == repvgg_cuda.__version__


def test_reader_that_goes_away() -> None:
    """`repvgg-cuda info | head -0` ends without a word."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with start("info", stdout=write_end) as process:
        os.close(write_end)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Broken pipe" not in err
    assert "Traceback" not in err


# ----------------------------------------------------------------------------------------------------------- info


def test_info_as_json(capsys: Capture) -> None:
    status, out, _ = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts == info.collect()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["build"] == repvgg_cuda.build_info()
    assert facts["extension"]["loaded"] == (_ext.module is not None)
    assert facts["cuda"]["available"] == torch.cuda.is_available()
    for device, rows in facts["algorithms"].items():
        assert [row["name"] for row in rows] == repvgg_cuda.algorithms(device)
        for row in rows:
            assert sorted([*row["dtypes"], *row["refusals"]]) == ["bfloat16", "float16", "float32", "float64"]
            assert row["available"] == bool(row["dtypes"])
    assert facts["algorithms"]["cpu"][-1] == {
        "name": "aten",
        "available": True,
        "dtypes": ["float64", "float32", "float16", "bfloat16"],
        "refusals": {},
        "packed": 0.0,
    }
    packed = {row["name"]: row["packed"] for row in facts["algorithms"]["cpu"]}
    if _ext.module is not None:  # each on a layer that it takes
        assert all(row["available"] for row in facts["algorithms"]["cpu"])
        assert packed["planar"] == 0
        assert packed["direct"] == 1
        assert packed["winograd4"] == 4


def test_info_as_text(capsys: Capture) -> None:
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert f"\n  torch        {torch.__version__}\n" in out
    assert all(str(name) in out for name in repvgg_cuda.build_info())
    for title in ("Versions", "Build", "Compiled module", "CPU", "CUDA", "Algorithms on cpu", "Algorithms on cuda"):
        assert any(line.startswith(title) for line in out.splitlines())


def test_info_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "module", None)
    monkeypatch.setattr(_ext, "why_missing", "no compiler was found")
    text = info.render(info.collect())
    assert "  build   python\n  reason  no compiler was found" in text
    assert "  _C  not loaded: no compiler was found" in text
    assert text.count("others  none: the compiled module is not loaded (no compiler was found)") == 2


@pytest.mark.parametrize(
    ("version", "why"), [(None, "this torch is built without CUDA"), ("13.0", "no NVIDIA GPU or driver is found")]
)
def test_info_says_why_cuda_is_missing(monkeypatch: pytest.MonkeyPatch, version: str | None, why: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    facts = info.collect()
    assert facts["cuda"] == {"available": False, "why_missing": why, "devices": []}
    assert all(set(row["refusals"].values()) == {why} for row in facts["algorithms"]["cuda"])
    text = info.render(facts)
    assert f"  available  no: {why}" in text
    assert re.search(rf"aten +not available: {re.escape(why)}", text)


def test_info_text_of_devices_and_refusals() -> None:
    facts = copy.deepcopy(info.collect())
    device = {"name": "NVIDIA X", "capability": "9.0", "multiprocessors": 132, "memory_bytes": 80 * 2**30}
    facts["cuda"] = {"available": True, "why_missing": None, "devices": [device]}
    facts["algorithms"]["cuda"] = [
        {
            "name": "direct",
            "available": True,
            "dtypes": ["float32"],
            "refusals": {"float64": "dtype must be float32", "float16": "dtype must be float32", "bfloat16": "too new"},
            "packed": 0.0,
        },
        {
            "name": "winograd",
            "available": False,
            "dtypes": [],
            "refusals": {"float32": "groups", "float16": "dtype"},
            "packed": 4.0,
        },
    ]
    text = info.render(facts)
    assert "  cuda:0     NVIDIA X, compute capability 9.0, 132 multiprocessors, 80.0 GiB" in text
    assert "  direct    float32; not float64, float16: dtype must be float32; not bfloat16: too new" in text
    assert "  winograd  not available; not float32: groups; not float16: dtype; packed weights 4x" in text


# -------------------------------------------------------------------------------------------------------- explain


def test_explain(capsys: Capture) -> None:
    x, weight = torch.empty(2, 16, 15, 14), torch.empty(24, 8, 3, 3)
    layer = ("explain", "--layer", "2,16,15,14,24", "--groups", 2)
    text = str(repvgg_cuda.explain(x, weight, groups=2))
    assert run(capsys, *layer) == (0, f"{text}\n", "")
    text = str(repvgg_cuda.explain(x, weight, groups=2, stride=2, prepared=True, memory="low"))
    assert run(capsys, *layer, "--stride", 2, "--prepared", "--memory", "low") == (0, f"{text}\n", "")
    message = "conv3x3: groups must divide C_in and C_out, got groups=5, C_in=16, C_out=24"
    assert error_of(capsys, "explain", "--layer", "2,16,15,14,24", "--groups", 5) == message


# -------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth"])
def test_convert(capsys: Capture, trained: Path, tiny: dict[str, Tensor], name: str) -> None:
    out_path = trained.with_name(name)
    status, out, err = run(capsys, "convert", trained, out_path)
    assert (status, err) == (0, "")
    folded = checkpoint.load_state_dict_file(out_path)
    expected = checkpoint.fuse_state_dict(tiny).state
    assert all(torch.equal(folded[key], value) for key, value in expected.items())
    assert len(folded) == len(expected)
    before, after = checkpoint.parameter_count(tiny), checkpoint.parameter_count(expected)
    assert out.splitlines()[:3] == [
        f"{trained} -> {out_path}",
        "  blocks folded  5",
        f"  parameters     {before:,} -> {after:,}",
    ]
    assert "  note: BatchNorm eps 1e-05, with which official RepVGG trains" in out
    assert sorted(files_in(trained.parent)) == sorted([name, "trained.pth"])


def test_convert_reports_what_it_unwrapped(capsys: Capture, tmp_path: Path, tiny: dict[str, Tensor]) -> None:
    wrapped = {"module." + key: value for key, value in tiny.items()}
    torch.save({"model": wrapped, "ema": wrapped, "epoch": 1}, tmp_path / "in.pth")
    status, out, _ = run(capsys, "convert", tmp_path / "in.pth", tmp_path / "out.pth")
    assert status == 0
    assert "  note: took 'model' of model, ema, epoch\n" in out
    assert "  note: removed the prefix 'module.' from every key\n" in out
    assert "  warning: took 'model', not 'ema'" in out


def test_convert_uses_eps(capsys: Capture, trained: Path, tiny: dict[str, Tensor]) -> None:
    out_path = trained.with_name("out.pth")
    status, out, _ = run(capsys, "convert", trained, out_path, "--eps", "1e-3")
    expected = checkpoint.fuse_state_dict(tiny, eps=1e-3).state
    assert (status, "eps 0.001" in out) == (0, True)
    assert torch.equal(
        checkpoint.load_state_dict_file(out_path)["stage0.rbr_reparam.weight"], expected["stage0.rbr_reparam.weight"]
    )


def test_convert_refuses_to_overwrite_without_force(capsys: Capture, trained: Path) -> None:
    out_path = trained.with_name("out.safetensors")
    out_path.write_bytes(b"precious")
    before = files_in(trained.parent)
    expected = f"{out_path}: already exists; give --force to replace it, or another name"
    assert error_of(capsys, "convert", trained, out_path) == expected
    assert files_in(trained.parent) == before
    assert run(capsys, "convert", trained, out_path, "--force")[0] == 0
    assert checkpoint.form_of(checkpoint.load_state_dict_file(out_path)) == "deploy"


def test_convert_never_overwrites_its_input(capsys: Capture, trained: Path) -> None:
    (trained.parent / "link.pth").symlink_to(trained)
    (trained.parent / "sub").mkdir()
    before = trained.read_bytes()
    for out_path in (trained, trained.parent / "link.pth", trained.parent / "sub" / ".." / "trained.pth"):
        text = error_of(capsys, "convert", trained, out_path, "--force")
        assert text == f"{out_path}: is IN itself, and a trained checkpoint is never overwritten; give OUT another name"
    assert trained.read_bytes() == before


def bad_inputs(folder: Path, tiny: dict[str, Tensor]) -> dict[str, str]:
    """File names in ``folder`` that ``convert`` must refuse, with a part of the reason."""
    checkpoint.save_state_dict_file(checkpoint.fuse_state_dict(tiny).state, folder / "deployed.pth")
    checkpoint.save_state_dict_file(tiny, folder / "cut.pth")
    checkpoint.save_state_dict_file(tiny, folder / "cut.safetensors")
    for name in ("cut.pth", "cut.safetensors"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "empty.pth").touch()
    (folder / "notes.txt").touch()
    torch.save(nn.Linear(2, 2), folder / "module.pth")
    partial = {key: value for key, value in tiny.items() if key != "stage1.0.rbr_1x1.bn.running_var"}
    torch.save(partial, folder / "partial.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, folder / "resnet.pth")
    torch.save({"stem.conv_kxk.conv.weight": torch.zeros(1)}, folder / "timm.pth")
    return {
        "missing.pth": "No such file or directory",
        "deployed.pth": "the checkpoint is already in deploy form: there is nothing to fold",
        "cut.pth": "is not a PyTorch checkpoint, or is truncated or corrupt",
        "cut.safetensors": "is not a safetensors file, or is truncated or corrupt",
        "empty.pth": "is not a PyTorch checkpoint, or is truncated or corrupt",
        "notes.txt": "a checkpoint's name must end in one of .safetensors, .pth",
        "module.pth": "holds more than tensors (torch.nn.modules.linear.Linear)",
        "partial.pth": "stage1.0.rbr_1x1.bn.running_var is missing: stage1.0 is not a complete RepVGG block",
        "resnet.pth": "the checkpoint has no RepVGG block",
        "timm.pth": "stem.conv_kxk.conv.weight must be [C_out, C_in / groups, 3, 3], got [1]",
    }


def test_convert_names_a_bad_input_and_writes_nothing(capsys: Capture, tmp_path: Path, tiny: dict[str, Tensor]) -> None:
    reasons = bad_inputs(tmp_path, tiny)
    before = files_in(tmp_path)
    for name, reason in reasons.items():
        text = error_of(capsys, "convert", tmp_path / name, tmp_path / "out.pth")
        assert text.startswith(f"{tmp_path / name}: ")
        assert reason in text
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("out.onnx", "a checkpoint's name must end in one of .safetensors, .pth"),
        ("missing/out.pth", "missing is not a directory; create it first"),
        ("trained.pth/out.pth", "trained.pth is not a directory; create it first"),
        ("folder.pth", "already exists"),
    ],
)
def test_convert_names_a_bad_output_before_any_work(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, trained: Path, name: str, reason: str
) -> None:
    (trained.parent / "folder.pth").mkdir()
    monkeypatch.setattr(checkpoint, "read_state_dict_file", raise_on_call(AssertionError("work was done")))
    text = error_of(capsys, "convert", trained, trained.parent / name)
    assert text.startswith(f"{trained.parent / name}: ")
    assert reason in text


def test_convert_onto_a_directory_with_force(capsys: Capture, trained: Path) -> None:
    (trained.parent / "folder.pth").mkdir()
    text = error_of(capsys, "convert", trained, trained.parent / "folder.pth", "--force")
    assert text == f"{trained.parent / 'folder.pth'}: Is a directory"


def test_convert_with_a_bad_eps(capsys: Capture, trained: Path) -> None:
    text = error_of(capsys, "convert", trained, trained.with_name("out.pth"), "--eps", "-1")
    assert text == f"{trained}: eps must be a finite number of at least 0, got -1"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No space left on device"), 1, "No space left on device\n"),
    ],
)
def test_convert_that_is_cut_short_leaves_nothing(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, trained: Path, error: BaseException, status: int, message: str
) -> None:
    before = files_in(trained.parent)
    monkeypatch.setattr("os.fsync", raise_on_call(error))
    actual, out, err = run(capsys, "convert", trained, trained.with_name("out.pth"))
    assert (actual, out) == (status, "")
    assert err.endswith(message)
    assert files_in(trained.parent) == before


def test_convert_checks_the_model(capsys: Capture, a0: Path, tmp_path: Path) -> None:
    status, out, _ = run(capsys, "convert", a0, tmp_path / "out.pth", "--model", "RepVGG-A0")
    assert (status, "  blocks folded  22\n" in out) == (0, True)
    assert checkpoint.form_of(checkpoint.load_state_dict_file(tmp_path / "out.pth")) == "deploy"


def test_convert_refuses_another_model(capsys: Capture, a0: Path, tmp_path: Path) -> None:
    source, target = a0, tmp_path / "out.pth"
    for name, reason in {
        "RepVGG-B0": "the checkpoint is of another model (missing keys: stage1.2.rbr_dense.conv.weight",
        "RepVGG-A1": "stage0.rbr_dense.conv.weight must be [64, 3, 3, 3], got [48, 3, 3, 3]",
    }.items():
        text = error_of(capsys, "convert", source, target, "--model", name)
        assert text.startswith(f"{source}: {reason}")
    assert not target.exists()


@pytest.mark.parametrize("options", [(), ("--model", "RepVGG-A0")])
def test_convert_misses_a_lost_identity(capsys: Capture, a0: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """A block without identity is a valid block; that this one has lost it, its name and the model know."""
    state = checkpoint.load_state_dict_file(a0)
    torch.save({k: v for k, v in state.items() if "stage1.1.rbr_identity" not in k}, tmp_path / "in.pth")
    text = error_of(capsys, "convert", tmp_path / "in.pth", tmp_path / "out.pth", *options)
    assert "stage1.1.rbr_identity.weight is missing" in text
    assert not (tmp_path / "out.pth").exists()


def test_convert_with_model_needs_a_head(capsys: Capture, a0: Path, tmp_path: Path) -> None:
    state = checkpoint.load_state_dict_file(a0)
    torch.save({key: value for key, value in state.items() if key != "linear.weight"}, tmp_path / "in.pth")
    text = error_of(capsys, "convert", tmp_path / "in.pth", tmp_path / "out.pth", "--model", "RepVGG-A0")
    assert "has no linear.weight, which would say the number of classes of RepVGG-A0" in text


def test_convert_checks_a_model_with_other_input_channels(capsys: Capture, tmp_path: Path) -> None:
    state = create_model("RepVGG-A0", num_classes=2, in_channels=1).state_dict()
    checkpoint.save_state_dict_file(state, tmp_path / "in.pth")
    assert run(capsys, "convert", tmp_path / "in.pth", tmp_path / "out.pth", "--model", "RepVGG-A0")[0] == 0


# --------------------------------------------------------------------------------------------------------- verify


def verify_arguments(folder: Path, *more: object) -> tuple[object, ...]:
    return ("verify", folder / "trained.pth", folder / "deployed.pth", "--model", "RepVGG-small", *more)


@pytest.mark.parametrize("small", [torch.float32, torch.float16, torch.bfloat16], ids=str, indirect=True)
def test_verify(capsys: Capture, small: Path) -> None:
    status, out, err = run(capsys, *verify_arguments(small, "--image-size", 40, "--batch", 2, "--seed", 3))
    assert (status, err) == (0, "")
    for block in ("stage0", "stage1.0", "stage2.0", "stage2.1", "stage3.0", "stage4.0"):
        assert block in out


def test_verify_prepared(capsys: Capture, small: Path) -> None:
    status, out, err = run(capsys, *verify_arguments(small, "--image-size", 40, "--prepare"))
    assert (status, err) == (0, "")
    assert out.splitlines()[0].split()[:3] == ["layer", "input", "algorithm"]
    assert "\nprepared " in out
    assert "all " in out.split("\nprepared ")[1]


@pytest.mark.parametrize("key", ["stage2.1.rbr_reparam.bias", "stage4.0.rbr_reparam.weight"])
def test_verify_finds_a_changed_weight(capsys: Capture, small: Path, key: str) -> None:
    state = checkpoint.load_state_dict_file(small / "deployed.pth")
    state[key] *= 1.001
    checkpoint.save_state_dict_file(state, small / "deployed.pth")
    status, out, _ = run(capsys, *verify_arguments(small, "--image-size", 40))
    failed = [line for line in out.splitlines() if "FAIL" in line and key.partition(".rbr")[0] in line]
    assert status == 1
    assert len(failed) >= 1


def test_verify_inputs(capsys: Capture, monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="photos need Pillow")
    seen: list[Tensor] = []

    def record(trained: nn.Module, deployed: nn.Module, inputs: Tensor) -> SimpleNamespace:
        seen.append(inputs)
        return SimpleNamespace(ok=True, render=lambda: "")

    monkeypatch.setattr(cli.verification, "verify", record)
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        image.new("RGB", (60, 50), colour).save(small / name)
    photos = ("--images", small / "a.png", small / "b.png")
    for options in [
        (),
        ("--seed", 1),
        ("--seed", 1),
        ("--batch", 2, "--image-size", 33),
        photos,
        (*photos, "--image-size", 32),
    ]:
        assert run(capsys, *verify_arguments(small, *options))[0] == 0
    shapes = [tuple(inputs.shape) for inputs in seen]
    assert shapes == [(1, 3, 224, 224)] * 3 + [(2, 3, 33, 33), (2, 3, 224, 224), (2, 3, 32, 32)]
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])
    red, blue = seen[4]
    assert red[0].mean() > blue[0].mean()
    assert red[2].mean() < blue[2].mean()


def test_verify_names_a_missing_photo(capsys: Capture, small: Path) -> None:
    assert "missing.png" in error_of(capsys, *verify_arguments(small, "--images", small / "missing.png"))


def test_verify_with_the_checkpoints_in_the_wrong_order(capsys: Capture, small: Path) -> None:
    text = error_of(capsys, "verify", small / "deployed.pth", small / "trained.pth", "--model", "RepVGG-small")
    expected = "is in deploy form, but must be in train form: give TRAINED first, then DEPLOYED"
    assert text == f"{small / 'deployed.pth'}: {expected}"


def test_verify_another_model(capsys: Capture, small: Path) -> None:
    text = error_of(capsys, "verify", small / "trained.pth", small / "deployed.pth", "--model", "RepVGG-A0")
    assert text.startswith(f"{small / 'trained.pth'}: the checkpoint is of another model (missing keys: stage1.1.")


def test_verify_photos_need_three_channels(capsys: Capture, small: Path) -> None:
    state = create_model("RepVGG-small", num_classes=2, in_channels=1).state_dict()
    checkpoint.save_state_dict_file(state, small / "trained.pth")
    checkpoint.save_state_dict_file(checkpoint.fuse_state_dict(state).state, small / "deployed.pth")
    text = error_of(capsys, *verify_arguments(small, "--images", small / "a.png"))
    assert text == "--images: photos have 3 channels, but the stem of the checkpoints takes 1"
