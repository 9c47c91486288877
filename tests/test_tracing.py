# SPDX-License-Identifier: MIT
"""Forwards as people write them: other arguments, literals, checks of the input, questions for types."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn as nn
from checked_forwards import asserted, caught, chosen, raised, require_image
from torch import Tensor

from repvgg_cuda import deploy, reparameterize
from repvgg_cuda.networks import randomise_
from repvgg_cuda.proxies import way_without_error
from repvgg_cuda.signatures import Computed, Constant, Items, Mixed, common


class Block(nn.Module):
    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1)
        self.narrow = nn.Conv2d(channels, channels, 1)
        self.identity = nn.BatchNorm2d(channels)

    def sum(self, x: Tensor) -> Tensor:
        y: Tensor = self.wide(x) + self.narrow(x) + self.identity(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.sum(x))


def converted(model: nn.Module, x: Any, blocks: int = 1) -> tuple[nn.Module, nn.Module]:
    """``model``, and its conversion, which has that many blocks fused and is right."""
    torch.manual_seed(0)
    randomise_(model).eval()
    result, report = deploy(model, x)
    sums = [(entry.status, entry.reason) for entry in report.entries if entry.kind == "sum"]
    assert sums == [("fused", "")] * blocks
    for each in (result, pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        torch.testing.assert_close(each(x), model(x), rtol=1e-4, atol=1e-4)
    return model, result


def image(height: int = 9) -> Tensor:
    return torch.randn(2, 6, height, 10, generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------------------------- arguments


class Optional(Block):
    def forward(self, x: Tensor, scale: float = 1.0, skip: Tensor | None = None, *, relu: bool = True) -> Tensor:
        y = self.sum(x) * scale
        y = torch.relu(y) if relu else y
        return y if skip is None else y + skip


class Tokens(Block):
    """As the position encodings of Twins: an image as a list of tokens, and its size."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        tokens = x.transpose(1, 2).view(x.shape[0], x.shape[2], *size)
        return self.sum(tokens).flatten(2).transpose(1, 2)


class Several(Block):
    def forward(self, *maps: Tensor, **options: Any) -> Tensor:
        y: Tensor = sum(self.sum(each) if i == 0 else each for i, each in enumerate(maps))
        return y * options["gain"] if options else y


class Dictionary(Block):
    def forward(self, features: dict[str, Tensor]) -> list[Tensor]:
        return [self.sum(features["fine"]), *(value for key, value in features.items() if key != "fine")]


class Calls(nn.Module):
    def __init__(self, block: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.block, self.call = block, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.block, x)


def _with_scale(block: nn.Module, x: Tensor) -> Any:
    return block(x, 2.0)


def _with_names(block: nn.Module, x: Tensor) -> Any:
    return block(skip=torch.relu(x), x=x, relu=False)


def _twice(block: nn.Module, x: Tensor) -> Any:
    return block(torch.relu(block(x, 2.0, x)), 3.0, skip=x)


def _tokens(block: nn.Module, x: Tensor) -> Any:
    return block(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]))


def _several(block: nn.Module, x: Tensor) -> Any:
    return block(x, torch.relu(x), torch.tanh(x))


def _gain(block: nn.Module, x: Tensor) -> Any:
    return block(torch.relu(x), gain=2.0)


def _dictionary(block: nn.Module, x: Tensor) -> Any:
    return block({"fine": x, "coarse": torch.relu(x)})


CALLS = {
    "scale": (Optional, _with_scale),
    "names": (Optional, _with_names),
    "twice": (Optional, _twice),
    "tokens": (Tokens, _tokens),
    "several": (Several, _several),
    "gain": (Several, _gain),
    "dictionary": (Dictionary, _dictionary),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_module_is_converted_for_what_it_is_called_with(kind: str) -> None:
    make, call = CALLS[kind]
    model, result = converted(Calls(make(), call), image())
    other = image(13)
    torch.testing.assert_close(result(other), model(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["names", "tokens", "dictionary"])
def test_it_compiles_and_exports(kind: str) -> None:
    make, call = CALLS[kind]
    _, result = converted(Calls(make(), call), image())
    compiled = torch.compile(result, backend="eager", fullgraph=True)
    program = torch.export.export(result, (image(),), dynamic_shapes=({2: torch.export.Dim.DYNAMIC},)).module()
    with torch.no_grad():
        torch.testing.assert_close(compiled(image()), result(image()))
        torch.testing.assert_close(program(image(13)), result(image(13)))


def test_other_arguments_are_an_error() -> None:
    _, result = converted(Calls(Optional(), _with_scale), image())
    with pytest.raises(RuntimeError, match=r"scale must be 2\.0, which the module was converted for, got 1\.0"):
        result.block(image())  # type: ignore[operator]
    _, result = converted(Calls(Tokens(), _tokens), image())
    with pytest.raises(RuntimeError, match=r"size must be a tuple with 2 items, .* got \(9, 10, 1\)"):
        result.block(image().flatten(2).transpose(1, 2), (9, 10, 1))  # type: ignore[operator]
    _, result = converted(Calls(Dictionary(), _dictionary), image())
    with pytest.raises(RuntimeError, match="features must be a dict with the keys 'fine', 'coarse'"):
        result.block({"fine": image(), "other": image()})  # type: ignore[operator]


def _with_and_without(block: nn.Module, x: Tensor) -> Any:
    return block(torch.relu(block(x, skip=x)))


def test_calls_that_differ_in_kind_are_left() -> None:
    model = Calls(Optional(), _with_and_without).eval()
    result, report = deploy(model, image())
    assert not report.fused
    assert "block (Optional) cannot be traced" in report.notes[0]
    assert "skip differs in kind from call to call" in report.notes[0]
    torch.testing.assert_close(result(image()), model(image()), rtol=1e-4, atol=1e-4)


def test_what_calls_have_in_common() -> None:
    size = Items(tuple, (0, 1), (Computed(True), Computed(True)))
    fixed = Items(tuple, (0, 1), (Constant(7), Computed(True)))
    assert common(None, {"size": size}) == {"size": size}
    assert common({"size": fixed}, {"size": fixed}) == {"size": fixed}
    assert common({"size": fixed}, {"size": size}) == {"size": size}
    assert common({"size": size}, {"size": Items(list, (0, 1), size.values)}) == {"size": Mixed()}
    assert common({"size": Constant((7, 7))}, {"size": Constant((7, 7))}) == {"size": Constant((7, 7))}
    assert common({"size": Constant((7, 7))}, {"size": Constant((7, 8))}) == {"size": Mixed()}
    assert common({"scale": Constant(2)}, {"scale": Constant(3.0)}) == {"scale": Computed(True)}
    assert common({"scale": Constant(2)}, {"scale": Computed()}) == {"scale": Mixed()}
    assert common({"skip": Constant(None)}, {"skip": Computed()}) == {"skip": Mixed()}
    assert common({"skip": Computed()}, {"skip": Computed()}) == {"skip": Computed()}


# ---------------------------------------------------------------------------------------- what forwards do besides


class Literal(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.sum(x) * torch.tensor(0.5)) - torch.tensor([0.1, 0.2])[0]


class Checked(Block):
    def forward(self, x: Tensor) -> Tensor:
        require_image(x, 6)
        n, c, h, w = x.shape
        return torch.relu(self.sum(x)).view(n, c, h * w)


class AsksForType(Block):
    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        if not torch.is_tensor(x):
            raise TypeError
        maps = [x] if isinstance(x, Tensor) else x
        y = self.sum(maps[0])
        if isinstance(y.shape[2], Tensor) or isinstance(y.shape, Tensor):
            y = y * 3
        return torch.relu(y) if isinstance(y, Tensor) else y


class DropPath(nn.Module):
    """As timm's: in eval mode it hands its input on."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape[0], 1, 1, 1) if self.training else x


class Residual(Block):
    def __init__(self) -> None:
        super().__init__()
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.drop_path(self.wide(x)) + x)


class Alpha(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.add(self.wide(x), self.narrow(x), alpha=0.5)
        return torch.relu(torch.sub(y, self.identity(x), alpha=3))


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
        return y


class ChangesView(Block):
    """``+=`` through another name: no ``y + 5``."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2]
        rows = size
        rows += 1
        y = self.sum(x)
        row = y[:, 1]
        row += 5
        return torch.relu(y) * size + rows


FORWARDS = [ChangesView, Literal, Checked, AsksForType, Residual, Alpha, Checkpointed]


@pytest.mark.parametrize("make", FORWARDS)
@pytest.mark.parametrize("wrap", [False, True])
def test_forwards_as_they_are_written(make: Callable[[], nn.Module], wrap: bool) -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), make()) if wrap else make()
    model, result = converted(model, image())
    other = image(13)
    torch.testing.assert_close(result(other), model(other), rtol=1e-4, atol=1e-4)
    assert vars(make()).keys() == vars(model[2] if isinstance(model, nn.Sequential) else model).keys()


def test_literals_fold_again_and_again() -> None:
    _, result = converted(nn.Sequential(Literal(), Literal()), image(), blocks=2)
    again, report = reparameterize(result, chains=False)
    assert len(report.deployed) == 2
    torch.testing.assert_close(again(image()), result(image()))


class Stores(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.sum(x)
        return torch.relu(self.last)


class Collects(Block):
    def __init__(self) -> None:
        super().__init__()
        self.last: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last.append(self.sum(x))
        return torch.relu(self.last[-1])


@pytest.mark.parametrize("make", [Stores, Collects])
def test_a_forward_that_stores_is_left(make: Callable[[], nn.Module]) -> None:
    model: Any = make().eval()
    with pytest.warns(UserWarning, match=f"the forward of {make.__name__} stores last, which a generated"):
        result, report = reparameterize(model)
    assert [entry.status for entry in report.entries] == ["left"]
    assert vars(model).keys() == vars(make()).keys()
    assert not getattr(model, "last", [])
    y = result(image())
    last: Any = result.last
    torch.testing.assert_close(y, torch.relu(last if torch.is_tensor(last) else last[0]))


class ChangesInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.wide(x)
        channel = x[:, 1]
        channel *= 3
        return torch.relu(y + self.narrow(x))


def test_a_change_through_a_view_is_seen() -> None:
    model = ChangesInput().eval()
    with pytest.warns(UserWarning, match="its input is changed in place before all branches have read it"):
        result, _ = reparameterize(model)
    torch.testing.assert_close(result(image()), model(image()))


class Counts(Block):
    """Assigns a buffer: while it is traced, nothing of that may stay."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.shape[0]
        return torch.relu(self.sum(x))


def test_tracing_leaves_buffers_alone() -> None:
    model = Counts().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, _ = reparameterize(model)
    for each in (model, result):
        assert each.seen.item() == 0
        each(image())
        assert each.seen.item() == 2


def test_the_way_without_an_error() -> None:
    class Asks:
        answers: list[bool | None]

        def __bool__(self) -> bool:
            frame = sys._getframe(1)
            self.answers = [way_without_error(frame.f_code, frame.f_lasti)]
            return True

    for function, answer in ((asserted, True), (raised, True), (caught, None), (chosen, None)):
        asks = Asks()
        function(asks)
        assert asks.answers == [answer], function.__name__
