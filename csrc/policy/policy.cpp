// The torch side of the policy family: what a caller can get wrong, what is
// allocated, and which kernel runs.
#include "policy/kernels.h"

#include <cmath>
#include <string>

#include "common/scores_torch.h"

namespace genrec {

#if !defined(GENREC_CUDA_LIBRARY)
GENREC_CPU_KERNELS(policy::CpuKernels, policy_kernels)
#endif

namespace policy {

#if defined(GENREC_CUDA_LIBRARY)
extern const CudaKernels cuda_kernels;  // policy_cuda.cu
#endif

namespace {

#if defined(GENREC_CUDA_LIBRARY)
const CudaKernels& kernels() { return cuda_kernels; }
#else
const CpuKernels& kernels() { return cpu_policy_kernels(); }
#endif

ObjectiveConfig make_objective(const std::string& objective, double eps_pos, double eps_boost,
                               double eps_neg, double entropy_penalty, bool bounded,
                               const std::string& boost_mode, double kl_weight,
                               const std::string& kl, std::optional<double> clip_low,
                               std::optional<double> clip_high, double early_clip, bool has_ref) {
  ObjectiveConfig k;
  k.objective = one_of<Objective>(objective, "objective",
                                  {{"sage", Objective::sage},
                                   {"gbpo", Objective::gbpo},
                                   {"gspo", Objective::gspo},
                                   {"grpo", Objective::grpo},
                                   {"ecpo", Objective::ecpo}});
  const Divergence divergence = one_of<Divergence>(
      kl, "kl",
      {{"reverse", Divergence::reverse}, {"forward", Divergence::forward}, {"js", Divergence::js}});
  k.boost_multiplies =
      one_of<bool>(boost_mode, "boost_mode", {{"cap", false}, {"multiplier", true}});
  require_at_least_zero(eps_pos, "eps_pos");
  require_at_least_zero(eps_boost, "eps_boost");
  require_at_least_zero(eps_neg, "eps_neg");
  require_at_least_zero(entropy_penalty, "entropy_penalty");
  require_at_least_zero(kl_weight, "kl_weight");
  require_at_least_zero(early_clip, "early_clip");
  require(kl_weight == 0 || has_ref, "kl_weight is ", kl_weight, " but ref_logps is not given");
  // GSPO's published bounds are far narrower: its ratio is a geometric mean.
  const bool gspo = k.objective == Objective::gspo;
  k.clip_low = clip_low.value_or(gspo ? 3e-4 : 0.2);
  k.clip_high = clip_high.value_or(gspo ? 4e-4 : 0.2);
  require_at_least_zero(k.clip_low, "clip_low");
  require_at_least_zero(k.clip_high, "clip_high");
  k.divergence = kl_weight > 0 ? divergence : Divergence::none;
  k.eps_pos = eps_pos, k.eps_boost = eps_boost, k.eps_neg = eps_neg;
  k.entropy_penalty = entropy_penalty, k.bounded = bounded;
  k.early_clip = early_clip, k.kl_weight = kl_weight;
  return k;
}

// The per-sequence inputs of a loss: checked, and held while kernels run.
struct Sequences {
  Tensor old_logps, advantages;
  std::optional<Tensor> mask, entropy, boost, ref_logps;
  Tensor losses, stats;
  SequenceArgs args;
};

Sequences make_sequences(const Tensor& like, int64_t N, int64_t T, ScalarType S,
                         const Tensor& old_logps, const Tensor& advantages,
                         const std::optional<Tensor>& mask, const std::optional<Tensor>& entropy,
                         const std::optional<Tensor>& boost, const std::optional<Tensor>& ref_logps,
                         const ObjectiveConfig& objective, double scale) {
  require_tensor(old_logps, "old_logps", S, {N, T}, like);
  require_tensor(advantages, "advantages", S, {N}, like);
  if (mask) require_tensor(*mask, "mask", ScalarType::Bool, {N, T}, like);
  if (entropy) require_tensor(*entropy, "entropy", S, {N}, like);
  if (boost) require_tensor(*boost, "boost", S, {N}, like);
  if (ref_logps) require_tensor(*ref_logps, "ref_logps", S, {N, T}, like);
  Sequences q{torch::stable::contiguous(old_logps),
              torch::stable::contiguous(advantages),
              contiguous(mask),
              contiguous(entropy),
              contiguous(boost),
              contiguous(ref_logps),
              new_tensor(like, S, {N}),
              new_tensor(like, S, {N, kStats}),
              {}};
  SequenceArgs& a = q.args;
  a.N = N, a.T = T;
  a.mask = data_or_null<bool>(q.mask);
  a.old_logps = q.old_logps.const_data_ptr();
  a.advantages = q.advantages.const_data_ptr();
  a.entropy = q.entropy ? q.entropy->const_data_ptr() : nullptr;
  a.boost = q.boost ? q.boost->const_data_ptr() : nullptr;
  a.ref_logps = q.ref_logps ? q.ref_logps->const_data_ptr() : nullptr;
  a.objective = objective;
  a.scale = scale_of(scale, N);
  a.losses = q.losses.mutable_data_ptr();
  a.stats = q.stats.mutable_data_ptr();
  return q;
}

Tensor reduced(const Sequences& q, bool reduce) {
  if (!reduce) return q.losses;
  const Tensor total = new_tensor(q.losses, q.losses.scalar_type(), {});
  const bool wide = q.losses.scalar_type() == ScalarType::Double;
  const SumArgs args{wide ? DType::f64 : DType::f32, q.losses.numel(), q.losses.const_data_ptr(),
                     total.mutable_data_ptr()};
  run(kernels().sum, args, total);
  return total;
}

// What CUDA kernels leave for one another; it may go when they are launched, since
// its memory is used again on the same stream.
std::optional<Tensor> new_workspace(const Tensor& like, int64_t N, int64_t T) {
  if (kOnHost) return std::nullopt;
  return new_tensor(like, like.scalar_type(), {N, T, kWorkspace});
}

std::tuple<Tensor, Tensor, Tensor> token_logps_forward(
    const Tensor& logits, const Tensor& tokens, std::optional<Tensor> mask,
    std::optional<Tensor> ranges, std::optional<Tensor> columns, std::optional<Tensor> begin,
    std::optional<Tensor> end, double temperature, bool validate) {
  const Rows rows =
      make_rows(logits, tokens, mask, ranges, columns, begin, end, temperature, validate, false);
  const int64_t N = rows.scores.N, T = rows.scores.T;
  const ScalarType S = accumulate_type(rows.scores.dtype);
  Tensor logps = new_tensor(logits, S, {N, T});
  Tensor entropy = new_tensor(logits, S, {N, T});
  Tensor norm = new_tensor(logits, S, {N, T, 2});
  const std::optional<Tensor> workspace = new_workspace(norm, N, T);
  const TokenLogpsArgs args{rows.scores, logps.mutable_data_ptr(), entropy.mutable_data_ptr(),
                            norm.mutable_data_ptr(), memory_of(workspace)};
  run(kernels().token_logps, args, N, work_of(rows.scores), logits);
  return {logps, entropy, norm};
}

Tensor token_logps_backward(const Tensor& grad_logps, std::optional<Tensor> grad_entropy,
                            const Tensor& logits, const Tensor& tokens, const Tensor& norm,
                            const Tensor& entropy, std::optional<Tensor> mask,
                            std::optional<Tensor> ranges, std::optional<Tensor> columns,
                            std::optional<Tensor> begin, std::optional<Tensor> end,
                            double temperature) {
  const Rows rows =
      make_rows(logits, tokens, mask, ranges, columns, begin, end, temperature, false, false);
  const int64_t N = rows.scores.N, T = rows.scores.T;
  const ScalarType S = accumulate_type(rows.scores.dtype);
  require_tensor(grad_logps, "grad_logps", S, {N, T}, logits);
  if (grad_entropy) require_tensor(*grad_entropy, "grad_entropy", S, {N, T}, logits);
  require_tensor(norm, "norm", S, {N, T, 2}, logits);
  require_tensor(entropy, "entropy", S, {N, T}, logits);
  const Tensor by_logps = torch::stable::contiguous(grad_logps);
  if (grad_entropy) grad_entropy = torch::stable::contiguous(*grad_entropy);
  const Tensor held_norm = torch::stable::contiguous(norm);
  const Tensor held_entropy = torch::stable::contiguous(entropy);
  const Gradient grad = new_gradient(logits, rows.scores);
  const TokenLogpsBackwardArgs args{rows.scores,
                                    held_norm.const_data_ptr(),
                                    held_entropy.const_data_ptr(),
                                    by_logps.const_data_ptr(),
                                    grad_entropy ? grad_entropy->const_data_ptr() : nullptr,
                                    grad.values.mutable_data_ptr(),
                                    grad.blank,
                                    grad.streamed};
  run(kernels().token_logps_backward, args, N, work_of(rows.scores), logits);
  return grad.values;
}

// Both forms of the fused loss.  `into` is null, the logits, or a new tensor.
std::tuple<Tensor, Tensor> run_sage_loss(const Rows& rows, const Sequences& q, const Gradient* into,
                                         bool with_entropy, bool reduce) {
  SageLossArgs args{rows.scores, q.args};
  args.with_entropy = with_entropy;
  if (into != nullptr) {
    args.grad_logits = into->values.mutable_data_ptr();
    args.grad_stride_n = into->values.stride(0);
    args.grad_stride_t = into->values.stride(1);
    args.grad_is_zero = into->blank;
    args.grad_streamed = into->streamed;
  }
  const std::optional<Tensor> workspace = new_workspace(q.losses, rows.scores.N, rows.scores.T);
  args.workspace = memory_of(workspace);
  run(kernels().sage_loss, args, rows.scores.N, work_of(rows.scores), rows.logits);
  return {reduced(q, reduce), q.stats};
}

std::tuple<Tensor, Tensor, Tensor> sage_loss_forward(
    const Tensor& logits, const Tensor& tokens, const Tensor& old_logps, const Tensor& advantages,
    std::optional<Tensor> mask, std::optional<Tensor> entropy, std::optional<Tensor> boost,
    std::optional<Tensor> ref_logps, std::optional<Tensor> ranges, std::optional<Tensor> columns,
    std::optional<Tensor> begin, std::optional<Tensor> end, std::string objective, double eps_pos,
    double eps_boost, double eps_neg, double entropy_penalty, bool bounded, std::string boost_mode,
    double kl_weight, std::string kl, std::optional<double> clip_low,
    std::optional<double> clip_high, double early_clip, double temperature, double scale,
    bool with_entropy, bool reduce, bool validate, bool with_grad) {
  const ObjectiveConfig k =
      make_objective(objective, eps_pos, eps_boost, eps_neg, entropy_penalty, bounded, boost_mode,
                     kl_weight, kl, clip_low, clip_high, early_clip, ref_logps.has_value());
  const Rows rows =
      make_rows(logits, tokens, mask, ranges, columns, begin, end, temperature, validate, false);
  const Scores& s = rows.scores;
  const Sequences q = make_sequences(logits, s.N, s.T, accumulate_type(s.dtype), old_logps,
                                     advantages, mask, entropy, boost, ref_logps, k, scale);
  const Gradient grad =
      with_grad ? new_gradient(logits, s) : Gradient{new_tensor(logits, logits.scalar_type(), {0})};
  auto [loss, stats] = run_sage_loss(rows, q, with_grad ? &grad : nullptr, with_entropy, reduce);
  return {loss, stats, grad.values};
}

std::tuple<Tensor, Tensor> sage_loss_forward_(
    const Tensor& logits, const Tensor& tokens, const Tensor& old_logps, const Tensor& advantages,
    std::optional<Tensor> mask, std::optional<Tensor> entropy, std::optional<Tensor> boost,
    std::optional<Tensor> ref_logps, std::optional<Tensor> ranges, std::optional<Tensor> columns,
    std::optional<Tensor> begin, std::optional<Tensor> end, std::string objective, double eps_pos,
    double eps_boost, double eps_neg, double entropy_penalty, bool bounded, std::string boost_mode,
    double kl_weight, std::string kl, std::optional<double> clip_low,
    std::optional<double> clip_high, double early_clip, double temperature, double scale,
    bool with_entropy, bool reduce, bool validate) {
  const ObjectiveConfig k =
      make_objective(objective, eps_pos, eps_boost, eps_neg, entropy_penalty, bounded, boost_mode,
                     kl_weight, kl, clip_low, clip_high, early_clip, ref_logps.has_value());
  const Rows rows =
      make_rows(logits, tokens, mask, ranges, columns, begin, end, temperature, validate, true);
  const Scores& s = rows.scores;
  const Sequences q = make_sequences(logits, s.N, s.T, accumulate_type(s.dtype), old_logps,
                                     advantages, mask, entropy, boost, ref_logps, k, scale);
  const Gradient over{logits};
  return run_sage_loss(rows, q, &over, with_entropy, reduce);
}

std::tuple<Tensor, Tensor, Tensor> sage_loss_from_logps_forward(
    const Tensor& logps, const Tensor& old_logps, const Tensor& advantages,
    std::optional<Tensor> mask, std::optional<Tensor> entropy, std::optional<Tensor> boost,
    std::optional<Tensor> ref_logps, std::string objective, double eps_pos, double eps_boost,
    double eps_neg, double entropy_penalty, bool bounded, std::string boost_mode, double kl_weight,
    std::string kl, std::optional<double> clip_low, std::optional<double> clip_high,
    double early_clip, double scale, bool reduce) {
  const ObjectiveConfig k =
      make_objective(objective, eps_pos, eps_boost, eps_neg, entropy_penalty, bounded, boost_mode,
                     kl_weight, kl, clip_low, clip_high, early_clip, ref_logps.has_value());
  const ScalarType S = logps.scalar_type();
  require(S == ScalarType::Float || S == ScalarType::Double,
          "logps must be float32 or float64, got ", torch::headeronly::toString(S));
  require(logps.dim() == 2, "logps must have shape [N, T], got ", shape_text(logps));
  const int64_t N = logps.size(0), T = logps.size(1);
  const Sequences q = make_sequences(logps, N, T, S, old_logps, advantages, mask, entropy, boost,
                                     ref_logps, k, scale);
  const Tensor held = torch::stable::contiguous(logps);
  Tensor grad = new_tensor(logps, logps.scalar_type(), {N, T});
  const SageFromLogpsArgs args{S == ScalarType::Double ? DType::f64 : DType::f32, q.args,
                               held.const_data_ptr(), grad.mutable_data_ptr()};
  run(kernels().sage_loss_from_logps, args, N, T, logps);
  return {reduced(q, reduce), q.stats, grad};
}

// The saved gradient times the incoming one, by sequence where that has N values.
ScaleArgs scaling(const Tensor& grad, const Tensor& grad_output, const Tensor& factor) {
  const DType dtype = dtype_of(grad, "grad");
  require(grad.dim() >= 1, "grad must have at least one dimension");
  const int64_t N = grad.size(0);
  const bool shared = grad_output.dim() == 0;
  if (shared)
    require_tensor(grad_output, "grad_output", accumulate_type(dtype), {}, grad);
  else
    require_tensor(grad_output, "grad_output", accumulate_type(dtype), {N}, grad);
  ScaleArgs args;
  args.dtype = dtype;
  args.N = N;
  args.inner = N > 0 ? grad.numel() / N : 0;
  args.grad = grad.const_data_ptr();
  args.factor = factor.const_data_ptr();
  args.shared = shared;
  return args;
}

Tensor sage_loss_backward(const Tensor& grad_output, const Tensor& grad) {
  const Tensor factor = torch::stable::contiguous(grad_output);
  const Tensor held = torch::stable::contiguous(grad);
  Tensor out = torch::stable::empty_like(held);
  ScaleArgs args = scaling(held, grad_output, factor);
  args.out = out.mutable_data_ptr();
  run(kernels().scale, args, args.N, args.inner, grad);
  return out;
}

void sage_loss_backward_(const Tensor& grad, const Tensor& grad_output,
                         std::optional<Tensor> ranges, std::optional<Tensor> columns,
                         std::optional<Tensor> begin, std::optional<Tensor> end) {
  require(grad.is_contiguous(), "grad must be contiguous to be scaled in place");
  const Tensor factor = torch::stable::contiguous(grad_output);
  ScaleArgs args = scaling(grad, grad_output, factor);
  args.out = grad.mutable_data_ptr();
  ranges = contiguous(ranges), columns = contiguous(columns);
  begin = contiguous(begin), end = contiguous(end);
  if (ranges || columns) {  // checked when the gradient was made, but where the mask is False
    require(grad.dim() == 3, "grad must have shape [N, T, V] where a support is given, got ",
            shape_text(grad));
    args.T = grad.size(1);
    args.support.ranges = data_or_null<int64_t>(ranges);
    args.support.columns = data_or_null<int32_t>(columns);
    args.num_columns = columns ? columns->numel() : 0;
    args.support.begin = data_or_null<int64_t>(begin);
    args.support.end = data_or_null<int64_t>(end);
  }
  run(kernels().scale, args, args.N, args.inner, grad);
}

template <class S>
void require_no_infinity(const Tensor& rewards) {
  const S* x = rewards.const_data_ptr<S>();
  for (int64_t i = 0; i < rewards.numel(); ++i)
    require(!std::isinf(x[i]), "rewards must be finite, or NaN where an objective does not apply,",
            " got ", x[i], " at flat index ", i);
}

Tensor decoupled_advantages(const Tensor& rewards, const Tensor& weights,
                            std::optional<double> clamp, bool unbiased) {
  const ScalarType S = rewards.scalar_type();
  require(S == ScalarType::Float || S == ScalarType::Double,
          "rewards must be float32 or float64, got ", torch::headeronly::toString(S));
  require(rewards.dim() == 3, "rewards must have shape [B, G, M], got ", shape_text(rewards));
  require_tensor(weights, "weights", S, {rewards.size(2)}, rewards);
  require(!clamp.has_value() || *clamp > 0, "clamp must be positive, got ", clamp.value_or(0));
  const Tensor held = torch::stable::contiguous(rewards);
  const Tensor held_weights = torch::stable::contiguous(weights);
  const bool wide = S == ScalarType::Double;
  if (kOnHost) wide ? require_no_infinity<double>(held) : require_no_infinity<float>(held);
  Tensor out = new_tensor(rewards, rewards.scalar_type(), {rewards.size(0), rewards.size(1)});
  const AdvantagesArgs args{wide ? DType::f64 : DType::f32,
                            rewards.size(0),
                            rewards.size(1),
                            rewards.size(2),
                            held.const_data_ptr(),
                            held_weights.const_data_ptr(),
                            unbiased,
                            clamp.value_or(0),
                            out.mutable_data_ptr()};
  run(kernels().advantages, args, out);
  return out;
}

}  // namespace

#if defined(GENREC_CUDA_LIBRARY) && !defined(GENREC_SIMULATOR)
STABLE_TORCH_LIBRARY_IMPL(genrec, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) {
#endif
  m.impl("token_logps_forward", TORCH_BOX(&token_logps_forward));
  m.impl("token_logps_backward", TORCH_BOX(&token_logps_backward));
  m.impl("sage_loss_forward", TORCH_BOX(&sage_loss_forward));
  m.impl("sage_loss_forward_", TORCH_BOX(&sage_loss_forward_));
  m.impl("sage_loss_backward", TORCH_BOX(&sage_loss_backward));
  m.impl("sage_loss_backward_", TORCH_BOX(&sage_loss_backward_));
  m.impl("sage_loss_from_logps_forward", TORCH_BOX(&sage_loss_from_logps_forward));
  m.impl("decoupled_advantages", TORCH_BOX(&decoupled_advantages));
}

}  // namespace policy
}  // namespace genrec
