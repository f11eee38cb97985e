// The rows of a `Scores` on a CUDA device: which columns count, their sum, the
// gradient of a row with its token, and small helpers of launches.  Torch-free.
#pragma once

#include "common/row_cuda.cuh"
#include "common/scores.h"
#include "common/search.h"

namespace genrec {
namespace {

using namespace genrec::cuda;

// ---- a row's columns ----

// The columns of row r = n * T + t: the range [first, first + n) or a list.  Divisions are
// long: whoever knows n and t says so.
struct RowColumns {
  const int32_t* list;
  int64_t first, n;
};

__host__ __device__ __forceinline__ int64_t bounded(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

__device__ __forceinline__ RowColumns columns_of(const Scores& in, int64_t r, int64_t t) {
  const Support& s = in.support;
  if (s.begin != nullptr) {  // an empty `columns` is null
    const int64_t begin = bounded(s.begin[r], 0, s.num_columns);
    // An ascending list has no more than V entries, and there is room for no more.
    const int64_t most = s.num_columns - begin < in.V ? s.num_columns : begin + in.V;
    return {s.columns + begin, 0, bounded(s.end[r], begin, most) - begin};
  }
  if (s.ranges != nullptr) {
    const int64_t first = bounded(s.ranges[2 * t], 0, in.V);
    return {nullptr, first, bounded(s.ranges[2 * t + 1], first, in.V) - first};
  }
  return {nullptr, 0, in.V};
}

__device__ __forceinline__ RowColumns columns_of(const Scores& in, int64_t r) {
  return columns_of(in, r, in.support.ranges == nullptr ? 0 : r % in.T);
}

__device__ __forceinline__ bool holds(const RowColumns& c, int64_t column) {
  if (c.list == nullptr) return column >= c.first && column < c.first + c.n;
  return lists(c.list, c.n, column);
}

template <class T>
__device__ __forceinline__ const T* row_of(const Scores& in, int64_t n, int64_t t) {
  return static_cast<const T*>(in.logits) + n * in.stride_n + t * in.stride_t;
}
template <class T>
__device__ __forceinline__ const T* row_of(const Scores& in, int64_t r) {
  return row_of<T>(in, r / in.T, r % in.T);
}

// A row's token; `held`: it is one of its columns.
template <class S>
struct Token {
  int64_t column;
  bool held;
  S logit;
};

__device__ __forceinline__ bool is_column(const Scores& in, const RowColumns& c, int64_t column) {
  return column >= 0 && column < in.V && holds(c, column);
}

template <class T>
__device__ __forceinline__ Token<acc_t<T>> token_of(const Scores& in, const RowColumns& c,
                                                    const T* x, int64_t column) {
  const bool held = is_column(in, c, column);
  return {column, held, held ? load(x + column) : acc_t<T>(0)};
}

__host__ __device__ __forceinline__ int64_t round_up(int64_t x, int64_t step) {
  return (x + step - 1) / step * step;
}

// ---- rows that are kept ----

// 16 more bytes, since a kept row starts as far from a 16-byte boundary as the logits
// that it is read from.
template <class T>
__host__ __device__ __forceinline__ int64_t kept_bytes(int64_t columns) {
  return round_up(columns * static_cast<int64_t>(sizeof(T)), 16) + 16;
}

// Where to keep those columns of x in `memory`.
template <class T>
__device__ __forceinline__ T* keep_at(unsigned char* memory, const RowColumns& c, const T* x) {
  T* keep = reinterpret_cast<T*>(memory);
  if (c.list == nullptr) keep += reinterpret_cast<uintptr_t>(x + c.first) % 16 / sizeof(T);
  return keep;
}

// ---- sums ----

// The sum over part s of the row's columns.  With a `keep`, leaves the logits
// there: keep[i] is column c.first + i, or entry i of the list.
template <class T>
__device__ __forceinline__ Partial<acc_t<T>> sum_part(const Scores& in, const RowColumns& c,
                                                      const T* x, Share s, int thread, int threads,
                                                      T* keep) {
  using S = acc_t<T>;
  const S rate = static_cast<S>(in.inv_temperature * kLog2e);
  Partial<S> sum = empty_partial<S>();
  if (c.list != nullptr) {
    for (int64_t i = s.begin + thread; i < s.end; i += threads) {
      const int64_t v = c.list[i];
      if (v < 0 || v >= in.V) continue;
      add(sum, load(x + v), rate);
      if (keep != nullptr) keep[i] = x[v];
    }
    return sum;
  }
  const T* from = x + c.first;
  read_packs(
      from, s, thread, threads,
      [&](int64_t i, const Pack<T>& pack) {
        add_pack(sum, pack, rate);
        if (keep != nullptr) store_pack(keep + i, pack);
      },
      [&](int64_t i) {
        add(sum, load(from + i), rate);
        if (keep != nullptr) keep[i] = from[i];
      });
  return sum;
}

// What a row's tokens and sequences are scored from.
template <class S>
struct RowState {
  Normalizer<S> z;
  S logp, slope;
};

// Of a row of n columns.
template <class S>
__device__ __forceinline__ RowState<S> state_of(const Scores& in, int64_t n, const Partial<S>& sum,
                                                const Token<S>& token) {
  const Normalizer<S> z = n == 0 ? Normalizer<S>{S(0), S(0), S(0)} : finish(sum);
  const S logp = token.held ? (token.logit - z.top) * static_cast<S>(in.inv_temperature) - z.log_sum
                            : static_cast<S>(kOutsideLogp);
  return {z, logp, S(0)};
}

template <class S>
__device__ __forceinline__ Partial<S> merge_parts(const Partial<S>* parts, int n, S rate) {
  Partial<S> sum = parts[0];
  for (int i = 1; i < n; ++i) sum = merge(sum, parts[i], rate);
  return sum;
}

// ---- the gradient of a row ----

// Where a row's logits are: x[i] is column c.first + i, or for a list entry i
// where they were `gathered`, else column i itself.
template <class T>
struct RowSource {
  const T* x;
  bool gathered;
};

// Rolled loops: this stands at the end of every kernel that writes a gradient, and a GPU waits for
// code as it does for memory.
template <class T>
__device__ __forceinline__ void zero_columns(T* g, Share s, int thread, int threads) {
  const auto [first, packs] = packs_of(g, s);
#pragma unroll 1
  for (int64_t i = s.begin + thread; i < first; i += threads) store(g + i, acc_t<T>(0));
#pragma unroll 1
  for (int64_t k = thread; k < packs; k += threads)
    write_pack(g + first + k * Pack<T>::kSize, Pack<T>{});
#pragma unroll 1
  for (int64_t i = first + packs * Pack<T>::kSize + thread; i < s.end; i += threads)
    store(g + i, acc_t<T>(0));
}

// Writes columns s of a row's gradient; token is -1 where it moves nothing.  A
// thread reads a column before it writes it, so g may be the logits' memory.
template <class T>
__device__ __forceinline__ void write_grad(const RowColumns& c, const RowSource<T>& from,
                                           const RowSlope<acc_t<T>>& slope, int64_t token,
                                           acc_t<T> inv_temperature, T* g, Share s, int thread,
                                           int threads) {
  using S = acc_t<T>;
  constexpr int kSize = Pack<T>::kSize;
  if (slope.a == S(0) && slope.b == S(0))  // also where the row is not a number
    return zero_columns(g, s, thread, threads);
  const int64_t last = c.first + c.n;
  const bool aligned =
      c.list == nullptr &&
      (reinterpret_cast<uintptr_t>(g + c.first) - reinterpret_cast<uintptr_t>(from.x)) % 16 == 0;
  const auto value = [&](int64_t v, int64_t& next) {  // next: where the list goes on
    if (c.list == nullptr) {
      if (v < c.first || v >= last) return S(0);
      const S x = load(from.x + (v - c.first));
      return v == token ? slope.own(x, inv_temperature) : slope.other(x);
    }
    if (next >= c.n || c.list[next] != v) return S(0);
    const S x = load(from.x + (from.gathered ? next : v));
    ++next;
    return v == token ? slope.own(x, inv_temperature) : slope.other(x);
  };
  const auto one = [&](int64_t v) {
    int64_t next = c.list == nullptr ? 0 : first_not_before(c.list, c.n, v);
    store(g + v, value(v, next));
  };
  if (aligned && s.begin >= c.first && s.end <= last) {
    // Most often: a column is its own.  The token's is put right by the thread that wrote
    // over it, from what it read before.
    const T* x = from.x - c.first;
    const PackRange packs = packs_of(g, s);
    const int64_t at = token - packs.first;
    const bool mine = at >= 0 && at < packs.count * kSize && at / kSize % threads == thread;
    const S own = mine ? load(x + token) : S(0);
    const auto write = [&](const auto& of) {
      each_pack(
          g, s, thread, threads,
          [&](int64_t v) {
            const Pack<T> in = load_pack(x + v);
            Pack<T> out;
#pragma unroll
            for (int j = 0; j < kSize; ++j) store(&out.v[j], of(load(&in.v[j])));
            write_pack(g + v, out);
          },
          one);
    };
    if (slope.b == S(0))
      write([&](S x) { return slope.without_entropy(x); });
    else
      write([&](S x) { return slope.other(x); });
    if (mine) store(g + token, slope.own(own, inv_temperature));
    return;
  }
  each_pack(
      g, s, thread, threads,
      [&](int64_t v) {
        Pack<T> out{};
        int64_t next = c.list == nullptr ? 0 : first_not_before(c.list, c.n, v);
        if (c.list != nullptr || (v + kSize > c.first && v < last))
#pragma unroll
          for (int j = 0; j < kSize; ++j) store(&out.v[j], value(v + j, next));
        write_pack(g + v, out);
      },
      one);
}

template <class T>
__device__ __forceinline__ RowSlope<acc_t<T>> slope_of(const Scores& in, const RowColumns& c,
                                                       int64_t r, const Normalizer<acc_t<T>>& z,
                                                       acc_t<T> by_logp, acc_t<T> by_entropy) {
  using S = acc_t<T>;
  const bool counted = counts(in.mask, r);
  const S inv = static_cast<S>(in.inv_temperature);
  return {z, static_cast<S>(in.inv_temperature * kLog2e),
          counted && is_column(in, c, in.tokens[r]) ? by_logp * inv : S(0),
          counted ? by_entropy * inv : S(0)};
}

// ---- sums over many ----

// The sum of value(first), value(first + step), ... below n, with so many of them on
// their way at a time.
template <int kAtOnce, class Value>
__device__ __forceinline__ double sum_strided(int64_t n, int64_t first, int64_t step,
                                              const Value& value) {
  double sum = 0;
#pragma unroll 1
  for (int64_t i = first; i < n; i += kAtOnce * step) {
    double x[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) x[j] = i + j * step < n ? value(i + j * step) : 0.0;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) sum += x[j];
  }
  return sum;
}

__device__ __forceinline__ double sum_warp(double x) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) x += __shfl_xor_sync(0xffffffffu, x, width);
  return x;
}

// The sum of value(0) .. value(n - 1) in one block: each thread adds a strided part,
// each warp those of its lanes by a fixed tree, and every thread the warps' in order.
// Every thread gets it; of `parts`, kThreads doubles, a warp takes one.
template <int kAtOnce = 1, class Value>
__device__ __forceinline__ double sum_block(int64_t n, double* parts, const Value& value) {
  const double mine = sum_warp(sum_strided<kAtOnce>(n, threadIdx.x, kThreads, value));
  __syncthreads();  // whoever still reads the last sum
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = mine;
  __syncthreads();
  double sum = parts[0];
#pragma unroll
  for (int i = 1; i < kThreads / kWarp; ++i) sum += parts[i];
  return sum;
}

// ---- launches ----

Launch on(int64_t blocks, int threads, void* stream) {
  Launch how{blocks, threads};
  how.stream = stream;
  return how;
}

int64_t blocks_for(int64_t n, int64_t each) { return (n + each - 1) / each; }

template <class F>
int by_dtype(DType type, const F& f) {
  switch (type) {
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::f64: return f(static_cast<double*>(nullptr));
    case DType::bf16: return f(static_cast<bf16_t*>(nullptr));
    case DType::f16: return f(static_cast<f16_t*>(nullptr));
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

template <class F>
int by_accumulator(DType type, const F& f) {
  return type == DType::f64 ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

}  // namespace
}  // namespace genrec
