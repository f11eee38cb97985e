// Building the catalogue's trie from item codes.  Torch-free; used by _C.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace genrec::trie {

// Memory of a known size, left unwritten: the threads that fill it touch it first.
template <class T>
struct Array {
  std::unique_ptr<T[]> data;
  int64_t size = 0;

  Array() = default;
  explicit Array(int64_t n) : data(new T[static_cast<size_t>(n)]), size(n) {}
};

// n_l: the nodes of level l; level 0 is the root alone, level L the leaves.
struct Built {
  std::vector<Array<int32_t>> first_child;  // L of them, [n_l + 1]
  Array<int32_t> labels;                    // [n_1 + ... + n_L], a level after another
  Array<int32_t> items;                     // [N], sorted by path, ties by item
  // [N - n_L], ascending: the leaf of each item that is not its leaf's first.  So
  // leaf j's items begin at j + (how many of these are below j), and a catalogue
  // without collisions stores nothing; a start a leaf would take 4 bytes an item.
  Array<int32_t> repeats;
};

// codes: row-major [N, L], T int32_t or int64_t.  A label is code + offsets[l]; a
// code must lie below sizes[l], and it and its label below 2^31.  The result is
// the same for every number of threads (at least 1).
// Throws std::invalid_argument with the first item and level of a code outside,
// std::length_error past 2^31 - 1 items.
template <class T>
Built build(const T* codes, int64_t N, int64_t L, const int64_t* offsets, const int64_t* sizes,
            int64_t threads);

}  // namespace genrec::trie
