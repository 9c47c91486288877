// SPDX-License-Identifier: MIT
// The element types of tensors and their exact conversion to and from double. The 16-bit conversions are written out,
// in integers, so that host and device round alike and a value is rounded once: through float it would be rounded
// twice.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RVG_HOST_DEVICE __host__ __device__
#else
#define RVG_HOST_DEVICE
#endif

namespace repvgg {

enum class DType : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return "float64";
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
  }
  return "unknown";
}

// A 16-bit IEEE-like format: one sign bit, kExponentBits, kMantissaBits.
template <int ExponentBits>
struct SmallFloat {
  static constexpr int kExponentBits = ExponentBits, kMantissaBits = 15 - ExponentBits;
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr uint32_t kInfinity = ((1u << kExponentBits) - 1) << kMantissaBits;
  static_assert(kMantissaBits >= 1, "a mantissa has bits");

  RVG_HOST_DEVICE static double decode(uint16_t bits) {
    const uint64_t sign = static_cast<uint64_t>(bits >> 15) << 63;
    const uint64_t exponent = (bits & kInfinity) >> kMantissaBits;
    const uint64_t mantissa = bits & ((1u << kMantissaBits) - 1);
    uint64_t wide = 0;
    if (exponent == (1u << kExponentBits) - 1) {  // infinity, NaN
      wide = 0x7FF0000000000000ull | (mantissa << (52 - kMantissaBits));
    } else if (exponent != 0) {
      wide = ((exponent - kBias + 1023) << 52) | (mantissa << (52 - kMantissaBits));
    } else {  // zero, subnormal: mantissa * 2^(1 - bias - mantissa bits), exact
      const uint64_t unit_bits = static_cast<uint64_t>(1 - kBias - kMantissaBits + 1023) << 52;
      double unit;
      std::memcpy(&unit, &unit_bits, sizeof unit);
      const double value = static_cast<double>(mantissa) * unit;
      std::memcpy(&wide, &value, sizeof wide);
    }
    wide |= sign;
    double value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }

  // Round to nearest, ties to even.
  RVG_HOST_DEVICE static uint16_t encode(double value) {
    uint64_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const uint32_t sign = static_cast<uint32_t>(wide >> 63) << 15;
    wide &= ~(1ull << 63);
    if (wide > 0x7FF0000000000000ull) return static_cast<uint16_t>(sign | kInfinity | (1u << (kMantissaBits - 1)));
    const int exponent = static_cast<int>(wide >> 52) - 1023;
    if (exponent > kBias) return static_cast<uint16_t>(sign | kInfinity);
    const uint64_t significand = (wide & 0xFFFFFFFFFFFFFull) | (1ull << 52);
    int shift = 52 - kMantissaBits;
    uint32_t offset = 0;  // what the exponent field adds beyond the significand's own leading bit
    if (exponent + kBias >= 1) {
      offset = static_cast<uint32_t>(exponent + kBias - 1) << kMantissaBits;
    } else {
      shift += 1 - (exponent + kBias);
      if (shift > 54) return static_cast<uint16_t>(sign);
    }
    const uint64_t quotient = significand >> shift, remainder = significand & ((1ull << shift) - 1);
    const uint64_t half = 1ull << (shift - 1);
    const bool up = remainder > half || (remainder == half && (quotient & 1) != 0);
    return static_cast<uint16_t>(sign | (offset + static_cast<uint32_t>(quotient) + (up ? 1u : 0u)));
  }
};

using Float16 = SmallFloat<5>;
using BFloat16 = SmallFloat<8>;

RVG_HOST_DEVICE inline double load_double(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kFloat16: return Float16::decode(static_cast<const uint16_t*>(data)[i]);
    case DType::kBFloat16: return BFloat16::decode(static_cast<const uint16_t*>(data)[i]);
  }
  return 0.0;
}

RVG_HOST_DEVICE inline void store_double(void* data, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(data)[i] = value; break;
    case DType::kFloat32: static_cast<float*>(data)[i] = static_cast<float>(value); break;
    case DType::kFloat16: static_cast<uint16_t*>(data)[i] = Float16::encode(value); break;
    case DType::kBFloat16: static_cast<uint16_t*>(data)[i] = BFloat16::encode(value); break;
  }
}

}  // namespace repvgg
