// From a sequence's log-probabilities to its loss and their slopes: the part of
// every objective that the CPU and the CUDA kernels share.
#pragma once

#include "common/search.h"
#include "policy/kernels.h"

namespace genrec::policy {

template <class S>
GENREC_HD S at_or(const void* p, int64_t i, S fallback) {
  return p == nullptr ? fallback : static_cast<const S*>(p)[i];
}

// A sequence's loss, already scaled, and what users watch of it.
template <class S>
struct SequenceResult {
  S loss;
  S stats[kStats];
};

template <class S>
GENREC_HD void keep_result(const SequenceArgs& a, int64_t n, const SequenceResult<S>& result) {
  static_cast<S*>(a.losses)[n] = result.loss;
  for (int i = 0; i < kStats; ++i) static_cast<S*>(a.stats)[n * kStats + i] = result.stats[i];
}

// The sequence part of every objective: from a sequence's log-probabilities
// (any callable of t) to its loss, its statistics and, through `slope`, the
// derivative of the scaled loss by each log-probability.
template <class S, class Logp, class Slope>
GENREC_HD SequenceResult<S> sequence_loss(const SequenceArgs& a, int64_t n, S mean_entropy,
                                          const Logp& logp, const Slope& slope) {
  const S* old = static_cast<const S*>(a.old_logps) + n * a.T;
  const S* ref = a.ref_logps ? static_cast<const S*>(a.ref_logps) + n * a.T : nullptr;
  const ObjectiveConfig& k = a.objective;
  const S advantage = static_cast<const S*>(a.advantages)[n];
  double sum_new = 0, sum_old = 0;
  int64_t count = 0;
  GENREC_ROLLED for (int64_t t = 0; t < a.T; ++t) {
    if (!counts(a.mask, n * a.T + t)) continue;
    sum_new += logp(t);
    sum_old += old[t];
    ++count;
  }
  const double length = count > 0 ? static_cast<double>(count) : 1;
  const S l = static_cast<S>(sum_new / length), o = static_cast<S>(sum_old / length);
  const bool by_token = k.objective == Objective::grpo;
  Term<S> whole{};
  if (!by_token)
    whole = sequence_term<S>(l, o, advantage, at_or<S>(a.entropy, n, S(1)),
                             at_or<S>(a.boost, n, S(1)), k);
  if (l == -INFINITY) whole.slope = 0;
  double value = by_token ? 0 : whole.value, kl = 0, coefficient = 0, capped = 0;
  GENREC_ROLLED for (int64_t t = 0; t < a.T; ++t) {
    if (!counts(a.mask, n * a.T + t)) {
      slope(t, S(0));
      continue;
    }
    S s = whole.slope;
    if (by_token) {
      const Term<S> token = clipped_term(importance_ratio<S>(logp(t), old[t]), advantage, k);
      s = logp(t) == -INFINITY ? S(0) : token.slope;
      value += token.value / length;
      coefficient += token.coefficient / length;
      capped += (token.coefficient < token.ratio) / length;
    }
    if (k.divergence != Divergence::none) {
      const Divergent<S> d = divergence<S>(k.divergence, ref[t], logp(t));
      kl += d.value / length;
      s += static_cast<S>(k.kl_weight) * d.slope;
    }
    slope(t, static_cast<S>(s * (a.scale / length)));
  }
  if (!by_token) {
    coefficient = whole.coefficient;
    capped = whole.coefficient < whole.ratio;
  }
  if (k.divergence != Divergence::none) value += k.kl_weight * kl;
  return {static_cast<S>(value * a.scale),
          {importance_ratio<S>(l, o), static_cast<S>(coefficient), static_cast<S>(capped),
           mean_entropy, exp(l), static_cast<S>(kl)}};
}

}  // namespace genrec::policy
