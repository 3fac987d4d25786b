// The 2-byte floating-point numbers of a GPU, and their conversions, bit by bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace eca::cuda {

struct half {
  uint16_t bits;
};

struct bfloat16 {
  uint16_t bits;
};

// Sums, taps and gates.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

namespace numbers {

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

constexpr uint32_t kInfinity = 0x7f800000, kSign = 0x80000000;
constexpr uint16_t kNan = 0x7fff;  // for both formats, and what a GPU returns

// Drops the last bits of a mantissa, to nearest even. A carry runs into the exponent as it should.
inline uint32_t drop_bits(uint32_t bits, int count) {
  const uint32_t below_half = (1u << (count - 1)) - 1;
  return (bits + below_half + (bits >> count & 1)) >> count;
}

inline half to_half(float x) {
  const uint32_t bits = as_bits(x), size = bits & ~kSign;
  const uint32_t sign = bits >> 16 & 0x8000;
  if (size > kInfinity) return {kNan};
  if (size >= as_bits(65520.0f)) return {uint16_t(sign | 0x7c00)};
  // A float of 0.5 to 1 has the last bit of a subnormal half, 2^-24: adding 0.5 rounds there.
  if (size < as_bits(0x1p-14f))
    return {uint16_t(sign | (as_bits(as_float(size) + 0.5f) - as_bits(0.5f)))};
  return {uint16_t(sign | (drop_bits(size, 13) - ((127 - 15) << 10)))};
}

inline float to_float(half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return as_float(sign | kInfinity | mantissa << 13);
  if (exponent == 0) return as_float(sign | as_bits(float(mantissa) * 0x1p-24f));
  return as_float(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
}

inline bfloat16 to_bfloat16(float x) {
  const uint32_t bits = as_bits(x);
  if ((bits & ~kSign) > kInfinity) return {kNan};
  return {uint16_t(drop_bits(bits, 16))};
}

inline float to_float(bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }

}  // namespace numbers

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(half x) { return numbers::to_float(x); }
inline float widen(bfloat16 x) { return numbers::to_float(x); }

// Rounds to nearest even.
template <class T>
inline T narrow(Accumulator<T> x) {
  if constexpr (std::is_same_v<T, half>) return numbers::to_half(x);
  else if constexpr (std::is_same_v<T, bfloat16>) return numbers::to_bfloat16(x);
  else return x;
}

inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }

inline double one_over_root(double x) { return 1 / std::sqrt(x); }

inline float error_function(float x) { return std::erf(x); }
inline double error_function(double x) { return std::erf(x); }

}  // namespace eca::cuda
