# SPDX-License-Identifier: MIT
"""Baselines and engines: each computes the right thing, the CUDA ones rehearsed; the device seam; the Python API."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import timm_models
import torch
from torch import Tensor, nn

import repvgg_cuda
from repvgg_cuda import baselines, ceilings, checks, devices, digits, networks, suites, testing
from repvgg_cuda.comparison import Work
from repvgg_cuda.convert import reparameterize
from repvgg_cuda.suites import Setup

pytestmark = pytest.mark.usefixtures("one_thread")


def small_network() -> tuple[nn.Module, nn.Module, Tensor]:
    """Trained, deployed, input."""
    trained = networks.randomise_(digits.build_model()).eval()
    return trained, reparameterize(trained).model, torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def network_workload(device: devices.Device) -> tuple[baselines.Workload, checks.Truth]:
    trained, deployed, x = small_network()
    return networks.workload(trained, deployed, x, device), checks.network_truth(trained, deployed, x)


# ---------------------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("name", [each.name for each in baselines.baselines(devices.DryRunDevice())])
def test_every_cuda_baseline_is_rehearsed(name: str) -> None:
    device = devices.DryRunDevice()
    (baseline,) = [each for each in baselines.baselines(device) if each.name == name]
    work, truth = network_workload(device)
    candidate = networks.baseline_candidate(baseline, work, truth)
    assert candidate.refusal is None
    benchmark = torch.backends.cudnn.benchmark
    with torch.inference_mode(), candidate.context():
        run = candidate.ready()
        for _ in range(2):  # a graph's replay writes where its capture wrote
            assert candidate.check(run()) == ""
        searches = torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == benchmark
    assert searches == (baselines.CUDNN_BENCHMARK in name or name.startswith(baselines.COMPILE))


def test_cuda_baselines_are_all_that_the_field_would_ask_for() -> None:
    names = {each.name for each in baselines.baselines(devices.DryRunDevice())}
    for call in ("fused F.conv2d + relu", "cudnn_convolution_relu"):
        for search in ("", ", cudnn.benchmark"):
            for layout in ("", ", channels_last"):
                assert {f"{call}{search}{layout}", f"{call}{search}{layout}, CUDA graph"} <= names
    assert {"torch.compile", "torch.compile, max-autotune", "torch.compile, CUDA graph", "three branches"} <= names


def test_the_fused_call_of_cudnn_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def conv_relu(self: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, groups: int) -> Tensor:
        calls.append((tuple(x.shape), stride, groups))
        return torch.nn.functional.conv2d(x, weight, bias, stride, 1, 1, groups).relu_()

    monkeypatch.setattr(devices.DryRunDevice, "conv_relu", conv_relu)
    work, _ = network_workload(devices.DryRunDevice())
    with torch.inference_mode():
        baselines.TorchForm(cudnn_call=True)(work)()
    assert len(calls) == len(baselines.convolutions(work.deployed))


def test_a_layer_without_relu_has_no_fused_call() -> None:
    conv = repvgg_cuda.RepConv3x3(4, 4).eval()
    work = baselines.Workload(conv, torch.randn(1, 4, 8, 8), devices.DryRunDevice())
    refusals = {each.name: each.refusal(work) for each in baselines.baselines(work.device)}
    assert "is for convolutions with bias and ReLU" in str(refusals["cudnn_convolution_relu"])
    assert "no form before fusion" in str(refusals["three branches"])
    (eager,) = [each for each in baselines.baselines(work.device) if each.name == baselines.EAGER]
    assert eager.row_name(work) == "fused F.conv2d"


@pytest.mark.parametrize(
    "name", ["three branches", "fused F.conv2d + relu", "fused F.conv2d + relu, channels_last", "ONNX Runtime",
             "OpenVINO", "ncnn", pytest.param("MNN", marks=pytest.mark.slow),
             pytest.param("torch.compile", marks=pytest.mark.slow)],
)  # fmt: skip
def test_every_cpu_baseline_computes_the_network(name: str) -> None:
    device = devices.CpuDevice()
    (baseline,) = [each for each in baselines.baselines(device) if each.name == name]
    work, truth = network_workload(device)
    if (why := baseline.refusal(work)) is not None:
        pytest.skip(why)
    candidate = networks.baseline_candidate(baseline, work, truth)
    run = candidate.ready()  # kept: an engine's output may lie in memory of its own
    with torch.inference_mode():
        output = run()
    assert candidate.check(output) == ""
    assert candidate.error is not None
    assert candidate.error(output) < 1e-3


def test_what_is_missing_or_not_for_it_is_refused() -> None:
    work, _ = network_workload(devices.CpuDevice())
    absent = baselines.Baseline("x", "X", baselines.three_branches, needs=("no_such_engine",), package="no-such-engine")
    assert absent.refusal(work) == "not installed: pip install no-such-engine"
    (ncnn,) = [each for each in baselines.baselines(work.device) if each.name == "ncnn"]
    assert "chains of 3x3 convolutions" in str(ncnn.only(dataclasses.replace(work, layers=None)))
    assert "float32 only, got torch.float16" in str(ncnn.only(dataclasses.replace(work, x=work.x.half())))


def test_a_network_with_se_is_no_chain() -> None:
    trained = networks.randomise_(repvgg_cuda.models.RepVGG([1, 1, 1, 1], 10, [0.25] * 4, use_se=True)).eval()
    deployed, x = reparameterize(trained).model, torch.randn(1, 3, 32, 32)
    work = networks.workload(trained, deployed, x, devices.CpuDevice())
    assert work.layers is None
    plain = repvgg_cuda.models.RepVGG([1, 1, 1, 1], 10, [0.25] * 4).eval()
    deployed = reparameterize(plain).model
    layers = networks.workload(plain, deployed, x, devices.CpuDevice()).layers
    assert layers is not None
    assert [(layer.stride, layer.activation) for layer in layers] == [(2, "relu")] * 5


def test_tf32_is_allowed_for_where_it_is_used() -> None:
    trained, deployed, x = small_network()
    exact, loose = (checks.network_truth(trained, deployed, x, tf32=tf32) for tf32 in (False, True))
    rounded = exact.want.float() + 2.0**-11 * exact.want.float().abs().max()
    assert exact.check(rounded) != ""
    assert loose.check(rounded) == ""


def test_foreign_outputs_are_told_from_wrong_ones() -> None:
    want = torch.tensor([[1.0, -4.0]], dtype=torch.float64)
    truth = checks.Truth(lambda: want, lambda: torch.full_like(want, 1e-6), torch.float32)
    near, far = want.float() + 1e-4, want.float() + 0.1
    assert truth.check_foreign(near.numpy()) == ""
    assert truth.remark_foreign(near.numpy()).startswith("inexact: 100")
    assert truth.remark_foreign(want.float()) == ""
    assert "another result: relative error 0.025" in truth.check_foreign(far)
    assert "expected [1, 2], got [1, 1]" in truth.check_foreign(far[:, :1])
    assert checks.relative_error(torch.tensor([[1.0, float("nan")]]), want) == float("inf")


# ------------------------------------------------------------------------------------------------------------- device


def test_the_seam_answers_every_call_without_a_gpu() -> None:
    real = {name for name in vars(devices.CudaDevice) if not name.startswith("_")}
    rehearsed = {name for name in vars(devices.DryRunDevice) if not name.startswith("_")}
    assert real - {"kind"} <= rehearsed
    dry = devices.device_for("cuda", dry_run=True)
    assert (dry.kind, dry.dry_run, dry.torch_device.type) == ("cuda", True, "cpu")
    assert "dry run" in dry.facts()["gpu"]
    with pytest.raises(RuntimeError, match="CUDA graphs need a CUDA device"):
        devices.CpuDevice().capture(lambda: None)


def test_nvidia_smi_is_understood() -> None:
    line = "580.1, 1980, 2619, 1980, 95.5, 700.00, 41, 0x0000000000000044, Enabled, [N/A]\n"
    state = devices.parse_smi(line)
    assert state == {
        "driver": 580.1, "clock_mhz": 1980.0, "memory_clock_mhz": 2619.0, "max_clock_mhz": 1980.0, "power_w": 95.5,
        "power_limit_w": 700.0, "temperature_c": 41.0, "throttle": ["power cap", "hardware thermal slowdown"],
        "ecc": "Enabled",
    }  # fmt: skip
    assert devices.parse_smi("no devices were found") == {}
    assert devices.parse_smi(line.replace("0x0000000000000044", "0x0000000000000001"))["throttle"] == []
    assert devices.query_smi("GPU-none") == {}


def test_ceilings_of_a_rehearsed_gpu_and_floors() -> None:
    found = ceilings.measure(devices.DryRunDevice())
    assert set(found.gflops) == {"float32", "tf32", "float16", "bfloat16"}
    assert found.launch_us is not None
    assert found.graph_launch_us is not None
    known = ceilings.Ceilings({"float32": 100.0, "tf32": 800.0}, "", ((1e6, 50.0), (1e8, 10.0)))
    # 1e9 operations at 100 GFLOP/s; 1e6 bytes at 50 GB/s from the cache, at 10 from memory.
    assert known.floors(Work(1e9, 1e6), torch.float32) == {"warm": 1e4, "cold": 1e4}
    assert known.floors(Work(1e3, 1e6), torch.float32) == {"warm": 20.0, "cold": 100.0}
    assert known.floors(Work(1e9, 1e6), torch.float32, tf32=True)["warm"] == 1e9 / 800 / 1e3
    assert known.floors(Work(1e9, 1e6), torch.float16) == {}
    assert known.memory(5e7) == 50.0  # the next smaller size is no slower
    assert ceilings.Ceilings.from_dict(known.to_dict()) == known


# ---------------------------------------------------------------------------------------------------- suites and API


def test_cases_of_one_group_differ_in_the_batch_alone() -> None:
    setup = Setup(torch.device("cpu"), torch.float32, quick=True, models=("digits",), batches=(1, 3))
    for suite in (suites.layers_suite, suites.models_suite, suites.chains_suite, suites.small_suite):
        groups: dict[str, list[int]] = {}
        for case in suite(setup):
            groups.setdefault(case.group, []).append(case.batch)
        assert set(map(tuple, groups.values())) == {(1, 3)}, suite
        assert "" not in groups


def test_the_work_of_a_network_is_that_of_its_layers() -> None:
    case = testing.Case("", 2, 4, 9, 7, 6, stride=2)
    conv = repvgg_cuda.RepConv3x3(4, 6, stride=2)
    x, _, _ = case.tensors()
    moved = 4 * (x.numel() + conv.weight.numel() + 2 * 6 * 5 * 4)
    assert networks.work_of(nn.Sequential(conv), x) == Work(float(case.flops), float(moved))


def test_selection_of_baselines() -> None:
    def keys(**options: Any) -> list[str]:
        return [each.key for each in Setup(torch.device("cpu"), torch.float32, **options).baselines()]

    assert keys(quick=True) == ["three-branches", "eager", "channels_last"]
    assert "compile" not in keys()
    assert {"compile", "compile-max", "mnn", "ncnn"} <= set(keys(full=True))
    assert keys(against=("mnn",)) == ["three-branches", "eager", "mnn"]


@pytest.mark.usefixtures("no_ceilings")
def test_benchmark_of_a_model() -> None:
    trained, _, x = small_network()

    def double(x: Tensor) -> Tensor:
        return 2 * trained(x)

    result = repvgg_cuda.benchmark(trained, x, against=["channels_last", trained, double], rounds=8)
    assert result.rows[0].candidate == "three branches"
    assert result["double"].status == "wrong"
    assert result["double"].median_us is None
    assert result["RepVGG"].status == "ok"
    assert result.fastest.median_us == min(row.median_us for row in result.rows if row.median_us)
    assert result["fused conv3x3 prepared"].interval is not None
    text = str(result)
    assert "fused F.conv2d + relu, channels_last" in text
    assert "another result" in text
    html = result._repr_html_()
    assert "<table>" in html
    assert "data:image/svg+xml;base64," in html
    png = result._repr_png_()
    assert png is not None
    assert png.startswith(b"\x89PNG")
    with pytest.raises(KeyError, match="no row 'eager'; there are three branches, "):
        result["eager"]
    assert not any(isinstance(module, repvgg_cuda.RepConv3x3) for module in trained.modules())  # a copy was folded


@pytest.mark.usefixtures("no_ceilings")
def test_benchmark_of_a_layer_against_named_rivals() -> None:
    conv = repvgg_cuda.RepConv3x3(8, 8, activation="relu").eval()
    x = torch.randn(1, 8, 12, 12)
    result = repvgg_cuda.benchmark(conv, x, against={"mine": lambda x: conv(x)}, rounds=2, cold=True)
    names = [row.candidate for row in result.rows]
    assert names[0] == "fused F.conv2d + relu"
    assert names.count("mine") == 2
    assert [row.caches for row in result.rows if row.candidate == "mine"] == ["warm", "cold"]
    assert result["mine"].caches == "warm"
    assert str(result).count("caches cold") == 1
    assert conv.prepared is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": nn.ReLU().eval()}, "nothing in the model can be folded"),
        ({"model": "RepVGG-A0"}, "expected a module, got str"),
        ({"training": True}, "is in training mode; call .eval"),
        ({"x": torch.zeros(3, 8, 8)}, r"must be a tensor \[N, C, H, W\], got \[3, 8, 8\]"),
        ({"against": "eager"}, "must be a list, got the string 'eager'"),
        ({"against": ["eagre"]}, "must be among three-branches, .*, got 'eagre'"),
        ({"against": [7]}, "names and callables, got int"),
        ({"against": {"fused conv3x3 auto": lambda x: x}}, "must not use the name of a row"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("no_ceilings")
def test_what_cannot_be_benchmarked_is_an_error(change: dict[str, Any], message: str) -> None:
    model: Any = change.pop("model", small_network()[0])
    if change.pop("training", False):
        model.train()
    x = change.pop("x", torch.zeros(1, 1, 32, 32))
    with pytest.raises(RuntimeError, match=message):
        repvgg_cuda.benchmark(model, x, **change)


def test_an_unknown_model_lists_the_known_ones_whether_or_not_timm_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RuntimeError, match=r"digits, RepVGG-A0, .*timm itself: ModuleNotFoundError\), got nothing"):
        networks.require_model("nothing")


@pytest.mark.slow
def test_a_model_of_the_real_timm() -> None:
    timm_models.import_timm()
    networks.require_model("repvgg_a0")
    with pytest.raises(RuntimeError, match="or a model of timm, got repvgg_a00"):
        networks.require_model("repvgg_a00")
    assert networks.input_shape("repvgg_a0", 2) == (2, 3, 224, 224)
    trained, x = networks.build_model("repvgg_a0", torch.device("cpu"), torch.float32, 1, (64, 64))
    deployed = networks.deploy(trained)
    work = networks.workload(trained, deployed, x, devices.CpuDevice())
    truth = checks.network_truth(trained, deployed, x)
    setup = Setup(x.device, x.dtype, quick=True)
    with torch.inference_mode():
        found = {each.name: each.check(each.ready()()) for each in suites.network_rows(setup, work, truth)}
    assert set(found.values()) == {""}
    assert {"three branches", "fused F.conv2d + relu", "fused conv3x3 prepared"} <= set(found)


def test_a_model_of_timm_is_built_for_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        input_size = (3, 24, 40)

    class Timm:
        is_model = staticmethod(lambda name: name == "tiny")
        get_pretrained_cfg = staticmethod(lambda name: Config)
        create_model = staticmethod(lambda name, pretrained: repvgg_cuda.models.RepVGG([1, 1, 1, 1], 5, [0.25] * 4))

    monkeypatch.setitem(sys.modules, "timm", Timm)
    networks.require_model("tiny")
    setup = Setup(torch.device("cpu"), torch.float32, quick=True, models=("tiny",), batches=(2,))
    (case,) = suites.models_suite(setup)
    assert case.name == "tiny-2x3x24x40"
    candidates, work = case.build()
    assert work is not None
    with torch.inference_mode():
        assert all(each.check(each.ready()()) == "" for each in candidates if each.refusal is None)
