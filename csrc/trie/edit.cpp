#include "trie/edit.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/pages.h"
#include "trie/parallel.h"

namespace genrec::trie {

namespace {

constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();

bool test(const uint32_t* bits, int64_t n) { return bits[n / 32] >> (n % 32) & 1; }

void flip(uint32_t* bits, int64_t n) { bits[n / 32] ^= uint32_t{1} << (n % 32); }

// Bits [begin, begin + count) in the low bits of a word; 1 <= count <= 32.
uint32_t some_bits(const uint32_t* bits, int64_t begin, int64_t count) {
  const int64_t word = begin / 32, shift = begin % 32;
  uint32_t value = bits[word] >> shift;
  if (shift + count > 32) value |= bits[word + 1] << (32 - shift);
  return count == 32 ? value : value & ((uint32_t{1} << count) - 1);
}

// How many of bits [begin, end) are clear; stops counting past `enough`.
int64_t clear_bits(const uint32_t* bits, int64_t begin, int64_t end, int64_t enough) {
  int64_t clear = 0;
  while (begin < end && clear <= enough) {
    const int64_t count = std::min<int64_t>(32, end - begin);
    clear += count - std::popcount(some_bits(bits, begin, count));
    begin += count;
  }
  return clear;
}

bool all_set(const uint32_t* bits, int64_t begin, int64_t end) {
  return clear_bits(bits, begin, end, 0) == 0;
}

// Sets in `to`, from bit `at` on, what is set in bits [begin, end) of `from`.
void or_bits(uint32_t* to, int64_t at, const uint32_t* from, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t count = std::min<int64_t>(32 - at % 32, end - begin);
    to[at / 32] |= some_bits(from, begin, count) << (at % 32);
    at += count;
    begin += count;
  }
}

// Where the items of a leaf begin; for the number of leaves, where all end.
int64_t items_begin(const View& trie, int64_t leaf) {
  const int32_t* end = trie.repeats + (trie.N - trie.leaves());
  return leaf + (std::lower_bound(trie.repeats, end, leaf) - trie.repeats);
}

// The least i >= from with holds(i), which must hold from some i on, at `end` at
// the latest.  Fast where the answer is near.
template <class F>
int64_t first_from(int64_t from, int64_t end, const F& holds) {
  int64_t low = from, step = 1;
  while (low + step < end && !holds(low + step - 1)) low += step, step *= 2;
  int64_t high = std::min(end, low + step);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (holds(middle))
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Memory that is written at once, on huge pages where it is much: the faults of
// small ones take as long as what is written.
template <class T>
Array<T> roomy(int64_t n) {
  Array<T> result(n);
  advise_huge_pages(result.data.get(), n * static_cast<int64_t>(sizeof(T)));
  return result;
}

// A node and its children in the row below.
struct Family {
  int64_t node, begin, end;
};

// Climbs from the nodes of row l (items, for l = L) to their parents, which are in
// row l - 1 and at level l.  Queries must ascend.
class Climber {
 public:
  Climber(const View& trie, int64_t l)
      : trie_(trie), l_(l), slope_(static_cast<double>(trie.nodes[l]) / trie.bits(l)) {}

  Family above(int64_t child) { return l_ < trie_.levels() ? above_node(child) : leaf_of(child); }

 private:
  Family above_node(int64_t child) {
    // Parents are spread almost evenly, so their order in memory gives a guess, and
    // what it is off by a better one: a search from there stays on a page or two,
    // where a binary search visits a dozen.
    const int32_t* first = trie_.first_child[l_];
    const int64_t n = trie_.nodes[l_];
    const auto beyond = [&](int64_t i) { return first[i + 1] > child; };
    int64_t guess = static_cast<int64_t>(slope_ * child);
    for (int round = 0; round < 2; ++round) {
      guess = std::clamp<int64_t>(guess, 0, n - 1);
      guess += static_cast<int64_t>(slope_ * (child - first[guess]));
    }
    guess = std::clamp<int64_t>(guess, 0, n - 1);
    for (int64_t step = 1; guess > 0 && first[guess] > child; step *= 2)
      guess = std::max<int64_t>(0, guess - step);
    const int64_t node = first_from(guess, n - 1, beyond);
    return {node, first[node], first[node + 1]};
  }

  Family leaf_of(int64_t child) {
    const int32_t* repeats = trie_.repeats;
    const int64_t count = trie_.N - trie_.leaves();
    // Of the items up to this place, those that are not their leaf's first.
    last_ = first_from(last_, count, [&](int64_t i) { return repeats[i] + i + 1 > child; });
    const int64_t leaf = child - last_;
    int64_t begin = last_;
    if (begin > 0 && repeats[begin - 1] == leaf)
      begin = std::lower_bound(repeats, repeats + last_, leaf) - repeats;
    const int64_t end = first_from(last_, count, [&](int64_t i) { return repeats[i] > leaf; });
    return {leaf, leaf + begin, leaf + 1 + end};
  }

  const View& trie_;
  const int64_t l_;
  const double slope_;  // parents a child
  int64_t last_ = 0;
};

}  // namespace

Array<int32_t> place_items(const int32_t* items, int64_t N, int64_t threads) {
  Array<int32_t> place_of = roomy<int32_t>(N);
  in_parallel(threads, [&](int64_t part) {
    const int64_t end = share(N, part + 1, threads);
    for (int64_t p = share(N, part, threads); p < end; ++p)
      place_of.data[items[p]] = static_cast<int32_t>(p);
  });
  return place_of;
}

namespace {

// The bits of the leaves in words [first, last), from those of the items.
void close_leaves(const View& trie, const uint32_t* items, uint32_t* leaves, int64_t first,
                  int64_t last) {
  const int64_t n = trie.leaves(), count = trie.N - n;
  int64_t repeat = first < last ? items_begin(trie, 32 * first) - 32 * first : 0;
  for (int64_t w = first; w < last; ++w) {
    const int64_t stop = std::min(32 * w + 32, n);
    if (repeat == count || trie.repeats[repeat] >= stop) {  // an item a leaf, as nearly everywhere
      leaves[w] = some_bits(items, 32 * w + repeat, stop - 32 * w);
      continue;
    }
    uint32_t value = 0;
    for (int64_t leaf = 32 * w; leaf < stop; ++leaf) {
      const int64_t begin = leaf + repeat;
      while (repeat < count && trie.repeats[repeat] == leaf) ++repeat;
      value |= uint32_t{all_set(items, begin, leaf + 1 + repeat)} << (leaf % 32);
    }
    leaves[w] = value;
  }
}

}  // namespace

int64_t close_items(const View& trie, const bool* allowed, const uint32_t* also,
                    const std::vector<uint32_t*>& bits, int64_t threads) {
  // By item first: the bits of 10 M items stay in a second-level cache, where the
  // gather by place then finds them.
  Array<uint32_t> open(words(trie.N));
  const auto each_word = [threads](int64_t n, const auto& f) {
    in_parallel(threads, [&](int64_t part) {
      const int64_t end = share(words(n), part + 1, threads);
      for (int64_t w = share(words(n), part, threads); w < end; ++w) f(w);
    });
  };
  each_word(trie.N, [&](int64_t w) {
    const int64_t begin = 32 * w, count = std::min<int64_t>(32, trie.N - begin);
    uint32_t value = 0;
    for (int64_t i = 0; i < count; ++i) value |= uint32_t{allowed[begin + i]} << i;
    open.data[w] = value;
  });
  const int64_t L = trie.levels();
  std::atomic<int64_t> closed = 0;
  in_parallel(threads, [&](int64_t part) {
    int64_t mine = 0;
    const int64_t end = share(words(trie.N), part + 1, threads);
    for (int64_t w = share(words(trie.N), part, threads); w < end; ++w) {
      const int64_t begin = 32 * w, count = std::min<int64_t>(32, trie.N - begin);
      uint32_t value = also == nullptr ? 0 : also[w];
      for (int64_t i = 0; i < count; ++i)
        value |= uint32_t{!test(open.data.get(), trie.items[begin + i])} << i;
      bits[L][w] = value;
      mine += std::popcount(value);
    }
    closed += mine;
  });
  for (int64_t l = L; l >= 1; --l) {
    const uint32_t* below = bits[l];
    in_parallel(threads, [&](int64_t part) {
      const int64_t n = trie.nodes[l];
      const int64_t first = share(words(n), part, threads),
                    last = share(words(n), part + 1, threads);
      if (l == L)
        close_leaves(trie, below, bits[l - 1], first, last);
      else
        for (int64_t w = first; w < last; ++w) {
          uint32_t value = 0;
          int64_t begin = trie.first_child[l][32 * w];
          for (int64_t node = 32 * w; node < std::min(32 * w + 32, n); ++node) {
            const int64_t end = trie.first_child[l][node + 1];
            const bool closed = end - begin == 1 ? test(below, begin) : all_set(below, begin, end);
            value |= uint32_t{closed} << (node % 32);
            begin = end;
          }
          bits[l - 1][w] = value;
        }
    });
  }
  return closed;
}

int64_t set_places(const View& trie, const int64_t* places, int64_t K, bool closed,
                   const std::vector<uint32_t*>& bits) {
  for (int64_t k = 0; k < K; ++k)
    if (places[k] < 0 || places[k] >= trie.N)
      throw std::out_of_range("places[" + std::to_string(k) + "] must lie in [0, " +
                              std::to_string(trie.N) + "), got " + std::to_string(places[k]));
  const int64_t L = trie.levels();
  std::vector<int64_t> changed;
  for (int64_t k = 0; k < K; ++k)
    if (test(bits[L], places[k]) != closed) {
      flip(bits[L], places[k]);
      changed.push_back(places[k]);
    }
  std::sort(changed.begin(), changed.end());
  const int64_t count = static_cast<int64_t>(changed.size());
  for (int64_t l = L; l >= 1 && !changed.empty(); --l) {
    Climber climber(trie, l);
    int64_t kept = 0, last = -1;
    for (int64_t child : changed) {
      const auto [node, begin, end] = climber.above(child);
      if (node == last) continue;
      last = node;
      if (all_set(bits[l], begin, end) == test(bits[l - 1], node)) continue;
      flip(bits[l - 1], node);
      changed[kept++] = node;
    }
    changed.resize(kept);
  }
  return count;
}

Taken take_items(const View& trie, const int32_t* place_of, const int64_t* seen, int64_t U,
                 int64_t S, const std::vector<const uint32_t*>* bits, int64_t M,
                 const int64_t* row_of, int64_t threads) {
  for (int64_t i = 0; i < U * S; ++i)
    if (seen[i] < -1 || seen[i] >= trie.N)
      throw std::out_of_range("seen[" + std::to_string(i / S) + ", " + std::to_string(i % S) +
                              "] must lie in [-1, " + std::to_string(trie.N) + "), got " +
                              std::to_string(seen[i]));
  for (int64_t u = 0; row_of != nullptr && u < U; ++u)
    if (row_of[u] < -1 || row_of[u] >= M)
      throw std::out_of_range("row[" + std::to_string(u) + "] must lie in [-1, " +
                              std::to_string(M) + "), got " + std::to_string(row_of[u]));
  const int64_t L = trie.levels();
  std::vector<Taken> parts(threads);
  in_parallel(threads, [&](int64_t part) {
    Taken& mine = parts[part];
    mine.nodes.resize(L + 1);
    mine.begin.resize(L + 1);
    std::vector<int64_t> now, above;
    for (int64_t u = share(U, part, threads); u < share(U, part + 1, threads); ++u) {
      const int64_t row = bits == nullptr ? -1 : row_of == nullptr ? 0 : row_of[u];
      const auto row_bits = [&](int64_t l) {
        return row < 0 ? nullptr : (*bits)[l] + row * words(trie.bits(l));
      };
      now.clear();
      const uint32_t* closed = row_bits(L);
      for (int64_t s = 0; s < S; ++s) {
        if (seen[u * S + s] < 0) continue;
        const int64_t place = place_of[seen[u * S + s]];
        if (closed == nullptr || !test(closed, place)) now.push_back(place);
      }
      std::sort(now.begin(), now.end());
      now.erase(std::unique(now.begin(), now.end()), now.end());
      for (int64_t l = L; l >= 0; --l) {
        mine.nodes[l].insert(mine.nodes[l].end(), now.begin(), now.end());
        mine.begin[l].push_back(static_cast<int64_t>(mine.nodes[l].size()));
        if (l == 0) break;
        Climber climber(trie, l);
        above.clear();
        for (size_t i = 0; i < now.size();) {
          const auto [node, begin, end] = climber.above(now[i]);
          const size_t from = i;
          while (i < now.size() && now[i] < end) ++i;
          const int64_t taken = static_cast<int64_t>(i - from);
          const int64_t open =
              closed == nullptr ? end - begin : clear_bits(closed, begin, end, taken);
          if (open == taken) above.push_back(node);
        }
        std::swap(now, above);
        closed = row_bits(l - 1);
      }
    }
  });
  Taken all;
  all.nodes.resize(L + 1);
  all.begin.assign(L + 1, {0});
  for (Taken& part : parts)
    for (int64_t l = 0; l <= L; ++l) {
      const int64_t before = static_cast<int64_t>(all.nodes[l].size());
      all.nodes[l].insert(all.nodes[l].end(), part.nodes[l].begin(), part.nodes[l].end());
      for (int64_t end : part.begin[l]) all.begin[l].push_back(before + end);
    }
  return all;
}

namespace {

// The nodes that `more` has at one level, as events on a walk along the base's.
struct Events {
  std::vector<int64_t> place;     // [n]: the base's node that it equals, or comes before
  std::vector<char> equal;        // [n]: whether it equals
  std::vector<int64_t> inserted;  // [n + 1]: how many before it equal none

  int64_t size() const { return static_cast<int64_t>(place.size()); }
  void add(int64_t at, bool equals) {
    if (inserted.empty()) inserted.push_back(0);
    place.push_back(at);
    equal.push_back(equals);
    inserted.push_back(inserted.back() + !equals);
  }
};

// Walks a part of the n nodes of the base.  run(begin, end, e): nodes that nothing
// comes between, after the events before e.  at(e): the event itself.
template <class Run, class At>
void walk(const Events& events, int64_t n, int64_t part, int64_t parts, const Run& run,
          const At& at) {
  const auto event_at = [&](int64_t which) {
    if (which == parts) return events.size();
    return static_cast<int64_t>(
        std::lower_bound(events.place.begin(), events.place.end(), share(n, which, parts)) -
        events.place.begin());
  };
  int64_t here = share(n, part, parts);
  const int64_t last = event_at(part + 1);
  for (int64_t e = event_at(part); e < last; ++e) {
    run(here, events.place[e], e);
    at(e);
    here = events.place[e] + events.equal[e];
  }
  run(here, share(n, part + 1, parts), last);
}

void copy(int32_t* to, const int32_t* from, int64_t begin, int64_t end) {
  if (begin < end) std::memcpy(to, from + begin, sizeof(int32_t) * (end - begin));
}

}  // namespace

Merged merge(const View& base, const View& more, const std::vector<const uint32_t*>* bits,
             int64_t threads) {
  const int64_t L = base.levels(), N = base.N, K = more.N;
  if (more.levels() != L)
    throw std::invalid_argument("both tries must have " + std::to_string(L) + " levels, got " +
                                std::to_string(more.levels()));
  if (N + K > kLimit)
    throw std::length_error("a trie holds at most 2^31 - 1 items, got " + std::to_string(N + K));

  // Where each node of `more` goes.  A node that equals none has only such below.
  std::vector<Events> events(L + 1);
  events[0].add(0, true);  // the root
  std::vector<const int32_t*> base_labels(L), more_labels(L);
  for (int64_t l = 0, a = 0, b = 0; l < L; ++l) {
    base_labels[l] = base.labels + a;
    more_labels[l] = more.labels + b;
    a += base.nodes[l + 1];
    b += more.nodes[l + 1];
    const int32_t *first = base.first_child[l], *labels = base_labels[l];
    for (int64_t e = 0; e < more.nodes[l]; ++e) {
      const int64_t at = events[l].place[e];
      int64_t place = first[at];
      const int64_t end = events[l].equal[e] ? first[at + 1] : place;
      for (int64_t c = more.first_child[l][e]; c < more.first_child[l][e + 1]; ++c) {
        const int32_t label = more_labels[l][c];
        place = std::lower_bound(labels + place, labels + end, label) - labels;
        events[l + 1].add(place, place < end && labels[place] == label);
      }
    }
    if (events[l + 1].inserted.empty()) events[l + 1].inserted.push_back(0);
  }
  // The items of a leaf of `more` go behind those of the leaf that it equals.
  const Events& leaves = events[L];
  std::vector<int64_t> item_place(more.leaves()), item_begin(more.leaves() + 1, 0);
  for (int64_t e = 0; e < more.leaves(); ++e) {
    item_place[e] = items_begin(base, leaves.place[e] + leaves.equal[e]);
    item_begin[e + 1] = items_begin(more, e + 1);
  }

  Merged out;
  std::vector<int64_t> nodes(L + 1);
  for (int64_t l = 0; l <= L; ++l) nodes[l] = base.nodes[l] + events[l].inserted.back();
  int64_t total = 0;
  for (int64_t l = 0; l < L; ++l) {
    out.trie.first_child.push_back(roomy<int32_t>(nodes[l] + 1));
    total += nodes[l + 1];
  }
  out.trie.labels = roomy<int32_t>(total);
  out.trie.items = roomy<int32_t>(N + K);
  out.trie.repeats = roomy<int32_t>(N + K - nodes[L]);

  in_parallel(threads, [&](int64_t part) {
    int32_t* labels = out.trie.labels.data.get();
    for (int64_t l = 0; l < L; ++l) {
      const Events &here = events[l], &below = events[l + 1];
      int32_t* first = out.trie.first_child[l].data.get();
      const int32_t *base_first = base.first_child[l], *more_first = more.first_child[l];
      walk(
          here, base.nodes[l], part, threads,
          [&](int64_t begin, int64_t end, int64_t e) {
            const int32_t shift = static_cast<int32_t>(below.inserted[more_first[e]]);
            int32_t* to = first + here.inserted[e];
            for (int64_t node = begin; node < end; ++node) to[node] = base_first[node] + shift;
          },
          [&](int64_t e) {
            first[here.place[e] + here.inserted[e]] =
                static_cast<int32_t>(base_first[here.place[e]] + below.inserted[more_first[e]]);
          });
      if (part == 0) first[nodes[l]] = static_cast<int32_t>(nodes[l + 1]);
      walk(
          below, base.nodes[l + 1], part, threads,
          [&](int64_t begin, int64_t end, int64_t e) {
            copy(labels + begin + below.inserted[e], base_labels[l], begin, end);
          },
          [&](int64_t e) { labels[below.place[e] + below.inserted[e]] = more_labels[l][e]; });
      labels += nodes[l + 1];
    }
    int32_t *items = out.trie.items.data.get(), *repeats = out.trie.repeats.data.get();
    walk(
        leaves, base.leaves(), part, threads,
        [&](int64_t begin, int64_t end, int64_t e) {
          if (begin >= end) return;
          const int64_t from = items_begin(base, begin), to = items_begin(base, end);
          copy(items + from + item_begin[e], base.items, from, to);
          int32_t* repeat = repeats + item_begin[e] - leaves.inserted[e];
          const int32_t shift = static_cast<int32_t>(leaves.inserted[e]);
          for (int64_t r = from - begin; r < to - end; ++r) repeat[r] = base.repeats[r] + shift;
        },
        [&](int64_t e) {
          const int64_t leaf = leaves.place[e], merged = leaf + leaves.inserted[e];
          const int64_t from = items_begin(base, leaf), to = item_place[e];
          copy(items + from + item_begin[e], base.items, from, to);
          for (int64_t i = item_begin[e]; i < item_begin[e + 1]; ++i)
            items[to + i] = static_cast<int32_t>(more.items[i] + N);
          // Every item of the leaf but its first.
          const int64_t begin = from + item_begin[e], end = to + item_begin[e + 1];
          for (int64_t i = begin + 1; i < end; ++i)
            repeats[i - merged - 1] = static_cast<int32_t>(merged);
        });
  });

  if (bits == nullptr) return out;
  for (int64_t l = 0; l <= L; ++l) {
    out.bits.emplace_back(words(l < L ? nodes[l + 1] : N + K));
    std::fill_n(out.bits[l].data.get(), out.bits[l].size, 0u);
  }
  // A row is one thread's, since two parts of it would meet within a word.
  in_parallel(threads, [&](int64_t part) {
    for (int64_t l = part; l <= L; l += threads) {
      uint32_t* to = out.bits[l].data.get();
      const uint32_t* from = (*bits)[l];
      if (l < L) {
        const Events& here = events[l + 1];
        // What leads to a new item is open, so an event's own bit stays clear.
        walk(
            here, base.nodes[l + 1], 0, 1,
            [&](int64_t begin, int64_t end, int64_t e) {
              or_bits(to, begin + here.inserted[e], from, begin, end);
            },
            [](int64_t) {});
      } else {
        int64_t begin = 0;
        for (int64_t e = 0; e < more.leaves(); ++e) {
          or_bits(to, begin + item_begin[e], from, begin, item_place[e]);
          begin = item_place[e];
        }
        or_bits(to, begin + K, from, begin, N);
      }
    }
  });
  return out;
}

}  // namespace genrec::trie
