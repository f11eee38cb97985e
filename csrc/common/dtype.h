// Element types of logits, as kernels see them.  Torch-free.
#pragma once

#include <cstdint>

namespace genrec {

enum class DType : int32_t { f32, f64, bf16, f16 };

// Half types stay bits outside the few functions that convert them.
struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

// What a row of T is accumulated in: f32, or double for double.
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename accumulator<T>::type;

}  // namespace genrec
