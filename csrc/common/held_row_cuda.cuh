// A row of halves or floats in the registers of its threads, from the load to the gradient:
// nothing but sums goes through shared memory.  A row has up to eight warps, each a run of
// packs; how many is said by V alone, so who sums the same row here gets the same bits.
// Torch-free.
#pragma once

#include <type_traits>

#include "common/scores_cuda.cuh"

namespace genrec {
namespace {

constexpr int kWarps = kThreads / kWarp;  // of a row, at most
constexpr int kHeld = 32;                 // columns of a thread, besides one at an edge
constexpr int64_t kHeldRow = int64_t{kHeld} * kThreads;
constexpr int kHeldRows = 4;  // of a block, where a warp has a row

int held_warps(int64_t V) {
  return static_cast<int>(bounded(blocks_for(V, kWarp * kHeld), 1, kWarps));
}

// A launch for rows of so many warps each, and where a thread of it is.
Launch on_rows(int64_t rows, int warps, void* stream) {
  return warps == 1 ? on(blocks_for(rows, kHeldRows), kHeldRows * kWarp, stream)
                    : on(rows, warps * kWarp, stream);
}
struct HeldPlace {
  int64_t r;
  int part, lane;  // part: the warp, of those of the row
};
__device__ __forceinline__ HeldPlace held_place(int warps) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warps == 1) return {blockIdx.x * int64_t{kHeldRows} + warp, 0, lane};
  return {static_cast<int64_t>(blockIdx.x), warp, lane};
}

// 16 bytes of numbers, each rounded to nearest even.
template <class T>
__device__ __forceinline__ Pack<T> rounded(const float* x) {
  Pack<T> pack;
#if !defined(GENREC_SIMULATOR)
  if constexpr (std::is_same_v<T, bf16_t>) {  // two in one instruction
    uint32_t pairs[Pack<T>::kSize / 2];
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize / 2; ++i)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pairs[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
    std::memcpy(&pack, pairs, sizeof pack);
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) store(&pack.v[i], x[i]);
  }
  return pack;
}

// A thread's part of a row: every 32nd pack of its warp's run, and of the columns before the
// first pack and after the last, which are fewer than a warp, one.  Between its sum and its
// gradient a row is held as powers, or, without kPowers, as the logits that they are made of
// again, which takes half as many registers where these are halves.
template <class T, bool kPowers>
struct HeldRow {
  static_assert(sizeof(acc_t<T>) == sizeof(float));
  static constexpr int kSize = Pack<T>::kSize, kPacks = kHeld / kSize;
  static constexpr int kStep = kWarp * kSize;  // from a pack to the next

  int n, thread, lead, packs, pack, edge_at;
  // As words, which are taken apart where they are used: nothing waits for a load before.
  uint4 raw[kPacks];
  float edge;
  float v[kPowers ? kHeld : 1];  // powers under `under`, and so is `edge` then
  float top, under;              // the warp's largest, without NaN; where that is -inf, 0

  // Sends the columns from[0 .. n) on their way; `warp` is of those of the row.
  __device__ __forceinline__ void load_all(const T* from, int columns, int warp, int lane) {
    n = columns;
    thread = warp * kWarp + lane;
    lead = static_cast<int>(bounded(before_boundary(from), 0, n));
    packs = (n - lead) / kSize;
    pack = warp * kPacks * kWarp + lane;
    const int tail = n - lead - packs * kSize;
    const T* body = from + lead + pack * kSize;
    uint4 none;
    Pack<T> least;
#pragma unroll
    for (int i = 0; i < kSize; ++i) store(&least.v[i], -INFINITY);
    std::memcpy(&none, &least, sizeof none);
#pragma unroll
    for (int j = 0; j < kPacks; ++j)
      raw[j] = pack + j * kWarp < packs ? *reinterpret_cast<const uint4*>(body + j * kStep) : none;
    edge_at = thread < lead ? thread : thread - lead < tail ? packs * kSize + thread : -1;
    edge = edge_at < 0 ? -INFINITY : load(from + edge_at);
  }

  // So that the compiler takes words apart again, instead of holding what it made of them.
  __device__ __forceinline__ void forget() {
#if !defined(GENREC_SIMULATOR)
#pragma unroll
    for (int j = 0; j < kPacks; ++j)
      asm volatile("" : "+r"(raw[j].x), "+r"(raw[j].y), "+r"(raw[j].z), "+r"(raw[j].w));
#endif
  }

  __device__ __forceinline__ float logit(int i) const {
    Pack<T> words;
    std::memcpy(&words, &raw[i / kSize], sizeof words);
    return load(&words.v[i % kSize]);
  }

  // The largest of each kTops-th of this thread's, without NaN, which fmaxf leaves out.
  template <int kTops>
  __device__ __forceinline__ void find_tops(float (&tops)[kTops]) const {
#pragma unroll
    for (int i = 0; i < kTops; ++i) tops[i] = i == 0 ? fmaxf(edge, -INFINITY) : -INFINITY;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      tops[i * kTops / kHeld] = fmaxf(tops[i * kTops / kHeld], logit(i));
  }

  // The sum of the warp's, in every lane, from the largest of each; w stays 0 without kWeighted.
  template <bool kWeighted>
  __device__ __forceinline__ Partial<float> sum_warp_of(const float (&tops)[4], float rate) {
    top = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
#pragma unroll
    for (int width = kWarp / 2; width > 0; width /= 2)
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, width));
    // -inf adds nothing, also where there is nothing else; NaN and +inf make the sum NaN.
    under = top == -INFINITY ? 0.f : top;
    float sums[4] = {0, 0, 0, 0}, weighted[4] = {0, 0, 0, 0};
    const auto add = [&](float x, int i) {
      const float t = (x - under) * rate, e = power_of_two(t);
      sums[i % 4] += e;
      // Far below, 2^t is 0 and any finite t will do: 0 * -inf would be NaN.
      if constexpr (kWeighted) weighted[i % 4] += e * fmaxf(t, -4096.f);
      return e;
    };
    edge = add(edge, 0);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float e = add(logit(i), i);
      if constexpr (kPowers) v[i] = e;
    }
    Partial<float> sum{top, (sums[0] + sums[1]) + (sums[2] + sums[3]),
                       (weighted[0] + weighted[1]) + (weighted[2] + weighted[3])};
#pragma unroll
    for (int width = kWarp / 2; width > 0; width /= 2) {
      sum.e += __shfl_xor_sync(0xffffffffu, sum.e, width);
      if constexpr (kWeighted) sum.w += __shfl_xor_sync(0xffffffffu, sum.w, width);
    }
    return sum;
  }

  // Writes the gradient to g[0 .. V): of(i) for column i of this thread's, of_edge() for
  // that at the edge, of_own() for the row's column `own`, if not -1, and 0 beside the row's
  // columns, which start at `first`.
  template <class Of, class OfEdge, class OfOwn>
  __device__ __forceinline__ void write(T* g, int64_t V, int first, int own, int threads,
                                        const Of& of, const OfEdge& of_edge,
                                        const OfOwn& of_own) const {
    T* out = g + first;
    T* to = out + lead + pack * kSize;
    const bool aligned = reinterpret_cast<uintptr_t>(to) % 16 == 0;  // as the packs
#pragma unroll
    for (int j = 0; j < kPacks; ++j, to += kStep) {
      if (pack + j * kWarp >= packs) continue;
      float part[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) part[i] = of(j * kSize + i);
      const Pack<T> done = rounded<T>(part);
      if (aligned) {
        write_pack(to, done);
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i) to[i] = done.v[i];
      }
    }
    if (edge_at >= 0) store(out + edge_at, of_edge());
    // The token's column, by the thread that wrote it.
    const int at = (own - lead) / kSize, last = lead + packs * kSize;
    const int writer = own < lead    ? own
                       : own >= last ? own - packs * kSize
                                     : at / (kPacks * kWarp) * kWarp + at % kWarp;
    if (thread == writer) store(out + own, of_own());
    if (n < V) {
      zero_columns(g, {0, first}, thread, threads);
      zero_columns(g, {first + n, V}, thread, threads);
    }
  }

  // The same from what sum_warp_of left, with another factor than 0; `sum` is the whole row's.
  __device__ __forceinline__ void write_grad(T* g, int64_t V, int first,
                                             const RowSlope<float>& slope,
                                             const Partial<float>& sum, int own, float own_logit,
                                             float inv_temperature, int threads) {
    if constexpr (!kPowers) forget();
    // From powers under the warp's own top.
    const float by = -slope.a * (power_of_two((top - sum.top) * slope.rate) / sum.e);
    const auto of = [&](int i) {
      if constexpr (kPowers) return v[i] * by;
      return power_of_two((logit(i) - under) * slope.rate) * by;
    };
    write(
        g, V, first, own, threads, of, [&] { return edge * by; },
        [&] { return slope.own(own_logit, inv_temperature); });
  }
};

// A row's sum from its warps', which lie side by side in `sums`: in every lane.
template <bool kWeighted>
__device__ __forceinline__ Partial<float> merge_held(const Partial<float>* sums, int warps,
                                                     float rate, int lane) {
  Partial<float> sum = lane % kWarps < warps ? sums[lane % kWarps] : empty_partial<float>();
#pragma unroll
  for (int width = kWarps / 2; width > 0; width /= 2) {
    const Partial<float> other{__shfl_xor_sync(0xffffffffu, sum.top, width),
                               __shfl_xor_sync(0xffffffffu, sum.e, width),
                               kWeighted ? __shfl_xor_sync(0xffffffffu, sum.w, width) : 0};
    sum = merge(sum, other, rate);
  }
  return sum;
}

}  // namespace
}  // namespace genrec
