// Tensors on the CPU whose memory is mapped from the system; see common/pages.h.
#pragma once

#include <utility>

#include "common/pages.h"
#include "common/torch_stable.h"

namespace genrec {

inline int64_t bytes_of(const Tensor& like, const std::vector<int64_t>& sizes) {
  int64_t bytes = static_cast<int64_t>(like.element_size());
  for (int64_t size : sizes) bytes *= size;
  return bytes;
}

// A contiguous tensor with like's dtype in mapped memory, which `release` takes back.
template <class Release>
inline Tensor in_mapping(void* data, const Tensor& like, const std::vector<int64_t>& sizes,
                         Release release) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
  return torch::stable::from_blob(data, sizes, strides, like.device(), like.scalar_type(),
                                  std::move(release));
}

// Zeros with like's dtype, or none where they are too few to be worth a mapping of
// their own.  `written`: where it will not stay zero, as far as is known; see
// release_blank.
inline std::optional<Tensor> new_blank(const Tensor& like, const std::vector<int64_t>& sizes,
                                       std::vector<Span> written = {}) {
  constexpr int64_t kWorthwhile = int64_t{1} << 20;
  const int64_t bytes = bytes_of(like, sizes);
  if (bytes < kWorthwhile) return std::nullopt;
  Blank blank = map_blank(bytes);
  void* data = blank.data;
  if (data == nullptr) return std::nullopt;
  return in_mapping(data, like, sizes,
                    [blank = std::move(blank), written = std::move(written)](void*) mutable {
                      release_blank(std::move(blank), written);
                    });
}

// A tensor with like's dtype that its maker writes from end to end.
inline Tensor new_whole(const Tensor& like, std::initializer_list<int64_t> sizes) {
  constexpr int64_t kWorthwhile = int64_t{4} << 20;
  int64_t bytes = bytes_of(like, sizes);
  void* data = bytes >= kWorthwhile ? map_whole(bytes) : nullptr;
  if (data == nullptr) return new_tensor(like, like.scalar_type(), sizes);
  return in_mapping(data, like, sizes, [bytes](void* memory) { release_whole(memory, bytes); });
}

}  // namespace genrec
