// SPDX-License-Identifier: MIT
// torch.ops.repvgg_cuda.*: schemas and kernels. Fake kernels, autograd and autocast are in
// repvgg_cuda/_registration.py, which also holds a copy of the schemas for machines without this module.
#include <torch/csrc/stable/library.h>

#include "ops/conv3x3.h"
#include "ops/fuse_weights.h"
#include "ops/packed.h"

STABLE_TORCH_LIBRARY(repvgg_cuda, m) {
  m.def(
      "conv3x3(Tensor x, Tensor weight, Tensor? bias=None, int stride=1, int groups=1, str activation=\"identity\", "
      "str algorithm=\"auto\", Tensor? packed=None) -> Tensor");
  m.def(
      "prepack(Tensor weight, int[] input_size, int stride=1, int groups=1, str algorithm=\"auto\", "
      "str memory=\"fast\") -> Tensor");
  m.def(
      "conv3x3_chain(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] packed, int[] strides, int[] groups, "
      "int[] activations, str algorithm=\"auto\") -> Tensor");
  m.def(
      "fuse_weights(Tensor[] tensors, float[] bn_eps, int in_channels, int out_channels, int groups, ScalarType? "
      "dtype, "
      "ScalarType? bias_dtype) -> (Tensor weight, Tensor bias)");
  m.def(
      "fuse_weights_batch(Tensor[] tensors, int[] tensors_per_block, float[] bn_eps, int[] in_channels, "
      "int[] out_channels, int[] groups, ScalarType? dtype, ScalarType? bias_dtype) -> (Tensor[] weights, "
      "Tensor[] biases)");
  m.def(
      "fuse_and_prepack(Tensor[] tensors, int[] tensors_per_block, float[] bn_eps, int[] in_channels, "
      "int[] out_channels, int[] groups, ScalarType? dtype, ScalarType? bias_dtype, int[] input_sizes, int[] strides, "
      "str algorithm=\"auto\", str memory=\"fast\") -> (Tensor[] weights, Tensor[] biases, Tensor[] packed)");
}

STABLE_TORCH_LIBRARY_IMPL(repvgg_cuda, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&repvgg::ops::conv3x3));
  m.impl("prepack", TORCH_BOX(&repvgg::ops::prepack));
  m.impl("conv3x3_chain", TORCH_BOX(&repvgg::ops::conv3x3_chain));
  m.impl("fuse_weights", TORCH_BOX(&repvgg::ops::fuse_weights));
  m.impl("fuse_weights_batch", TORCH_BOX(&repvgg::ops::fuse_weights_batch));
  m.impl("fuse_and_prepack", TORCH_BOX(&repvgg::ops::fuse_and_prepack));
}

// Without CUDA kernels in the build the CUDA key still runs F.conv2d, and refuses the rest with a remedy.
STABLE_TORCH_LIBRARY_IMPL(repvgg_cuda, CUDA, m) {
  m.impl("conv3x3", TORCH_BOX(&repvgg::ops::conv3x3));
  m.impl("prepack", TORCH_BOX(&repvgg::ops::prepack));
  m.impl("conv3x3_chain", TORCH_BOX(&repvgg::ops::conv3x3_chain));
  m.impl("fuse_weights", TORCH_BOX(&repvgg::ops::fuse_weights));
  m.impl("fuse_weights_batch", TORCH_BOX(&repvgg::ops::fuse_weights_batch));
  m.impl("fuse_and_prepack", TORCH_BOX(&repvgg::ops::fuse_and_prepack));
}
