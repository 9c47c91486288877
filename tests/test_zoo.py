# SPDX-License-Identifier: MIT
"""Checkpoints of other code bases: recognised by their keys, folded, renamed; wrong and doubtful ones refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm_models
import torch
import zoo_networks
from torch import Tensor, nn

from repvgg_cuda import testing
from repvgg_cuda.models import create_model
from repvgg_cuda.recognition import recognise
from repvgg_cuda.reference import fold_fp64
from repvgg_cuda.renaming import FAMILIES, Renamer
from repvgg_cuda.state_dict import fuse_state_dict, load_into, plan
from repvgg_cuda.verification import NETWORK_FACTOR, verify
from repvgg_cuda.zoo import ZOOS

State = dict[str, Tensor]
CASES = zoo_networks.CASES


def error_text(function: Callable[[], object]) -> str:
    """The text of the error, which must be a single line."""
    with pytest.raises(RuntimeError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@functools.cache
def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm_models.randomised(CASES[name].make())


def image(size: int = 33) -> Tensor:
    return torch.randn(2, 3, size, size + 5, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_as_accurate_as_trained(trained: nn.Module, deployed: nn.Module, x: Tensor) -> None:
    """Both in float32 against the trained network in float64; verification.py says why the factor."""
    oracle = copy.deepcopy(trained).double()(x.double())
    trained_error, deployed_error = (float((model(x) - oracle).abs().max()) for model in (trained, deployed))
    assert oracle.abs().max() > 0
    assert deployed_error <= NETWORK_FACTOR * trained_error


# ----------------------------------------------------------------------------------------------------- every zoo


@pytest.mark.parametrize("name", CASES)
def test_zoo_and_form_are_told_by_the_keys(name: str) -> None:
    state = network(name).state_dict()
    found = recognise(list(state), source=CASES[name].options.get("source", "auto"))
    assert (found.zoo.name, found.form, found.known) == (CASES[name].zoo, "train", True)


@pytest.mark.parametrize("name", CASES)
def test_every_block_is_folded_as_its_modules_say(name: str) -> None:
    model = network(name)
    state, report = fuse_state_dict(model.state_dict(), **CASES[name].options)
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, zoo_networks.Block)}
    assert set(report.blocks) == set(blocks)
    for path, block in blocks.items():
        where = f"{path}.{block.deploy_name}." if block.deploy_name else f"{path}."
        exact, bounds = fold_fp64(block.branches()), testing.fold_bound(block.branches(), torch.float32)
        for part, value, bound in zip(("weight", "bias"), exact, bounds, strict=True):
            folded = state[where + part]
            if folded.dim() == 4 and folded.shape[2] == 1:
                value, bound = value[:, :, 1:2, 1:2], bound[:, :, 1:2, 1:2]
            assert folded.shape == value.shape
            assert ((folded - value).abs() <= bound).all(), path


@pytest.mark.parametrize("name", CASES)
def test_result_loads_strictly_and_computes_the_same(name: str) -> None:
    model = network(name)
    state, _ = fuse_state_dict(model.state_dict(), **CASES[name].options)
    deployed = zoo_networks.deployed(model)
    deployed.load_state_dict(state, strict=True)
    assert_as_accurate_as_trained(model, deployed.eval(), image())


@pytest.mark.parametrize("name", CASES)
def test_eps_is_the_one_the_zoo_trains_with_and_is_stated(name: str) -> None:
    model = network(name)
    (eps,) = {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    report = fuse_state_dict(model.state_dict(), **CASES[name].options).report
    assert report.eps == ZOOS[CASES[name].zoo].eps == eps
    assert f"BatchNorm eps {eps:g}, with which {ZOOS[CASES[name].zoo].title} trains" in str(report)
    given = fuse_state_dict(model.state_dict(), eps=2e-4, **CASES[name].options).report
    assert given.eps == 2e-4
    assert "BatchNorm eps 0.0002, as given" in str(given)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("RepViT")])
def test_deploy_form_is_recognised(name: str) -> None:
    case = CASES[name]
    keys = list(fuse_state_dict(network(name).state_dict(), **case.options).state)
    if case.zoo == "ultralytics":  # any of its convolutions is called `conv`
        assert "has no block with the keys of Ultralytics" in error_text(lambda: recognise(keys, source="ultralytics"))
        return
    found = recognise(keys)
    assert found.form == "deploy"
    if case.zoo not in ("qarepvgg",):  # whose deploy form is that of official RepVGG
        assert found.zoo.name == case.zoo
    state = dict.fromkeys(keys, torch.zeros(1, 1, 3, 3))
    assert "already in deploy form: there is nothing to fold" in error_text(lambda: fuse_state_dict(state))


def one_block(name: str) -> tuple[str, State, list[str]]:
    """The last block of a network: its path, its tensors on the meta device, and those keys that the fold takes in."""
    model = network(name)
    path = [path for path, module in model.named_modules() if isinstance(module, zoo_networks.Block)][-1]
    state = {key: value.to("meta") for key, value in model.state_dict().items() if key.startswith(f"{path}.")}
    keys = [key for key in state if not key.endswith("num_batches_tracked") and ".se" not in key]
    return path, state, keys


@pytest.mark.parametrize("name", CASES)
def test_each_missing_tensor_is_named(name: str) -> None:
    path, state, keys = one_block(name)
    plan(state, source=CASES[name].zoo)
    for lost in keys:
        damaged = {key: value for key, value in state.items() if key != lost}
        text = error_text(lambda damaged=damaged: plan(damaged, source=CASES[name].zoo))  # type: ignore[misc]
        assert path in text or "has no block" in text, lost


@pytest.mark.parametrize("name", CASES)
def test_each_wrong_shape_is_named(name: str) -> None:
    path, state, keys = one_block(name)
    for key in keys:
        for wrong in (torch.ones(3), state[key][..., None], state[key][:0]):
            damaged = {**state, key: wrong.to("meta")}
            assert path in error_text(lambda damaged=damaged: plan(damaged, source=CASES[name].zoo)), key  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------- timm

TIMM = ["repvgg_a0", "mobileone_s0", "repvit_m1", "repvit_m1_1", "repghostnet_050"]
TIMM_SLOW = ["repvgg_b1g4", "repvgg_d2se", "mobileone_s1", "mobileone_s4", "repvit_m0_9", "repghostnet_200"]


@pytest.mark.parametrize("name", [*TIMM, *(pytest.param(name, marks=pytest.mark.slow) for name in TIMM_SLOW)])
def test_timm_checkpoints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against timm's own reparameterize_model in float64; it builds some layers in the default dtype."""
    model = timm_models.create(name)
    bns = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    state, report = fuse_state_dict(model.state_dict())
    assert {bn.eps for bn in bns} == {report.eps}
    torch.set_default_dtype(torch.float64)
    try:
        exact = timm_models.import_timm().models.reparameterize_model(model.double())
    finally:
        torch.set_default_dtype(torch.float32)
    wanted = {key: value for key, value in exact.state_dict().items() if not key.endswith("id_tensor")}
    assert set(state) == set(wanted)
    unit, smallest = testing.unit_roundoff(torch.float32), torch.finfo(torch.float32).tiny
    for key, value in wanted.items():
        if value.is_floating_point():  # the one rounding to float32, and float64's own in sums that cancel
            bound = unit * (value.abs() * (1 + 2**-12) + 2**-24 * value.abs().max()) + smallest
            assert ((state[key] - value).abs() <= bound).all(), key


@pytest.mark.parametrize(
    "name", ["repvgg_a0", *(pytest.param(n, marks=pytest.mark.slow) for n in ("repvgg_b1g4", "repvgg_d2se"))]
)
def test_timm_checkpoints_of_repvgg_run_in_the_models_of_this_package(name: str) -> None:
    timm_model = timm_models.create(name)
    official = "RepVGG-" + name.removeprefix("repvgg_").capitalize()
    trained, deployed = create_model(official), create_model(official, deploy=True)
    state = timm_model.state_dict()
    load_into(trained, fuse_state_dict(state, target="official", fold=False).state)
    load_into(deployed, fuse_state_dict(state, target="official").state)
    x = image(40)
    with torch.no_grad():
        torch.testing.assert_close(trained.eval()(x), timm_model(x))  # the same layers in the same order
    assert verify(trained.eval(), deployed.eval(), x).ok


# ---------------------------------------------------------------------------------------------------------- names

PAIRS = [
    (family, source, target)
    for family, zoos in FAMILIES.items()
    for source in zoos
    for target in zoos
    if "qarepvgg" not in (source, target) and source != target
]


def family_state(family: str, zoo: str) -> State:
    """A train-form state_dict of the small networks above, under the names of ``zoo``."""
    state = network(f"mmpretrain {family}").state_dict()
    return fuse_state_dict(state, target=zoo, fold=False).state if zoo != "mmpretrain" else state


@pytest.mark.parametrize(("family", "source", "target"), PAIRS)
@pytest.mark.parametrize("fold", [False, True])
def test_keys_are_renamed_there_and_back(family: str, source: str, target: str, fold: bool) -> None:
    state = family_state(family, source)
    renamed, report = fuse_state_dict(state, target=target, fold=fold)
    assert (report.source.name, report.target.name) == (source, target)
    assert recognise(list(renamed)).zoo.name == target
    back = fuse_state_dict(renamed, target=source, fold=False).state
    expected = fuse_state_dict(state, fold=fold).state
    assert list(back) == list(expected)
    assert all(torch.equal(back[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("official", "timm", "mmpretrain"),
    [
        ("stage0.rbr_dense.conv.weight", "stem.conv_kxk.conv.weight", "backbone.stem.branch_3x3.conv.weight"),
        ("stage1.0.rbr_1x1.bn.bias", "stages.0.0.conv_1x1.bn.bias", "backbone.stage_1.0.branch_1x1.norm.bias"),
        ("stage3.12.rbr_identity.bias", "stages.2.12.identity.bias", "backbone.stage_3.12.branch_norm.bias"),
        ("stage4.0.se.down.bias", "stages.3.0.attn.fc1.bias", "backbone.stage_4.0.se_layer.conv1.conv.bias"),
        ("stage2.1.rbr_reparam.bias", "stages.1.1.reparam_conv.bias", "backbone.stage_2.1.branch_reparam.bias"),
        ("linear.weight", "head.fc.weight", "head.fc.weight"),
    ],
)
def test_names_of_repvgg(official: str, timm: str, mmpretrain: str) -> None:
    zoos = {"official": official, "timm": timm, "mmpretrain": mmpretrain}
    for source, key in zoos.items():
        for target, expected in zoos.items():
            assert Renamer("RepVGG", source, target)(key) == expected


def test_qarepvgg_deploys_to_the_keys_of_repvgg() -> None:
    state = network("QARepVGG V2").state_dict()
    renamed = fuse_state_dict(state, target="timm").state
    assert set(map(Renamer("RepVGG", "official", "timm"), fuse_state_dict(state).state)) == set(renamed)
    text = error_text(lambda: fuse_state_dict(state, target="timm", fold=False))
    assert "stage0.rbr_1x1.weight has no place in a RepVGG of timm" in text


def test_what_has_no_place_elsewhere_is_named() -> None:
    state = family_state("RepVGG", "official") | {"extra.weight": torch.ones(1)}
    assert "extra.weight has no place in a RepVGG of timm" in error_text(lambda: fuse_state_dict(state, target="timm"))
    text = error_text(lambda: fuse_state_dict(network("YOLOv7").state_dict(), target="timm"))
    assert "--to timm: keys can be renamed within RepVGG (official, " in text
    text = error_text(lambda: fuse_state_dict(family_state("MobileOne", "timm"), target="official"))
    assert "these are MobileOne of timm" in text


# ------------------------------------------------------------------------------------------------- doubtful cases


def official(prefix: str = "", seed: int = 0) -> State:
    block = zoo_networks.repvgg("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam", ("conv", "bn"))(8, 8)
    return {prefix + key: value for key, value in timm_models.randomised(block, seed).state_dict().items()}


def test_blocks_of_two_zoos_are_refused() -> None:
    both = official("stage1.1.") | {
        key.replace("backbone.", "other."): value for key, value in network("mmpretrain RepVGG").state_dict().items()
    }
    text = error_text(lambda: fuse_state_dict(both))
    assert "has blocks of several zoos, and none knows all: official RepVGG (stage1.1); " in text
    assert "mmpretrain (other.stem, other.stage_1.0, " in text


def test_keys_of_two_networks_are_refused() -> None:
    both = official("stage1.1.") | official("backbone.ERBlock_2.1.block.0.")
    text = error_text(lambda: fuse_state_dict(both))
    assert "could be of several zoos: official (stage1.1.rbr_dense.conv.weight); yolov6 (backbone.ERBlock_2." in text
    assert fuse_state_dict(both, source="yolov6").report.eps == 1e-3
    assert fuse_state_dict(both, source="official").report.eps == 1e-5


@pytest.mark.parametrize("prefix", ["", "encoder.layer3."])
def test_network_that_is_nobodys_gets_a_warning_unless_eps_is_given(prefix: str) -> None:
    report = fuse_state_dict(official(prefix)).report
    (warning,) = report.warnings
    assert "the network around them is none of its own" in warning
    assert "say so with --eps" in warning
    assert fuse_state_dict(official(prefix), eps=1e-3).report.warnings == ()
    assert fuse_state_dict(official(prefix), source="official").report.warnings == ()
    assert fuse_state_dict(official("backbone.stage2.3."), eps=None).report.warnings == ()


def test_eps_without_a_fold_is_refused() -> None:
    state = family_state("RepVGG", "timm")
    for given, options in ((state, {"fold": False}), (fuse_state_dict(state).state, {"target": "official"})):
        text = error_text(lambda given=given, options=options: fuse_state_dict(given, eps=1e-3, **options))  # type: ignore[misc]
        assert "eps is that of BatchNorms to be folded, and nothing is folded here" in text


def test_ultralytics_must_be_named() -> None:
    state = network("Ultralytics").state_dict()
    text = error_text(lambda: fuse_state_dict(state))
    assert "may be one of Ultralytics or YOLOv9: if so, say --from ultralytics" in text


def test_unknown_zoo() -> None:
    for options in ({"source": "keras"}, {"target": "keras"}):
        text = error_text(lambda options=options: fuse_state_dict(official(), **options))  # type: ignore[misc]
        assert "there is no zoo 'keras'; the names are " in text
    assert "has no block with the keys of timm" in error_text(lambda: fuse_state_dict(official(), source="timm"))


@pytest.mark.parametrize("name", ["mmpretrain RepVGG", "Apple MobileOne"])
def test_lost_identity_is_missed(name: str) -> None:
    state = network(name).state_dict()
    slot = {"mmpretrain RepVGG": "stage_1.1.branch_norm", "Apple MobileOne": "stage1.1.rbr_skip"}[name]
    lost = {key: value for key, value in state.items() if slot not in key}
    assert len(lost) < len(state)
    assert f"{slot}.weight is missing" in error_text(lambda: fuse_state_dict(lost))


def test_lost_identity_of_a_grouped_block_is_missed() -> None:
    state = create_model("RepVGG-B1g4").state_dict()
    lost = {key: value for key, value in state.items() if "stage2.1.rbr_identity" not in key}
    assert "stage2.1.rbr_identity.weight is missing" in error_text(lambda: fuse_state_dict(lost))


def test_identity_that_only_the_stride_would_tell_is_refused() -> None:
    state = {key: value for key, value in network("QARepVGG V2").state_dict().items() if key.startswith("stage1.1.")}
    renamed = {key.replace("stage1.1", "encoder.block"): value for key, value in state.items()}
    text = error_text(lambda: fuse_state_dict(renamed))
    assert "encoder.block may have as many output as input channels, and its keys do not say whether it has" in text


@pytest.mark.parametrize("extra", ["se.down.weight", "rbr_1x1.bias"])
def test_what_qarepvgg_does_not_fold_is_refused(extra: str) -> None:
    """SE between the sum and its BatchNorm; a 1x1 convolution with a bias, which other blocks of QARepVGG's code have
    with the BatchNorm elsewhere."""
    state = network("QARepVGG V2").state_dict() | {f"stage1.1.{extra}": torch.ones(8)}
    assert f"stage1.1 has tensors that no QARepVGG block has ({extra})" in error_text(lambda: fuse_state_dict(state))


def test_distilled_head_of_another_width_is_refused() -> None:
    state = dict(network("RepViT").state_dict())
    state["classifier.classifier_dist.l.weight"] = torch.ones(3, 12)
    text = error_text(lambda: fuse_state_dict(state))
    assert "classifier.classifier_dist.l.weight must be [5, 12] of floating point, got [3, 12]" in text


def test_wide_kernels_are_refused() -> None:
    state = dict(family_state("MobileOne", "timm"))
    state["stages.0.0.conv_kxk.1.conv.weight"] = torch.ones(8, 1, 7, 7)
    text = error_text(lambda: fuse_state_dict(state))
    assert (
        "stages.0.0.conv_kxk.1.conv.weight must be [C_out, C_in / groups, 3, 3] or [C_out, C_in / groups, 1, 1]" in text
    )


def test_result_shares_no_more_than_it_says() -> None:
    state: dict[str, Any] = dict(network("YOLOv7").state_dict())
    before = {key: value.clone() for key, value in state.items()}
    folded = fuse_state_dict(state).state
    assert folded["model.0.conv.weight"] is state["model.0.conv.weight"]
    assert all(torch.equal(state[key], value) for key, value in before.items())
