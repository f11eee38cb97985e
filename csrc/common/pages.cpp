#include "common/pages.h"

#include <sys/mman.h>
#include <unistd.h>
#if defined(__linux__)
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>
#include <utility>
#include <vector>

namespace genrec {
namespace {

// Of a kept mapping, memory that stays resident, at most.
constexpr int64_t kKeptBytes = int64_t{16} << 20;

struct Whole {
  void* data = nullptr;
  int64_t bytes = 0;
};

// Lets the system take a mapping's pages when it needs memory; false where it cannot.
bool lend(const Blank&) { return true; }
#if defined(MADV_FREE)
bool lend(const Whole& mapping) {
  return madvise(mapping.data, static_cast<size_t>(mapping.bytes), MADV_FREE) == 0;
}
#else
bool lend(const Whole&) { return false; }
#endif

// Mappings that are ready for the next taker.  Whoever looks at one holds it alone; nobody
// waits.
template <class Mapping>
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
      Mapping taken = std::move(*mapping);
      delete mapping;
      return taken;
    }
    return {};
  }

  // As the latest, in place of the one before the last.
  void keep(Mapping* mapping) {
    mapping = slots[0].exchange(mapping);
    if (mapping != nullptr && lend(*mapping)) mapping = slots[1].exchange(mapping);
    if (mapping == nullptr) return;
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

  void put(Mapping mapping) {
    Mapping* kept = new (std::nothrow) Mapping(std::move(mapping));
    kept == nullptr ? unmap(mapping) : keep(kept);
  }

 private:
  static void unmap(const Mapping& mapping) {
    munmap(mapping.data, static_cast<size_t>(mapping.bytes));
  }
};

Shelf<Blank> zeros;
Shelf<Whole> whole;

void* map(int64_t bytes) {
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
}

#if defined(__linux__)

// What the system has at hand of a range: ioctl(PAGEMAP_SCAN), Linux 6.7, by its documented layout,
// since the headers that a build finds may be older than the kernel that it runs on.
struct PageRegion {
  uint64_t begin, end, categories;
};
struct PageScan {
  uint64_t size, flags, begin, end, walked_to, regions, max_regions, max_pages;
  uint64_t inverted, all_of, any_of, returned;
};
constexpr unsigned long kPageScan = _IOWR('f', 16, PageScan);
constexpr uint64_t kPresent = 1 << 3, kSwapped = 1 << 4, kZeroPage = 1 << 5;

// Calls use(begin, end) for each run of pages in [data, data + bytes) that hold memory of their
// own, that is, to which somebody wrote; false where the system cannot tell or `use` gave up.
// Opened anew each time: the file speaks of the process that opened it, not of one forked from it.
template <class Use>
bool for_each_written(char* data, int64_t bytes, Use use) {
  const int file = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  PageRegion found[512];
  PageScan scan{};
  scan.size = sizeof scan;
  scan.begin = reinterpret_cast<uint64_t>(data);
  scan.end = scan.begin + static_cast<uint64_t>(bytes);
  scan.regions = reinterpret_cast<uint64_t>(found);
  scan.max_regions = std::size(found);
  scan.all_of = scan.inverted = kZeroPage;  // where memory was only read, the zero page is
  scan.any_of = scan.returned = kPresent | kSwapped;
  bool going_on = true;
  while (going_on && scan.begin < scan.end) {
    const int count = ioctl(file, kPageScan, &scan);
    going_on = count >= 0 && scan.walked_to > scan.begin;
    for (int i = 0; going_on && i < count; ++i)
      going_on = use(reinterpret_cast<char*>(found[i].begin) - data,
                     reinterpret_cast<char*>(found[i].end) - data);
    scan.begin = scan.walked_to;
  }
  close(file);
  return going_on;
}

// A process's /proc/self/statm, which stays open: the process, and the file in the lower half.  A
// forked process opens its own.
std::atomic<int64_t> statm{-1};

int open_statm(int64_t process) {
  int64_t known = statm.load();
  if (known >= 0 && known >> 32 == process) return static_cast<int>(known & 0xffffffff);
  const int file = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
  if (file >= 0 && !statm.compare_exchange_strong(known, process << 32 | file)) {
    close(file);  // another thread was first; the next call finds its file
    return -1;
  }
  return file;
}

// Of this process so far; the number of pages is exact from Linux 6.16 on, and nearly so before.
Arrivals arrivals() {
  Arrivals now;
  now.process = getpid();
  const int file = open_statm(now.process);
  char text[128];
  const ssize_t length = file < 0 ? 0 : pread(file, text, sizeof text - 1, 0);
  text[length > 0 ? length : 0] = 0;
  char* end = text;
  std::strtoll(end, &end, 10);  // the address space
  now.pages = std::strtoll(end, &end, 10);
  rusage usage;
  if (*end != ' ' || getrusage(RUSAGE_SELF, &usage) != 0) return {};
  now.faults = int64_t{usage.ru_minflt} + usage.ru_majflt;
  return now;
}

bool none_since(const Arrivals& then) {
  if (then.process < 0) return false;
  const Arrivals now = arrivals();
  return now.process == then.process && now.faults == then.faults && now.pages == then.pages;
}

// The pages of `written`, each once, or none where there is nothing to keep or too much.
std::vector<Span> pages_of(const std::vector<Span>& written, int64_t page, int64_t end) {
  std::vector<Span> pages;
  pages.reserve(written.size());
  int64_t total = 0;
  for (const Span& span : written) {
    const int64_t done = pages.empty() ? 0 : pages.back().end;
    const int64_t first = std::max(span.begin / page * page, done);
    const int64_t last = std::min((span.end + page - 1) / page * page, end);
    if (first >= last) continue;
    total += last - first;
    pages.push_back({first, last});
  }
  if (total > kKeptBytes) pages.clear();
  return pages;
}

// Makes the mapping all zeros by clearing the pages of `written` and returning the others that
// hold anything; false where it cannot, or where too much would stay.
bool cleared(Blank& blank, const std::vector<Span>& written) {
  char* data = static_cast<char*>(blank.data);
  if (!blank.own.empty() && none_since(blank.before)) {
    for (const Span& span : blank.own)
      std::memset(data + span.begin, 0, static_cast<size_t>(span.end - span.begin));
    return true;
  }
  const int64_t page = sysconf(_SC_PAGESIZE), end = (blank.bytes + page - 1) / page * page;
  blank.own = pages_of(written, page, end);
  const std::vector<Span>& kept = blank.own;
  if (kept.empty()) return false;

  // The pages from `first` to `last`, where each call begins no earlier than the last one ended.
  auto next = kept.cbegin();
  const auto clear = [&](int64_t first, int64_t last) {
    while (first < last) {
      while (next != kept.cend() && next->end <= first) ++next;
      const bool keep = next != kept.cend() && next->begin <= first;
      const int64_t to = std::min(last, keep                  ? next->end
                                        : next != kept.cend() ? next->begin
                                                              : last);
      const auto size = static_cast<size_t>(to - first);
      if (keep)
        std::memset(data + first, 0, size);
      else if (madvise(data + first, size, MADV_DONTNEED) != 0)
        return false;
      first = to;
    }
    return true;
  };
  if (for_each_written(data, end, clear)) return true;
  next = kept.cbegin();
  const bool done = clear(0, end);
  blank.own.clear();  // a system that cannot tell its pages may not count its faults either
  return done;
}

#else

bool cleared(Blank&, const std::vector<Span>&) {
  return false;  // nobody else promises that MADV_DONTNEED leaves zeros
}

#endif

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
  const Whole kept = whole.take(bytes, 2 * bytes);
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
  // Larger ones go back at once: nobody shall wonder what holds gigabytes.
  constexpr int64_t kMost = int64_t{1} << 30;
  // To lend pages interrupts every processor that the process runs on, once for each huge page:
  // most often the next step's gradient needs them at once.
  constexpr int64_t kHeld = int64_t{128} << 20;
  const Whole mapping{data, bytes};
  if (bytes <= kMost && (bytes <= kHeld || lend(mapping))) return whole.put(mapping);
  munmap(data, static_cast<size_t>(bytes));
}

int64_t release_kept() { return zeros.clear() + whole.clear(); }

Blank map_blank(int64_t bytes) {
  Blank blank = zeros.take(bytes, bytes);
  if (blank.data != nullptr) {
#if defined(__linux__)
    blank.before = arrivals();
#endif
    return blank;
  }
  blank.data = map(bytes);
  blank.bytes = bytes;
#if defined(MADV_NOHUGEPAGE)
  // A huge page would be zeroed whole for the few bytes that are written.
  if (blank.data != nullptr) madvise(blank.data, static_cast<size_t>(bytes), MADV_NOHUGEPAGE);
#endif
  return blank;
}

void release_blank(Blank blank, const std::vector<Span>& written) {
  if (cleared(blank, written)) return zeros.put(std::move(blank));
  munmap(blank.data, static_cast<size_t>(blank.bytes));
}

}  // namespace genrec
