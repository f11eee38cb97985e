// CPU kernels of attention along the paths of a tree.  Compiled once an instruction
// set; torch-free.
//
// Nodes are taken in their order, all heads of one after the other: its own rows lie in a row,
// those on its path were read before, and every sum has the same order each time.
#include "attention/kernels.h"

#include <cmath>
#include <cstdlib>

#include "common/vec.h"

namespace genrec::GENREC_ISA {
namespace {

using namespace genrec::attention;

// ---- one head's vector of D elements ----

template <class A, class E>
GENREC_INLINE float dot(const A* a, const E* b, int64_t D) {
  vfloat sum{};
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) sum += load_floats(a + i) * load_floats(b + i);
  float total = sum_lanes(sum);
  for (; i < D; ++i) total += to_float(a[i]) * to_float(b[i]);
  return total;
}

// to += factor x
template <class E>
GENREC_INLINE void add_scaled(float* to, float factor, const E* x, int64_t D) {
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) store(to + i, load(to + i) + factor * load_floats(x + i));
  for (; i < D; ++i) to[i] += factor * to_float(x[i]);
}

// out = sum of factors[j] x[j]
template <class E>
GENREC_INLINE void mix(E* out, const float* factors, const E* const* x, int64_t n, int64_t D) {
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) {
    vfloat sum{};
    for (int64_t j = 0; j < n; ++j) sum += factors[j] * load_floats(x[j] + i);
    store_floats(out + i, sum);
  }
  for (; i < D; ++i) {
    float sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += factors[j] * to_float(x[j][i]);
    from_float(out + i, sum);
  }
}

// ---- a node's path ----

int64_t length(const int32_t* path, int64_t T) {
  int64_t n = 0;
  while (n < T && path[n] >= 0) ++n;
  return n;
}

// Where a user's head of a node lies in E [B, W, H, D], and in float [B, W, H, T].
struct Places {
  const PathArgs& a;
  int64_t b, h;
  int64_t vector(int64_t w) const { return ((b * a.W + w) * a.H + h) * a.D; }
  int64_t shares(int64_t w) const { return ((b * a.W + w) * a.H + h) * a.T; }
};

template <class F>
void for_each_head(const PathArgs& a, int64_t b, const F& f) {
  for (int64_t w = 0; w < a.W; ++w) {
    const int32_t* path = a.path + (b * a.W + w) * a.T;
    const int64_t n = length(path, a.T);
    for (int64_t h = 0; h < a.H; ++h) f(Places{a, b, h}, w, path, n);
  }
}

template <class E>
void forward(const PathArgs& a, int64_t first, int64_t last) {
  const E *query = static_cast<const E*>(a.query), *key = static_cast<const E*>(a.key),
          *value = static_cast<const E*>(a.value);
  const auto head = [&](Places at, int64_t w, const int32_t* path, int64_t n) {
    float* shares = a.shares + at.shares(w);
    const float *bias = a.bias + (at.h * a.T + n - 1) * a.T,
                *keep = a.keep == nullptr ? nullptr : a.keep + at.shares(w);
    const E *q = query + at.vector(w), *values[kMostLevels];
    float weights[kMostLevels], top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t place = at.vector(path[j]);
      values[j] = value + place;
      weights[j] = dot(q, key + place, a.D) + bias[j];
      top = weights[j] > top ? weights[j] : top;
    }
    for (int64_t j = 0; j < n; ++j) sum += weights[j] = std::exp(weights[j] - top);
    for (int64_t j = 0; j < a.T; ++j) shares[j] = j < n ? weights[j] / sum : 0;
    for (int64_t j = 0; j < n; ++j) weights[j] = shares[j] * (keep == nullptr ? 1.f : keep[j]);
    mix(static_cast<E*>(a.out) + at.vector(w), weights, values, n, a.D);
  };
  for (int64_t b = first; b < last; ++b) for_each_head(a, b, head);
}

// A user's gradients by keys or values, as floats: in their place, or beside half types'.
template <class E>
class Sums {
 public:
  Sums(const PathArgs& a, void* out) : size_(a.W * a.H * a.D), out_(static_cast<E*>(out)) {
    if constexpr (sizeof(E) != sizeof(float))
      floats_ = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(size_ + 1)));
  }
  Sums(const Sums&) = delete;
  ~Sums() {
    if constexpr (sizeof(E) != sizeof(float)) std::free(floats_);
  }

  void begin(int64_t b) {
    begin_ = b * size_;
    if constexpr (sizeof(E) == sizeof(float)) floats_ = out_ + begin_;
    std::memset(floats_, 0, sizeof(float) * static_cast<size_t>(size_));
  }
  float* of(int64_t place) { return floats_ + (place - begin_); }
  void end() {
    if constexpr (sizeof(E) != sizeof(float))
      for (int64_t i = 0; i < size_; ++i) from_float(out_ + begin_ + i, floats_[i]);
  }

 private:
  int64_t size_, begin_ = 0;
  E* out_;
  float* floats_ = nullptr;
};

template <class E>
void backward(const PathArgs& a, int64_t first, int64_t last) {
  const E *query = static_cast<const E*>(a.query), *key = static_cast<const E*>(a.key),
          *value = static_cast<const E*>(a.value), *grad = static_cast<const E*>(a.grad);
  Sums<E> by_key(a, a.grad_key), by_value(a, a.grad_value);
  const auto head = [&](Places at, int64_t w, const int32_t* path, int64_t n) {
    const float *shares = a.shares + at.shares(w),
                *keep = a.keep == nullptr ? nullptr : a.keep + at.shares(w);
    float* by_bias = a.grad_bias + ((at.b * a.H + at.h) * a.T + n - 1) * a.T;
    const E *q = query + at.vector(w), *g = grad + at.vector(w), *keys[kMostLevels];
    float back[kMostLevels], mean = 0;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t place = at.vector(path[j]);
      keys[j] = key + place;
      back[j] = dot(g, value + place, a.D) * (keep == nullptr ? 1.f : keep[j]);
      mean += shares[j] * back[j];
    }
    for (int64_t j = 0; j < n; ++j) {
      const int64_t place = at.vector(path[j]);
      back[j] = shares[j] * (back[j] - mean);
      by_bias[j] += back[j];
      add_scaled(by_key.of(place), back[j], q, a.D);
      add_scaled(by_value.of(place), shares[j] * (keep == nullptr ? 1.f : keep[j]), g, a.D);
    }
    mix(static_cast<E*>(a.grad_query) + at.vector(w), back, keys, n, a.D);
  };
  for (int64_t b = first; b < last; ++b) {
    std::memset(a.grad_bias + b * a.H * a.T * a.T, 0,
                sizeof(float) * static_cast<size_t>(a.H * a.T * a.T));
    by_key.begin(b), by_value.begin(b);
    for_each_head(a, b, head);
    by_key.end(), by_value.end();
  }
}

template <class F>
void by_element(DType type, const F& f) {
  switch (type) {
    case DType::bf16: return f.template operator()<bf16_t>();
    case DType::f16: return f.template operator()<f16_t>();
    default: return f.template operator()<float>();
  }
}

void forward_any(const PathArgs& a, int64_t first, int64_t last) {
  by_element(a.dtype, [&]<class E>() { forward<E>(a, first, last); });
}
void backward_any(const PathArgs& a, int64_t first, int64_t last) {
  by_element(a.dtype, [&]<class E>() { backward<E>(a, first, last); });
}

}  // namespace

// Declared in attention.cpp for each instruction set that was built.
extern const attention::CpuKernels attention_kernels;
const attention::CpuKernels attention_kernels{forward_any, backward_any};

}  // namespace genrec::GENREC_ISA
