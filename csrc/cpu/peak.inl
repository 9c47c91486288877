// SPDX-License-Identifier: MIT
// The ceiling of arithmetic: multiply-adds in registers and nothing else. Included once per target, inside its
// namespace, after simd.inl: no #include, no free names.

// Returns the floating-point operations done, 2 per multiply-add and lane. Independent sums: enough to hide the latency
// of two multiply-add units, few enough for the registers beside both factors.
static double multiply_adds(int64_t rounds) {
  constexpr int kSums = kRegisters >= 16 ? 12 : 4;
  Vec sums[kSums] = {};
  Vec a = broadcast(1.0f), b = broadcast(0.5f);
  for (int64_t i = 0; i < rounds; ++i) {
    pin(a);  // the compiler must not see that every round is the same
    pin(b);
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s) {
      sums[s] = sums[s] * b + a;
      pin(sums[s]);
    }
  }
  return 2.0 * kSums * kLanes * static_cast<double>(rounds);
}
