// The tokenizer family's CUDA kernels on random cases, against their definition in
// float64 written below: `check_tokenizer TRIALS [SEED]` exits with 0 where all agree
// and says what does not.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "simulator/check.h"
#include "tokenizer/kernels.h"

namespace genrec::tokenizer {

extern const CudaKernels tokenizer_cuda_kernels;

namespace {

using namespace genrec::check;

int64_t one_of(Random& random, std::initializer_list<int64_t> choices) {
  return choices.begin()[random.below(static_cast<int64_t>(choices.size()))];
}

// Vectors and codebooks whose nearest codewords are hard to tell in f32.
struct Case {
  DType dtype;
  int64_t N, D, K, L;
  Buffer x, codebooks;
};

Case make_case(Random& random, DType dtype) {
  const bool wide = random.one_in(4);  // rows that shared memory does not hold whole
  Case c{dtype,
         random.one_in(8) ? 0 : one_of(random, {1, 2, 15, 16, 17, 40}),
         wide ? one_of(random, {65, 100, 128, 130}) : one_of(random, {0, 1, 2, 3, 8, 31, 32, 64}),
         one_of(random, {1, 2, 5, 16, 63, 64, 65, 130}),
         random.below(4),
         {},
         {}};
  // So many rows that they are taken in large tiles.
  if (dtype == DType::f32 && random.one_in(6)) c.N = 64 * 2 * 132 - 3, c.D = 2, c.K = 3, c.L = 1;
  // Close calls of rows too long for what shared memory holds of one.
  const bool longest = random.one_in(10);
  if (longest) c.N = 40, c.D = 560, c.K = 5, c.L = 1;
  c.x = Buffer(dtype, c.N * c.D);
  c.codebooks = Buffer(dtype, c.L * c.K * c.D);
  const int64_t kind = longest ? 5 : random.below(8);
  const double far = kind == 1 ? 3000 : 0, size = kind == 2 ? 1e30 : kind == 3 ? 1e-25 : 1;
  const auto number = [&] {
    const double value = size * random.normal();
    return kind == 4 ? std::round(value) : value;  // ties
  };
  for (int64_t i = 0; i < c.x.size(); ++i) c.x.set(i, far + number());
  for (int64_t i = 0; i < c.codebooks.size(); ++i)
    c.codebooks.set(i, (i < c.K * c.D ? far : 0) + number());
  for (int64_t i = c.D; i < c.codebooks.size(); ++i)
    if (kind == 5 || (kind == 6 && random.one_in(2)))  // codewords that repeat, or nearly
      c.codebooks.set(i, c.codebooks[i - c.D] + (random.one_in(3) ? 1e-6 * random.normal() : 0));
  if (kind == 7)
    for (Buffer* buffer : {&c.x, &c.codebooks})
      for (int64_t i = 0; i < buffer->size(); ++i)
        if (random.one_in(60)) buffer->set(i, random.one_in(2) ? kNan : random.normal() * kInf);
  return c;
}

// Codewords whose half norms vanish in f32, and a row long enough for its products with
// them to count.
Case case_of_vanishing_norms() {
  Case c{DType::f32, 1, 64, 2, 1, Buffer(DType::f32, 64), Buffer(DType::f32, 128)};
  for (int64_t d = 0; d < 64; ++d) {
    c.x.set(d, d == 0 ? 0x1p-47 : 0x1p-59);
    c.codebooks.set(d, d == 0 ? 0x1.6a00ap-75 : 0x1.99999ap-88);
    c.codebooks.set(64 + d, d == 0 ? 0x1.6a0114p-75 : -0x1.99999ap-88);
  }
  return c;
}

void check_quantize(Random& random, DType dtype) {
  const Case c = dtype == DType::f32 && random.one_in(8) ? case_of_vanishing_norms()
                                                         : make_case(random, dtype);
  const int64_t N = c.N, D = c.D, K = c.K, L = c.L;
  trial_text += std::to_string(N) + " x " + std::to_string(D) + ", " + std::to_string(L) + " x " +
                std::to_string(K);
  const int64_t Kp = padded(K, tokenizer_cuda_kernels.codewords);
  std::vector<int64_t> codes(static_cast<size_t>(N * L), -1);
  Buffer quantized(dtype, N * D), errors(dtype, N * L), residuals(dtype, N * L * D),
      half_norms(DType::f32, L * Kp);
  const bool with_residuals = random.one_in(2);
  QuantizeArgs a;
  a.dtype = dtype;
  a.N = N, a.D = D, a.K = K, a.L = L;
  a.x = c.x.data(), a.codebooks = c.codebooks.data();
  a.codes = codes.data();
  a.quantized = quantized.data();
  a.squared_error = errors.data();
  if (with_residuals) a.residuals = residuals.data();
  a.half_norms = static_cast<float*>(half_norms.data());
  expect_success("quantize", tokenizer_cuda_kernels.quantize(a, nullptr));

  const double rounding = epsilon(dtype);
  std::vector<double> r(static_cast<size_t>(D)), total(r);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t d = 0; d < D; ++d) {
      r[static_cast<size_t>(d)] = c.x[n * D + d];
      total[static_cast<size_t>(d)] = 0;
    }
    for (int64_t l = 0; l < L; ++l) {
      double least = kInf;
      int64_t nearest = 0;
      for (int64_t k = 0; k < K; ++k) {
        double distance = 0;
        for (int64_t d = 0; d < D; ++d) {
          const double difference = r[static_cast<size_t>(d)] - c.codebooks[(l * K + k) * D + d];
          const double square = difference * difference;
          distance += square;
        }
        if (distance < least) least = distance, nearest = k;
      }
      expect("code", n * L + l, static_cast<double>(codes[static_cast<size_t>(n * L + l)]),
             static_cast<double>(nearest), 0);
      double norm = 0;
      for (int64_t d = 0; d < D; ++d) {
        double& left = r[static_cast<size_t>(d)];
        if (with_residuals)
          expect("residual", (n * L + l) * D + d, residuals[(n * L + l) * D + d], left,
                 rounding * std::abs(left) + 1e-45);
        left -= c.codebooks[(l * K + nearest) * D + d];
        total[static_cast<size_t>(d)] += c.codebooks[(l * K + nearest) * D + d];
        norm += left * left;
      }
      // The same bits, as sums have an order; what is none has none.
      if (std::isfinite(norm))
        expect("squared error", n * L + l, errors[n * L + l],
               dtype == DType::f64 ? norm : static_cast<float>(norm), 0);
    }
    for (int64_t d = 0; d < D; ++d) {
      const double want = total[static_cast<size_t>(d)];
      expect("quantized", n * D + d, quantized[n * D + d], want, rounding * std::abs(want) + 1e-45);
    }
  }
}

void check_sinkhorn(Random& random, DType) {
  const int64_t N = one_of(random, {1, 3, 31, 32, 33, 100, 260}),
                K = one_of(random, {1, 2, 7, 31, 32, 33, 257}), iterations = random.below(7);
  SinkhornArgs a;
  a.N = N, a.K = K;
  a.epsilon = random.one_in(3) ? 1 : random.one_in(2) ? 0.05 : 0.003;
  a.block_rows = one_of(random, {32, 33, 40, 96});
  a.blocks = (N + a.block_rows - 1) / a.block_rows;
  Buffer cost(DType::f32, N * K), potentials(DType::f32, K), tops(DType::f32, a.blocks * K),
      sums(DType::f32, a.blocks * K), plan(DType::f32, N * K);
  for (int64_t i = 0; i < N * K; ++i) cost.set(i, random.uniform());
  if (random.one_in(3))  // a column that nobody wants
    for (int64_t n = 0; n < N; ++n) cost.set(n * K, 2 + random.uniform());
  a.cost = static_cast<const float*>(cost.data());
  a.potentials = static_cast<float*>(potentials.data());
  a.tops = static_cast<float*>(tops.data());
  a.sums = static_cast<float*>(sums.data());
  a.plan = static_cast<float*>(plan.data());
  trial_text += std::to_string(N) + " x " + std::to_string(K) + ", epsilon " +
                std::to_string(a.epsilon) + ", " + std::to_string(iterations) + " iterations";
  expect_success("sinkhorn", tokenizer_cuda_kernels.sinkhorn(a, iterations, nullptr));

  const auto at = [&](int64_t n, int64_t k) { return cost[n * K + k]; };
  std::vector<double> g(static_cast<size_t>(K), 0), f(static_cast<size_t>(N));
  const auto log_sum = [](const std::vector<double>& y) {
    const double top = *std::max_element(y.begin(), y.end());
    double sum = 0;
    for (const double v : y) sum += std::exp(v - top);
    return top + std::log(sum);
  };
  const auto set_rows = [&] {
    for (int64_t n = 0; n < N; ++n) {
      std::vector<double> y;
      for (int64_t k = 0; k < K; ++k)
        y.push_back((g[static_cast<size_t>(k)] - at(n, k)) / a.epsilon);
      f[static_cast<size_t>(n)] = -a.epsilon * log_sum(y);
    }
  };
  for (int64_t i = 0; i < iterations; ++i) {
    set_rows();
    for (int64_t k = 0; k < K; ++k) {
      std::vector<double> y;
      for (int64_t n = 0; n < N; ++n)
        y.push_back((f[static_cast<size_t>(n)] - at(n, k)) / a.epsilon);
      g[static_cast<size_t>(k)] = a.epsilon * (std::log(double(N) / double(K)) - log_sum(y));
    }
  }
  set_rows();
  // An exponent has float32's digits, and each iteration hands its own on.
  const double exponents = 4 / a.epsilon;
  const double bound = 0x1p-23 * (4 + exponents) * static_cast<double>(2 + iterations);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; ++k)
      expect(
          "plan", n * K + k, plan[n * K + k],
          std::exp((f[static_cast<size_t>(n)] + g[static_cast<size_t>(k)] - at(n, k)) / a.epsilon),
          bound);
}

}  // namespace
}  // namespace genrec::tokenizer

int main(int argc, char** argv) {
  using namespace genrec::tokenizer;
  using namespace genrec::check;
  using genrec::DType;
  const int trials = argc > 1 ? std::atoi(argv[1]) : 10;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  for (int i = 0; i < trials; ++i)
    for (const DType dtype : {DType::f32, DType::f64}) {
      Random random{seed * 1000003 + static_cast<uint64_t>(2 * i) + static_cast<uint64_t>(dtype)};
      const auto check = [&](const char* what, void (*run)(Random&, DType)) {
        trial_text = "trial " + std::to_string(i) + ": " + what + " ";
        run(random, dtype);
      };
      check(dtype == DType::f32 ? "quantize f32" : "quantize f64", check_quantize);
      if (dtype == DType::f32) check("sinkhorn", check_sinkhorn);
    }
  std::printf("%d trials, %d failures\n", trials, failures);
  return failures == 0 ? 0 : 1;
}
