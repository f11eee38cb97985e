// The simulator's engine: a fiber a CUDA thread, all on the calling CPU thread.
//
// A fiber runs until its CUDA thread would wait; then the scheduler takes the next.
// The blocks of a cluster run together, and in random order a few clusters do.
// For ThreadSanitizer each CUDA thread is a thread of its own, which only barriers,
// __syncwarp and fences order: it then reports a missing one as a data race whatever
// order the fibers ran in.  This file itself is compiled without sanitizers and
// speaks to them by hand, so that one object serves every build.
#include "simulator/cuda_simulator.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#if !defined(__x86_64__) || defined(GENREC_SIMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

// ---- what the sanitizers are told ----
// Each function is there where the program was linked with its sanitizer.

extern "C" {
#define GENREC_IF_LINKED __attribute__((weak))
GENREC_IF_LINKED void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
GENREC_IF_LINKED void __sanitizer_finish_switch_fiber(void* saved, const void** bottom,
                                                      size_t* size);
GENREC_IF_LINKED void __asan_poison_memory_region(const volatile void* p, size_t size);
GENREC_IF_LINKED void __asan_unpoison_memory_region(const volatile void* p, size_t size);
GENREC_IF_LINKED void* __tsan_get_current_fiber();
GENREC_IF_LINKED void* __tsan_create_fiber(unsigned flags);
GENREC_IF_LINKED void __tsan_switch_to_fiber(void* fiber, unsigned flags);
GENREC_IF_LINKED void __tsan_acquire(void* p);
GENREC_IF_LINKED void __tsan_release(void* p);
GENREC_IF_LINKED void __tsan_write_range(void* p, unsigned long size);
GENREC_IF_LINKED void AnnotateIgnoreReadsBegin(const char* file, int line);
GENREC_IF_LINKED void AnnotateIgnoreReadsEnd(const char* file, int line);
GENREC_IF_LINKED void AnnotateIgnoreWritesBegin(const char* file, int line);
GENREC_IF_LINKED void AnnotateIgnoreWritesEnd(const char* file, int line);
#undef GENREC_IF_LINKED
}

namespace asan {
static bool on() { return &__sanitizer_start_switch_fiber != nullptr; }
static void leave(void** save, const void* bottom, size_t size) {
  if (on()) __sanitizer_start_switch_fiber(save, bottom, size);
}
static void arrive(void* saved, const void** bottom, size_t* size) {
  if (on()) __sanitizer_finish_switch_fiber(saved, bottom, size);
}
static void poison(const void* p, size_t size) {
  if (on()) __asan_poison_memory_region(p, size);
}
static void unpoison(const void* p, size_t size) {
  if (on()) __asan_unpoison_memory_region(p, size);
}
}  // namespace asan

namespace tsan {
static bool on() { return &__tsan_create_fiber != nullptr; }
static void* current() { return on() ? __tsan_get_current_fiber() : nullptr; }
static void* create() { return on() ? __tsan_create_fiber(0) : nullptr; }
static void become(void* fiber) {
  constexpr unsigned kNoOrder = 1;  // the switch itself orders nothing
  if (on()) __tsan_switch_to_fiber(fiber, kNoOrder);
}
static void acquire(void* p) {
  if (on()) __tsan_acquire(p);
}
static void release(void* p) {
  if (on()) __tsan_release(p);
}
static void write(void* p, size_t size) {
  if (on()) __tsan_write_range(p, size);
}
}  // namespace tsan

// While one lives, memory that this file allocates, fills and frees is none of the
// tested program's business.
struct Unseen {
  Unseen() {
    if (!tsan::on()) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    if (!tsan::on()) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

// ---- changing stacks ----

#if defined(__x86_64__) && !defined(GENREC_SIMULATOR_UCONTEXT)

using Context = void*;  // the stack pointer, below the registers that a call preserves

extern "C" __attribute__((visibility("hidden"))) void genrec_change_stack(Context* from,
                                                                          Context to);
asm(R"(
  .text
  .hidden genrec_change_stack
  .globl genrec_change_stack
  .type genrec_change_stack, @function
genrec_change_stack:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
  .size genrec_change_stack, . - genrec_change_stack
)");

static void change_stack(Context& from, Context& to) { genrec_change_stack(&from, to); }

static void prepare(Context& context, char* bottom, size_t size, void (*entry)()) {
  // Six registers, the address to return to, and a word that keeps the alignment
  // of a called function.
  void** sp = reinterpret_cast<void**>(bottom + size) - 8;
  std::fill(sp, sp + 8, nullptr);
  sp[6] = reinterpret_cast<void*>(entry);
  context = sp;
}

#else

using Context = ucontext_t;

static void change_stack(Context& from, Context& to) { swapcontext(&from, &to); }

static void prepare(Context& context, char* bottom, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = bottom;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace genrec::simulator {

namespace {

constexpr size_t kGuard = 4096, kStack = size_t{128} << 10;
constexpr int kMaxThreads = 1024, kMaxCluster = 8, kWarp = 32;
constexpr size_t kPlainShared = size_t{48} << 10;
// Fibers that ThreadSanitizer knows before old ones are taken again.  One that is
// taken again hides races between its two blocks; more of them cost time.
constexpr size_t kTsanFibers = 1500;
// A thread that does this many atomics in a row spins: others come first.
constexpr int kSpins = 1000;
// And this many, with no thread meeting another or returning, are a wait without end.
constexpr int64_t kEndless = 1'000'000;

enum class State { ready, waiting, yielded, returned };

// A stack, and the thread that ThreadSanitizer takes it for.
struct Stack {
  char* memory;
  void* tsan;
  char* bottom() const { return memory + kGuard; }
};

struct Block;

struct Fiber {
  Context context{};
  Stack stack{};
  void* asan_stack = nullptr;
  Block* block = nullptr;
  unsigned block_number = 0;  // in the grid
  int index = 0, spins = 0;   // in the block
  State state = State::ready;
  const char* doing = "";  // while it waits
  Place place{"", 0};
  const void* waits_for = nullptr;
  unsigned mask = 0;  // of the lanes it waits for, 0 at a barrier
  bool fenced = false;
  bool owes_wait = false;                        // has arrived at its cluster's barrier
  unsigned turn = 0;                             // which one that was
  std::deque<std::pair<Copy, unsigned>> copies;  // on their way, with their groups
  unsigned group = 0;                            // of the next one
  std::vector<void*> seen;                       // by atomics, since its last fence
  int lane() const { return index % kWarp; }
};

struct Barrier {
  std::vector<Fiber*> members;
  int arrived = 0, held = 0, result = 0, returned = 0;
  unsigned turn = 0;
  const char* name = "";
  Place place{"", 0};
  char clocks[2];  // addresses that stand for its even and odd turns
};

// One collective of one warp, from its first lane's arrival to its last one's leaving.
struct Meeting {
  unsigned mask = 0, arrived = 0, left = 0;  // free where all are 0
  const char* name = "";
  Place place{"", 0};
  uint64_t values[kWarp];
  char clock;
};

struct SharedArray {
  const void* key;
  char* memory;  // allocated
  char* data;
  size_t bytes, alignment;
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  int live = 0;
  size_t static_bytes = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::vector<std::unique_ptr<Meeting>>> meetings;  // of each warp
  std::vector<SharedArray> shared;                              // the first is the dynamic one
  Barrier barrier;
  Stack start{};  // stands for the block's start, where clusters share memory
  char started, ended;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  int live = 0;
};

struct Device {
  int capability;
  size_t shared;
  int multiprocessors;
};

// Everything of the launch in progress; there is one at a time.
std::mutex one_at_a_time;
Context scheduler{};
void* scheduler_asan = nullptr;
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
void* scheduler_tsan = nullptr;
Fiber* current = nullptr;
Body launch_body = nullptr;
void* launch_arguments = nullptr;
size_t launch_dynamic = 0;
bool launch_raised = false;  // the kernel was told of more than 48 KiB
bool failed = false;
bool random_order = false, reverse_order = false;
int64_t atomics_in_a_row = 0;
char launch_start, launch_end;

std::mt19937_64 chance;
std::deque<Stack> stacks;
size_t stacks_made = 0;
std::map<const void*, size_t> dynamic_limits;
std::string report;
cudaError_t report_code = cudaSuccess, last_error = cudaSuccess;

const char* base_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash == nullptr ? file : slash + 1;
}

std::string text(Place p) { return std::string(base_name(p.file)) + ":" + std::to_string(p.line); }

std::string text(const Fiber& f) {
  return "block " + std::to_string(f.block_number) + " thread " + std::to_string(f.index);
}

std::string lanes(unsigned mask) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

cudaError_t refuse(cudaError_t code, const std::string& why) {
  report = why;
  report_code = code;
  return last_error = code;
}

Device device() {
  const char* wanted = std::getenv("GENREC_SIMULATED_CAPABILITY");
  if (wanted != nullptr && std::strcmp(wanted, "80") == 0) return {80, size_t{163} << 10, 108};
  if (wanted != nullptr && std::strcmp(wanted, "86") == 0) return {86, size_t{99} << 10, 84};
  return {90, size_t{227} << 10, 132};
}

// ---- fibers ----

void to_scheduler(bool for_good) {
  Fiber* me = current;
  asan::leave(for_good ? nullptr : &me->asan_stack, scheduler_bottom, scheduler_size);
  tsan::become(scheduler_tsan);
  change_stack(me->context, scheduler);
  asan::arrive(me->asan_stack, nullptr, nullptr);
}

void resume(Fiber& f) {
  current = &f;
  threadIdx = {static_cast<unsigned>(f.index), 0, 0};
  blockIdx = {f.block_number, 0, 0};
  asan::leave(&scheduler_asan, f.stack.bottom(), kStack);
  tsan::become(f.stack.tsan);
  change_stack(scheduler, f.context);
  asan::arrive(scheduler_asan, nullptr, nullptr);
}

// Ends the launch: this thread goes no further, nor does any other.
[[noreturn]] void fail(const std::string& what) {
  if (!failed) refuse(cudaErrorLaunchFailure, text(*current) + ": " + what);
  failed = true;
  to_scheduler(true);
  std::abort();
}

void wait(const void* event, const char* doing, unsigned mask, Place here) {
  Fiber& me = *current;
  me.state = State::waiting;
  me.waits_for = event;
  me.doing = doing;
  me.mask = mask;
  me.place = here;
  to_scheduler(false);
}

void wake(Fiber* f, const void* event) {
  if (f->state == State::waiting && f->waits_for == event) f->state = State::ready;
}

void block_ends(Block& b) {
  // A peer that reads or writes this memory must have done so before.  To each
  // sanitizer the end is a change of it; without one it turns to NaN.
  if (b.cluster->blocks.size() == 1) return;
  tsan::acquire(&b.ended);
  for (const SharedArray& s : b.shared) {
    tsan::write(s.data, s.bytes);
    Unseen unseen;
    std::memset(s.data, 0xff, s.bytes);
    asan::poison(s.data, s.bytes);
  }
}

void thread_returns() {
  Fiber& me = *current;
  Block& b = *me.block;
  Unseen unseen;
  const auto missed = [&](const char* name, Place place, const std::string& who) {
    fail("returned, but " + who + " wait for it at the " + name + " at " + text(place));
  };
  if (b.barrier.arrived > 0)
    missed(b.barrier.name, b.barrier.place, std::to_string(b.barrier.arrived) + " threads");
  for (const auto& m : b.meetings[me.index / kWarp])
    if (m->arrived != 0 && m->arrived != m->mask && (m->mask >> me.lane() & 1) != 0)
      missed(m->name, m->place, "lanes " + lanes(m->arrived));
  const Barrier& c = b.cluster->barrier;
  if (c.arrived > 0) missed(c.name, c.place, std::to_string(c.arrived) + " threads of the cluster");
  if (!me.copies.empty()) fail("returned with copies on their way");
  if (me.owes_wait) fail("returned, having arrived at the cluster's barrier without a wait for it");
  ++b.barrier.returned;
  ++b.cluster->barrier.returned;
  --b.live;
  --b.cluster->live;
  me.state = State::returned;
  atomics_in_a_row = 0;
}

void fiber_main() {
  asan::arrive(nullptr, &scheduler_bottom, &scheduler_size);
  tsan::acquire(&launch_start);
  if (current->block->start.memory != nullptr) tsan::acquire(&current->block->started);
  launch_body(launch_arguments);
  thread_returns();
  Block& b = *current->block;
  tsan::release(&b.ended);
  if (b.live == 0) block_ends(b);
  tsan::release(&launch_end);
  to_scheduler(true);
  std::abort();
}

Stack take_stack() {
  if (!stacks.empty() && (!tsan::on() || stacks_made >= kTsanFibers)) {
    const Stack s = stacks.front();
    stacks.pop_front();
    return s;
  }
  void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
    std::perror("cuda simulator: no memory for a stack");
    std::abort();
  }
  ++stacks_made;
  return {static_cast<char*>(memory), tsan::create()};
}

void give_stack(const Stack& s, bool finished) {
  asan::unpoison(s.bottom(), kStack);
  // ThreadSanitizer still sees one that stopped midway in the calls it was in.
  if (finished || !tsan::on())
    stacks.push_back(s);
  else
    --stacks_made;
}

// ---- shared memory ----

// Uninitialised memory is all ones: NaN, or -1.  It is aligned to `alignment` and no
// better, so that a wider access shows; an allocation each, so that
// AddressSanitizer sees its ends.
SharedArray& make_shared_array(Block& b, const void* key, size_t bytes, size_t alignment) {
  const size_t unit = 2 * std::max<size_t>(alignment, 16);
  const size_t pad = alignment < 16 ? 16 + alignment : alignment;
  const size_t all = (pad + bytes + unit) / unit * unit;
  char* memory = static_cast<char*>(std::aligned_alloc(unit, all));
  char* data = memory + pad;
  std::memset(memory, 0xff, all);
  asan::poison(memory, all);
  asan::unpoison(data, bytes);
  b.shared.push_back({key, memory, data, bytes, alignment});
  if (b.start.memory != nullptr) {
    // As if the block's start had written it: a peer needs a barrier in between.
    void* back = tsan::current();
    tsan::become(b.start.tsan);
    tsan::write(data, bytes);
    tsan::release(&b.started);
    tsan::become(back);
  }
  return b.shared.back();
}

SharedArray* find_shared(Block& b, const void* key) {
  for (SharedArray& s : b.shared)
    if (s.key == key) return &s;
  return nullptr;
}

// ---- clusters ----

std::unique_ptr<Cluster> start_cluster(const cudaLaunchConfig_t& config, unsigned size,
                                       int64_t number) {
  auto cluster = std::make_unique<Cluster>();
  const int threads = static_cast<int>(config.blockDim.x);
  for (unsigned rank = 0; rank < size; ++rank) {
    cluster->blocks.push_back(std::make_unique<Block>());
    Block& b = *cluster->blocks.back();
    b.cluster = cluster.get();
    b.rank = rank;
    b.live = threads;
    b.meetings.resize(static_cast<size_t>((threads + kWarp - 1) / kWarp));
    if (size > 1) b.start = take_stack();
    for (int i = 0; i < threads; ++i) {
      b.fibers.push_back(std::make_unique<Fiber>());
      Fiber& f = *b.fibers.back();
      f.block_number = static_cast<unsigned>(number * size) + rank;
      f.block = &b;
      f.index = i;
      f.stack = take_stack();
      prepare(f.context, f.stack.bottom(), kStack, fiber_main);
      b.barrier.members.push_back(&f);
      cluster->barrier.members.push_back(&f);
    }
    cluster->live += threads;
    make_shared_array(b, nullptr, launch_dynamic, 16);
  }
  return cluster;
}

void end_cluster(std::unique_ptr<Cluster> cluster) {
  for (const auto& b : cluster->blocks) {
    for (const auto& f : b->fibers) give_stack(f->stack, f->state == State::returned);
    if (b->start.memory != nullptr) give_stack(b->start, true);
    for (const SharedArray& s : b->shared) {
      asan::unpoison(s.memory, static_cast<size_t>(s.data - s.memory) + s.bytes);
      std::free(s.memory);
    }
  }
}

std::string account_of(const std::deque<std::unique_ptr<Cluster>>& clusters) {
  std::map<std::string, std::pair<int, const Fiber*>> groups;
  for (const auto& c : clusters)
    for (const auto& b : c->blocks)
      for (const auto& f : b->fibers) {
        std::string what = "returned";
        if (f->state == State::waiting)
          what = std::string("wait at the ") + f->doing + " at " + text(f->place) +
                 (f->mask != 0 ? " for lanes " + lanes(f->mask) : "");
        if (f->state == State::yielded || f->state == State::ready) what = "spin at an atomic";
        auto& group = groups[what];
        if (group.first++ == 0) group.second = f.get();
      }
  std::string all;
  for (const auto& [what, group] : groups)
    all += "\n  " + std::to_string(group.first) + " threads " + what + ", the first of them " +
           text(*group.second);
  return all;
}

// One pass over every thread that is not done; false where none could move.
bool pass(std::vector<Fiber*>& order) {
  if (random_order) std::shuffle(order.begin(), order.end(), chance);
  bool moved = false;
  for (Fiber* f : order) {
    if (f->state == State::yielded) {
      f->state = State::ready;
      moved = true;
      continue;
    }
    if (f->state != State::ready) continue;
    moved = true;
    // Some threads fall behind, further than one barrier's worth of others' work.
    if (random_order && chance() % 4 == 0) continue;
    resume(*f);
    if (failed) return true;
  }
  return moved;
}

}  // namespace

cudaError_t set_dynamic_shared(const void* kernel, int bytes) {
  const std::lock_guard lock(one_at_a_time);
  const size_t limit = device().shared;
  if (bytes < 0 || static_cast<size_t>(bytes) > limit)
    return refuse(cudaErrorInvalidValue, "a launch asks for " + std::to_string(bytes) +
                                             " bytes of dynamic shared memory; this device has " +
                                             std::to_string(limit) + " a block");
  dynamic_limits[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

static bool read_order() {
  const char* order = std::getenv("GENREC_SIMULATOR_ORDER");
  const std::string wanted = order == nullptr ? "forward" : order;
  static std::string seeded;  // launches of one process go on with one generator
  random_order = wanted.rfind("random:", 0) == 0 && wanted.size() > 7 &&
                 wanted.find_first_not_of("0123456789", 7) == std::string::npos;
  reverse_order = wanted == "reverse";
  if (random_order && seeded != wanted) {
    chance.seed(std::strtoull(wanted.c_str() + 7, nullptr, 10));
    seeded = wanted;
  }
  return random_order || reverse_order || wanted == "forward";
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, Body body, void* arguments) {
  const std::lock_guard lock(one_at_a_time);
  const Device limits = device();
  const unsigned threads = config.blockDim.x, blocks = config.gridDim.x;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = config.attrs[i].val.clusterDim.x;
  if (!read_order())
    return refuse(cudaErrorInvalidValue,
                  "GENREC_SIMULATOR_ORDER must be forward, reverse or random:<seed>");
  if (threads == 0 || threads > kMaxThreads)
    return refuse(cudaErrorInvalidConfiguration, "a launch of " + std::to_string(threads) +
                                                     " threads a block; 1 to 1024 are possible");
  if (blocks == 0 || blocks > 0x7fffffffu)
    return refuse(cudaErrorInvalidConfiguration,
                  "a launch of " + std::to_string(blocks) + " blocks");
  if (cluster > 1 && limits.capability < 90)
    return refuse(cudaErrorNotSupported,
                  "a launch of clusters on a device of compute capability 8.0");
  if (cluster == 0 || cluster > kMaxCluster)
    return refuse(
        cudaErrorInvalidClusterSize,
        "a launch of clusters of " + std::to_string(cluster) + " blocks; 1 to 8 are portable");
  if (blocks % cluster != 0)
    return refuse(cudaErrorInvalidConfiguration, "a grid of " + std::to_string(blocks) +
                                                     " blocks is no multiple of its clusters' " +
                                                     std::to_string(cluster));
  const auto raised = dynamic_limits.find(kernel);
  const size_t allowed =
      std::max(kPlainShared, raised == dynamic_limits.end() ? size_t{0} : raised->second);
  if (config.dynamicSmemBytes > allowed)
    return refuse(cudaErrorInvalidValue, "a launch with " +
                                             std::to_string(config.dynamicSmemBytes) +
                                             " bytes of dynamic shared memory, where the kernel is "
                                             "allowed " +
                                             std::to_string(allowed));
  Unseen unseen;
  launch_body = body;
  launch_arguments = arguments;
  launch_dynamic = config.dynamicSmemBytes;
  launch_raised = raised != dynamic_limits.end();
  scheduler_tsan = tsan::current();
  failed = false;
  atomics_in_a_row = 0;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  tsan::release(&launch_start);

  const int64_t count = blocks / cluster;
  std::vector<uint32_t> shuffled;
  if (random_order) {
    for (int64_t i = 0; i < count; ++i) shuffled.push_back(static_cast<uint32_t>(i));
    std::shuffle(shuffled.begin(), shuffled.end(), chance);
  }
  const size_t resident = random_order ? 1 + chance() % 3 : 1;
  std::deque<std::unique_ptr<Cluster>> active;
  std::vector<Fiber*> order;
  for (int64_t next = 0; !failed;) {
    bool changed = false;
    for (size_t i = 0; i < active.size();) {
      if (active[i]->live > 0) {
        ++i;
        continue;
      }
      end_cluster(std::move(active[i]));
      active.erase(active.begin() + static_cast<std::ptrdiff_t>(i));
      changed = true;
    }
    for (; active.size() < resident && next < count; ++next, changed = true)
      active.push_back(start_cluster(config, cluster,
                                     random_order    ? shuffled[static_cast<size_t>(next)]
                                     : reverse_order ? count - 1 - next
                                                     : next));
    if (active.empty()) break;
    if (changed) {
      order.clear();
      for (const auto& c : active)
        for (Fiber* f : c->barrier.members) order.push_back(f);
      if (reverse_order) std::reverse(order.begin(), order.end());
    }
    const bool moved = pass(order);
    if (!failed && !moved) {
      refuse(cudaErrorLaunchFailure, "deadlock: no thread can go on" + account_of(active));
      failed = true;
    }
  }
  current = nullptr;
  // What stopped midway happened before what the caller does next, too.
  for (const auto& c : active)
    for (const Fiber* f : c->barrier.members) {
      tsan::become(f->stack.tsan);
      tsan::release(&launch_end);
      tsan::become(scheduler_tsan);
    }
  for (auto& c : active) end_cluster(std::move(c));
  tsan::acquire(&launch_end);
  return failed ? report_code : cudaSuccess;
}

// ---- what kernels call ----

void fail_at(const char* what, Place here) {
  Unseen unseen;
  fail(std::string(what) + ", at " + text(here));
}

int lane() { return current->lane(); }

unsigned rank_in_cluster() { return current->block->rank; }

void* dynamic_shared() {
  Block& b = *current->block;
  if (b.start.memory != nullptr) tsan::acquire(&b.started);
  return b.shared.front().data;
}

void* static_shared(const void* key, const char* name, size_t bytes, size_t alignment, Place here) {
  Block& b = *current->block;
  SharedArray* s = find_shared(b, key);
  if (s == nullptr) {
    Unseen unseen;
    b.static_bytes += bytes;
    const size_t limit = device().shared;
    if (b.static_bytes > kPlainShared)
      fail(std::string("static shared memory of ") + std::to_string(b.static_bytes) +
           " bytes with " + name + " at " + text(here) + "; 48 KiB are possible");
    if (!launch_raised && b.static_bytes + launch_dynamic > kPlainShared)
      fail("shared memory of " + std::to_string(b.static_bytes + launch_dynamic) + " bytes with " +
           name + " at " + text(here) + ", where the kernel is allowed 48 KiB");
    if (b.static_bytes + launch_dynamic > limit)
      fail(std::string("shared memory of ") + std::to_string(b.static_bytes + launch_dynamic) +
           " bytes with " + name + " at " + text(here) + "; this device has " +
           std::to_string(limit) + " a block");
    s = &make_shared_array(b, key, bytes, alignment);
  }
  if (b.start.memory != nullptr) tsan::acquire(&b.started);
  return s->data;
}

void* peer_shared(void* mine, unsigned rank, Place here) {
  Unseen unseen;
  Block& b = *current->block;
  Cluster& c = *b.cluster;
  if (rank >= c.blocks.size())
    fail("cluster_peer of rank " + std::to_string(rank) + " in a cluster of " +
         std::to_string(c.blocks.size()) + ", at " + text(here));
  Block& peer = *c.blocks[rank];
  for (const SharedArray& s : b.shared) {
    const std::ptrdiff_t offset = static_cast<char*>(mine) - s.data;
    if (offset < 0 || offset > static_cast<std::ptrdiff_t>(s.bytes)) continue;
    if (peer.live == 0)
      fail("cluster_peer of block " + std::to_string(rank) +
           " of the cluster, which has ended, at " + text(here));
    SharedArray* theirs = find_shared(peer, s.key);
    if (theirs == nullptr) {
      peer.static_bytes += s.bytes;
      theirs = &make_shared_array(peer, s.key, s.bytes, s.alignment);
    }
    return theirs->data + offset;
  }
  fail("cluster_peer of what is not shared memory of this block, at " + text(here));
}

// One more thread is at the barrier: true if it is the last.
static bool arrive(Barrier& b, const char* name, bool predicate, Place here, const char* whose) {
  if (b.returned > 0)
    fail(std::string("waits at the ") + name + " at " + text(here) + ", but " +
         std::to_string(b.returned) + " threads of the " + whose + " have returned");
  if (b.arrived > 0 && (b.place.line != here.line || std::strcmp(b.place.file, here.file) != 0 ||
                        std::strcmp(b.name, name) != 0))
    fail(std::string("waits at the ") + name + " at " + text(here) + ", but " +
         std::to_string(b.arrived) + " threads of the " + whose + " at another barrier, the " +
         b.name + " at " + text(b.place));
  if (b.arrived == 0) {
    b.held = 0;
    b.name = name;
    b.place = here;
  }
  b.held += predicate ? 1 : 0;
  tsan::release(&b.clocks[b.turn & 1]);
  if (++b.arrived < static_cast<int>(b.members.size())) return false;
  b.arrived = 0;
  b.result = b.held;
  ++b.turn;
  atomics_in_a_row = 0;
  for (Fiber* f : b.members) wake(f, &b);
  return true;
}

static int meet(Barrier& b, const char* name, bool predicate, Place here, const char* whose) {
  Unseen unseen;
  char* clock = &b.clocks[b.turn & 1];
  if (!arrive(b, name, predicate, here, whose)) wait(&b, name, 0, here);
  tsan::acquire(clock);
  return b.result;
}

int block_barrier(const char* name, bool predicate, Place here) {
  return meet(current->block->barrier, name, predicate, here, "block");
}

void arrive_at_cluster(Place here) {
  Unseen unseen;
  Fiber& me = *current;
  Barrier& b = me.block->cluster->barrier;
  if (me.owes_wait) fail("arrives twice at the cluster's barrier, at " + text(here));
  me.owes_wait = true;
  me.turn = b.turn;
  arrive(b, "cluster_arrive", true, here, "cluster");
}

void wait_for_cluster(Place here) {
  Unseen unseen;
  Fiber& me = *current;
  Barrier& b = me.block->cluster->barrier;
  if (!me.owes_wait)
    fail("waits at the cluster's barrier without having arrived, at " + text(here));
  me.owes_wait = false;
  if (b.turn == me.turn) wait(&b, "cluster_wait", 0, here);
  tsan::acquire(&b.clocks[me.turn & 1]);
}

void cluster_barrier(Place here) {
  if (current->owes_wait) fail("arrives twice at the cluster's barrier, at " + text(here));
  meet(current->block->cluster->barrier, "cluster_sync", true, here, "cluster");
}

void copy_later(Copy copy, Place here) {
  Unseen unseen;
  if (reinterpret_cast<uintptr_t>(copy.to) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(copy.from) % 16 != 0)
    fail("an asynchronous copy of 16 bytes that are not aligned to that, at " + text(here));
  current->copies.emplace_back(copy, current->group);
}

void end_group() { ++current->group; }

bool next_copy(Copy& copy, int newest_groups) {
  Unseen unseen;
  Fiber& me = *current;
  if (me.copies.empty()) return false;
  const auto [oldest, group] = me.copies.front();
  if (newest_groups >= 0 && group + static_cast<unsigned>(newest_groups) >= me.group) return false;
  me.copies.pop_front();
  copy = oldest;
  return true;
}

// The lanes of one mask meet in one collective; others of the warp go their own way.
static Meeting& gather(const char* name, unsigned mask, uint64_t value, Place here, bool orders) {
  Fiber& me = *current;
  Block& b = *me.block;
  const unsigned bit = 1u << me.lane();
  const int first = me.index - me.lane();
  const auto what = [&] {
    return std::string(name) + " at " + text(here) + " with mask " + lanes(mask);
  };
  if ((mask & bit) == 0)
    fail("the mask lacks the lane that calls, lane " + std::to_string(me.lane()) + ": " + what());
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (first + i >= static_cast<int>(b.fibers.size()))
      fail("the mask names lane " + std::to_string(i) +
           ", which the block does not have: " + what());
    if (b.fibers[static_cast<size_t>(first + i)]->state == State::returned)
      fail("the mask names lane " + std::to_string(i) + ", which has returned: " + what());
  }
  auto& meetings = b.meetings[static_cast<size_t>(me.index / kWarp)];
  Meeting* meeting = nullptr;
  for (const auto& m : meetings)
    if (m->mask == mask && m->arrived != 0 && m->arrived != mask) meeting = m.get();
  if (meeting != nullptr && std::strcmp(meeting->name, name) != 0)
    fail("lanes " + lanes(meeting->arrived) + " of its mask wait in another collective, the " +
         meeting->name + " at " + text(meeting->place) + ": " + what());
  // One that is over serves the same lanes again; others would inherit its order.
  if (meeting == nullptr)
    for (const auto& m : meetings)
      if (m->mask == mask && m->arrived == 0) meeting = m.get();
  if (meeting == nullptr) {
    meetings.push_back(std::make_unique<Meeting>());
    meeting = meetings.back().get();
    meeting->mask = mask;
  }
  if (meeting->arrived == 0) {
    meeting->left = 0;
    meeting->name = name;
    meeting->place = here;
  }
  meeting->values[me.lane()] = value;
  meeting->arrived |= bit;
  if (orders) tsan::release(&meeting->clock);
  if (meeting->arrived == mask) {
    for (int i = 0; i < kWarp; ++i)
      if ((mask >> i & 1) != 0) wake(b.fibers[static_cast<size_t>(first + i)].get(), meeting);
  } else {
    wait(meeting, name, mask, here);
  }
  if (orders) tsan::acquire(&meeting->clock);
  return *meeting;
}

static void leave(Meeting& m) {
  m.left |= 1u << current->lane();
  if (m.left == m.mask) m.arrived = 0;
}

void meet_lanes(const char* name, unsigned mask, uint64_t value, uint64_t (&all)[32], Place here) {
  Unseen unseen;
  Meeting& m = gather(name, mask, value, here, false);
  for (int i = 0; i < kWarp; ++i) all[i] = m.values[i];
  leave(m);
}

void sync_lanes(unsigned mask, Place here) {
  Unseen unseen;
  leave(gather("__syncwarp", mask, 0, here, true));
}

// An atomic orders nothing by itself.  After a fence it hands on what its thread
// did before; what it saw is taken over by its thread's next fence.
void before_atomic(void* address) {
  Fiber& me = *current;
  if (tsan::on()) {
    Unseen unseen;
    if (me.fenced) tsan::release(address);
    if (std::find(me.seen.begin(), me.seen.end(), address) == me.seen.end())
      me.seen.push_back(address);
  }
  if (++atomics_in_a_row > kEndless)
    fail("does atomics without end, and no thread meets another or returns");
  if (++me.spins >= kSpins || (random_order && chance() % 4 == 0)) {
    me.spins = 0;
    me.state = State::yielded;
    to_scheduler(false);
  }
}

void fence() {
  Fiber& me = *current;
  if (!tsan::on()) return;
  Unseen unseen;
  for (void* address : me.seen) tsan::acquire(address);
  me.seen.clear();
  me.fenced = true;
}

}  // namespace genrec::simulator

// ---- the runtime ----

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const auto device = genrec::simulator::device();
  switch (which) {
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device.capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(device.shared); break;
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t code = genrec::simulator::last_error;
  genrec::simulator::last_error = cudaSuccess;
  return code;
}

const char* cudaGetErrorString(cudaError_t code) {
  using namespace genrec::simulator;
  if (code == cudaSuccess) return "no error";
  if (code == report_code) return report.c_str();
  return code == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                               : "invalid argument";
}
