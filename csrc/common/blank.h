// Zeros on the CPU that take memory only where something is written.
#pragma once

#include <utility>

#include "common/pages.h"
#include "common/torch_stable.h"

namespace genrec {

// A contiguous tensor of zeros with like's dtype, or none where it is too small to
// be worth a mapping of its own.  `written`: where it will not stay zero, as far as
// is known; see release_blank.
inline std::optional<Tensor> new_blank(const Tensor& like, const std::vector<int64_t>& sizes,
                                       std::vector<Span> written = {}) {
  constexpr int64_t kWorthwhile = int64_t{1} << 20;
  std::vector<int64_t> strides(sizes.size());
  int64_t bytes = static_cast<int64_t>(like.element_size());
  for (size_t d = sizes.size(); d-- > 0; bytes *= sizes[d])
    strides[d] = bytes / static_cast<int64_t>(like.element_size());
  void* data = bytes >= kWorthwhile ? map_blank(bytes) : nullptr;
  if (data == nullptr) return std::nullopt;
  return torch::stable::from_blob(data, sizes, strides, like.device(), like.scalar_type(),
                                  [bytes, written = std::move(written)](void* memory) {
                                    release_blank(memory, bytes, written.data(),
                                                  static_cast<int64_t>(written.size()));
                                  });
}

}  // namespace genrec
