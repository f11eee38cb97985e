// The torch side of language-model heads under a support: memory for a weight
// gradient of which few rows are not zero.  The products are torch's own matrix
// products (genrec_ext/ops/head.py).
#include <algorithm>

#include "common/mapped.h"

namespace genrec::head {
namespace {

// Where rows [starts, ends) of a tensor lie, in rising order.
std::vector<Span> spans_of(const Tensor& like, const std::vector<int64_t>& starts,
                           const std::vector<int64_t>& ends) {
  int64_t row = static_cast<int64_t>(like.element_size());
  for (int64_t d = 1; d < like.dim(); ++d) row *= like.size(d);
  std::vector<Span> spans;
  for (size_t i = 0; i < starts.size(); ++i)
    if (starts[i] < ends[i]) spans.push_back({starts[i] * row, ends[i] * row});
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  return spans;
}

// Zeros like `like`, of which rows [starts, ends) are about to be written.
Tensor blank_like(const Tensor& like, std::vector<int64_t> starts, std::vector<int64_t> ends) {
  bool inside = like.dim() > 0 && starts.size() == ends.size();
  for (size_t i = 0; inside && i < starts.size(); ++i)
    inside = 0 <= starts[i] && starts[i] <= ends[i] && ends[i] <= like.size(0);
  require(inside, "starts and ends must be as many, with 0 <= start <= end <= like's rows");
  std::vector<int64_t> sizes(static_cast<size_t>(like.dim()));
  for (int64_t d = 0; d < like.dim(); ++d) sizes[static_cast<size_t>(d)] = like.size(d);
  if (std::optional<Tensor> blank = new_blank(like, sizes, spans_of(like, starts, ends)))
    return *blank;
  return torch::stable::new_zeros(like, sizes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) { m.impl("blank_like", TORCH_BOX(&blank_like)); }

}  // namespace genrec::head
