// The torch side of attention along the paths of a tree: what a caller can get wrong, what is
// allocated, and which kernel runs.  On the CPU alone: elsewhere
// genrec_ext/integrations/hf_candidates.py composes it of torch's operators.
#include <algorithm>

#include "attention/kernels.h"
#include "common/isa.h"
#include "common/torch_stable.h"

namespace genrec {

GENREC_CPU_KERNELS(attention::CpuKernels, attention_kernels)

namespace attention {
namespace {

DType element_of(const Tensor& query) {
  switch (query.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      require(false, "query must be float32, bfloat16 or float16, got ",
              torch::headeronly::toString(query.scalar_type()));
  }
  return DType::f32;
}

// Each way begins at some node and names only nodes that there are.
void require_paths(const PathArgs& a) {
  for (int64_t row = 0; row < a.B * a.W; ++row)
    for (int64_t j = 0; j < a.T; ++j) {
      const int32_t node = a.path[row * a.T + j];
      require<std::out_of_range>(node < a.W && (j > 0 || node >= 0), "path[", row / a.W, ", ",
                                 row % a.W, ", ", j, "] must lie in [", j > 0 ? -1 : 0, ", ", a.W,
                                 "), the user's nodes, got ", node);
    }
}

// What both directions are given, contiguous.
struct Inputs {
  Tensor query, key, value, path;
  std::optional<Tensor> keep;
  PathArgs a;

  Inputs(const Tensor& query_in, const Tensor& key_in, const Tensor& value_in,
         const Tensor& path_in, const std::optional<Tensor>& keep_in)
      : query(torch::stable::contiguous(query_in)),
        key(torch::stable::contiguous(key_in)),
        value(torch::stable::contiguous(value_in)),
        path(torch::stable::contiguous(path_in)) {
    a.dtype = element_of(query);
    require(query.dim() == 4, "query must have shape [B, W, H, D], got ", shape_text(query));
    a.B = query.size(0), a.W = query.size(1), a.H = query.size(2), a.D = query.size(3);
    require_tensor(key, "key", query.scalar_type(), {a.B, a.W, a.H, a.D}, query);
    require_tensor(value, "value", query.scalar_type(), {a.B, a.W, a.H, a.D}, query);
    require(path.dim() == 3 && 1 <= path.size(2) && path.size(2) <= kMostLevels,
            "path must have shape [B, W, T], 1 <= T <= ", kMostLevels, ", got ", shape_text(path));
    a.T = path.size(2);
    require_tensor(path, "path", ScalarType::Int, {a.B, a.W, a.T}, query);
    if (keep_in.has_value()) {
      require_tensor(*keep_in, "keep", ScalarType::Float, {a.B, a.W, a.H, a.T}, query);
      keep = torch::stable::contiguous(*keep_in);
      a.keep = keep->const_data_ptr<float>();
    }
    a.query = query.const_data_ptr();
    a.key = key.const_data_ptr();
    a.value = value.const_data_ptr();
    a.path = path.const_data_ptr<int32_t>();
    require_paths(a);
  }

  Tensor like_query() const { return new_tensor(query, query.scalar_type(), {a.B, a.W, a.H, a.D}); }
};

void run(void (*kernel)(const PathArgs&, int64_t, int64_t), const PathArgs& a) {
  // A thread is worth waking for about this many numbers.
  constexpr int64_t kGrain = 1 << 14;
  const int64_t work = std::max<int64_t>(1, a.W * a.H * a.D);
  torch::stable::parallel_for(0, a.B, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t first, int64_t last) { kernel(a, first, last); });
}

std::tuple<Tensor, Tensor> path_attention_forward(const Tensor& query, const Tensor& key,
                                                  const Tensor& value, const Tensor& bias,
                                                  const Tensor& path,
                                                  const std::optional<Tensor>& keep) {
  Inputs in(query, key, value, path, keep);
  PathArgs& a = in.a;
  require_tensor(bias, "bias", ScalarType::Float, {a.H, a.T, a.T}, in.query);
  const Tensor biases = torch::stable::contiguous(bias);
  const Tensor out = in.like_query();
  const Tensor shares = new_tensor(in.query, ScalarType::Float, {a.B, a.W, a.H, a.T});
  a.bias = biases.const_data_ptr<float>();
  a.out = out.mutable_data_ptr();
  a.shares = shares.mutable_data_ptr<float>();
  run(cpu_attention_kernels().forward, a);
  return {out, shares};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> path_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& shares, const Tensor& path, const std::optional<Tensor>& keep) {
  Inputs in(query, key, value, path, keep);
  PathArgs& a = in.a;
  require_tensor(grad, "grad", in.query.scalar_type(), {a.B, a.W, a.H, a.D}, in.query);
  require_tensor(shares, "shares", ScalarType::Float, {a.B, a.W, a.H, a.T}, in.query);
  const Tensor grads = torch::stable::contiguous(grad), kept = torch::stable::contiguous(shares);
  const Tensor by_query = in.like_query(), by_key = in.like_query(), by_value = in.like_query();
  const Tensor by_user = new_tensor(in.query, ScalarType::Float, {a.B, a.H, a.T * a.T});
  const Tensor by_bias = new_tensor(in.query, ScalarType::Float, {a.H, a.T, a.T});
  a.grad = grads.const_data_ptr();
  a.shares = const_cast<float*>(kept.const_data_ptr<float>());  // which backward only reads
  a.grad_query = by_query.mutable_data_ptr();
  a.grad_key = by_key.mutable_data_ptr();
  a.grad_value = by_value.mutable_data_ptr();
  a.grad_bias = by_user.mutable_data_ptr<float>();
  run(cpu_attention_kernels().backward, a);
  float* total = by_bias.mutable_data_ptr<float>();
  const int64_t size = a.H * a.T * a.T;
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (int64_t b = 0; a.W > 0 && b < a.B; ++b) sum += a.grad_bias[b * size + i];
    total[i] = static_cast<float>(sum);
  }
  return {by_query, by_key, by_value, by_bias};
}

STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) {
  m.impl("path_attention_forward", TORCH_BOX(&path_attention_forward));
  m.impl("path_attention_backward", TORCH_BOX(&path_attention_backward));
}

}  // namespace
}  // namespace attention
}  // namespace genrec
