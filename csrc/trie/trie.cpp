// The torch side of constrained decoding: what a caller can get wrong, what is
// allocated, and which kernel runs.
#include "trie/kernels.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "common/isa.h"
#include "common/torch_stable.h"

namespace genrec {

namespace baseline {
extern const trie::CpuKernels trie_kernels;
}
#if defined(GENREC_X86)
namespace avx2 {
extern const trie::CpuKernels trie_kernels;
}
namespace avx512 {
extern const trie::CpuKernels trie_kernels;
}
#endif

namespace trie {
namespace {

const CpuKernels& kernels() {
#if defined(GENREC_X86)
  switch (active_isa()) {
    case Isa::avx512: return avx512::trie_kernels;
    case Isa::avx2: return avx2::trie_kernels;
    default: break;
  }
#endif
  return baseline::trie_kernels;
}

// The children of a live beam must be nodes of the next level, and their labels
// columns of the logits.
void check_nodes(const BeamStepArgs& a, int64_t level_nodes) {
  for (int64_t row = 0; row < a.U * a.W; ++row) {
    const int64_t node = a.nodes[row];
    require<std::out_of_range>(-1 <= node && node < level_nodes, "nodes[", row / a.W, ", ",
                               row % a.W, "] must lie in [-1, ", level_nodes,
                               "), the nodes of this level, got ", node);
    if (node < 0) continue;
    const int64_t begin = a.first_child[node], end = a.first_child[node + 1];
    require<std::out_of_range>(
        0 <= begin && begin <= end && end <= a.next_nodes, "first_child of node ", node,
        " must satisfy 0 <= begin <= end <= ", a.next_nodes, ", got ", begin, " and ", end);
    bool inside = true;
    for (int64_t child = begin; child < end; ++child)
      inside &= static_cast<uint32_t>(a.labels[child]) < static_cast<uint64_t>(a.V);
    require<std::out_of_range>(
        inside, "the children of node ", node, " have labels up to ",
        begin < end ? *std::max_element(a.labels + begin, a.labels + end) : 0,
        ", but logits have only V = ", a.V, " columns");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> trie_beam_step(
    const Tensor& logits, const Tensor& scores, const Tensor& nodes, const Tensor& first_child,
    const Tensor& labels, int64_t width, int64_t level_begin, int64_t level_end,
    std::string softmax, double temperature, std::optional<Tensor> forbidden) {
  BeamStepArgs a;
  switch (logits.scalar_type()) {
    case ScalarType::Float: a.dtype = DType::f32; break;
    case ScalarType::BFloat16: a.dtype = DType::bf16; break;
    case ScalarType::Half: a.dtype = DType::f16; break;
    default:
      require(false, "logits must be float32, bfloat16 or float16, got ",
              torch::headeronly::toString(logits.scalar_type()));
  }
  require(nodes.dim() == 2, "nodes must have shape [U, W], got ", shape_text(nodes));
  a.U = nodes.size(0), a.W = nodes.size(1);
  require(logits.dim() == 2 && logits.size(0) == a.U * a.W,
          "logits must have shape [U * W, V] with U * W = ", a.U * a.W, ", got ",
          shape_text(logits));
  a.V = logits.size(1);
  require(1 <= width && width < (int64_t{1} << 31), "width must be at least 1 and below 2^31, got ",
          width);
  const float inverse = static_cast<float>(1 / temperature);
  require(std::isfinite(temperature) && temperature > 0 && inverse > 0 && std::isfinite(inverse),
          "temperature must be a positive number whose inverse is one in float32, got ",
          temperature);
  require_tensor(nodes, "nodes", ScalarType::Long, {a.U, a.W}, logits);
  require_tensor(scores, "scores", ScalarType::Float, {a.U, a.W}, logits);
  require_tensor(first_child, "first_child", ScalarType::Int, {first_child.numel()}, logits);
  require(first_child.numel() >= 1, "first_child must have at least one entry");
  require_tensor(labels, "labels", ScalarType::Int, {labels.numel()}, logits);
  a.next_nodes = labels.numel();
  require(0 <= level_begin && level_begin <= level_end && level_end <= a.V,
          "the level's columns must satisfy 0 <= level_begin <= level_end <= V = ", a.V, ", got [",
          level_begin, ", ", level_end, ")");
  require(softmax == "vocab" || softmax == "level" || softmax == "children",
          "softmax must be one of \"vocab\", \"level\", \"children\", got \"", softmax, "\"");
  if (forbidden) {
    if (forbidden->dim() == 1)
      require_tensor(*forbidden, "forbidden", ScalarType::Bool, {a.next_nodes}, logits);
    else
      require_tensor(*forbidden, "forbidden", ScalarType::Bool, {a.U, a.next_nodes}, logits);
  }
  const bool unit = a.V == 1 || logits.stride(1) == 1;
  const Tensor rows = unit ? logits : torch::stable::contiguous(logits);
  const Tensor held_scores = torch::stable::contiguous(scores);
  const Tensor held_nodes = torch::stable::contiguous(nodes);
  const Tensor held_first = torch::stable::contiguous(first_child);
  const Tensor held_labels = torch::stable::contiguous(labels);
  std::optional<Tensor> held_forbidden;
  if (forbidden) held_forbidden = torch::stable::contiguous(*forbidden);
  Tensor norms = torch::stable::new_empty(scores, {a.U * a.W, 2});
  Tensor out_scores = torch::stable::new_empty(scores, {a.U, width});
  Tensor parent = torch::stable::new_empty(nodes, {a.U, width});
  Tensor token = torch::stable::new_empty(nodes, {a.U, width});
  Tensor node = torch::stable::new_empty(nodes, {a.U, width});
  a.logits = rows.const_data_ptr();
  a.stride = rows.stride(0);
  a.scores = held_scores.const_data_ptr<float>();
  a.nodes = held_nodes.const_data_ptr<int64_t>();
  a.first_child = held_first.const_data_ptr<int32_t>();
  a.labels = held_labels.const_data_ptr<int32_t>();
  a.level_begin = level_begin, a.level_end = level_end;
  a.softmax = softmax == "vocab"   ? Softmax::vocab
              : softmax == "level" ? Softmax::level
                                   : Softmax::children;
  a.inv_temperature = inverse;
  a.forbidden = data_or_null<bool>(held_forbidden);
  a.forbidden_stride = forbidden && forbidden->dim() == 2 ? a.next_nodes : 0;
  a.width = width;
  a.norms = norms.mutable_data_ptr<float>();
  a.out_scores = out_scores.mutable_data_ptr<float>();
  a.out_parent = parent.mutable_data_ptr<int64_t>();
  a.out_token = token.mutable_data_ptr<int64_t>();
  a.out_node = node.mutable_data_ptr<int64_t>();
  check_nodes(a, first_child.numel() - 1);

  // A thread is worth waking for about this many logits or candidates.
  constexpr int64_t kGrain = 16384;
  const int64_t row_work = a.softmax == Softmax::vocab ? a.V : a.level_end - a.level_begin;
  const auto grain = [](int64_t work) {
    return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  };
  torch::stable::parallel_for(0, a.U * a.W, grain(row_work), [&](int64_t first, int64_t last) {
    kernels().normalize_beams(a, first, last);
  });
  torch::stable::parallel_for(0, a.U, grain(a.W * 64), [&](int64_t first, int64_t last) {
    kernels().select_beams(a, first, last);
  });
  return {out_scores, parent, token, node};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) { m.impl("trie_beam_step", TORCH_BOX(&trie_beam_step)); }

}  // namespace trie
}  // namespace genrec
