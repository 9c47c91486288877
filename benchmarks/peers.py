# SPDX-License-Identifier: MIT
"""Other inference engines, each running the same chain of 3x3 convolutions with bias and ReLU.

Every function takes the layers, the input and the number of threads, and returns a function that computes the chain's
output as a NumPy array. An engine that is not installed raises ImportError; none of them is installed by this project.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from repvgg_cuda import ChainLayer

Run = Callable[[], Any]


def write_onnx(layers: Sequence[ChainLayer], x: Tensor, path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper, save

    nodes, weights = [], []
    for i, layer in enumerate(layers):
        assert layer.bias is not None
        weights += [numpy_helper.from_array(t.numpy(), f"{kind}{i}") for kind, t in zip("wb", layer[:2], strict=True)]
        strides = [layer.stride] * 2
        attributes = dict(kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=strides, group=layer.groups)
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}", f"b{i}"], [f"c{i}"], **attributes))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"]))
    value = helper.make_tensor_value_info
    last = f"x{len(layers)}"
    outputs = [value(last, TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "chain", [value("x0", TensorProto.FLOAT, list(x.shape))], outputs, weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def onnxruntime(layers: Sequence[ChainLayer], x: Tensor, threads: int) -> Run:
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        write_onnx(layers, x, path := Path(folder) / "chain.onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin between calls would take the cores from the other candidates.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"x0": x.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino(layers: Sequence[ChainLayer], x: Tensor, threads: int) -> Run:
    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:
        write_onnx(layers, x, path := Path(folder) / "chain.onnx")
        hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        request = ov.Core().compile_model(str(path), "CPU", hints).create_infer_request()
    feed = [x.numpy()]
    return lambda: request.infer(feed)[0]


def ncnn(layers: Sequence[ChainLayer], x: Tensor, threads: int) -> Run:
    """Image by image: ncnn has no batch. Half-precision storage is off."""
    import ncnn as engine

    net = engine.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = net.opt.use_fp16_packed = net.opt.use_fp16_storage = False
    net.opt.use_bf16_storage = False
    count = len(layers)
    lines = ["7767517", f"{count + 1} {count + 1}", "Input input 0 1 b0"]
    for i, layer in enumerate(layers):
        assert layer.groups == 1, "ncnn is measured without groups"
        shape = f"0={layer.weight.shape[0]} 1=3 3={layer.stride} 4=1 5=1 6={layer.weight.numel()} 9=1"
        lines.append(f"Convolution c{i} 1 1 b{i} b{i + 1} {shape}")
    with tempfile.TemporaryDirectory() as folder:
        param, weights = Path(folder) / "chain.param", Path(folder) / "chain.bin"
        param.write_text("\n".join(lines) + "\n")
        with weights.open("wb") as file:
            for layer in layers:
                assert layer.bias is not None
                file.write(bytes(4) + layer.weight.numpy().tobytes() + layer.bias.numpy().tobytes())
        net.load_param(str(param))
        net.load_model(str(weights))
    images = x.numpy()

    def run() -> Any:
        results = []
        for image in images:
            extractor = net.create_extractor()
            extractor.input("b0", engine.Mat(image))
            results.append(np.array(extractor.extract(f"b{count}")[1]))
        return np.stack(results)

    run.net = net  # type: ignore[attr-defined]
    return run


def mnn(layers: Sequence[ChainLayer], x: Tensor, threads: int) -> Run:
    import MNN

    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "chain.onnx", Path(folder) / "chain.mnn"
        write_onnx(layers, x, source)
        convert = [sys.executable, "-m", "MNN.tools.mnnconvert", "-f", "ONNX", "--bizCode", "chain"]
        convert += ["--modelFile", str(source), "--MNNModel", str(path)]
        subprocess.run(convert, check=True, capture_output=True)
        interpreter = MNN.Interpreter(str(path))
    session = interpreter.createSession({"backend": "CPU", "precision": "high", "numThread": threads})
    given, result = interpreter.getSessionInput(session), interpreter.getSessionOutput(session)
    image = x.numpy()
    source_tensor = MNN.Tensor(image.shape, MNN.Halide_Type_Float, image, MNN.Tensor_DimensionType_Caffe)
    shape = result.getShape()
    target = MNN.Tensor(shape, MNN.Halide_Type_Float, np.zeros(shape, np.float32), MNN.Tensor_DimensionType_Caffe)

    def run() -> Any:
        given.copyFrom(source_tensor)
        interpreter.runSession(session)
        result.copyToHostTensor(target)
        return target.getNumpyData()

    return run


PEERS = {"onnxruntime": onnxruntime, "openvino": openvino, "ncnn": ncnn, "mnn": mnn}
