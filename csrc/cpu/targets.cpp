// SPDX-License-Identifier: MIT
// Which instruction set runs is decided once, at run time.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/algos.h"
#include "cpu/target.h"

namespace repvgg::cpu {

namespace baseline {
extern const Target kTarget;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Target kTarget;
}
namespace avx512 {
extern const Target kTarget;
}
#endif

namespace {

const Target& choose_target() {
  const Targets& all = targets();
  const char* limit = std::getenv("REPVGG_CUDA_CPU_ISA");
  const Target* best = all.rows[0];
  std::string names;
  for (int i = 0; i < all.size; ++i) {
    if (all.rows[i]->supported()) best = all.rows[i];
    if (limit != nullptr && std::strcmp(limit, all.rows[i]->name) == 0) return *best;
    names += (i ? ", " : "") + std::string(all.rows[i]->name);
  }
  if (limit != nullptr) {
    throw std::runtime_error("REPVGG_CUDA_CPU_ISA must be one of " + names + ", got '" + limit + "'");
  }
  return *best;
}

}  // namespace

const Targets& targets() {
#if defined(__x86_64__)
  static const Targets all = {{&baseline::kTarget, &avx2::kTarget, &avx512::kTarget}, 3};
#else
  static const Targets all = {{&baseline::kTarget}, 1};
#endif
  return all;
}

const Target& target() {
  static const Target& chosen = choose_target();
  return chosen;
}

const char* target_name() { return target().name; }

double multiply_adds(int64_t rounds) { return target().multiply_adds(rounds); }

const char* supported_target(int i) {
  const Targets& all = targets();
  for (int j = 0; j < all.size; ++j) {
    if (all.rows[j]->supported() && i-- == 0) return all.rows[j]->name;
  }
  return nullptr;
}

}  // namespace repvgg::cpu
