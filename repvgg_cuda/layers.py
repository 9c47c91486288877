# SPDX-License-Identifier: MIT
"""Reads the nodes of a traced graph as affine layers: convolutions, BatchNorms, pooling, constant scales, sums."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, fx

from repvgg_cuda import affine
from repvgg_cuda.affine import Affine
from repvgg_cuda.branches import BatchNorm, require
from repvgg_cuda.structure import (
    NO_STATISTICS,
    TRAINING_MODE,
    UnfoldableError,
    batchnorm_of,
    conv_geometry,
    has_hooks,
    is_batchnorm,
    is_plain_conv,
    pair,
)
from repvgg_cuda.tracing import Traced, hooked, is_layer

Node = fx.Node
Kind = Literal["conv", "bn", "pool", "pad", "scale", "sum", "pass", "hooks"]
Fold = Callable[[Sequence[Affine]], Affine]


@dataclass(frozen=True)
class Layer:
    """An affine operation. ``fold`` applies it to what ``inputs`` compute, or raises UnfoldableError with the reason.

    ``path`` is the module it belongs to. ``channels``: of its input, where the layer itself knows. ``constants``: the
    nodes of its parameters, where it takes them as arguments. ``weights``: how many it multiplies by per output pixel.
    """

    node: Node
    kind: Kind
    inputs: tuple[Node, ...]
    fold: Fold
    path: str = ""
    label: str = ""
    channels: int | None = None
    constants: tuple[Node, ...] = ()
    weights: int = 0
    kernel: Tensor | None = None


def read_layers(traced: Traced) -> dict[Node, Layer]:
    """The affine layers among the nodes of ``traced``."""
    reader = _Reader(traced)
    found = ((node, reader.layer(node)) for node in traced.graph.nodes)
    return {node: layer for node, layer in found if layer is not None}


_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_ADD = (operator.add, operator.iadd, torch.add)
_SUBTRACT = (operator.sub, operator.isub, torch.sub, torch.subtract)
_MULTIPLY = (operator.mul, operator.imul, torch.mul, torch.multiply)
_DIVIDE = (operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide)
_METHODS = {
    **{name: torch.add for name in ("add", "add_")},
    **{name: torch.sub for name in ("sub", "sub_")},
    **{name: torch.mul for name in ("mul", "mul_")},
    **{name: torch.div for name in ("div", "div_")},
    "neg": operator.neg,
}


def _refuse(reason: str) -> Fold:
    def fold(args: Sequence[Affine]) -> Affine:
        raise UnfoldableError(reason)

    return fold


class _Reader:
    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self._constants: dict[Node, Any] = {}

    def layer(self, node: Node) -> Layer | None:
        if node.op == "call_module":
            return self._module(node)
        target: Any = node.target
        if node.op == "call_method":
            if target in ("contiguous", "clone") and node.args:
                return self._pass(node, node.args[0])
            target = _METHODS.get(str(target))
        if target is None or node.op not in ("call_function", "call_method"):
            return None
        if target is hooked:
            path = str(node.args[1])
            reason = f"{path or 'the block'} has hooks, which folding would lose; remove them first"
            return self._unary(node, node.args[0], "hooks", _refuse(reason), path)
        return self._function(node, target)

    # ------------------------------------------------------------------------------------------------------- modules

    def _module(self, node: Node) -> Layer | None:
        path = str(node.target)
        module = self.traced.module.get_submodule(path)
        x = node.args[0] if len(node.args) == 1 and not node.kwargs else node.kwargs.get("input")
        if not isinstance(x, Node):
            return None
        if is_plain_conv(module):
            assert isinstance(module, nn.Conv2d)
            return self._conv_module(node, x, module, path)
        if is_batchnorm(module):
            channels = getattr(module, "num_features", None) or len(module.running_mean)  # type: ignore[arg-type]
            fold: Fold = lambda args: affine.normalised(args[0], batchnorm_of(module, path))  # noqa: E731
            return Layer(node, "bn", (x,), fold, path, channels=channels)
        if type(module) is nn.Identity or (isinstance(module, _DROPOUTS) and not module.training):
            return self._pass(node, x, path)
        if type(module) is nn.AvgPool2d:
            m = module
            options = (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override)
            return self._pool(node, x, path, *options)
        if type(module) is nn.ZeroPad2d:
            return self._padding(node, x, module.padding, path)
        inner = [each for each in module.modules() if each is not module]
        if len(inner) == 1 and is_batchnorm(inner[0]) and not is_layer(module):
            return self._batchnorm_in(node, x, module, inner[0], path)
        return None

    @staticmethod
    def _batchnorm_in(node: Node, x: Node, module: nn.Module, bn: nn.Module, path: str) -> Layer:
        """A module that cannot be looked into and holds a BatchNorm alone: taken for one that pads, then normalises.

        So do those of diverse branch blocks (arXiv:2103.13425), whose border is the BatchNorm of zero; what else there
        may be does not pass the proof.
        """
        channels = len(bn.running_mean) if isinstance(bn.running_mean, Tensor) else None

        def fold(args: Sequence[Affine]) -> Affine:
            f = args[0]
            if f.weight.device.type == "meta":
                raise UnfoldableError(f"{path} cannot be traced, and on the meta device not be tried out")
            if has_hooks(bn):
                raise UnfoldableError(f"{path} has hooks in it, which folding would lose; remove them first")
            numbers = batchnorm_of(bn, path)
            try:
                y = copy.deepcopy(module).double()(f.weight.new_zeros(1, f.out_channels, 3, 3))
            except Exception as error:  # layers of other libraries may raise anything
                raise UnfoldableError(f"{path} cannot be run by itself: {type(error).__name__}: {error}") from error
            grown = [n - 3 for n in y.shape[2:]] if isinstance(y, Tensor) and y.dim() == 4 else [-1]
            if any(n < 0 or n % 2 for n in grown):
                raise UnfoldableError(f"{path} does more than normalise and pad")
            return affine.normalised(affine.padded(f, (grown[0] // 2, grown[1] // 2)), numbers)

        return Layer(node, "bn", (x,), fold, path, channels=channels)

    @staticmethod
    def _padding(node: Node, x: Node, sides: Any, path: str) -> Layer | None:
        """Zeros around an image; ``sides``: left, right, top, bottom."""
        if not (isinstance(sides, (tuple, list)) and len(sides) == 4 and all(isinstance(n, int) for n in sides)):
            return None
        left, right, top, bottom = sides
        fold: Fold = lambda args: affine.padded(args[0], (top, left))  # noqa: E731
        if left != right or top != bottom or min(sides) < 0:
            fold = _refuse(f"{path or 'a padding'} pads {tuple(sides)}, with other numbers on opposite sides")
        return Layer(node, "pad", (x,), fold, path)

    def _conv_module(self, node: Node, x: Node, conv: nn.Conv2d, path: str) -> Layer:
        try:
            geometry = conv_geometry(conv)
        except UnfoldableError as error:
            fold = _refuse(f"{path}: {error}")
            return Layer(node, "conv", (x,), fold, path, "?", conv.in_channels, kernel=conv.weight)
        if geometry.padding_mode != "zeros" and geometry.padding != (0, 0):
            fold = _refuse(f"{path} has padding_mode '{geometry.padding_mode}'; the folded convolution pads zeros")
        else:
            options = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)

            def fold(args: Sequence[Affine]) -> Affine:
                return affine.composed(affine.convolution(conv.weight, conv.bias, *options), args[0])

        return self._conv(node, x, fold, path, conv.weight, geometry.in_channels)

    @staticmethod
    def _conv(node: Node, x: Node, fold: Fold, path: str, weight: Tensor, channels: int, *constants: Node) -> Layer:
        label = f"{weight.shape[2]}x{weight.shape[3]}"
        return Layer(node, "conv", (x,), fold, path, label, channels, constants, weight.numel(), weight)

    def _pass(self, node: Node, x: Any, path: str = "") -> Layer | None:
        return self._unary(node, x, "pass", lambda args: args[0], path)

    @staticmethod
    def _unary(node: Node, x: Any, kind: Kind, fold: Fold, path: str = "") -> Layer | None:
        return Layer(node, kind, (x,), fold, path) if isinstance(x, Node) else None

    @staticmethod
    def _pool(
        node: Node,
        x: Node,
        path: str,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Layer:
        size, pad = pair("kernel_size", kernel_size), pair("padding", padding)
        step = pair("stride", stride or kernel_size)
        where = path or "an average pooling"
        fold: Fold = lambda args: affine.composed(  # noqa: E731
            affine.average_pool(args[0].out_channels, size, step, pad, args[0].weight.device), args[0]
        )
        if pad != (0, 0) and not count_include_pad:
            fold = _refuse(f"{where} does not count its padding (count_include_pad=False): no convolution does that")
        elif ceil_mode or divisor_override is not None:
            fold = _refuse(f"{where} has ceil_mode or divisor_override, which no convolution has")
        return Layer(node, "pool", (x,), fold, path, f"avg{size[0]}x{size[1]}")

    # ----------------------------------------------------------------------------------------------------- functions

    def _function(self, node: Node, target: Any) -> Layer | None:
        scopes = self.traced.scopes.get(node, ())
        path = scopes[-1] if scopes else ""
        if target in (torch.conv2d, F.conv2d):
            return self._conv_function(node, path)
        if target is F.batch_norm:
            return self._batchnorm_function(node, path)
        if target is F.avg_pool2d and isinstance(node.args[0], Node):
            options: tuple[Any, ...] = node.args[1:]
            named: dict[str, Any] = dict(node.kwargs)
            if any(isinstance(value, Node) for value in (*options, *named.values())):
                return None
            return self._pool(node, node.args[0], path, *options, **named)
        if target is F.pad and isinstance(node.args[0], Node):
            mode, value = _argument(node, 2, "mode"), _argument(node, 3, "value")
            zeros = mode in (None, "constant") and value in (None, 0)
            return self._padding(node, node.args[0], _argument(node, 1, "pad"), path) if zeros else None
        if target is F.dropout and _argument(node, 2, "training") is False:
            return self._pass(node, node.args[0], path)
        if target is operator.neg:
            return self._unary(node, node.args[0], "scale", lambda args: _times(-1, args[0]), path)
        if target is sum and len(node.args) == 1 and isinstance(node.args[0], (tuple, list)):
            terms = tuple(node.args[0])
            if all(isinstance(term, Node) for term in terms):
                return Layer(node, "sum", terms, _sum, path)
            return None
        if (
            target in (*_ADD, *_SUBTRACT, *_MULTIPLY, *_DIVIDE)
            and len(node.args) == 2
            and node.kwargs.keys() <= {"alpha"}
        ):
            return self._arithmetic(node, target, path)
        return None

    def _arithmetic(self, node: Node, target: Any, path: str) -> Layer | None:
        a, b = node.args
        sign = -1.0 if target in _SUBTRACT else 1.0
        constant_a, constant_b = self._is_constant(a), self._is_constant(b)
        alpha = node.kwargs.get("alpha", 1)
        if not constant_a and not constant_b:
            if target not in (*_ADD, *_SUBTRACT) or not (isinstance(a, Node) and isinstance(b, Node)):
                return None
            if not isinstance(alpha, (int, float)):
                return None
            factor = sign * alpha
            fold: Fold = lambda args: _sum([args[0], args[1] if factor == 1 else _times(factor, args[1])])  # noqa: E731
            return Layer(node, "sum", (a, b), fold, path)
        if alpha != 1:
            return None
        x, other = (b, a) if constant_a else (a, b)
        if not isinstance(x, Node) or (constant_a and constant_b):
            return None
        value = self._per_channel(other)
        if value is None:
            return None
        nodes = (other,) if isinstance(other, Node) else ()
        if target in _MULTIPLY:
            fold = lambda args: affine.scaled(args[0], value)  # noqa: E731
        elif target in _DIVIDE:
            if constant_a:
                return None  # c / x
            fold = lambda args: affine.scaled(args[0], 1 / value.double(), 3)  # noqa: E731
        elif constant_a:  # c + x or c - x
            fold = lambda args: affine.shifted(args[0] if sign > 0 else _times(-1, args[0]), value)  # noqa: E731
        else:
            fold = lambda args: affine.shifted(args[0], sign * value.double())  # noqa: E731
        channels = value.numel() if value.numel() > 1 else None
        return Layer(node, "scale", (x,), fold, path, "", channels, nodes)

    def _conv_function(self, node: Node, path: str) -> Layer | None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        x, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
        if not isinstance(x, Node) or not isinstance(weight, Node) or not self._is_constant(weight):
            return None
        if bias is not None and not self._is_constant(bias):
            return None
        kernel, shift, groups = self.value(weight), self.value(bias), given.get("groups", 1)
        stride, padding, dilation = given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1)
        if isinstance(padding, str) or any(isinstance(each, Node) for each in (stride, padding, dilation, groups)):
            return None
        geometry = (pair("stride", stride), pair("padding", padding), pair("dilation", dilation))

        def fold(args: Sequence[Affine]) -> Affine:
            return affine.composed(affine.convolution(kernel, shift, *geometry, groups), args[0])

        constants = (weight, bias) if isinstance(bias, Node) else (weight,)
        return self._conv(node, x, fold, path, kernel, kernel.shape[1] * groups, *constants)

    def _batchnorm_function(self, node: Node, path: str) -> Layer | None:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        x, training, eps = given["input"], given.get("training", False), given.get("eps", 1e-5)
        tensors = [given.get(name) for name in names[1:5]]
        known = all(each is None or self._is_constant(each) for each in tensors)
        if not isinstance(x, Node) or isinstance(training, Node) or isinstance(eps, Node) or not known:
            return None
        mean, var, weight, bias = (self.value(each) for each in tensors)

        def fold(args: Sequence[Affine]) -> Affine:
            require(mean is not None and var is not None, f"{path}: {NO_STATISTICS}")
            require(not training, f"{path}: {TRAINING_MODE}")
            return affine.normalised(args[0], BatchNorm(mean, var, float(eps), weight, bias))

        channels = None if mean is None else len(mean)
        constants = tuple(each for each in tensors if isinstance(each, Node))
        return Layer(node, "bn", (x,), fold, path, channels=channels, constants=constants)

    # ----------------------------------------------------------------------------------------------------- constants

    def _is_constant(self, value: Any) -> bool:
        """Whether ``value`` is a number, or a node that depends on parameters and buffers only."""
        if not isinstance(value, Node):
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        if value.op == "get_attr":
            return True
        inputs = value.all_input_nodes
        pure = value.op == "call_function" or (value.op == "call_method" and not str(value.target).endswith("_"))
        return pure and bool(inputs) and all(self._is_constant(each) for each in inputs)

    def value(self, argument: Any) -> Any:
        """What a constant is; what is computed from parameters is computed in float64."""
        if not isinstance(argument, Node):
            return argument
        if argument.op == "get_attr":
            return self.traced.attribute(str(argument.target))
        if argument not in self._constants:
            args, kwargs = fx.map_arg((argument.args, argument.kwargs), self._value_fp64)
            if argument.op == "call_method":
                result = getattr(args[0], str(argument.target))(*args[1:], **kwargs)
            else:
                result = argument.target(*args, **kwargs)  # type: ignore[operator]
            self._constants[argument] = result
        return self._constants[argument]

    def _value_fp64(self, node: Node) -> Any:
        value = self.value(node)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def _per_channel(self, constant: Any) -> Tensor | None:
        """A constant as a tensor of one number, or of one per channel; None if it varies in another way."""
        value = self.value(constant)
        if isinstance(value, (int, float)):
            return torch.tensor(float(value), dtype=torch.float64)
        if not isinstance(value, Tensor):
            return None
        shape = tuple(value.shape)
        if value.numel() == 1 and len(shape) <= 4:
            return value.reshape(())
        per_channel = len(shape) in (3, 4) and shape[-2:] == (1, 1) and (len(shape) == 3 or shape[0] == 1)
        return value.reshape(-1) if per_channel else None


def _argument(node: Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _times(factor: float, f: Affine) -> Affine:
    scale = torch.tensor(factor, dtype=torch.float64, device=f.weight.device)
    return affine.scaled(f, scale, 0 if factor == -1 else 2)


def _sum(args: Sequence[Affine]) -> Affine:
    total = args[0]
    for each in args[1:]:
        total = affine.added(total, each)
    return total
