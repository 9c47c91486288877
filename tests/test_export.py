# SPDX-License-Identifier: MIT
"""Exports, run where they will run: ONNX Runtime, fresh processes; refusals; files whole or not at all."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm_models
import torch
from torch import Tensor, nn

import repvgg_cuda
from repvgg_cuda import cli, export, testing
from repvgg_cuda.checkpoint import save_state_dict_file
from repvgg_cuda.models import RepVGG, create_model
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.verification import NETWORK_FACTOR

#: Small, with every feature of the family: groups, SE, strides.
OPTIONS: dict[str, Any] = {"num_classes": 7, "width_multiplier": [0.25, 0.25, 0.25, 0.25]}
SIZES = [(2, 40, 48), (1, 33, 65), (5, 64, 32), (1, 32, 32)]


def network(**options: Any) -> nn.Module:
    """A deployed network with weights as training leaves them."""
    torch.manual_seed(0)
    model = timm_models.randomised(RepVGG([1, 2, 1, 1], override_groups_map={3: 4}, **{**OPTIONS, **options}))
    return repvgg_cuda.reparameterize(model)[0].eval()


class Layers(nn.Module):
    """Layers one by one and in one call; the second without a bias, the third strided."""

    def __init__(self) -> None:
        super().__init__()

        def three() -> nn.ModuleList:
            second = RepConv3x3(8, 8, groups=4, bias=False)
            third = RepConv3x3(8, 4, stride=2, activation="relu")
            return nn.ModuleList([RepConv3x3(3, 8, activation="relu"), second, third])

        self.single, self.chained = three(), three()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.single:
            y = layer(y)
        chain = [
            repvgg_cuda.ChainLayer(each.weight, each.bias, each.stride, each.groups, each.activation)  # type: ignore[arg-type]
            for each in self.chained
        ]
        return y - repvgg_cuda.conv3x3_chain(x, chain)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return Layers().eval()


class Block(nn.Module):
    """A user's own, with branches of which this package knows nothing but what they compute."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1)
        self.narrow = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.wide(x) + self.narrow(x) + x)


def own_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), Block(8), Block(8))
    return repvgg_cuda.deploy(timm_models.randomised(model), images(1, 32, 32))[0].eval()


def images(n: int, height: int, width: int) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(height))


def error_text(function: Callable[[], object]) -> str:
    with pytest.raises(RuntimeError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def assert_as_accurate(model: nn.Module, results: dict[tuple[int, int, int], Tensor]) -> None:
    """The results against the model in float64, held to NETWORK_FACTOR times the error of the model itself.

    The largest over all sizes: the few outputs of one image may by chance be closer to the truth than the rest.
    """
    oracle = copy.deepcopy(model).double()
    errors, own = [], []
    for size, y in results.items():
        x = images(*size)
        exact = oracle(x.double())
        assert y.shape == exact.shape
        errors.append(float((y - exact).abs().max()))
        own.append(float((model(x) - exact).abs().max()))
    assert max(own) > 0
    assert max(errors) <= NETWORK_FACTOR * max(own)


# -------------------------------------------------------------------------------------------------------------- ONNX


def onnx_results(path: Path, sizes: list[tuple[int, int, int]]) -> tuple[Any, dict[tuple[int, int, int], Tensor]]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return session, {size: torch.from_numpy(session.run(None, {name: images(*size).numpy()})[0]) for size in sizes}


@pytest.mark.parametrize(
    "make",
    [network, layers, own_model, lambda: network(use_se=True, width_multiplier=[0.5] * 4)],
    ids=["network", "layers", "own model", "se"],
)
def test_onnx_runs_in_onnxruntime_at_every_size(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = make()
    exported = export.export_onnx(model, images(1, 32, 32), tmp_path / "model.onnx")
    session, results = onnx_results(exported.path, SIZES)
    assert [type(axis) for axis in session.get_inputs()[0].shape] == [str, int, str, str]
    assert_as_accurate(model, results)
    proto = onnx.load(exported.path)
    assert {node.domain for node in proto.graph.node} == {""}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert exported.size == exported.path.stat().st_size


def test_onnx_has_one_conv_and_one_relu_per_layer(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    operators = export.export_onnx(network(), images(1, 64, 64), tmp_path / "model.onnx").operators
    assert (operators["Conv"], operators["Relu"]) == (6, 6)
    operators = export.export_onnx(layers(), images(1, 64, 64), tmp_path / "layers.onnx").operators
    assert (operators["Conv"], operators["Relu"]) == (6, 4)


def test_prepared_models_export_without_their_packed_weights(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = network()
    plain = export.export_onnx(model, images(1, 64, 64), tmp_path / "plain.onnx")
    repvgg_cuda.prepare(model, images(1, 64, 64))
    exported = export.export_onnx(model, images(1, 64, 64), tmp_path / "prepared.onnx")
    assert exported.operators == plain.operators
    assert exported.size < 1.1 * plain.size
    assert exported.notes == ("packed weights of 6 layers were left out: they are for this machine and this version",)
    assert all(m.prepared is not None for m in model.modules() if isinstance(m, RepConv3x3))  # the model stays prepared
    assert_as_accurate(model, onnx_results(exported.path, SIZES)[1])


def test_onnx_of_16_bit_models_with_a_wide_bias(tmp_path: Path) -> None:
    """ORT's CPU provider has no bfloat16 convolution, so the graph is looked at: a bias is cast to the type of x."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    conv = RepConv3x3(3, 4).eval().half()
    assert conv.bias is not None
    conv.bias = nn.Parameter(conv.bias.float())
    exported = export.export_onnx(conv, images(1, 8, 8).half(), tmp_path / "half.onnx")
    onnx.checker.check_model(str(exported.path), full_check=True)
    y = onnx_results(exported.path, [])[0].run(None, {"x": images(2, 9, 7).half().numpy()})[0]
    weight, bias, x = conv.weight.detach(), conv.bias.detach(), images(2, 9, 7).half()
    exact = testing.conv3x3_fp64(x, weight, bias)
    bound = testing.error_bound(x, weight, bias.half())
    assert ((torch.from_numpy(y).double() - exact).abs() <= bound).all()


def test_fixed_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    export.export_onnx(layers(), images(1, 16, 24), tmp_path / "fixed.onnx", dynamic=False)
    session, results = onnx_results(tmp_path / "fixed.onnx", [(1, 16, 24)])
    assert session.get_inputs()[0].shape == [1, 3, 16, 24]
    assert_as_accurate(layers(), results)


# ------------------------------------------------------------------------------------------------------ torch.export

RUN = """
import sys, torch, repvgg_cuda
kind, path, data = sys.argv[1:]
inputs = torch.load(data, weights_only=True)
run = torch.export.load(path).module() if kind == "pt2" else torch._inductor.aoti_load_package(path)
with torch.no_grad():
    torch.save([run(x) for x in inputs], data)
"""


def in_fresh_process(kind: str, path: Path) -> dict[tuple[int, int, int], Tensor]:
    data = path.with_name("data.pth")
    torch.save([images(*size) for size in SIZES], data)
    subprocess.run([sys.executable, "-c", RUN, kind, str(path), str(data)], check=True, timeout=300)
    outputs: list[Tensor] = torch.load(data, weights_only=True)
    return dict(zip(SIZES, outputs, strict=True))


def test_pt2_runs_in_a_fresh_process(tmp_path: Path) -> None:
    model = network()
    repvgg_cuda.prepare(model, images(1, 64, 64))
    exported = export.export_pt2(model, images(1, 64, 64), tmp_path / "model.pt2")
    assert exported.operators["repvgg_cuda.conv3x3"] == 6
    assert "packed weights of 6 layers were left out" in exported.notes[0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt2"]
    assert_as_accurate(model, in_fresh_process("pt2", exported.path))


def test_pt2_with_packed_weights(tmp_path: Path) -> None:
    model = network()
    repvgg_cuda.prepare(model, images(1, 64, 64))
    exported = export.export_pt2(model, images(1, 64, 64), tmp_path / "model.pt2", keep_packed=True)
    assert exported.operators["repvgg_cuda.conv3x3_chain"] == 1
    assert "packed weights of 6 layers are in the file" in exported.notes[0]
    assert_as_accurate(model, in_fresh_process("pt2", exported.path))


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [False, True])
def test_aoti_runs_in_a_fresh_process(tmp_path: Path, prepared: bool) -> None:
    model = network()
    if prepared:
        repvgg_cuda.prepare(model, images(1, 64, 64))
    exported = export.export_aoti(model, images(1, 64, 64), tmp_path / "model.pt2")
    assert exported.operators["repvgg_cuda.conv3x3"] == 6
    assert [note[:27] for note in exported.notes] == (["packed weights of 6 layers "] if prepared else [])
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt2"]
    assert_as_accurate(model, in_fresh_process("aoti", exported.path))


# -------------------------------------------------------------------------------------------------------- refusals


def test_torchscript_is_refused_with_the_alternatives(tmp_path: Path) -> None:
    text = error_text(lambda: export.export(network(), images(1, 64, 64), tmp_path / "model.pt", to="torchscript"))
    assert text.startswith("export: TorchScript is not supported: ")
    for alternative in ("pt2 (torch.export)", "aoti (AOTInductor)", "onnx"):
        assert alternative in text
    with pytest.raises(Exception, match=".*"):  # it is no whim: torch.jit itself cannot
        torch.jit.script(network())  # type: ignore[no-untyped-call]


def test_bad_arguments(tmp_path: Path) -> None:
    model, x = network(), images(1, 64, 64)
    cases: dict[str, Callable[[], object]] = {
        "to must be one of onnx, pt2, aoti, got 'coreml'": lambda: export.export(
            model, x, tmp_path / "m.x", to="coreml"
        ),
        "the name of the file must end in .onnx": lambda: export.export_onnx(model, x, tmp_path / "m.pt2"),
        "the name of the file must end in .pt2": lambda: export.export_pt2(model, x, tmp_path / "m.onnx"),
        "example must be a tensor or a tuple": lambda: export.export_pt2(model, [3], tmp_path / "m.pt2"),  # type: ignore[list-item]
        "the model is in training mode; call .eval()": lambda: export.export_pt2(
            network().train(), x, tmp_path / "m.pt2"
        ),
    }
    for expected, function in cases.items():
        assert expected in error_text(function)
    assert not any(tmp_path.iterdir())


class UpTo32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.shape[2] <= 32)
        return x[:, :, ::2]


def test_graph_for_some_sizes_only_is_refused(tmp_path: Path) -> None:
    text = error_text(lambda: export.export_pt2(UpTo32().eval(), images(1, 32, 48), tmp_path / "m.pt2"))
    assert "the graph of this model would hold for at most 32 rows or columns" in text
    export.export_pt2(UpTo32().eval(), images(1, 32, 48), tmp_path / "m.pt2", dynamic=False)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class OneSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == 64
        return x * 2


@pytest.mark.parametrize("model", [DataDependent(), OneSize()])
def test_models_that_are_no_graph_are_refused_in_a_line(tmp_path: Path, model: nn.Module) -> None:
    text = error_text(lambda: export.export_pt2(model.eval(), images(1, 64, 64), tmp_path / "m.pt2"))
    assert text.startswith("export: torch.export cannot take this model as a graph: ")
    assert text.endswith("; dynamic=False (--fixed) takes the size of the example for good")
    assert not any(tmp_path.iterdir())


def test_models_with_branches_are_said_to_have_them(tmp_path: Path) -> None:
    model = timm_models.randomised(RepVGG([1, 1, 1, 1], **OPTIONS))
    exported = export.export_pt2(model, images(1, 64, 64), tmp_path / "m.pt2")
    remedy = "fold first, with repvgg_cuda.deploy; no runtime does"
    assert exported.notes == (f"5 blocks still have branches (stage0, stage1.0, stage2.0, ...): {remedy}",)
    exported = export.export_pt2(Block(3).eval(), images(1, 8, 8), tmp_path / "m.pt2")
    assert exported.notes == (f"1 block still has branches (the model itself): {remedy}",)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pytest.importorskip("onnxscript")
    path = tmp_path / ("model.onnx" if kind == "onnx" else "model.pt2")
    path.write_bytes(b"precious")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        export.export(network(), images(1, 64, 64), path, to=kind)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def a0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("a0") / "a0.safetensors"
    save_state_dict_file(timm_models.randomised(create_model("RepVGG-A0", num_classes=5)).state_dict(), path)
    return path


def test_export_of_a_checkpoint(capsys: pytest.CaptureFixture[str], a0: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    out = tmp_path / "a0.onnx"
    assert cli.main(["export", str(a0), str(out), "--model", "RepVGG-A0", "--to", "onnx"]) == 0
    text = capsys.readouterr().out
    assert f"{a0} -> {out} (onnx, {out.stat().st_size:,} bytes)" in text
    assert "  blocks folded  22\n" in text
    assert "note: BatchNorm eps 1e-05, with which official RepVGG trains" in text
    assert "22 Conv, " in text
    model, _ = export.load_deployed(a0, "RepVGG-A0")
    assert_as_accurate(model, onnx_results(out, [(1, 64, 64), (2, 40, 33)])[1])


def test_export_of_a_deployed_checkpoint_of_another_zoo(
    capsys: pytest.CaptureFixture[str], a0: Path, tmp_path: Path
) -> None:
    deployed, out = tmp_path / "timm.pth", tmp_path / "a0.pt2"
    assert cli.main(["convert", str(a0), str(deployed), "--to", "timm"]) == 0
    assert (
        cli.main(["export", str(deployed), str(out), "--model", "RepVGG-A0", "--to", "pt2", "--image-size", "64"]) == 0
    )
    text = capsys.readouterr().out
    assert "already in deploy form: nothing to fold" in text
    assert "22 repvgg_cuda.conv3x3" in text
    model, _ = export.load_deployed(a0, "RepVGG-A0")
    x = images(1, 64, 96)
    with torch.no_grad():
        assert torch.equal(torch.export.load(out).module()(x), model(x))


def test_export_errors(capsys: pytest.CaptureFixture[str], a0: Path, tmp_path: Path) -> None:
    (tmp_path / "there.onnx").write_bytes(b"precious")
    cases = {
        ("m.pt2", "--to", "torchscript"): "TorchScript is not supported",
        ("m.onnx", "--to", "pt2"): "the name of the file must end in .pt2",
        ("there.onnx", "--to", "onnx"): "already exists; give --force",
        ("nowhere/m.pt2", "--to", "pt2"): "is not a directory; create it first",
    }
    for (name, *options), expected in cases.items():
        assert cli.main(["export", str(a0), str(tmp_path / name), "--model", "RepVGG-A0", *options]) == 1
        assert expected in capsys.readouterr().err
    assert cli.main(["export", str(a0), str(tmp_path / "m.pt2"), "--model", "RepVGG-B0", "--to", "pt2"]) == 1
    assert f"error: {a0}: the checkpoint is of another model" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["there.onnx"]
