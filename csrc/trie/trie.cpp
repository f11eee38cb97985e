// The torch side of constrained decoding: what a caller can get wrong, what is
// allocated, and which kernel runs.
#include "trie/kernels.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "common/torch_stable.h"
#if defined(GENREC_CUDA_LIBRARY)
#include "common/launch_torch.h"
#else
#include "common/isa.h"
#endif

namespace genrec {

#if !defined(GENREC_CUDA_LIBRARY)
GENREC_CPU_KERNELS(trie::CpuKernels, trie_kernels)
#endif

namespace trie {

#if defined(GENREC_CUDA_LIBRARY)
extern const CudaKernels trie_cuda_kernels;  // trie_cuda.cu
#endif

namespace {

// This file is compiled into both libraries.  What differs is below: where the
// kernels are, and that the host can look at indices only where they are in its
// memory.
#if defined(GENREC_CUDA_LIBRARY)

void run(StepArgs& a, const Tensor& where) {
  if (a.U == 0) return;
  // As floats, in the scores' memory.
  const int64_t floats = (trie_cuda_kernels.workspace(a) + 3) / 4;
  Tensor workspace = new_tensor(where, ScalarType::Float, {floats});
  a.workspace = workspace.mutable_data_ptr();
  launch_on_device_of(where, [&](void* stream) { return trie_cuda_kernels.step(a, stream); });
}

#else

const CpuKernels& kernels() { return cpu_trie_kernels(); }

// What the kernel found at this row.
[[noreturn]] void complain_of(const StepArgs& a, int64_t row) {
  const int64_t node = a.nodes[row];
  require<std::out_of_range>(0 <= node && node < a.level_nodes, "nodes[", row / a.W, ", ",
                             row % a.W, "] must lie in [-1, ", a.level_nodes,
                             "), the nodes of this level, got ", node);
  const int64_t begin = a.first_child[node], end = a.first_child[node + 1];
  require<std::out_of_range>(
      0 <= begin && begin <= end && end <= a.next_nodes, "first_child of node ", node,
      " must satisfy 0 <= begin <= end <= ", a.next_nodes, ", got ", begin, " and ", end);
  const auto [least, most] = std::minmax_element(a.labels + begin, a.labels + end);
  std::ostringstream text;
  text << "the children of node " << node << " have labels from " << *least << " up to " << *most
       << ", but logits have only V = " << a.V << " columns";
  throw std::out_of_range(text.str());
}

void run(StepArgs& a, const Tensor&) {
  // A thread is worth waking for about this many logits, as in torch's own operators: OpenMP's
  // threads wait awake for a while after their last work.
  constexpr int64_t kGrain = 1 << 15;
  const int64_t row_work = a.softmax == Softmax::vocab   ? a.V
                           : a.softmax == Softmax::level ? a.level_end - a.level_begin
                                                         : 256;
  const int64_t user_work = std::max<int64_t>(1, a.W * row_work);
  // Few users are cut, so that every thread has its part.
  const int64_t threads = torch::stable::get_num_threads();
  if (a.U < 4 * threads && a.U % threads != 0)
    a.chunks = std::max<int64_t>(1, std::min({user_work / kGrain, threads, a.W}));
  std::unique_ptr<Contender[]> workspace;
  if (a.chunks > 1) {
    workspace.reset(new Contender[static_cast<size_t>(a.U * a.chunks * a.width)]);
    a.workspace = workspace.get();
  }
  std::mutex mutex;
  int64_t bad = -1;
  torch::stable::parallel_for(0, a.U * a.chunks,
                              std::max<int64_t>(1, kGrain * a.chunks / user_work),
                              [&](int64_t first, int64_t last) {
                                const int64_t row = kernels().step(a, first, last);
                                if (row < 0) return;
                                const std::lock_guard<std::mutex> lock(mutex);
                                bad = bad < 0 ? row : std::min(bad, row);
                              });
  if (bad >= 0) complain_of(a, bad);
  if (a.chunks > 1) kernels().merge(a, 0, a.U);
}

#endif

bool is_integer(ScalarType t) {
  switch (t) {
    case ScalarType::Long:
    case ScalarType::Int:
    case ScalarType::Short:
    case ScalarType::Char:
    case ScalarType::Byte:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64: return true;
    default: return false;
  }
}

// What every step is given; a contiguous copy where a tensor is not.
struct Inputs {
  const Tensor &logits, &scores, &nodes, &first_child, &labels;
  const std::optional<Tensor>&forbidden, &closed, &closed_row, &taken, &taken_begin;
};

class Step {
 public:
  StepArgs a;

  Step(const Inputs& in, int64_t width, double temperature) : where_(in.scores) {
    switch (in.logits.scalar_type()) {
      case ScalarType::Float: a.dtype = DType::f32; break;
      case ScalarType::BFloat16: a.dtype = DType::bf16; break;
      case ScalarType::Half: a.dtype = DType::f16; break;
      default:
        require(false, "logits must be float32, bfloat16 or float16, got ",
                torch::headeronly::toString(in.logits.scalar_type()));
    }
    // Texts of shapes are made only where something is wrong.
    if (in.nodes.dim() != 2)
      require(false, "nodes must have shape [U, W], got ", shape_text(in.nodes));
    a.U = in.nodes.size(0), a.W = in.nodes.size(1);
    if (in.logits.dim() != 2 || in.logits.size(0) != a.U * a.W)
      require(false, "logits must have shape [U * W, V] with U * W = ", a.U * a.W, ", got ",
              shape_text(in.logits));
    a.V = in.logits.size(1);
    require(a.V < (int64_t{1} << 31), "logits must have fewer than 2^31 columns, got ", a.V);
    require(a.W < (int64_t{1} << 31), "nodes must have fewer than 2^31 beams a user, got ", a.W);
    // A thread holds some 16 bytes a beam, twice.
    require(1 <= width && width <= (int64_t{1} << 24),
            "width must be at least 1 and at most 2^24, got ", width);
    a.width = width;
    a.inv_temperature = require_temperature(temperature);
    require(is_integer(in.nodes.scalar_type()), "nodes must be integers, got ",
            torch::headeronly::toString(in.nodes.scalar_type()));
    a.nodes = converted<int64_t>(in.nodes, "nodes", ScalarType::Long, in.logits);
    a.scores = converted<float>(in.scores, "scores", ScalarType::Float, in.logits);
    a.first_child = held<int32_t>(in.first_child, "first_child", ScalarType::Int,
                                  {in.first_child.numel()}, in.logits);
    a.level_nodes = in.first_child.numel() - 1;
    require(a.level_nodes >= 0, "first_child must have at least one entry");
    a.labels = held<int32_t>(in.labels, "labels", ScalarType::Int, {in.labels.numel()}, in.logits);
    a.next_nodes = in.labels.numel();
    a.logits = in.logits.const_data_ptr();
    a.stride = in.logits.stride(0);
    if (a.V > 1 && in.logits.stride(1) != 1) {
      kept_.push_back(torch::stable::contiguous(in.logits));
      a.logits = kept_.back().const_data_ptr();
      a.stride = a.V;
    }
    Filter& f = a.filter;
    if (in.forbidden) {
      const bool shared = in.forbidden->dim() == 1;
      f.forbidden = shared ? held<bool>(*in.forbidden, "forbidden", ScalarType::Bool,
                                        {a.next_nodes}, in.logits)
                           : held<bool>(*in.forbidden, "forbidden", ScalarType::Bool,
                                        {a.U, a.next_nodes}, in.logits);
      f.forbidden_stride = shared ? 0 : a.next_nodes;
    }
    if (in.closed) {
      f.closed_words = (a.next_nodes + 31) / 32;
      f.closed_rows = in.closed->dim() == 2 ? in.closed->size(0) : 0;
      f.closed = held<int32_t>(*in.closed, "closed", ScalarType::Int,
                               {f.closed_rows, f.closed_words}, in.logits);
    }
    require(!in.closed_row || in.closed, "closed_row is of use only beside closed");
    if (in.closed_row)
      f.closed_row =
          held<int64_t>(*in.closed_row, "closed_row", ScalarType::Long, {a.U}, in.logits);
    require(in.taken.has_value() == in.taken_begin.has_value(),
            "taken and taken_begin must be given together");
    if (in.taken) {
      f.num_taken = in.taken->numel();
      f.taken = held<int32_t>(*in.taken, "taken", ScalarType::Int, {f.num_taken}, in.logits);
      f.taken_begin =
          held<int64_t>(*in.taken_begin, "taken_begin", ScalarType::Long, {a.U + 1}, in.logits);
    }
  }

  template <class T>
  const T* held(const Tensor& t, const char* name, ScalarType dtype,
                std::initializer_list<int64_t> shape, const Tensor& like) {
    require_tensor(t, name, dtype, shape, like);
    if (t.is_contiguous()) return t.const_data_ptr<T>();
    kept_.push_back(torch::stable::contiguous(t));
    return kept_.back().template const_data_ptr<T>();
  }

  // [U, W] of any dtype; of this one as it is.
  template <class T>
  const T* converted(const Tensor& t, const char* name, ScalarType dtype, const Tensor& like) {
    if (t.scalar_type() == dtype) return held<T>(t, name, dtype, {a.U, a.W}, like);
    kept_.push_back(torch::stable::to(t, dtype));
    const Tensor copy = kept_.back();
    return held<T>(copy, name, dtype, {a.U, a.W}, like);
  }

  Tensor new_scores() const { return new_tensor(where_, ScalarType::Float, {a.U, a.width}); }

  // (scores, parent, token, node), which the kernel will write.
  std::tuple<Tensor, Tensor, Tensor, Tensor> outputs() {
    const auto indices = [&] { return new_tensor(where_, ScalarType::Long, {a.U, a.width}); };
    const Tensor scores = new_scores(), parent = indices(), token = indices(), node = indices();
    a.out_scores = scores.mutable_data_ptr<float>();
    a.out_parent = parent.mutable_data_ptr<int64_t>();
    a.out_token = token.mutable_data_ptr<int64_t>();
    a.out_node = node.mutable_data_ptr<int64_t>();
    return {scores, parent, token, node};
  }

 private:
  const Tensor& where_;
  std::vector<Tensor> kept_;  // contiguous and converted copies
};

std::tuple<Tensor, Tensor, Tensor, Tensor> trie_beam_step(
    const Tensor& logits, const Tensor& scores, const Tensor& nodes, const Tensor& first_child,
    const Tensor& labels, int64_t width, int64_t level_begin, int64_t level_end,
    std::string softmax, double temperature, std::optional<Tensor> forbidden,
    std::optional<Tensor> closed, std::optional<Tensor> closed_row, std::optional<Tensor> taken,
    std::optional<Tensor> taken_begin) {
  Step step({logits, scores, nodes, first_child, labels, forbidden, closed, closed_row, taken,
             taken_begin},
            width, temperature);
  StepArgs& a = step.a;
  if (level_end == -1) level_end = a.V;
  require(level_end <= a.V, "logits must have at least ", level_end,
          " columns: this level owns columns [", level_begin, ", ", level_end,
          "), but the logits have only ", a.V);
  require(0 <= level_begin && level_begin <= level_end,
          "the level's columns must satisfy 0 <= level_begin <= level_end <= V = ", a.V, ", got [",
          level_begin, ", ", level_end, ")");
  a.level_begin = level_begin, a.level_end = level_end;
  require(softmax == "vocab" || softmax == "level" || softmax == "children",
          "softmax must be one of \"vocab\", \"level\", \"children\", got \"", softmax, "\"");
  a.softmax = softmax == "vocab"   ? Softmax::vocab
              : softmax == "level" ? Softmax::level
                                   : Softmax::children;
  auto outputs = step.outputs();
  run(a, scores);
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> trie_sample_step(
    const Tensor& logits, const Tensor& scores, std::optional<Tensor> perturbed,
    const Tensor& nodes, const Tensor& first_child, const Tensor& labels, int64_t width,
    int64_t level, int64_t seed, double temperature, std::optional<Tensor> forbidden,
    std::optional<Tensor> closed, std::optional<Tensor> closed_row, std::optional<Tensor> taken,
    std::optional<Tensor> taken_begin) {
  Step step({logits, scores, nodes, first_child, labels, forbidden, closed, closed_row, taken,
             taken_begin},
            width, temperature);
  StepArgs& a = step.a;
  require(0 <= level && level < (int64_t{1} << 32), "level must lie in [0, 2^32), got ", level);
  a.sampling = true;
  a.softmax = Softmax::children;
  if (perturbed)
    a.perturbed = step.converted<float>(*perturbed, "perturbed", ScalarType::Float, logits);
  a.seed = static_cast<uint64_t>(seed);
  a.level = static_cast<uint32_t>(level);
  const Tensor out_perturbed = step.new_scores();
  a.out_perturbed = out_perturbed.mutable_data_ptr<float>();
  const auto [out_scores, parent, token, node] = step.outputs();
  run(a, scores);
  return {out_scores, out_perturbed, parent, token, node};
}

}  // namespace

#if defined(GENREC_CUDA_LIBRARY) && !defined(GENREC_SIMULATOR)
STABLE_TORCH_LIBRARY_IMPL(genrec, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) {
#endif
  m.impl("trie_beam_step", TORCH_BOX(&trie_beam_step));
  m.impl("trie_sample_step", TORCH_BOX(&trie_sample_step));
}

}  // namespace trie
}  // namespace genrec
