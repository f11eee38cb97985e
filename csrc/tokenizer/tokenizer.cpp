// The torch side of the tokenizer family: what a caller can get wrong, what is
// allocated, and which kernel runs.  CPU alone: on other devices the operators have
// their bodies in genrec_ext/ops.
#include <algorithm>
#include <cmath>

#include "common/isa.h"
#include "common/torch_stable.h"
#include "tokenizer/assign.h"
#include "tokenizer/kernels.h"

namespace genrec {

GENREC_CPU_KERNELS(tokenizer::CpuKernels, tokenizer_kernels)

namespace tokenizer {
namespace {

const CpuKernels& kernels() { return cpu_tokenizer_kernels(); }

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
  require(K <= INT32_MAX - kCodewordBlock, "codebooks must have fewer than 2^31 codewords, got ",
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
  std::optional<Tensor> negated, half_norms, largest;
  if (S == ScalarType::Float) {
    negated = new_tensor(x, S, {L, padded(K), D});
    half_norms = new_tensor(x, S, {L, padded(K)});
    largest = new_tensor(x, ScalarType::Double, {L});
    args.negated = negated->mutable_data_ptr<float>();
    args.half_norms = half_norms->mutable_data_ptr<float>();
    args.largest = largest->mutable_data_ptr<double>();
    kernels().prepare(args);
  }
  // In whole tiles, as many as are worth waking a thread for.
  const int64_t tile = kernels().rows, tiles = (N + tile - 1) / tile;
  const int64_t work = std::max<int64_t>(1, tile * L * K * D);
  torch::stable::parallel_for(0, tiles, std::max<int64_t>(1, (1 << 20) / work),
                              [&](int64_t first, int64_t last) {
                                kernels().quantize(args, first * tile, std::min(N, last * tile));
                              });
  return {codes, quantized, squared_error, residuals};
}

Tensor sinkhorn(const Tensor& cost, double epsilon, int64_t iterations) {
  require(cost.scalar_type() == ScalarType::Float, "cost must be float32, got ",
          torch::headeronly::toString(cost.scalar_type()));
  require(cost.dim() == 2 && cost.size(1) >= 1, "cost must have shape [N, K], K >= 1, got ",
          shape_text(cost));
  require(epsilon > 0 && std::isfinite(epsilon), "epsilon must be positive, got ", epsilon);
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
  args.block_rows = std::max<int64_t>(32, (N + 127) / 128);
  args.blocks = (N + args.block_rows - 1) / args.block_rows;
  const Tensor potentials = new_tensor(cost, ScalarType::Float, {K});
  const Tensor partial = new_tensor(cost, ScalarType::Float, {2, args.blocks, K});
  args.potentials = potentials.mutable_data_ptr<float>();
  args.tops = partial.mutable_data_ptr<float>();
  args.sums = args.tops + args.blocks * K;
  const Tensor drift = new_tensor(cost, ScalarType::Float, {K});
  args.drift = drift.mutable_data_ptr<float>();
  std::fill_n(args.drift, K, 0.f);
  std::fill_n(args.potentials, K, 0.f);
  const int64_t rows_worth = std::max<int64_t>(1, (1 << 14) / K);
  const int64_t blocks_worth = std::max<int64_t>(1, rows_worth / args.block_rows);
  const auto sum_columns = [&](auto kernel) {
    torch::stable::parallel_for(0, args.blocks, blocks_worth,
                                [&](int64_t first, int64_t last) { kernel(args, first, last); });
  };
  for (int64_t i = 0; i < iterations; ++i) {
    sum_columns(kernels().sinkhorn_blocks);
    Columns moved = kernels().sinkhorn_columns(args, false);
    if (moved == Columns::lost) {
      sum_columns(kernels().sinkhorn_exact_blocks);
      moved = kernels().sinkhorn_columns(args, true);
    }
    args.renew = moved == Columns::far;
  }
  torch::stable::parallel_for(0, N, rows_worth, [&](int64_t first, int64_t last) {
    kernels().sinkhorn_plan(args, first, last);
  });
  return plan;
}

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

STABLE_TORCH_LIBRARY_IMPL(genrec, CPU, m) {
  m.impl("residual_quantize", TORCH_BOX(&residual_quantize));
  m.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  m.impl("assign_last_codes", TORCH_BOX(&assign_last));
}

}  // namespace tokenizer
}  // namespace genrec
