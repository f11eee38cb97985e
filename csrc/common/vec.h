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

#if defined(__AVX2__)
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
using vuint = uint32_t __attribute__((vector_size(kLanes * 4)));
using vushort = uint16_t __attribute__((vector_size(kLanes * 2)));

#define GENREC_INLINE static inline __attribute__((always_inline))

GENREC_INLINE vfloat splat(float x) { return x - vfloat{}; }
GENREC_INLINE vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
GENREC_INLINE void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }

// The larger lane; b where either is NaN.  Said in one instruction where the
// compiler would make two of the comparison.
GENREC_INLINE vfloat vmax(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller lane; b where either is NaN.
GENREC_INLINE vfloat vmin(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// Halves are folded until one lane is left: the order is fixed, so equal input
// gives equal bits.
#if defined(__AVX512F__)
GENREC_INLINE float sum_lanes(vfloat v) { return _mm512_reduce_add_ps((__m512)v); }
GENREC_INLINE float max_lanes(vfloat v) { return _mm512_reduce_max_ps((__m512)v); }
#else
using vhalf = float __attribute__((vector_size(16)));
GENREC_INLINE float sum_lanes(vfloat v) {
  vhalf part;
  std::memcpy(&part, &v, sizeof part);
  if constexpr (kLanes == 8) {
    vhalf high;
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof part, sizeof high);
    part += high;
  }
  return (part[0] + part[2]) + (part[1] + part[3]);
}
GENREC_INLINE float max_lanes(vfloat v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = most < v[i] ? v[i] : most;
  return most;
}
#endif

// A function that only asks for memory has to be inlined: GCC takes its calls for idle and drops
// them.
#define GENREC_INLINE_MEMBER inline __attribute__((always_inline))

// Asks for the cache line of p; any address will do, also one past the end.  `prefetch_far`
// brings it as far as the second-level cache, which has room for more lines on their way.
GENREC_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
GENREC_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
GENREC_INLINE void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1); }

// Exponentials are taken to base 2: e^d = 2^t with t = d log2(e), and log2(e)
// joins the temperature in one factor.
inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr double kLn2 = 0.693147180559945309;

// Exponents below this give 0: 2^-126 is the smallest normal float.
inline constexpr float kExponentFloor = -126.f;

// t held at kExponentFloor from below; NaN stays.
GENREC_INLINE vfloat hold(vfloat t) { return vmax(splat(kExponentFloor), t); }

// 2^held for t <= 0 and held = hold(t), to about 1 ulp; 0 where t is below the
// floor, NaN for NaN.  A polynomial in the distance to the nearest integer:
// interpolation at the Chebyshev nodes of [-1/2, 1/2], relative error 1e-8.
GENREC_INLINE vfloat exp2_held(vfloat t, vfloat held) {
#if defined(__AVX512F__)
  const vfloat n = (vfloat)_mm512_roundscale_ps((__m512)held, 0);
#else
  // Adding 1.5 * 2^23 rounds to the nearest integer, left in the low mantissa bits.
  const vfloat shifted = held + 12582912.f;
  const vfloat n = shifted - 12582912.f;
#endif
  const vfloat f = held - n;
  vfloat p = splat(1.545316336e-04f);
  p = p * f + 1.339086331e-03f;
  p = p * f + 9.618083015e-03f;
  p = p * f + 5.550356954e-02f;
  p = p * f + 2.402265072e-01f;
  p = p * f + 6.931471825e-01f;
  p = p * f + 1.f;
#if defined(__AVX512F__)
  const __mmask16 in = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(kExponentFloor), _CMP_NLT_UQ);
  return (vfloat)_mm512_maskz_scalef_ps(in, (__m512)p, (__m512)n);
#else
  // shifted's bits are those of the constant plus n; shifting drops the constant's own.
  const vint bits = ((vint)shifted << 23) + (127 << 23);
  vfloat power;
  std::memcpy(&power, &bits, sizeof power);
  return t < kExponentFloor ? vfloat{} : p * power;
#endif
}

// 2^t for any t below 128, to about 2 ulp and with the fewest instructions: what
// sums are made of.  0 for -inf and far below, NaN for NaN, +inf from 128 on.
GENREC_INLINE vfloat exp2_any(vfloat t) {
#if defined(__AVX512F__)
  // t less its floor, and scalef takes the floor of t itself.  The polynomial of
  // least relative error on [0, 1], 7.5e-8.
  const vfloat f = (vfloat)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF);
  vfloat p = splat(1.877576675e-03f);
  p = p * f + 8.989340090e-03f;
  p = p * f + 5.582631805e-02f;
  p = p * f + 2.401536170e-01f;
  p = p * f + 6.931530732e-01f;
  p = p * f + 9.999999251e-01f;
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)t);
#else
  const vfloat held = vmin(splat(128), hold(t));
  return exp2_held(t, held);
#endif
}

// ---- elements of any type as floats ----

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

GENREC_INLINE uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
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

// ---- kLanes elements at a time ----

GENREC_INLINE vfloat load_floats(const float* p) { return load(p); }
GENREC_INLINE vfloat load_floats(const bf16_t* p) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#elif defined(__AVX2__)
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
  vushort halves;
  std::memcpy(&halves, p, sizeof halves);
  return (vfloat)(__builtin_convertvector(halves, vuint) << 16);
#endif
}
GENREC_INLINE vfloat load_floats(const f16_t* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

// To nearest even, left in the upper half of each lane; a NaN may become an
// infinity, and store_pair's callers see to it that there is none.
GENREC_INLINE vuint round_to_bf16(vfloat v) {
  const vuint bits = (vuint)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

GENREC_INLINE void store_floats(float* p, vfloat v) { store(p, v); }
GENREC_INLINE void store_floats(bf16_t* p, vfloat v) {
  const vuint rounded = v == v ? round_to_bf16(v) : (vuint{} + 0x7fc00000u);
  const vushort halves = __builtin_convertvector(rounded >> 16, vushort);
  std::memcpy(static_cast<void*>(p), &halves, sizeof halves);
}
GENREC_INLINE void store_floats(f16_t* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// Twice as many, as two vectors, none of them NaN where they are stored.  Which element goes to
// which lane is the type's own business, the same for loads and stores: bf16 puts even elements
// into one vector and odd ones into the other, which needs no shuffle.
template <class T>
GENREC_INLINE void load_pair(const T* p, vfloat& a, vfloat& b) {
  a = load_floats(p);
  b = load_floats(p + kLanes);
}
template <class T>
GENREC_INLINE void store_pair(T* p, vfloat a, vfloat b) {
  store_floats(p, a);
  store_floats(p + kLanes, b);
}
GENREC_INLINE void load_pair(const bf16_t* p, vfloat& a, vfloat& b) {
  vuint both;
  std::memcpy(&both, p, sizeof both);
  a = (vfloat)(both << 16);
  b = (vfloat)(both & 0xffff0000u);
}
GENREC_INLINE void store_pair(bf16_t* p, vfloat a, vfloat b) {
  const vuint both = (round_to_bf16(a) >> 16) | (round_to_bf16(b) & 0xffff0000u);
  std::memcpy(static_cast<void*>(p), &both, sizeof both);
}

// The same past the caches, to an address that whole vectors divide; their writer calls
// `streamed` before anybody else reads them.
#if defined(__AVX512F__) || defined(__AVX2__)
inline constexpr bool kStreams = true;
GENREC_INLINE void stream(void* p, vfloat v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#else
  _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#endif
}
GENREC_INLINE void streamed() { _mm_sfence(); }
#else
inline constexpr bool kStreams = false;
GENREC_INLINE void stream(void* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
GENREC_INLINE void streamed() {}
#endif

// The first n < kLanes elements, `fill` in the other lanes.
template <class T>
GENREC_INLINE vfloat load_some(const T* p, int n, float fill) {
  float part[kLanes];
  for (int i = 0; i < kLanes; ++i) part[i] = fill;
  for (int i = 0; i < n; ++i) part[i] = to_float(p[i]);
  return load(part);
}
#if defined(__AVX512F__)
// A load waits for every store that it overlaps: by masks, without one.
GENREC_INLINE vfloat only_some(__m512 v, int n, float fill) {
  const __mmask16 lanes = static_cast<__mmask16>((1u << n) - 1);
  return (vfloat)_mm512_mask_mov_ps(_mm512_set1_ps(fill), lanes, v);
}
GENREC_INLINE vfloat load_some(const float* p, int n, float fill) {
  const __mmask16 lanes = static_cast<__mmask16>((1u << n) - 1);
  return (vfloat)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), lanes, p);
}
GENREC_INLINE vfloat load_some(const bf16_t* p, int n, float fill) {
  const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  return only_some((__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16), n, fill);
}
GENREC_INLINE vfloat load_some(const f16_t* p, int n, float fill) {
  const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  return only_some(_mm512_cvtph_ps(halves), n, fill);
}
#endif
template <class T>
GENREC_INLINE void store_some(T* p, vfloat v, int n) {
  float part[kLanes];
  store(part, v);
  for (int i = 0; i < n; ++i) from_float(p + i, part[i]);
}

// ---- lanes chosen by a mask, bit i for lane i ----

inline constexpr uint32_t kAllLanes = (uint32_t{1} << kLanes) - 1;

GENREC_INLINE uint32_t lanes_greater(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  const __m256 greater = _mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ);
  return static_cast<uint32_t>(_mm256_movemask_ps(greater));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return mask;
#endif
}

// Of a comparison's result.
GENREC_INLINE uint32_t lanes_of(vint truth) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)truth);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)truth));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(truth[i] != 0) << i;
  return mask;
#endif
}

// Which of kLanes integers at p lie in [0, n).
GENREC_INLINE uint32_t lanes_below(const int32_t* p, uint32_t n) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epu32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(n)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i)
    mask |= static_cast<uint32_t>(static_cast<uint32_t>(p[i]) < n) << i;
  return mask;
#endif
}

// x[at[i]] in the lanes of the mask, 0 in the others; x has n >= 1 elements.
template <class T>
GENREC_INLINE vfloat gather_floats(const T* x, [[maybe_unused]] int64_t n, const int32_t* at,
                                   uint32_t mask) {
#if defined(__AVX512F__)
  const __mmask16 lanes = static_cast<__mmask16>(mask);
  const __m512i place = _mm512_maskz_loadu_epi32(lanes, at);
  if constexpr (sizeof(T) == 4) {
    return (vfloat)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, place, x, 4);
  } else if (n >= 2) {
    // Two halves at once, the second of them at most the last of the row.
    const __m512i first = _mm512_min_epi32(place, _mm512_set1_epi32(static_cast<int>(n - 2)));
    const __m512i both = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), lanes, first, x, 2);
    const __m512i shift = _mm512_slli_epi32(_mm512_sub_epi32(place, first), 4);
    const __m512i half = _mm512_srlv_epi32(both, shift);
    if constexpr (__is_same(T, bf16_t)) return (vfloat)_mm512_slli_epi32(half, 16);
    return (vfloat)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(half));
  }
#endif
  float part[kLanes] = {};
  for (int i = 0; i < kLanes; ++i)
    if ((mask >> i & 1) != 0) part[i] = to_float(x[at[i]]);
  return load(part);
}

// Whether lanes are brought side by side in one instruction: then a mask of none is
// not worth a branch.
#if defined(__AVX512F__)
inline constexpr bool kCompresses = true;
#else
inline constexpr bool kCompresses = false;
#endif

// Leaves the lanes of the mask side by side at p, which has room for kLanes.
GENREC_INLINE void compress(float* p, vfloat v, uint32_t mask) {
#if defined(__AVX512F__)
  store(p, (vfloat)_mm512_maskz_compress_ps(static_cast<__mmask16>(mask), (__m512)v));
#else
  for (int i = 0; i < kLanes; ++i)
    if ((mask >> i & 1) != 0) *p++ = v[i];
#endif
}
GENREC_INLINE void compress(int32_t* p, vint v, uint32_t mask) {
#if defined(__AVX512F__)
  v = (vint)_mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), (__m512i)v);
  std::memcpy(p, &v, sizeof v);
#else
  for (int i = 0; i < kLanes; ++i)
    if ((mask >> i & 1) != 0) *p++ = v[i];
#endif
}

// base, base + 1, ...
GENREC_INLINE vint counting(int32_t base) {
  static constexpr int32_t kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vint v;
  std::memcpy(&v, kCount, sizeof v);
  return v + base;
}

// The order of floats as that of integers; NaN has no place in it.
GENREC_INLINE int32_t order_key(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
GENREC_INLINE vint order_key(vfloat x) {
  const vint bits = (vint)x;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
GENREC_INLINE float of_order_key(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace genrec::GENREC_ISA
