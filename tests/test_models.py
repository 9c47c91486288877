# SPDX-License-Identifier: MIT
"""The RepVGG family: parameter counts, keys, backbones, RepVGGplus, checkpointing, what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repvgg_cuda import create_model, model_names, reparameterize
from repvgg_cuda.models import CONFIGS, RepVGG, RepVGGplus
from repvgg_cuda.modules import RepVGGBlock
from repvgg_cuda.networks import randomise_

#: Parameters and state_dict entries in train form and in deploy form, counted on the official code; blocks, and how
#: many of them have an identity branch.
OFFICIAL = {
    "RepVGG-A0": (9_108_968, 8_309_384, 351, 46, 22, 17),
    "RepVGG-A1": (14_092_264, 12_789_864, 351, 46, 22, 17),
    "RepVGG-A2": (28_210_600, 25_499_944, 351, 46, 22, 17),
    "RepVGG-B0": (15_817_960, 14_339_048, 453, 58, 28, 23),
    "RepVGG-B1": (57_415_016, 51_829_480, 453, 58, 28, 23),
    "RepVGG-B1g2": (45_782_376, 41_360_104, 453, 58, 28, 23),
    "RepVGG-B1g4": (39_966_056, 36_125_416, 453, 58, 28, 23),
    "RepVGG-B2": (89_022_376, 80_315_112, 453, 58, 28, 23),
    "RepVGG-B2g2": (70_846_376, 63_956_712, 453, 58, 28, 23),
    "RepVGG-B2g4": (61_758_376, 55_777_512, 453, 58, 28, 23),
    "RepVGG-B3": (123_085_288, 110_960_872, 453, 58, 28, 23),
    "RepVGG-B3g2": (96_911_848, 87_404_776, 453, 58, 28, 23),
    "RepVGG-B3g4": (83_825_128, 75_626_728, 453, 58, 28, 23),
    "RepVGG-D2se": (133_334_836, 120_387_572, 985, 290, 48, 43),
    "RepVGGplus-L2pse": (146_062_864, 127_151_960, 1009, 290, 48, 43),
}

#: Stage widths; the table of the paper and of the official model zoo.
WIDTHS = {
    "RepVGG-A0": (48, 48, 96, 192, 1280),
    "RepVGG-A2": (64, 96, 192, 384, 1408),
    "RepVGG-B1g4": (64, 128, 256, 512, 2048),
    "RepVGG-B3": (64, 192, 384, 768, 2560),
    "RepVGGplus-L2pse": (64, 160, 320, 640, 2560),
}


def tiny(kind: type[RepVGG] | type[RepVGGplus] = RepVGG, **kwargs: Any) -> Any:
    """A network of the same make with few blocks and channels, with statistics, in eval mode."""
    options: dict[str, Any] = {"num_classes": 7, "width_multiplier": [0.25, 0.25, 0.125, 0.125], **kwargs}
    return randomise_(kind([1, 2, 3, 1], **options)).eval()


def images(height: int = 33, width: int = 17, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# -------------------------------------------------------------------------------------------------------- the family


def test_the_names_are_the_official_ones() -> None:
    assert model_names() == list(OFFICIAL)


@pytest.mark.parametrize("name", OFFICIAL)
def test_counts_and_keys_are_the_official_ones(name: str) -> None:
    with torch.device("meta"):
        train, deploy = create_model(name), create_model(name, deploy=True)
    train_parameters, deploy_parameters, train_keys, deploy_keys, blocks, identities = OFFICIAL[name]
    assert parameter_count(train) == train_parameters
    assert parameter_count(deploy) == deploy_parameters
    assert len(train.state_dict()) == train_keys
    assert len(deploy.state_dict()) == deploy_keys
    assert len(train.blocks()) == len(deploy.blocks()) == blocks
    assert sum(block.rbr_identity is not None for block in train.blocks()) == identities
    assert not train.deploy
    assert deploy.deploy


@pytest.mark.parametrize("name", OFFICIAL)
def test_converting_gives_the_deploy_form(name: str) -> None:
    """Class, parameter names and shapes; the official RepVGGplus crashes in forward after its conversion."""
    with torch.device("meta"):
        train, deploy = create_model(name).eval(), create_model(name, deploy=True)
    converted, report = reparameterize(train, inplace=True, strict=True)
    shapes, want = ({key: value.shape for key, value in each.state_dict().items()} for each in (converted, deploy))
    assert shapes == want
    assert (report.parameters_before, report.parameters_after) == OFFICIAL[name][:2]
    assert converted(torch.empty(2, 3, 64, 48, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_and_groups(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
        features = create_model(name, features_only=True)
    assert tuple(info.channels for info in features.feature_info) == WIDTHS[name]
    groups = [block.rbr_dense.conv.groups for block in model.blocks()]
    grouped = CONFIGS[name].groups if len(groups) == 28 else 1
    # Every second layer of stages 1 to 3, never one that widens: the stem is layer 0, stage4.0 is layer 27.
    assert groups == [grouped if layer % 2 == 0 and 2 <= layer <= 26 else 1 for layer in range(len(groups))]
    for block in model.blocks():
        conv = block.rbr_dense.conv
        assert conv.groups == 1 or conv.in_channels == conv.out_channels


def test_official_key_names() -> None:
    keys = set(tiny(use_se=True).state_dict())
    assert {"stage0.rbr_dense.conv.weight", "stage2.1.rbr_identity.running_var", "stage4.0.se.down.bias"} <= keys
    assert {key.split(".")[0] for key in keys} == {"stage0", "stage1", "stage2", "stage3", "stage4", "linear"}
    keys = set(tiny(RepVGGplus, use_post_se=True).state_dict())
    assert {
        "stage0.post_se.up.weight",
        "stage1.blocks.0.rbr_1x1.bn.weight",
        "stage3_first.blocks.0.rbr_dense.conv.weight",
        "stage3_second.blocks.1.rbr_identity.bias",
        "stage1_aux.0.conv.weight",
        "stage2_aux.0.bn.running_mean",
        "stage3_first_aux.3.bias",
    } <= keys


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (32, 32), (33, 17), (64, 20)])
@pytest.mark.parametrize("kind", [RepVGG, RepVGGplus])
def test_any_input_size_and_channels(kind: Any, size: tuple[int, int]) -> None:
    model = tiny(kind, in_channels=5)
    deployed = reparameterize(model, strict=True).model
    x = images(*size, channels=5)
    assert model(x).shape == deployed(x).shape == (2, 7)


def test_create_model_passes_its_arguments_on() -> None:
    with torch.device("meta"):
        model = create_model("RepVGG-A0", num_classes=5, in_channels=1, use_checkpoint=True)
    assert model.linear.out_features == 5
    assert model.stage0.rbr_dense.conv.in_channels == 1
    assert model.stage1.use_checkpoint


@pytest.mark.parametrize(
    ("name", "hint"),
    [("RepVGG-A3", "did you mean"), ("repvgg-a0", "did you mean 'RepVGG-A0'"), ("vit", "the names are")],
)
def test_an_unknown_name_lists_the_known(name: str, hint: str) -> None:
    with pytest.raises(
        RuntimeError, match=f"there is no model '{name}'.*{hint}.*RepVGG-A0, RepVGG-A1.*RepVGGplus-L2pse"
    ):
        create_model(name)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_blocks": [1, 1, 1]}, r"num_blocks must hold four numbers of at least 1, got \[1, 1, 1\]"),
        ({"num_blocks": [1, 1, 0, 1]}, "num_blocks must hold four numbers of at least 1"),
        ({"width_multiplier": None}, r"width_multiplier must hold four positive numbers, got \[\]"),
        ({"width_multiplier": [1, 1, 1, -1]}, "width_multiplier must hold four positive numbers"),
        ({"width_multiplier": [0.01, 1, 1, 1]}, "width_multiplier leaves a stage without channels"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"override_groups_map": {0: 2}}, r"override_groups_map must name layers 1 to 4, .*, got \[0\]"),
        ({"override_groups_map": {5: 2}}, "override_groups_map must name layers 1 to 4"),
        ({"out_indices": (1,)}, "it needs features_only=True"),
        ({"features_only": True, "out_indices": (5,)}, r"out_indices must be distinct stages from 0 to 4.*got \[5\]"),
        ({"features_only": True, "out_indices": (2, 1)}, "in ascending order, got"),
        ({"features_only": True, "out_indices": (1, 1)}, "must be distinct"),
        ({"features_only": True, "out_indices": ()}, "must be distinct stages"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"num_blocks": [1, 1, 1, 1], "width_multiplier": [0.25] * 4, **kwargs}
    with pytest.raises(RuntimeError, match=message):
        RepVGG(**options)


def test_plus_needs_two_blocks_in_stage_3() -> None:
    with pytest.raises(RuntimeError, match=r"num_blocks\[2\] must be at least 2, since stage 3 is split, got 1"):
        RepVGGplus([1, 1, 1, 1], width_multiplier=[0.25] * 4)


# ---------------------------------------------------------------------------------------------------------- backbone


@pytest.mark.parametrize("kind", [RepVGG, RepVGGplus])
@pytest.mark.parametrize("deploy", [False, True])
def test_feature_maps_are_those_of_the_classifier(kind: Any, deploy: bool) -> None:
    classifier = tiny(kind)
    backbone = kind([1, 2, 3, 1], width_multiplier=[0.25, 0.25, 0.125, 0.125], features_only=True).eval()
    backbone.load_state_dict(classifier.state_dict())  # strict: the head and the auxiliary heads are passed over
    if deploy:
        classifier, backbone = reparameterize(classifier).model, reparameterize(backbone).model
    x = images()
    features = backbone(x)
    assert [tuple(each.shape) for each in features] == [
        (2, info.channels, -(-33 // info.reduction), -(-17 // info.reduction)) for info in backbone.feature_info
    ]
    assert [info.reduction for info in backbone.feature_info] == [2, 4, 8, 16, 32]
    names = [name for name, _ in backbone.named_children()]
    assert not any(name in ("gap", "linear") or name.endswith("_aux") for name in names)
    assert torch.equal(classifier.forward_head(features[-1]), classifier(x))


@pytest.mark.parametrize("kind", [RepVGG, RepVGGplus])
def test_out_indices_select_and_cut(kind: Any) -> None:
    """A stage that is never used would stop DistributedDataParallel, so there is none."""
    full = tiny(kind, features_only=True)
    part = kind(
        [1, 2, 3, 1], width_multiplier=[0.25, 0.25, 0.125, 0.125], features_only=True, out_indices=(0, 2)
    ).eval()
    part.load_state_dict(full.state_dict())
    x = images()
    first, third = part(x)
    assert torch.equal(first, full(x)[0])
    assert torch.equal(third, full(x)[2])
    assert [info.stage for info in part.feature_info] == [0, 2]
    part.train()
    sum(feature.sum() for feature in part(x)).backward()
    assert all(parameter.grad is not None for parameter in part.parameters())


def test_a_backbone_still_refuses_foreign_and_missing_keys() -> None:
    backbone = tiny(features_only=True, out_indices=(1,))
    state = tiny().state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key.*stage1.7.weight"):
        backbone.load_state_dict({**state, "stage1.7.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key.*stage0.rbr_dense.conv.weight"):
        backbone.load_state_dict({key: value for key, value in state.items() if key != "stage0.rbr_dense.conv.weight"})
    assert "linear.weight" in state  # the caller's dict is not modified


def test_a_backbone_inside_another_model_loads_and_converts() -> None:
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = tiny(features_only=True, out_indices=(1, 3))
            self.linear = nn.Conv2d(32, 2, 1)  # named as the head that the backbone lacks

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.backbone(x)[-1])

    model, other = Segmenter().eval(), Segmenter().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(images()), other(images()))
    deployed, report = reparameterize(model, strict=True)
    assert len(report.fused) == 7
    assert deployed.backbone.deploy
    assert deployed(images()).shape == model(images()).shape


# -------------------------------------------------------------------------------------------------------- RepVGGplus


def test_plus_trains_with_auxiliary_heads_and_a_penalty() -> None:
    model = tiny(RepVGGplus, use_post_se=True).train()
    outputs = model(images())
    assert list(outputs) == ["main", "stage1_aux", "stage2_aux", "stage3_first_aux"]
    assert all(output.shape == (2, 7) for output in outputs.values())
    penalty = model.custom_l2()
    torch.testing.assert_close(penalty, sum(block.custom_l2() for block in model.blocks()))
    (penalty + sum(output.sum() for output in outputs.values())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_plus_auxiliary_heads_read_their_stages() -> None:
    model = tiny(RepVGGplus)
    maps: dict[str, Tensor] = {}
    for name in ("stage1", "stage2", "stage3_first"):
        getattr(model, name).register_forward_hook(lambda module, args, out, name=name: maps.__setitem__(name, out))
    for module in model.modules():  # train mode of the model alone: its dict, with the statistics of eval mode
        module.training = module is model
    outputs = model(images())
    for name, value in maps.items():
        assert torch.equal(outputs[f"{name}_aux"], getattr(model, f"{name}_aux")(value))
    model.eval()
    assert torch.equal(model(images()), outputs["main"])


def test_plus_in_eval_mode_and_deployed_gives_logits() -> None:
    model = tiny(RepVGGplus, use_post_se=True)
    deployed, report = reparameterize(model, strict=True)
    assert report.dropped == ("stage1_aux", "stage2_aux", "stage3_first_aux")
    assert not any(name.endswith("_aux") for name, _ in deployed.named_children())
    assert hasattr(model, "stage1_aux")
    x = images()
    want = model.double()(x.double())
    assert want.shape == (2, 7)
    exact = reparameterize(model, strict=True).model
    torch.testing.assert_close(exact(x.double()), want)
    assert deployed.train()(x).shape == (2, 7)  # official: KeyError, TypeError or no L2


def test_plus_splits_an_odd_stage_3() -> None:
    model = tiny(RepVGGplus)
    assert (len(model.stage3_first.blocks), len(model.stage3_second.blocks)) == (1, 2)


# ----------------------------------------------------------------------------------------------------- checkpointing


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    output = model(x)
    (output["main"] + output["stage1_aux"] if isinstance(output, dict) else output).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", [RepVGG, RepVGGplus])
def test_checkpointing_changes_no_gradient_and_warns_of_nothing(kind: Any) -> None:
    model = tiny(kind).train()
    recomputing = copy.deepcopy(model)
    recomputing.set_grad_checkpointing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the official code warns once per block
        got = gradients(recomputing, images())
    want = gradients(model, images())
    assert len(got) == len(want) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("mode", "calls"), [("train", 2), ("eval", 1), ("no_grad", 1)])
def test_checkpointing_recomputes_in_training_only(mode: str, calls: int) -> None:
    model = tiny(use_checkpoint=True).train(mode != "eval")
    seen: list[int] = []
    model.stage2[1].register_forward_pre_hook(lambda module, args: seen.append(1))
    with torch.set_grad_enabled(mode != "no_grad"):
        y = model(images())
    if y.requires_grad:
        y.sum().backward()
    assert len(seen) == calls


# ------------------------------------------------------------------------------------------------------ house-keeping


def test_hooks_on_stages_run() -> None:
    model = tiny()
    seen: list[tuple[int, ...]] = []
    model.stage2.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    model(images())
    assert seen == [(2, 32, 5, 3)]


def test_deploy_is_read_from_the_blocks() -> None:
    """The official flag stays False after conversion."""
    model = tiny()
    assert not model.deploy
    for block in model.blocks()[:-1]:
        block.switch_to_deploy()
    assert not model.deploy
    model.blocks()[-1].switch_to_deploy()
    assert model.deploy
    assert all(isinstance(block, RepVGGBlock) for block in model.blocks())
