# SPDX-License-Identifier: MIT
"""deploy: models of foreign classes in one call, and the life of the result."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from foreign_blocks import ConvBN, ManyBranches, Mixer, Net, PostNormed, Residual
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from repvgg_cuda import RepConv3x3, deploy, verify
from repvgg_cuda.networks import randomise_
from repvgg_cuda.verification import Row


def trained_net() -> Any:
    torch.manual_seed(0)
    return randomise_(Net()).eval()


def images(n: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, 18, 14, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(scope="module")
def net() -> tuple[Any, Any, Any]:
    """A trained network, its deployed form, the report."""
    trained = trained_net()
    deployed, report = deploy(trained, images(), strict=True)
    return trained, deployed, report


def test_everything_is_found_and_folded(net: tuple[Any, Any, Any]) -> None:
    trained, deployed, report = net
    assert [(entry.path, entry.kind, entry.branches) for entry in report.fused] == [
        ("stem.0", "chain", "3x3"),
        ("blocks.0", "sum", "1x1+id+2*3x3"),
        ("blocks.1", "sum", "3x3+1x1+id"),
        ("blocks.2", "sum", "3*id+3x3+1x1"),
        ("", "sum", "3x3+1x1"),
        ("tail.0", "sum", "7x7+3x3"),
        ("tail.1.conv1.conv", "chain", "3x3"),
        ("tail.1.conv2.conv", "chain", "3x3"),
    ]
    assert not report.left
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    own = {name: layer.activation for name, layer in deployed.named_modules() if isinstance(layer, RepConv3x3)}
    assert own == {
        "stem.0": "relu",
        "blocks.0.reparam_conv": "relu",
        "blocks.1.reparam": "identity",
        "blocks.2.reparam": "identity",
        "reparam": "identity",
        "tail.1.conv1.conv": "identity",
        "tail.1.conv2.conv": "identity",
    }
    assert type(deployed.tail[0].reparam) is nn.Conv2d
    assert deployed.tail[0].reparam.kernel_size == (7, 7)
    x = images()
    torch.testing.assert_close(deployed(x), trained(x), rtol=1e-4, atol=1e-4)


def test_classes_attributes_and_names_are_kept(net: tuple[Any, Any, Any]) -> None:
    trained, deployed, _ = net
    for name, module in deployed.named_modules():
        if name.rpartition(".")[2] not in ("reparam", "reparam_conv") and not isinstance(module, RepConv3x3):
            before = type(trained.get_submodule(name))
            assert isinstance(module, before) or isinstance(module, nn.Identity), name
    assert type(deployed.blocks[0]) is ManyBranches  # its own forward has a deployed form
    assert isinstance(deployed, Net)
    assert type(deployed).__name__ == "Net"
    assert set(deployed.state_dict()) == {
        *(f"{name}.{kind}" for name in ("stem.0", "blocks.0.reparam_conv") for kind in ("weight", "bias")),
        *(f"{name}.{kind}" for name in ("blocks.1.reparam", "blocks.2.reparam") for kind in ("weight", "bias")),
        *(f"{name}.{kind}" for name in ("reparam", "tail.0.reparam", "head") for kind in ("weight", "bias")),
        *(f"tail.1.conv{i}.conv.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    }


def test_the_report_says_what_was_done(net: tuple[Any, Any, Any]) -> None:
    _, deployed, report = net
    block = next(entry for entry in report.fused if entry.path == "blocks.0")
    pixels = 2 * 9 * 7  # the stem halves 18 x 14
    assert block.flops_before == 2 * pixels * 8 * 8 * (1 + 9 + 9)
    assert block.flops_after == 2 * pixels * 8 * 8 * 9
    for entry in report.fused:
        assert entry.error is not None
        assert entry.bound is not None
        assert entry.error <= entry.bound
        assert entry.range_growth is not None
        conv = deployed.get_submodule(entry.conv)
        assert entry.parameters_after == conv.weight.numel() + conv.bias.numel()
    assert report.verification.startswith("all 9 rows within their bounds")
    assert "top class agrees on 2 of 2" in report.verification
    assert report.preparation.startswith("prepared 7 of 7 layers")
    text = str(report)
    assert report.verification in text
    assert "fused 5 of 5 blocks, fused 3 of 3 conv-BatchNorm chains" in text
    assert json.loads(report.to_json())["entries"][1]["conv"] == "blocks.0.reparam_conv"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dtype_and_memory_format(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    trained = trained_net()
    deployed, report = deploy(trained, images(), dtype=dtype, memory_format=memory_format)
    assert {parameter.dtype for parameter in deployed.parameters()} == {dtype}
    assert deployed.stem[0].weight.is_contiguous(memory_format=memory_format)
    assert deployed(images(dtype=dtype)).dtype == dtype
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert str(dtype).removeprefix("torch.") in report.verification


# --------------------------------------------------------------------------------------------------- life afterwards


def test_it_copies_pickles_saves_and_loads(net: tuple[Any, Any, Any], tmp_path: Path) -> None:
    _, deployed, _ = net
    x = images()
    want = deployed(x)
    assert torch.equal(copy.deepcopy(deployed)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(deployed))(x), want)
    twice = copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(deployed))))
    assert type(twice.blocks[1]) is type(deployed.blocks[1])  # one class, however often it is copied
    torch.save(deployed, tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), want)
    torch.save(deployed.state_dict(), tmp_path / "state.pt")
    other = deploy(randomise_(Net()).eval(), x).model
    assert not torch.allclose(other(x), want)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(other(x), want)
    copied = copy.deepcopy(deployed)
    copied.reparam.weight.data.zero_()  # no weight is shared with the copy
    assert torch.equal(deployed(x), want)


def test_it_moves_between_dtypes(net: tuple[Any, Any, Any]) -> None:
    trained, deployed, _ = net
    moved = copy.deepcopy(deployed).to(torch.bfloat16)
    assert verify(trained, moved, images()).ok
    back = moved.to(torch.float32)
    assert back(images()).dtype == torch.float32


def test_data_parallel(net: tuple[Any, Any, Any]) -> None:
    _, deployed, _ = net
    x = images()
    assert torch.equal(nn.DataParallel(copy.deepcopy(deployed))(x), deployed(x))
    replica = copy.deepcopy(deployed).blocks[1]._replicate_for_data_parallel()
    replica._modules = {"reparam": nn.Conv2d(8, 8, 1)}  # a replica runs its own modules, not those of the original
    y = torch.randn(1, 8, 3, 3)
    assert torch.equal(replica(y), replica.reparam(y))


def test_distributed_data_parallel(net: tuple[Any, Any, Any], tmp_path: Path) -> None:
    _, deployed, _ = net
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = copy.deepcopy(deployed)
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(images()).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


def test_it_compiles_and_exports(net: tuple[Any, Any, Any]) -> None:
    _, deployed, _ = net
    model = copy.deepcopy(deployed).requires_grad_(False)
    x = images()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    other = torch.randn(3, 3, 21, 30)
    torch.testing.assert_close(torch.export.load(buffer).module()(other), model(other))


@pytest.mark.cuda
def test_it_runs_in_a_cuda_graph(net: tuple[Any, Any, Any]) -> None:
    trained = copy.deepcopy(net[0]).cuda()
    x = images().cuda()
    deployed = deploy(trained, x).model
    with torch.inference_mode():
        want = deployed(x)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            deployed(x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            y = deployed(x)
        x.copy_(x.flip(0))
        graph.replay()
    torch.testing.assert_close(y, want.flip(0))


def test_the_trained_model_is_untouched(net: tuple[Any, Any, Any]) -> None:
    trained = trained_net()
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    types = [type(module) for module in trained.modules()]
    deploy(trained, images())
    assert [type(module) for module in trained.modules()] == types
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ refusals


def test_training_mode_is_refused() -> None:
    trained = trained_net()
    trained.blocks[1].bn.train()
    with pytest.raises(RuntimeError, match=r"^deploy: blocks\.1\.bn is in training mode.*call model\.eval\(\) first"):
        deploy(trained, images())


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    l1_unstructured(model[0], "weight", 0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_pruned, r"deploy: model cannot be copied \(Only Tensors .*\); .*torch\.nn\.utils\.prune\.remove"),
        (lambda: nn.Sequential(nn.LazyConv2d(3, 3)).eval(), r"deploy: 0\.weight has no values yet"),
        (lambda: torch.jit.trace(nn.ReLU(), images()), "deploy: model is TorchScript, .* that it was made from"),
        (lambda: torch.relu, r"deploy: model must be a torch\.nn\.Module, got builtin_function_or_method"),
    ],
    ids=["pruned", "lazy", "TorchScript", "function"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_what_is_no_model_to_convert_is_refused(make: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        deploy(make(), images())


@pytest.mark.parametrize(
    ("example", "got"),
    [(None, "NoneType"), ({"x": 1}, "dict"), (torch.zeros(1, 2, dtype=torch.int64), r"\[1, 2\] of int64")],
)
def test_an_example_that_is_none_is_refused(example: Any, got: str) -> None:
    with pytest.raises(RuntimeError, match=f"deploy: example_input must be a floating point tensor .*, got {got}"):
        deploy(nn.Conv2d(3, 3, 3).eval(), example)


def test_what_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).eval()
    model[1].running_var[0] = -1
    with (
        pytest.warns(UserWarning, match="cannot fold 1 block"),
        pytest.raises(RuntimeError, match="not folded: 0: it folds to NaN or infinity in float32"),
    ):
        deploy(model, images())


def test_strict_raises_for_what_is_left() -> None:
    trained = trained_net()
    trained.skip = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect").eval()
    with pytest.raises(RuntimeError, match="cannot fold 1 block: .*skip has padding_mode 'reflect'"):
        deploy(trained, images(), strict=True)
    with pytest.warns(UserWarning, match="skip has padding_mode 'reflect'"):
        report = deploy(trained, images()).report
    assert [entry.path for entry in report.left] == [""]
    assert "left: skip has padding_mode 'reflect'" in str(report)


def test_a_wrong_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason: a model that verification refutes is not returned."""

    def damaged(self: RepConv3x3, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, self.weight * 1.01, self.bias, self.stride, 1, 1, self.groups)

    monkeypatch.setattr(RepConv3x3, "forward", damaged)
    with pytest.raises(RuntimeError, match=r"^deploy: stem\.0 is out of its bound: stem\.0 FAILS"):
        deploy(trained_net(), images())
    deploy(trained_net(), images(), verify=False)


def test_models_without_blocks_are_deployed_too() -> None:
    """Their 3x3 convolutions are swapped; ``example_input`` may be a tuple of arguments."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            y: Tensor = self.act(self.conv(x))[index]
            return y

    trained = Two().eval()
    deployed, report = deploy(trained, (images(), torch.tensor([1, 0, 1])))
    assert isinstance(deployed.conv, RepConv3x3)
    assert deployed.conv.activation == "relu"
    assert not report.entries
    again, report = deploy(deployed, (images(), torch.tensor([1])))
    assert isinstance(again.conv, RepConv3x3)
    alone = deploy(nn.Conv2d(3, 4, 3, padding=1).eval(), images()).model
    assert isinstance(alone, RepConv3x3)


def test_denormal_weights_are_counted_and_flushed() -> None:
    block = randomise_(ManyBranches(8, 8)).eval()
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[0] *= 1e-42  # a dead channel, as weight decay leaves it
                module.bias[0] = 0
                module.running_mean[0] = 0
    x = torch.randn(2, 8, 9, 9)
    kept, report = deploy(block, x)
    assert report.fused[0].denormals > 50
    assert "folded weights are denormal numbers, kept; flush_denormals=True sets them to zero" in str(report)
    flushed, report = deploy(block, x, flush_denormals=True)
    assert report.fused[0].denormals > 50
    assert "set to zero" in str(report)
    for model, expected in ((kept, True), (flushed, False)):
        weight = model.reparam_conv.weight
        assert bool(((weight != 0) & (weight.abs() < torch.finfo(torch.float32).smallest_normal)).any()) == expected


# --------------------------------------------------------------------------------------------- what cannot be traced


class Untraceable(nn.Module):
    """Control flow on a size: the whole cannot be traced, its blocks can."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if x.shape[2] > 1:
                x = block(x)
        return x


def test_models_that_cannot_be_traced_are_looked_into() -> None:
    model = Untraceable(ConvBN(3, 8, 3), PostNormed(8), Untraceable(Mixer(8)), Residual(8))
    trained = randomise_(nn.Sequential(model, nn.Flatten())).eval()
    deployed, report = deploy(trained, images(), strict=True)
    assert [entry.path for entry in report.fused] == [
        "0.blocks.0.conv",
        "0.blocks.1",
        "0.blocks.2.blocks.0",
        "0.blocks.3.conv1.conv",
        "0.blocks.3.conv2.conv",
    ]
    assert [note.split(" cannot be traced")[0] for note in report.notes] == [
        "0 (Untraceable)",
        "0.blocks.2 (Untraceable)",
    ]
    assert "its modules were looked at one by one: TraceError" in str(report)


class CallsTwice(nn.Module):
    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.change = PostNormed(3), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, x)


def test_shared_layers_are_left() -> None:
    """A convolution with two uses cannot take over the BatchNorm of one; a block with two uses can be folded."""
    whole = randomise_(CallsTwice(lambda self, x: self.block(torch.relu(self.block(x))))).eval()
    assert [entry.path for entry in deploy(whole, images(), strict=True).report.fused] == ["block"]
    part = randomise_(CallsTwice(lambda self, x: self.block(x) + torch.relu(self.block.conv1(x)))).eval()
    with pytest.warns(UserWarning, match="block: block.conv1 is used 2 times"):
        deployed, report = deploy(part, images())
    assert [entry.path for entry in report.fused] == ["block.conv.conv"]
    outside = randomise_(
        CallsTwice(lambda self, x: self.block(torch.relu(self.block(x))) + torch.relu(self.block.conv1(x)))
    ).eval()
    with pytest.warns(UserWarning, match="conv1 is also used outside of PostNormed"):
        deploy(outside, images())
    read = randomise_(CallsTwice(lambda self, x: self.block(x) * self.block.conv1.weight.sum())).eval()
    with pytest.warns(UserWarning, match="the parameters of block.conv1 are also read outside of it"):
        deploy(read, images())


class Mutating(nn.Module):
    """The input of the block is changed in place between its branches."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.a, self.b = first, nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * x.mean()
        if self.first:
            x.relu_()
        y = self.a(x)
        if not self.first:
            x.relu_()
        y = y + self.b(x)
        return y


def test_changes_in_place_are_seen() -> None:
    deploy(randomise_(Mutating(True)).eval(), images(), strict=True)
    with pytest.warns(UserWarning, match="changed in place before all branches have read it"):
        deploy(randomise_(Mutating(False)).eval(), images())


class Exposed(nn.Module):
    """One branch is returned, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvBN(3, 3, 3), ConvBN(3, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.a(x)
        return a + self.b(x), a


def test_branches_with_other_readers_are_left() -> None:
    with pytest.warns(UserWarning, match="the output of a.bn is also used outside of the sum"):
        report = deploy(randomise_(Exposed()).eval(), images()).report
    assert [entry.path for entry in report.fused] == ["a.conv", "b.conv"]


class Droppy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = ConvBN(3, 3, 3), nn.Dropout(0.5), ConvBN(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.a(x)) + self.b(x)


def test_dropout_is_nothing_in_eval_mode_only() -> None:
    from repvgg_cuda import reparameterize

    assert [e.kind for e in reparameterize(randomise_(Droppy()).eval(), strict=True).report.fused] == ["sum"]
    model = randomise_(Droppy()).eval()
    model.drop.train()
    assert [e.kind for e in reparameterize(model, strict=True).report.fused] == ["chain", "chain"]


def test_verification_rows_name_their_convolution(net: tuple[Any, Any, Any]) -> None:
    trained, deployed, report = net
    rows: tuple[Row, ...] = verify(trained, deployed, images()).rows
    assert [row.conv for row in rows[:-1]] == [entry.conv for entry in report.fused]


def test_traced_models_convert(net: tuple[Any, Any, Any]) -> None:
    """The graph of a GraphModule is its class: it is replaced."""
    traced = torch.fx.symbolic_trace(net[0]).eval()
    deployed, report = deploy(traced, images(), strict=True)
    assert [entry.branches for entry in report.fused] == [entry.branches for entry in net[2].fused]
    torch.testing.assert_close(copy.deepcopy(deployed)(images()), net[0](images()), rtol=1e-4, atol=1e-4)


class Broadcast(nn.Module):
    """One channel times a constant of several: no convolution has such a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 1, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.gamma = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.gamma + self.b(x)


def test_broadcasts_are_left() -> None:
    with pytest.warns(UserWarning, match="a constant of 3 numbers meets 1 channels"):
        deploy(Broadcast().eval(), images())


class Rows(nn.Module):
    """Two blocks in one forward, one reading the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvBN(3, 3, 3), ConvBN(3, 3, 1)
        self.c, self.d = ConvBN(3, 3, 3), ConvBN(3, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        return self.c(y) + self.d(y) + y


def test_blocks_in_one_forward() -> None:
    deployed, report = deploy(randomise_(Rows()).eval(), images(), strict=True)
    assert [entry.conv for entry in report.fused] == ["reparam", "reparam_1"]
    assert set(dict(deployed.named_children())) == {"reparam", "reparam_1"}


class Functional(nn.Module):
    """Two blocks of functions that differ in their parameters only, and options that take no part."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(3, 3, 3, 3) for _ in range(2)])
        self.small = nn.ParameterList([torch.randn(3, 3, 1, 1) for _ in range(2)])
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        for weight, small in zip(self.weights, self.small, strict=True):
            x = F.relu(F.conv2d(x, weight, self.bias, padding=1) + F.conv2d(x, small) + x, True)
        return x * scale


def test_functions_fold() -> None:
    torch.manual_seed(0)
    trained = Functional().eval()
    with pytest.warns(UserWarning, match="bias is also used outside of the sum"):
        deploy(trained, images())  # the bias is shared
    trained.bias = None
    deployed, report = deploy(trained, images(), strict=True)
    assert [entry.branches for entry in report.fused] == ["3x3+1x1+id"] * 2
    assert set(deployed.state_dict()) == {
        f"{name}.{kind}" for name in ("reparam", "reparam_1") for kind in ("weight", "bias")
    }
    torch.testing.assert_close(deployed(images()), trained(images()), rtol=1e-4, atol=1e-3)
    with pytest.raises(RuntimeError, match=r"scale must be 1\.0, which the module was converted for, got 2\.0"):
        deployed(images(), scale=2.0)


class PartlyFoldable(nn.Module):
    """The first two terms fold, the third does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvBN(3, 3, 3), ConvBN(3, 3, 1)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.pool(x)


def test_what_folds_of_a_larger_sum_is_folded() -> None:
    with pytest.warns(UserWarning, match="cannot fold 1 block: .*pool does not count its padding"):
        deployed, report = deploy(randomise_(PartlyFoldable()).eval(), images())
    assert [(entry.branches, entry.status) for entry in report.entries] == [
        ("3x3+1x1", "fused"),
        ("3x3+1x1+avg3x3", "left"),
    ]
    assert set(dict(deployed.named_children())) == {"reparam", "pool"}


def test_batchnorm_before_a_convolution() -> None:
    """It folds into a 1x1; into a padded 3x3 it does not, whatever stands behind."""
    exact = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    deployed, report = deploy(randomise_(exact).eval(), images(), strict=True)
    assert [(entry.path, entry.kind) for entry in report.fused] == [("1", "chain")]
    assert [type(module) for module in deployed] == [nn.Identity, nn.Conv2d, nn.Identity]
    padded = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match="1: a 3x3 kernel pads with zeros what a 1x1 layer with a bias or BatchNorm"):
        deployed, report = deploy(randomise_(padded).eval(), images())
    assert [(entry.path, entry.status) for entry in report.entries] == [("1", "left"), ("1", "fused")]
    assert [type(module) for module in deployed] == [nn.BatchNorm2d, RepConv3x3, nn.Identity]


class ViewChanged(nn.Module):
    """A view of the input is changed in place between the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * x.mean()
        y = self.a(x)
        x[:, :1].mul_(2)
        return y + self.b(x)


def test_changes_through_views_are_seen() -> None:
    with pytest.warns(UserWarning, match="changed in place before all branches have read it"):
        deploy(randomise_(ViewChanged()).eval(), images())


def test_hooks_on_a_relu_are_kept() -> None:
    model = randomise_(nn.Sequential(ConvBN(3, 4, 3), nn.ReLU())).eval()
    calls: list[int] = []
    model[1].register_forward_hook(lambda *args: calls.append(1))
    deployed = deploy(model, images(), strict=True).model
    calls.clear()
    deployed(images())
    assert calls == [1]
    assert deployed[0].conv.activation == "identity"
