# SPDX-License-Identifier: MIT
"""What the benchmarks compare: every right candidate passes its check, and every wrong one is seen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from repvgg_cuda import Branches, algorithms, baselines, checks, conv3x3, digits, networks, suites, testing
from repvgg_cuda.convert import reparameterize

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------- blocks and folds


def small_block(
    dtype: torch.dtype = torch.float32, stride: int = 1, groups: int = 1, identity: bool = True
) -> suites.BlockCase:
    setup = suites.Setup(torch.device("cpu"), dtype)
    branches = suites.block_to(testing.random_branches(8, 8, groups, identity=identity), setup.device, dtype)
    x = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    return suites.BlockCase(x, branches, stride, "relu", setup)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
def test_every_candidate_of_a_block_passes_its_own_check(dtype: torch.dtype, stride: int, groups: int) -> None:
    block = small_block(dtype, stride, groups, identity=stride == 1)
    truth = block.truth()
    formats = [torch.contiguous_format, torch.channels_last]
    candidates = [block.multi_branch("before", block.branches, truth), *block.fused(truth, formats)]
    assert len(candidates) >= 1 + 2 * 2
    for candidate in candidates:
        installed = "not installed" not in (candidate.refusal or "")
        foreign = dtype != torch.float32 and "float32 only" in (candidate.refusal or "")
        assert candidate.refusal is None or candidate.own or foreign or not installed
        if candidate.refusal is None:
            assert candidate.check(candidate.ready()()) == "", candidate.name


@pytest.mark.parametrize("damage", ["one element", "nan", "shape", "dtype", "an unfolded branch"])
def test_the_check_sees_wrong_results(damage: str) -> None:
    block = small_block()
    truth = block.truth()
    candidate = next(iter(block.fused(truth, [torch.contiguous_format])))
    y: Any = candidate.ready()()
    if damage == "one element":
        y[1, 3, 4, 5] += 1e-3
    elif damage == "nan":
        y[0, 0, 0, 0] = math.nan
    elif damage == "shape":
        y = y[:1]
    elif damage == "dtype":
        y = y.double()
    else:
        parts = block.branches.parts[:2]
        block = small_block()
        less = Branches(parts, 8, 8)
        other = suites.BlockCase(block.x, less, 1, "relu", block.setup)
        y = next(iter(other.fused(truth, [torch.contiguous_format]))).ready()()
    expected = {"shape": "expected [2, 8, 9, 7] float32, got [1, 8, 9, 7]", "dtype": "got [2, 8, 9, 7] float64"}
    assert expected.get(damage, "worst element") in candidate.check(y)


def test_three_3x3_branches_are_the_same_block() -> None:
    branches = suites.as_3x3_branches(testing.random_branches(8, 8, groups=2))
    assert [tuple(part.kernel.shape) for part in branches.parts if part.kernel is not None] == [(8, 4, 3, 3)] * 3
    block = small_block(groups=2)
    candidate = block.multi_branch("3x3", suites.as_3x3_branches(block.branches), block.truth())
    assert candidate.check(candidate.ready()()) == ""


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_folds_are_checked(dtype: torch.dtype) -> None:
    setup = suites.Setup(torch.device("cpu"), dtype, quick=True)
    cases = {case.name: case for case in suites.fusion_suite(setup)}
    assert list(cases) == ["fold-48-48", "fold-192-192"]
    for candidate in cases["fold-48-48"].build().candidates:
        weight, bias = candidate.ready()()  # type: ignore[misc]
        assert candidate.check((weight, bias)) == ""
        bias = bias.clone()
        bias[7] *= 1.5
        assert candidate.check((weight, bias)).startswith("bias: worst element 7:")


def small_network() -> tuple[torch.nn.Module, torch.nn.Module, Tensor]:
    """Trained, deployed, input."""
    trained = networks.randomise_(digits.build_model()).eval()
    return trained, reparameterize(trained).model, torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_form_of_a_network_passes_its_own_check() -> None:
    trained, deployed, x = small_network()
    before = {name: value.clone() for name, value in deployed.state_dict().items()}
    candidates = networks.model_candidates(trained, deployed, x, [torch.contiguous_format, torch.channels_last])
    forms = 3 + len(algorithms())  # F.conv2d, prepared, auto, and each by name
    assert [candidate.name for candidate in candidates[:2]] == ["three branches", "fused F.conv2d + relu"]
    assert len(candidates) == 1 + 2 * forms
    with torch.inference_mode():
        for candidate in candidates:
            if candidate.refusal is None:
                assert candidate.check(candidate.ready()()) == "", candidate.name
    assert all(torch.equal(value, before[name]) for name, value in deployed.state_dict().items())


def test_the_fused_baseline_is_pytorchs_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, deployed, x = small_network()
    baseline = networks.model_candidates(trained, deployed, x, [torch.contiguous_format])[1]

    def fail(*args: object, **options: object) -> Tensor:
        raise AssertionError("the baseline must not run this library's convolution")

    monkeypatch.setattr("repvgg_cuda.modules.ops.conv3x3", fail)
    y: Any = baseline.ready()()
    assert y.shape == (1, 10)


@pytest.mark.parametrize("have_trained", [True, False])
def test_a_network_with_a_wrong_layer_is_seen(have_trained: bool) -> None:
    trained, deployed, x = small_network()
    candidates = networks.model_candidates(trained if have_trained else None, deployed, x, [torch.contiguous_format])
    fused = candidates[1 if have_trained else 0]
    with torch.inference_mode():
        y: Any = fused.ready()()
        assert fused.check(y * float("nan")) != ""
        if have_trained:
            with torch.no_grad():
                deployed.get_parameter("stage2.1.rbr_reparam.weight")[3] *= 1.001
            broken = networks.model_candidates(trained, deployed, x, [torch.contiguous_format])
            assert broken[1].check(broken[1].ready()()).startswith("stage2.1: error")
            assert broken[0].check(broken[0].ready()()) == ""  # the trained network is not to blame
        else:
            assert fused.check(y * 1.001).startswith("worst element")


def test_an_algorithm_runs_where_it_accepts_and_aten_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    _, deployed, x = small_network()

    def refuses_stride_2(algorithm: str, x: Tensor, weight: Tensor, *, stride: int, **options: object) -> str | None:
        return "stride must be 1" if stride == 2 else None

    def run_anyway(x: Tensor, weight: Tensor, bias: Tensor, *, algorithm: str, **options: Any) -> Tensor:
        return conv3x3(x, weight, bias, **options)

    monkeypatch.setattr("repvgg_cuda.modules.ops.conv3x3", run_anyway)
    monkeypatch.setattr(networks, "refusal", refuses_stride_2)
    monkeypatch.setattr(networks, "algorithms", lambda device: ["picky"])
    model, ran, refused = networks.with_algorithm(deployed, "picky", x)
    convolutions = [module for module in model.modules() if isinstance(module, networks.RepConv3x3)]
    assert [conv.algorithm for conv in convolutions] == [
        "picky" if conv.stride == 1 else "aten" for conv in convolutions
    ]
    assert (ran, refused) == (2, "stride must be 1")
    names = [each.name for each in networks.model_candidates(None, deployed, x, [torch.contiguous_format])]
    assert names[-1] == "fused conv3x3 picky in 2 of 7 layers, aten in the others"


def test_random_statistics_do_not_vanish_or_explode() -> None:
    """Otherwise a comparison of outputs would compare zeros, or rounding errors of another magnitude."""
    trained, _, x = small_network()
    with torch.inference_mode():
        assert 1e-2 < trained(x).std().item() < 1e2
    state = trained.state_dict()
    assert state["stage1.0.rbr_dense.bn.running_var"].std() > 0.1
    assert torch.equal(state["linear.weight"], networks.randomise_(digits.build_model()).state_dict()["linear.weight"])


def test_cudnn_benchmark_is_restored() -> None:
    before = torch.backends.cudnn.benchmark
    with baselines.cudnn_benchmark():
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == before


def test_tf32_widens_the_bound_only_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = torch.ones(3)
    cpu = suites.Setup(torch.device("cpu"), torch.float32)
    gpu = suites.Setup(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert checks.with_tf32(bound, 18, cpu.tf32) is bound
    assert checks.with_tf32(bound, 18, suites.Setup(torch.device("cuda"), torch.float16).tf32) is bound
    # 18 products of factors cut to 10 bits: 2 * 2^-10 of the magnitudes, where the bound was 18 * 2^-24 of them.
    assert checks.with_tf32(bound, 18, gpu.tf32)[0].item() == pytest.approx(1 + 2**-9 / (18 * 2**-24), rel=1e-3)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert checks.with_tf32(bound, 18, gpu.tf32) is bound
