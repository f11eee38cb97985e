// Decoupled advantages: the arithmetic that the CPU and the CUDA kernels share.
// Source: GDPO, arXiv 2601.05242; what NaN means is ours.
#pragma once

#include "policy/kernels.h"

namespace genrec::policy {

struct Spread {
  double mean, deviation;
};

// Mean and standard deviation of value(0) .. value(n - 1), NaN left out.  Two
// passes: one pass loses the digits that matter.
template <class Value>
GENREC_HD Spread spread(int64_t n, bool unbiased, const Value& value) {
  double sum = 0, squares = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = value(i);
    if (x == x) sum += x, ++count;
  }
  if (count == 0) return {0, 0};
  const double mean = sum / count;
  for (int64_t i = 0; i < n; ++i) {
    const double x = value(i);
    if (x == x) squares += (x - mean) * (x - mean);
  }
  const int64_t divisor = unbiased ? count - 1 : count;
  return {mean, divisor > 0 ? std::sqrt(squares / divisor) : 0};
}

// out[b, g] = sum_m weights[m] z[b, g, m] for one group b.
template <class S>
GENREC_HD void group_advantages(const AdvantagesArgs& a, int64_t b, const S* rewards,
                                const S* weights, S* out) {
  for (int64_t g = 0; g < a.G; ++g) out[b * a.G + g] = S(0);
  for (int64_t m = 0; m < a.M; ++m) {
    const S* column = rewards + b * a.G * a.M + m;
    const Spread group =
        spread(a.G, a.unbiased, [&](int64_t g) { return static_cast<double>(column[g * a.M]); });
    if (!(group.deviation >= kNoSpread)) continue;
    for (int64_t g = 0; g < a.G; ++g) {
      const S x = column[g * a.M];
      if (x == x)
        out[b * a.G + g] +=
            static_cast<S>(weights[m] * ((x - group.mean) / (group.deviation + kSpreadFloor)));
    }
  }
}

// The advantage of row n from its mixed z.  A row that no objective applies to
// gets exactly 0.
template <class S>
GENREC_HD S batch_advantage(const AdvantagesArgs& a, int64_t n, const S* rewards, S mixed,
                            const Spread& batch) {
  bool applies = false;
  for (int64_t m = 0; m < a.M; ++m)
    applies = applies || rewards[n * a.M + m] == rewards[n * a.M + m];
  if (!applies) return S(0);
  const S x = static_cast<S>((mixed - batch.mean) / (batch.deviation + kSpreadFloor));
  const S limit = static_cast<S>(a.clamp);
  return limit > S(0) ? clamp_keep_nan(x, -limit, limit) : x;
}

}  // namespace genrec::policy
