// Building the catalogue's trie from item codes.  Torch-free; used by _C.
#pragma once

#include <cstdint>
#include <vector>

namespace genrec::trie {

struct Level {
  std::vector<int32_t> first_child;  // [n + 1], n nodes of this level
  std::vector<int32_t> codes;        // [n'], ascending within a node's children
};

struct Built {
  std::vector<int64_t> order;       // [N], items sorted by path, ties by item
  std::vector<Level> levels;        // L of them
  std::vector<int64_t> first_item;  // [leaves + 1], into order
};

// codes: row-major [N, L], each in [0, 2^31).  Throws std::invalid_argument
// with the item and level of a code outside, std::length_error past 2^31 nodes.
Built build(const int64_t* codes, int64_t N, int64_t L);

}  // namespace genrec::trie
