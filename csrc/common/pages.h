// How a large new buffer gets its pages: the cost that remains once a kernel
// moves every byte once.
#pragma once

#include <cstdint>
#include <vector>

namespace genrec {

// Asks for huge pages under a buffer that is about to be written from end to
// end.  Fresh memory arrives page by page as it is touched, and of a gradient's
// time the faults of 4 KiB pages were more than half.  A hint: systems without
// huge pages ignore it.
void advise_huge_pages(void* data, int64_t bytes);

// Memory for a large buffer that is written from end to end and made anew each step, as a
// gradient is: its pages stay for the next taker after it is released, since their arrival took
// longer than what is written to them.  Meanwhile the system may take them back when it needs
// memory, save those of the last buffer up to 128 MiB.  What is in them is anybody's.  `bytes`
// grows to what there is; null where there is no memory.
void* map_whole(int64_t& bytes);

// Takes it back, with the size that map_whole gave.
void release_whole(void* data, int64_t bytes);

// Gives back to the system all that is kept; how many bytes that were.
int64_t release_kept();

// Bytes [begin, end) of a buffer.
struct Span {
  int64_t begin, end;
};

// What tells that no page has come to a process: its own page faults, and how many pages it has,
// to which another process may add that writes to its memory.
struct Arrivals {
  int64_t process = -1, faults = -1, pages = -1;
};

// Zeroed memory whose pages arrive as they are touched, for a buffer of which most stays zero.
struct Blank {
  void* data = nullptr;  // null where there is no memory
  int64_t bytes = 0;
  std::vector<Span> own;  // the only pages that hold memory of their own, if not empty
  Arrivals before;        // as they were when this was mapped
};
Blank map_blank(int64_t bytes);

// Takes it back.  A page's arrival costs more than what is written to it, so the
// pages of `written`, spans in rising order, are zeroed and kept for the next
// map_blank of as many bytes, where they are few; all others return to the system,
// and with them whatever anybody wrote there.
void release_blank(Blank blank, const std::vector<Span>& written);

}  // namespace genrec
