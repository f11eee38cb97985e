// Changing a built trie: which items are open, items that are added, and what is
// closed to one user.  Torch-free; used by _C.
//
// Closed bits: a row for the nodes of each level below the root and one for the
// items, L + 1 rows in all.  Row l < L has a bit for each node of level l + 1, row
// L one for each item by its place in View::items; bit n is bit n % 32 of word
// n / 32.  A node's bit is set if and only if the bits of all its children (a
// leaf's: of all its items) are, so whoever enters only open nodes arrives at an
// open item.  Counts of open items would say the same in 32 times the memory, and
// would have to be changed up to the root by every edit; bits change only where a
// node loses its last open child or gains its first.
//
// Functions that write bits write to memory of the caller's, which no reader may
// hold yet: a version that is published is never written again.
#pragma once

#include <cstdint>
#include <vector>

#include "trie/build.h"

namespace genrec::trie {

// A trie's arrays as build.h defines them, borrowed and trusted.
struct View {
  std::vector<const int32_t*> first_child;  // L of them, [n_l + 1]
  std::vector<int64_t> nodes;               // [L + 1]: n_l
  const int32_t* labels = nullptr;          // [n_1 + ... + n_L]
  const int32_t* items = nullptr;           // [N]
  const int32_t* repeats = nullptr;         // [N - n_L]
  int64_t N = 0;

  int64_t levels() const { return static_cast<int64_t>(first_child.size()); }
  int64_t leaves() const { return nodes.back(); }
  // How many bits row l has.
  int64_t bits(int64_t l) const { return l < levels() ? nodes[l + 1] : N; }
};

inline int64_t words(int64_t bits) { return (bits + 31) / 32; }

// The inverse of items: [N], where each item stands in it.
Array<int32_t> place_items(const int32_t* items, int64_t N, int64_t threads);

// Writes all rows from scratch: an item is closed unless allowed [N, by item] and
// not in `also` [words(N), by place], which may be null.  Returns how many are.
// One pass over the items, whatever the number of threads.
int64_t close_items(const View& trie, const bool* allowed, const uint32_t* also,
                    const std::vector<uint32_t*>& bits, int64_t threads);

// Closes or opens the items at places [K], in any order, and whatever nodes that
// closes or opens.  Returns how many items were not so before.  Time in the order
// of K log K and the children of the nodes concerned.
// Throws std::out_of_range, before anything is written, at a place outside.
int64_t set_places(const View& trie, const int64_t* places, int64_t K, bool closed,
                   const std::vector<uint32_t*>& bits);

// What is closed to each user beyond the bits, by the rows above.
struct Taken {
  // [L + 1]: each user's nodes (in the last row, places) in ascending order, a user
  // after another; begin [U + 1] says where each user's start.
  std::vector<std::vector<int32_t>> nodes;
  std::vector<std::vector<int64_t>> begin;
};

// The items that U users have seen: seen [U, S] by item, -1 for none, in any order
// and with repeats.  A node is taken if all that is below it is closed or seen, and
// not closed already; so the children of a node that is neither are never all
// closed or taken.  bits [L + 1] are rows as above, M after another with
// words(bits(l)) words each; row_of [U] says which is a user's, -1 for none.
// Either may be null: no bits, or row 0 for all.  Time in the order of the lists,
// not of the catalogue.
// Throws std::out_of_range with the first entry of seen or row_of outside.
Taken take_items(const View& trie, const int32_t* place_of, const int64_t* seen, int64_t U,
                 int64_t S, const std::vector<const uint32_t*>* bits, int64_t M,
                 const int64_t* row_of, int64_t threads);

struct Merged {
  Built trie;
  std::vector<Array<uint32_t>> bits;  // [L + 1], where the base had some
};

// The trie of both catalogues, as build() would make it of one after the other: the
// items of `more` are numbered from base.N.  Copies the base and writes nothing
// else per item of it; `bits` (may be null) are the base's closed bits, and the
// items of `more` are open.
// Throws std::length_error past 2^31 - 1 items.
Merged merge(const View& base, const View& more, const std::vector<const uint32_t*>* bits,
             int64_t threads);

}  // namespace genrec::trie
