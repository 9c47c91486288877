# SPDX-License-Identifier: MIT
"""Deploys RepVGG-style networks: every multi-branch block becomes one 3x3 convolution with bias and activation."""

from repvgg_cuda._ext import build_info, has_cuda_kernels
from repvgg_cuda._version import __version__
from repvgg_cuda.benchmarking import BenchmarkResult, benchmark
from repvgg_cuda.branches import BatchNorm, Branch, Branches
from repvgg_cuda.convert import reparameterize
from repvgg_cuda.deployment import deploy
from repvgg_cuda.models import create_model, model_names
from repvgg_cuda.modules import RepConv3x3, RepVGGBlock
from repvgg_cuda.ops import (
    ChainLayer,
    FusedLayer,
    algorithms,
    conv3x3,
    conv3x3_chain,
    explain,
    fuse_and_prepack,
    fuse_weights,
    fuse_weights_batch,
    prepack,
    refusal,
)
from repvgg_cuda.preparation import prepare
from repvgg_cuda.report import Report
from repvgg_cuda.state_dict import fuse_state_dict
from repvgg_cuda.unfusion import unfuse
from repvgg_cuda.verification import verify

__all__ = [
    "BatchNorm",
    "BenchmarkResult",
    "Branch",
    "Branches",
    "ChainLayer",
    "FusedLayer",
    "RepConv3x3",
    "RepVGGBlock",
    "Report",
    "__version__",
    "algorithms",
    "benchmark",
    "build_info",
    "conv3x3",
    "conv3x3_chain",
    "create_model",
    "deploy",
    "explain",
    "fuse_and_prepack",
    "fuse_state_dict",
    "fuse_weights",
    "fuse_weights_batch",
    "has_cuda_kernels",
    "model_names",
    "prepack",
    "prepare",
    "refusal",
    "reparameterize",
    "unfuse",
    "verify",
]
