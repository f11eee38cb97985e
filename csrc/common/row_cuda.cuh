// One row of logits on a CUDA device: how threads share it, its sum, and the
// gradient of its log-softmax.  The device's counterpart of row.h; torch-free.
//
// Exponentials are to base 2 and in the hardware's own approximation (relative
// error about 2^-22, results below 2^-126 are 0), since a bf16 row is otherwise
// bound by arithmetic.  Every sum is folded in a fixed order: equal input gives
// equal bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/cuda.cuh"
#include "common/dtype.h"

namespace genrec::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 256;
inline constexpr double kLog2e = 1.4426950408889634074;
inline constexpr double kLn2 = 0.6931471805599453094;

// ---- elements ----

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ double load(const double* p) { return *p; }
__device__ __forceinline__ float load(const bf16_t* p) {
  return __uint_as_float(static_cast<uint32_t>(p->bits) << 16);
}
__device__ __forceinline__ float load(const f16_t* p) { return half_bits_to_float(p->bits); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(double* p, double x) { *p = x; }
__device__ __forceinline__ void store(bf16_t* p, float x) {  // to nearest even
#if defined(GENREC_SIMULATOR)
  const uint32_t bits = __float_as_uint(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? 0x7fffu : rounded);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
#endif
}
__device__ __forceinline__ void store(f16_t* p, float x) { p->bits = float_to_half_bits(x); }

__device__ __forceinline__ float power_of_two(float t) {
#if defined(GENREC_SIMULATOR)
  return t < -126.f ? 0.f : exp2f(t);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
  return result;
#endif
}
__device__ __forceinline__ double power_of_two(double t) { return exp2(t); }

// The larger, or the one that is a number.
__device__ __forceinline__ float larger_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger_of(double a, double b) { return fmax(a, b); }

// 16 bytes of a row, moved in one instruction.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  Pack<T> pack;
  std::memcpy(&pack, &raw, sizeof raw);
  return pack;
}
template <class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& pack) {
  uint4 raw;
  std::memcpy(&raw, &pack, sizeof raw);
  *reinterpret_cast<uint4*>(p) = raw;
}
// The same to global memory.  Spelled out, since the compiler may halve the other.
template <class T>
__device__ __forceinline__ void write_pack(T* p, const Pack<T>& pack) {
#if defined(GENREC_SIMULATOR)
  store_pack(p, pack);
#else
  uint4 raw;
  std::memcpy(&raw, &pack, sizeof raw);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
               : "memory");
#endif
}

// How many elements lie before the first 16-byte boundary at or after p.
template <class T>
__device__ __forceinline__ int64_t before_boundary(const T* p) {
  return static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T));
}

// ---- how threads share [begin, end) of a row ----

struct Share {
  int64_t begin, end;
};

inline constexpr int64_t kPartStep = 64;

// Part `i` of n elements in parts of so many steps of kPartStep, so that parts of an
// aligned row start on cache lines.
__device__ __forceinline__ Share share_of_steps(int64_t n, int64_t i, int64_t steps) {
  const int64_t each = steps * kPartStep, begin = i * each < n ? i * each : n;
  return {begin, begin + each < n ? begin + each : n};
}

// Part `i` of `parts`.
__device__ __forceinline__ Share share_of(int64_t n, int64_t i, int64_t parts) {
  return share_of_steps(n, i, (n + parts * kPartStep - 1) / (parts * kPartStep));
}
// Of 1 << bits parts, without a division.
__device__ __forceinline__ Share share_of_bits(int64_t n, int64_t i, int bits) {
  if (bits == 0) return {0, n};
  return share_of_steps(n, i, (n + (kPartStep << bits) - 1) / kPartStep >> bits);
}

// Of a power of two.
__device__ __forceinline__ int log2_of(int power) { return __ffs(power) - 1; }

// The whole packs of p[begin .. end): the first begins at element `first`.
struct PackRange {
  int64_t first, count;
};

template <class T>
__device__ __forceinline__ PackRange packs_of(const T* p, Share s) {
  const int64_t lead = before_boundary(p + s.begin), n = s.end - s.begin;
  const int64_t first = s.begin + (lead < n ? lead : n);
  return {first, (s.end - first) / Pack<T>::kSize};
}

// Calls pack(i) for each 16-byte boundary of p[begin .. end) and one(i) for what
// lies before the first and after the last, each i once, spread over the threads.
template <class T, class Whole, class One>
__device__ __forceinline__ void each_pack(const T* p, Share s, int thread, int threads,
                                          const Whole& pack, const One& one) {
  constexpr int kSize = Pack<T>::kSize;
  const auto [first, packs] = packs_of(p, s);
  for (int64_t i = s.begin + thread; i < first; i += threads) one(i);
  for (int64_t k = thread; k < packs; k += threads) pack(first + k * kSize);
  for (int64_t i = first + packs * kSize + thread; i < s.end; i += threads) one(i);
}

// The same for a row that is read: four loads are on their way before the first
// is used.
template <class T, class Whole, class One>
__device__ __forceinline__ void read_packs(const T* p, Share s, int thread, int threads,
                                           const Whole& pack, const One& one) {
  constexpr int kSize = Pack<T>::kSize, kAhead = 4;
  const auto [first, packs] = packs_of(p, s);
  for (int64_t i = s.begin + thread; i < first; i += threads) one(i);
  int64_t k = thread;
  for (; k + (kAhead - 1) * threads < packs; k += kAhead * threads) {
    Pack<T> ahead[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) ahead[j] = load_pack(p + first + (k + j * threads) * kSize);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) pack(first + (k + j * threads) * kSize, ahead[j]);
  }
  for (; k < packs; k += threads) pack(first + k * kSize, load_pack(p + first + k * kSize));
  for (int64_t i = first + packs * kSize + thread; i < s.end; i += threads) one(i);
}

// ---- a row's sum ----

// Part of it: e = sum 2^t, w = sum t 2^t, t = (x - top) * rate, rate = log2(e) / temperature.
template <class S>
struct Partial {
  S top, e, w;
};

template <class S>
__device__ __forceinline__ Partial<S> empty_partial() {
  return {S(-INFINITY), S(0), S(0)};
}

template <class S>
__device__ __forceinline__ void raise(Partial<S>& a, S top, S rate) {
  if (!(top > a.top)) return;
  const S shift = (a.top - top) * rate, factor = power_of_two(shift);
  a.w = factor == S(0) ? S(0) : (a.w + a.e * shift) * factor;
  a.e *= factor;  // a NaN stays
  a.top = top;
}

// Adds one logit under a top that is at least as large.  A NaN or +inf makes e
// NaN and stays; -inf adds nothing.
template <class S>
__device__ __forceinline__ void add_under(Partial<S>& a, S x, S rate) {
  const S t = (x - a.top) * rate, e = power_of_two(t);
  a.e += e;
  // Far below, 2^t is 0 and any finite t will do: 0 * -inf would be NaN.
  a.w += e * (t < S(-4096) ? S(-4096) : t);
}

template <class S>
__device__ __forceinline__ void add(Partial<S>& a, S x, S rate) {
  if (x == S(-INFINITY)) return;
  raise(a, x, rate);
  add_under(a, x, rate);
}

template <class S, class T>
__device__ __forceinline__ void add_pack(Partial<S>& a, const Pack<T>& pack, S rate) {
  S x[Pack<T>::kSize], most = S(-INFINITY);
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) {
    x[j] = load(&pack.v[j]);
    most = larger_of(most, x[j]);
  }
  raise(a, most, rate);
  if (a.top == S(-INFINITY)) {  // nothing but -inf and NaN so far
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j)
      if (x[j] != x[j]) a.e = x[j];
    return;
  }
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) add_under(a, x[j], rate);
}

template <class S>
__device__ __forceinline__ Partial<S> merge(Partial<S> a, Partial<S> b, S rate) {
  if (a.top < b.top) {
    const Partial<S> swap = a;
    a = b;
    b = swap;
  }
  if (b.top == S(-INFINITY)) return {a.top, a.e + b.e, a.w};  // b.e is 0, or NaN that must stay
  raise(b, a.top, rate);
  return {a.top, a.e + b.e, a.w + b.w};
}

// The warp's partials, in the order of a fixed tree; every lane gets the whole.
template <class S>
__device__ __forceinline__ Partial<S> merge_warp(Partial<S> a, S rate) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) {
    const Partial<S> b{__shfl_xor_sync(0xffffffffu, a.top, width),
                       __shfl_xor_sync(0xffffffffu, a.e, width),
                       __shfl_xor_sync(0xffffffffu, a.w, width)};
    a = merge(a, b, rate);
  }
  return a;
}

// softmax_v = 2^((x_v - top) * rate) / e.  `top` and `log_sum` (natural) stay
// apart: their sum would cost large logits their digits.
template <class S>
struct Normalizer {
  S top, log_sum, entropy;
};

// log_sum is NaN where a logit is NaN or +inf, or none is above -inf.
template <class S>
__device__ __forceinline__ Normalizer<S> finish(const Partial<S>& a) {
  const S log_sum = a.top == S(-INFINITY) ? S(NAN) : log(a.e);
  return {a.top, log_sum, log_sum - static_cast<S>(kLn2) * (a.w / a.e)};
}

// ---- the gradient of a * logp[token] + b * entropy by the logits ----

// (a (1[v = token] - p_v) - b p_v (log p_v + H)) / temperature, with the
// temperature in a and b already.
template <class S>
struct RowSlope {
  Normalizer<S> z;
  S rate, a, b;

  __device__ __forceinline__ S log2_p(S x) const {
    return (x - z.top) * rate - z.log_sum * static_cast<S>(kLog2e);
  }
  __device__ __forceinline__ S spread(S p, S t) const {
    return p == S(0) || b == S(0) ? S(0) : b * p * (t * static_cast<S>(kLn2) + z.entropy);
  }
  __device__ __forceinline__ S other(S x) const {
    const S t = log2_p(x), p = power_of_two(t);
    return -a * p - spread(p, t);
  }
  // The same where b is 0.
  __device__ __forceinline__ S without_entropy(S x) const { return -a * power_of_two(log2_p(x)); }
  // The token's own column: 1 - p by expm1, which keeps its digits where p is near 1.
  __device__ __forceinline__ S own(S x, S inv_temperature) const {
    const S logp = (x - z.top) * inv_temperature - z.log_sum, p = exp(logp);
    return a * -expm1(logp) - spread(p, logp * static_cast<S>(kLog2e));
  }
};

}  // namespace genrec::cuda
