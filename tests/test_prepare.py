# SPDX-License-Identifier: MIT
"""prepare(): what is packed and when anew, copies and files, the report, the choice by measurement."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from prepared_networks import X, calls, images, layer, network, repackings, repconvs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import repvgg_cuda
from repvgg_cuda import RepConv3x3, RepVGGBlock, _ext, packed, prepared
from repvgg_cuda.models import RepVGG

needs_module = pytest.mark.skipif(_ext.module is None, reason=f"the compiled module {_ext.why_missing}")


# --------------------------------------------------------------------------------------------------------- one layer


def test_a_prepared_layer_runs_on_its_packed_weights() -> None:
    conv = layer()
    report = conv.prepare(X)
    assert conv.prepared is not None
    made = conv.prepared.packed
    assert made is not None
    (entry,) = report.entries
    assert entry.algorithm == packed.read(made).algorithm
    want = repvgg_cuda.conv3x3(X, conv.weight, conv.bias, activation="relu", algorithm=entry.algorithm)
    assert torch.equal(conv(X), want)
    assert conv.prepared.packed is made
    assert prepared.algorithm_for(conv, X) == entry.algorithm


def test_the_first_forward_decides_without_an_example() -> None:
    conv = layer()
    report = conv.prepare()
    assert report.entries[0].algorithm is None
    assert "decided at its first forward" in str(report)
    assert conv.prepared is not None
    assert conv.prepared.packed is None
    with torch.inference_mode():  # the packed weights must not become inference tensors
        conv(X)
    assert conv.prepared.input_size == tuple(X.shape)
    assert conv.prepared.packed is not None
    conv(X).sum().backward()
    other = layer()
    other.prepare(tuple(X.shape))
    assert other.prepared is not None
    assert other.prepared.choice is not None
    assert conv.prepared.choice is not None
    assert other.prepared.choice.algorithm == conv.prepared.choice.algorithm


def test_a_named_algorithm_is_packed_for() -> None:
    conv = layer(algorithm="aten")
    conv.prepare(X)
    for name in repvgg_cuda.algorithms("cpu"):
        if repvgg_cuda.refusal(name, X, conv.weight) is None:
            conv.algorithm = name  # may be set later
            want = repvgg_cuda.conv3x3(X, conv.weight, conv.bias, activation="relu", algorithm=name)
            assert torch.equal(conv(X), want)
            assert conv.prepared is not None
            assert conv.prepared.packed is not None
            assert packed.read(conv.prepared.packed).algorithm == name
    conv.algorithm = "magic"
    with pytest.raises(RuntimeError, match="^prepack: algorithm 'magic' is not available on cpu; available: "):
        conv(X)


def test_training_mode_does_not_use_packed_weights() -> None:
    conv = layer()
    conv.prepare(X)
    conv.train()
    assert conv.packed_for(X.shape) is None
    want = repvgg_cuda.conv3x3(X, conv.weight, conv.bias, activation="relu")
    assert torch.equal(conv(X), want)
    with pytest.raises(RuntimeError) as error:
        conv.prepare(X)
    text = "prepare: the layer is in training mode, where packed weights are not used; call .eval() first"
    assert str(error.value) == text


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match="^prepack: input_size has C_in=3 channels, but weight"):
        layer().prepare((1, 3, 8, 8))
    with pytest.raises(RuntimeError, match=r"^prepack: input_size must be \[N, C_in, H, W\], got 3 numbers"):
        layer().prepare(X[0])
    with pytest.raises(RuntimeError, match="^prepack: memory must be one of fast, low, got 'little'"):
        layer().prepare(X, memory="little")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- weights that change


def fresh(conv: RepConv3x3, x: Tensor) -> Tensor:
    """What a layer with the same weights computes that was prepared just now."""
    other = copy.deepcopy(conv)
    other.prepare(x)
    y: Tensor = other(x)
    return y


def edit_in_place(conv: RepConv3x3) -> None:
    conv.weight.mul_(1.5)


def edit_one(conv: RepConv3x3) -> None:
    conv.weight[3, 2, 1, 0] += 1  # none of the 16 samples


def replace_weight(conv: RepConv3x3) -> None:
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def replace_data(conv: RepConv3x3) -> None:
    conv.weight.data = torch.randn_like(conv.weight)


def load(conv: RepConv3x3) -> None:
    conv.load_state_dict({key: value * 2 for key, value in conv.state_dict().items()})


def assign(conv: RepConv3x3) -> None:
    conv.load_state_dict({key: value * 2 for key, value in conv.state_dict().items()}, assign=True)


def step(conv: RepConv3x3) -> None:
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    with torch.enable_grad():
        conv(X).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change", [edit_in_place, edit_one, replace_weight, replace_data, load, assign, step], ids=lambda f: f.__name__
)
def test_changed_weights_are_packed_anew(change: Callable[[RepConv3x3], None]) -> None:
    conv = layer()
    conv.prepare(X)
    with torch.no_grad():
        before = conv(X)
        change(conv)
        after = conv(X)
        assert not torch.equal(after, before)
        assert torch.equal(after, fresh(conv, X))
        assert repackings(conv, X) == 0


def test_edits_through_data_raise_until_prepared_again() -> None:
    """They count no version up."""
    conv = layer()
    conv.prepare(X)
    conv.weight.data.mul_(2)
    with pytest.raises(RuntimeError, match="^conv3x3: packed was made for other values of weight, which have changed"):
        conv(X)
    conv.prepare(X)
    assert torch.equal(conv(X), fresh(conv, X))


def test_inference_tensors_have_no_version_and_work() -> None:
    with torch.inference_mode():
        conv = layer()
    conv.prepare(X)
    assert repackings(conv, X) == 0
    with torch.no_grad():
        assert torch.equal(conv(X), fresh(conv, X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_another_dtype_and_back(dtype: torch.dtype) -> None:
    conv = layer()
    conv.prepare(X)
    conv.to(dtype)
    assert conv.prepared is not None
    assert conv.prepared.packed is None
    y = conv(X.to(dtype))
    assert torch.equal(y, repvgg_cuda.conv3x3(X.to(dtype), conv.weight, conv.bias, activation="relu"))
    conv.float()  # of rounded values, perhaps where the old weight lay
    assert torch.equal(conv(X), fresh(conv, X))


def test_moving_to_where_it_is_changes_nothing() -> None:
    conv = layer()
    conv.prepare(X)
    want = conv(X)
    assert torch.equal(conv.to("cpu")(X), want)


@pytest.mark.parametrize("how", ["weight_norm", "prune", "functional_call"])
def test_computed_weights_are_not_packed(how: str) -> None:
    """They are another tensor in every forward."""
    conv = layer()
    conv.prepare(X)
    if how == "weight_norm":
        parametrizations.weight_norm(conv)
    elif how == "prune":
        prune.l1_unstructured(conv, "weight", amount=0.5)
    parameters = {name: p.detach() * 2 for name, p in conv.named_parameters()}

    def run() -> Tensor:
        if how == "functional_call":
            return torch.func.functional_call(conv, parameters, (X,))  # type: ignore[no-any-return]
        return conv(X)  # type: ignore[no-any-return]

    weight = parameters["weight"] if how == "functional_call" else conv.weight
    bias = parameters["bias"] if how == "functional_call" else conv.bias
    assert repackings(lambda x: run(), X) == 0
    assert torch.equal(run(), repvgg_cuda.conv3x3(X, weight, bias, activation="relu"))
    if how != "functional_call":
        entry = conv.prepare(X).entries[0]
        assert (entry.algorithm, entry.note) == (None, "its weight is computed in every forward: it is not packed")


# --------------------------------------------------------------------------------------------------- copies and files


def test_packed_weights_are_no_state() -> None:
    model = network()
    keys, size = list(model.state_dict()), len(pickle.dumps(model))
    model.prepare(images())
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_buffers()] == []
    assert len(pickle.dumps(model)) < size + 8 * 300  # what was asked for, not the weights


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_pack_their_own(how: str) -> None:
    model = network()
    model.prepare(images())
    with torch.no_grad():
        want = model(images())
        if how == "torch.save":
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        else:
            other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        for mine, theirs in zip(repconvs(model), repconvs(other), strict=True):
            assert theirs.prepared is not mine.prepared
            assert theirs.prepared is not None
            assert theirs.prepared.packed is None
        for parameter in other.parameters():
            parameter.mul_(2)
        assert torch.equal(model(images()), want)
        got = other(images())
        assert calls(other, images()) == [8]
        assert not torch.equal(got, want)
        other.prepare(images())
        assert torch.equal(other(images()), got)


def test_layers_pickled_before_there_was_preparation() -> None:
    conv = layer()
    assert "prepared" not in vars(conv)
    assert conv.prepared is None
    conv(X)


# ---------------------------------------------------------------------------------------------------------- any model


class Foreign(nn.Module):
    """Somebody's network: a layer used twice, one that is not reached, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = RepConv3x3(3, 16, stride=2)
        self.shared = RepConv3x3(16, 16, activation="relu")
        self.spare = RepConv3x3(16, 16)
        self.block = RepVGGBlock(16, 16, deploy=True)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.shared(self.first(x) * scale)
        y: Tensor = self.block(self.shared(x=x[:, :, ::2, ::2]))
        return y


def test_any_model_is_prepared() -> None:
    model = Foreign().eval()
    arguments = (images(), torch.tensor(2.0))
    report = repvgg_cuda.prepare(model, arguments)
    by_path = {entry.path: entry for entry in report.entries}
    assert list(by_path) == ["first", "shared", "spare", "block.rbr_reparam"]
    assert model.first.prepared is not None
    assert model.first.prepared.input_size == (2, 3, 33, 17)
    assert model.shared.prepared is not None
    assert model.shared.prepared.input_size == (2, 16, 17, 9)  # the larger of its two inputs
    assert model.spare.prepared is None
    assert (by_path["spare"].algorithm, by_path["spare"].note) == (None, "the example does not reach it")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert repackings(lambda x: model(*arguments), images()) == 0


def test_an_example_may_be_a_size() -> None:
    model = network().double()
    report = model.prepare((2, 3, 33, 17))
    assert {entry.algorithm for entry in report.entries} == {"aten"}
    model = network()
    sizes = [entry.layer for entry in model.prepare((2, 3, 33, 17)).entries]
    assert sizes == [entry.layer for entry in model.prepare(images()).entries]
    assert sizes[0] == "2x3x33x17 -> 16 channels, stride 2"


def test_without_an_example_the_first_forward_decides() -> None:
    model, x = network(), images()
    assert {entry.algorithm for entry in model.prepare().entries} == {None}
    assert repackings(model, x) == 8
    assert calls(model, x) == [8]
    algorithms = [each.prepared.choice.algorithm for each in repconvs(model)]
    assert algorithms == [entry.algorithm for entry in model.prepare(x).entries]


def test_what_cannot_be_prepared() -> None:
    with pytest.raises(RuntimeError, match="^prepare: the model has no RepConv3x3 to prepare; fold its blocks first"):
        repvgg_cuda.prepare(nn.Sequential(nn.Conv2d(3, 3, 3)), images())
    with pytest.raises(RuntimeError, match="^prepare: the model has no RepConv3x3 to prepare; fold its blocks first"):
        RepVGG([1, 1, 2, 1], 7, [0.25] * 4).eval().prepare(images())
    with pytest.raises(RuntimeError, match="^prepare: stage0.rbr_reparam is in training mode, where packed weights"):
        network().train().prepare(images())
    with pytest.raises(RuntimeError, match="^prepare: the layer is in training mode, where packed weights"):
        repvgg_cuda.prepare(layer().train(), X)
    with pytest.raises(RuntimeError, match="^prepare: example must be a tensor, a tuple of arguments or a size"):
        network().prepare("image")
    model = network()
    with pytest.raises(RuntimeError, match="x has C_in=4 channels"):
        model.prepare(images(channels=4))
    assert not any(module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("memory", packed.MEMORY)
def test_the_report_counts_the_bytes(memory: Any) -> None:
    model = network()
    report = model.prepare(images(), memory=memory)
    for conv, entry in zip(repconvs(model), report.entries, strict=True):
        assert conv.prepared is not None
        assert conv.prepared.packed is not None
        assert entry.packed_bytes == conv.prepared.packed.numel() - packed.HEADER_BYTES
        assert entry.weight_bytes == conv.weight.numel() * 4
        assert memory == "fast" or entry.packed_bytes <= entry.weight_bytes
    assert report.packed_bytes == sum(entry.packed_bytes for entry in report.entries)
    assert report.to_dict()["entries"][0]["path"] == "stage0.rbr_reparam"


@needs_module
def test_the_report_as_text() -> None:
    report = network().prepare(images())
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "input", "algorithm", "weights", "packed", "predicted"]
    assert len(lines) == 1 + 8 + 1
    for line, entry in zip(lines[1:], report.entries, strict=False):
        assert line.split()[0] == entry.path
        assert entry.algorithm is not None
        assert entry.algorithm in line
        assert entry.seconds is not None
    assert lines[-1].startswith("prepared 8 of 8 layers, together ")
    assert "packed weights" in lines[-1]


# ------------------------------------------------------------------------------------------------ without the module


WITHOUT_MODULE = """
import copy, torch, repvgg_cuda
from repvgg_cuda import packed
model = repvgg_cuda.models.RepVGG([1, 1, 2, 1], 5, [0.25] * 4, deploy=True).eval()
x = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    want = model(x)
    report = model.prepare(x)
    assert {entry.algorithm for entry in report.entries} == {"aten"} and report.packed_bytes == 0
    assert torch.equal(model(x), want)
    print(report)
    made = model.stage0.rbr_reparam.prepared.packed
    assert packed.read(made).algorithm == "aten" and made.numel() == packed.HEADER_BYTES
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), want)
    model.stage0.rbr_reparam.weight.mul_(2)
    assert not torch.equal(model(x), want)
conv = copy.deepcopy(model.stage0.rbr_reparam)
torch.library.opcheck(torch.ops.repvgg_cuda.prepack.default, (conv.weight.detach(), [1, 3, 8, 8], 2))
layers = [repvgg_cuda.ChainLayer(conv.weight, conv.bias, 2, packed=repvgg_cuda.prepack(conv.weight, x.shape, stride=2))]
y = repvgg_cuda.conv3x3_chain(x, layers)
y.sum().backward()
print(repvgg_cuda.explain(x, conv.weight, stride=2))
"""


def test_everything_works_without_the_compiled_module() -> None:
    environment = {**os.environ, "REPVGG_CUDA_DISABLE_EXTENSION": "1"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_MODULE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "prepared 6 of 6 layers" in done.stdout
    assert "aten" in done.stdout
