#include "common/pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

namespace genrec {
namespace {

// Of a kept mapping, memory that stays resident, at most.
constexpr int64_t kKeptBytes = int64_t{16} << 20;

struct Mapping {
  void* data;
  int64_t bytes;
};

// Mappings that are ready for the next taker.  Whoever looks at one holds it alone; nobody
// waits.
struct Shelf {
  std::atomic<Mapping*> slots[2];

  // One of at least `least` and at most `most` bytes, or nothing.
  Mapping take(int64_t least, int64_t most) {
    for (std::atomic<Mapping*>& slot : slots) {
      Mapping* mapping = slot.exchange(nullptr);
      if (mapping == nullptr) continue;
      if (mapping->bytes < least || mapping->bytes > most) {
        keep(mapping);
        continue;
      }
      const Mapping taken = *mapping;
      delete mapping;
      return taken;
    }
    return {nullptr, 0};
  }

  // As the latest, in place of the one before the last.
  void keep(Mapping* mapping) {
    for (std::atomic<Mapping*>& slot : slots) {
      mapping = slot.exchange(mapping);
      if (mapping == nullptr) return;
    }
    unmap(*mapping);
    delete mapping;
  }

  int64_t clear() {
    int64_t bytes = 0;
    for (std::atomic<Mapping*>& slot : slots)
      if (Mapping* mapping = slot.exchange(nullptr)) {
        bytes += mapping->bytes;
        unmap(*mapping);
        delete mapping;
      }
    return bytes;
  }

  void put(const Mapping& mapping) {
    Mapping* kept = new (std::nothrow) Mapping(mapping);
    kept == nullptr ? unmap(mapping) : keep(kept);
  }

 private:
  static void unmap(const Mapping& mapping) {
    munmap(mapping.data, static_cast<size_t>(mapping.bytes));
  }
};

Shelf zeros, whole;

void* map(int64_t bytes) {
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
}

// Makes the mapping all zeros by clearing the pages of `written` and returning the
// others; false where it cannot, or where too much would stay.
bool cleared(char* data, int64_t bytes, const Span* written, int64_t count) {
#if defined(__linux__)  // where MADV_DONTNEED promises zeros
  const int64_t page = sysconf(_SC_PAGESIZE), end = (bytes + page - 1) / page * page;
  int64_t done = 0, stays = 0;
  const auto drop = [&](int64_t first, int64_t last) {
    return first >= last ||
           madvise(data + first, static_cast<size_t>(last - first), MADV_DONTNEED) == 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = std::max(written[i].begin / page * page, done);
    const int64_t last = std::min((written[i].end + page - 1) / page * page, end);
    if (first >= last) continue;
    stays += last - first;
    if (stays > kKeptBytes || !drop(done, first)) return false;
    std::memset(data + first, 0, static_cast<size_t>(last - first));
    done = last;
  }
  return stays > 0 && drop(done, end);
#else
  (void)data, (void)bytes, (void)written, (void)count;
  return false;
#endif
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kWorthwhile = int64_t{4} << 20;
  if (bytes < kWorthwhile) return;
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void* map_whole(int64_t& bytes) {
  // A smaller batch may take a larger one's pages.
  const Mapping kept = whole.take(bytes, 2 * bytes);
  if (kept.data != nullptr) {
    bytes = kept.bytes;
    return kept.data;
  }
  constexpr int64_t kHuge = int64_t{2} << 20;
  bytes = (bytes + kHuge - 1) / kHuge * kHuge;
  void* data = map(bytes);
  if (data != nullptr) advise_huge_pages(data, bytes);
  return data;
}

void release_whole(void* data, int64_t bytes) {
#if defined(MADV_FREE)
  // Larger ones go back at once: nobody shall wonder what holds gigabytes.
  constexpr int64_t kMost = int64_t{1} << 30;
  if (bytes <= kMost && madvise(data, static_cast<size_t>(bytes), MADV_FREE) == 0)
    return whole.put({data, bytes});
#endif
  munmap(data, static_cast<size_t>(bytes));
}

int64_t release_kept() { return zeros.clear() + whole.clear(); }

void* map_blank(int64_t bytes) {
  if (void* kept = zeros.take(bytes, bytes).data) return kept;
  void* data = map(bytes);
#if defined(MADV_NOHUGEPAGE)
  // A huge page would be zeroed whole for the few bytes that are written.
  if (data != nullptr) madvise(data, static_cast<size_t>(bytes), MADV_NOHUGEPAGE);
#endif
  return data;
}

void release_blank(void* data, int64_t bytes, const Span* written, int64_t count) {
  if (cleared(static_cast<char*>(data), bytes, written, count)) return zeros.put({data, bytes});
  munmap(data, static_cast<size_t>(bytes));
}

}  // namespace genrec
