#include "common/pages.h"

#include <sys/mman.h>

namespace genrec {

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
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
#if defined(MADV_NOHUGEPAGE)
  // A huge page would be zeroed whole for the few bytes that are written.
  madvise(data, static_cast<size_t>(bytes), MADV_NOHUGEPAGE);
#endif
  return data;
}

void unmap_blank(void* data, int64_t bytes) { munmap(data, static_cast<size_t>(bytes)); }

}  // namespace genrec
