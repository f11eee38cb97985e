#include "trie/build.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "trie/parallel.h"

namespace genrec::trie {

namespace {

constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
constexpr int kDigitBits = 8;  // 256 places to write to stay within the first-level TLB
constexpr int kDigits = 1 << kDigitBits;
constexpr int64_t kApart = 8;  // entries between the counters of two threads: a cache line

template <class T>
[[noreturn]] void refuse(const T* codes, int64_t item, int64_t level, int64_t L, int64_t offset,
                         int64_t size) {
  const int64_t code = codes[item * L + level];
  const std::string name = "codes[" + std::to_string(item) + ", " + std::to_string(level) + "]";
  if (code < 0 || code >= kLimit)
    throw std::invalid_argument(name + " must lie in [0, 2^31 - 1), got " + std::to_string(code));
  if (code + offset > kLimit)
    throw std::invalid_argument(name + " = " + std::to_string(code) + " with level_offsets[" +
                                std::to_string(level) + "] = " + std::to_string(offset) +
                                " is column " + std::to_string(code + offset) +
                                "; columns must stay below 2^31");
  throw std::invalid_argument(name + " = " + std::to_string(code) + " does not fit the level's " +
                              std::to_string(size) + " columns");
}

// The largest code of each level, once all are known to be inside.
template <class T>
std::vector<int64_t> largest_codes(const T* codes, int64_t N, int64_t L, const int64_t* offsets,
                                   const int64_t* sizes, int64_t parts) {
  std::vector<uint64_t> limits(L);
  for (int64_t l = 0; l < L; ++l)
    limits[l] = static_cast<uint64_t>(
        std::max<int64_t>(0, std::min({kLimit, sizes[l], kLimit + 1 - offsets[l]})));
  std::vector<std::vector<int64_t>> largest(parts, std::vector<int64_t>(L + kApart, 0));
  std::vector<int64_t> refused(parts, -1);  // each part's first entry of codes outside
  in_parallel(parts, [&](int64_t part) {
    int64_t* top = largest[part].data();
    const int64_t end = share(N, part + 1, parts);
    for (int64_t i = share(N, part, parts); i < end; ++i)
      for (int64_t l = 0; l < L; ++l) {
        const int64_t code = codes[i * L + l];
        if (static_cast<uint64_t>(code) >= limits[l]) {
          refused[part] = i * L + l;
          return;
        }
        top[l] = std::max(top[l], code);
      }
  });
  for (int64_t at : refused)
    if (at >= 0) refuse(codes, at / L, at % L, L, offsets[at % L], sizes[at % L]);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t l = 0; l < L; ++l) largest[0][l] = std::max(largest[0][l], largest[part][l]);
  return largest[0];
}

// A record is a key in the upper half and an item in the lower.
using Records = Array<uint64_t>;

int64_t item_of(uint64_t record) { return static_cast<int64_t>(record & 0xffffffffu); }

// Stable sort by the key's lowest `bits` bits, least significant digit first.
void sort_by_key(Records& records, Records& spare, int bits, int64_t parts) {
  const int64_t N = records.size;
  std::vector<std::array<int64_t, kDigits>> place(parts);
  for (int shift = 32; shift < 32 + bits; shift += kDigitBits) {
    const auto digit = [shift](uint64_t record) { return (record >> shift) & (kDigits - 1); };
    in_parallel(parts, [&](int64_t part) {
      std::array<int64_t, kDigits> count{};
      const int64_t end = share(N, part + 1, parts);
      for (int64_t i = share(N, part, parts); i < end; ++i) ++count[digit(records.data[i])];
      place[part] = count;
    });
    // Within a digit, earlier parts come first: that keeps the sort stable.
    int64_t total = 0;
    for (int d = 0; d < kDigits; ++d)
      for (int64_t part = 0; part < parts; ++part) total += std::exchange(place[part][d], total);
    in_parallel(parts, [&](int64_t part) {
      std::array<int64_t, kDigits> to = place[part];
      const int64_t end = share(N, part + 1, parts);
      for (int64_t i = share(N, part, parts); i < end; ++i)
        spare.data[to[digit(records.data[i])]++] = records.data[i];
    });
    std::swap(records, spare);
  }
}

// Sorted paths whose codes all lie in the key.
struct PackedPaths {
  const uint64_t* records;
  int64_t L;
  std::vector<int> shifts;          // [L], of a level's code within the record
  std::vector<uint64_t> masks;      // [L]
  std::array<int64_t, 32> level{};  // of a key's bit

  PackedPaths(const Records& sorted, const std::vector<int>& bits)
      : records(sorted.data.get()), L(static_cast<int64_t>(bits.size())), shifts(L), masks(L) {
    int at = 0;
    for (int64_t l = L - 1; l >= 0; --l) {
      shifts[l] = 32 + at;
      masks[l] = (uint64_t{1} << bits[l]) - 1;
      for (int bit = 0; bit < bits[l]; ++bit) level[at++] = l;
    }
  }
  // The first level at which path i leaves path i - 1; L where they are equal.
  int64_t change(int64_t i) const {
    const uint64_t differ = (records[i] ^ records[i - 1]) >> 32;
    return differ == 0 ? L : level[std::bit_width(differ) - 1];
  }
  int64_t code(int64_t i, int64_t l) const {
    return static_cast<int64_t>((records[i] >> shifts[l]) & masks[l]);
  }
};

// Sorted paths that are looked up in the codes.
template <class T>
struct GatheredPaths {
  const uint64_t* records;
  const T* codes;
  int64_t L;

  int64_t change(int64_t i) const {
    const T *here = codes + item_of(records[i]) * L, *last = codes + item_of(records[i - 1]) * L;
    int64_t l = 0;
    while (l < L && here[l] == last[l]) ++l;
    return l;
  }
  int64_t code(int64_t i, int64_t l) const { return codes[item_of(records[i]) * L + l]; }
};

template <class Paths>
Built emit(const Paths& paths, int64_t N, int64_t L, const int64_t* offsets, int64_t parts) {
  const auto change = [&](int64_t i) { return i == 0 ? 0 : paths.change(i); };
  // next[part][l]: how many nodes of level l + 1 begin before the part.
  std::vector<std::vector<int64_t>> next(parts + 1, std::vector<int64_t>(L + 1 + kApart, 0));
  in_parallel(parts, [&](int64_t part) {
    int64_t* changes = next[part + 1].data();
    const int64_t end = share(N, part + 1, parts);
    for (int64_t i = share(N, part, parts); i < end; ++i) ++changes[change(i)];
  });
  for (int64_t part = 1; part <= parts; ++part) {
    // A change at one level begins a node of every later one too.
    for (int64_t l = 1; l <= L; ++l) next[part][l] += next[part][l - 1];
    for (int64_t l = 0; l <= L; ++l) next[part][l] += next[part - 1][l];
  }
  const std::vector<int64_t> nodes = next[parts];  // [l]: n_{l + 1}

  Built out;
  std::vector<int32_t*> labels(L), first_child(L);
  int64_t total = 0;
  for (int64_t l = 0; l < L; ++l) {
    const int64_t n = l == 0 ? 1 : nodes[l - 1];
    out.first_child.emplace_back(n + 1);
    first_child[l] = out.first_child[l].data.get();
    first_child[l][0] = 0;
    first_child[l][n] = static_cast<int32_t>(nodes[l]);
    total += nodes[l];
  }
  out.labels = Array<int32_t>(total);
  for (int64_t l = 0, at = 0; l < L; at += nodes[l++]) labels[l] = out.labels.data.get() + at;
  out.items = Array<int32_t>(N);
  out.repeats = Array<int32_t>(N - nodes[L - 1]);

  in_parallel(parts, [&](int64_t part) {
    int64_t* at = next[part].data();
    const int64_t end = share(N, part + 1, parts);
    for (int64_t i = share(N, part, parts); i < end; ++i) {
      out.items.data[i] = static_cast<int32_t>(item_of(paths.records[i]));
      const int64_t from = change(i);
      if (from == L) out.repeats.data[i - at[L - 1]] = static_cast<int32_t>(at[L - 1] - 1);
      for (int64_t l = from; l < L; ++l) {
        labels[l][at[l]] = static_cast<int32_t>(paths.code(i, l) + offsets[l]);
        if (l + 1 < L) first_child[l + 1][at[l]] = static_cast<int32_t>(at[l + 1]);
        ++at[l];
      }
    }
  });
  return out;
}

}  // namespace

template <class T>
Built build(const T* codes, int64_t N, int64_t L, const int64_t* offsets, const int64_t* sizes,
            int64_t threads) {
  if (L < 1 || threads < 1)
    throw std::invalid_argument("levels and threads must be at least 1, got " + std::to_string(L) +
                                " and " + std::to_string(threads));
  if (N > kLimit)
    throw std::length_error("a trie holds at most 2^31 - 1 items, got " + std::to_string(N));
  const std::vector<int64_t> largest = largest_codes(codes, N, L, offsets, sizes, threads);
  std::vector<int> bits(L);
  for (int64_t l = 0; l < L; ++l)
    bits[l] = static_cast<int>(std::bit_width(static_cast<uint64_t>(largest[l])));

  // Levels are sorted in groups whose codes fit a key together, the last first;
  // four levels of 256 codes are one group.
  Records records(N);
  bool sorted = false, packed = false;
  {
    Records spare(N);
    for (int64_t end = L; end > 0;) {
      int64_t begin = end;
      int width = 0;
      while (begin > 0 && width + bits[begin - 1] <= 32) width += bits[--begin];
      in_parallel(threads, [&](int64_t part) {
        const int64_t last = share(N, part + 1, threads);
        for (int64_t i = share(N, part, threads); i < last; ++i) {
          const int64_t item = sorted ? item_of(records.data[i]) : i;
          uint64_t key = 0;
          for (int64_t l = begin; l < end; ++l)
            key = key << bits[l] | static_cast<uint64_t>(codes[item * L + l]);
          records.data[i] = key << 32 | static_cast<uint64_t>(item);
        }
      });
      sort_by_key(records, spare, width, threads);
      packed = begin == 0 && end == L;
      sorted = true;
      end = begin;
    }
  }
  if (packed) return emit(PackedPaths(records, bits), N, L, offsets, threads);
  return emit(GatheredPaths<T>{records.data.get(), codes, L}, N, L, offsets, threads);
}

template Built build(const int32_t*, int64_t, int64_t, const int64_t*, const int64_t*, int64_t);
template Built build(const int64_t*, int64_t, int64_t, const int64_t*, const int64_t*, int64_t);

}  // namespace genrec::trie
