# SPDX-License-Identifier: MIT
"""Checkpoints: reading any wrapping, refusing what cannot be read or folded, folding by keys alone, atomic writing."""

from __future__ import annotations

import json
import logging
import pickle
import stat
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from repvgg_cuda import testing
from repvgg_cuda.branches import Branches
from repvgg_cuda.checkpoint import (
    convert_file,
    form_of,
    fuse_state_dict,
    load_into,
    load_state_dict_file,
    parameter_count,
    read_state_dict_file,
    save_state_dict_file,
)
from repvgg_cuda.models import RepVGG, RepVGGplus, create_model
from repvgg_cuda.modules import RepVGGBlock
from repvgg_cuda.reference import fold_fp64
from repvgg_cuda.tensor_files import SafetensorsReader
from repvgg_cuda.verification import verify

State = dict[str, Tensor]
ModelT = TypeVar("ModelT", bound=nn.Module)


def convert_state_dict(state: State, **options: Any) -> State:
    return fuse_state_dict(state, **options).state


SUFFIXES = [".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".PTH"]


def block_state(name: str, branches: Branches, dtype: torch.dtype = torch.float32) -> State:
    """A block of testing.random_branches (3x3, 1x1, identity) under the official keys, in the official order."""
    state: State = {}

    def add_batchnorm(prefix: str, branch: int) -> None:
        bn = branches.parts[branch].bn
        assert bn is not None
        if bn.weight is not None and bn.bias is not None:
            state[f"{prefix}.weight"], state[f"{prefix}.bias"] = bn.weight.to(dtype), bn.bias.to(dtype)
        state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"] = bn.mean.to(dtype), bn.var.to(dtype)
        state[f"{prefix}.num_batches_tracked"] = torch.tensor(7)

    if len(branches.parts) == 3:
        add_batchnorm(f"{name}rbr_identity", 2)
    for branch, prefix in enumerate((f"{name}rbr_dense", f"{name}rbr_1x1")):
        part = branches.parts[branch]
        assert part.kernel is not None
        state[f"{prefix}.conv.weight"] = part.kernel.to(dtype)
        if part.bias is not None:
            state[f"{prefix}.conv.bias"] = part.bias.to(dtype)
        add_batchnorm(f"{prefix}.bn", branch)
    return state


def train_state(dtype: torch.dtype = torch.float32) -> State:
    """Two blocks, the second with SE and an identity, and a head: the smallest state_dict with every kind of key."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    state = block_state("stage0.", testing.random_branches(3, 8, seed=1), dtype)
    state |= {"stage1.0.se.down.weight": normal(1, 8, 1, 1), "stage1.0.se.down.bias": normal(1)}
    state |= {"stage1.0.se.up.weight": normal(8, 1, 1, 1), "stage1.0.se.up.bias": normal(8)}
    state |= block_state("stage1.0.", testing.random_branches(8, 8, seed=2), dtype)
    return state | {"linear.weight": normal(5, 8), "linear.bias": normal(5)}


def deploy_state() -> State:
    return convert_state_dict(train_state())


def assert_same(actual: State, expected: State) -> None:
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert torch.equal(actual[key], value), key


def error_text(function: Callable[[], object], kind: type[Exception] = RuntimeError) -> str:
    """The text of the error, which must be a single line."""
    with pytest.raises(kind) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_round_trip(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    state = train_state(dtype)
    save_state_dict_file(state, tmp_path / f"model{suffix}")
    assert_same(load_state_dict_file(tmp_path / f"model{suffix}"), state)


def test_torch_files_keep_the_order_of_the_keys(tmp_path: Path) -> None:
    save_state_dict_file(train_state(), tmp_path / "model.pth")
    assert list(load_state_dict_file(tmp_path / "model.pth")) == list(train_state())


@pytest.mark.parametrize(
    "prefixes", [[], ["module."], ["_orig_mod."], ["_orig_mod.", "module."], ["module.", "model."]]
)
@pytest.mark.parametrize("containers", [[], ["state_dict"], ["model"], ["ema"], ["model_ema", "state_dict"]])
def test_wrappers_are_removed_and_noted(tmp_path: Path, prefixes: list[str], containers: list[str]) -> None:
    content: dict[str, object] = {"".join(prefixes) + key: value for key, value in train_state().items()}
    for container in reversed(containers):
        content = {"epoch": 3, container: content, "best": None}
    torch.save(content, tmp_path / "model.pth")
    loaded = read_state_dict_file(tmp_path / "model.pth")
    assert_same(loaded.state, train_state())
    assert [note for note in loaded.notes if note.startswith("took")] == [
        f"took '{container}' of epoch, {container}, best" for container in containers
    ]
    removed = [note for note in loaded.notes if note.startswith("removed")]
    assert removed == [f"removed the prefix '{prefix}' from every key" for prefix in prefixes]
    assert loaded.warnings == ()


def test_prefix_of_some_keys_only_is_kept(tmp_path: Path) -> None:
    state = {"module." + key: value for key, value in train_state().items()} | {"n_averaged": torch.tensor(3)}
    torch.save(state, tmp_path / "model.pth")
    assert_same(load_state_dict_file(tmp_path / "model.pth"), state)


def test_model_is_preferred_to_its_average_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    average = {key: value + 1 for key, value in train_state().items()}
    torch.save({"ema": average, "model": train_state(), "optimizer": {"lr": 0.1}}, tmp_path / "model.pth")
    expected = "took 'model', not 'ema'; to use another, save it by itself"
    assert read_state_dict_file(tmp_path / "model.pth").warnings == (expected,)
    with caplog.at_level(logging.WARNING):
        assert_same(load_state_dict_file(tmp_path / "model.pth"), train_state())
    assert expected in caplog.text


def test_parameters_and_tensors_on_other_devices_come_as_plain_cpu_tensors(tmp_path: Path) -> None:
    torch.save(
        {key: nn.Parameter(value, value.is_floating_point()) for key, value in train_state().items()}, tmp_path / "a.pt"
    )
    assert {type(value) for value in load_state_dict_file(tmp_path / "a.pt").values()} == {Tensor}


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pth"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    assert str(tmp_path / name) in error_text(lambda: load_state_dict_file(tmp_path / name), FileNotFoundError)


@pytest.mark.parametrize("name", ["folder.safetensors", "folder.pth"])
def test_directory_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert name in error_text(lambda: load_state_dict_file(tmp_path / name), IsADirectoryError)


@pytest.mark.parametrize("name", ["model.onnx", "model", "model.tar", "safetensors"])
def test_unknown_extension(tmp_path: Path, name: str) -> None:
    accepted = "a checkpoint's name must end in one of .safetensors, .pth, .pt, .bin, .ckpt, .pth.tar"
    assert accepted in error_text(lambda: load_state_dict_file(tmp_path / name))
    assert accepted in error_text(lambda: save_state_dict_file(train_state(), tmp_path / name))
    assert not any(tmp_path.iterdir())


def damaged(data: bytes) -> dict[str, bytes]:
    """Files that are none: empty, cut off at every kind of place, of another kind, with a damaged beginning."""
    cuts = {f"cut at {n}": data[:n] for n in (1, 8, 20, len(data) // 2, len(data) - 30, len(data) - 1)}
    return {
        "empty": b"",
        **cuts,
        "text": b"hello, I am not a checkpoint\n" * 9,
        "zeros": bytes(500),
        "beginning": b"xx" + data[2:],
    }


@pytest.mark.parametrize(
    ("suffix", "legacy", "expected"),
    [
        (".safetensors", False, "is not a safetensors file, or is truncated or corrupt"),
        (".pth", False, "is not a PyTorch checkpoint, or is truncated or corrupt"),
        (".pth", True, "is not a PyTorch checkpoint, or is truncated or corrupt"),
    ],
)
def test_damaged_files(tmp_path: Path, suffix: str, legacy: bool, expected: str) -> None:
    path = tmp_path / f"model{suffix}"
    save_state_dict_file(train_state(), path)
    if legacy:
        torch.save(train_state(), path, _use_new_zipfile_serialization=False)
    assert_same(load_state_dict_file(path), train_state())
    for what, data in damaged(path.read_bytes()).items():
        path.write_bytes(data)
        text = error_text(lambda: load_state_dict_file(path))
        assert text.startswith(f"{path}: {expected}"), what


@pytest.mark.parametrize(("saved", "read"), [(".pth", ".safetensors"), (".safetensors", ".pth")])
def test_file_of_the_other_kind(tmp_path: Path, saved: str, read: str) -> None:
    save_state_dict_file(train_state(), tmp_path / f"model{saved}")
    (tmp_path / f"model{saved}").rename(tmp_path / f"model{read}")
    assert "is truncated or corrupt" in error_text(lambda: load_state_dict_file(tmp_path / f"model{read}"))


class RunsCode:
    """What a hostile pickle does: unpickling it calls a function, here one that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_need_code_are_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    contents = {"torch.nn.modules.linear.Linear": nn.Linear(2, 2), "Path.touch": {"model": RunsCode(tmp_path / "ran")}}
    for what, content in contents.items():
        torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=not legacy)
        text = error_text(lambda: load_state_dict_file(tmp_path / "model.pth"))
        assert f"{tmp_path / 'model.pth'}: holds more than tensors" in text
        assert "torch.save(model.state_dict()" in text
        assert "safetensors.torch.save_file(model.state_dict()" in text
        assert what.startswith("Path") or what in text
    assert not (tmp_path / "ran").exists()


def test_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(pickle.dumps({"a": 1}))
    assert "is not a PyTorch checkpoint" in error_text(lambda: load_state_dict_file(tmp_path / "model.pth"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.zeros(1)], "must hold a dict of tensors, got list"),
        (torch.zeros(1), "must hold a dict of tensors, got Tensor"),
        ({}, "holds no tensors"),
        ({"model": {}, "epoch": 1}, "holds no tensors"),
        ({"net": {"a": torch.zeros(1)}}, "got dict at the key 'net', and none of the containers state_dict, model, "),
        ({"a": torch.zeros(1), "epoch": 3}, "got int at the key 'epoch'"),
        ({"model": {"a": torch.zeros(1), "names": ["x"]}}, "got list at the key 'names'"),
        ({3: torch.zeros(1)}, "must hold a dict of tensors by name, got the key 3"),
    ],
)
def test_content_that_is_not_a_dict_of_tensors(tmp_path: Path, content: object, expected: str) -> None:
    torch.save(content, tmp_path / "model.pth")
    assert expected in error_text(lambda: load_state_dict_file(tmp_path / "model.pth"))


# ------------------------------------------------------------------------------------------------------------ form


def test_form_is_told_by_the_keys(tmp_path: Path) -> None:
    assert form_of(train_state()) == "train"
    assert form_of(deploy_state()) == "deploy"
    save_state_dict_file(deploy_state(), tmp_path / "RepVGG-A1-train.pth")
    assert form_of(load_state_dict_file(tmp_path / "RepVGG-A1-train.pth")) == "deploy"


def test_mixed_forms() -> None:
    mixed = train_state() | {"stage2.0.rbr_reparam.weight": torch.zeros(8, 8, 3, 3)}
    text = error_text(lambda: form_of(mixed))
    assert "in train form (stage0.rbr_dense.conv.weight) and in deploy form (stage2.0.rbr_reparam.weight)" in text
    assert "in train form" in error_text(lambda: convert_state_dict(mixed))


@pytest.mark.parametrize(
    ("key", "library"),
    [
        ("stages.1.0.branch_3x3.conv.weight", "super-gradients"),
        ("stage1.0.dbb_reparam.weight", "DiverseBranchBlock"),
        ("stages.1.blocks.0.token_mixer.mixer.conv_kxk.0.conv.weight", "FastViT"),
    ],
)
def test_keys_that_do_not_say_how_the_network_computes(key: str, library: str) -> None:
    text = error_text(lambda: convert_state_dict({"head.weight": torch.zeros(1), key: torch.zeros(1)}))
    assert f"has {library} keys ({key}), which do not say how it computes; build the model and convert that" in text


def test_no_block_at_all() -> None:
    state = {f"layer{i}.weight": torch.zeros(1) for i in range(5)}
    text = error_text(lambda: form_of(state))
    assert "has no RepVGG block" in text
    assert "found layer0.weight, layer1.weight, layer2.weight and 2 more" in text
    assert "found nothing" in error_text(lambda: form_of({}))


# ------------------------------------------------------------------------------------------------------ conversion


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "groups"), [(3, 8, 1), (8, 8, 1), (16, 16, 4), (6, 6, 6), (16, 16, 2), (8, 16, 4)]
)
def test_fold_is_exact_up_to_one_rounding(in_channels: int, out_channels: int, groups: int, dtype: torch.dtype) -> None:
    branches = testing.random_branches(in_channels, out_channels, groups, seed=groups)
    state = convert_state_dict(block_state("stage1.0.", branches, dtype))
    assert list(state) == ["stage1.0.rbr_reparam.weight", "stage1.0.rbr_reparam.bias"]
    rounded = Branches.from_op_args(
        [tensor.to(dtype) for tensor in branches.op_args()[0]], *branches.op_args()[1:]
    )  # what the checkpoint holds; the fold must add one rounding to that, not one per step
    bounds = testing.fold_bound(rounded, dtype)
    for value, exact, bound in zip(state.values(), fold_fp64(rounded), bounds, strict=True):
        assert value.dtype == dtype
        assert ((value.double() - exact).abs() <= bound).all(), testing.worst(value, exact, bound)


@pytest.mark.parametrize("variant", [{"bias": True}, {"affine": False}])
def test_optional_tensors(variant: dict[str, bool]) -> None:
    branches = testing.random_branches(8, 8, seed=3, **variant)  # type: ignore[arg-type]
    state = block_state("", branches)
    if variant.get("bias"):
        assert "rbr_dense.conv.bias" in state
    folded = convert_state_dict(state)
    for value, exact, bound in zip(
        folded.values(), fold_fp64(branches), testing.fold_bound(branches, torch.float32), strict=True
    ):
        assert ((value.double() - exact).abs() <= bound).all(), testing.worst(value, exact, bound)


def test_eps_is_used() -> None:
    branches = testing.random_branches(8, 8, seed=4, eps=1e-1)
    exact, _ = fold_fp64(branches)
    bound, _ = testing.fold_bound(branches, torch.float32)
    right = convert_state_dict(block_state("", branches), eps=1e-1)["rbr_reparam.weight"]
    wrong = convert_state_dict(block_state("", branches))["rbr_reparam.weight"]
    assert ((right - exact).abs() <= bound).all(), testing.worst(right, exact, bound)
    assert not ((wrong - exact).abs() <= bound).all()


def test_other_tensors_keep_value_and_order() -> None:
    state = train_state()
    folded, report = fuse_state_dict(state)
    assert list(folded) == [
        *("stage0.rbr_reparam.weight", "stage0.rbr_reparam.bias"),
        *("stage1.0.se.down.weight", "stage1.0.se.down.bias", "stage1.0.se.up.weight", "stage1.0.se.up.bias"),
        *("stage1.0.rbr_reparam.weight", "stage1.0.rbr_reparam.bias", "linear.weight", "linear.bias"),
    ]
    assert all(folded[key] is state[key] for key in folded if "rbr_reparam" not in key)
    assert report.blocks == ("stage0", "stage1.0")
    assert report.notes == ("BatchNorm eps 1e-05, with which official RepVGG trains; a state_dict does not carry it",)
    assert report.largest == max(float(folded[key].abs().max()) for key in folded if "rbr_reparam" in key)
    assert_same(state, train_state())  # the trained state is not touched


def test_progress_is_reported_block_by_block() -> None:
    seen: list[str] = []
    fuse_state_dict(train_state(), on_block=seen.append)
    assert seen == ["stage0", "stage1.0"]


def test_parameter_count_leaves_statistics_out() -> None:
    per_batchnorm = 2 * 8
    expected = (8 * 3 * 10 + 2 * per_batchnorm) + (8 * 8 * 10 + 3 * per_batchnorm) + (8 + 1 + 8 + 8) + (5 * 8 + 5)
    assert parameter_count(train_state()) == expected


def test_repvggplus_keys() -> None:
    state = block_state("stage3_first.blocks.0.", testing.random_branches(4, 4, seed=5))
    state |= {"stage3_first.blocks.0.post_se.down.weight": torch.ones(1, 4, 1, 1)}
    aux = {"stage3_first_aux.0.conv.weight": torch.ones(4, 4, 3, 3), "stage3_first_aux.3.weight": torch.ones(5, 4)}
    folded, report = fuse_state_dict(state | aux | {"linear.weight": torch.ones(5, 4)})
    assert list(folded) == [
        *("stage3_first.blocks.0.rbr_reparam.weight", "stage3_first.blocks.0.rbr_reparam.bias"),
        *("stage3_first.blocks.0.post_se.down.weight", "linear.weight"),
    ]
    assert "dropped the auxiliary heads stage3_first_aux, which serve training only" in report.notes


def test_already_in_deploy_form() -> None:
    assert "already in deploy form" in error_text(lambda: convert_state_dict(deploy_state()))


@pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf")])
def test_bad_eps(eps: float) -> None:
    assert "eps must be a finite number of at least 0" in error_text(lambda: convert_state_dict(train_state(), eps=eps))


#: Every key of a block but the counters and one half of "affine".
NEEDED = sorted(
    key
    for key in block_state("stage1.0.", testing.random_branches(8, 8))
    if not key.endswith(("num_batches_tracked", "rbr_dense.conv.weight"))
)


@pytest.mark.parametrize("key", NEEDED)
def test_missing_key_is_named(key: str) -> None:
    state = train_state()
    del state[key]
    text = error_text(lambda: convert_state_dict(state))
    assert text == f"{key} is missing: stage1.0 is not a complete RepVGG block"


def test_missing_dense_branch_is_named() -> None:
    state = {key: value for key, value in train_state().items() if not key.startswith("stage1.0.rbr_dense")}
    text = error_text(lambda: convert_state_dict(state))
    assert text == "stage1.0.rbr_dense.conv.weight is missing: stage1.0 is not a complete RepVGG block"


def test_counters_may_be_missing() -> None:
    state = {key: value for key, value in train_state().items() if not key.endswith("num_batches_tracked")}
    assert_same(convert_state_dict(state), deploy_state())


@pytest.mark.parametrize(
    "key",
    ["bn.weight", "rbr_dense.conv.scale", "rbr_identity.conv.weight", "rbr_scale.weight", "rbr_1x1_2.conv.weight"],
)
def test_tensors_that_a_block_has_not_are_refused(key: str) -> None:
    text = error_text(lambda: convert_state_dict(train_state() | {f"stage1.0.{key}": torch.ones(8)}))
    assert f"stage1.0 has tensors that no RepVGG block has ({key})" in text


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("stage1.0.rbr_dense.conv.weight", [8, 8, 5, 5], "must be [C_out, C_in / groups, 3, 3], got [8, 8, 5, 5]"),
        ("stage1.0.rbr_dense.conv.weight", [8, 8, 3], "must be [C_out, C_in / groups, 3, 3], got [8, 8, 3]"),
        ("stage1.0.rbr_1x1.conv.weight", [8, 8, 3, 3], "must be [C_out, C_in / groups, 1, 1], got [8, 8, 3, 3]"),
        (
            "stage1.0.rbr_1x1.conv.weight",
            [8, 4, 1, 1],
            "stage1.0.rbr_1x1.conv.weight must be [8, 8, 1, 1] to fit the other tensors of stage1.0, got [8, 4, 1, 1]",
        ),
        ("stage1.0.rbr_identity.running_var", [4], "stage1.0.rbr_identity.running_var must be [8] to fit"),
        ("stage1.0.rbr_dense.conv.weight", [8, 3, 3, 3], "which needs in_channels == out_channels, got 6 and 8"),
    ],
)
def test_wrong_shapes(key: str, shape: list[int], expected: str) -> None:
    state = train_state() | {key: torch.ones(shape)}
    if shape == [8, 3, 3, 3]:
        state["stage1.0.rbr_1x1.conv.weight"] = torch.ones(8, 3, 1, 1)
    text = error_text(lambda: convert_state_dict(state))
    assert expected in text
    assert "stage1.0" in text


def test_integer_weights_are_refused() -> None:
    state = train_state() | {"stage0.rbr_dense.conv.weight": torch.ones(8, 3, 3, 3, dtype=torch.int8)}
    assert "stage0 cannot be folded" in error_text(lambda: convert_state_dict(state))


@pytest.mark.parametrize("key", ["rbr_1x1.bn.running_mean", "rbr_1x1.bn.running_var", "rbr_dense.conv.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(key: str, value: float) -> None:
    state = train_state()
    state[f"stage1.0.{key}"].view(-1)[3] = value
    assert error_text(lambda: convert_state_dict(state)).startswith(f"stage1.0.{key} holds {value}: ")


def test_negative_variance_is_named_even_where_eps_would_hide_it() -> None:
    state = train_state()
    state["stage1.0.rbr_identity.running_var"][2] = -1e-7
    text = error_text(lambda: convert_state_dict(state))
    assert text.startswith("stage1.0.rbr_identity.running_var holds -1e-07, and a variance is at least 0")


@pytest.mark.parametrize("key", ["rbr_1x1.bn.weight", "rbr_dense.bn.running_mean", "rbr_1x1.conv.weight"])
def test_zero_length_tensors_are_not_taken_for_absent_ones(key: str) -> None:
    state = train_state()
    state[f"stage1.0.{key}"] = state[f"stage1.0.{key}"][:0]
    assert error_text(lambda: convert_state_dict(state)).startswith(f"stage1.0.{key} must be [8")


def test_a_block_of_zero_channels_is_refused() -> None:
    state = {
        key: value[:0] if value.dim() else value
        for key, value in block_state("", testing.random_branches(8, 8)).items()
    }
    assert "rbr_dense.conv.weight is empty ([0, 8, 3, 3])" in error_text(lambda: convert_state_dict(state))


def test_overflow_of_a_16_bit_dtype_is_refused() -> None:
    state = train_state(torch.float16)
    state["stage0.rbr_dense.bn.running_var"] = torch.zeros(8, dtype=torch.float16)
    state["stage0.rbr_dense.conv.weight"] = torch.full((8, 3, 3, 3), 6e4, dtype=torch.float16)
    assert "stage0 folds to NaN or infinity in float16" in error_text(lambda: convert_state_dict(state))


# --------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(("state", "form"), [(train_state(), "train"), (deploy_state(), "deploy")])
def test_safetensors_metadata(tmp_path: Path, state: State, form: str) -> None:
    save_state_dict_file(state, tmp_path / "model.safetensors")
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "repvgg_cuda": form}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_views_and_aliases_are_written_alone(tmp_path: Path, suffix: str) -> None:
    state = deploy_state()
    table = torch.arange(1_000_000.0).reshape(1000, 1000)
    state |= {"linear.weight": table[:2, ::2], "aux.weight": table[0, :3], "linear.bias": table[0, :3]}
    state |= {"whole.weight": state["stage0.rbr_reparam.bias"]}
    save_state_dict_file(state, tmp_path / f"model{suffix}")
    assert_same(load_state_dict_file(tmp_path / f"model{suffix}"), state)
    assert (tmp_path / f"model{suffix}").stat().st_size < 100_000


def test_not_a_repvgg_state_dict_is_not_written(tmp_path: Path) -> None:
    text = error_text(lambda: save_state_dict_file({"a": torch.zeros(1)}, tmp_path / "model.pth"))
    assert "has no RepVGG block" in text
    assert not any(tmp_path.iterdir())


def test_new_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_state_dict_file(train_state(), tmp_path / "model.pth")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "model.pth")}
    assert len(modes) == 1


def test_symbolic_link_is_written_through(tmp_path: Path) -> None:
    save_state_dict_file(train_state(), tmp_path / "model.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "model.pth")
    save_state_dict_file(deploy_state(), tmp_path / "link.pth")
    assert (tmp_path / "link.pth").is_symlink()
    assert form_of(load_state_dict_file(tmp_path / "model.pth")) == "deploy"


def raise_on_call(error: BaseException) -> Callable[..., None]:
    def function(*args: object, **kwargs: object) -> None:
        raise error

    return function


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()], ids=repr
)
@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "the serializer"])
def test_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException, suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    save_state_dict_file(train_state(), path)
    before = path.read_bytes()
    serializer = {".pth": "torch.save", ".safetensors": "safetensors.torch.save"}[suffix]
    monkeypatch.setattr(serializer if function == "the serializer" else function, raise_on_call(error))
    with pytest.raises(type(error)) as caught:
        save_state_dict_file(deploy_state(), path)
    if function.startswith("os.") and isinstance(error, OSError):
        assert str(caught.value) == f"[Errno 28] No space left on device: '{path}'"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_file_stands_beside_the_target_until_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """os.replace is atomic only within a file system, and only if what it moves is complete and on the disk."""
    calls: list[str] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: calls.append("fsync"))

    def replace(source: Path, target: Path) -> None:
        calls.append("replace")
        assert source.parent == target.parent == tmp_path
        assert source != target
        source.rename(target.with_name("complete.pth"))

    monkeypatch.setattr("os.replace", replace)
    save_state_dict_file(train_state(), tmp_path / "model.pth")
    assert calls == ["fsync", "replace"]
    assert_same(load_state_dict_file(tmp_path / "complete.pth"), train_state())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_unwritable_targets(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / f"folder{suffix}").mkdir()
    cases = {
        tmp_path / "missing" / f"model{suffix}": FileNotFoundError,
        tmp_path / "file" / f"model{suffix}": NotADirectoryError,
        tmp_path / f"folder{suffix}": IsADirectoryError,
    }
    for path, kind in cases.items():
        assert error_text(lambda path=path: save_state_dict_file(train_state(), path), kind).endswith(f"'{path}'")  # type: ignore[misc]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", f"folder{suffix}"]


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", raise_on_call(PermissionError(13, "Permission denied", "the temporary name")))
    text = error_text(lambda: save_state_dict_file(train_state(), tmp_path / "model.pth"), PermissionError)
    assert text == f"[Errno 13] Permission denied: '{tmp_path / 'model.pth'}'"


# ----------------------------------------------------------------------------------------------------- file to file


@pytest.mark.parametrize("target", [".safetensors", ".pth"])
@pytest.mark.parametrize("source", [".safetensors", ".pth"])
def test_files_are_converted_as_state_dicts_are(tmp_path: Path, source: str, target: str) -> None:
    state = {"module." + key: value for key, value in train_state().items()}
    path = tmp_path / f"in{source}"
    torch.save({"model": state}, path) if source == ".pth" else safetensors.torch.save_file(state, path)
    report = convert_file(path, tmp_path / f"out{target}")
    assert_same(load_state_dict_file(tmp_path / f"out{target}"), deploy_state())
    assert "removed the prefix 'module.' from every key" in report.notes
    assert (report.blocks, report.parameters_after) == (("stage0", "stage1.0"), parameter_count(deploy_state()))


def test_written_files_are_those_of_the_library(tmp_path: Path) -> None:
    """Odd sizes of narrow dtypes between wide ones: each tensor must lie where its dtype may."""
    state: State = {
        f"{prefix}{key}": value for prefix in ("a.", "b.") for key, value in train_state(torch.bfloat16).items()
    }
    state |= {"c.flag": torch.tensor([True, False, True]), "c.half": torch.ones(3).half(), "c.none": torch.empty(0, 4)}
    state |= {
        "c.byte": torch.tensor(7, dtype=torch.uint8),
        "d.count": torch.tensor(2**40),
        "d.wide": torch.ones(5).double(),
    }
    safetensors.torch.save_file(state, tmp_path / "in.safetensors")
    convert_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert_same(safetensors.torch.load_file(tmp_path / "out.safetensors"), convert_state_dict(state))
    header = json.loads((tmp_path / "out.safetensors").read_bytes()[8:].partition(b"}}")[0] + b"}}")
    sizes = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "BOOL": 1}
    del header["__metadata__"]
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())


def test_safetensors_are_converted_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve blocks, at most one is in memory when the next is begun."""
    state: State = {}
    for i in range(12):
        state |= block_state(f"stage3.{i + 1}.", testing.random_branches(8, 8, seed=i))
    safetensors.torch.save_file(state, tmp_path / "in.safetensors")
    loaded: list[weakref.ref[Tensor]] = []
    load = SafetensorsReader.load

    def load_and_watch(self: SafetensorsReader, key: str) -> Tensor:
        tensor = load(self, key)
        loaded.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(SafetensorsReader, "load", load_and_watch)
    monkeypatch.setattr("repvgg_cuda.tensor_files._REOPEN_AFTER", 1000)  # the file is opened anew, many times
    alive: list[int] = []
    on_block = lambda block: alive.append(sum(ref() is not None for ref in loaded))  # noqa: E731
    convert_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", on_block=on_block)
    assert len(alive) == 12
    assert max(alive) <= len(state) // 12
    assert_same(load_state_dict_file(tmp_path / "out.safetensors"), convert_state_dict(state))


# ---------------------------------------------------------------------------------------------- models of this package


def randomised(model: ModelT) -> ModelT:
    """``model`` in eval mode with BatchNorm statistics as training leaves them; a new one's would fold to nothing."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            bn = testing.random_batchnorm(module.num_features, generator)
            values = {"weight": bn.weight, "bias": bn.bias, "running_mean": bn.mean, "running_var": bn.var}
            module.load_state_dict({"num_batches_tracked": torch.tensor(1), **values})
    return model.eval()


def network(kind: str, deploy: bool = False, **options: Any) -> RepVGG | RepVGGplus:
    """A network with the features of ``kind``, but few blocks and channels."""
    options = {"num_classes": 7, "width_multiplier": [0.25, 0.25, 0.25, 0.25], "deploy": deploy} | options
    if kind == "plus":
        return randomised(RepVGGplus([1, 1, 2, 1], use_post_se=True, **options))
    groups = {2: 4, 4: 4} if kind == "g4" else None
    return randomised(RepVGG([2, 2, 1, 1], override_groups_map=groups, use_se=kind == "se", **options))


KINDS = ["plain", "g4", "se", "plus"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folding_keys_equals_folding_modules(kind: str, dtype: torch.dtype) -> None:
    model = network(kind).to(dtype)
    folded = convert_state_dict(model.state_dict())
    for module in list(model.modules()):
        if isinstance(module, RepVGGBlock):
            module.switch_to_deploy()
    expected = {key: value for key, value in model.state_dict().items() if "_aux." not in key}
    assert_same(folded, expected)
    assert list(folded) == list(network(kind, deploy=True).state_dict())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", KINDS)
def test_trained_and_deployed_networks_agree(tmp_path: Path, kind: str, suffix: str) -> None:
    trained, deployed = network(kind), network(kind, deploy=True)
    save_state_dict_file(trained.state_dict(), tmp_path / f"trained{suffix}")
    folded = convert_state_dict(load_state_dict_file(tmp_path / f"trained{suffix}"))
    save_state_dict_file(folded, tmp_path / f"deployed{suffix}")
    load_into(deployed, load_state_dict_file(tmp_path / f"deployed{suffix}"))
    x = torch.randn(2, 3, 33, 40, generator=torch.Generator().manual_seed(1))
    verification = verify(trained, deployed, x)
    assert verification.ok, str(verification)


def test_repvgg_a0() -> None:
    trained, deployed = randomised(create_model("RepVGG-A0")), create_model("RepVGG-A0", deploy=True).eval()
    state, report = fuse_state_dict(trained.state_dict())
    assert (len(report.blocks), len(state)) == (22, 46)
    assert (parameter_count(trained.state_dict()), parameter_count(state)) == (9_108_968, 8_309_384)
    assert (report.parameters_before, report.parameters_after) == (9_108_968, 8_309_384)
    load_into(deployed, state)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert verify(trained, deployed, x).ok


def unchanged(model: nn.Module, load: Callable[[], object]) -> str:
    """The one-line error of ``load``, which must leave every tensor of ``model`` as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    text = error_text(load)
    assert_same(model.state_dict(), before)
    return text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deploy", [False, True])
def test_load_into_loads_everything(kind: str, deploy: bool) -> None:
    source, target = network(kind, deploy), network(kind, deploy)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    load_into(target, source.state_dict())
    assert_same(target.state_dict(), source.state_dict())


def test_load_into_converts_dtypes() -> None:
    source, target = network("plain").bfloat16(), network("plain")
    load_into(target, source.state_dict())
    assert_same(target.state_dict(), source.float().state_dict())


def test_load_into_without_counters() -> None:
    source, target = network("plain"), network("plain")
    with torch.no_grad():
        source.linear.bias.fill_(3)
    load_into(target, {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")})
    assert_same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_load_into_a_backbone_passes_over_what_it_lacks(kind: str) -> None:
    source = network(kind)
    backbone = network(kind, features_only=True, out_indices=[1, 2])
    load_into(backbone, source.state_dict())
    assert_same(backbone.state_dict(), {key: source.state_dict()[key] for key in backbone.state_dict()})
    for key in ("extra.weight", "stage2.9.weight"):  # of no part of any network; of a part that the backbone has
        text = unchanged(backbone, lambda key=key: load_into(backbone, source.state_dict() | {key: torch.ones(1)}))  # type: ignore[misc]
        assert f"unexpected keys: {key})" in text


def test_train_checkpoint_into_deploy_model() -> None:
    model = network("plain", deploy=True)
    text = unchanged(model, lambda: load_into(model, network("plain").state_dict()))
    assert "the checkpoint is in train form and the model in deploy form" in text
    assert "convert the checkpoint with `repvgg-cuda convert IN OUT`" in text


def test_deploy_checkpoint_into_train_model() -> None:
    model = network("plain")
    text = unchanged(model, lambda: load_into(model, network("plain", deploy=True).state_dict()))
    assert "the checkpoint is in deploy form and the model in train form: build the model with deploy=True" in text


def test_load_into_a_model_of_mixed_form_or_none() -> None:
    model = network("plain")
    model.stage0.switch_to_deploy()
    text = unchanged(model, lambda: load_into(model, network("plain").state_dict()))
    assert "the model has blocks in train form (stage1.0.rbr_dense.conv.weight) and in deploy form" in text
    other = nn.Linear(2, 2)
    assert "the model has no RepVGG block" in unchanged(other, lambda: load_into(other, network("plain").state_dict()))


@pytest.mark.parametrize("deploy", [False, True])
def test_missing_and_unexpected_keys(deploy: bool) -> None:
    model = network("plain", deploy)
    state = dict(network("plain", deploy).state_dict())
    with torch.no_grad():
        model.linear.weight.add_(1)  # so that a partial load would show
    del state["linear.bias"]
    text = unchanged(model, lambda: load_into(model, state))
    assert "(missing keys: linear.bias; unexpected keys: nothing)" in text
    state |= {f"extra{i}.weight": torch.ones(1) for i in range(5)}
    text = unchanged(model, lambda: load_into(model, state))
    assert "unexpected keys: extra0.weight, extra1.weight, extra2.weight and 2 more" in text


def test_wrong_shape_and_kind() -> None:
    model = network("plain")
    with torch.no_grad():
        model.stage0.rbr_dense.conv.weight.add_(1)  # type: ignore[union-attr, operator]
    text = unchanged(model, lambda: load_into(model, network("plain", num_classes=5).state_dict()))
    assert "linear.weight must be [7, 128], got [5, 128]; build the model with the name, num_classes and" in text
    state = {**network("plain").state_dict(), "linear.bias": torch.zeros(7, dtype=torch.int64)}
    text = unchanged(model, lambda: load_into(model, state))
    assert "linear.bias must be float32, got int64" in text
