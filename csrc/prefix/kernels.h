// What prefix.cpp hands to the prefix kernels: plain pointers and numbers.
// Torch-free, and the same for the CPU and the CUDA library.
//
// Shapes: N users, T tokens each, P <= T prefix lengths, C candidates of a user,
// the first the positive.  `S` is float, or double where the logits are double.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/scores.h"

namespace genrec::prefix {

// What a token's log-probability weighs in its user's loss: its share of the
// cross-entropy, and that of every prefix it lies in.
struct TokenFactors {
  const void* weights = nullptr;  // S [P]
  int64_t P = 0;
  double per_token = 0;  // of the cross-entropy
  double beta = 0, prefix_temperature = 1;

  // Of prefix t + 1's mean log-loss, each of its tokens bears this share.
  template <class S>
  GENREC_HD double share(int64_t t) const {
    return beta * static_cast<const S*>(weights)[t] / ((t + 1) * prefix_temperature);
  }
  template <class S>
  GENREC_HD double of_token(int64_t t) const {
    double factor = per_token;
    for (int64_t u = t; u < P; ++u) factor += share<S>(u);
    return factor;
  }
};

// Scales every slope: what comes in from the loss's consumers, and the reduction.
struct Outer {
  const void* incoming = nullptr;  // S [N] or, where `shared`, S [1]; null: 1
  bool shared = true;
  double scale = 1;

  template <class S>
  GENREC_HD double of_user(int64_t n) const {
    return incoming == nullptr ? scale : scale * static_cast<const S*>(incoming)[shared ? 0 : n];
  }
};

// BEAR: a token counts more, the surer it is of a place among the row's best.
struct Beam {
  int64_t width = 0;              // k; 0: every token counts alike
  double weight = 0;              // lambda
  double scale = 1;               // xi
  const void* choices = nullptr;  // S [1], how many rows have more than one column

  // `bound`: the log-probability of the k-th best column, -inf where there are fewer.
  template <class S>
  GENREC_HD S of_token(S logp, S bound) const {
    if (logp == -INFINITY) return S(1);  // impossible: not ahead of anything
    const S ahead = static_cast<S>((logp - bound) / static_cast<S>(scale));
    return S(1) + static_cast<S>(weight) / (S(1) + exp(-ahead));
  }
};

// prefix_loss, masked_softmax_loss and beam_aware_loss: rows on their own.
struct RowsArgs {
  Scores in;
  TokenFactors factors;
  Beam beam;
  Outer outer;
  void* logps = nullptr;        // S [N, T], each times its weight by `beam`
  void* grad_logits = nullptr;  // like logits, contiguous; null: no gradient wanted
  bool grad_is_zero = false;    // CPU only: it needs no zeros outside the support
  bool grad_streamed = false;   // CPU only: it is written past the caches
};

// How many rows of `in` have more than one column.
struct ChoicesArgs {
  Scores in;
  void* count = nullptr;  // S [1]; at least 1
};

// From log-probabilities to the loss: sums in double, in the order of the users.
struct FinishArgs {
  DType dtype = DType::f32;  // f32 or f64
  int64_t N = 0, T = 0;
  TokenFactors factors;
  double scale = 1;
  const void* choices = nullptr;  // S [1] or null
  const void* logps = nullptr;    // S [N, T]
  void* losses = nullptr;         // S [N], or null
  void* total = nullptr;          // S [1], their sum, or null where each is wanted
  void* levels = nullptr;         // S [P], the mean loss of each prefix length
};

struct PairwiseArgs {
  Scores in;                 // N users of C * T rows; not of the form on log-probabilities
  DType dtype = DType::f32;  // of S: f32 or f64
  int64_t N = 0, C = 0, T = 0;
  TokenFactors factors;  // per_token: of the positive's cross-entropy
  Outer outer;
  const bool* duplicates = nullptr;  // [P, N, C]
  const void* log_scale = nullptr;   // S [P, N]
  void* logps = nullptr;             // S [N, C, T]; read where there are no logits
  bool wide_logps = false;           // they are doubles, whatever S is
  void* user_levels = nullptr;       // S [P, N], each user's L_t
  void* slopes = nullptr;            // S [N, C, T] or null: d loss / d logps
  void* grad_logits = nullptr;       // CPU: like logits, contiguous, or null
  bool grad_streamed = false;        // CPU: it is written past the caches
};

struct FinishPairwiseArgs {
  DType dtype = DType::f32;
  int64_t N = 0, C = 0, T = 0;
  TokenFactors factors;
  const void* logps = nullptr;        // S [N, C, T]
  bool wide_logps = false;            // they are doubles, whatever S is
  const void* user_levels = nullptr;  // S [P, N]
  void* total = nullptr;              // S [1]
  void* levels = nullptr;             // S [P]
};

// One instruction set's kernels.  Those with a range work on the users [first,
// last); the others on the whole.
struct CpuKernels {
  void (*rows)(const RowsArgs&, int64_t first, int64_t last);
  void (*choices)(const ChoicesArgs&);
  void (*finish)(const FinishArgs&);
  void (*pairwise)(const PairwiseArgs&, int64_t first, int64_t last);
  void (*pairwise_from_logps)(const PairwiseArgs&, int64_t first, int64_t last);
  void (*finish_pairwise)(const FinishPairwiseArgs&);
};

// The CUDA library's kernels: each launches on the stream and returns a
// cudaError_t.  The pairwise loss takes its log-probabilities from policy's
// token_logps, and its gradient from token_logps_backward.
struct CudaKernels {
  int (*rows)(const RowsArgs&, void* stream);
  int (*choices)(const ChoicesArgs&, void* stream);
  int (*finish)(const FinishArgs&, void* stream);
  int (*pairwise_from_logps)(const PairwiseArgs&, void* stream);
  int (*finish_pairwise)(const FinishPairwiseArgs&, void* stream);
};

}  // namespace genrec::prefix
