# SPDX-License-Identifier: MIT
"""verify: right folds pass in every dtype, each kind of wrong fold fails in its own row, nothing is modified."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from repvgg_cuda import RepVGGBlock, create_model, reparameterize, testing, verify
from repvgg_cuda.models import RepVGG, RepVGGplus
from repvgg_cuda.networks import randomise_
from repvgg_cuda.verification import NETWORK_FACTOR, Verification


def tiny(kind: Any = RepVGG, **kwargs: Any) -> Any:
    options: dict[str, Any] = {"num_classes": 7, "width_multiplier": [0.25, 0.25, 0.125, 0.125], **kwargs}
    return randomise_(kind([1, 2, 2, 1], **options)).eval()


def pair(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """A trained network and its deployed form."""
    trained = tiny(*args, **kwargs)
    return trained, reparameterize(trained, strict=True).model


def images(height: int = 17, width: int = 12, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def failed(result: Verification) -> list[str]:
    return [row.name for row in result.rows if not row.ok]


# ---------------------------------------------------------------------------------------------------------- right folds


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (RepVGG, {}),
        (RepVGG, {"override_groups_map": {2: 2, 3: 16, 4: 4}}),
        (RepVGG, {"use_se": True, "width_multiplier": [0.25, 0.125, 0.0625, 0.0625]}),
        (RepVGGplus, {"use_post_se": True}),
    ],
    ids=["plain", "groups", "se", "plus"],
)
def test_a_right_fold_passes(kind: Any, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    trained, deployed = pair(kind, **kwargs)
    if dtype == torch.float64:  # folded from wider weights; the other dtypes round the float32 fold
        deployed = reparameterize(copy.deepcopy(trained).double(), strict=True).model
    result = verify(trained, deployed.to(dtype), images())
    assert result.ok, str(result)
    assert result.first_failure is None
    assert result.not_compared == ()
    assert result.dtype == str(dtype).removeprefix("torch.")
    assert [row.name for row in result.rows] == [
        *(name for name, module in trained.named_modules() if isinstance(module, RepVGGBlock)),
        "whole network",
    ]
    assert all(0 <= row.share <= 1 and row.max_error >= row.error for row in result.rows)
    assert any(row.share > 1e-3 for row in result.rows)  # the bounds are within sight of the errors
    assert result.network.trained_error is not None


@pytest.mark.parametrize(
    "name",
    [
        "RepVGG-A0",
        pytest.param("RepVGG-B1g4", marks=pytest.mark.slow),
        pytest.param("RepVGG-D2se", marks=pytest.mark.slow),
    ],
)
def test_official_networks_err_as_little_as_the_trained(name: str) -> None:
    trained = randomise_(create_model(name)).eval()
    deployed = reparameterize(trained, strict=True).model
    result = verify(trained, deployed, images(48, 40))
    assert result.ok, str(result)
    assert result.network.trained_error is not None
    assert result.network.max_error <= NETWORK_FACTOR * result.network.trained_error


def exact_block() -> RepVGGBlock:
    """One channel, every weight 1, BatchNorms that scale by 1: float32 computes whole numbers without an error."""
    block = RepVGGBlock(1, 1).eval()
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    return block


def test_a_unit_in_the_last_place_is_no_fault() -> None:
    trained = exact_block()
    deployed = reparameterize(trained, strict=True).model
    x = torch.full((1, 1, 4, 4), 1024.0)
    result = verify(trained, deployed, x)
    assert result.ok
    assert (result.network.max_error, result.network.share, result.network.trained_error) == (0, 0, 0)
    deployed.rbr_reparam.bias.data += torch.finfo(torch.float32).eps * 8192  # the last place of the outputs
    result = verify(trained, deployed, x)
    assert result.network.max_error > 0
    assert result.network.trained_error == 0
    assert result.ok


def test_zero_of_a_bound_of_zero_is_ok() -> None:
    trained, deployed = pair()
    for model in (trained, deployed):
        nn.init.zeros_(model.linear.weight)
        nn.init.zeros_(model.linear.bias)
    result = verify(trained, deployed, images())
    assert result.ok
    assert (result.network.bound, result.network.share) == (0, 0)


def test_branches_that_cancel_are_given_their_rounding() -> None:
    """The oracle and the fold round relative to the branches, a million times the sum."""
    trained = randomise_(RepVGGBlock(4, 4)).eval().double()
    with torch.no_grad():
        trained.rbr_dense.conv.weight[:, :, 1, 1] += 1e6
        trained.rbr_1x1.conv.weight[:, :, 0, 0] -= 1e6
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(trained.rbr_1x1.bn, name).copy_(getattr(trained.rbr_dense.bn, name))
    result = verify(trained, reparameterize(trained, strict=True).model, images(channels=4))
    assert result.rows[0].ok, str(result)
    assert result.rows[0].max_error > 1e-11


# ---------------------------------------------------------------------------------------------------------- wrong folds


def damage_rounding(trained: Any, deployed: Any) -> None:
    deployed.stage2[1].rbr_reparam.weight.data = deployed.stage2[1].rbr_reparam.weight.bfloat16().float()


def damage_eps(trained: Any, deployed: Any) -> None:
    for module in trained.stage2[1].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3


def damage_identity(trained: Any, deployed: Any) -> None:
    trained.stage2[1].rbr_identity = None


def damage_bias(trained: Any, deployed: Any) -> None:
    deployed.stage2[1].rbr_reparam.bias.data *= 1.001


def damage_taps(trained: Any, deployed: Any) -> None:
    weight = deployed.stage2[1].rbr_reparam.weight
    weight.data = weight.data.flip(3)


def damage_one_tap(trained: Any, deployed: Any) -> None:
    deployed.stage2[1].rbr_reparam.weight.data[0, 0, 1, 1] += 1e-3


def damage_activation(trained: Any, deployed: Any) -> None:
    deployed.stage2[1].rbr_reparam.activation = "identity"


def damage_nan(trained: Any, deployed: Any) -> None:
    deployed.stage2[1].rbr_reparam.weight.data[0, 0, 0, 0] = torch.nan


DAMAGES = [
    damage_rounding,
    damage_eps,
    damage_identity,
    damage_bias,
    damage_taps,
    damage_one_tap,
    damage_nan,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_wrong_fold_fails_in_its_row(damage: Callable[[Any, Any], None]) -> None:
    trained, deployed = pair()
    damage(trained, deployed)
    result = verify(trained, deployed, images())
    assert not result.ok
    assert result.first_failure is not None
    assert result.first_failure.name == "stage2.1"
    assert set(failed(result)) <= {"stage2.1", "whole network"}
    assert "stage2.1 FAILS" in result.summary()
    assert "FAIL" in str(result)


def test_what_no_single_layer_shows_fails_in_the_network() -> None:
    """A wrong classifier, or an activation lost between two right convolutions."""
    trained, deployed = pair()
    deployed.linear.weight.data[0] *= 1.001
    assert failed(verify(trained, deployed, images())) == ["whole network"]
    trained, deployed = pair()
    damage_activation(trained, deployed)
    assert failed(verify(trained, deployed, images())) == ["whole network"]
    trained, deployed = pair(use_se=True, width_multiplier=[0.25] * 4)
    deployed.stage2[1].se = nn.Identity().eval()
    assert failed(verify(trained, deployed, images())) == ["whole network"]


def test_float64_is_held_to_its_own_precision() -> None:
    trained = tiny().double()
    deployed = reparameterize(trained, strict=True).model
    deployed.linear.weight.data *= 1 + 1e-12
    assert failed(verify(trained, deployed, images())) == ["whole network"]


def test_nan_anywhere_is_not_ok() -> None:
    trained, deployed = pair()
    x = images()
    x[0, 0, 0, 0] = torch.nan
    result = verify(trained, deployed, x)
    assert len(failed(result)) == len(result.rows)
    deployed.linear.bias.data[0] = torch.nan
    assert failed(verify(trained, deployed, images())) == ["whole network"]
    for module in (trained, deployed):
        module.linear.bias.data[0] = torch.inf  # equal in both, but no number
    assert failed(verify(trained, deployed, images())) == ["whole network"]


def test_overflow_is_not_ok_even_if_the_trained_network_overflows() -> None:
    trained, deployed = pair()
    for module in (trained, deployed):
        module.linear.bias.data[0] = 1e6  # more than float16 holds
    assert verify(trained, deployed, images()).ok
    assert failed(verify(trained, deployed.half(), images())) == ["whole network"]


def test_weights_rounded_twice_are_noticed() -> None:
    trained, deployed = pair()
    assert not verify(trained, deployed.to(torch.bfloat16).to(torch.float16), images()).ok


def test_the_worst_run_of_a_shared_block_counts() -> None:
    block = randomise_(RepVGGBlock(4, 4)).eval()
    trained = nn.Sequential(block, nn.Sequential(block)).eval()
    deployed = reparameterize(trained, strict=True).model
    deployed[0].rbr_reparam.weight.data[0, 0, 1, 1] += 1e-3

    class SecondInputOnly(nn.Sequential):
        """Runs the block on nothing first: only the second run can show the damage."""

        def forward(self, x: Tensor) -> Tensor:
            self[0](torch.zeros_like(x))
            y: Tensor = self[0](x)
            self[0](torch.zeros_like(x))
            return y

    trained, deployed = SecondInputOnly(*trained).eval(), SecondInputOnly(*deployed).eval()
    result = verify(trained, deployed, images(channels=4))
    assert [row.name for row in result.rows] == ["0", "whole network"]
    assert not result.rows[0].ok


# ------------------------------------------------------------------------------------------- models of other libraries


def test_a_plain_conv2d_is_a_deployed_layer() -> None:
    """What the official code and others deploy to."""
    trained, deployed = pair()
    for block in deployed.blocks():
        ours = block.rbr_reparam
        conv = nn.Conv2d(ours.in_channels, ours.out_channels, 3, ours.stride, 1, groups=ours.groups).eval()
        conv.load_state_dict(ours.state_dict())
        block.rbr_reparam, block.nonlinearity = conv, nn.ReLU().eval()
    assert verify(trained, deployed, images()).ok
    deployed.stage1[0].rbr_reparam.weight.data[0, 0, 0, 0] += 1e-2
    assert failed(verify(trained, deployed, images()))[0] == "stage1.0"


def test_blocks_without_a_counterpart_are_named() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = RepVGGBlock(3, 4), RepVGGBlock(3, 4)
            self.left = nn.Module()
            self.left.dense = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y + self.left.dense(y)

    trained = randomise_(Branching()).eval()
    with pytest.warns(
        UserWarning, match="cannot fold 1 block: .the model itself.: left.dense has padding_mode 'reflect'"
    ):
        deployed = reparameterize(trained).model
    result = verify(trained, deployed, images())
    assert result.ok, str(result)
    assert result.not_compared == (
        "(the model itself): it cannot be folded: left.dense has padding_mode 'reflect'; the folded convolution pads "
        "zeros",
        "unused: these inputs do not reach it",
    )
    assert "not compared: unused: these inputs do not reach it" in str(result)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: [y, y * 2],
        lambda y: (y, [y + 1]),
        lambda y: {"main": y, "all": {"a": y, "index": y.argmax(1)}, "nothing": None},
    ],
    ids=["list", "nested", "dict"],
)
def test_outputs_of_any_nesting(wrap: Callable[[Tensor], Any]) -> None:
    class Wrapped(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Any:
            return wrap(self.model(x))

    trained, deployed = pair()
    assert verify(Wrapped(trained).eval(), Wrapped(deployed).eval(), images()).ok
    deployed.linear.weight.data[0] *= 1.01
    result = verify(Wrapped(trained).eval(), Wrapped(deployed).eval(), images())
    assert failed(result) == ["whole network"]
    assert result.agreement is None


def test_feature_maps_compare() -> None:
    trained, deployed = pair(features_only=True, out_indices=(0, 3))
    result = verify(trained, deployed, images())
    assert result.ok
    assert len(result.rows) == 7
    deployed.stage3[1].rbr_reparam.bias.data[0] += 1
    assert failed(verify(trained, deployed, images())) == ["stage3.1", "whole network"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    trained, deployed = pair()
    assert verify(wrap(trained).eval(), deployed, images()).ok
    assert verify(trained, wrap(deployed).eval(), images()).ok


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("which", ["trained", "deployed"])
def test_training_mode_is_refused(which: str) -> None:
    models = dict(zip(("trained", "deployed"), pair(), strict=True))
    models[which].stage2.train()
    with pytest.raises(RuntimeError, match=rf"verify: {which} is in training mode \(stage2\); call {which}\.eval\(\)"):
        verify(**models, inputs=images())


def test_the_wrong_order_and_other_networks_are_refused() -> None:
    trained, deployed = pair()
    with pytest.raises(RuntimeError, match="give the trained model first, then the deployed one"):
        verify(deployed, trained, images())
    with pytest.raises(RuntimeError, match="give the trained model first"):
        verify(trained, trained, images())
    with pytest.raises(RuntimeError, match="deployed has no module 'stage0', which is a block of trained"):
        verify(trained, nn.Conv2d(3, 7, 3).eval(), images())
    with pytest.raises(
        RuntimeError, match=r"stage3\.0: deployed has a convolution \[48, 32, 3, 3\], .* not its conversion"
    ):
        verify(trained, pair(width_multiplier=[0.25, 0.25, 0.1875, 0.125])[1], images())
    with pytest.raises(RuntimeError, match=r"verify: trained returns \[\[2, 7\]\], deployed \[\[2, 9\]\]"):
        verify(trained, pair(num_classes=9)[1], images())
    deployed.stage1[0].rbr_reparam.stride = 1
    with pytest.raises(
        RuntimeError, match=r"stage1\.0: deployed has a convolution .*, stride 1, groups 1, where trained"
    ):
        verify(trained, deployed, images())


@pytest.mark.parametrize("inputs", [torch.zeros(1, 3, 8, 8, dtype=torch.long), torch.zeros(0, 3, 8, 8), "photo.png"])
def test_unusable_inputs_are_refused(inputs: Any) -> None:
    with pytest.raises(RuntimeError, match="inputs must be a floating point tensor with at least one element"):
        verify(*pair(), inputs)


def test_outputs_without_numbers_are_refused() -> None:
    class Index(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    trained, deployed = pair()
    with pytest.raises(RuntimeError, match="trained must return floating point tensors, got Tensor"):
        verify(Index(trained).eval(), Index(deployed).eval(), images())


# -------------------------------------------------------------------------------------------------------- house-keeping


def test_nothing_is_modified() -> None:
    trained, deployed = pair()
    states = [{key: value.clone() for key, value in model.state_dict().items()} for model in (trained, deployed)]
    generator = torch.get_rng_state()
    verify(trained, deployed, images())
    verify(trained, copy.deepcopy(deployed).half(), images())
    for model, before in zip((trained, deployed), states, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert not any(parameter.dtype == torch.float64 for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled()


def test_tf32_is_off_meanwhile_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    trained, deployed = pair()
    seen: list[bool] = []
    deployed.register_forward_hook(lambda *args: seen.append(torch.backends.cudnn.allow_tf32))
    verify(trained, deployed, images())
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32
    deployed.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verify(trained, deployed, images())
    assert torch.backends.cudnn.allow_tf32


def test_agreement_counts_top_classes() -> None:
    trained, deployed = pair()
    assert verify(trained, deployed, images()).agreement == (2, 2)
    deployed.linear.bias.data[5] += 1000
    want = int((trained(images()).argmax(1) == 5).sum())
    result = verify(trained, deployed, images())
    assert result.agreement == (want, 2)
    assert f"top class agrees on {want} of 2" in result.summary()


def test_the_table_says_what_the_rows_say() -> None:
    trained, deployed = pair()
    result = verify(trained, deployed, images())
    lines = str(result).splitlines()
    assert lines[0].split() == ["layer", "branches", "max", "error", "worst", "of", "bound", "used"]
    assert len(lines) == 1 + len(result.rows) + 1
    for line, row in zip(lines[1:-1], result.rows, strict=True):
        assert line.startswith(row.name)
        assert f"{row.max_error:.2e}" in line
        assert line.endswith("ok")
    assert lines[-1] == result.summary()
    assert result.summary().startswith("all 8 rows within their bounds; float32 output off the float64 oracle by ")
    one, two = (dataclasses.replace(row, ok=False) for row in result.rows[2:4])
    broken = dataclasses.replace(result, rows=(*result.rows[:2], one, two, *result.rows[4:]))
    assert broken.summary().startswith("stage2.0 FAILS first of 2; ")
    out = io.StringIO()
    Console(file=out, width=100).print(broken.render())
    text = out.getvalue()
    assert text.count("FAIL") == 3
    assert all(row.name in text for row in result.rows)
    assert "top class agrees" in text
