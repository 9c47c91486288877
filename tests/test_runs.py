# SPDX-License-Identifier: MIT
"""Runs of prepared blocks as one operator: when, the bits, gradients, threads, workers, compile, export."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from prepared_networks import calls, images, network, one_by_one, repconvs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import repvgg_cuda
from repvgg_cuda import RepVGGBlock
from repvgg_cuda.models import RepVGG, RepVGGplus
from repvgg_cuda.networks import randomise_

# ----------------------------------------------------------------------------------------------------- runs of blocks


def test_a_network_is_one_call_with_the_bits_of_layer_by_layer() -> None:
    model, x = network(), images()
    assert calls(model, x) == ["conv3x3"] * 8
    model.prepare(x)
    assert calls(model, x) == [8]
    for each in (x, images(3, 40, 22), x.contiguous(memory_format=torch.channels_last), x[:0]):
        with torch.no_grad():
            assert torch.equal(model(each), one_by_one(model, each))


def test_features_end_the_runs() -> None:
    model, x = network(features_only=True, out_indices=(1, 3, 4)), images()
    model.prepare(x)
    assert calls(model, x) == [2, 5, "conv3x3"]
    with torch.no_grad():
        for a, b in zip(model(x), one_by_one(model, x), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


def test_plus_and_its_stages() -> None:
    model, x = network(RepVGGplus), images()
    model.prepare(x)
    assert calls(model, x) == [8]
    assert calls(model.stage3_second, images(2, 5, 6, 32)) == [2]
    with torch.no_grad():
        assert torch.equal(model(x), one_by_one(model, x))


@pytest.mark.parametrize("kind", [RepVGG, RepVGGplus])
def test_blocks_with_se_run_alone(kind: Any) -> None:
    model = network(kind, **{"use_se" if kind is RepVGG else "use_post_se": True})
    model.prepare(images())
    assert calls(model, images()) == ["conv3x3"] * 8
    with torch.no_grad():
        assert torch.equal(model(images()), one_by_one(model, images()))


def without_se(model: nn.Module) -> None:
    model.stage2[0].se = nn.Sequential()  # no Identity, so nothing is known about it


def other_activation(model: nn.Module) -> None:
    model.stage2[0].nonlinearity = nn.Tanh()


def named_algorithm(model: nn.Module) -> None:
    model.stage2[0].rbr_reparam.algorithm = "aten"


def hook_on_block(model: nn.Module) -> None:
    model.stage2[0].register_forward_hook(lambda *args: None)


def pre_hook_on_layer(model: nn.Module) -> None:
    model.stage2[0].rbr_reparam.register_forward_pre_hook(lambda *args: None)


def hook_on_identity(model: nn.Module) -> None:
    model.stage2[0].nonlinearity.register_forward_hook(lambda *args: None)


def backward_hook(model: nn.Module) -> None:
    model.stage2[0].register_full_backward_hook(lambda *args: None)


def own_forward(model: nn.Module) -> None:
    block = model.stage2[0]
    block.forward = lambda x: RepVGGBlock.forward(block, x)


def not_prepared(model: nn.Module) -> None:
    model.stage2[0].rbr_reparam.prepared = None


def in_training(model: nn.Module) -> None:
    model.stage2[0].train()


@pytest.mark.parametrize(
    "change",
    [
        without_se,
        other_activation,
        named_algorithm,
        hook_on_block,
        pre_hook_on_layer,
        hook_on_identity,
        backward_hook,
        own_forward,
        not_prepared,
        in_training,
    ],
    ids=lambda f: f.__name__,
)
def test_a_block_that_is_more_than_its_layer_runs_alone(change: Callable[[nn.Module], None]) -> None:
    model, x = network(), images()
    model.prepare(x)
    change(model)
    assert calls(model, x) == [2, "conv3x3", 5]
    with torch.no_grad():
        assert torch.equal(model(x), one_by_one(model, x))


def test_hooks_on_a_stage_see_its_input_and_output() -> None:
    model, x = network(), images()
    seen: list[tuple[Tensor, Tensor]] = []
    model.prepare(x)
    handle = model.stage3.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    assert calls(model, x) == [4, 3, "conv3x3"]
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model.stage3(seen[0][0]), seen[0][1])
    assert calls(model, x) == [8]


def test_global_hooks_see_every_module() -> None:
    model, x = network(), images()
    model.prepare(x)
    seen: list[nn.Module] = []
    with nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(module)):
        assert calls(model, x) == ["conv3x3"] * 8
    assert {id(module) for module in seen} == {id(module) for module in model.modules()}


def test_training_mode_runs_block_by_block() -> None:
    model, x = network(), images()
    model.prepare(x)
    model.train()
    assert calls(model, x) == ["conv3x3"] * 8
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradients_through_a_prepared_network() -> None:
    grads = []
    chained = network()
    for alone in (False, True):
        model = copy.deepcopy(chained)
        model.prepare(images())
        if alone:
            for conv in repconvs(model):
                conv.register_forward_hook(lambda *args: None)
        x = images().requires_grad_()
        model(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast() -> None:
    model, x = network(), images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        model.prepare(x)
        assert torch.equal(model(x), want)
        assert calls(model, x) == [8]


def test_results_stay_within_the_bounds_of_the_network() -> None:
    """Prepared algorithms round differently; `verify` holds them to their bounds."""
    trained = randomise_(RepVGG([1, 2, 3, 1], 7, [0.25] * 4)).eval()
    deployed = repvgg_cuda.reparameterize(trained).model
    deployed.prepare(images(2, 64, 64))
    result = repvgg_cuda.verify(trained, deployed, images(2, 64, 64))
    assert result.ok, str(result)


def test_concurrent_first_forwards() -> None:
    """Several threads find nothing packed yet, or stale weights: each result is right."""
    model = network()
    model.prepare()
    inputs = [images(n, 20 + n, 31) for n in range(1, 4)]
    with ThreadPoolExecutor(4) as pool:
        for scale in (1.0, 1.1):
            with torch.no_grad():
                for conv in repconvs(model):
                    conv.weight.mul_(scale)
            results = list(pool.map(lambda i: run_without_grad(model, inputs[i % 3]), range(24)))
            for i, y in enumerate(results):
                assert torch.equal(y, run_without_grad(model, inputs[i % 3]))


def run_without_grad(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


class Features(Dataset[Tensor]):
    """A network inside a data set, as for distillation or embeddings: it runs in the workers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        assert torch.get_num_threads() == 1
        return run_without_grad(self.model, images() * index)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context: str) -> None:
    """After use in the parent, whose threads a fork does not have; or sent to a new process."""
    model = network()
    model.prepare(images())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # the same algorithm, the same numbers: they do not depend on threads
        want = [run_without_grad(model, images() * i) for i in range(6)]
    finally:
        torch.set_num_threads(threads)
    run_without_grad(model, images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
        loader = DataLoader(
            Features(model), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=60
        )
        for got, expected in zip(loader, want, strict=True):
            assert torch.equal(got, expected)


# ------------------------------------------------------------------------------------------------- compile and export


def test_compiled_networks_keep_the_chain() -> None:
    model, x = network(), images()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        model.prepare(x)
        want = model(x)
        assert torch.equal(torch.compile(model, fullgraph=True, backend=backend)(x), want)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), want)  # the classifier may be fused
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes]
    assert [target for target in targets if "conv3x3" in target] == ["repvgg_cuda.conv3x3_chain.default"]


def test_compiled_networks_notice_changed_weights() -> None:
    model, x = network(), images()
    with torch.no_grad():
        model.prepare(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(x)
        model.stage1[0].rbr_reparam.weight.mul_(1.1)
        with pytest.raises(RuntimeError, match="layer 1: packed was made for other values of weight"):
            compiled(x)
        model(x)  # packs anew
        assert torch.equal(compiled(x), model(x))
        model.load_state_dict({key: value * 1.01 for key, value in model.state_dict().items()})
        got = compiled(x)  # loading packs anew by itself
        assert torch.equal(got, model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_networks_carry_their_packed_weights(strict: bool) -> None:
    model, x = network(), images()
    dynamic = {0: torch.export.Dim("n", min=1, max=64), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    with torch.no_grad():
        model.prepare(x)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": dynamic}, strict=strict)
        targets = [node.target for node in program.graph.nodes]
        assert targets.count(torch.ops.repvgg_cuda.conv3x3_chain.default) == 1
        assert len(program.constants) == 8
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        other = images(3, 40, 22)
        assert torch.equal(torch.export.load(buffer).module()(other), model(other))
