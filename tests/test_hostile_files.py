# SPDX-License-Identifier: MIT
"""Files made to do harm, or damaged: one error each that says why; nothing of them is run, nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_checkpoint import train_state
from torch import Tensor, nn

from repvgg_cuda import cli

State = dict[str, Any]


def refuse(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> str:
    """The one line that ``convert`` says to ``path``, for both kinds of output; the folder must stay as it is.

    In parentheses stands what the library that reads the file said, which may name any one of several tensors.
    """
    before = {entry: entry.read_bytes() for entry in path.parent.iterdir()}
    texts = []
    for name in ("out.safetensors", "out.pth"):
        assert cli.main(["convert", str(path), str(path.parent / name), *options]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"error: {path}: ")
        assert err.count("\n") == 1
        texts.append(err)
    assert {entry: entry.read_bytes() for entry in path.parent.iterdir()} == before
    assert len({text.partition(" (")[0] for text in texts}) == 1
    return texts[0]


# ----------------------------------------------------------------------------------------------------------- pickles


class Calls:
    """Unpickling it calls ``function``."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.args


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("where", ["value", "container", "key", "beside"])
def test_pickle_that_runs_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, where: str, zip_format: bool
) -> None:
    (tmp_path / "folder").mkdir()
    ran = tmp_path / "ran"
    evil = Calls(os.mkdir, str(ran))
    content: Any = {
        "value": train_state() | {"linear.weight": evil},
        "container": {"state_dict": evil},
        "key": OrderedDict([(evil, torch.ones(1))]),
        "beside": {"state_dict": train_state(), "hyperparameters": evil},
    }[where]
    path = tmp_path / "folder" / "model.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    assert "holds more than tensors (" in refuse(capsys, path)
    assert not ran.exists()
    torch.load(path, weights_only=False)  # that it would have run
    assert ran.exists()


def test_whole_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save(nn.Conv2d(3, 3, 3), tmp_path / "yolov6s.pt")
    text = refuse(capsys, tmp_path / "yolov6s.pt")
    assert "holds more than tensors (torch.nn.modules.conv.Conv2d), and unpickling could run code" in text
    assert "torch.save(model.state_dict(), 'NAME.pth')" in text


def test_plain_pickle(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(pickle.dumps({"a": Calls(os.mkdir, str(tmp_path / "ran"))}))
    assert "model.pth: " in refuse(capsys, tmp_path / "model.pth")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------- truncated


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(train_state(), path) if suffix == ".pth" else safetensors.torch.save_file(train_state(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "truncated or corrupt" in refuse(capsys, path)


# -------------------------------------------------------------------------------------------------- headers that lie


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], end: int, start: int = 0, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


KEY = "stage0.rbr_dense.conv.weight"
LIES = {
    "a header of 2^60 bytes": safetensors_bytes(b"{}", length=2**60),
    "a header of 2^64 - 1 bytes": safetensors_bytes(b"{}", length=2**64 - 1),
    "a header longer than the file": safetensors_bytes({KEY: entry([1], 4)}, bytes(4), length=5000),
    "a header that is no JSON": safetensors_bytes(b"{" * 40),
    "nesting": safetensors_bytes(b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "a huge shape": safetensors_bytes({KEY: entry([2**40], 4)}, bytes(4)),
    "a shape whose product overflows": safetensors_bytes({KEY: entry([2**33, 2**33], 4)}, bytes(4)),
    "a huge shape and offsets to match": safetensors_bytes({KEY: entry([2**40], 2**42)}, bytes(4)),
    "offsets out of order": safetensors_bytes({KEY: entry([1], 0, start=4)}, bytes(4)),
    "tensors that overlap": safetensors_bytes({KEY: entry([1], 4), "b": entry([1], 4)}, bytes(4)),
    "bytes that belong to nothing": safetensors_bytes({KEY: entry([1], 4)}, bytes(400)),
    "a negative size": safetensors_bytes({KEY: entry([-1], 4)}, bytes(4)),
    "an unknown dtype": safetensors_bytes({KEY: entry([1], 4, dtype="F31")}, bytes(4)),
}


@pytest.mark.parametrize("what", LIES)
def test_safetensors_header_that_lies(capsys: pytest.CaptureFixture[str], tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[what])
    assert "is not a safetensors file, or is truncated or corrupt" in refuse(capsys, path)


def test_zip_bomb(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """torch.load inflates records that torch.save never deflates: a thousand times the file, or more."""
    plain, path = tmp_path / "plain", tmp_path / "model.pth"
    torch.save({"stage0.rbr_dense.conv.weight": torch.zeros(4_000_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    plain.unlink()
    assert path.stat().st_size < 100_000
    assert "is a zip file that unpacks to more than it holds" in refuse(capsys, path)


def rebuilt(size: tuple[int, ...], stride: tuple[int, ...]) -> Any:
    """A tensor of one stored number that claims to have a size of its own."""
    storage = torch.ones(1).storage()  # type: ignore[no-untyped-call]
    return Calls(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        ((2**20, 2**22), (0, 0), "its tensors would take 17,592,186,044,416 bytes, and the file has "),
        ((2**42,), (1,), "is truncated or corrupt"),
        ((2**62, 2**62), (0, 0), "is truncated or corrupt"),
    ],
)
def test_torch_file_with_a_huge_shape(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], expected: str
) -> None:
    torch.save({KEY: rebuilt(size, stride)}, tmp_path / "model.pth")
    assert expected in refuse(capsys, tmp_path / "model.pth")


def test_torch_file_of_a_thousand_names_for_one_tensor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tensor = torch.ones(100_000)
    torch.save({f"layer{i}.weight": tensor for i in range(1000)}, tmp_path / "model.pth")
    assert "its tensors would take 400,000,000 bytes" in refuse(capsys, tmp_path / "model.pth")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", ["sparse", "meta", "quantized"])
def test_tensors_that_are_not_plain(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    tensor = {
        "sparse": lambda: torch.ones(2, 2).to_sparse(),
        "meta": lambda: torch.ones(2, device="meta"),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
    }[kind]()
    torch.save(train_state() | {"extra": tensor}, tmp_path / "model.pth")
    assert "extra must be a plain dense tensor" in refuse(capsys, tmp_path / "model.pth")


# ------------------------------------------------------------------------------------------------------------- values


def nan(state: State) -> str:
    state["stage1.0.rbr_1x1.bn.running_mean"][1] = float("nan")
    return "stage1.0.rbr_1x1.bn.running_mean holds nan: the checkpoint is damaged"


def negative_variance(state: State) -> str:
    state["stage0.rbr_dense.bn.running_var"][0] = -0.5
    return "stage0.rbr_dense.bn.running_var holds -0.5, and a variance is at least 0"


def empty(state: State) -> str:
    state["stage0.rbr_1x1.bn.weight"] = torch.empty(0)
    return "stage0.rbr_1x1.bn.weight must be [8] to fit the other tensors of stage0, got [0]"


def empty_kernel(state: State) -> str:
    state["stage0.rbr_dense.conv.weight"] = torch.empty(8, 0, 3, 3)
    return "stage0.rbr_dense.conv.weight is empty ([8, 0, 3, 3])"


def wrong_shape(state: State) -> str:
    state["stage1.0.rbr_1x1.conv.weight"] = torch.ones(8, 8, 3, 3)
    return "stage1.0.rbr_1x1.conv.weight must be [C_out, C_in / groups, 1, 1], got [8, 8, 3, 3]"


def scalar(state: State) -> str:
    state["stage1.0.rbr_dense.bn.running_var"] = torch.tensor(1.0)
    return "stage1.0.rbr_dense.bn.running_var must be [8] to fit the other tensors of stage1.0, got []"


def complex_kernel(state: State) -> str:
    state["stage0.rbr_dense.conv.weight"] = state["stage0.rbr_dense.conv.weight"].to(torch.complex64)
    return "stage0.rbr_dense.conv.weight must be float64, float32, float16 or bfloat16, got complex64"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "spoil",
    [nan, negative_variance, empty, empty_kernel, wrong_shape, scalar, complex_kernel],
    ids=lambda f: f.__name__,
)
def test_bad_tensors(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, spoil: Callable[[State], str], suffix: str
) -> None:
    state: dict[str, Tensor] = train_state()
    expected = spoil(state)
    path = tmp_path / f"model{suffix}"
    torch.save(state, path) if suffix == ".pth" else safetensors.torch.save_file(state, path)
    assert expected in refuse(capsys, path)
