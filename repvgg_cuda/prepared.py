# SPDX-License-Identifier: MIT
"""What ``prepare()`` leaves with a layer, and the report.

A layer keeps a :class:`PreparedWeights`: packed weights and what they were made from. They are no part of the model's
state: ``state_dict`` does not know them, copies and pickles make their own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from repvgg_cuda import ops
from repvgg_cuda.branches import require
from repvgg_cuda.explanation import Candidate, aligned, byte_text, explain_rows, layer_text, place_text, time_text
from repvgg_cuda.packed import read
from repvgg_cuda.reference import check_prepack
from repvgg_cuda.tuning import Problem, tuned_rows
from repvgg_cuda.tuning_cache import Tune, TuningCache, cache_for


class Layer(Protocol):
    """What is needed of a :class:`repvgg_cuda.RepConv3x3`."""

    stride: int
    groups: int
    activation: ops.Activation
    algorithm: str
    training: bool
    prepared: PreparedWeights | None
    _parameters: dict[str, nn.Parameter | None]


# --------------------------------------------------------------------------------------------------- packed weights


class _Choice(NamedTuple):
    """An algorithm, what it was chosen among, and what it was chosen for: dtype, device, the layer's ``algorithm``."""

    algorithm: str
    candidates: tuple[Candidate, ...]
    kind: tuple[object, ...]


class _Made(NamedTuple):
    """Packed weights, and the weight they are of: the object, and what changes with its values."""

    packed: Tensor
    weight: nn.Parameter
    state: tuple[object, ...]


class PreparedWeights:
    """The packed weights of one layer, made when they are first needed and again whenever the weight has changed.

    A change is a new weight object, address, version (every in-place operation counts one up), dtype or device. Two
    things escape this: edits through ``.data``, which count no version up, and compiled graphs, which do not ask. The
    operator then compares 16 samples of the weight and raises; a new ``prepare()`` mends it.
    """

    def __init__(self, input_size: tuple[int, ...] | None, memory: ops.Memory, tune: Tune) -> None:
        require(tune != "", "prepare: tune must be True, False or the path of a file, got ''")
        self.input_size, self.memory, self.tune = input_size, memory, tune
        self.choice: _Choice | None = None  # stays when the values of the weight change
        self._made: _Made | None = None  # replaced as a whole: several threads may run the layer
        self._making = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.input_size, self.memory, self.tune)

    def __deepcopy__(self, memo: object) -> PreparedWeights:
        copy = type(self)(self.input_size, self.memory, self.tune)
        copy.choice = self.choice
        return copy

    @property
    def packed(self) -> Tensor | None:
        """As they are now, which may be of an older weight; None before the first use."""
        return None if self._made is None else self._made.packed

    def drop(self) -> None:
        """Frees the packed weights. They are made again when needed."""
        self._made = None

    def packed_for(self, layer: Layer, input_size: Sequence[int], cache: TuningCache | None = None) -> Tensor | None:
        """The packed weights of ``layer``, which reads inputs of ``input_size``; None if it has no plain weight.

        A computed weight (pruned, parametrized, swapped in by ``torch.func``) is another one in every call.
        """
        weight, made = layer._parameters.get("weight"), self._made
        if torch.compiler.is_compiling():  # weights are stand-ins then, which show no state
            return made.packed if made is not None and isinstance(weight, nn.Parameter) else None
        if type(weight) is not nn.Parameter:
            return None
        if made is None or made.weight is not weight or made.state != _state(weight, layer.algorithm):
            made = self._make(layer, weight, input_size, cache)
        return made.packed

    def _make(self, layer: Layer, weight: nn.Parameter, input_size: Sequence[int], cache: TuningCache | None) -> _Made:
        with self._making:
            state, made = _state(weight, layer.algorithm), self._made
            if made is not None and made.weight is weight and made.state == state:
                return made  # another thread was first
            size = self.input_size or tuple(map(int, input_size))
            check_prepack(weight, size, layer.stride, layer.groups, layer.algorithm, self.memory)
            # No inference tensors, even if this is the first call and in inference mode: autograd could not keep them.
            with torch.inference_mode(False), torch.no_grad():
                choice, kind = self.choice, state[2:]
                if choice is None or choice.kind != kind:
                    candidates = self._candidates(layer, weight, size, cache)
                    # An algorithm that is unknown is refused next.
                    name = next((c.name for c in candidates if c.chosen), layer.algorithm)
                    choice = _Choice(name, candidates, kind)
                packed = _prepack(layer, weight, size, choice.algorithm, self.memory)
            self.input_size, self.choice, self._made = size, choice, _Made(packed, weight, state)
            return self._made

    def _candidates(
        self, layer: Layer, weight: nn.Parameter, size: tuple[int, ...], cache: TuningCache | None
    ) -> tuple[Candidate, ...]:
        rows = explain_rows(weight, size, layer.stride, layer.groups, prepared=True, memory=self.memory)
        if layer.algorithm != "auto":
            return tuple(replace(row, chosen=row.name == layer.algorithm) for row in rows)
        if not self.tune:
            return rows
        bias = layer._parameters.get("bias")
        problem = Problem(weight, bias, size, layer.stride, layer.groups, layer.activation)
        return tuned_rows(problem, rows, self.memory, cache or cache_for(self.tune))


def _state(weight: Tensor, algorithm: str) -> tuple[object, ...]:
    """What changes with the values of a weight, and then its kind: dtype, device and the layer's ``algorithm``."""
    version = None if weight.is_inference() else weight._version  # inference tensors have none
    return weight.data_ptr(), version, weight.dtype, weight.device, algorithm


def _prepack(layer: Layer, weight: Tensor, size: tuple[int, ...], algorithm: str, memory: ops.Memory) -> Tensor:
    return ops.prepack(weight, size, stride=layer.stride, groups=layer.groups, algorithm=algorithm, memory=memory)


# -------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Entry:
    """One layer: what ``prepare()`` chose for it among what.

    ``algorithm`` is None where nothing was chosen, and then ``note`` says why. ``candidates`` carry predicted or, after
    ``tune=True``, measured seconds.
    """

    path: str
    layer: str
    algorithm: str | None
    candidates: tuple[Candidate, ...]
    weight_bytes: int
    packed_bytes: int
    note: str = ""

    @property
    def seconds(self) -> float | None:
        """Of the chosen algorithm; None where it is unknown."""
        return next((c.seconds for c in self.candidates if c.name == self.algorithm), None)


@dataclass(frozen=True)
class Report:
    """What ``prepare()`` did, one entry per layer. ``str()`` is a table, :meth:`to_dict` is ready for JSON."""

    entries: tuple[Entry, ...]
    tuned: bool
    place: str  # dtype, device, threads where they matter

    @property
    def weight_bytes(self) -> int:
        """Of the weights of all layers, as they are."""
        return sum(entry.weight_bytes for entry in self.entries)

    @property
    def packed_bytes(self) -> int:
        """Of the packed weights, which come on top."""
        return sum(entry.packed_bytes for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One line: how many layers, the sum of their times, the memory."""
        done = [entry for entry in self.entries if entry.algorithm is not None]
        seconds = [entry.seconds for entry in done if entry.seconds is not None]
        text = f"prepared {len(done)} of {len(self.entries)} layers"
        if seconds:
            text += f", together {time_text(sum(seconds))} {'measured' if self.tuned else 'predicted'}"
        text += f" ({self.place}); weights {byte_text(self.weight_bytes)}"
        return f"{text}, packed weights {byte_text(self.packed_bytes)} on top"

    def __str__(self) -> str:
        rows = [("layer", "input", "algorithm", "weights", "packed", "measured" if self.tuned else "predicted")]
        for entry in self.entries:
            timed = [c for c in entry.candidates if c.seconds is not None and c.seconds != float("inf")]
            times = ", ".join(f"{c.name} {time_text(c.seconds)}" for c in sorted(timed, key=_seconds))
            rows.append(
                (
                    entry.path or "(the layer itself)",
                    entry.layer,
                    entry.algorithm or "-",
                    byte_text(entry.weight_bytes),
                    byte_text(entry.packed_bytes) if entry.packed_bytes else "-",
                    entry.note or times,
                )
            )
        return "\n".join([*aligned(rows, left=(0, 1, 2, 5)), self.summary()])


def _seconds(candidate: Candidate) -> float:
    return candidate.seconds or 0.0


def report(entries: Sequence[Entry], layers: Sequence[Layer], tune: Tune) -> Report:
    """The report on layers of one model, of one dtype and device."""
    weight = next((w for layer in layers if (w := layer._parameters.get("weight")) is not None), None)
    place = "" if weight is None else place_text(weight)
    if weight is not None and weight.device.type == "cpu":  # a prediction is for one thread
        place += f", threads: {torch.get_num_threads() if tune else 1}"
    return Report(tuple(entries), bool(tune), place)


def prepare_layer(path: str, layer: Layer, prepared: PreparedWeights, cache: TuningCache) -> Entry:
    """Makes the packed weights of ``layer`` now, if the size of its inputs is known, and reports on them."""
    weight = layer._parameters.get("weight")
    size = prepared.input_size
    if type(weight) is not nn.Parameter:
        return Entry(path, "", None, (), 0, 0, "its weight is computed in every forward: it is not packed")
    weight_bytes = weight.numel() * weight.element_size()
    if size is None:
        return Entry(path, "", None, (), weight_bytes, 0, "decided at its first forward")
    prepared.packed_for(layer, size, cache)
    assert prepared.choice is not None
    algorithm, candidates, _ = prepared.choice
    packed_bytes = next(c.packed_bytes for c in candidates if c.name == algorithm)
    text = layer_text(size, weight, layer.stride, layer.groups)
    return Entry(path, text, algorithm, candidates, weight_bytes, packed_bytes)


def prepare_alone(layer: Layer, example: Tensor | Sequence[int] | None, memory: ops.Memory, tune: Tune) -> Report:
    """:meth:`repvgg_cuda.RepConv3x3.prepare`."""
    require(
        not layer.training,
        "prepare: the layer is in training mode, where packed weights are not used; call .eval() first",
    )
    size = None if example is None else tuple(int(n) for n in getattr(example, "shape", example))
    layer.prepared = PreparedWeights(size, memory, tune)
    return report([prepare_layer("", layer, layer.prepared, cache_for(tune))], [layer], tune)


def algorithm_for(layer: Layer, x: Tensor) -> str:
    """The algorithm on which ``layer`` runs ``x``."""
    weight = layer._parameters["weight"]
    assert weight is not None
    if layer.prepared is not None and not layer.training:
        packed = layer.prepared.packed_for(layer, x.shape)
        if packed is not None:
            return read(packed).algorithm
    if layer.algorithm != "auto":
        return layer.algorithm
    return ops.explain(x, weight, stride=layer.stride, groups=layer.groups).chosen.name
