# SPDX-License-Identifier: MIT
"""The performance model: it speaks of the kernels as compiled, its arithmetic holds, its document is up to date."""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from repvgg_cuda import _ext, create_model, gpu_model, model_names
from repvgg_cuda.gpu_model import MODES, Mode
from repvgg_cuda.gpus import GPUS, Gpu, LaunchPlan
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.testing import Case

pytestmark = pytest.mark.skipif(
    _ext.module is None or not _ext.has_cuda_kernels(), reason="this build has no CUDA rows to ask"
)
ROOT = Path(__file__).resolve().parent.parent
EVERY_GPU = pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS.keys())
NETWORKS = ("RepVGG-A0", "RepVGG-B1g4", "RepVGG-D2se")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_model_script", ROOT / "benchmarks" / "gpu_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def predictions(gpu: Gpu, mode: Mode) -> list[gpu_model.Prediction]:
    cases = {
        case: None
        for name in NETWORKS
        for n in (1, 8, 128)
        for case, _ in gpu_model.distinct(gpu_model.network(name), n)
    }
    found = [gpu_model.predict(gpu, case, mode) for case in cases]
    return [prediction for prediction in found if prediction is not None]


@pytest.mark.parametrize("name", model_names())
def test_a_network_is_what_the_model_runs(name: str) -> None:
    """Sizes as a forward pass of the network itself finds them, on tensors without data."""
    with torch.device("meta"):
        model = create_model(name, deploy=True).eval()
    seen: list[tuple[torch.Size, int, int, int]] = []

    def record(conv: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(conv, RepConv3x3)
        seen.append((inputs[0].shape, conv.weight.shape[0], conv.stride, conv.groups))

    convolutions = [module for module in model.modules() if isinstance(module, RepConv3x3)]
    for conv in convolutions:
        conv.register_forward_pre_hook(record)
    size = 320 if name.endswith("se") else 224
    model(torch.empty(1, 3, size, size, device="meta"))
    assert [(torch.Size(case.x_size), case.K, case.stride, case.groups) for case in gpu_model.network(name)] == seen
    assert sum(count for _, count in gpu_model.distinct(gpu_model.network(name), 8)) == len(convolutions)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@EVERY_GPU
def test_no_time_beats_its_floor(gpu: Gpu, mode: Mode) -> None:
    found = predictions(gpu, mode)
    if gpu.capability < 80 and mode.name in ("tf32", "bf16"):
        assert not found
        return
    for layer in found:
        case = layer.case
        P, Q = ((extent - 1) // case.stride + 1 for extent in (case.H, case.W))
        macs = case.N * case.K * P * Q * 9 * case.C // case.groups
        moved = case.N * case.C * case.H * case.W + case.K * case.C // case.groups * 9 + case.N * case.K * P * Q
        peak = {"fp32": gpu.fp32, "tf32": gpu.tf32, "fp16": gpu.fp16, "bf16": gpu.fp16}[mode.name]
        floor = max(2 * macs / (peak * 1e6), moved * (2 if mode.name in ("fp16", "bf16") else 4) / (gpu.gb_per_s * 1e3))
        assert layer.floor_us == pytest.approx(floor)
        assert gpu_model.implicit_gemm(gpu, case, mode).us >= floor
        assert layer.byte_us < layer.fused.us < layer.compiled_us < layer.eager_us
        if layer.own is not None:
            assert layer.own.us >= floor, layer


@EVERY_GPU
def test_the_plan_is_the_compiled_table_s(gpu: Gpu) -> None:
    assert _ext.module is not None
    named = 0
    for mode in MODES.values():
        for layer in predictions(gpu, mode):
            case, own = layer.case, layer.own
            problem = (case.x_size, case.K, case.stride, case.groups, str(mode.dtype)[6:], True, "relu")
            if own is None:
                rows = _ext.module.explain(True, False, "cuda", -1, gpu.capability, gpu.multiprocessors, *problem)
                accepted = {row[0] for row in rows if row[1] is None}
                assert not {name for name in accepted - {"aten"} if ("tf32" in name) == (mode.name == "tf32")}
                continue
            named += 1
            found = _ext.module.launch_plan(own.algorithm, gpu.capability, gpu.multiprocessors, *problem)
            assert own.plan == LaunchPlan(**found)
            assert own.waves == math.ceil(own.plan.blocks / (gpu.multiprocessors * own.resident))
    assert named > 0


def test_the_time_by_hand() -> None:
    """One wave of a plain launch on an A100: 72 blocks of 32x8x32 outputs, 48 channels in exact float32."""
    case, gpu = Case("layer", 1, 48, 96, 96, 32 * 2), GPUS["A100"]
    plan = LaunchPlan(72, 128, 20000, 32, 8, 32, 1, 1, 3)
    us, bound = gpu_model.plan_us(gpu, case, MODES["fp32"], plan)
    clocks = 32 * 8 * 32 * 48 * 9 / 64  # 64 lanes; the peak of 19.5 TFLOP/s is this within a thousandth
    assert us == pytest.approx((clocks + gpu_model.FILL_CYCLES) / 1410 + gpu_model.LAUNCH_US, rel=2e-3)
    assert bound == "products"
    twice, _ = gpu_model.plan_us(gpu, case, MODES["fp32"], LaunchPlan(2 * 108, 128, 20000, 32, 8, 32, 1, 1, 3))
    assert twice - us == pytest.approx(clocks / 1410, rel=2e-3)


def stem_bandwidth(capability: int, multiprocessors: int) -> float:
    """GB/s of memory that the compiled table believes in: the stem's estimate is a launch and three quarters of it."""
    case = Case("stem", 32, 3, 224, 224, 64, stride=2)
    problem = (case.x_size, case.K, 2, 1, "float16", True, "relu")
    rows = _ext.module.explain(True, False, "cuda", -1, capability, multiprocessors, *problem)
    seconds = next(row[2] for row in rows if row[0] == "stem")
    moved = 2 * 32 * (3 * 224 * 224 + 64 * 112 * 112)
    return float(moved / (0.75 * (seconds - gpu_model.LAUNCH_US * 1e-6)) / 1e9)


@EVERY_GPU
def test_the_compiled_table_tells_gpus_of_one_capability_apart(gpu: Gpu) -> None:
    known = GPUS["H100"] if gpu.name == "H200" else gpu  # which have as many multiprocessors
    assert stem_bandwidth(gpu.capability, gpu.multiprocessors) == pytest.approx(known.gb_per_s)


def test_an_unknown_gpu_is_the_first_of_its_capability() -> None:
    assert stem_bandwidth(89, 76) == stem_bandwidth(89, 128) != stem_bandwidth(89, 58)
    assert stem_bandwidth(88, 10) == stem_bandwidth(87, 16)
    assert stem_bandwidth(0, 0) == stem_bandwidth(80, 108)


def test_the_rivals() -> None:
    """A deeper split helps where there are few blocks; Winograd is for exact float32 with stride 1."""
    wide, strided = Case("layer", 32, 512, 14, 14, 512), Case("layer", 32, 192, 14, 14, 1280, stride=2)
    kernels = {
        (case, mode): [rival.kernel for rival in gpu_model.rivals(GPUS["A100"], case, MODES[mode])]
        for case in (wide, strided)
        for mode in MODES
    }
    assert len(kernels[wide, "fp32"]) == 3
    assert all(len(found) == 1 for key, found in kernels.items() if key != (wide, "fp32"))
    assert "split" in gpu_model.implicit_gemm(GPUS["A100"], Case("layer", 1, 512, 14, 14, 512), MODES["fp16"]).kernel
    fastest = min(gpu_model.rivals(GPUS["A100"], wide, MODES["fp32"]), key=lambda rival: rival.us)
    assert fastest.kernel.startswith("Winograd")
    assert fastest.us < wide.flops / GPUS["A100"].fp32 / 1e6  # fewer products than a direct convolution has


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, module = tmp_path / "model.csv", script()
    options = ["--model", "RepVGG-A0", "--dtype", "fp32", "--gpu", "A100", "--batch", "1", "8"]
    assert module.main([*options, "--csv", str(table)]) == 0
    assert module.PREDICTED in capsys.readouterr().out
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 2 * len(list(gpu_model.distinct(gpu_model.network("RepVGG-A0"), 1)))
    assert {row["note"] for row in rows} == {module.PREDICTED}
    assert all(float(row["ours_us"]) >= max(float(row["flop_us"]), float(row["byte_us"])) for row in rows)
    assert module.main([*options, "--layers"]) == 0
    shown = capsys.readouterr().out
    assert module.PREDICTED in shown
    assert "192->192, 14x14" in shown
    with pytest.raises(SystemExit):
        module.main(["--model", "RepVGG-Z9"])


def test_the_document_is_up_to_date() -> None:
    module = script()
    written = module.DOCUMENT.read_text()
    assert written == module.document(), "docs/gpu-model.md is old: run python benchmarks/gpu_model.py --markdown"
    assert module.PREDICTED in written.partition("\n")[0]
    assert "Where the model says that cuDNN stays ahead" in written
