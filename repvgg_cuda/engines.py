# SPDX-License-Identifier: MIT
"""Other inference engines on a CPU, as baselines: ONNX Runtime, OpenVINO, ncnn, MNN. All compute in float32.

None is a dependency: a builder imports its engine, and :meth:`Baseline.refusal` has said before how to get it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvgg_cuda.baselines import Baseline, Workload
from repvgg_cuda.timing import Run


def _float32(workload: Workload) -> str | None:
    return None if workload.x.dtype == torch.float32 else f"compared in float32 only, got {workload.x.dtype}"


def _chain(workload: Workload) -> str | None:
    if workload.layers is None:
        return "written for chains of 3x3 convolutions with a classifier, and this network is more than that"
    if any(layer.bias is None for layer in workload.layers):
        return "written for convolutions with a bias"
    return _float32(workload)


@contextlib.contextmanager
def exported(workload: Workload) -> Iterator[Path]:
    """The workload as one self-contained ONNX file with input ``x`` and output ``y``; batch and size are fixed."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                workload.plain(), (workload.x,), str(path), input_names=["x"], output_names=["y"], dynamo=False
            )
        yield path


def onnx_runtime(workload: Workload) -> Run:
    """With several threads its pool spins during a call, as by default, but stops afterwards: others run then."""
    ort: Any = importlib.import_module("onnxruntime")
    threads = torch.get_num_threads()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if threads == 1 else "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with exported(workload) as path:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images = workload.x.numpy()
    return lambda: session.run(["y"], {"x": images})[0]


def openvino(workload: Workload) -> Run:
    ov: Any = importlib.import_module("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with exported(workload) as path:
        request = ov.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    images = workload.x.numpy()

    def run() -> Any:
        request.infer([images], share_inputs=True)
        return request.get_output_tensor(0).data  # not a copy

    return run


def ncnn(workload: Workload) -> Run:
    """Image by image, as ncnn has no batch; without its 16-bit modes."""
    engine: Any = importlib.import_module("ncnn")
    net = engine.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_vulkan_compute = False
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{option}", False)
    with tempfile.TemporaryDirectory() as folder:
        param, weights = Path(folder) / "net.param", Path(folder) / "net.bin"
        output = write_ncnn(workload, param, weights)
        for status in (net.load_param(str(param)), net.load_model(str(weights))):
            if status != 0:
                raise RuntimeError(f"ncnn could not load the network, status {status}")
    images = [image.contiguous().numpy() for image in workload.x]

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


def write_ncnn(workload: Workload, param: Path, weights: Path) -> str:
    """Writes ncnn's two files. Returns the name of the output."""
    assert workload.layers is not None
    lines, blob = ["Input x 0 1 x"], "x"
    with weights.open("wb") as file:

        def save(weight: Tensor, bias: Tensor) -> None:
            file.write(b"\0\0\0\0")  # a tag: float32 follows
            file.write(weight.detach().contiguous().numpy().tobytes() + bias.detach().numpy().tobytes())

        for i, layer in enumerate(workload.layers):
            k, count = layer.weight.shape[0], layer.weight.numel()
            grouped = "ConvolutionDepthWise" if layer.groups > 1 else "Convolution"
            # 0 outputs, 1 kernel, 3 stride, 4 padding, 5 bias, 6 weights, 7 groups, 9 activation (1 = ReLU)
            options = f" 7={layer.groups}" if layer.groups > 1 else ""
            options += " 9=1" if layer.activation == "relu" else ""
            lines.append(f"{grouped} conv{i} 1 1 {blob} y{i} 0={k} 1=3 3={layer.stride} 4=1 5=1 6={count}{options}")
            assert layer.bias is not None
            save(layer.weight, layer.bias)
            blob = f"y{i}"
        if workload.head is not None:
            weight, bias = workload.head
            lines.append(f"Pooling pool 1 1 {blob} pooled 0=1 4=1")  # the average over everything
            lines.append(f"InnerProduct linear 1 1 pooled logits 0={weight.shape[0]} 1=1 2={weight.numel()}")
            save(weight, bias)
            blob = "logits"
    param.write_text("\n".join(["7767517", f"{len(lines)} {len(lines)}", *lines]) + "\n")
    return blob


def mnn(workload: Workload) -> Run:
    """Converted from ONNX by MNN's own converter, precision "high": float32 throughout."""
    engine: Any = importlib.import_module("MNN")
    neural: Any = importlib.import_module("MNN.nn")
    expr: Any = importlib.import_module("MNN.expr")
    with exported(workload) as source:
        model = source.with_suffix(".mnn")
        # The converter is a script of the package; it prints pages and may exit, hence a process of its own.
        command = "import sys; from MNN.tools.mnnconvert import main; sys.exit(main())"
        arguments = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(model), "--bizCode", "bench"]
        done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, check=False)
        if not model.exists():
            raise RuntimeError(f"MNN could not convert the network: {(done.stdout + done.stderr).strip()[-300:]}")
        config = {"backend": "CPU", "precision": "high", "numThread": torch.get_num_threads()}
        runtime = neural.create_runtime_manager((config,))
        module = neural.load_module_from_file(str(model), ["x"], ["y"], runtime_manager=runtime)
    images = workload.x.contiguous().numpy()

    kept: list[Any] = [engine, runtime, module, None]

    def run() -> Any:
        variable = expr.const(images, list(images.shape), expr.NCHW)
        kept[-1] = expr.convert(module.forward([variable])[0], expr.NCHW)  # what read() returns lies in it
        return kept[-1].read()

    return run


ENGINES = (
    Baseline(
        "onnxruntime",
        "ONNX Runtime",
        onnx_runtime,
        needs=("onnxruntime", "onnx"),
        package="onnxruntime onnx onnxscript",
        only=_float32,
        exact=False,
    ),
    Baseline(
        "openvino",
        "OpenVINO",
        openvino,
        needs=("openvino", "onnx"),
        package="openvino onnx onnxscript",
        only=_float32,
        exact=False,
    ),
    Baseline("ncnn", "ncnn", ncnn, needs=("ncnn",), package="ncnn", only=_chain, exact=False),
    Baseline(
        "mnn",
        "MNN",
        mnn,
        needs=("MNN", "onnx"),
        package="mnn onnx onnxscript",
        only=_float32,
        slow=True,
        exact=False,
    ),
)
