// The prefix family's CUDA kernels on random cases, against their definition in
// float64 written below: `check_prefix TRIALS [SEED]` exits with 0 where all agree
// and says what does not.
#include "prefix/kernels.h"

#include <cstdlib>
#include <functional>

#include "simulator/check_rows.h"

namespace genrec::prefix {

extern const CudaKernels prefix_cuda_kernels;

namespace {

using namespace genrec::check;

struct Weights {
  Buffer values;
  TokenFactors factors;
};

Weights make_weights(Random& random, DType S, int64_t T) {
  Weights w;
  w.factors.P = random.below(T + 1);
  w.values = Buffer(S, w.factors.P);
  for (int64_t t = 0; t < w.factors.P; ++t) w.values.set(t, random.uniform());
  w.factors.weights = w.values.data();
  w.factors.per_token = random.one_in(4) ? 0 : random.uniform();
  w.factors.beta = random.one_in(5) ? 0 : random.uniform();
  w.factors.prefix_temperature = random.one_in(3) ? 1 : random.one_in(2) ? 0.3 : 1e-3;
  return w;
}

// Token t's factor, prefix by prefix.
double factor_of(const Weights& w, int64_t t) {
  double factor = w.factors.per_token;
  for (int64_t u = 0; u < w.factors.P; ++u)
    if (t <= u)
      factor += w.factors.beta * w.values[u] / (double(u + 1) * w.factors.prefix_temperature);
  return factor;
}

struct Incoming {
  Buffer values;
  Outer outer;
  double of(int64_t n) const {
    return outer.scale * (outer.incoming == nullptr ? 1 : values[outer.shared ? 0 : n]);
  }
};

Incoming make_incoming(Random& random, DType S, int64_t N) {
  Incoming in;
  in.outer.scale = random.one_in(2) ? 1 : 0.25;
  in.outer.shared = random.one_in(2);
  in.values = Buffer(S, in.outer.shared ? 1 : N);
  for (int64_t i = 0; i < in.values.size(); ++i) in.values.set(i, random.normal());
  if (!random.one_in(3)) in.outer.incoming = in.values.data();
  return in;
}

// The log-probability of a row's k-th largest entry, -inf where there are fewer.
double define_bound(const Rows& rows, const Row& row, int64_t r, int64_t k) {
  std::vector<double> x;
  for (const int64_t v : row.support) {
    const double logit = scaled(rows, rows.logits, r, v);
    if (logit == logit) x.push_back(logit);
  }
  if (static_cast<int64_t>(x.size()) < k) return -kInf - row.log_norm;  // NaN stays
  std::nth_element(x.begin(), x.begin() + (k - 1), x.end(), std::greater<double>());
  return x[static_cast<size_t>(k - 1)] - row.log_norm;
}

// How many entries a row is said to have, whether they are columns or not.
int64_t listed(const Rows& rows, const Row& row, int64_t r) {
  if (!rows.columns) return static_cast<int64_t>(row.support.size());
  const auto i = static_cast<size_t>(r);
  const int64_t M = rows.in.support.num_columns;
  const int64_t begin = std::clamp<int64_t>(rows.begin[i], 0, M);
  return std::max<int64_t>(0, std::min({rows.end[i], M, begin + rows.in.V}) - begin);
}

// `ties`: rows of few values, so that very many entries may be the k-th largest.
void check_rows(Random& random, DType dtype, bool ties) {
  Rows rows = make_rows(random, dtype, random.one_in(2));
  rows.mask = nullptr;
  rows.in.mask = nullptr;
  const int64_t N = rows.in.N, T = rows.in.T, V = rows.in.V, R = rows.rows();
  const DType S = accumulator_of(dtype);
  const Weights w = make_weights(random, S, T);
  const Incoming incoming = make_incoming(random, S, N);
  Buffer logps(S, R), grad(dtype, R * V), choices(S, 1);
  const Buffer before = rows.logits;
  RowsArgs a;
  a.in = rows.in;
  a.factors = w.factors;
  a.outer = incoming.outer;
  a.logps = logps.data();
  const bool with_grad = !random.one_in(4);
  if (with_grad) a.grad_logits = grad.data();
  if (ties || !random.one_in(3)) {
    const int64_t widths[] = {1, 2, 5, 50, V, V + 1, 300, 600};
    a.beam = {widths[random.below(8)], random.one_in(4) ? 0 : 2 * random.uniform(),
              random.one_in(3) ? 1e-2 : 1, choices.data()};
    const int64_t values = 1 + random.below(3);
    if (ties || random.one_in(3))  // equal logits, some of them the bound
      for (int64_t i = 0; i < rows.logits.size(); ++i)
        if (rows.logits[i] == rows.logits[i] && !std::isinf(rows.logits[i]))
          rows.logits.set(i, ties ? double(random.below(values)) : std::round(rows.logits[i]));
  }
  const Buffer kept = rows.logits;
  if (a.beam.width > 0)
    expect_success("choices", prefix_cuda_kernels.choices({rows.in, choices.data()}, nullptr));
  expect_success("rows", prefix_cuda_kernels.rows(a, nullptr));

  int64_t count = 0;
  std::vector<Row> defined;
  for (int64_t r = 0; r < R; ++r) {
    defined.push_back(define_row(rows, kept, r));
    count += listed(rows, defined.back(), r) > 1;
  }
  const double rows_with_choice = a.beam.width > 0 ? double(std::max<int64_t>(count, 1)) : 1;
  if (a.beam.width > 0) expect("choices", 0, choices[0], rows_with_choice, 0);
  std::vector<double> weighted;
  for (int64_t r = 0; r < R; ++r) {
    const Row& row = defined[static_cast<size_t>(r)];
    double weight = 1, slack = 0;
    if (a.beam.width > 0) {
      const double bound = define_bound(rows, row, r, a.beam.width);
      const double ahead = (row.logp - bound) / a.beam.scale;
      weight = listed(rows, row, r) <= 1 ? 0
               : row.logp == -kInf       ? 1
                                         : 1 + a.beam.weight / (1 + std::exp(-ahead));
      slack = a.beam.weight * (1 + std::abs(std::isfinite(row.logp) ? row.logp : 0)) /
              a.beam.scale;  // how far rounding of log-probabilities moves the weight
    }
    const double want = weight == 0 ? 0 : weight * row.logp;
    weighted.push_back(want);
    const double size = std::isfinite(row.logp) ? std::abs(row.logp) : 0;
    const double error = rounding(S) * (1 + size) * (1 + slack) * (1 + a.beam.weight);
    expect("weighted logp", r, logps[r], want, error * (1 + size));
    if (!with_grad) continue;
    const double slope = -factor_of(w, r % T) * incoming.of(r / T) / rows_with_choice * weight;
    expect_gradient(rows, r, grad, r * V, define_gradient(rows, kept, row, r, slope, 0), 4 * error,
                    std::abs(slope) * (1 + slack));
  }
  for (int64_t i = 0; i < kept.size(); ++i)
    if (!kept.same_bits(rows.logits, i)) return complain("rows changed the logits");

  FinishArgs last{
      S, N, T, w.factors, incoming.outer.scale, a.beam.width > 0 ? choices.data() : nullptr};
  Buffer losses(S, N), total(S, 1), levels(S, w.factors.P);
  const bool each = random.one_in(2);
  last.logps = logps.data();
  last.losses = each ? losses.data() : nullptr;
  last.total = total.data();
  last.levels = levels.data();
  expect_success("finish", prefix_cuda_kernels.finish(last, nullptr));
  double whole = 0, size = 0;
  for (int64_t n = 0; n < N; ++n) {
    double loss = 0, own = 0;
    for (int64_t t = 0; t < T; ++t) {
      const double term = factor_of(w, t) * logps[n * T + t] * last.scale / rows_with_choice;
      loss -= term;
      own += std::isfinite(term) ? std::abs(term) : 0;
    }
    whole += loss;
    size += own;
    if (each) expect("loss", n, losses[n], loss, rounding(S) * (1 + own));
  }
  if (!each) expect("total", 0, total[0], whole, rounding(S) * (1 + size));
  for (int64_t t = 0; t < w.factors.P; ++t) {
    double sum = 0, own = 0;
    for (int64_t n = 0; n < N; ++n)
      for (int64_t u = 0; u <= t; ++u) {
        sum -= logps[n * T + u];
        own += std::isfinite(logps[n * T + u]) ? std::abs(logps[n * T + u]) : 0;
      }
    const double by = double(N > 0 ? N : 1) * double(t + 1) * w.factors.prefix_temperature;
    expect("level", t, levels[t], sum / by, rounding(S) * (1 + own) / by);
  }
}

void check_pairwise(Random& random, DType S) {
  PairwiseArgs a;
  a.dtype = S;
  a.N = random.below(4);
  a.C = 1 + random.below(random.one_in(3) ? 400 : 9);
  a.T = 1 + random.below(5);
  const Weights w = make_weights(random, S, a.T);
  const Incoming incoming = make_incoming(random, S, a.N);
  a.factors = w.factors;
  a.outer = incoming.outer;
  const int64_t P = w.factors.P, N = a.N, C = a.C, T = a.T;
  Buffer logps(S, N * C * T), log_scale(S, P * N), user_levels(S, P * N), slopes(S, N * C * T);
  std::unique_ptr<bool[]> duplicates(new bool[static_cast<size_t>(P * N * C)]);
  const double spread = random.one_in(3) ? 300 : 3;
  for (int64_t i = 0; i < logps.size(); ++i) logps.set(i, -spread * random.uniform());
  for (int64_t i = 0; i < log_scale.size(); ++i) log_scale.set(i, 4 * random.uniform());
  const bool all = random.one_in(5);
  for (int64_t i = 0; i < P * N * C; ++i)
    duplicates[static_cast<size_t>(i)] = all || random.one_in(3);
  if (random.one_in(3))  // an impossible negative counts for nothing
    for (int64_t i = 0; i < logps.size(); ++i)
      if (i / T % C != 0 && random.one_in(9)) logps.set(i, -kInf);
  a.duplicates = duplicates.get();
  a.log_scale = log_scale.data();
  a.logps = logps.data();
  a.user_levels = user_levels.data();
  const bool with_grad = !random.one_in(4);
  a.slopes = with_grad ? slopes.data() : nullptr;
  expect_success("pairwise", prefix_cuda_kernels.pairwise_from_logps(a, nullptr));

  double whole = 0;
  for (int64_t n = 0; n < N; ++n) {
    std::vector<double> slope(static_cast<size_t>(C * T), 0.0), size(slope);
    for (int64_t t = 0; t < P; ++t) {
      std::vector<double> s(static_cast<size_t>(C), -kInf);
      double top = -kInf;
      for (int64_t i = 0; i < C; ++i) {
        if (i > 0 && duplicates[static_cast<size_t>((t * N + n) * C + i)]) continue;
        double& sum = s[static_cast<size_t>(i)];
        sum = 0;
        for (int64_t u = 0; u <= t; ++u) sum += logps[(n * C + i) * T + u];
        sum = sum / w.factors.prefix_temperature + (i > 0 ? log_scale[t * N + n] : 0);
        top = std::max(top, sum);
      }
      double sum = 0;
      for (const double x : s) sum += std::exp(x - top);
      const double loss = (top + std::log(sum) - s[0]) / double(t + 1);
      expect("level of a user", t * N + n, user_levels[t * N + n], loss,
             rounding(S) * (1 + loss) + 1e-13 * std::abs(s[0]));
      const double each = w.factors.beta * w.values[t] /
                          (double(N) * double(t + 1) * w.factors.prefix_temperature) *
                          incoming.of(n);
      for (int64_t i = 0; i < C; ++i)
        for (int64_t u = 0; u <= t; ++u) {
          const double q = std::exp(s[static_cast<size_t>(i)] - top) / sum;
          slope[static_cast<size_t>(i * T + u)] += each * (q - (i == 0 ? 1 : 0));
          size[static_cast<size_t>(i * T + u)] += std::abs(each);
        }
    }
    for (int64_t t = 0; t < T; ++t) {
      slope[static_cast<size_t>(t)] -= w.factors.per_token * incoming.of(n) / double(N);
      whole -= w.factors.per_token * logps[n * C * T + t] / double(N);
    }
    for (int64_t i = 0; with_grad && i < C * T; ++i) {
      const double want = slope[static_cast<size_t>(i)];
      expect("slope", n * C * T + i, slopes[n * C * T + i], want,
             rounding(S) * std::abs(want) + 1e-9 * size[static_cast<size_t>(i)] + 1e-37);
    }
  }
  Buffer total(S, 1), levels(S, P);
  expect_success("finish_pairwise", prefix_cuda_kernels.finish_pairwise(
                                        {S, N, C, T, w.factors, logps.data(), false,
                                         user_levels.data(), total.data(), levels.data()},
                                        nullptr));
  if (N == 0) return;
  for (int64_t t = 0; t < P; ++t) {
    double mean = 0;
    for (int64_t n = 0; n < N; ++n) mean += user_levels[t * N + n] / double(N);
    whole += w.factors.beta * w.values[t] * mean;
    expect("level", t, levels[t], mean, rounding(S) * (1 + mean));
  }
  expect("total", 0, total[0], whole, rounding(S) * (1 + std::abs(whole)));
}

}  // namespace
}  // namespace genrec::prefix

int main(int argc, char** argv) {
  using namespace genrec::prefix;
  using namespace genrec::check;
  using genrec::DType;
  const int trials = argc > 1 ? std::atoi(argv[1]) : 10;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const DType types[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
  for (int i = 0; i < trials; ++i)
    for (const DType dtype : types) {
      Random random{seed * 1000003 + static_cast<uint64_t>(4 * i) + static_cast<uint64_t>(dtype),
                    -1};
      const std::string name = "trial " + std::to_string(i) + ": ";
      const auto check = [&](const char* what, void (*run)(Random&, DType)) {
        trial_text = name + what + " ";
        run(random, dtype);
        random.large = -1;
      };
      const auto rows = [](Random& r, DType type) { check_rows(r, type, false); };
      const auto ties = [](Random& r, DType type) { check_rows(r, type, true); };
      check("rows", rows);
      // A large shape in turn, so that few trials see all of them.
      random.large = (4 * i + static_cast<int>(dtype)) % kLargeShapes;
      check("rows", rows);
      random.large = (4 * i + 2 * static_cast<int>(dtype) + 1) % kLargeShapes;
      check("ties", ties);
      if (dtype == accumulator_of(dtype)) check("pairwise", check_pairwise);
    }
  std::printf("%d trials, %d failures\n", trials, failures);
  return failures == 0 ? 0 : 1;
}
