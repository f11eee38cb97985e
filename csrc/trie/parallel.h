// Threads for the work on a whole catalogue: building, editing, filters.  Torch-free.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace genrec::trie {

// Runs f(part) for every part of [0, parts), each on a thread of its own.  f must
// not throw.
template <class F>
void in_parallel(int64_t parts, const F& f) {
  std::vector<std::thread> workers;
  workers.reserve(static_cast<size_t>(parts));
  int64_t part = 0;
  try {
    for (; part + 1 < parts; ++part) workers.emplace_back([&f, part] { f(part); });
  } catch (...) {  // the system has no thread left: this one does the rest
  }
  for (; part < parts; ++part) f(part);
  for (std::thread& worker : workers) worker.join();
}

// Where a part's share of [0, N) begins; N is below 2^31.
inline int64_t share(int64_t N, int64_t part, int64_t parts) { return N * part / parts; }

}  // namespace genrec::trie
