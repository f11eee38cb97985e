// The one header through which this project touches PyTorch: its stable ABI,
// as of torch 2.11, so that one build runs on every later torch.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace genrec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises E(parts...) unless `ok`.  std::invalid_argument reaches Python as
// ValueError, std::out_of_range as IndexError; STD_TORCH_CHECK would give a
// RuntimeError that starts with a source path.
template <class E = std::invalid_argument, class... Parts>
inline void require(bool ok, const Parts&... parts) {
  if (ok) [[likely]]
    return;
  std::ostringstream text;
  (text << ... << parts);
  throw E(text.str());
}

// Its inverse.  Twice that is a number too, since by log2(e) it enters exponents to base 2.
inline float require_temperature(double temperature) {
  const float inverse = static_cast<float>(1 / temperature);
  require(
      std::isfinite(temperature) && temperature > 0 && inverse > 0 && std::isfinite(2 * inverse),
      "temperature must be a positive number whose inverse is one in float32, got ", temperature);
  return inverse;
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ']';
  return text.str();
}

// `t` must have exactly this dtype and shape and lie where `like` lies.
inline void require_tensor(const Tensor& t, const char* name, ScalarType dtype,
                           std::initializer_list<int64_t> shape, const Tensor& like) {
  require(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ",
          torch::headeronly::toString(t.scalar_type()));
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t n : shape) {
    same = same && t.size(d) == n;
    ++d;
  }
  if (!same) {  // text streams cost more than small kernels: none before it is wrong
    std::ostringstream want;
    d = 0;
    for (int64_t n : shape) want << (d++ ? ", " : "") << n;
    require(false, name, " must have shape [", want.str(), "], got ", shape_text(t));
  }
  require(t.device() == like.device(), name, " must be on the device of the first argument");
}

// A new contiguous tensor beside `like`.  torch::stable::new_empty looks its operator
// up by name, which takes several times as long.
inline Tensor new_tensor(const Tensor& like, ScalarType dtype,
                         std::initializer_list<int64_t> shape) {
  int64_t strides[4] = {};
  int64_t stride = 1, d = static_cast<int64_t>(shape.size());
  for (auto n = shape.end(); n != shape.begin();) {
    strides[--d] = stride;
    stride *= *--n;
  }
  int32_t device_type = 0, type = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides, type,
                               device_type, like.get_device_index(), &made) != 0)
    throw std::runtime_error("a tensor could not be allocated");
  return Tensor(made);
}

// The data of an optional contiguous tensor, or null.
template <class T>
inline const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

}  // namespace genrec
