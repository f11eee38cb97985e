// Searches in ascending lists, for the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

#include "common/portable.h"

namespace genrec {

// Where an ascending list of n entries holds its first that is not before
// `wanted`; n where all are.
GENREC_HD int64_t first_not_before(const int32_t* list, int64_t n, int64_t wanted) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (list[middle] < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Whether an ascending list of n entries holds this one.
GENREC_HD bool lists(const int32_t* list, int64_t n, int64_t wanted) {
  const int64_t at = first_not_before(list, n, wanted);
  return at < n && list[at] == wanted;
}

}  // namespace genrec
