// The torch side of `assign_last_codes`: what a caller can get wrong, and threads over
// groups.  On the host alone, whatever the codes' device.
#include <algorithm>
#include <cmath>

#include "common/torch_stable.h"
#include "tokenizer/assign.h"

namespace genrec::tokenizer {
namespace {

// items [M] in groups begin [G + 1], by last code; last [N]; distances [M, K] float64.
Tensor assign_last(const Tensor& items, const Tensor& begin, const Tensor& last,
                   int64_t codebook_size, int64_t capacity,
                   const std::optional<Tensor>& distances) {
  require_tensor(last, "last", ScalarType::Long, {last.numel()}, last);
  require_tensor(items, "items", ScalarType::Long, {items.numel()}, last);
  require(begin.numel() >= 1, "begin must have at least one element");
  require_tensor(begin, "begin", ScalarType::Long, {begin.numel()}, last);
  require(codebook_size >= 1, "codebook_size must be at least 1, got ", codebook_size);
  require(capacity >= 1, "capacity must be at least 1, got ", capacity);
  const int64_t N = last.numel(), M = items.numel(), G = begin.numel() - 1;
  if (distances)
    require_tensor(*distances, "distances", ScalarType::Double, {M, codebook_size}, last);
  const Tensor held_items = torch::stable::contiguous(items);
  const Tensor held_begin = torch::stable::contiguous(begin);
  std::optional<Tensor> held_distances;
  if (distances) held_distances = torch::stable::contiguous(*distances);
  const Tensor source = torch::stable::contiguous(last);
  const Tensor result = new_tensor(last, ScalarType::Long, {N});
  AssignArgs args;
  args.items = held_items.const_data_ptr<int64_t>();
  args.begin = held_begin.const_data_ptr<int64_t>();
  args.codebook_size = codebook_size;
  args.capacity = std::min(capacity, M + 1);
  args.distances = data_or_null<double>(held_distances);
  args.last = result.mutable_data_ptr<int64_t>();
  std::copy_n(source.const_data_ptr<int64_t>(), N, args.last);
  require(args.begin[0] == 0 && args.begin[G] == M, "begin must go from 0 to ", M,
          ", the number of items, got ", args.begin[0], " and ", args.begin[G]);
  for (int64_t i = 0; i < M; ++i) {
    require<std::out_of_range>(0 <= args.items[i] && args.items[i] < N, "items[", i,
                               "] must lie in [0, ", N, "), got ", args.items[i]);
    const int64_t code = args.last[args.items[i]];
    require<std::out_of_range>(0 <= code && code < codebook_size, "last[", args.items[i],
                               "] must lie in [0, ", codebook_size, "), got ", code);
    if (distances)
      for (int64_t k = 0; k < codebook_size; ++k)
        require(std::isfinite(args.distances[i * codebook_size + k]),
                "distances must be finite, got ", args.distances[i * codebook_size + k],
                " for item ", args.items[i], " and code ", k);
  }
  for (int64_t g = 0; g < G; ++g) {
    const int64_t size = args.begin[g + 1] - args.begin[g];
    require(size >= 0 && args.begin[g] >= 0, "begin must ascend, got ", args.begin[g], " and ",
            args.begin[g + 1]);
    require((size + args.capacity - 1) / args.capacity <= codebook_size, size,
            " items share all codes but the last, and ", codebook_size,
            " last codes have room for ", capacity, " each: item ", args.items[args.begin[g]],
            " is one of them");
  }
  torch::stable::parallel_for(0, G, 16, [&](int64_t first, int64_t last_group) {
    assign_last_codes(args, first, last_group);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) { m.impl("assign_last_codes", TORCH_BOX(&assign_last)); }

}  // namespace genrec::tokenizer
