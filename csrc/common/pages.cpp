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

// Mappings of zeros, ready for the next taker.  Whoever looks at one holds it
// alone; nobody waits.
std::atomic<Mapping*> kept[2];

void unmap(void* data, int64_t bytes) { munmap(data, static_cast<size_t>(bytes)); }

// Into an empty slot, or into the first in place of what is there.
void keep(Mapping* mapping) {
  for (std::atomic<Mapping*>& slot : kept) {
    Mapping* none = nullptr;
    if (slot.compare_exchange_strong(none, mapping)) return;
  }
  if (Mapping* old = kept[0].exchange(mapping)) {
    unmap(old->data, old->bytes);
    delete old;
  }
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

void* map_blank(int64_t bytes) {
  for (std::atomic<Mapping*>& slot : kept) {
    Mapping* mapping = slot.exchange(nullptr);
    if (mapping == nullptr) continue;
    if (mapping->bytes != bytes) {
      keep(mapping);
      continue;
    }
    void* data = mapping->data;
    delete mapping;
    return data;
  }
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
#if defined(MADV_NOHUGEPAGE)
  // A huge page would be zeroed whole for the few bytes that are written.
  madvise(data, static_cast<size_t>(bytes), MADV_NOHUGEPAGE);
#endif
  return data;
}

void release_blank(void* data, int64_t bytes, const Span* written, int64_t count) {
  Mapping* mapping = nullptr;
  if (cleared(static_cast<char*>(data), bytes, written, count))
    mapping = new (std::nothrow) Mapping{data, bytes};
  if (mapping == nullptr) return unmap(data, bytes);
  keep(mapping);
}

}  // namespace genrec
