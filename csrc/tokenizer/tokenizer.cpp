// The torch side of the tokenizer family: what a caller can get wrong, what is
// allocated, and which kernel runs.
#include <algorithm>
#include <cmath>

#include "common/torch_stable.h"
#include "tokenizer/kernels.h"
#if defined(GENREC_CUDA_LIBRARY)
#include "common/launch_torch.h"
#else
#include "common/isa.h"
#endif

namespace genrec {

#if !defined(GENREC_CUDA_LIBRARY)
GENREC_CPU_KERNELS(tokenizer::CpuKernels, tokenizer_kernels)
#endif

namespace tokenizer {

#if defined(GENREC_CUDA_LIBRARY)
extern const CudaKernels tokenizer_cuda_kernels;  // tokenizer_cuda.cu
#endif

namespace {

// This file is compiled into both libraries.  What differs is below: where the kernels
// are, and the memory that they take.
#if defined(GENREC_CUDA_LIBRARY)

void run(QuantizeArgs& a, const Tensor& like) {
  if (a.N == 0) return;
  std::optional<Tensor> half_norms;
  if (a.dtype == DType::f32) {
    const int64_t Kp = padded(a.K, tokenizer_cuda_kernels.codewords);
    half_norms = new_tensor(like, ScalarType::Float, {a.L, Kp});
    a.half_norms = half_norms->mutable_data_ptr<float>();
  }
  launch_on_device_of(like,
                      [&](void* stream) { return tokenizer_cuda_kernels.quantize(a, stream); });
}

void run(SinkhornArgs& a, int64_t iterations, const Tensor& like) {
  launch_on_device_of(
      like, [&](void* stream) { return tokenizer_cuda_kernels.sinkhorn(a, iterations, stream); });
}

constexpr int64_t kMostBlocks = 1024;

#else

const CpuKernels& kernels() { return cpu_tokenizer_kernels(); }

void run(QuantizeArgs& a, const Tensor& like) {
  std::optional<Tensor> negated, half_norms, largest;
  if (a.dtype == DType::f32) {
    const int64_t Kp = padded(a.K, kCodewordBlock);
    negated = new_tensor(like, ScalarType::Float, {a.L, Kp, a.D});
    half_norms = new_tensor(like, ScalarType::Float, {a.L, Kp});
    largest = new_tensor(like, ScalarType::Double, {a.L});
    a.negated = negated->mutable_data_ptr<float>();
    a.half_norms = half_norms->mutable_data_ptr<float>();
    a.largest = largest->mutable_data_ptr<double>();
    kernels().prepare(a);
  }
  // In whole tiles, as many as are worth waking a thread for.
  const int64_t tile = kernels().rows, tiles = (a.N + tile - 1) / tile;
  const int64_t work = std::max<int64_t>(1, tile * a.L * a.K * a.D);
  torch::stable::parallel_for(0, tiles, std::max<int64_t>(1, (1 << 20) / work),
                              [&](int64_t first, int64_t last) {
                                kernels().quantize(a, first * tile, std::min(a.N, last * tile));
                              });
}

void run(SinkhornArgs& a, int64_t iterations, const Tensor& like) {
  const Tensor drift = new_tensor(like, ScalarType::Float, {a.K});
  a.drift = drift.mutable_data_ptr<float>();
  std::fill_n(a.drift, a.K, 0.f);
  std::fill_n(a.potentials, a.K, 0.f);
  const int64_t rows_worth = std::max<int64_t>(1, (1 << 14) / a.K);
  const int64_t blocks_worth = std::max<int64_t>(1, rows_worth / a.block_rows);
  const auto sum_columns = [&](auto kernel) {
    torch::stable::parallel_for(0, a.blocks, blocks_worth,
                                [&](int64_t first, int64_t last) { kernel(a, first, last); });
  };
  for (int64_t i = 0; i < iterations; ++i) {
    sum_columns(kernels().sinkhorn_blocks);
    Columns moved = kernels().sinkhorn_columns(a, false);
    if (moved == Columns::lost) {
      sum_columns(kernels().sinkhorn_exact_blocks);
      moved = kernels().sinkhorn_columns(a, true);
    }
    a.renew = moved == Columns::far;
  }
  torch::stable::parallel_for(0, a.N, rows_worth, [&](int64_t first, int64_t last) {
    kernels().sinkhorn_plan(a, first, last);
  });
}

constexpr int64_t kMostBlocks = 128;

#endif

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_quantize(const Tensor& x,
                                                             const Tensor& codebooks,
                                                             bool return_residuals) {
  const ScalarType S = x.scalar_type();
  require(S == ScalarType::Float || S == ScalarType::Double, "x must be float32 or float64, got ",
          torch::headeronly::toString(S));
  require(x.dim() == 2, "x must have shape [N, D], got ", shape_text(x));
  require(codebooks.dim() == 3 && codebooks.size(1) >= 1,
          "codebooks must have shape [L, K, D], K >= 1, got ", shape_text(codebooks));
  const int64_t N = x.size(0), D = x.size(1), L = codebooks.size(0), K = codebooks.size(1);
  require(K <= (1 << 30), "codebooks must have at most 2^30 codewords, got ",
          shape_text(codebooks));
  require_tensor(codebooks, "codebooks", S, {L, K, D}, x);
  const Tensor rows = torch::stable::contiguous(x), books = torch::stable::contiguous(codebooks);
  const Tensor codes = new_tensor(x, ScalarType::Long, {N, L});
  const Tensor quantized = new_tensor(x, S, {N, D});
  const Tensor squared_error = new_tensor(x, S, {N, L});
  const Tensor residuals = return_residuals ? new_tensor(x, S, {N, L, D}) : new_tensor(x, S, {0});

  QuantizeArgs args;
  args.dtype = S == ScalarType::Double ? DType::f64 : DType::f32;
  args.N = N, args.D = D, args.K = K, args.L = L;
  args.x = rows.const_data_ptr();
  args.codebooks = books.const_data_ptr();
  args.codes = codes.mutable_data_ptr<int64_t>();
  args.quantized = quantized.mutable_data_ptr();
  args.squared_error = squared_error.mutable_data_ptr();
  args.residuals = return_residuals ? residuals.mutable_data_ptr() : nullptr;
  run(args, x);
  return {codes, quantized, squared_error, residuals};
}

Tensor sinkhorn(const Tensor& cost, double epsilon, int64_t iterations) {
  require(cost.scalar_type() == ScalarType::Float, "cost must be float32, got ",
          torch::headeronly::toString(cost.scalar_type()));
  require(cost.dim() == 2 && cost.size(1) >= 1, "cost must have shape [N, K], K >= 1, got ",
          shape_text(cost));
  // Its inverse is a float in the kernels.
  require(epsilon >= 1e-37 && std::isfinite(epsilon),
          "epsilon must be positive, at least 1e-37, got ", epsilon);
  require(iterations >= 0, "iterations must be at least 0, got ", iterations);
  const int64_t N = cost.size(0), K = cost.size(1);
  const Tensor held = torch::stable::contiguous(cost);
  const Tensor plan = new_tensor(cost, ScalarType::Float, {N, K});
  if (N == 0) return plan;
  SinkhornArgs args;
  args.N = N, args.K = K;
  args.cost = held.const_data_ptr<float>();
  args.epsilon = epsilon;
  args.plan = plan.mutable_data_ptr<float>();
  // Blocks depend on N alone, so sums have the same bits with any number of threads.
  args.block_rows = std::max<int64_t>(32, (N + kMostBlocks - 1) / kMostBlocks);
  args.blocks = (N + args.block_rows - 1) / args.block_rows;
  const Tensor potentials = new_tensor(cost, ScalarType::Float, {K});
  const Tensor partial = new_tensor(cost, ScalarType::Float, {2, args.blocks, K});
  args.potentials = potentials.mutable_data_ptr<float>();
  args.tops = partial.mutable_data_ptr<float>();
  args.sums = args.tops + args.blocks * K;
  run(args, iterations, cost);
  return plan;
}

}  // namespace

#if defined(GENREC_CUDA_LIBRARY) && !defined(GENREC_SIMULATOR)
STABLE_TORCH_LIBRARY_IMPL(genrec, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) {
#endif
  m.impl("residual_quantize", TORCH_BOX(&residual_quantize));
  m.impl("sinkhorn", TORCH_BOX(&sinkhorn));
}

}  // namespace tokenizer
}  // namespace genrec
