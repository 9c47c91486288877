// SPDX-License-Identifier: MIT
#include "cpu/fuse_weights.h"

namespace repvgg::cpu {

void fuse_weights(const FoldProblem& prob, int64_t begin, int64_t end) {
  double scales[kMaxBranches];
  for (int64_t k = begin; k < end; ++k) {
    for (int i = 0; i < prob.n_branches; ++i) scales[i] = fold_affine(prob.branches[i].bn, k).scale;
    const double post_scale = fold_affine(prob.post_bn, k).scale;
    for (int64_t c = 0; c < prob.C; ++c) {
      for (int t = 0; t < 9; ++t) {
        store_double(prob.weight, prob.weight_dtype, (k * prob.C + c) * 9 + t,
                     fold_weight(prob, scales, post_scale, k, c, t));
      }
    }
    store_double(prob.bias, prob.bias_dtype, k, fold_bias(prob, k));
  }
}

}  // namespace repvgg::cpu
