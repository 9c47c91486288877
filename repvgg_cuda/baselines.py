# SPDX-License-Identifier: MIT
"""What this library is measured against: one registry of baselines per device, :func:`baselines`.

A baseline *builds*, from a :class:`Workload`, a callable of no arguments that computes the output anew. What a user
does once (packing, exporting, compiling, capturing a graph) happens while it builds; what happens in every call,
conversions of layout included, in the callable. PyTorch's own ways are here, other engines in
:mod:`repvgg_cuda.engines`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg_cuda.devices import CpuDevice, Device
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.ops import ChainLayer
from repvgg_cuda.timing import Context, Run

THREE_BRANCHES = "three branches"

#: Appended to names.
CHANNELS_LAST, CUDNN_BENCHMARK, CUDA_GRAPH = ", channels_last", ", cudnn.benchmark", ", CUDA graph"


# ----------------------------------------------------------------------------------------------------------- workload


@dataclass(frozen=True)
class Workload:
    """One deployed computation, in the forms that the baselines need.

    Args:
        deployed: a :class:`RepConv3x3`, or any module with such layers in it, in eval mode, on ``device``.
        x: its input ``[N, C, H, W]``, contiguous.
        trained: the same before fusion, a module or a function; None if there is none.
        layers: ``deployed`` as consecutive layers, then, if there is a ``head``, average pooling and a linear layer
            with this weight ``[classes, C]`` and bias ``[classes]``; None if it is anything else.
    """

    deployed: nn.Module
    x: Tensor
    device: Device = field(default_factory=CpuDevice)
    trained: Callable[[Tensor], Any] | None = None
    layers: Sequence[ChainLayer] | None = None
    head: tuple[Tensor, Tensor] | None = None

    @property
    def relu(self) -> bool:
        """Whether every convolution has a ReLU."""
        return all(conv.activation == "relu" for conv in convolutions(self.deployed))

    def plain(self, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
        """A copy with F.conv2d and an in-place ReLU for this library's convolution: nothing but PyTorch."""
        return with_convolution(self.deployed, TorchConv3x3, memory_format)


class TorchConv3x3(RepConv3x3):
    """The deployed convolution as PyTorch alone runs it: F.conv2d and an in-place ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, 1, 1, self.groups)
        return y.relu_() if self.activation == "relu" else y


class CudnnConv3x3(RepConv3x3):
    """The deployed convolution as cuDNN's fused call runs it, on ``device``."""

    device: Device

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return self.device.conv_relu(x, self.weight, self.bias, self.stride, self.groups)


def convolutions(module: nn.Module) -> list[RepConv3x3]:
    """Every deployed convolution in ``module``, which may be one itself."""
    return [each for each in module.modules() if isinstance(each, RepConv3x3)]


def with_convolution(
    module: nn.Module, kind: type[RepConv3x3], memory_format: torch.memory_format = torch.contiguous_format
) -> nn.Module:
    """A copy of ``module`` in this memory format whose deployed convolutions are of another class."""
    own: Any = copy.deepcopy(module)
    made: nn.Module = own.to(memory_format=memory_format)
    for conv in convolutions(made):
        conv.prepared = None
        conv.__class__ = kind
    return made


def call(module: nn.Module | Callable[[Tensor], Any], x: Tensor) -> Run:
    """``module(x)``, to be timed. A bare convolution is called as a function: one layer is no place for hooks."""
    function = module.forward if isinstance(module, RepConv3x3) else module
    return lambda: function(x)


# ----------------------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Baseline:
    """One way to compute a workload.

    Args:
        key: what ``--against`` and ``against=`` call it; several rows of one kind share a key.
        name: of its row, unique on its device.
        build: as the module's docstring says.
        needs: the modules that must be importable, and ``package`` is what pip calls them.
        only: says why this workload is not for it; None if it is.
        needs_trained: it runs the form before fusion.
        context: global switches, held while it builds and around every sample.
        slow: it takes seconds to build.
        exact: PyTorch's own arithmetic, held to this library's bounds. Other engines may round as they like: their
            error stands beside their time.
    """

    key: str
    name: str
    build: Callable[[Workload], Run]
    needs: tuple[str, ...] = ()
    package: str = ""
    only: Callable[[Workload], str | None] = lambda workload: None
    needs_trained: bool = False
    context: Context = contextlib.nullcontext
    slow: bool = False
    exact: bool = True

    def refusal(self, workload: Workload) -> str | None:
        """Why it cannot run ``workload``, or None: a module that is missing, or what ``only`` says."""
        if any(importlib.util.find_spec(module) is None for module in self.needs):
            return f"not installed: pip install {self.package}"
        if self.needs_trained and workload.trained is None:
            return "there is no form before fusion to compare with"
        return self.only(workload)

    def row_name(self, workload: Workload) -> str:
        return self.name if workload.relu else self.name.replace(" + relu", "")


def three_branches(workload: Workload) -> Run:
    assert workload.trained is not None
    return call(workload.trained, workload.x)


@dataclass(frozen=True)
class TorchForm:
    """PyTorch's way to run the fused form: which call, which memory format, compiled how, as a CUDA graph or not."""

    channels_last: bool = False
    cudnn_call: bool = False
    compile_mode: str | None = None
    graph: bool = False

    def __call__(self, workload: Workload) -> Run:
        device = workload.device
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        module = with_convolution(workload.deployed, CudnnConv3x3 if self.cudnn_call else TorchConv3x3, memory_format)
        for conv in convolutions(module):
            if isinstance(conv, CudnnConv3x3):
                conv.device = device
        # The input lies in channels_last already: a user of that format has it so.
        x = workload.x.contiguous(memory_format=memory_format)
        run = call(module if self.compile_mode is None else device.compile(module, self.compile_mode), x)
        return device.capture(run) if self.graph else run


def _only_relu(workload: Workload) -> str | None:
    if not workload.relu or any(conv.bias is None for conv in convolutions(workload.deployed)):
        return "cudnn_convolution_relu is for convolutions with bias and ReLU"
    return None


@contextlib.contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Lets cuDNN try its algorithms once per shape and keep the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


EAGER, COMPILE, COMPILE_MAX = "fused F.conv2d + relu", "torch.compile", "torch.compile, max-autotune"


def _cpu_baselines() -> Iterator[Baseline]:
    yield Baseline("three-branches", THREE_BRANCHES, three_branches, needs_trained=True)
    yield Baseline("eager", EAGER, TorchForm())
    yield Baseline("channels_last", EAGER + CHANNELS_LAST, TorchForm(channels_last=True))
    yield Baseline("compile", COMPILE, TorchForm(compile_mode="default"), slow=True)
    yield Baseline("compile-max", COMPILE_MAX, TorchForm(compile_mode="max-autotune"), slow=True)


def _cuda_baselines() -> Iterator[Baseline]:
    """Each of PyTorch's ways, in both memory formats, with cuDNN's search off and on, by itself and as a CUDA graph."""
    yield Baseline("three-branches", THREE_BRANCHES, three_branches, needs_trained=True)
    yield Baseline(
        "graph",
        THREE_BRANCHES + CUDA_GRAPH,
        lambda workload: workload.device.capture(three_branches(workload)),
        needs_trained=True,
    )
    for graph in (False, True):
        for last in (False, True):
            suffix = (CHANNELS_LAST if last else "") + (CUDA_GRAPH if graph else "")
            for key, name, cudnn_call in (("eager", EAGER, False), ("cudnn-relu", "cudnn_convolution_relu", True)):
                form = TorchForm(channels_last=last, cudnn_call=cudnn_call, graph=graph)
                only = _only_relu if cudnn_call else lambda workload: None
                kind = "graph" if graph else "channels_last" if last and not cudnn_call else key
                yield Baseline(kind, name + suffix, form, only=only)
                yield Baseline(kind, name + CUDNN_BENCHMARK + suffix, form, only=only, context=cudnn_benchmark)
            for key, name, mode in (
                ("compile", COMPILE, "default"),
                # Its own graphs are off: the row with a graph has one of ours, as all others have.
                ("compile-max", COMPILE_MAX, "max-autotune-no-cudagraphs"),
            ):
                form = TorchForm(channels_last=last, compile_mode=mode, graph=graph)
                yield Baseline(key, name + suffix, form, context=cudnn_benchmark, slow=True)


def baselines(device: Device) -> tuple[Baseline, ...]:
    """Everything there is to compare with on ``device``, installed or not: on a CPU other engines too."""
    if device.kind == "cuda":
        return tuple(_cuda_baselines())
    from repvgg_cuda import engines

    return (*_cpu_baselines(), *engines.ENGINES)
