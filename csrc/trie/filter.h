// Which nodes a user may enter: what the CPU and the CUDA kernels share.
#pragma once

#include "common/search.h"
#include "trie/kernels.h"

namespace genrec::trie {

// One user's part of a Filter.
struct UserFilter {
  const bool* forbidden;  // [n'] or null
  const int32_t* closed;  // [closed_words] or null
  const int32_t* taken;   // [num_taken], ascending
  int64_t num_taken;
};

// No index is trusted: a row outside is none, a list outside is cut.
GENREC_HD UserFilter filter_of(const Filter& f, int64_t user) {
  UserFilter own{nullptr, nullptr, nullptr, 0};
  if (f.forbidden != nullptr) own.forbidden = f.forbidden + user * f.forbidden_stride;
  if (f.closed != nullptr) {
    const int64_t row = f.closed_row == nullptr ? 0 : f.closed_row[user];
    if (row >= 0 && row < f.closed_rows) own.closed = f.closed + row * f.closed_words;
  }
  if (f.taken != nullptr) {
    const int64_t begin = f.taken_begin[user], end = f.taken_begin[user + 1];
    if (begin >= 0 && begin < end && end <= f.num_taken)
      own.taken = f.taken + begin, own.num_taken = end - begin;
  }
  return own;
}

GENREC_HD bool may_enter(const UserFilter& f, int64_t node) {
  if (f.forbidden != nullptr && f.forbidden[node]) return false;
  if (f.closed != nullptr && (static_cast<uint32_t>(f.closed[node >> 5]) >> (node & 31) & 1u) != 0)
    return false;
  return f.num_taken == 0 || !lists(f.taken, f.num_taken, node);
}

}  // namespace genrec::trie
