// Readers that decode while a writer edits the catalogue, for ThreadSanitizer: the
// builder, the edits and the CPU kernels as they are, no torch, no simulator.
//
//   check_live_<build> <edits> <seed> [in_place]
//
// A writer removes, restores and adds items and publishes a version after each
// edit; three readers take the present version, decode from it under lists of seen
// items, and compare what they find with that version's own description.  in_place
// plants a bug: the writer edits the bits of the version that readers hold.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "trie/build.h"
#include "trie/edit.h"
#include "trie/kernels.h"

namespace genrec::baseline {
extern const trie::CpuKernels trie_kernels;
}

namespace {

using namespace genrec::trie;
using Path = std::vector<int32_t>;
using Random = std::mt19937_64;
using Rows = std::vector<std::vector<uint32_t>>;

constexpr int64_t kLevels = 3, kCodes = 7, kReaders = 3, kSeen = 6;

struct Version {
  std::shared_ptr<const Built> trie;
  std::shared_ptr<const Array<int32_t>> place_of;
  Rows bits;  // [L + 1]
  // What the version is, for the check: by item.
  std::vector<Path> paths;
  std::vector<char> available;
};

View view_of(const Built& built) {
  View view;
  for (const auto& first : built.first_child) {
    view.first_child.push_back(first.data.get());
    view.nodes.push_back(first.size - 1);
  }
  view.labels = built.labels.data.get();
  view.items = built.items.data.get();
  view.repeats = built.repeats.data.get();
  view.N = built.items.size;
  view.nodes.push_back(view.N - built.repeats.size);
  return view;
}

template <class Pointer, class R>
std::vector<Pointer> pointers(R& rows) {
  std::vector<Pointer> result;
  for (auto& row : rows) result.push_back(row.data());
  return result;
}

Built built_of(const std::vector<Path>& paths) {
  std::vector<int32_t> codes;
  for (const Path& path : paths) codes.insert(codes.end(), path.begin(), path.end());
  const std::vector<int64_t> offsets(kLevels, 0), sizes(kLevels, kCodes);
  return build(codes.data(), static_cast<int64_t>(paths.size()), kLevels, offsets.data(),
               sizes.data(), 2);
}

std::vector<Path> random_paths(Random& random, int64_t N) {
  std::vector<Path> paths(N, Path(kLevels));
  for (Path& path : paths)
    for (int32_t& code : path) code = static_cast<int32_t>(random() % kCodes);
  return paths;
}

// ---- the kernels' interface, here and nowhere else ----

struct Beams {
  std::vector<float> scores{0};
  std::vector<int64_t> nodes{0}, parents, tokens;
};

// One step for one user; every row of logits is the same.
Beams step(const View& trie, int64_t level, const int32_t* labels, const std::vector<float>& logits,
           const Beams& from, const std::vector<uint32_t>& bits, const std::vector<int32_t>& taken,
           int64_t width) {
  const int64_t W = static_cast<int64_t>(from.nodes.size());
  const int64_t taken_begin[2] = {0, static_cast<int64_t>(taken.size())};
  Beams to;
  to.scores.resize(width), to.nodes.resize(width);
  to.parents.resize(width), to.tokens.resize(width);
  StepArgs a;
  a.logits = logits.data();
  a.U = 1, a.W = W, a.V = kCodes, a.stride = 0;
  a.scores = from.scores.data(), a.nodes = from.nodes.data();
  a.first_child = trie.first_child[level], a.level_nodes = trie.nodes[level];
  a.labels = labels, a.next_nodes = trie.nodes[level + 1];
  a.level_begin = 0, a.level_end = kCodes;
  a.filter.closed = reinterpret_cast<const int32_t*>(bits.data());
  a.filter.closed_rows = 1, a.filter.closed_words = static_cast<int64_t>(bits.size());
  a.filter.taken = taken.data(), a.filter.num_taken = taken_begin[1];
  a.filter.taken_begin = taken_begin;
  a.width = width;
  a.out_scores = to.scores.data(), a.out_parent = to.parents.data();
  a.out_token = to.tokens.data(), a.out_node = to.nodes.data();
  genrec::baseline::trie_kernels.step(a, 0, 1);
  return to;
}

// ---- a reader ----

// The paths that a search wide enough for all of them finds, sorted; false where
// they are out of order or a dead end was met.
bool decode(const Version& version, const std::vector<int64_t>& seen, std::vector<Path>& found) {
  const View trie = view_of(*version.trie);
  const auto rows = pointers<const uint32_t*>(version.bits);
  const Taken taken = take_items(trie, version.place_of->data.get(), seen.data(), 1,
                                 static_cast<int64_t>(seen.size()), &rows, 1, nullptr, 1);
  const int64_t width = trie.leaves() + 1;
  Beams beams;
  std::vector<Path> paths{{}};
  const int32_t* labels = trie.labels;
  for (int64_t level = 0; level < kLevels; ++level) {
    std::vector<float> logits(kCodes);
    for (int64_t code = 0; code < kCodes; ++code) logits[code] = .1f * ((code * 5 + level) % 7);
    const int64_t before = static_cast<int64_t>(paths.size());
    beams =
        step(trie, level, labels, logits, beams, version.bits[level], taken.nodes[level], width);
    labels += trie.nodes[level + 1];
    std::vector<Path> next;
    std::vector<char> continued(before, 0);
    Beams live;
    live.scores.clear(), live.nodes.clear();
    for (int64_t w = 0; w < width && beams.nodes[w] >= 0; ++w) {
      continued[beams.parents[w]] = 1;
      next.push_back(paths[beams.parents[w]]);
      next.back().push_back(static_cast<int32_t>(beams.tokens[w]));
      live.scores.push_back(beams.scores[w]);
      live.nodes.push_back(beams.nodes[w]);
      if (w > 0 && beams.scores[w] > beams.scores[w - 1]) return false;
    }
    if (level > 0 && std::count(continued.begin(), continued.end(), 0)) return false;
    paths = std::move(next);
    beams = std::move(live);
    if (paths.empty()) break;
  }
  found = std::move(paths);
  std::sort(found.begin(), found.end());
  return true;
}

std::vector<Path> expected(const Version& version, const std::vector<int64_t>& seen) {
  std::set<Path> open;
  for (size_t item = 0; item < version.paths.size(); ++item)
    if (version.available[item] &&
        std::find(seen.begin(), seen.end(), static_cast<int64_t>(item)) == seen.end())
      open.insert(version.paths[item]);
  return {open.begin(), open.end()};
}

// ---- the versions ----

class Live {
 public:
  explicit Live(std::shared_ptr<const Version> version) : version_(std::move(version)) {}
  std::shared_ptr<const Version> current() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return version_;
  }
  void publish(std::shared_ptr<const Version> version) {
    const std::lock_guard<std::mutex> lock(mutex_);
    version_ = std::move(version);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Version> version_;
};

// Describes an edit in `version` and makes it in `bits`.
void set_items(Random& random, Version& version, Rows& bits, bool closed) {
  std::vector<int64_t> places;
  for (int64_t i = 0; i < 30; ++i) {
    const size_t item = random() % version.paths.size();
    version.available[item] = !closed;
    places.push_back(version.place_of->data[item]);
  }
  set_places(view_of(*version.trie), places.data(), static_cast<int64_t>(places.size()), closed,
             pointers<uint32_t*>(bits));
}

void add_items(Random& random, Version& version) {
  const std::vector<Path> more = random_paths(random, 5);
  const Built built = built_of(more);
  const auto rows = pointers<const uint32_t*>(version.bits);
  Merged merged = merge(view_of(*version.trie), view_of(built), &rows, 2);
  version.paths.insert(version.paths.end(), more.begin(), more.end());
  version.available.resize(version.paths.size(), 1);
  version.bits.clear();
  for (const auto& row : merged.bits)
    version.bits.emplace_back(row.data.get(), row.data.get() + row.size);
  version.trie = std::make_shared<const Built>(std::move(merged.trie));
  version.place_of = std::make_shared<const Array<int32_t>>(
      place_items(version.trie->items.data.get(), version.trie->items.size, 2));
}

std::shared_ptr<Version> first_version(Random& random) {
  auto version = std::make_shared<Version>();
  version->paths = random_paths(random, 150);
  version->available.assign(version->paths.size(), 1);
  version->trie = std::make_shared<const Built>(built_of(version->paths));
  const View trie = view_of(*version->trie);
  version->place_of = std::make_shared<const Array<int32_t>>(place_items(trie.items, trie.N, 2));
  for (int64_t l = 0; l <= kLevels; ++l) version->bits.emplace_back(words(trie.bits(l)));
  const std::unique_ptr<bool[]> allowed(new bool[trie.N]);
  std::fill_n(allowed.get(), trie.N, true);
  close_items(trie, allowed.get(), nullptr, pointers<uint32_t*>(version->bits), 2);
  return version;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3 || (count == 4 && std::strcmp(arguments[3], "in_place") != 0) || count > 4) {
    std::fprintf(stderr, "usage: %s <edits> <seed> [in_place]\n", arguments[0]);
    return 2;
  }
  const int64_t edits = std::atoll(arguments[1]);
  const uint64_t seed = std::strtoull(arguments[2], nullptr, 10);
  const bool in_place = count == 4;
  Random random(seed);
  Live live(first_version(random));
  std::atomic<bool> done = false;
  std::atomic<int64_t> reads = 0, failures = 0;

  std::vector<std::thread> readers;
  for (int64_t reader = 0; reader < kReaders; ++reader)
    readers.emplace_back([&, reader] {
      Random mine(seed + 1000 + static_cast<uint64_t>(reader));
      while (!done.load(std::memory_order_relaxed)) {
        const std::shared_ptr<const Version> version = live.current();
        std::vector<int64_t> seen(kSeen);
        for (int64_t& item : seen)
          item = static_cast<int64_t>(mine() % (version->paths.size() + 1)) - 1;
        std::vector<Path> found;
        if (!decode(*version, seen, found) || found != expected(*version, seen)) ++failures;
        reads.fetch_add(1, std::memory_order_relaxed);
      }
    });
  for (int64_t edit = 0; edit < edits; ++edit) {
    // About a read an edit at least.  Relaxed, here and below: an order that the
    // counter made would hide races.
    while (reads.load(std::memory_order_relaxed) < edit) std::this_thread::yield();
    const std::shared_ptr<const Version> before = live.current();
    auto after = std::make_shared<Version>(*before);
    if (edit % 8 == 7)
      add_items(random, *after);
    else
      set_items(random, *after, in_place ? const_cast<Rows&>(before->bits) : after->bits,
                random() % 2);
    live.publish(std::move(after));
  }
  done = true;
  for (std::thread& reader : readers) reader.join();
  std::printf("%lld edits, %lld reads, %lld failures\n", static_cast<long long>(edits),
              static_cast<long long>(reads.load()), static_cast<long long>(failures.load()));
  return failures > 0;
}
