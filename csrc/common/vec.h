// Float vectors of the width of the instruction set that this file is compiled
// for, the exponential, and the conversions from and to half types.
//
// Written with the compilers' vector extension: one source for AVX-512, AVX2,
// SSE2 and NEON.  Compiled with contraction to FMA but without -ffast-math:
// -inf and NaN keep their meaning.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace genrec::GENREC_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

using vfloat = float __attribute__((vector_size(kLanes * 4)));
using vint = int32_t __attribute__((vector_size(kLanes * 4)));

#define GENREC_INLINE static inline __attribute__((always_inline))

GENREC_INLINE vfloat splat(float x) { return x - vfloat{}; }
GENREC_INLINE vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
GENREC_INLINE void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
GENREC_INLINE vfloat vmax(vfloat a, vfloat b) { return a < b ? b : a; }

// The reductions' order is fixed, so equal input gives equal bits.
GENREC_INLINE float sum_lanes(vfloat v) {
  float part[kLanes];
  store(part, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}
GENREC_INLINE float max_lanes(vfloat v) {
  float part[kLanes];
  store(part, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] = part[i] < part[i + width] ? part[i + width] : part[i];
  return part[0];
}

// Arguments below this give 0: e^-87.3 is the smallest normal float.
inline constexpr float kExpFloor = -87.3365f;

// e^x for x <= 0, to about 1 ulp; 0 below kExpFloor, NaN for NaN.  x = n ln 2 + r
// with ln 2 in two parts, then a polynomial in r on [-ln 2 / 2, ln 2 / 2].
GENREC_INLINE vfloat exp_nonpositive(vfloat x) {
  const vfloat held = x < kExpFloor ? splat(kExpFloor) : x;  // keeps NaN
  // Adding 1.5 * 2^23 rounds to the nearest integer, left in the low mantissa bits.
  const vfloat magic = splat(12582912.f);
  const vfloat shifted = held * 1.44269504088896341f + magic;
  const vfloat n = shifted - magic;
  vfloat r = held - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  // shifted's bits are those of magic plus n; shifting drops magic's own.
  const vint bits = ((vint)shifted << 23) + (127 << 23);
  vfloat power;
  std::memcpy(&power, &bits, sizeof power);
  return x < kExpFloor ? vfloat{} : p * power;
}

// ---- rows of any element type, as floats, a block at a time ----

// Returns n floats: the row itself, or `scratch` filled by conversion.
GENREC_INLINE const float* as_floats(const float* row, int64_t, float*) { return row; }
GENREC_INLINE const double* as_floats(const double* row, int64_t, double*) { return row; }

GENREC_INLINE const float* as_floats(const bf16_t* row, int64_t n, float* scratch) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(row[i].bits) << 16;
    std::memcpy(scratch + i, &bits, 4);
  }
  return scratch;
}

GENREC_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u) {
    bits = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
  } else if (rest >= 0x400u) {
    bits = sign | ((rest + (112u << 10)) << 13);
  } else {  // subnormal: exact as an integer times 2^-24
    const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

GENREC_INLINE const float* as_floats(const f16_t* row, int64_t n, float* scratch) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(scratch + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i))));
#endif
  for (; i < n; ++i) scratch[i] = half_to_float(row[i].bits);
  return scratch;
}

// Where a block's results are computed before put_floats writes them.
GENREC_INLINE float* float_target(float* row, float*) { return row; }
GENREC_INLINE double* float_target(double* row, double*) { return row; }
GENREC_INLINE float* float_target(bf16_t*, float* scratch) { return scratch; }
GENREC_INLINE float* float_target(f16_t*, float* scratch) { return scratch; }

GENREC_INLINE void put_floats(float*, const float*, int64_t) {}  // already in place
GENREC_INLINE void put_floats(double*, const double*, int64_t) {}

GENREC_INLINE uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
GENREC_INLINE void put_floats(bf16_t* row, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i].bits = float_to_bf16(x[i]);
}

GENREC_INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (bits < 0x38800000u) {                        // subnormal: let the adder round
    float value, magic = 0.5f;
    std::memcpy(&value, &bits, 4);
    value += magic;
    uint32_t sum, base;
    std::memcpy(&sum, &value, 4);
    std::memcpy(&base, &magic, 4);
    return sign | static_cast<uint16_t>(sum - base);
  }
  return sign | static_cast<uint16_t>((bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13);
#endif
}
GENREC_INLINE void put_floats(f16_t* row, const float* x, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) row[i].bits = float_to_half(x[i]);
}

GENREC_INLINE float to_float(float x) { return x; }
GENREC_INLINE double to_float(double x) { return x; }
GENREC_INLINE float to_float(bf16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
GENREC_INLINE float to_float(f16_t x) { return half_to_float(x.bits); }
GENREC_INLINE void from_float(float* p, float x) { *p = x; }
GENREC_INLINE void from_float(double* p, double x) { *p = x; }
GENREC_INLINE void from_float(bf16_t* p, float x) { p->bits = float_to_bf16(x); }
GENREC_INLINE void from_float(f16_t* p, float x) { p->bits = float_to_half(x); }

}  // namespace genrec::GENREC_ISA
