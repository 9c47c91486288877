# SPDX-License-Identifier: MIT
"""Small networks with the attribute names, hence the keys, of other code bases: train form, and what it deploys to.

Written for these tests from the documented structure of each: a sum of branches, perhaps a BatchNorm on the sum, an
activation. :func:`deployed` builds the deploy form by its own means, from the modules and not from keys.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from repvgg_cuda.branches import BatchNorm, Branch, Branches


class ConvBN(nn.Sequential):
    """Convolution and BatchNorm, without an activation, under the given names."""

    def __init__(
        self, c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1, names: Sequence[str] = ("conv", "bn")
    ) -> None:
        super().__init__()
        self.add_module(names[0], nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False))
        self.add_module(names[1], nn.BatchNorm2d(c_out))


def batchnorm_of(bn: nn.Module) -> BatchNorm:
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    return BatchNorm(bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)


class Block(nn.Module):
    """``act(se(post_bn(sum of branches)))``; ``branches`` are children by name, a ModuleList stands for several."""

    def __init__(
        self,
        geometry: tuple[int, int, int, int],
        branches: dict[str, nn.Module],
        deploy_name: str,
        *,
        bare_identity: bool = False,
        post_bn: str | None = None,
        keeps_post_bn: bool = False,
        se: tuple[str, nn.Module] | None = None,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.geometry, self.names, self.deploy_name = geometry, list(branches), deploy_name
        self.bare_identity, self.post_bn, self.keeps_post_bn = bare_identity, post_bn, keeps_post_bn
        for name, module in branches.items():
            self.add_module(name, module)
        if post_bn is not None:
            self.add_module(post_bn, nn.BatchNorm2d(geometry[1]))
        self.act = nn.ReLU() if act else nn.Identity()
        self.se_name = None if se is None else se[0]
        if se is not None:
            self.add_module(*se)

    def parts(self) -> list[nn.Module]:
        children = [getattr(self, name) for name in self.names]
        return [each for child in children for each in (child if isinstance(child, nn.ModuleList) else [child])]

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([part(x) for part in self.parts()]).sum(0)
        if self.bare_identity:
            y = y + x
        if self.post_bn is not None:
            y = getattr(self, self.post_bn)(y)
        if self.se_name is not None:
            y = y * torch.sigmoid(getattr(self, self.se_name)(y.mean((2, 3), keepdim=True)))
        result: Tensor = self.act(y)
        return result

    def branches(self) -> Branches:
        """The block as data, read from its modules."""
        c_in, c_out, _, groups = self.geometry

        def branch(part: nn.Module) -> Branch:
            if isinstance(part, nn.BatchNorm2d):
                return Branch(None, None, batchnorm_of(part))
            conv = next(module for module in part.modules() if isinstance(module, nn.Conv2d))
            bn = next((module for module in part.modules() if isinstance(module, nn.BatchNorm2d)), None)
            return Branch(conv.weight, conv.bias, None if bn is None else batchnorm_of(bn))

        parts = [branch(part) for part in self.parts()] + ([Branch(None)] if self.bare_identity else [])
        folds_post_bn = self.post_bn is not None and not self.keeps_post_bn
        post_bn = batchnorm_of(getattr(self, self.post_bn)) if self.post_bn is not None and folds_post_bn else None
        return Branches(tuple(parts), c_in, c_out, groups, post_bn)

    def deploy_form(self) -> nn.Module:
        """The same block with one convolution in the place of its branches, its weights still to be loaded."""
        c_in, c_out, stride, groups = self.geometry
        sizes = [m.kernel_size[0] for part in self.parts() for m in part.modules() if isinstance(m, nn.Conv2d)]
        conv = nn.Conv2d(c_in, c_out, max(sizes), stride, max(sizes) // 2, groups=groups)
        if self.deploy_name == "":
            return conv
        for name in self.names:
            delattr(self, name)
        if self.post_bn is not None and not self.keeps_post_bn:
            delattr(self, self.post_bn)
            self.post_bn = None
        self.add_module(self.deploy_name, conv)
        self.names, self.bare_identity = [self.deploy_name], False
        return self


class BNLinear(nn.Module):
    """RepViT's classifier: BatchNorm before a linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.bn, self.l = nn.BatchNorm1d(channels), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.l(self.bn(x))
        return y


class RepViTHead(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.sizes = (channels, classes)
        self.classifier, self.classifier_dist = BNLinear(channels, classes), BNLinear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.classifier(x) + self.classifier_dist(x)) / 2
        return y

    def deploy_form(self) -> nn.Module:
        return nn.Linear(*self.sizes)


class FoldedConvBN(ConvBN):
    """A convolution whose BatchNorm the zoo's deploy form does not have either."""

    def deploy_form(self) -> nn.Module:
        conv = next(iter(self.children()))
        assert isinstance(conv, nn.Conv2d)
        size = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        return nn.Conv2d(*size, groups=conv.groups)  # type: ignore[arg-type]


class Chain(nn.Module):
    """Runs its children, which may be nested under any names, in order; ends in pooling before a linear head."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            if isinstance(child, nn.ModuleList):
                for each in child:
                    x = each(x)
                continue
            pool = isinstance(child, nn.Linear | RepViTHead) and x.dim() == 4
            x = child(x.mean((2, 3)) if pool else x)
        return x


class Residual(nn.Module):
    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.m(x)
        return y


def deployed(network: nn.Module) -> nn.Module:
    """A copy in the deploy form of its code base, its new layers with fresh weights."""
    copied = copy.deepcopy(network)
    for path, module in list(copied.named_modules()):
        if hasattr(module, "deploy_form"):
            parent = copied.get_submodule(path.rpartition(".")[0])
            new = module.deploy_form()
            if new is not module:
                setattr(parent, path.rpartition(".")[2], new)
    return copied


# ------------------------------------------------------------------------------------------------------------ blocks


def _has_identity(c_in: int, c_out: int, stride: int) -> bool:
    return c_in == c_out and stride == 1


def _se(channels: int, first: str, second: str, hidden: int = 2, wrap: str = "") -> nn.Sequential:
    def conv(c_in: int, c_out: int) -> nn.Module:
        layer = nn.Conv2d(c_in, c_out, 1)
        return Chain(**{wrap: layer}) if wrap else layer

    se = nn.Sequential()
    se.add_module(first, conv(channels, hidden))
    se.add_module("relu", nn.ReLU())
    se.add_module(second, conv(hidden, channels))
    return se


Maker = Callable[..., Block]


def repvgg(dense: str, one: str, identity: str, deploy: str, names: Sequence[str], se: str | None = None) -> Maker:
    """A maker of RepVGG's block with these names: 3x3, 1x1 and, where it can be, identity; each with BatchNorm."""

    def make(c_in: int, c_out: int, stride: int = 1, groups: int = 1) -> Block:
        branches: dict[str, nn.Module] = {
            dense: ConvBN(c_in, c_out, 3, stride, groups, names),
            one: ConvBN(c_in, c_out, 1, stride, groups, names),
        }
        if _has_identity(c_in, c_out, stride):
            branches[identity] = nn.BatchNorm2d(c_out)
        layer = None if se is None else (se, _se(c_out, "conv1", "conv2", wrap="conv"))
        return Block((c_in, c_out, stride, groups), branches, deploy, se=layer)

    return make


def mobileone(convs: str, scale: str, identity: str, deploy: str, names: Sequence[str], se: tuple[str, ...]) -> Maker:
    """A maker of MobileOne's block with these names: three kxk convolutions, 1x1 if k > 1, identity; with BatchNorm."""

    def make(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1, use_se: bool = False) -> Block:
        branches: dict[str, nn.Module] = {}
        if _has_identity(c_in, c_out, stride):
            branches[identity] = nn.BatchNorm2d(c_out)
        if size > 1:
            branches[scale] = ConvBN(c_in, c_out, 1, stride, groups, names)
        branches[convs] = nn.ModuleList(ConvBN(c_in, c_out, size, stride, groups, names) for _ in range(3))
        wrap = se[3] if len(se) > 3 else ""
        layer = (se[0], _se(c_out, se[1], se[2], wrap=wrap)) if use_se else None
        return Block((c_in, c_out, stride, groups), branches, deploy, se=layer)

    return make


def qarepvgg(version: int, keeps_post_bn: bool = False) -> Maker:
    """A maker of QARepVGG's block: which branches have a BatchNorm of their own differs, the sum always has one."""
    bn_dense, bn_one, bn_identity = {1: (1, 1, 1), 2: (1, 0, 0), 3: (0, 1, 0), 4: (0, 0, 1), 5: (1, 1, 0)}[version]

    def make(c_in: int, c_out: int, stride: int = 1, groups: int = 1) -> Block:
        def branch(size: int, bn: int) -> nn.Module:
            if bn:
                return ConvBN(c_in, c_out, size, stride, groups)
            return nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)

        branches = {"rbr_dense": branch(3, bn_dense), "rbr_1x1": branch(1, bn_one)}
        identity = _has_identity(c_in, c_out, stride)
        if identity and bn_identity:
            branches["rbr_identity"] = nn.BatchNorm2d(c_out)
        return Block(
            (c_in, c_out, stride, groups),
            branches,
            "rbr_reparam",
            bare_identity=identity and not bn_identity,
            post_bn="bn",
            keeps_post_bn=keeps_post_bn,
        )

    return make


def repvit_mixer(channels: int, legacy: bool) -> Block:
    """RepViT's: depthwise, the identity without BatchNorm; newer ones with a BatchNorm on the sum, not on the 1x1."""
    one = (
        ConvBN(channels, channels, 1, 1, channels, ("c", "bn"))
        if legacy
        else nn.Conv2d(channels, channels, 1, groups=channels)
    )
    branches = {"conv": ConvBN(channels, channels, 3, 1, channels, ("c", "bn")), "conv1": one}
    post_bn = None if legacy else "bn"
    geometry = (channels, channels, 1, channels)
    return Block(geometry, branches, "", bare_identity=True, post_bn=post_bn, act=False)


# ---------------------------------------------------------------------------------------------------------- networks


def _official_like(make: Maker, names: Sequence[str], head: nn.Module, prefix: str = "") -> nn.Module:
    """A stem and two stages, the second grouped; the first block of a stage has as many channels as its input."""
    stages = [
        make(3, 8, 2),
        nn.Sequential(make(8, 8, 2), make(8, 8)),
        nn.Sequential(make(8, 16, 2, 2), make(16, 16, 1, 4)),
    ]
    backbone = dict(zip(names, stages, strict=True))
    return Chain(**{prefix: Chain(**backbone)}, head=head) if prefix else Chain(**backbone, linear=head)


def _mobileone_like(make: Maker, names: Sequence[str], head: nn.Module, prefix: str = "") -> nn.Module:
    stages = [
        make(3, 8, 3, 2),
        nn.Sequential(make(8, 8, 3, 2, 8), make(8, 8, 1), make(8, 8, 3, 1, 8), make(8, 12, 1)),
        nn.Sequential(make(12, 12, 3, 2, 12, use_se=True), make(12, 16, 1, use_se=True)),
    ]
    backbone = dict(zip(names, stages, strict=True))
    return Chain(**{prefix: Chain(**backbone)}, head=head) if prefix else Chain(**backbone, linear=head)


def _yolov6(make: Maker) -> nn.Module:
    def stage(c_in: int, c_out: int) -> nn.Module:
        return nn.Sequential(make(c_in, c_out, 2), rep_block(c_out, c_out))

    def rep_block(c_in: int, c_out: int) -> nn.Module:
        return Chain(conv1=make(c_in, c_out), block=nn.Sequential(make(c_out, c_out), make(c_out, c_out)))

    backbone = Chain(stem=make(3, 8, 2), ERBlock_2=stage(8, 16), ERBlock_3=stage(16, 16))
    neck = Chain(reduce_layer0=Chain(block=ConvBN(16, 8, 1)), Rep_p4=rep_block(8, 12))
    return _with_eps(Chain(backbone=backbone, neck=neck, detect=Chain(stems=nn.ModuleList([ConvBN(12, 4, 1)]))), 1e-3)


def _yolov7() -> nn.Module:
    make = repvgg("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam", ("0", "1"))
    model = nn.Sequential(
        ConvBN(3, 8, 3, 2), nn.SiLU(), make(8, 8), ConvBN(8, 16, 3, 2), make(16, 24), make(24, 24, 1, 4)
    )
    return _with_eps(Chain(model=model), 1e-3)


def _ultralytics() -> nn.Module:
    make = repvgg("conv1", "conv2", "bn", "conv", ("conv", "bn"))
    return _with_eps(Chain(model=nn.Sequential(ConvBN(3, 8, 3, 2), make(8, 8), make(8, 16, 2))), 1e-3)


def _repvit(legacy: bool) -> nn.Module:
    def conv(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Module:
        return FoldedConvBN(c_in, c_out, size, stride, groups, ("c", "bn"))

    def block(channels: int) -> nn.Module:
        mixer = nn.Sequential(repvit_mixer(channels, legacy), nn.Identity())
        mlp = nn.Sequential(conv(channels, 2 * channels, 1), nn.GELU(), conv(2 * channels, channels, 1))
        return Chain(token_mixer=mixer, channel_mixer=Residual(mlp))

    downsample = Chain(token_mixer=nn.Sequential(conv(8, 8, 3, 2, 8), nn.Identity(), conv(8, 12, 1)))
    stem = nn.Sequential(conv(3, 4, 3, 2), nn.GELU(), conv(4, 8, 3, 2))
    features = nn.ModuleList([stem, block(8), downsample, block(12)])
    return Chain(features=features, classifier=RepViTHead(12, 5))


def _with_eps(network: nn.Module, eps: float) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    return network


_OFFICIAL = ("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam", ("conv", "bn"))
_MM_REPVGG = repvgg("branch_3x3", "branch_1x1", "branch_norm", "branch_reparam", ("conv", "norm"), "se_layer")
_MM_MOBILEONE = mobileone(
    *("branch_conv_list", "branch_scale", "branch_norm", "branch_reparam", ("conv", "norm")),
    se=("se", "conv1", "conv2", "conv"),
)
_APPLE = mobileone("rbr_conv", "rbr_scale", "rbr_skip", "reparam_conv", ("conv", "bn"), se=("se", "reduce", "expand"))
_STAGES = ("stage0", "stage1", "stage2")


class Case(NamedTuple):
    """A network, the zoo that its keys are of, and the options without which it is refused."""

    zoo: str
    make: Callable[[], nn.Module]
    options: dict[str, str]


class _FcHead(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


CASES = {
    "mmpretrain RepVGG": Case(
        "mmpretrain",
        lambda: _official_like(_MM_REPVGG, ("stem", "stage_1", "stage_2"), _FcHead(), "backbone"),
        {},
    ),
    "mmpretrain MobileOne": Case(
        "mmpretrain", lambda: _mobileone_like(_MM_MOBILEONE, _STAGES, _FcHead(), "backbone"), {}
    ),
    "Apple MobileOne": Case("mobileone", lambda: _mobileone_like(_APPLE, _STAGES, nn.Linear(16, 5)), {}),
    "YOLOv6": Case("yolov6", lambda: _yolov6(repvgg(*_OFFICIAL)), {}),
    "YOLOv6 QARepVGG": Case("yolov6", lambda: _yolov6(qarepvgg(2, keeps_post_bn=True)), {}),
    "YOLOv7": Case("yolov7", _yolov7, {}),
    "Ultralytics": Case("ultralytics", _ultralytics, {"source": "ultralytics"}),
    "RepViT": Case("repvit", lambda: _repvit(legacy=False), {}),
    "RepViT legacy": Case("repvit", lambda: _repvit(legacy=True), {}),
    **{
        f"QARepVGG V{version}": Case(
            "qarepvgg", lambda version=version: _official_like(qarepvgg(version), _STAGES, nn.Linear(16, 5)), {}
        )
        for version in (1, 2, 3, 4, 5)
    },
}
