// The one header through which this project touches PyTorch: its stable ABI,
// as of torch 2.11, so that one build runs on every later torch.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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
  std::ostringstream want;
  for (int64_t n : shape) {
    want << (d ? ", " : "") << n;
    same = same && t.size(d) == n;
    ++d;
  }
  require(same, name, " must have shape [", want.str(), "], got ", shape_text(t));
  require(t.device() == like.device(), name, " must be on the device of the first argument");
}

// The data of an optional contiguous tensor, or null.
template <class T>
inline const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

}  // namespace genrec
