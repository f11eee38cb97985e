// The rows of a `Scores` on the CPU: which columns count, the gradient of a row
// with its token, and room for exponentials between the two.  Compiled once an
// instruction set, in internal linkage.
#pragma once

#include "common/row.h"
#include "common/scores.h"
#include "common/search.h"

namespace genrec::GENREC_ISA {
namespace {

// Whether a list is a range, as that of a catalogue's first level most often is.
inline bool side_by_side(const int32_t* list, int64_t n) {
  if (n == 0 || list[n - 1] - int64_t{list[0]} != n - 1) return false;
  int32_t gaps = 0;  // that, and equal neighbours
  for (int64_t i = 1; i < n; ++i) gaps |= (list[i] - list[i - 1]) ^ 1;
  return gaps == 0;
}

// The supported columns of row (n, t), and where a range of them begins.
template <class T>
RowView<T> supported(const Scores& in, int64_t n, int64_t t, int64_t& first) {
  const T* x = static_cast<const T*>(in.logits) + n * in.stride_n + t * in.stride_t;
  const Support& s = in.support;
  const bool last = t + 1 == in.T;
  const int64_t step = last ? in.stride_n - t * in.stride_t : in.stride_t;
  first = 0;
  if (s.begin != nullptr) {  // an empty `columns` is null
    const int64_t r = n * in.T + t;
    const int32_t* list = s.columns + s.begin[r];
    const int64_t count = s.end[r] - s.begin[r];
    if (!side_by_side(list, count)) return {x, list, count, step};
    first = list[0];
    return {x + first, nullptr, count, 0, false};  // where the next row is read is not known
  }
  if (s.ranges != nullptr) {
    first = s.ranges[2 * t];
    const int64_t next = s.ranges[last ? 0 : 2 * (t + 1)];
    return {x + first, nullptr, s.ranges[2 * t + 1] - first, step + next - first, in.T == 1};
  }
  return {x, nullptr, in.V, step};
}

// Whether the row's support holds this column.
template <class T>
bool holds(const RowView<T>& row, int64_t first, int64_t column) {
  if (row.columns == nullptr) return column >= first && column < first + row.n;
  return lists(row.columns, row.n, column);
}

// The gradient of one row, its token's own column included.
template <class T>
void write_grad(const Scores& in, int64_t n, int64_t t, const RowState<T>& state,
                RowSlopes<acc_t<T>> slope, const GradRow<T>& out) {
  using S = acc_t<T>;
  if (!counts(in.mask, n * in.T + t)) return zero(out);  // its bounds were not checked
  int64_t first;
  const RowView<T> row = supported<T>(in, n, t, first);
  const int64_t token = in.tokens[n * in.T + t];
  const bool held = holds(row, first, token);
  if (!held) slope.logp = 0;
  // Also where the row is not a number.
  if (slope.logp == 0 && slope.entropy == 0) return zero(out);
  const S inv = static_cast<S>(in.inv_temperature);
  OwnColumn<S> own{-1, 0};
  if (held) {  // before the row's own memory may be written
    const T* x = static_cast<const T*>(in.logits) + n * in.stride_n + t * in.stride_t;
    own = {token, grad_token(log_softmax<S>(to_float(x[token]), state.z, inv), state.z, slope)};
  }
  grad_row(row, first, out, state, inv, slope, own);
}

// A sequence's exponentials are kept between its sums and its gradient where
// they are no more than this; two such buffers fit a second-level cache.  Longer
// rows are read and exponentiated again.
constexpr int64_t kKeptFloats = int64_t{1} << 17;

// One thread's memory for a sequence: its rows' exponentials, one after another.
class Keeper {
 public:
  Keeper() = default;
  Keeper(const Keeper&) = delete;
  Keeper& operator=(const Keeper&) = delete;
  ~Keeper() { std::free(floats_); }

  // Room for `count` floats, or false where that is too many to be worth keeping.
  bool reserve(int64_t count) {
    if (count > kKeptFloats) return false;
    if (count <= capacity_) return true;
    std::free(floats_);
    // Whole vectors, whole pages.
    const int64_t rounded = (count + 1023) / 1024 * 1024;
    floats_ = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * rounded));
    capacity_ = floats_ == nullptr ? 0 : rounded;
    return floats_ != nullptr;
  }
  float* data() const { return floats_; }

 private:
  float* floats_ = nullptr;
  int64_t capacity_ = 0;
};

// Calls f<T>() for the element type that `type` names.
template <class F>
void by_dtype(DType type, const F& f) {
  switch (type) {
    case DType::f32: return f.template operator()<float>();
    case DType::f64: return f.template operator()<double>();
    case DType::bf16: return f.template operator()<bf16_t>();
    case DType::f16: return f.template operator()<f16_t>();
  }
}

}  // namespace
}  // namespace genrec::GENREC_ISA
