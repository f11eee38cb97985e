// One row of logits: its normaliser and entropy, and the gradient of its
// log-softmax.  Shared by every family that scores rows.
//
// A row is read in blocks that fit the first-level cache: a block's maximum is
// taken, then its exponentials are summed against the running maximum, so the
// row comes from memory once.  Sums of a block are f32 in vector lanes, sums of
// blocks are double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/vec.h"

namespace genrec::GENREC_ISA {

inline constexpr int64_t kBlock = 1024;

// softmax_v = exp((x_v - top) / temperature - log_sum).  `top` and `log_sum`
// stay apart: their sum would cost large logits their digits.
template <class S>
struct Normalizer {
  S top;      // the row's maximum
  S log_sum;  // log sum exp((x - top) / temperature); NaN if any logit is NaN or
              // +inf, or none is above -inf
  S entropy;  // nats
};

// A row without columns: nothing to choose from, nothing to learn.
template <class S>
GENREC_INLINE Normalizer<S> empty_row() {
  return {S(0), S(0), S(0)};
}

struct RunningSum {
  float top = -INFINITY;
  double sum = 0;       // sum of e^d, d = (x - top) / temperature
  double weighted = 0;  // sum of d e^d
  bool poisoned = false;
};

static void add_block(RunningSum& run, const float* x, int64_t n, float inv_temperature) {
  vfloat tops = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) tops = vmax(tops, load(x + i));
  float top = max_lanes(tops);
  const int rest = static_cast<int>(n - i);
  for (int j = 0; j < rest; ++j) top = top < x[i + j] ? x[i + j] : top;
  if (top > run.top) {
    if (run.top > -INFINITY) {
      const double shift = (static_cast<double>(run.top) - top) * inv_temperature;
      const double factor = std::exp(shift);
      run.weighted = factor == 0 ? 0 : (run.weighted + run.sum * shift) * factor;
      run.sum *= factor;
    }
    run.top = top;
  }
  if (run.top == -INFINITY) {  // nothing but -inf and NaN so far: e^d is undefined
    for (i = 0; i < n; ++i) run.poisoned = run.poisoned || x[i] != x[i];
    return;
  }
  const vfloat vtop = splat(run.top);
  vfloat sum0{}, sum1{}, weighted0{}, weighted1{};
  i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const vfloat d0 = (load(x + i) - vtop) * inv_temperature;
    const vfloat d1 = (load(x + i + kLanes) - vtop) * inv_temperature;
    const vfloat e0 = exp_nonpositive(d0), e1 = exp_nonpositive(d1);
    sum0 += e0;
    sum1 += e1;
    // e^d is 0 below the floor; the clamp keeps 0 * -inf from making a NaN.
    weighted0 += e0 * (d0 < kExpFloor ? splat(kExpFloor) : d0);
    weighted1 += e1 * (d1 < kExpFloor ? splat(kExpFloor) : d1);
  }
  for (; i < n; i += kLanes) {
    float part[kLanes];
    for (int j = 0; j < kLanes; ++j) part[j] = i + j < n ? x[i + j] : -INFINITY;
    const vfloat d = (load(part) - vtop) * inv_temperature;
    const vfloat e = exp_nonpositive(d);
    sum0 += e;
    weighted0 += e * (d < kExpFloor ? splat(kExpFloor) : d);
  }
  run.sum += sum_lanes(sum0 + sum1);
  run.weighted += sum_lanes(weighted0 + weighted1);
}

GENREC_INLINE Normalizer<float> finish(const RunningSum& run) {
  if (run.poisoned || run.top == -INFINITY) return {run.top, NAN, NAN};
  const double log_sum = std::log(run.sum);
  return {run.top, static_cast<float>(log_sum),
          static_cast<float>(log_sum - run.weighted / run.sum)};
}

// The columns of one row: x[0 .. n), or x[columns[0 .. n)] where columns is given.
template <class T>
struct RowView {
  const T* x;
  const int32_t* columns;
  int64_t n;
};

template <class T>
GENREC_INLINE const acc_t<T>* block_floats(const RowView<T>& row, int64_t at, int64_t n,
                                           acc_t<T>* scratch) {
  if (row.columns == nullptr) return as_floats(row.x + at, n, scratch);
  for (int64_t i = 0; i < n; ++i) scratch[i] = to_float(row.x[row.columns[at + i]]);
  return scratch;
}

template <class T>
static Normalizer<acc_t<T>> normalize(const RowView<T>& row, acc_t<T> inv_temperature) {
  if (row.n == 0) return empty_row<float>();
  float scratch[kBlock];
  RunningSum run;
  for (int64_t at = 0; at < row.n; at += kBlock) {
    const int64_t n = row.n - at < kBlock ? row.n - at : kBlock;
    add_block(run, block_floats(row, at, n, scratch), n, inv_temperature);
  }
  return finish(run);
}

// Double rows are for gradcheck and for oracles: right, not fast.
template <>
[[maybe_unused]] Normalizer<double> normalize(const RowView<double>& row, double inv_temperature) {
  if (row.n == 0) return empty_row<double>();
  const auto at = [&](int64_t i) { return row.x[row.columns ? row.columns[i] : i]; };
  double top = -INFINITY;
  for (int64_t i = 0; i < row.n; ++i) top = at(i) > top || at(i) != at(i) ? at(i) : top;
  double sum = 0, weighted = 0;
  for (int64_t i = 0; i < row.n; ++i) {
    const double d = (at(i) - top) * inv_temperature, e = std::exp(d);
    sum += e;
    if (e != 0) weighted += e * d;
  }
  const double log_sum = std::log(sum);
  return {top, log_sum, log_sum - weighted / sum};
}

// log softmax of one logit.
template <class S>
GENREC_INLINE S log_softmax(S x, const Normalizer<S>& z, S inv_temperature) {
  return (x - z.top) * inv_temperature - z.log_sum;
}

// The gradient of  a * logp[token] + b * entropy  with respect to the logits is
//   (a (1[v = token] - p_v) - b p_v (log p_v + H)) / temperature.
// This writes all but the token's own column rightly; grad_token gives that one.
template <class S>
struct RowSlopes {
  S logp;     // a / temperature
  S entropy;  // b / temperature
};

GENREC_INLINE void grad_block(const float* x, float* g, int64_t n, const Normalizer<float>& z,
                              float inv_temperature, RowSlopes<float> slope) {
  const vfloat top = splat(z.top), log_sum = splat(z.log_sum);
  const vfloat minus_a = splat(-slope.logp), minus_b = splat(-slope.entropy);
  const auto one = [&](vfloat v) __attribute__((always_inline)) {
    const vfloat logp = (v - top) * inv_temperature - log_sum;
    const vfloat p = exp_nonpositive(logp);
    if (slope.entropy == 0) return minus_a * p;
    const vfloat held = logp < kExpFloor ? splat(kExpFloor) : logp;
    return p * (minus_a + minus_b * (held + z.entropy));
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(g + i, one(load(x + i)));
  if (i < n) {
    float part[kLanes] = {};
    for (int j = 0; i + j < n; ++j) part[j] = x[i + j];
    store(part, one(load(part)));
    for (int j = 0; i + j < n; ++j) g[i + j] = part[j];
  }
}

GENREC_INLINE void grad_block(const double* x, double* g, int64_t n, const Normalizer<double>& z,
                              double inv_temperature, RowSlopes<double> slope) {
  for (int64_t i = 0; i < n; ++i) {
    const double logp = log_softmax(x[i], z, inv_temperature), p = std::exp(logp);
    const double spread = p == 0 || slope.entropy == 0 ? 0 : p * (logp + z.entropy);
    g[i] = -slope.logp * p - slope.entropy * spread;
  }
}

template <class S>
GENREC_INLINE S grad_token(S logp, const Normalizer<S>& z, RowSlopes<S> slope) {
  // 1 - p by expm1, which keeps its digits where p is near 1.
  const S p = std::exp(logp);
  const S spread = p == 0 || slope.entropy == 0 ? S(0) : p * (logp + z.entropy);
  return slope.logp * -std::expm1(logp) - slope.entropy * spread;
}

// Writes the gradient of a whole row of V columns to g: by `slope` on the row's
// own columns, which start at `first` where they are a range, and 0 elsewhere.
// g may be the logits' own memory: what a range still needs is never behind the
// writer, and lists of columns go through a buffer.
template <class T>
static void grad_row(const RowView<T>& row, int64_t first, int64_t V, T* g,
                     const Normalizer<acc_t<T>>& z, acc_t<T> inv_temperature,
                     RowSlopes<acc_t<T>> slope) {
  using S = acc_t<T>;
  if (row.columns != nullptr) {
    S* kept = static_cast<S*>(std::malloc(sizeof(S) * static_cast<size_t>(row.n + kLanes)));
    S in[kBlock];
    for (int64_t at = 0; at < row.n; at += kBlock) {
      const int64_t n = row.n - at < kBlock ? row.n - at : kBlock;
      grad_block(block_floats(row, at, n, in), kept + at, n, z, inv_temperature, slope);
    }
    std::memset(static_cast<void*>(g), 0, sizeof(T) * static_cast<size_t>(V));
    for (int64_t i = 0; i < row.n; ++i) from_float(g + row.columns[i], kept[i]);
    std::free(kept);
    return;
  }
  std::memset(static_cast<void*>(g), 0, sizeof(T) * static_cast<size_t>(first));
  S in[kBlock], out[kBlock];
  for (int64_t at = 0; at < row.n; at += kBlock) {
    const int64_t n = row.n - at < kBlock ? row.n - at : kBlock;
    S* target = float_target(g + first + at, out);
    grad_block(block_floats(row, at, n, in), target, n, z, inv_temperature, slope);
    put_floats(g + first + at, target, n);
  }
  const int64_t last = first + row.n;
  std::memset(static_cast<void*>(g + last), 0, sizeof(T) * static_cast<size_t>(V - last));
}

}  // namespace genrec::GENREC_ISA
