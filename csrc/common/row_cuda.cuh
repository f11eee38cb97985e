// One row of logits on a CUDA device: a block normalises it, a block writes its
// gradient.  The device's counterpart of row.h; torch-free.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/cuda.cuh"
#include "common/dtype.h"

namespace genrec::cuda {

inline constexpr int kThreads = 256;

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ double load(const double* p) { return *p; }
__device__ __forceinline__ float load(const bf16_t* p) {
  return __uint_as_float(static_cast<uint32_t>(p->bits) << 16);
}
__device__ __forceinline__ float load(const f16_t* p) { return half_bits_to_float(p->bits); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(double* p, double x) { *p = x; }
__device__ __forceinline__ void store(bf16_t* p, float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  p->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
__device__ __forceinline__ void store(f16_t* p, float x) { p->bits = float_to_half_bits(x); }

// Part of a row's sum: e = sum exp(d), w = sum d exp(d), d = (x - top) / temperature.
template <class S>
struct Partial {
  S top, e, w;
};

// A NaN or +inf logit makes e NaN and stays; -inf adds nothing.
template <class S>
__device__ __forceinline__ void add(Partial<S>& a, S x, S inv_temperature) {
  if (x == -INFINITY) return;
  if (x > a.top) {
    const S shift = (a.top - x) * inv_temperature, factor = exp(shift);
    a.w = factor == S(0) ? S(0) : (a.w + a.e * shift) * factor;
    a.e = a.e * factor + exp(x - x);  // 1, or NaN for +inf
    a.top = x;
  } else {
    const S d = (x - a.top) * inv_temperature, e = exp(d);
    a.e += e;
    a.w += e == S(0) ? S(0) : d * e;
  }
}

template <class S>
__device__ __forceinline__ Partial<S> merge(Partial<S> a, Partial<S> b, S inv_temperature) {
  if (a.top < b.top) {
    const Partial<S> swap = a;
    a = b;
    b = swap;
  }
  if (b.top == -INFINITY) return {a.top, a.e + b.e, a.w};  // b.e is 0, or NaN that must stay
  const S shift = (b.top - a.top) * inv_temperature, factor = exp(shift);
  a.e += b.e * factor;
  a.w += factor == S(0) ? S(0) : (b.w + b.e * shift) * factor;
  return a;
}

// The block's partials in the order of a fixed tree: the same bits every time.
// Every thread calls it; thread 0 gets the whole.
template <class S>
__device__ Partial<S> merge_block(Partial<S> mine, S inv_temperature) {
  GENREC_SHARED(Partial<S>, shared, kThreads);
  shared[threadIdx.x] = mine;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width)
      shared[threadIdx.x] =
          merge(shared[threadIdx.x], shared[threadIdx.x + width], inv_temperature);
  }
  __syncthreads();
  return shared[0];
}

}  // namespace genrec::cuda
