// One candidate's part in the pairwise loss, for the CPU and the CUDA kernels.
//
// With s_t[i] the log-probability of candidate i's first t tokens over the prefix
// temperature, and r_t how many prefixes each negative stands for,
//   L_t = (1 / t) (logsumexp(s_t[0], s_t[i] + log r_t) - s_t[0])
// over the negatives i that are no duplicates.
#pragma once

#include <cmath>

#include "prefix/kernels.h"

namespace genrec::prefix {

// An entry of the log-probabilities of pairwise arguments.
template <class S, class Args>
GENREC_HD double logp_at(const Args& a, int64_t i) {
  return a.wide_logps ? static_cast<const double*>(a.logps)[i]
                      : double(static_cast<const S*>(a.logps)[i]);
}

// How far candidate i's token u is ahead of the positive's.
template <class S>
GENREC_HD double token_ahead(const PairwiseArgs& a, int64_t n, int64_t i, int64_t u) {
  const int64_t positive = n * a.C * a.T + u;
  return logp_at<S>(a, positive + i * a.T) - logp_at<S>(a, positive);
}

// From the sum of that over a prefix of t + 1 tokens, how far the prefix is; -inf where it
// does not count.  The difference is taken before the temperature divides: its digits
// are those that matter.
template <class S>
GENREC_HD double prefix_ahead(const PairwiseArgs& a, int64_t n, int64_t i, int64_t t, double sum) {
  if (a.duplicates[(t * a.N + n) * a.C + i]) return -INFINITY;
  return sum / a.factors.prefix_temperature +
         static_cast<double>(static_cast<const S*>(a.log_scale)[t * a.N + n]);
}

template <class S>
GENREC_HD double ahead_of_positive(const PairwiseArgs& a, int64_t n, int64_t i, int64_t t) {
  double sum = 0;
  for (int64_t u = 0; u <= t; ++u) sum += token_ahead<S>(a, n, i, u);
  return prefix_ahead<S>(a, n, i, t, sum);
}

// exp(x - top); 0 for x = -inf under any top.
GENREC_HD double relative_power(double x, double top) { return x == -INFINITY ? 0 : exp(x - top); }

// What a prefix's probability among the candidates weighs in the slope of its
// tokens' log-probabilities.
template <class S>
GENREC_HD double prefix_slope(const PairwiseArgs& a, int64_t n, int64_t t) {
  return a.factors.share<S>(t) * a.outer.of_user<S>(n) / a.N;
}

// Candidate i's slopes by prefix become slopes by token: those of every prefix that
// a token lies in, and the positive's cross-entropy.
template <class S>
GENREC_HD void slopes_by_token(const PairwiseArgs& a, int64_t n, int64_t i, S* slopes) {
  const double cross_entropy = i == 0 ? -a.factors.per_token * a.outer.of_user<S>(n) / a.N : 0;
  double sum = cross_entropy;
  for (int64_t t = a.T; t-- > 0;) {
    if (t < a.factors.P) sum += double(slopes[t]);
    slopes[t] = static_cast<S>(sum);
  }
}

}  // namespace genrec::prefix
