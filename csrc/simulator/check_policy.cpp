// The policy family's CUDA kernels on random cases, against their definition in
// float64 written below: `check_policy TRIALS [SEED]` exits with 0 where all agree
// and says what does not.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "policy/kernels.h"
#include "simulator/check_rows.h"

namespace genrec::policy {

extern const CudaKernels cuda_kernels;

namespace {

using namespace genrec::check;

void check_token_logps(Random& random, DType dtype) {
  const bool special = random.one_in(2);
  const Rows rows = make_rows(random, dtype, special);
  const int64_t R = rows.rows(), V = rows.in.V;
  const DType S = accumulator_of(dtype);
  const Buffer before = rows.logits;
  Buffer logps(S, R), entropy(S, R), norm(S, 2 * R), workspace(S, R * kWorkspace);
  expect_success("token_logps", cuda_kernels.token_logps({rows.in, logps.data(), entropy.data(),
                                                          norm.data(), workspace.data()},
                                                         nullptr));
  Buffer by_logps(S, R), by_entropy(S, R), grad(dtype, R * V);
  const bool still = random.one_in(8), with_entropy = random.one_in(2);
  for (int64_t r = 0; r < R; ++r) {
    by_logps.set(r, still || random.one_in(5) ? 0 : random.normal());
    by_entropy.set(r, still || !with_entropy || random.one_in(2) ? 0 : random.normal());
  }
  expect_success(
      "token_logps_backward",
      cuda_kernels.token_logps_backward({rows.in, norm.data(), entropy.data(), by_logps.data(),
                                         with_entropy ? by_entropy.data() : nullptr, grad.data()},
                                        nullptr));
  for (int64_t r = 0; r < R; ++r) {
    const Row row = define_row(rows, before, r);
    const double error = rounding(S) * (1 + (std::isfinite(row.logp) ? std::abs(row.logp) : 0));
    expect("logps", r, logps[r], row.logp, error);
    expect("entropy", r, entropy[r], row.entropy, 2 * rounding(S) * (1 + std::log(double(V))));
    expect_gradient(rows, r, grad, r * V,
                    define_gradient(rows, before, row, r, by_logps[r], by_entropy[r]), 4 * error,
                    std::abs(by_logps[r]) + std::abs(by_entropy[r]));
  }
  for (int64_t i = 0; i < before.size(); ++i)
    if (!before.same_bits(rows.logits, i)) return complain("token_logps changed the logits");
}

// ---- sequences ----

struct Sequences {
  SequenceArgs args;
  Buffer old, ref, advantages, entropy, boost, losses, stats;
};

// `logps`: of every token, so that old ones are near them; NaN where masked.
Sequences make_sequences(Random& random, DType S, const std::vector<double>& logps,
                         const bool* mask, int64_t N, int64_t T) {
  Sequences q;
  q.old = Buffer(S, N * T);
  q.ref = Buffer(S, N * T);
  q.advantages = Buffer(S, N);
  q.entropy = Buffer(S, N);
  q.boost = Buffer(S, N);
  q.losses = Buffer(S, N);
  q.stats = Buffer(S, N * kStats);
  for (int64_t n = 0; n < N; ++n) {
    const double stale = random.one_in(4) ? random.normal() : 0.1 * random.normal();
    q.advantages.set(n, random.one_in(6) ? 0 : random.normal());
    q.entropy.set(n, random.uniform());
    q.boost.set(n, random.uniform());
    for (int64_t t = 0; t < T; ++t) {
      const int64_t r = n * T + t;
      const bool counted = mask == nullptr || mask[r];
      const double logp = logps[static_cast<size_t>(r)], near = std::isfinite(logp) ? logp : -3;
      q.old.set(r, counted ? near + stale + 0.3 * random.normal() : kNan);
      q.ref.set(r, counted ? near + 0.3 * random.normal() : kNan);
    }
  }
  SequenceArgs& a = q.args;
  ObjectiveConfig& k = a.objective;
  k.objective = static_cast<Objective>(random.below(5));
  k.divergence = static_cast<Divergence>(random.below(4));
  k.bounded = !random.one_in(3);
  k.boost_multiplies = random.one_in(3);
  k.eps_pos = random.one_in(2) ? 0 : 0.2;
  k.eps_boost = random.one_in(2) ? 0.5 : 0.1;
  k.eps_neg = random.one_in(3) ? kInf : random.one_in(2) ? 0 : 0.3;
  k.entropy_penalty = random.one_in(3) ? 0 : 0.8;
  k.clip_low = random.one_in(2) ? 0.2 : 3e-4;
  k.clip_high = random.one_in(2) ? 0.3 : 4e-4;
  k.early_clip = random.one_in(2) ? 0.1 : 0;
  k.kl_weight = k.divergence == Divergence::none ? 0 : 0.3;
  a.N = N;
  a.T = T;
  a.mask = mask;
  a.old_logps = q.old.data();
  a.ref_logps = k.divergence == Divergence::none ? nullptr : q.ref.data();
  a.advantages = q.advantages.data();
  a.entropy = random.one_in(2) ? q.entropy.data() : nullptr;
  a.boost = random.one_in(2) ? q.boost.data() : nullptr;
  const double scales[] = {1, 0.25, 1.0 / 3};
  a.scale = scales[random.below(3)];
  a.losses = q.losses.data();
  a.stats = q.stats.data();
  char text[200];
  std::snprintf(text, sizeof text, " objective %d divergence %d bounded %d multiplies %d",
                static_cast<int>(k.objective), static_cast<int>(k.divergence), k.bounded,
                k.boost_multiplies);
  trial_text += text;
  return q;
}

double held_in(double x, double low, double high) { return x < low ? low : x > high ? high : x; }
double least(double a, double b) { return a > b ? b : a; }  // keeps a NaN in a

struct Clipped {
  double value, slope, coefficient;
};

Clipped clip(double ratio, double advantage, const ObjectiveConfig& k) {
  const double free = ratio * advantage;
  const double bound = held_in(ratio, 1 - k.clip_low, 1 + k.clip_high) * advantage;
  if (free > bound) return {-bound, 0, 0};
  return {-free, -free, ratio};
}

struct Sequence {
  double loss = 0, stats[kStats] = {};
  std::vector<double> slopes;
};

Sequence define_sequence(const Sequences& q, int64_t n, const std::vector<double>& logps,
                         const std::vector<double>& entropies) {
  const SequenceArgs& a = q.args;
  const ObjectiveConfig& k = a.objective;
  Sequence out;
  out.slopes.assign(static_cast<size_t>(a.T), 0.0);
  std::vector<int64_t> at;
  for (int64_t t = 0; t < a.T; ++t)
    if (a.mask == nullptr || a.mask[n * a.T + t]) at.push_back(t);
  const double length = at.empty() ? 1 : static_cast<double>(at.size());
  const double A = q.advantages[n];
  double l = 0, o = 0, h = 0;
  for (const int64_t t : at) {
    l += logps[static_cast<size_t>(n * a.T + t)] / length;
    o += q.old[n * a.T + t] / length;
    if (!entropies.empty()) h += entropies[static_cast<size_t>(n * a.T + t)] / length;
  }
  const double ratio = std::exp(held_in(l - o, -20, 20));
  const double entropy = a.entropy != nullptr ? q.entropy[n] : 1;
  const double boost = a.boost != nullptr ? q.boost[n] : 1;
  double value = 0, slope = 0, coefficient = 0, capped = 0, kl = 0;
  if (k.objective == Objective::sage || k.objective == Objective::gbpo) {
    const bool gbpo = k.objective == Objective::gbpo;
    const double x = least(l, -1e-7), odds = std::exp(l) / -std::expm1(x);
    if (A >= 0) {
      const double cap = gbpo ? 1 : 1 + k.eps_pos + k.eps_boost * boost;
      coefficient = !gbpo && k.boost_multiplies ? cap * least(ratio, 1) : least(ratio, cap);
    } else {
      const double push = gbpo ? 1 : 1 + k.entropy_penalty * (1 - entropy);
      coefficient = gbpo ? ratio : least(ratio, k.eps_neg + push);
      if (gbpo || k.bounded) coefficient = least(coefficient, push * odds);
    }
    value = slope = -A * coefficient;
    capped = coefficient < ratio;
  } else if (k.objective != Objective::grpo) {
    const double early =
        k.objective == Objective::ecpo ? least(ratio, 1 + k.clip_high + k.early_clip) : ratio;
    const Clipped c = clip(early, A, k);
    value = c.value;
    slope = c.slope;
    coefficient = c.coefficient;
    capped = coefficient < ratio;
  }
  if (l == -kInf) slope = 0;
  for (const int64_t t : at) {
    const int64_t r = n * a.T + t;
    const double logp = logps[static_cast<size_t>(r)];
    double s = slope;
    if (k.objective == Objective::grpo) {
      const double token = std::exp(held_in(logp - q.old[r], -20, 20));
      const Clipped c = clip(token, A, k);
      s = logp == -kInf ? 0 : c.slope;
      value += c.value / length;
      coefficient += c.coefficient / length;
      capped += (c.coefficient < token) / length;
    }
    if (k.divergence != Divergence::none) {
      const double raw = q.ref[r] - logp, d = held_in(raw, -20, 20), u = std::exp(d);
      const double middle = std::log1p(std::expm1(d) / 2);
      const bool outside = raw < -20 || raw > 20;
      double v = 0, by = 0;
      if (k.divergence == Divergence::reverse) v = std::expm1(d) - d, by = -std::expm1(d);
      if (k.divergence == Divergence::forward) v = u * d - std::expm1(d), by = -u * d;
      if (k.divergence == Divergence::js)
        v = (u * d - (1 + u) * middle) / 2, by = -u * (d - middle) / 2;
      kl += v / length;
      if (!outside) s += k.kl_weight * by;
    }
    out.slopes[static_cast<size_t>(t)] = s * a.scale / length;
  }
  out.loss = (value + k.kl_weight * kl) * a.scale;
  const double stats[kStats] = {ratio, coefficient, capped, h, std::exp(l), kl};
  std::copy(stats, stats + kStats, out.stats);
  return out;
}

// How far a sequence's numbers may be off: its ratio is the exponential of a mean
// of numbers of this size.
double sequence_error(DType S, const std::vector<double>& logps, int64_t n, int64_t T) {
  double largest = 0;
  for (int64_t t = 0; t < T; ++t) {
    const double x = logps[static_cast<size_t>(n * T + t)];
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  }
  return rounding(S) * (2 + largest);
}

void expect_sequence(const Sequences& q, int64_t n, const Sequence& want, double error,
                     bool with_entropy) {
  const double A = std::abs(q.advantages[n]);
  const double size = 1 + (std::isfinite(want.loss) ? std::abs(want.loss) : 0) +
                      A * (std::isfinite(want.stats[0]) ? want.stats[0] : 0);
  expect("losses", n, q.losses[n], want.loss, 4 * error * size);
  for (int i = 0; i < kStats; ++i)
    if (i != 3 || with_entropy)
      expect("stats", n * kStats + i, q.stats[n * kStats + i], want.stats[i],
             4 * error * (1 + std::abs(want.stats[i])));
}

// token_logps and the loss fold a row alike, whichever kernels they take: a policy's ratio to
// itself is 1, and its mean entropy that of its tokens, to the bit.
void check_bits(Random& random, const Rows& rows, const std::vector<double>& near) {
  const int64_t N = rows.in.N, T = rows.in.T, R = N * T;
  const DType S = accumulator_of(rows.in.dtype);
  Buffer logps(S, R), entropy(S, R), norm(S, 2 * R), workspace(S, R * kWorkspace);
  expect_success("token_logps", cuda_kernels.token_logps({rows.in, logps.data(), entropy.data(),
                                                          norm.data(), workspace.data()},
                                                         nullptr));
  Sequences q = make_sequences(random, S, near, rows.mask.get(), N, T);
  q.args.objective.objective = Objective::gspo;
  q.args.objective.divergence = Divergence::none;
  q.args.old_logps = logps.data();
  q.args.ref_logps = nullptr;
  SageLossArgs args{rows.in, q.args};
  args.workspace = workspace.data();
  expect_success("sage_loss", cuda_kernels.sage_loss(args, nullptr));
  for (int64_t n = 0; n < N; ++n) {
    double sum = 0;
    float short_sum = 0;
    int64_t count = 0;
    bool finite = true;
    for (int64_t t = 0; t < T; ++t) {
      const int64_t r = n * T + t;
      if (!rows.counts(r)) continue;
      finite = finite && std::isfinite(logps[r]) && std::isfinite(entropy[r]);
      sum += entropy[r];
      short_sum += static_cast<float>(entropy[r]);
      ++count;
    }
    if (!finite || count == 0) continue;
    const double mean =
        S == DType::f64 ? sum / static_cast<double>(count) : short_sum / static_cast<float>(count);
    expect("ratio to itself", n, q.stats[n * kStats], 1, 0);
    expect("mean entropy", n, q.stats[n * kStats + 3], mean, 0);
  }
}

void check_sage_loss(Random& random, DType dtype) {
  const bool special = random.one_in(3);
  Rows rows = make_rows(random, dtype, special);
  const int64_t N = rows.in.N, T = rows.in.T, V = rows.in.V, R = N * T;
  if (N == 0) return;
  const DType S = accumulator_of(dtype);
  const Buffer before = rows.logits;
  std::vector<double> logps, entropies;
  std::vector<Row> all;
  for (int64_t r = 0; r < R; ++r) {
    all.push_back(define_row(rows, before, r));
    logps.push_back(all.back().logp);
    entropies.push_back(all.back().entropy);
  }
  check_bits(random, rows, logps);
  const Sequences q = make_sequences(random, S, logps, rows.mask.get(), N, T);
  Buffer workspace(S, R * kWorkspace), made(dtype, R * V);
  SageLossArgs args{rows.in, q.args};
  args.workspace = workspace.data();
  // 0 no gradient, 1 in place, as half of the large ones are, else its own.
  const int how = random.large >= 0 && random.one_in(2) ? 1 : static_cast<int>(random.below(4));
  if (how == 1) {
    args.grad_logits = rows.logits.at(rows.offset);
    args.grad_stride_n = rows.in.stride_n;
    args.grad_stride_t = rows.in.stride_t;
    trial_text += " in place";
  } else if (how != 0) {
    args.grad_logits = made.data();
    args.grad_stride_n = T * V;
    args.grad_stride_t = V;
  }
  expect_success("sage_loss", cuda_kernels.sage_loss(args, nullptr));
  std::vector<bool> written(static_cast<size_t>(before.size()), false);
  for (int64_t n = 0; n < N; ++n) {
    const Sequence want = define_sequence(q, n, logps, entropies);
    const double error = sequence_error(S, logps, n, T);
    expect_sequence(q, n, want, error, true);
    for (int64_t t = 0; t < T && how != 0; ++t) {
      const int64_t r = n * T + t, start = how == 1 ? rows.start(r) : r * V;
      const double slope = want.slopes[static_cast<size_t>(t)];
      expect_gradient(rows, r, how == 1 ? rows.logits : made, start,
                      define_gradient(rows, before, all[static_cast<size_t>(r)], r, slope, 0),
                      4 * error, std::abs(slope) + 0.01);
      for (int64_t v = 0; v < V && how == 1; ++v) written[static_cast<size_t>(start + v)] = true;
    }
  }
  for (int64_t i = 0; i < before.size(); ++i)
    if (!written[static_cast<size_t>(i)] && !before.same_bits(rows.logits, i))
      return complain("sage_loss wrote beside its rows");
}

void check_from_logps(Random& random, DType S) {
  const int64_t N = 1 + random.below(150), T = random.below(6), R = N * T;
  Buffer given(S, R), grad(S, R);
  std::unique_ptr<bool[]> mask(random.one_in(2) ? nullptr : new bool[static_cast<size_t>(R)]);
  std::vector<double> logps;
  for (int64_t r = 0; r < R; ++r) {
    given.set(r, random.one_in(40) ? -kInf : -4 * random.uniform());
    logps.push_back(given[r]);
    if (mask) mask[static_cast<size_t>(r)] = !random.one_in(3);
  }
  const Sequences q = make_sequences(random, S, logps, mask.get(), N, T);
  expect_success("sage_loss_from_logps", cuda_kernels.sage_loss_from_logps(
                                             {S, q.args, given.data(), grad.data()}, nullptr));
  for (int64_t n = 0; n < N; ++n) {
    const Sequence want = define_sequence(q, n, logps, {});
    const double error = sequence_error(S, logps, n, T);
    expect_sequence(q, n, want, error, false);
    for (int64_t t = 0; t < T; ++t) {
      const double s = want.slopes[static_cast<size_t>(t)];
      expect("grad_logps", n * T + t, grad[n * T + t], s, 4 * error * (1 + std::abs(s)));
    }
  }
}

// ---- the rest ----

void check_scale(Random& random, DType dtype) {
  const DType S = accumulator_of(dtype);
  const int64_t N = 1 + random.below(5), inner = random.below(700);
  const bool shared = random.one_in(2);
  Buffer grad(dtype, N * inner), factor(S, shared ? 1 : N), out(dtype, N * inner);
  for (int64_t i = 0; i < grad.size(); ++i) grad.set(i, random.normal());
  for (int64_t n = 0; n < factor.size(); ++n) factor.set(n, random.normal());
  if (random.one_in(4)) factor.set(0, 1);  // which costs nothing in place
  ScaleArgs args;
  args.dtype = dtype;
  args.N = N, args.inner = inner;
  args.grad = grad.data(), args.out = out.data();
  args.factor = factor.data(), args.shared = shared;
  expect_success("scale", cuda_kernels.scale(args, nullptr));
  const Buffer before = grad;
  args.out = grad.data();
  expect_success("scale in place", cuda_kernels.scale(args, nullptr));
  for (int64_t i = 0; i < grad.size(); ++i)
    if (!grad.same_bits(out, i)) complain("scale in place differs");
  grad = Buffer(before);
  for (int64_t i = 0; i < grad.size(); ++i) {
    const double want = grad[i] * factor[shared ? 0 : i / inner];
    expect("scaled", i, out[i], want, std::abs(want) * epsilon(dtype) + 1e-7);
  }
}

void check_sum(Random& random, DType S) {
  const int64_t N = random.below(2) * random.below(2000) + random.below(4);
  Buffer values(S, N), total(S, 1);
  double want = 0, size = 0;
  for (int64_t n = 0; n < N; ++n) {
    values.set(n, random.normal());
    want += values[n];
    size += std::abs(values[n]);
  }
  expect_success("sum", cuda_kernels.sum({S, N, values.data(), total.data()}, nullptr));
  expect("total", 0, total[0], want, epsilon(S) * std::abs(want) + 1e-14 * size);
}

void check_advantages(Random& random, DType S) {
  AdvantagesArgs a;
  a.dtype = S;
  a.B = 1 + random.below(random.one_in(4) ? 300 : 6);
  a.G = 1 + random.below(6);
  a.M = 1 + random.below(4);
  a.unbiased = random.one_in(2);
  a.clamp = random.one_in(2) ? 0 : 1.5;
  const int64_t rows = a.B * a.G;
  Buffer rewards(S, rows * a.M), weights(S, a.M), out(S, rows);
  for (int64_t i = 0; i < rewards.size(); ++i)
    rewards.set(i, random.one_in(7) ? kNan : random.one_in(3) ? 1 : random.normal());
  for (int64_t m = 0; m < a.M; ++m) weights.set(m, 0.5 + random.uniform());
  a.rewards = rewards.data();
  a.weights = weights.data();
  a.advantages = out.data();
  expect_success("advantages", cuda_kernels.advantages(a, nullptr));
  const auto moments = [&](const std::vector<double>& x, double& mean, double& deviation) {
    mean = deviation = 0;
    for (const double v : x) mean += v / static_cast<double>(x.size());
    for (const double v : x) deviation += (v - mean) * (v - mean);
    const double n = static_cast<double>(x.size()) - (a.unbiased ? 1 : 0);
    deviation = n > 0 ? std::sqrt(deviation / n) : 0;
  };
  std::vector<double> mixed(static_cast<size_t>(rows), 0.0);
  double mean = 0, deviation = 0;
  for (int64_t b = 0; b < a.B; ++b)
    for (int64_t m = 0; m < a.M; ++m) {
      std::vector<double> group;
      for (int64_t g = 0; g < a.G; ++g) {
        const double x = rewards[(b * a.G + g) * a.M + m];
        if (x == x) group.push_back(x);
      }
      moments(group, mean, deviation);
      if (deviation < kNoSpread) continue;
      for (int64_t g = 0; g < a.G; ++g) {
        const double x = rewards[(b * a.G + g) * a.M + m];
        if (x == x)
          mixed[static_cast<size_t>(b * a.G + g)] +=
              weights[m] * (x - mean) / (deviation + kSpreadFloor);
      }
    }
  moments(mixed, mean, deviation);
  for (int64_t n = 0; n < rows; ++n) {
    bool applies = false;
    for (int64_t m = 0; m < a.M; ++m) applies = applies || !std::isnan(rewards[n * a.M + m]);
    double want = applies ? (mixed[static_cast<size_t>(n)] - mean) / (deviation + kSpreadFloor) : 0;
    if (a.clamp > 0) want = held_in(want, -a.clamp, a.clamp);
    // Where every row is the same the quotient is of two roundings, over the floor.
    const double error = S == DType::f64 ? 1e-10 : 1e-5 * (1 + 1 / (deviation + kSpreadFloor));
    expect("advantages", n, out[n], want, error * (1 + std::abs(want)));
  }
}

}  // namespace
}  // namespace genrec::policy

int main(int argc, char** argv) {
  using namespace genrec::policy;
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
      // A large shape in turn, so that few trials see all of them.
      const int64_t large = (4 * i + static_cast<int>(dtype)) % kLargeShapes;
      const auto check = [&](const char* what, void (*run)(Random&, DType), DType type) {
        trial_text = name + what + " ";
        run(random, type);
        random.large = -1;
      };
      check("token_logps", check_token_logps, dtype);
      check("sage_loss", check_sage_loss, dtype);
      random.large = large;
      check("sage_loss", check_sage_loss, dtype);
      random.large = i % 2 == 0 ? large : -1;
      check("token_logps", check_token_logps, dtype);
      check("scale", check_scale, dtype);
      if (dtype != accumulator_of(dtype)) continue;
      check("sage_loss_from_logps", check_from_logps, dtype);
      check("sum", check_sum, dtype);
      check("advantages", check_advantages, dtype);
    }
  std::printf("%d trials, %d failures\n", trials, failures);
  return failures == 0 ? 0 : 1;
}
