// The torch side of language-model heads under a support: memory for a weight
// gradient of which few rows are not zero.  The products are torch's own matrix
// products (genrec_ext/ops/head.py).
#include "common/mapped.h"

namespace genrec::head {
namespace {

Tensor blank_like(const Tensor& like) {
  std::vector<int64_t> sizes(static_cast<size_t>(like.dim()));
  for (int64_t d = 0; d < like.dim(); ++d) sizes[static_cast<size_t>(d)] = like.size(d);
  if (std::optional<Tensor> blank = new_blank(like, sizes)) return *blank;
  return torch::stable::new_zeros(like, sizes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) { m.impl("blank_like", TORCH_BOX(&blank_like)); }

}  // namespace genrec::head
