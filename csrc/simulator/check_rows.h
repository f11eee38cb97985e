// Random logits with tokens and a support, and the definition of a row in float64:
// what the checks of families that score tokens share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "common/scores.h"
#include "simulator/check.h"

namespace genrec::check {

enum class Form { all, ranges, columns };

struct Rows {
  Scores in;
  Buffer logits;
  int64_t offset = 0;
  std::unique_ptr<int64_t[]> tokens, ranges, begin, end;
  std::unique_ptr<int32_t[]> columns;
  std::unique_ptr<bool[]> mask;

  int64_t rows() const { return in.N * in.T; }
  int64_t start(int64_t r) const {
    return offset + r / in.T * in.stride_n + r % in.T * in.stride_t;
  }
  bool counts(int64_t r) const { return mask == nullptr || mask[r]; }
};

// [N, T, V] where kernels may take another way: long rows, long sequences, both, so
// that a sequence does or does not fit a block's shared memory or a cluster's, and rows in
// registers of 1 to 8 warps, in every size of cluster, with a block less or more than full.
// An odd number of them, so that each type sees each.
inline constexpr int64_t kLarge[][3] = {
    {1, 5, 4099}, {2, 3, 2049}, {1, 2, 30011}, {1, 20, 300}, {1, 11, 1030}, {2, 3, 16449},
    {2, 17, 33},  {1, 140, 9},  {1, 3, 16384}, {1, 3, 4096}, {1, 3, 8191},  {1, 8, 8192},
    {1, 9, 8192}, {1, 2, 7168}, {1, 2, 6144},  {1, 5, 6145}, {1, 33, 1025}, {2, 9, 1024},
    {1, 64, 40},  {1, 65, 40},  {2, 2, 8900}};
inline constexpr int kLargeShapes = sizeof kLarge / sizeof *kLarge;
static_assert(kLargeShapes % 2 == 1);

inline Rows make_rows(Random& random, DType dtype, bool special) {
  Rows rows;
  Scores& s = rows.in;
  const int64_t widths[] = {1,   2,    3,    7,    8,    31,   33,   255, 256,
                            257, 1000, 1023, 1024, 1025, 1030, 2049, 4099};
  s.dtype = dtype;
  s.V = widths[random.below(random.one_in(4) ? 17 : 9)];
  s.N = s.V > 1000 ? 1 + random.below(2) : random.below(5);
  s.T = s.V > 1000 ? 1 + random.below(2) : random.one_in(12) ? 0 : 1 + random.below(5);
  if (random.large >= 0) {
    const auto& shape = kLarge[random.large];
    s.N = shape[0], s.T = shape[1], s.V = shape[2];
  }
  const int64_t gap = random.one_in(2) ? 0 : random.below(9);
  rows.offset = random.one_in(2) ? 0 : random.below(9);
  s.stride_t = s.V + gap;
  s.stride_n = s.T * s.stride_t + (random.one_in(3) ? random.below(5) : 0);
  if (random.one_in(6)) {  // [T, N, V] seen as [N, T, V]
    s.stride_n = s.V + gap;
    s.stride_t = s.N * s.stride_n;
  }
  const int64_t N = s.N, T = s.T, V = s.V, R = N * T;
  const int64_t size =
      R == 0 ? rows.offset : rows.offset + (N - 1) * s.stride_n + (T - 1) * s.stride_t + V;
  rows.logits = Buffer(dtype, size);
  const double spread = random.one_in(4) ? 20 : 2;
  for (int64_t i = 0; i < size; ++i) rows.logits.set(i, spread * random.normal());
  for (int64_t r = 0; special && r < R; ++r)
    if (random.one_in(3)) {
      const double values[] = {-kInf, -kInf, -kInf, kNan, kInf};
      const double x = values[random.below(5)];
      const bool whole = random.one_in(4) && x == -kInf;
      for (int64_t v = 0; v < V; ++v)
        if (whole || random.one_in(V)) rows.logits.set(rows.start(r) + v, x);
    }
  const auto any = [&](int64_t from, int64_t to) { return from + random.below(to - from); };
  const auto R_ = static_cast<size_t>(R);
  rows.tokens.reset(new int64_t[R_]);
  for (int64_t r = 0; r < R; ++r) {
    const int64_t outside[] = {-1, V, V + 1000000, -(int64_t{1} << 40), INT64_MAX, INT64_MIN};
    rows.tokens[static_cast<size_t>(r)] = random.one_in(9) ? outside[random.below(6)] : any(0, V);
  }
  if (random.one_in(2)) {
    rows.mask.reset(new bool[R_]);
    for (int64_t r = 0; r < R; ++r) rows.mask[static_cast<size_t>(r)] = !random.one_in(3);
  }
  const Form form = static_cast<Form>(random.below(3));
  if (form == Form::ranges) {
    rows.ranges.reset(new int64_t[static_cast<size_t>(2 * T)]);
    for (int64_t t = 0; t < T; ++t) {
      int64_t* range = &rows.ranges[static_cast<size_t>(2 * t)];
      range[0] = any(0, V);
      range[1] = any(range[0], V + 1);
      if (random.one_in(5)) range[0] = -any(1, 1 << 20);
      if (random.one_in(5)) range[1] = V + any(1, 1 << 20);
      if (random.one_in(9)) range[1] = range[0] - 3;
      for (int64_t n = 0; n < N; ++n)  // most tokens are in their support
        if (range[0] >= 0 && range[0] < range[1] && range[1] <= V && !random.one_in(5))
          rows.tokens[static_cast<size_t>(n * T + t)] = any(range[0], range[1]);
    }
  }
  if (form == Form::columns) {
    std::vector<int32_t> columns;
    rows.begin.reset(new int64_t[R_]);
    rows.end.reset(new int64_t[R_]);
    for (int64_t r = 0; r < R; ++r) {
      const auto i = static_cast<size_t>(r);
      rows.begin[i] = static_cast<int64_t>(columns.size());
      if (!random.one_in(8)) {
        if (V > 1 && random.one_in(6)) columns.push_back(-5);
        const int64_t keep = 1 + random.below(V < 64 ? 3 : V / 8),
                      first = any(0, std::min<int64_t>(V, keep));
        const size_t before = columns.size();
        for (int64_t v = first; v < V; v += any(1, 2 * keep))
          columns.push_back(static_cast<int32_t>(v));
        if (!random.one_in(5))
          rows.tokens[i] = columns[before + static_cast<size_t>(random.below(
                                                static_cast<int64_t>(columns.size() - before)))];
        if (random.one_in(6)) columns.push_back(static_cast<int32_t>(V));
        if (random.one_in(6)) columns.push_back(INT32_MAX);
      }
      rows.end[i] = static_cast<int64_t>(columns.size());
    }
    s.support.num_columns = static_cast<int64_t>(columns.size());
    rows.columns.reset(new int32_t[columns.size()]);
    std::copy(columns.begin(), columns.end(), rows.columns.get());
    // The last list may be said to go on beyond the end, the first to start before 0.
    if (R > 0 && random.one_in(3)) rows.end[R_ - 1] = s.support.num_columns + any(1, 1 << 20);
    if (R > 0 && random.one_in(3)) rows.begin[0] = -any(1, 1 << 20);
  }
  s.logits = rows.logits.at(rows.offset);
  s.tokens = rows.tokens.get();
  s.mask = rows.mask.get();
  s.support.ranges = rows.ranges.get();
  s.support.columns = rows.columns.get();
  s.support.begin = rows.begin.get();
  s.support.end = rows.end.get();
  const double inverses[] = {1, 0.5, 1.75, static_cast<double>(1 / 0.7f)};
  s.inv_temperature = inverses[random.below(4)];
  const char* names[] = {"f32", "f64", "bf16", "f16"};
  const char* forms[] = {"all columns", "ranges", "column lists"};
  char text[300];
  std::snprintf(text, sizeof text,
                "%s [%lld, %lld, %lld] strides %lld, %lld offset %lld %s%s%s inverse %g",
                names[static_cast<int>(dtype)], static_cast<long long>(N),
                static_cast<long long>(T), static_cast<long long>(V),
                static_cast<long long>(s.stride_n), static_cast<long long>(s.stride_t),
                static_cast<long long>(rows.offset), forms[static_cast<int>(form)],
                rows.mask ? " mask" : "", special ? " special values" : "", s.inv_temperature);
  trial_text += text;
  return rows;
}

// The definition of one row: a softmax over its support at a temperature.
struct Row {
  bool counted = false, held = false, empty = true;
  std::vector<int64_t> support;
  double log_norm = 0, entropy = 0, logp = 0;  // log_norm: of the scaled logits
};

inline double scaled(const Rows& rows, const Buffer& logits, int64_t r, int64_t v) {
  return logits[rows.start(r) + v] * rows.in.inv_temperature;
}

inline Row define_row(const Rows& rows, const Buffer& logits, int64_t r) {
  Row row;
  const Scores& s = rows.in;
  row.counted = rows.counts(r);
  if (!row.counted) return row;
  const auto i = static_cast<size_t>(r);
  if (rows.columns) {
    const int64_t M = s.support.num_columns;
    const int64_t begin = std::clamp<int64_t>(rows.begin[i], 0, M);
    // A list ascends, so what lies beyond its first V entries is no list's.
    for (int64_t k = begin; k < std::min({rows.end[i], M, begin + s.V}); ++k) {
      const int64_t v = rows.columns[static_cast<size_t>(k)];
      if (v >= 0 && v < s.V) row.support.push_back(v);
    }
  } else {
    const size_t t = static_cast<size_t>(r % s.T);
    const int64_t first = rows.ranges ? std::max<int64_t>(rows.ranges[2 * t], 0) : 0;
    const int64_t last = rows.ranges ? std::min(rows.ranges[2 * t + 1], s.V) : s.V;
    for (int64_t v = first; v < last; ++v) row.support.push_back(v);
  }
  row.empty = row.support.empty();
  double top = -kInf, sum = 0, mean = 0;
  bool broken = false;
  for (const int64_t v : row.support) {
    const double x = scaled(rows, logits, r, v);
    broken = broken || x != x || x == kInf;
    top = std::max(top, x);
    row.held = row.held || v == rows.tokens[i];
  }
  broken = broken || (!row.empty && top == -kInf);
  for (const int64_t v : row.support) {
    const double d = scaled(rows, logits, r, v) - top, e = std::exp(d);
    sum += e;
    if (e > 0) mean += d * e;
  }
  row.log_norm = broken ? kNan : row.empty ? 0 : top + std::log(sum);
  row.entropy = broken ? kNan : row.empty ? 0 : std::log(sum) - mean / sum;
  row.logp = row.held ? scaled(rows, logits, r, rows.tokens[i]) - row.log_norm : kOutsideLogp;
  return row;
}

// The gradient by a row's logits of  a logp(token) + b entropy.
inline std::vector<double> define_gradient(const Rows& rows, const Buffer& logits, const Row& row,
                                           int64_t r, double a, double b) {
  std::vector<double> g(static_cast<size_t>(rows.in.V), 0.0);
  if (!row.held) a = 0;
  if (!row.counted || (a == 0 && b == 0)) return g;
  const double inverse = rows.in.inv_temperature;
  for (const int64_t v : row.support) {
    const double logp = scaled(rows, logits, r, v) - row.log_norm, p = std::exp(logp);
    const bool token = row.held && v == rows.tokens[static_cast<size_t>(r)];
    double x = a * (token ? -std::expm1(logp) : -p);
    if (p != 0 && b != 0) x -= b * p * (logp + row.entropy);
    g[static_cast<size_t>(v)] = x * inverse;
  }
  return g;
}

inline double rounding(DType accumulator) { return accumulator == DType::f64 ? 1e-12 : 1e-5; }

// `slope`: what the row's gradient is a multiple of, so where a probability near 1
// leaves little of it, the error is still that of a number of its size.
inline void expect_gradient(const Rows& rows, int64_t r, const Buffer& got, int64_t start,
                            const std::vector<double>& want, double error, double slope) {
  const DType dtype = rows.in.dtype;
  const double tiny = dtype == DType::f16 ? 0x1p-24 : 1e-37;
  const double off = std::isfinite(slope) ? error * slope * rows.in.inv_temperature : 0;
  bool zero = true;
  for (const double x : want) zero = zero && x == 0;
  for (int64_t v = 0; v < rows.in.V; ++v) {
    const double x = want[static_cast<size_t>(v)];
    const double bound = zero ? 0 : std::abs(x) * epsilon(dtype) + off + tiny;
    expect("gradient", r * rows.in.V + v, got[start + v], x, bound);
  }
}

}  // namespace genrec::check
