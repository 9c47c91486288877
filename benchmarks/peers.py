# SPDX-License-Identifier: MIT
"""The ways to run a deployed network on a CPU that bench_cpu.py compares: ours, PyTorch's, and other engines'.

Each *builder* takes a :class:`Network`, its input and a number of threads, and returns a callable that computes the
output ``[N, ...]`` from that input. What a user does once (packing, exporting, compiling) happens in the builder; what
happens in every call, conversions of layout included, in the callable. All compute in float32.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from repvgg_cuda import ChainLayer, conv3x3_chain, prepack, prepare

Run = Callable[[], Any]


@dataclass(frozen=True)
class Network:
    """Consecutive 3x3 convolutions with bias and ReLU, then, if ``head`` is there, average pooling and a classifier.

    Args:
        head: weight ``[classes, C]`` and bias ``[classes]``.
        trained: the same network before fusion, with its three branches.
        deployed: the same network after fusion, as this library's model; ours is then that model, prepared.
    """

    layers: Sequence[ChainLayer]
    head: tuple[Tensor, Tensor] | None = None
    trained: nn.Module | None = None
    deployed: nn.Module | None = None

    def classify(self, features: Tensor) -> Tensor:
        """``[N, C, P, Q]`` -> logits, or the features themselves where there is no head."""
        if self.head is None:
            return features
        weight, bias = (tensor.to(features.dtype) for tensor in self.head)
        return F.linear(features.mean((2, 3)), weight, bias)

    def reference(self, x: Tensor) -> Tensor:
        """The output in float64."""
        x = x.double()
        for layer in self.layers:
            assert layer.bias is not None
            x = F.conv2d(x, layer.weight.double(), layer.bias.double(), layer.stride, 1, 1, layer.groups).relu_()
        return self.classify(x)


class Plain(nn.Module):
    """The network as a user writes it in PyTorch: nn.Conv2d and an in-place ReLU."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for layer in network.layers:
            k, c = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
            conv = nn.Conv2d(c, k, 3, layer.stride, 1, groups=layer.groups)
            assert layer.bias is not None
            # Copies: channels_last must not reach the weights that other candidates read.
            conv.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
            conv.bias = nn.Parameter(layer.bias.clone(), requires_grad=False)
            modules += [conv, nn.ReLU(inplace=True)]
        if network.head is not None:
            weight, bias = network.head
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.weight, linear.bias = (
                nn.Parameter(tensor.clone(), requires_grad=False) for tensor in (weight, bias)
            )
            modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear]
        self.body = nn.Sequential(*modules)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


# ---------------------------------------------------------------------------------------------------------------- ours


def ours(network: Network, x: Tensor, threads: int, *, memory: Any = "fast") -> Run:
    """Weights packed once, runs of layers as one operator: torch tensors in, torch tensors out.

    A model is prepared and called as its user does it, so that what its Python costs counts; bare layers are one chain.
    """
    if network.deployed is not None:
        model = copy.deepcopy(network.deployed)  # a model holds one set of packed weights, and two candidates are ours
        prepare(model, x, memory=memory)
        return lambda: model(x)
    layers, size = [], list(x.shape)
    for layer in network.layers:
        packed = prepack(layer.weight, size, stride=layer.stride, groups=layer.groups, memory=memory)
        layers.append(layer._replace(packed=packed))
        size = [size[0], layer.weight.shape[0], *((extent - 1) // layer.stride + 1 for extent in size[2:])]
    return lambda: network.classify(conv3x3_chain(x, layers))


def ours_low(network: Network, x: Tensor, threads: int) -> Run:
    return ours(network, x, threads, memory="low")


# ------------------------------------------------------------------------------------------------------------- PyTorch


def eager(network: Network, x: Tensor, threads: int) -> Run:
    model = Plain(network)
    return lambda: model(x)


def channels_last(network: Network, x: Tensor, threads: int) -> Run:
    """The input lies in channels_last already: a user of that format has it so."""
    model: Any = Plain(network)
    model = model.to(memory_format=torch.channels_last)
    images = x.contiguous(memory_format=torch.channels_last)
    return lambda: model(images)


def three_branches(network: Network, x: Tensor, threads: int) -> Run:
    trained = network.trained
    assert trained is not None
    return lambda: trained(x)


def compiled(network: Network, x: Tensor, threads: int, *, mode: str = "default") -> Run:
    model = torch.compile(Plain(network), mode=mode, dynamic=False)
    return lambda: model(x)


def compiled_max(network: Network, x: Tensor, threads: int) -> Run:
    return compiled(network, x, threads, mode="max-autotune")


# ------------------------------------------------------------------------------------------------------- other engines


def export_onnx(network: Network, x: Tensor, path: Path) -> None:
    """Writes one self-contained file with the input ``x`` and the output ``y``; batch and size are fixed."""
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            Plain(network), (x,), str(path), input_names=["x"], output_names=["y"], dynamo=False, verbose=False
        )


def onnx_runtime(network: Network, x: Tensor, threads: int) -> Run:
    """With several threads its pool spins during a call, as by default, but stops afterwards: others run then."""
    ort: Any = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if threads == 1 else "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(network, x, path)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images = x.numpy()
    return lambda: session.run(["y"], {"x": images})[0]


def openvino(network: Network, x: Tensor, threads: int) -> Run:
    ov: Any = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    core = ov.Core()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(network, x, path)
        request = core.compile_model(str(path), "CPU", settings).create_infer_request()
    images = x.numpy()

    def run() -> Any:
        request.infer([images], share_inputs=True)
        return request.get_output_tensor(0).data  # not a copy

    return run


def ncnn(network: Network, x: Tensor, threads: int) -> Run:
    """Image by image, as ncnn has no batch; without its 16-bit modes."""
    engine: Any = importlib.import_module("ncnn")
    net = engine.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{option}", False)
    with tempfile.TemporaryDirectory() as folder:
        param, weights = Path(folder) / "net.param", Path(folder) / "net.bin"
        output = write_ncnn(network, param, weights)
        for status in (net.load_param(str(param)), net.load_model(str(weights))):
            if status != 0:
                raise RuntimeError(f"ncnn could not load the network, status {status}")
    images = [image.contiguous().numpy() for image in x]

    def run() -> list[Any]:
        outputs = []
        for image in images:
            extractor = net.create_extractor()
            extractor.input("x", engine.Mat(image))
            status, y = extractor.extract(output)
            if status != 0:
                raise RuntimeError(f"ncnn failed with status {status}")
            outputs.append(y)
        return outputs

    run.network = net  # type: ignore[attr-defined]  # keeps it alive
    return run


def write_ncnn(network: Network, param: Path, weights: Path) -> str:
    """Writes ncnn's two files. Returns the name of the output."""
    lines, blob = ["Input x 0 1 x"], "x"
    with weights.open("wb") as file:

        def save(weight: Tensor, bias: Tensor) -> None:
            file.write(b"\0\0\0\0")  # a tag: float32 follows
            file.write(weight.contiguous().numpy().tobytes() + bias.numpy().tobytes())

        for i, layer in enumerate(network.layers):
            k, count = layer.weight.shape[0], layer.weight.numel()
            grouped = "ConvolutionDepthWise" if layer.groups > 1 else "Convolution"
            # 0 outputs, 1 kernel, 3 stride, 4 padding, 5 bias, 6 weights, 7 groups, 9 activation (1 = ReLU)
            groups = f" 7={layer.groups}" if layer.groups > 1 else ""
            lines.append(f"{grouped} conv{i} 1 1 {blob} y{i} 0={k} 1=3 3={layer.stride} 4=1 5=1 6={count}{groups} 9=1")
            assert layer.bias is not None
            save(layer.weight, layer.bias)
            blob = f"y{i}"
        if network.head is not None:
            weight, bias = network.head
            lines.append(f"Pooling pool 1 1 {blob} pooled 0=1 4=1")  # the average over everything
            lines.append(f"InnerProduct linear 1 1 pooled logits 0={weight.shape[0]} 1=1 2={weight.numel()}")
            save(weight, bias)
            blob = "logits"
    param.write_text("\n".join(["7767517", f"{len(lines)} {len(lines)}", *lines]) + "\n")
    return blob


def mnn(network: Network, x: Tensor, threads: int) -> Run:
    """Converted from ONNX by MNN's own converter, precision "high": float32 throughout."""
    engine: Any = importlib.import_module("MNN")
    neural: Any = importlib.import_module("MNN.nn")
    expr: Any = importlib.import_module("MNN.expr")
    with tempfile.TemporaryDirectory() as folder:
        source, model = Path(folder) / "network.onnx", Path(folder) / "network.mnn"
        export_onnx(network, x, source)
        # The converter is a script of the package; it prints pages and may exit, hence a process of its own.
        command = "import sys; from MNN.tools.mnnconvert import main; sys.exit(main())"
        arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(model), "--bizCode", "bench"]
        done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, check=False)
        if not model.exists():
            raise RuntimeError(f"MNN could not convert the network: {(done.stdout + done.stderr).strip()[-300:]}")
        config = {"backend": "CPU", "precision": "high", "numThread": threads}
        runtime = neural.create_runtime_manager((config,))
        module = neural.load_module_from_file(str(model), ["x"], ["y"], runtime_manager=runtime)
    images = x.contiguous().numpy()

    def run() -> Any:
        variable = expr.const(images, list(images.shape), expr.NCHW)
        return expr.convert(module.forward([variable])[0], expr.NCHW).read()

    run.keep = (engine, runtime, module)  # type: ignore[attr-defined]
    return run


# ----------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Peer:
    """``module`` must be importable; ``package`` installs it."""

    name: str
    build: Callable[[Network, Tensor, int], Run]
    module: str | None = None
    package: str | None = None

    def missing(self) -> str | None:
        """How to get it, if it is not there."""
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return None
        return f"not installed: pip install {self.package}"


OURS, OURS_LOW, EAGER, THREE_BRANCHES = "ours", "ours, low memory", "eager", "three branches"

PEERS = (
    Peer(OURS, ours),
    Peer(OURS_LOW, ours_low),
    Peer(EAGER, eager),
    Peer("channels_last", channels_last),
    Peer(THREE_BRANCHES, three_branches),
    Peer("compile", compiled),
    Peer("max-autotune", compiled_max),
    Peer("ONNX Runtime", onnx_runtime, "onnxruntime", "onnxruntime onnx onnxscript"),
    Peer("OpenVINO", openvino, "openvino", "openvino onnx onnxscript"),
    Peer("ncnn", ncnn, "ncnn", "ncnn"),
    Peer("MNN", mnn, "MNN", "mnn onnx onnxscript"),
)


def as_tensor(output: Any) -> Tensor:
    """What a candidate returned, as one tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list):
        return torch.stack([torch.as_tensor(image.numpy() if hasattr(image, "numpy") else image) for image in output])
    return torch.as_tensor(output)
