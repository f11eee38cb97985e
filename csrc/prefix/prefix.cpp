// The torch side of the prefix family: what a caller can get wrong, what is
// allocated, and which kernel runs.
#include "common/scores_torch.h"
#include "prefix/kernels.h"
#if defined(GENREC_CUDA_LIBRARY)
#include "policy/kernels.h"
#endif

namespace genrec {

#if defined(GENREC_CUDA_LIBRARY)
namespace policy {
extern const CudaKernels cuda_kernels;  // policy_cuda.cu
}
#else
GENREC_CPU_KERNELS(prefix::CpuKernels, prefix_kernels)
#endif

namespace prefix {

#if defined(GENREC_CUDA_LIBRARY)
extern const CudaKernels prefix_cuda_kernels;  // prefix_cuda.cu
#endif

namespace {

#if defined(GENREC_CUDA_LIBRARY)
const CudaKernels& kernels() { return prefix_cuda_kernels; }
#else
const CpuKernels& kernels() { return cpu_prefix_kernels(); }
#endif

using MaybeTensor = const std::optional<Tensor>&;

DType accumulator(ScalarType S) { return S == ScalarType::Double ? DType::f64 : DType::f32; }

void require_positive(double x, const char* name) {
  require(x > 0 && std::isfinite(x), name, " must be positive and finite, got ", x);
}

void require_finite(double x, const char* name) {
  require(std::isfinite(x), name, " must be finite, got ", x);
}

// What comes in from whoever uses the loss: one number, or one a user.
struct Incoming {
  std::optional<Tensor> held;
  Outer outer;
};

Incoming make_incoming(const std::optional<Tensor>& grad_output, int64_t N, ScalarType S,
                       double scale, const Tensor& like) {
  Incoming in;
  in.outer.scale = scale;
  if (!grad_output) return in;
  in.outer.shared = grad_output->dim() == 0;
  if (in.outer.shared)
    require_tensor(*grad_output, "grad_output", S, {}, like);
  else
    require_tensor(*grad_output, "grad_output", S, {N}, like);
  in.held = torch::stable::contiguous(*grad_output);
  in.outer.incoming = in.held->const_data_ptr();
  return in;
}

// Weights of prefix lengths: checked, and held while kernels run.
struct Levels {
  Tensor weights;
  TokenFactors factors;
};

Levels make_levels(const Tensor& weights, int64_t T, ScalarType S, double beta,
                   double prefix_temperature, double per_token, const Tensor& like) {
  require(weights.dim() == 1 && weights.size(0) >= 1 && weights.size(0) <= T,
          "weights must have shape [P], 1 <= P <= ", T, ", the tokens of an item, got ",
          shape_text(weights));
  require_tensor(weights, "weights", S, {weights.size(0)}, like);
  require_positive(prefix_temperature, "prefix_temperature");
  require_finite(beta, "beta");
  require_finite(per_token, "ce_weight");
  Levels levels{torch::stable::contiguous(weights), {}};
  levels.factors.weights = levels.weights.const_data_ptr();
  levels.factors.P = weights.size(0);
  levels.factors.per_token = per_token;
  levels.factors.beta = beta;
  levels.factors.prefix_temperature = prefix_temperature;
  return levels;
}

Tensor nothing_like(const Tensor& logits) { return new_tensor(logits, logits.scalar_type(), {0}); }

// The rows, then their sums.
struct RowsResult {
  Tensor loss, levels, grad;
};

RowsResult run_rows(const Rows& rows, RowsArgs args, bool reduce, bool with_grad) {
  const Scores& s = rows.scores;
  const ScalarType S = accumulate_type(s.dtype);
  const Tensor logps = new_tensor(rows.logits, S, {s.N, s.T});
  const Gradient grad =
      with_grad ? new_gradient(rows.logits, s) : Gradient{nothing_like(rows.logits)};
  args.in = s;
  args.logps = logps.mutable_data_ptr();
  args.grad_logits = with_grad ? grad.values.mutable_data_ptr() : nullptr;
  args.grad_is_zero = grad.blank;
  args.grad_streamed = grad.streamed;
  run(kernels().rows, args, s.N, work_of(s), rows.logits);

  Tensor loss = reduce ? new_tensor(logps, S, {}) : new_tensor(logps, S, {s.N});
  Tensor levels = new_tensor(logps, S, {args.factors.P});
  FinishArgs last{accumulator(S), s.N, s.T, args.factors, args.outer.scale, args.beam.choices};
  last.logps = logps.const_data_ptr();
  last.losses = reduce ? nullptr : loss.mutable_data_ptr();
  last.total = reduce ? loss.mutable_data_ptr() : nullptr;
  last.levels = levels.mutable_data_ptr();
  run(kernels().finish, last, loss);
  return {loss, levels, grad.values};
}

std::tuple<Tensor, Tensor, Tensor> prefix_loss_forward(
    const Tensor& logits, const Tensor& tokens, const Tensor& weights, double beta,
    MaybeTensor ranges, MaybeTensor columns, MaybeTensor begin, MaybeTensor end, double temperature,
    double prefix_temperature, double ce_weight, bool validate, double scale, bool reduce,
    MaybeTensor grad_output, bool with_grad) {
  const Rows rows = make_rows(logits, tokens, std::nullopt, ranges, columns, begin, end,
                              temperature, validate, false);
  const Scores& s = rows.scores;
  const ScalarType S = accumulate_type(s.dtype);
  const Levels levels = make_levels(weights, s.T, S, beta, prefix_temperature,
                                    ce_weight / static_cast<double>(s.T), logits);
  const Incoming incoming = make_incoming(grad_output, s.N, S, scale_of(scale, s.N), logits);
  RowsArgs args;
  args.factors = levels.factors;
  args.outer = incoming.outer;
  RowsResult result = run_rows(rows, args, reduce, with_grad);
  return {result.loss, result.levels, result.grad};
}

std::tuple<Tensor, Tensor> beam_aware_loss_forward(const Tensor& logits, const Tensor& tokens,
                                                   int64_t beam_width, double weight, double scale,
                                                   MaybeTensor ranges, MaybeTensor columns,
                                                   MaybeTensor begin, MaybeTensor end,
                                                   double temperature, bool validate,
                                                   MaybeTensor grad_output, bool with_grad) {
  require(beam_width >= 1 && beam_width <= (int64_t{1} << 24),
          "beam_width must lie in [1, 2^24], got ", beam_width);
  require(weight >= 0 && std::isfinite(weight), "weight must be at least 0, got ", weight);
  require_positive(scale, "scale");
  require(static_cast<float>(scale) > 0, "scale must be positive in float32 too, got ", scale);
  const Rows rows = make_rows(logits, tokens, std::nullopt, ranges, columns, begin, end,
                              temperature, validate, false);
  const Scores& s = rows.scores;
  const ScalarType S = accumulate_type(s.dtype);
  const Incoming incoming = make_incoming(grad_output, s.N, S, 1, logits);
  const Tensor choices = new_tensor(logits, S, {1});
  run(kernels().choices, ChoicesArgs{s, choices.mutable_data_ptr()}, choices);
  RowsArgs args;
  args.factors.per_token = 1;
  args.outer = incoming.outer;
  // No row has more than V columns to choose from.
  args.beam = {std::min(beam_width, s.V + 1), weight, scale, choices.const_data_ptr()};
  RowsResult result = run_rows(rows, args, true, with_grad);
  return {result.loss, result.grad};
}

// What both pairwise forms take besides scores.
struct Candidates {
  Levels levels;
  Tensor duplicates, log_scale, user_levels;
  Incoming incoming;
  PairwiseArgs args;
};

Candidates make_candidates(const Tensor& like, ScalarType S, int64_t N, int64_t C, int64_t T,
                           const Tensor& duplicates, const Tensor& log_scale, const Tensor& weights,
                           double beta, double prefix_temperature, double ce_weight,
                           const std::optional<Tensor>& grad_output) {
  Levels levels = make_levels(weights, T, S, beta, prefix_temperature,
                              ce_weight / static_cast<double>(T), like);
  const int64_t P = levels.factors.P;
  require_tensor(duplicates, "duplicates", ScalarType::Bool, {P, N, C}, like);
  require_tensor(log_scale, "log_scale", S, {P, N}, like);
  Candidates c{levels,
               torch::stable::contiguous(duplicates),
               torch::stable::contiguous(log_scale),
               new_tensor(like, S, {P, N}),
               make_incoming(grad_output, N, S, 1, like),
               {}};
  c.args.dtype = accumulator(S);
  c.args.N = N, c.args.C = C, c.args.T = T;
  c.args.factors = c.levels.factors;
  c.args.outer = c.incoming.outer;
  c.args.duplicates = c.duplicates.const_data_ptr<bool>();
  c.args.log_scale = c.log_scale.const_data_ptr();
  c.args.user_levels = c.user_levels.mutable_data_ptr();
  return c;
}

std::tuple<Tensor, Tensor> finish_candidates(const Candidates& c, ScalarType S) {
  Tensor loss = new_tensor(c.log_scale, S, {});
  Tensor levels = new_tensor(c.log_scale, S, {c.args.factors.P});
  FinishPairwiseArgs last{c.args.dtype, c.args.N, c.args.C, c.args.T, c.args.factors};
  last.logps = c.args.logps;
  last.wide_logps = c.args.wide_logps;
  last.user_levels = c.args.user_levels;
  last.total = loss.mutable_data_ptr();
  last.levels = levels.mutable_data_ptr();
  run(kernels().finish_pairwise, last, loss);
  return {loss, levels};
}

// logits [N, C * T, V], tokens [N, C * T].
std::tuple<Tensor, Tensor, Tensor> prefix_pairwise_loss_forward(
    const Tensor& logits, const Tensor& tokens, const Tensor& duplicates, const Tensor& log_scale,
    const Tensor& weights, double beta, int64_t candidates, double temperature,
    double prefix_temperature, double ce_weight, MaybeTensor grad_output, bool with_grad) {
  const Rows rows = make_rows(logits, tokens, std::nullopt, std::nullopt, std::nullopt,
                              std::nullopt, std::nullopt, temperature, false, false);
  const Scores& s = rows.scores;
  const ScalarType S = accumulate_type(s.dtype);
  require(candidates >= 1 && s.T % candidates == 0, "candidates must divide ", s.T,
          ", the rows of a user, got ", candidates);
  Candidates c =
      make_candidates(logits, S, s.N, candidates, s.T / candidates, duplicates, log_scale, weights,
                      beta, prefix_temperature, ce_weight, grad_output);
  // On the CPU doubles, between its two passes.
  const Tensor logps = new_tensor(logits, kOnHost ? ScalarType::Double : S, {s.N, s.T});
  const Tensor slopes = new_tensor(logits, S, {with_grad ? s.N : 0, s.T});
  const Gradient grad = with_grad ? new_gradient(logits, s) : Gradient{nothing_like(logits)};
  c.args.in = s;
  c.args.logps = logps.mutable_data_ptr();
  c.args.wide_logps = kOnHost;
  c.args.slopes = with_grad ? slopes.mutable_data_ptr() : nullptr;
#if defined(GENREC_CUDA_LIBRARY)
  const Tensor entropy = new_tensor(logits, S, {s.N, s.T});
  const Tensor norm = new_tensor(logits, S, {s.N, s.T, 2});
  const Tensor workspace = new_tensor(logits, S, {s.N, s.T, policy::kWorkspace});
  run(policy::cuda_kernels.token_logps,
      policy::TokenLogpsArgs{s, logps.mutable_data_ptr(), entropy.mutable_data_ptr(),
                             norm.mutable_data_ptr(), workspace.mutable_data_ptr()},
      s.N, work_of(s), logits);
  run(kernels().pairwise_from_logps, c.args, s.N, work_of(s), logits);
  if (with_grad)
    run(policy::cuda_kernels.token_logps_backward,
        policy::TokenLogpsBackwardArgs{s, norm.const_data_ptr(), entropy.const_data_ptr(),
                                       slopes.const_data_ptr(), nullptr,
                                       grad.values.mutable_data_ptr(), false},
        s.N, work_of(s), logits);
#else
  c.args.grad_logits = with_grad ? grad.values.mutable_data_ptr() : nullptr;
  c.args.grad_streamed = grad.streamed;
  run(kernels().pairwise, c.args, s.N, work_of(s), logits);
#endif
  auto [loss, levels] = finish_candidates(c, S);
  return {loss, levels, grad.values};
}

// logps [N, C, T].
std::tuple<Tensor, Tensor, Tensor> prefix_pairwise_loss_from_logps_forward(
    const Tensor& logps, const Tensor& duplicates, const Tensor& log_scale, const Tensor& weights,
    double beta, double prefix_temperature, double ce_weight) {
  const ScalarType S = logps.scalar_type();
  require(S == ScalarType::Float || S == ScalarType::Double,
          "logps must be float32 or float64, got ", torch::headeronly::toString(S));
  require(logps.dim() == 3 && logps.size(1) >= 1, "logps must have shape [B, C, T], C >= 1, got ",
          shape_text(logps));
  const int64_t N = logps.size(0), C = logps.size(1), T = logps.size(2);
  Candidates c = make_candidates(logps, S, N, C, T, duplicates, log_scale, weights, beta,
                                 prefix_temperature, ce_weight, std::nullopt);
  const Tensor held = torch::stable::contiguous(logps);
  Tensor grad = new_tensor(logps, S, {N, C, T});
  c.args.logps = const_cast<void*>(held.const_data_ptr());
  c.args.slopes = grad.mutable_data_ptr();
  run(kernels().pairwise_from_logps, c.args, N, C * T, logps);
  auto [loss, levels] = finish_candidates(c, S);
  return {loss, levels, grad};
}

}  // namespace

#if defined(GENREC_CUDA_LIBRARY) && !defined(GENREC_SIMULATOR)
STABLE_TORCH_LIBRARY_IMPL(genrec, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) {
#endif
  m.impl("prefix_loss_forward", TORCH_BOX(&prefix_loss_forward));
  m.impl("beam_aware_loss_forward", TORCH_BOX(&beam_aware_loss_forward));
  m.impl("prefix_pairwise_loss_forward", TORCH_BOX(&prefix_pairwise_loss_forward));
  m.impl("prefix_pairwise_loss_from_logps_forward",
         TORCH_BOX(&prefix_pairwise_loss_from_logps_forward));
}

}  // namespace prefix
}  // namespace genrec
