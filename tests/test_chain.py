# SPDX-License-Identifier: MIT
"""conv3x3_chain: the bits of layer by layer, whatever the layers, and a citizen of PyTorch as conv3x3 is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import repvgg_cuda
from repvgg_cuda import ChainLayer, _ext, packed, reference, testing

OPS = torch.ops.repvgg_cuda

needs_module = pytest.mark.skipif(_ext.module is None, reason=f"the compiled module {_ext.why_missing}")

#: (channels, stride, groups, activation) of each layer.
Plan = list[tuple[int, int, int, str]]
#: A small network: stem, a stage, a step down, groups, channels that fill no vector, no activation at the end.
PLAN: Plan = [
    (16, 2, 1, "relu"),
    (16, 1, 1, "relu"),
    (16, 1, 2, "relu"),
    (20, 2, 1, "relu"),
    (20, 1, 4, "identity"),
    (9, 1, 1, "identity"),
]
SIZE = (2, 3, 27, 30)


def make_layers(plan: Plan, in_channels: int = 3, dtype: torch.dtype = torch.float32) -> list[ChainLayer]:
    """Random layers, every second one with a bias."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for i, (channels, stride, groups, activation) in enumerate(plan):
        fan_in = in_channels // groups * 9
        weight = torch.randn(channels, in_channels // groups, 3, 3, generator=generator) * (2 / fan_in) ** 0.5
        bias = torch.randn(channels, generator=generator).to(dtype) if i % 2 == 0 else None
        layers.append(ChainLayer(weight.to(dtype), bias, stride, groups, activation))  # type: ignore[arg-type]
        in_channels = channels
    return layers


def image(size: tuple[int, ...] = SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)


def one_by_one(x: Tensor, layers: list[ChainLayer], algorithm: str = "auto") -> Tensor:
    for weight, bias, stride, groups, activation, made in layers:
        named = algorithm if made is None else "auto"
        x = repvgg_cuda.conv3x3(
            x, weight, bias, stride=stride, groups=groups, activation=activation, algorithm=named, packed=made
        )
    return x


def prepared(x: Tensor, layers: list[ChainLayer], **kwargs: Any) -> list[ChainLayer]:
    """The layers with packed weights, for the sizes that each of them sees."""
    result = []
    for layer in layers:
        made = repvgg_cuda.prepack(layer.weight, x.shape, stride=layer.stride, groups=layer.groups, **kwargs)
        result.append(layer._replace(packed=made))
        x = one_by_one(x, [layer], "aten")
    return result


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


# ------------------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, len(PLAN)])
@pytest.mark.parametrize("packing", [None, "fast", "low"])
def test_same_bits_as_layer_by_layer(packing: str | None, length: int, channels_last: bool) -> None:
    x, layers = image(), make_layers(PLAN[:length])
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    if packing is not None:
        layers = prepared(x, layers, memory=packing)
    assert same(repvgg_cuda.conv3x3_chain(x, layers), one_by_one(x, layers))


def names_for(plan: Plan) -> list[str]:
    """The algorithms that run every layer of the plan."""
    x, names = image(), repvgg_cuda.algorithms("cpu")
    for layer in make_layers(plan):
        ask = dict(stride=layer.stride, groups=layer.groups)
        names = [name for name in names if repvgg_cuda.refusal(name, x, layer.weight, **ask) is None]  # type: ignore[arg-type]
        x = one_by_one(x, [layer], "aten")
    return names


@pytest.mark.parametrize("stride", [1, 2])
def test_named_algorithms(stride: int) -> None:
    plan: Plan = [(32, stride, 1, "relu"), (32, stride, 2, "identity"), (7, stride, 1, "relu")]
    names = names_for(plan)
    assert "aten" in names
    assert _ext.module is None or len(names) >= 3
    x, layers = image(), make_layers(plan)
    for name in names:
        assert same(repvgg_cuda.conv3x3_chain(x, layers, algorithm=name), one_by_one(x, layers, name)), name
        made = prepared(x, layers, algorithm=name)
        assert same(repvgg_cuda.conv3x3_chain(x, made), one_by_one(x, layers, name)), name


@needs_module
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_mixture(data: st.DataObject) -> None:
    """Any geometry, any algorithm in any place, packed or not."""
    in_channels = data.draw(st.sampled_from([1, 2, 3, 8, 12]), "C")
    size = (data.draw(st.integers(0, 3), "N"), in_channels, *(data.draw(st.integers(1, 20), d) for d in "HW"))
    plan = [
        (
            data.draw(st.sampled_from([1, 2, 6, 8, 17]), "K"),
            data.draw(st.sampled_from([1, 2]), "stride"),
            1,
            data.draw(st.sampled_from(["identity", "relu"]), "activation"),
        )
        for _ in range(data.draw(st.integers(1, 4), "layers"))
    ]
    x = image(size)
    if data.draw(st.booleans(), "channels_last"):
        x = x.contiguous(memory_format=torch.channels_last)
    layers, current = [], image(size)
    for layer in make_layers(plan, in_channels):
        explanation = repvgg_cuda.explain(current, layer.weight, stride=layer.stride)
        name = data.draw(st.sampled_from([c.name for c in explanation.candidates if c.refusal is None]), "algorithm")
        if data.draw(st.booleans(), "packed"):
            made = repvgg_cuda.prepack(layer.weight, current.shape, stride=layer.stride, algorithm=name)
            layer = layer._replace(packed=made)
        layers.append(layer)
        current = one_by_one(current, [layer], "aten")
    got, want = repvgg_cuda.conv3x3_chain(x, layers), one_by_one(x, layers)
    assert torch.equal(got, want)
    assert got.is_contiguous(memory_format=reference.output_format(x))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    x, layers = image(dtype=dtype), make_layers(PLAN, dtype=dtype)
    assert same(repvgg_cuda.conv3x3_chain(x, layers), one_by_one(x, layers))
    layers = prepared(x, layers)
    assert same(repvgg_cuda.conv3x3_chain(x, layers), one_by_one(x, layers))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_biases_beside_16_bit(dtype: torch.dtype) -> None:
    x, layers = image(dtype=dtype), make_layers(PLAN, dtype=dtype)
    layers = [layer._replace(bias=None if layer.bias is None else layer.bias.float()) for layer in layers]
    assert same(repvgg_cuda.conv3x3_chain(x, layers), one_by_one(x, layers))


@pytest.mark.parametrize("size", [(0, 3, 9, 9), (1, 3, 1, 1), (9, 3, 5, 2), (1, 3, 1, 40)], ids=str)
@pytest.mark.parametrize("packing", [False, True])
def test_sizes(size: tuple[int, ...], packing: bool) -> None:
    layers = make_layers(PLAN)
    layers = prepared(image(), layers) if packing else layers  # packed for another size
    assert same(repvgg_cuda.conv3x3_chain(image(size), layers), one_by_one(image(size), layers))


def test_strided_arguments() -> None:
    x, layers = image(), make_layers(PLAN)
    wide = torch.stack([x, -x], -1).flatten(-2)[..., ::2]
    strided = [
        layer._replace(
            weight=layer.weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
            bias=None if layer.bias is None else layer.bias.repeat_interleave(2)[::2],
        )
        for layer in layers
    ]
    for made in (strided, prepared(x, strided)):
        assert torch.equal(repvgg_cuda.conv3x3_chain(wide, made), one_by_one(wide, made))
    assert torch.equal(wide, x)


def test_results_do_not_depend_on_threads() -> None:
    threads, x = torch.get_num_threads(), image()
    layers = prepared(x, make_layers(PLAN))
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(repvgg_cuda.conv3x3_chain(x, layers))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_concurrent_calls_of_several_sizes() -> None:
    """Each thread has a workspace of its own, which grows and is used again."""
    layers = prepared(image(), make_layers(PLAN))
    inputs = [image((n, 3, 20 + 3 * n, 33)) for n in range(1, 5)]
    want = [repvgg_cuda.conv3x3_chain(x, layers) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: repvgg_cuda.conv3x3_chain(inputs[i % 4], layers), range(48)))
    assert all(torch.equal(y, want[i % 4]) for i, y in enumerate(results))


@needs_module
def test_a_workspace_too_large_to_keep() -> None:
    """More than Scratch::kKeptBytes, for this call alone: weights packed in the call count too."""
    layers = make_layers([(1200, 1, 1, "relu"), (1200, 1, 1, "relu"), (4, 1, 1, "identity")], 4)
    x = image((1, 4, 2, 2))
    weight = layers[1].weight
    explanation = repvgg_cuda.explain(image((1, 1200, 2, 2)), weight)
    largest = max((c for c in explanation.candidates if c.refusal is None), key=lambda c: c.packed_bytes)
    assert largest.packed_bytes > 256 << 20
    for _ in range(2):
        got = repvgg_cuda.conv3x3_chain(x, layers, algorithm=largest.name)
    small = make_layers(PLAN)
    assert same(repvgg_cuda.conv3x3_chain(image(), small), one_by_one(image(), small))
    assert same(got, one_by_one(x, layers, largest.name))


def test_arguments_are_not_written() -> None:
    x = image()
    layers = prepared(x, make_layers(PLAN))
    tensors = [x, *(t for layer in layers for t in layer if isinstance(t, Tensor))]
    before = [t.clone() for t in tensors]
    repvgg_cuda.conv3x3_chain(x, layers)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


# ---------------------------------------------------------------------------------------------------- wrong arguments


def operands(layers: list[ChainLayer]) -> dict[str, Any]:
    none = torch.empty(0)
    return {
        "x": image(),
        "weights": [layer.weight for layer in layers],
        "biases": [none if layer.bias is None else layer.bias for layer in layers],
        "packed": [none if layer.packed is None else layer.packed for layer in layers],
        "strides": [layer.stride for layer in layers],
        "groups": [layer.groups for layer in layers],
        "activations": [reference.ACTIVATION_CODES[layer.activation] for layer in layers],
        "algorithm": "auto",
    }


OPERANDS = operands(make_layers(PLAN))


def replaced(name: str, index: int, value: object) -> dict[str, Any]:
    values = list(OPERANDS[name])
    values[index] = value
    return {name: values}


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no-layers": (
        dict.fromkeys(("weights", "biases", "packed", "strides", "groups", "activations"), []),
        "weights must hold at least one layer, got none",
    ),
    **{
        name: ({name: OPERANDS[name][:-1]}, f"{name} must have one entry per layer (6), got 5")
        for name in ("biases", "packed", "strides", "groups", "activations")
    },
    "more-strides": (dict(strides=[1] * 7), "strides must have one entry per layer (6), got 7"),
    "channels": (
        replaced("weights", 1, torch.randn(16, 17, 3, 3)),
        "layer 1: x has C_in=16 channels, but weight [16, 17, 3, 3] with groups=1 expects 17",
    ),
    "no-batch": (
        dict(x=image()[0]),
        "layer 0: x must be [N, C_in, H, W], got 3 dimensions; add a batch dimension with x.unsqueeze(0)",
    ),
    "5x5": (
        replaced("weights", 2, torch.randn(16, 8, 5, 5)),
        "layer 2: weight must be [C_out, C_in / groups, 3, 3], got [16, 8, 5, 5]; use F.conv2d for other kernel sizes",
    ),
    "dtype": (
        replaced("weights", 3, OPERANDS["weights"][3].double()),
        "layer 3: weight must have the dtype of x (float32), got float64; convert one of them with .to()",
    ),
    "stride": (replaced("strides", 4, 3), "layer 4: stride must be 1 or 2, got 3; use F.conv2d for other strides"),
    "groups": (
        replaced("groups", 5, 7),
        "layer 5: groups must divide C_in and C_out, got groups=7, C_in=20, C_out=9",
    ),
    "bias": (replaced("biases", 0, torch.randn(15)), "layer 0: bias must be [C_out] = [16], got [15]"),
    "activation": (replaced("activations", 2, 2), "layer 2: activation must be 0 (identity) or 1 (relu), got 2"),
    "packed": (
        replaced("packed", 1, torch.zeros(200)),
        "layer 1: packed must be a contiguous 1-D uint8 tensor on the CPU, as repvgg_cuda.prepack returns, got float32 "
        "[200] on cpu",
    ),
    "algorithm-empty": (
        dict(algorithm=""),
        "layer 0: algorithm must be 'auto' or a name from repvgg_cuda.algorithms(), got ''",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_error_texts(change: dict[str, Any], message: str) -> None:
    """The compiled checks and the Python ones say the same."""
    arguments = OPERANDS | change
    with pytest.raises(RuntimeError) as error:
        OPS.conv3x3_chain(**arguments)
    assert str(error.value) == f"conv3x3_chain: {message}"
    for function in (reference.conv3x3_chain, reference.conv3x3_chain_fake):
        with pytest.raises(RuntimeError) as error:
            function(*arguments.values())
        assert str(error.value) == f"conv3x3_chain: {message}"


def test_an_unknown_algorithm() -> None:
    names = ", ".join(repvgg_cuda.algorithms("cpu"))
    with pytest.raises(RuntimeError) as error:
        repvgg_cuda.conv3x3_chain(image(), make_layers(PLAN), algorithm="magic")
    text = f"conv3x3_chain: layer 0: algorithm 'magic' is not available on cpu; available: {names}"
    assert str(error.value) == text


def test_weights_that_changed_are_noticed() -> None:
    x = image()
    layers = prepared(x, make_layers(PLAN))
    layers[4].weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="^conv3x3_chain: layer 4: packed was made for other values of weight"):
        repvgg_cuda.conv3x3_chain(x, layers)


def test_errors_of_the_python_function() -> None:
    layers = make_layers(PLAN)
    with pytest.raises(RuntimeError, match="^conv3x3_chain: weights must hold at least one layer, got none$"):
        repvgg_cuda.conv3x3_chain(image(), [])
    with pytest.raises(RuntimeError, match="^conv3x3_chain: layer 1: activation must be one of identity, relu, got"):
        repvgg_cuda.conv3x3_chain(image(), [layers[0], layers[1]._replace(activation="gelu")])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^conv3x3_chain: layer 0: weight must be a torch.Tensor, got list$"):
        repvgg_cuda.conv3x3_chain(image(), [ChainLayer([1.0])])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="^conv3x3_chain: layer 0: bias must be a dense tensor, got layout sparse"):
        repvgg_cuda.conv3x3_chain(image(), [ChainLayer(layers[0].weight, torch.ones(16).to_sparse())])


# -------------------------------------------------------------------------------------------- a citizen of PyTorch


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_opcheck(packing: bool, channels_last: bool, requires_grad: bool) -> None:
    layers = make_layers(PLAN[:3])
    arguments = operands(prepared(image(), layers) if packing else layers)
    if channels_last:
        arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    for tensor in (arguments["x"], *arguments["weights"], *(b for b in arguments["biases"] if b.numel())):
        tensor.requires_grad_(requires_grad)
    torch.library.opcheck(OPS.conv3x3_chain.default, tuple(arguments.values()))


def test_gradients() -> None:
    """Twice differentiable, every tensor."""
    plan: Plan = [(2, 2, 1, "relu"), (2, 1, 2, "relu"), (1, 1, 1, "identity")]
    layers = make_layers(plan, 2, torch.float64)
    tensors = [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]

    def f(x: Tensor, *values: Tensor) -> Tensor:
        left = iter(values)
        given = [layer._replace(weight=next(left), bias=None if layer.bias is None else next(left)) for layer in layers]
        return repvgg_cuda.conv3x3_chain(x, given)

    x = image((1, 2, 3, 4), torch.float64)
    arguments = tuple(t.requires_grad_() for t in (x, *tensors))
    assert torch.autograd.gradcheck(f, arguments)
    assert torch.autograd.gradgradcheck(f, arguments)


@pytest.mark.parametrize("needed", ["x", "first", "last", "bias", "all"])
@pytest.mark.parametrize("packing", [False, True])
def test_gradients_are_those_of_layer_by_layer(packing: bool, needed: str) -> None:
    grads = []
    for function in (repvgg_cuda.conv3x3_chain, one_by_one):
        x, layers = image(), make_layers(PLAN)
        layers = prepared(x, layers) if packing else layers
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None]
        wanted = {"x": [x], "first": weights[:1], "last": weights[-1:], "bias": biases[1:2]}
        leaves = wanted.get(needed, [x, *weights, *biases])
        for leaf in leaves:
            leaf.requires_grad_()
        y = function(x, layers)
        grads.append(torch.autograd.grad(y.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast() -> None:
    x, layers = image(), make_layers(PLAN)
    made = prepared(x, layers)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = repvgg_cuda.conv3x3_chain(x, made), one_by_one(x, layers)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    double = make_layers(PLAN, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert repvgg_cuda.conv3x3_chain(x.double(), prepared(x.double(), double)).dtype == torch.float64


@pytest.mark.parametrize("packing", [False, True])
def test_vmap(packing: bool) -> None:
    """The algorithm is given: that of "auto" depends on the batch, which vmap changes."""
    x, layers, name = image(), make_layers(PLAN[:3]), names_for(PLAN[:3])[0]
    layers = prepared(x, layers) if packing else layers

    def f(each: Tensor) -> Tensor:
        return repvgg_cuda.conv3x3_chain(each, layers, algorithm=name)

    images = torch.stack([x, 2 * x, -x], 1)
    got = torch.func.vmap(f, in_dims=1)(images)
    assert torch.equal(got, torch.stack([f(each) for each in images.unbind(1)]))


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("with_x", [False, True])
def test_vmap_over_a_weight(with_x: bool, index: int) -> None:
    x = image()
    layers = prepared(x, make_layers(PLAN[:3]))

    def f(each: Tensor, weight: Tensor) -> Tensor:
        changed = [layer._replace(weight=weight) if i == index else layer for i, layer in enumerate(layers)]
        return repvgg_cuda.conv3x3_chain(each, changed)

    weights = torch.stack([layers[index].weight, -layers[index].weight])
    images = torch.stack([x, 2 * x])
    got = torch.func.vmap(f, in_dims=(0 if with_x else None, 0))(images if with_x else x, weights)
    for i in range(2):
        changed = [
            layer._replace(weight=weights[i] if j == index else layer.weight, packed=None)
            for j, layer in enumerate(layers)
        ]
        want = one_by_one(images[i] if with_x else x, changed)
        torch.testing.assert_close(got[i], want)


def test_compile_and_export() -> None:
    x, layers = image(), make_layers(PLAN)
    layers = prepared(x, layers)

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return repvgg_cuda.conv3x3_chain(x, layers) + 1

    want = Net()(x)
    assert torch.equal(torch.compile(Net(), fullgraph=True)(x), want)
    dynamic = {0: torch.export.Dim("n", min=1, max=64), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(Net(), (x,), dynamic_shapes={"x": dynamic})
    assert [node.target for node in program.graph.nodes].count(OPS.conv3x3_chain.default) == 1
    other = image((3, 3, 40, 18))
    assert torch.equal(program.module()(other), Net()(other))


def test_meta_tensors() -> None:
    layers = prepared(image(), make_layers(PLAN))
    meta = [
        layer._replace(weight=layer.weight.to("meta"), bias=None if layer.bias is None else layer.bias.to("meta"))
        for layer in layers
    ]
    real = repvgg_cuda.conv3x3_chain(image(), layers)
    fake = repvgg_cuda.conv3x3_chain(image().to("meta"), meta)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_what_packed_weights_say_is_what_was_asked() -> None:
    """Else the tests above would compare aten with itself."""
    names = {
        packed.read(layer.packed).algorithm
        for layer in prepared(image(), make_layers(PLAN))
        if layer.packed is not None
    }
    assert _ext.module is None or len(names - {"aten", "planar"}) >= 2, names
