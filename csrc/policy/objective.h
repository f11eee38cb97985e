// The scalar mathematics of every policy objective, for host and device.
// Nothing here allocates, branches on a device or knows a tensor: both the CPU
// and the CUDA kernels call these functions once a sequence.
//
// Sources: SAGE arXiv 2601.21452, GBPO 2508.20900, ECPO 2506.13695,
// GSPO 2507.18071, GRPO 2402.03300.  The papers' symbols stand in the comments.
#pragma once

#include "common/portable.h"

namespace genrec::policy {

using std::exp;  // unqualified ::exp would compute floats in double
using std::expm1;
using std::log;
using std::log1p;

enum class Objective : int { sage, gbpo, gspo, grpo, ecpo };
enum class Divergence : int { none, reverse, forward, js };

struct ObjectiveConfig {
  Objective objective = Objective::sage;
  Divergence divergence = Divergence::none;
  bool bounded = true;            // SAGE: the GBPO bound 1 - p under negatives
  bool boost_multiplies = false;  // SAGE: c = B+ * min(r, 1) instead of min(r, B+)
  double eps_pos = 0, eps_boost = 0.5, eps_neg = 0, entropy_penalty = 1;
  double clip_low = 0.2, clip_high = 0.2;  // GSPO, GRPO, ECPO
  double early_clip = 0.1;                 // ECPO's delta
  double kl_weight = 0;
};

// |log ratio| beyond this is clamped, and so is the divergence's exponent.
inline constexpr double kLogRatioLimit = 20;

template <class S>
GENREC_HD S clamp_keep_nan(S x, S low, S high) {
  return x < low ? low : (x > high ? high : x);
}
// min and max that hand a NaN on, unlike fmin and fmax: no bound is lost in silence.
template <class S>
GENREC_HD S smaller(S a, S b) {
  return a > b || b != b ? b : a;
}
template <class S>
GENREC_HD S larger(S a, S b) {
  return a < b || b != b ? b : a;
}

// log(1 - e^x) for x <= -1e-7, by the form that keeps its digits.
template <class S>
GENREC_HD S log1mexp(S x) {
  x = smaller(x, S(-1e-7));
  return x > S(-0.6931471805599453) ? log(-expm1(x)) : log1p(-exp(x));
}

// Every slope below is with the exponent's clamp left out of the derivative: a
// sequence far from its old policy keeps its push.  Kernels set the slope to 0
// where l itself is -inf: an impossible token teaches nothing.
template <class S>
struct Term {
  S value;        // contribution to the loss, before the reduction
  S slope;        // d value / d l, l the mean log-probability (or a token's, for GRPO)
  S ratio;        // r
  S coefficient;  // c, the effective gradient coefficient: r where nothing is capped
};

// r = exp(l - o), the geometric-mean importance ratio of a sequence.
template <class S>
GENREC_HD S importance_ratio(S l, S o) {
  return exp(clamp_keep_nan(l - o, S(-kLogRatioLimit), S(kLogRatioLimit)));
}

// SAGE [coefficients of paper and ours: see genrec_ext.ops.policy], with GBPO
// as its special case eps_pos = eps_boost = entropy_penalty = 0, eps_neg = inf.
template <class S>
GENREC_HD Term<S> sage_term(S l, S o, S advantage, S entropy, S boost, const ObjectiveConfig& k) {
  const bool gbpo = k.objective == Objective::gbpo;
  const S ratio = importance_ratio(l, o);
  S c;
  if (advantage >= S(0)) {
    const S cap = gbpo ? S(1) : S(1) + S(k.eps_pos) + S(k.eps_boost) * boost;  // B+
    c = !gbpo && k.boost_multiplies ? cap * smaller(ratio, S(1)) : smaller(ratio, cap);
  } else {
    const S extra = gbpo ? S(0) : S(k.entropy_penalty) * (S(1) - entropy);
    c = gbpo ? ratio : smaller(ratio, S(1) + S(k.eps_neg) + extra);  // B-
    // k p / (1 - p), written so that p near 0 and near 1 both keep their digits.
    if (gbpo || k.bounded) c = smaller(c, (S(1) + extra) * exp(l - log1mexp(l)));
  }
  // The denominator of c is constant under the gradient: dc/dl = c.
  return {-advantage * c, -advantage * c, ratio, c};
}

// min(r A, clip(r, 1 - low, 1 + high) A): PPO's form, for a sequence (GSPO) or
// for a token (GRPO).
template <class S>
GENREC_HD Term<S> clipped_term(S ratio, S advantage, const ObjectiveConfig& k) {
  const S free = ratio * advantage;
  const S held = clamp_keep_nan(ratio, S(1) - S(k.clip_low), S(1) + S(k.clip_high)) * advantage;
  const bool capped = free > held;
  return {capped ? -held : -free, capped ? S(0) : -free, ratio, capped ? S(0) : ratio};
}

// ECPO: before the clip, old is raised to at least pi / (1 + eps + delta), so a
// negative's ratio never exceeds 1 + eps + delta; the raise is constant.
template <class S>
GENREC_HD Term<S> ecpo_term(S l, S o, S advantage, const ObjectiveConfig& k) {
  const S ratio = importance_ratio(l, o);
  const S early = smaller(ratio, S(1) + S(k.clip_high) + S(k.early_clip));
  Term<S> t = clipped_term(early, advantage, k);
  t.ratio = ratio;
  return t;
}

// The whole-sequence objectives.  GRPO is per token and goes by clipped_term.
template <class S>
GENREC_HD Term<S> sequence_term(S l, S o, S advantage, S entropy, S boost,
                                const ObjectiveConfig& k) {
  switch (k.objective) {
    case Objective::gspo: return clipped_term(importance_ratio(l, o), advantage, k);
    case Objective::ecpo: return ecpo_term(l, o, advantage, k);
    default: return sage_term(l, o, advantage, entropy, boost, k);
  }
}

template <class S>
struct Divergent {
  S value;
  S slope;  // d value / d logp
};

// A token's f-divergence from the reference policy with u = pi_ref / pi:
//   reverse  u - 1 - log u              (k3; E_pi gives KL(pi | ref))
//   forward  u log u - u + 1            (E_pi gives KL(ref | pi), mass covering)
//   js       (u log u - (1 + u) log((1 + u) / 2)) / 2
// All are >= 0 and vanish with their slope at u = 1.  Outside the clamp the
// value is held and the slope is 0.
template <class S>
GENREC_HD Divergent<S> divergence(Divergence which, S reference, S logp) {
  const S raw = reference - logp;
  const S d = clamp_keep_nan(raw, S(-kLogRatioLimit), S(kLogRatioLimit));
  const S u = exp(d);
  const bool held = raw != d && raw == raw;
  switch (which) {
    case Divergence::reverse: return {expm1(d) - d, held ? S(0) : -expm1(d)};
    case Divergence::forward: return {u * d - expm1(d), held ? S(0) : -u * d};
    case Divergence::js: {
      const S mid = log1p(expm1(d) / S(2));  // log((1 + u) / 2)
      return {(u * d - (S(1) + u) * mid) / S(2), held ? S(0) : -u * (d - mid) / S(2)};
    }
    default: return {S(0), S(0)};
  }
}

}  // namespace genrec::policy
