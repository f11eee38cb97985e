#include "trie/build.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace genrec::trie {

namespace {

constexpr int kDigitBits = 12;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;

// Stable counting sort of `order` by one digit of one level's code.
void sort_by_digit(const int64_t* codes, int64_t L, int64_t level, int shift,
                   std::vector<int64_t>& order, std::vector<int64_t>& spare) {
  std::vector<int64_t> at(kDigits + 1, 0);
  const auto digit = [&](int64_t item) {
    return (codes[item * L + level] >> shift) & (kDigits - 1);
  };
  for (int64_t item : order) ++at[digit(item) + 1];
  std::partial_sum(at.begin(), at.end(), at.begin());
  for (int64_t item : order) spare[at[digit(item)]++] = item;
  order.swap(spare);
}

}  // namespace

Built build(const int64_t* codes, int64_t N, int64_t L) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  std::vector<int64_t> largest(L, 0);
  for (int64_t i = 0; i < N; ++i)
    for (int64_t l = 0; l < L; ++l) {
      const int64_t code = codes[i * L + l];
      if (code < 0 || code >= kLimit)
        throw std::invalid_argument("codes[" + std::to_string(i) + ", " + std::to_string(l) +
                                    "] must lie in [0, 2^31 - 1), got " + std::to_string(code));
      largest[l] = std::max(largest[l], code);
    }
  if (N > kLimit)
    throw std::length_error("a trie holds at most 2^31 - 1 items, got " + std::to_string(N));

  Built out;
  out.order.resize(N);
  std::iota(out.order.begin(), out.order.end(), int64_t{0});
  std::vector<int64_t> spare(N);
  // Least significant digit first; stable passes leave ties in item order.
  for (int64_t level = L - 1; level >= 0; --level)
    for (int shift = 0; largest[level] >> shift > 0; shift += kDigitBits)
      sort_by_digit(codes, L, level, shift, out.order, spare);

  // change[i]: the first level at which sorted item i leaves its predecessor's path.
  std::vector<int64_t> change(N, 0);
  for (int64_t i = 1; i < N; ++i) {
    const int64_t *here = codes + out.order[i] * L, *last = codes + out.order[i - 1] * L;
    int64_t l = 0;
    while (l < L && here[l] == last[l]) ++l;
    change[i] = l;  // L: the same path, a collision
  }
  out.levels.resize(L);
  for (int64_t l = 0; l < L; ++l) {
    Level& level = out.levels[l];
    // A node of level l starts where the path changes above l, a child where it
    // changes at l or above.
    for (int64_t i = 0; i < N; ++i) {
      const bool starts_node = l == 0 ? i == 0 : i == 0 || change[i] < l;
      const bool starts_child = i == 0 || change[i] <= l;
      if (starts_node) level.first_child.push_back(static_cast<int32_t>(level.codes.size()));
      if (starts_child) level.codes.push_back(static_cast<int32_t>(codes[out.order[i] * L + l]));
    }
    if (l == 0 && N == 0) level.first_child.push_back(0);  // the root always exists
    level.first_child.push_back(static_cast<int32_t>(level.codes.size()));
  }
  for (int64_t i = 0; i < N; ++i)
    if (i == 0 || change[i] < L) out.first_item.push_back(i);
  out.first_item.push_back(N);
  return out;
}

}  // namespace genrec::trie
