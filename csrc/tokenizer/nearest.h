// How far a score in float32 may be trusted, for the CPU and the CUDA kernels.
//
// Nearest codewords are sought by the score |e|^2 / 2 - r.e in f32.  That form cancels,
// so a row's best counts only where the runner-up lies further behind than twice the
// form's rounding bound; else every codeword within it is compared in direct form, in
// double.
#pragma once

#include <cstdint>

#include "common/portable.h"

namespace genrec::tokenizer {

// How far the f32 score of any codeword can lie from the one that orders distances in
// double, at most.  With u = 2^-24, n = |r| and m the largest |e|:
//   f32: the half norm is rounded once, r once, and a sum of D products and the half
//     norm has an error of at most (D + 1) u (m^2 / 2 + n m) (1 + O(D u)) in any order,
//     with or without FMA: D + 3 in all;
//   double: a distance of at most (n + m)^2 has D + 2 roundings of 2^-53;
//   and D products may each lose what lies below the smallest normal number: 2^-149, or
//     2^-126 where the processor takes such numbers for 0 (torch.set_flush_denormal).
// An eighth more covers the O(D u) as long as D <= kMostDims, the rounding of what is
// compared, and of m.
GENREC_HD double score_bound(double norm, double largest, int64_t D) {
  const double terms = 1.125 * static_cast<double>(D + 4);
  const double all = norm + largest;
  return terms *
         (0x1p-24 * largest * (0.5 * largest + norm) + 0x1p-53 * all * all + 0x1p-125 * (1 + all));
}

inline constexpr int64_t kMostDims = 1 << 20;
// With a larger bound, something in f32 may have overflowed.
inline constexpr double kMostBound = 0x1p80;

}  // namespace genrec::tokenizer
