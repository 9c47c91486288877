# SPDX-License-Identifier: MIT
"""The networks that benchmarks time: how they are made, and every form of one as a candidate."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repvgg_cuda import baselines, checks, digits, testing
from repvgg_cuda.baselines import CHANNELS_LAST, CUDA_GRAPH, THREE_BRANCHES, Baseline, Workload, convolutions
from repvgg_cuda.branches import require
from repvgg_cuda.comparison import Candidate, Work
from repvgg_cuda.convert import reparameterize
from repvgg_cuda.devices import Device
from repvgg_cuda.models import RepVGG, create_model, model_names
from repvgg_cuda.modules import RepConv3x3, RepVGGBlock
from repvgg_cuda.ops import ChainLayer, algorithms, conv3x3_chain, prepack, refusal
from repvgg_cuda.preparation import prepare
from repvgg_cuda.timing import Run

#: What the names of rows of this library's convolution begin with; an algorithm's name follows.
OWN_PREFIX = "fused conv3x3 "


# ---------------------------------------------------------------------------------------------------------- networks


def known_models() -> tuple[str, ...]:
    return ("digits", *model_names())


def require_model(name: str) -> None:
    """Raises RuntimeError, with the names there are, unless :func:`build_model` can make ``name``."""
    if name in known_models():
        return
    try:
        timm: Any = importlib.import_module("timm")
        known = bool(timm.is_model(name))
        hint = ""
    except Exception as problem:  # an install of timm that does not fit the torch at hand raises anything at all
        known, hint = False, f" (timm itself: {type(problem).__name__})"
    require(
        known,
        f"bench: --model must be one of {', '.join(known_models())}, or a model of timm{hint}, got {name}",
    )


def build_model(
    name: str, device: torch.device, dtype: torch.dtype, batch: int = 1, size: tuple[int, int] | None = None
) -> tuple[nn.Module, Tensor]:
    """A trained network in eval mode, and an input for it.

    "digits" is the demo's network with held-out scans. The others have random weights, because how long a network takes
    does not depend on what it has learnt; but their BatchNorms have statistics, so that they fold into something.
    """
    if name == "digits":
        model: nn.Module = digits.load_trained()
        x = digits.preprocess(digits.load_digits()[1].scans[:batch])
        return model.to(device, dtype), x.to(device, dtype)
    if name in model_names():
        model = create_model(name)
    else:
        timm: Any = importlib.import_module("timm")
        model = timm.create_model(name, pretrained=False)
    x = torch.randn(input_shape(name, batch, size), generator=torch.Generator().manual_seed(1))
    return randomise_(model).eval().to(device, dtype), x.to(device, dtype)


def input_shape(name: str, batch: int = 1, size: tuple[int, int] | None = None) -> tuple[int, ...]:
    """``[N, C, H, W]`` of what the network of that name was made for, or with another height and width."""
    if name == "digits":
        return (batch, 1, 32, 32)
    if size is not None:
        return (batch, 3, *size)
    if name in model_names():
        return (batch, 3, 320, 320) if name.endswith("se") else (batch, 3, 224, 224)
    timm: Any = importlib.import_module("timm")
    config = timm.get_pretrained_cfg(name)
    return (batch, *(config.input_size if config is not None else (3, 224, 224)))


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraws every weight and BatchNorm statistic of ``model``, in place, as training might have left them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            drawn = testing.random_batchnorm(module.num_features, generator)
            for own, value in (
                (module.running_mean, drawn.mean),
                (module.running_var, drawn.var),
                (module.weight, drawn.weight),
                (module.bias, drawn.bias),
            ):
                assert own is not None
                assert value is not None
                own.copy_(value)
        elif isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / fan_in**0.5)
        elif isinstance(module, nn.Linear):  # small, because features after a ReLU have one sign: logits of order 1
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / module.in_features)
    return model


def workload(trained: nn.Module | None, deployed: nn.Module, x: Tensor, device: Device) -> Workload:
    """The network as the baselines take it, its chain of layers included where it is no more than one."""
    if not isinstance(deployed, RepVGG) or not _is_chain(deployed):
        return Workload(deployed, x, device, trained)
    layers = [
        ChainLayer(conv.weight.detach(), None if conv.bias is None else conv.bias.detach(), conv.stride, conv.groups,
                   conv.activation)
        for conv in convolutions(deployed)
    ]  # fmt: skip
    linear = deployed.linear
    assert isinstance(linear, nn.Linear)
    return Workload(deployed, x, device, trained, layers, (linear.weight.detach(), linear.bias.detach()))


def _is_chain(model: RepVGG) -> bool:
    """Whether there is nothing between the convolutions: no SE, no activation but theirs."""
    blocks = [module for module in model.modules() if isinstance(module, RepVGGBlock)]
    return not model.features_only and all(
        isinstance(block.se, nn.Identity) and isinstance(block.nonlinearity, nn.Identity) for block in blocks
    )


@torch.inference_mode()
def work_of(deployed: nn.Module, x: Tensor) -> Work:
    """Of the convolutions in ``deployed`` on ``x``, whose weights and images each cross the memory once."""
    flops = moved = 0.0

    def count(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal flops, moved
        assert isinstance(conv, RepConv3x3)
        flops += 2.0 * output.numel() * conv.weight[0].numel()
        moved += (inputs[0].numel() + output.numel() + conv.weight.numel()) * output.element_size()

    hooks = [conv.register_forward_hook(count) for conv in convolutions(deployed)]
    try:
        deployed(x)
    finally:
        for hook in hooks:
            hook.remove()
    return Work(flops, moved)


# -------------------------------------------------------------------------------------------------------- candidates


def baseline_candidate(baseline: Baseline, work: Workload, truth: checks.Truth) -> Candidate:
    """A row for a baseline, held to the bound or, for another engine, to being the same computation."""
    check = truth.check if baseline.exact else truth.check_foreign
    return Candidate(
        baseline.row_name(work),
        None,
        check,
        refusal=baseline.refusal(work),
        context=baseline.context,
        build=lambda: baseline.build(work),
        error=truth.error,
        remark=None if baseline.exact else truth.remark_foreign,
    )


def own_candidates(work: Workload, truth: checks.Truth, *, algorithm_rows: bool = False) -> Iterator[Candidate]:
    """This library's rows: prepared as its user would, with less memory, not prepared; in graphs on a GPU."""

    def own(name: str, build: Callable[[], Run]) -> Candidate:
        return Candidate(OWN_PREFIX + name, None, truth.check, build=build, own=True, error=truth.error)

    def unprepared() -> Run:
        return baselines.call(copy.deepcopy(work.deployed), work.x)

    yield own("prepared", lambda: prepared(work))
    if work.device.kind == "cpu":
        yield own("prepared, low memory", lambda: prepared(work, "low"))
    yield own("auto", unprepared)
    if work.device.kind == "cuda":
        last = replace(work, x=work.x.contiguous(memory_format=torch.channels_last))
        yield own("prepared" + CHANNELS_LAST, lambda: prepared(last))
        yield own("prepared" + CUDA_GRAPH, lambda: work.device.capture(prepared(work)))
        yield own("prepared" + CHANNELS_LAST + CUDA_GRAPH, lambda: work.device.capture(prepared(last)))
    if algorithm_rows:
        for algorithm in algorithms(work.x.device):
            yield by_algorithm(None, work.deployed, work.x, algorithm, "", truth)


def prepared(work: Workload, memory: Literal["fast", "low"] = "fast") -> Run:
    """The deployed model with packed weights, a copy: a model holds one set of them, and two candidates are ours."""
    if work.layers is not None and work.head is None and len(work.layers) > 1:
        return _chain(work.layers, work.x, memory)
    return _prepared(work.deployed, work.x, memory)


def _prepared(model: nn.Module, x: Tensor, memory: Literal["fast", "low"] = "fast") -> Run:
    model = copy.deepcopy(model)
    prepare(model, x, memory=memory)
    return baselines.call(model, x)


def _chain(layers: Sequence[ChainLayer], x: Tensor, memory: Literal["fast", "low"]) -> Run:
    """Bare layers as one operator."""
    packed_layers, size = [], list(x.shape)
    for layer in layers:
        packed = prepack(layer.weight, size, stride=layer.stride, groups=layer.groups, memory=memory)
        packed_layers.append(layer._replace(packed=packed))
        size = [size[0], layer.weight.shape[0], *((extent - 1) // layer.stride + 1 for extent in size[2:])]
    return lambda: conv3x3_chain(x, packed_layers)


def by_algorithm(
    trained: nn.Module | None, model: nn.Module, x: Tensor, algorithm: str, suffix: str, truth: checks.Truth
) -> Candidate:
    """``algorithm`` in every layer that it accepts; checked layer by layer where there is a trained form."""
    ours, ran, refused = with_algorithm(model, algorithm, x)
    partly = f" in {ran} of {len(convolutions(ours))} layers, aten in the others" if ran and refused else ""
    name = f"{OWN_PREFIX}{algorithm}{partly}{suffix}"
    check = truth.check if trained is None else checks.check_layers(trained, ours, x)
    return Candidate(name, lambda: ours(x), check, None if ran else refused, own=True, error=truth.error)


def model_candidates(
    trained: nn.Module | None, deployed: nn.Module, x: Tensor, formats: Sequence[torch.memory_format]
) -> list[Candidate]:
    """A network trained (if there is that form), then deployed: on F.conv2d, prepared, and on each algorithm; all but
    the prepared one checked layer by layer."""
    truth = checks.network_truth(deployed if trained is None else trained, deployed, x)
    own_truth = checks.network_truth(deployed, deployed, x)

    def candidate(name: str, model: nn.Module, x: Tensor, own: bool) -> Candidate:
        check = own_truth.check if trained is None else checks.check_layers(trained, model, x)
        return Candidate(name, lambda: model(x), check, own=own, error=truth.error)

    candidates = []
    if trained is not None:
        candidates.append(Candidate(THREE_BRANCHES, lambda: trained(x), truth.check, error=truth.error))
    for memory_format in formats:
        suffix = CHANNELS_LAST if memory_format == torch.channels_last else ""
        images = x.contiguous(memory_format=memory_format)
        in_torch = baselines.with_convolution(deployed, baselines.TorchConv3x3, memory_format)
        candidates.append(candidate(baselines.EAGER + suffix, in_torch, images, False))
        model = baselines.with_convolution(deployed, RepConv3x3, memory_format)
        build = partial(_prepared, model, images)
        candidates.append(
            Candidate(f"{OWN_PREFIX}prepared{suffix}", None, truth.check, build=build, own=True, error=truth.error)
        )
        candidates.append(candidate(f"{OWN_PREFIX}auto{suffix}", model, images, True))
        for algorithm in algorithms(x.device):
            candidates.append(by_algorithm(trained, model, images, algorithm, suffix, own_truth))
    return candidates


@torch.inference_mode()
def with_algorithm(model: nn.Module, algorithm: str, x: Tensor) -> tuple[nn.Module, int, str | None]:
    """A copy of ``model`` that runs ``algorithm`` in every layer that it accepts, given the input ``x``, else aten.

    Returns:
        The copy, in how many layers ``algorithm`` runs, and the last of its refusals.
    """
    model = copy.deepcopy(model)
    reasons: list[str | None] = []

    def ask(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(conv, RepConv3x3)
        x, weight = inputs[0], conv.weight
        reason = refusal(algorithm, x, weight, stride=conv.stride, groups=conv.groups, activation=conv.activation)
        conv.algorithm = "aten" if reason else algorithm
        reasons.append(reason)

    hooks = [conv.register_forward_pre_hook(ask) for conv in convolutions(model)]
    model(x)
    for hook in hooks:
        hook.remove()
    refusals = [reason for reason in reasons if reason]
    return model, len(reasons) - len(refusals), refusals[-1] if refusals else None


def deploy(trained: nn.Module) -> nn.Module:
    """The deployed form. Raises RuntimeError if nothing in ``trained`` can be folded."""
    model, report = reparameterize(trained)
    require(len(convolutions(model)) > 0, f"nothing in the model can be folded: {report.summary()}")
    return model
