// CUDA kernels of constrained decoding.  Torch-free: raw pointers and a stream in,
// an error code out.
//
// One launch a step.  A user is taken by one block, or on devices with clusters by
// up to eight: each normalises the rows of its own beams, then all choose together.
// A candidate is ordered by (key, parent, node), no two alike, so equal input gives
// equal bits.  There are two ways to choose:
//
// - `best_children`, for beam search of up to 256 beams and widths: a block keeps its
//   candidates in shared memory, drops those that can no longer win whenever that is
//   full, and sorts the rest; the blocks of a user then look up each other's lists for
//   the rank of their own.
// - `step_users`, for wider steps and for sampling: radix selection.  A histogram of
//   the candidates' highest digit tells where the last that is kept lies, then the next
//   digit of those that share it, until what is kept is known exactly.  Candidates are
//   not stored: each pass computes them anew from the logits, which are in cache by then.
//
// No index is trusted and nothing waits for the device, so every call can be captured
// in a graph.
#include "common/row_cuda.cuh"
#include "trie/filter.h"
#include "trie/gumbel.h"
#include "trie/kernels.h"

namespace genrec::trie {
namespace {

using namespace genrec::cuda;

constexpr int kStepThreads = 256;
constexpr int kWarps = kStepThreads / kWarp;
constexpr int kBins = 2048;
constexpr int kBinsAThread = kBins / kStepThreads;

// What a beam's children are scored with.
struct BeamState {
  float top, base;           // a child's score is (x - top) / temperature + base; base -inf: none
  float perturbed, largest;  // when sampling: the beam's own, and the children's before
};

// A candidate that is kept, in the order of its first three words, best first.
struct Winner {
  uint32_t key;  // falls as the score, or when sampling the perturbed one, rises
  uint32_t parent, node;
  float score;
};

struct Plan {
  int cluster = 1;              // blocks a user
  int warps = 1;                // warps a beam
  int64_t list = 0;             // winners a user has room for: a power of two
  BeamState* states = nullptr;  // [U, W]
  Winner* winners = nullptr;    // [U, list]
};

__device__ __forceinline__ uint32_t falling_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x80000000u) != 0 ? bits : ~bits & 0x7fffffffu;
}
__device__ __forceinline__ float of_falling_key(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key : ~key & 0x7fffffffu);
}

__device__ __forceinline__ bool before(const Winner& a, const Winner& b) {
  if (a.key != b.key) return a.key < b.key;
  if (a.parent != b.parent) return a.parent < b.parent;
  return a.node < b.node;
}

// ---- beams ----

struct Children {
  int64_t begin, end;  // none for a dead beam and for what is no node
};

__device__ __forceinline__ Children children_of(const StepArgs& a, int64_t row) {
  const int64_t node = a.nodes[row];
  if (node < 0 || node >= a.level_nodes || !(a.scores[row] > -INFINITY)) return {0, 0};
  const int64_t begin = a.first_child[node], end = a.first_child[node + 1];
  if (begin < 0 || end > a.next_nodes) return {0, 0};
  return {begin, end};
}

template <class T>
__device__ __forceinline__ const T* row_of(const StepArgs& a, int64_t row) {
  return static_cast<const T*>(a.logits) + row * a.stride;
}

// The threads that take a beam together.
struct Team {
  int index, teams;     // which of the block's
  int thread, threads;  // within it
  int64_t first, step;  // its beams: first, first + step, ...
};

__device__ __forceinline__ Team team_of(const Plan& plan, int rank) {
  const int warp = threadIdx.x / kWarp, threads = plan.warps * kWarp;
  const int index = warp / plan.warps, teams = kWarps / plan.warps;
  return {index,
          teams,
          static_cast<int>(threadIdx.x) % threads,
          threads,
          rank + static_cast<int64_t>(index) * plan.cluster,
          static_cast<int64_t>(teams) * plan.cluster};
}

// The sum of 2^((x - top) rate) so far.
struct Sum {
  float top, e;
};

__device__ __forceinline__ void raise(Sum& a, float top, float rate) {
  if (!(top > a.top)) return;
  a.e *= power_of_two((a.top - top) * rate);  // a NaN stays
  a.top = top;
}

__device__ __forceinline__ void add(Sum& a, float x, float rate) {
  if (x == -INFINITY) return;
  raise(a, x, rate);
  a.e += power_of_two((x - a.top) * rate);
}

template <class T>
__device__ __forceinline__ void add_pack(Sum& a, const Pack<T>& pack, float rate) {
  float x[Pack<T>::kSize], most = -INFINITY;
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) {
    x[j] = load(&pack.v[j]);
    most = x[j] > most ? x[j] : most;
  }
  raise(a, most, rate);
  // Against a top of -inf a difference is NaN for -inf too; those rows have nothing yet.
  const float top = a.top > -INFINITY ? a.top : 0.f;
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) a.e += power_of_two((x[j] - top) * rate);
}

__device__ __forceinline__ Sum merge(Sum a, Sum b, float rate) {
  const float top = a.top > b.top ? a.top : b.top;
  if (top == -INFINITY) return {top, a.e + b.e};  // 0, or a NaN that must stay
  raise(a, top, rate);
  raise(b, top, rate);
  return {top, a.e + b.e};
}

__device__ __forceinline__ Sum merge_warp(Sum a, float rate) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2)
    a = merge(
        a, {__shfl_xor_sync(0xffffffffu, a.top, width), __shfl_xor_sync(0xffffffffu, a.e, width)},
        rate);
  return a;
}

__device__ __forceinline__ float max_warp(float x) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, width);
    x = other > x ? other : x;
  }
  return x;
}

// One beam's part of a row's sum.
template <class T>
__device__ __forceinline__ Sum sum_part(const StepArgs& a, const UserFilter& filter,
                                        const Children& c, int64_t row, const Team& t) {
  const float rate = a.inv_temperature * static_cast<float>(kLog2e);
  const T* x = row_of<T>(a, row);
  Sum sum{-INFINITY, 0};
  if (a.softmax == Softmax::children) {
    for (int64_t child = c.begin + t.thread; child < c.end; child += t.threads) {
      const int64_t label = a.labels[child];
      if (label >= 0 && label < a.V && may_enter(filter, child)) add(sum, load(x + label), rate);
    }
    return sum;
  }
  const int64_t begin = a.softmax == Softmax::vocab ? 0 : a.level_begin;
  const int64_t end = a.softmax == Softmax::vocab ? a.V : a.level_end;
  const T* from = x + begin;
  read_packs(
      from, Share{0, end - begin}, t.thread, t.threads,
      [&](int64_t, const Pack<T>& pack) { add_pack(sum, pack, rate); },
      [&](int64_t i) { add(sum, load(from + i), rate); });
  return sum;
}

// Calls f(child, score) for the allowed children of positive probability.
template <class T, class F>
__device__ __forceinline__ void each_child(const StepArgs& a, const UserFilter& filter,
                                           const Children& c, const BeamState& state, int64_t row,
                                           const Team& t, const F& f) {
  if (!(state.base > -INFINITY)) return;
  const T* x = row_of<T>(a, row);
  for (int64_t child = c.begin + t.thread; child < c.end; child += t.threads) {
    const int64_t label = a.labels[child];
    if (label < 0 || label >= a.V) continue;
    // Adding 0 makes -0 of 0, whose order would differ.
    const float score = ((load(x + label) - state.top) * a.inv_temperature + state.base) + 0.f;
    if (score > -INFINITY && may_enter(filter, child)) f(child, score);
  }
}

__device__ __forceinline__ float noisy(const StepArgs& a, int64_t user, int64_t child,
                                       float score) {
  return score + gumbel(a.seed, static_cast<uint64_t>(user), a.level, static_cast<uint32_t>(child));
}

// Leaves the states of this block's beams.  Every thread of the block is here.
template <class T, bool kSampling>
__device__ __forceinline__ void prepare_beams(const StepArgs& a, const Plan& plan,
                                              const UserFilter& filter, int64_t user,
                                              const Team& t) {
  GENREC_SHARED(Sum, sums, kWarps);
  GENREC_SHARED(float, tops, kWarps);
  const float rate = a.inv_temperature * static_cast<float>(kLog2e);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp,
            first_warp = t.index * plan.warps;
  // As many rounds for every team, since a round has barriers.
  const int64_t rounds = (a.W + t.step - 1) / t.step;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t beam = t.first + round * t.step, row = user * a.W + beam;
    const Children c = beam < a.W ? children_of(a, row) : Children{0, 0};
    Sum sum{-INFINITY, 0};
    if (c.begin < c.end) sum = sum_part<T>(a, filter, c, row, t);
    sum = merge_warp(sum, rate);
    if (plan.warps > 1) {
      if (lane == 0) sums[warp] = sum;
      __syncthreads();
      sum = sums[first_warp];
      for (int i = 1; i < plan.warps; ++i) sum = merge(sum, sums[first_warp + i], rate);
    }
    BeamState state{sum.top, -INFINITY, 0, 0};
    // The log of the sum is not a number where a logit is NaN or +inf, or none above -inf.
    if (sum.top > -INFINITY && sum.top < INFINITY && sum.e == sum.e) {
      const float base = a.scores[row] - logf(sum.e);
      state.base = base == base ? base : -INFINITY;
    }
    if constexpr (kSampling) {
      if (beam < a.W)
        state.perturbed =
            a.perturbed != nullptr
                ? a.perturbed[row]
                : a.scores[row] + root_gumbel(a.seed, static_cast<uint64_t>(user), beam);
      if (state.perturbed != state.perturbed) state.base = -INFINITY;
      float largest = -INFINITY;
      each_child<T>(a, filter, c, state, row, t, [&](int64_t child, float score) {
        const float g = noisy(a, user, child, score);
        largest = g > largest ? g : largest;
      });
      largest = max_warp(largest);
      if (plan.warps > 1) {
        if (lane == 0) tops[warp] = largest;
        __syncthreads();
        for (int i = 0; i < plan.warps; ++i) {
          const float other = tops[first_warp + i];
          largest = other > largest ? other : largest;
        }
      }
      state.largest = largest;
    }
    if (t.thread == 0 && beam < a.W) plan.states[row] = state;
    if (plan.warps > 1) __syncthreads();  // whoever still reads what the next round writes
  }
  __syncthreads();
}

// Calls f(winner) for each candidate of this thread.
template <class T, bool kSampling, class F>
__device__ __forceinline__ void each_candidate(const StepArgs& a, const Plan& plan,
                                               const UserFilter& filter, int64_t user,
                                               const Team& t, const F& f) {
  for (int64_t beam = t.first; beam < a.W; beam += t.step) {
    const int64_t row = user * a.W + beam;
    const Children c = children_of(a, row);
    if (c.begin >= c.end) continue;
    const BeamState state = plan.states[row];
    each_child<T>(a, filter, c, state, row, t, [&](int64_t child, float score) {
      float key = score;
      if constexpr (kSampling) {
        key = carried_down(noisy(a, user, child, score), state.largest, state.perturbed) + 0.f;
        if (!(key > -INFINITY)) return;
      }
      f(Winner{falling_key(key), static_cast<uint32_t>(beam), static_cast<uint32_t>(child), score});
    });
  }
}

// ---- selection ----

// The last candidate that is kept, as far as it is known: the words before `word`
// whole, that one in the bits of `mask`.
struct Bound {
  uint32_t key = 0, parent = 0, node = 0, mask = 0;
  int word = 0;

  // -1 where a candidate comes before all that share what is known, 0 where it does
  // share it, 1 where it comes after.
  __device__ __forceinline__ int side(const Winner& w) const {
    uint32_t mine = w.key, its = key;
    if (word > 0 && mine == its) mine = w.parent, its = parent;
    if (word > 1 && w.key == key && mine == its) mine = w.node, its = node;
    // An earlier word decides whole; the one in question is cut.
    const bool cut = word == 0 || (w.key == key && (word == 1 || w.parent == parent));
    if (cut) mine &= mask;
    return mine < its ? -1 : mine > its ? 1 : 0;
  }

  // Bits of the word in question become known, the last of them at `shift`.
  __device__ __forceinline__ void learn(uint32_t bits, uint32_t span, int shift) {
    const uint32_t more = bits << shift;
    if (word == 0) key |= more;
    if (word == 1) parent |= more;
    if (word == 2) node |= more;
    mask |= span << shift;
    if (shift == 0 && word < 2) ++word, mask = 0;
  }
};

// Where a bin lies, so that the threads of a warp, with kBinsAThread bins each, read
// neighbouring words at a time.
__device__ __forceinline__ int place_of_bin(uint32_t bin) {
  return static_cast<int>(bin % kBinsAThread * kStepThreads + bin / kBinsAThread);
}

// Which bin holds the candidate number `wanted`, counted from 1, over the cluster.
struct Found {
  int bin;
  uint32_t before, inside;  // candidates in lower bins, and in it
  uint32_t total;
};

// Every thread of the cluster is here, its blocks' histograms complete.
__device__ __forceinline__ Found find_bin(uint32_t* bins, int cluster, uint32_t wanted) {
  GENREC_SHARED(uint32_t, warp_counts, kWarps);
  GENREC_SHARED(Found, shared_found, 1);
  if (cluster > 1)
    cluster_sync();
  else
    __syncthreads();
  uint32_t mine[kBinsAThread] = {}, count = 0;
  const int first = static_cast<int>(threadIdx.x) * kBinsAThread;
  for (int block = 0; block < cluster; ++block) {
    const uint32_t* from = cluster > 1 ? cluster_peer(bins, static_cast<unsigned>(block)) : bins;
#pragma unroll
    for (int i = 0; i < kBinsAThread; ++i) mine[i] += from[i * kStepThreads + threadIdx.x];
  }
#pragma unroll
  for (int i = 0; i < kBinsAThread; ++i) count += mine[i];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint32_t up_to = count;
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, up_to, static_cast<unsigned>(by));
    if (lane >= by) up_to += other;
  }
  if (lane == kWarp - 1) warp_counts[warp] = up_to;
  __syncthreads();
  uint32_t earlier = 0, total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) earlier += warp_counts[i];
    total += warp_counts[i];
  }
  uint32_t before = earlier + up_to - count;
  if (before < wanted && wanted <= before + count) {
#pragma unroll
    for (int i = 0; i < kBinsAThread; ++i) {
      if (before < wanted && wanted <= before + mine[i])
        shared_found[0] = {first + i, before, mine[i], total};
      before += mine[i];
    }
  }
  if (threadIdx.x == 0 && total < wanted) shared_found[0] = {-1, total, 0, total};
  // The other blocks have read this one's histogram.
  if (cluster > 1)
    cluster_sync();
  else
    __syncthreads();
  return shared_found[0];
}

// Sorts n winners, n a power of two, in shared or in global memory.
__device__ __forceinline__ void sort_winners(Winner* list, int64_t n) {
  for (int64_t run = 2; run <= n; run *= 2) {
    for (int64_t gap = run / 2; gap > 0; gap /= 2) {
      for (int64_t pair = threadIdx.x; pair < n / 2; pair += kStepThreads) {
        const int64_t i = 2 * pair - (pair & (gap - 1)), j = i + gap;
        const bool up = (i & run) == 0;
        const Winner x = list[i], y = list[j];
        if (before(y, x) == up) list[i] = y, list[j] = x;
      }
      __syncthreads();
    }
  }
}

constexpr int64_t kSharedList = 1024;

template <class T, bool kSampling>
__global__ void __launch_bounds__(kStepThreads, kSampling ? 2 : 4)
    step_users(StepArgs a, Plan plan) {
  GENREC_SHARED(uint32_t, bins, kBins);
  GENREC_SHARED(Winner, sorted, kSharedList);
  GENREC_SHARED(uint32_t, slots, 1);
  const int rank = plan.cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int64_t user = blockIdx.x / plan.cluster;
  const UserFilter filter = filter_of(a.filter, user);
  const Team t = team_of(plan, rank);
  if (threadIdx.x == 0) slots[0] = 0;
  prepare_beams<T, kSampling>(a, plan, filter, user, t);

  // Digits of the key, then of the parent, then of the node, highest first, until the
  // kept ones are known: most often two or three.
  Bound bound;
  uint32_t wanted = static_cast<uint32_t>(a.width), kept = wanted;
  for (int digit = 0; digit < 9; ++digit) {
    const int shift = digit % 3 == 0 ? 21 : digit % 3 == 1 ? 10 : 0;
    const uint32_t span = shift == 0 ? 1023u : 2047u;
    for (int i = threadIdx.x; i < kBins; i += kStepThreads) bins[i] = 0;
    __syncthreads();
    each_candidate<T, kSampling>(a, plan, filter, user, t, [&](const Winner& w) {
      if (bound.side(w) != 0) return;
      const uint32_t word = bound.word == 0 ? w.key : bound.word == 1 ? w.parent : w.node;
      atomicAdd(&bins[place_of_bin(word >> shift & span)], 1u);
    });
    const Found found = find_bin(bins, plan.cluster, wanted);
    if (found.bin < 0) {  // fewer than the width: all are kept, and nothing is known yet
      kept = found.total;
      break;
    }
    bound.learn(static_cast<uint32_t>(found.bin), span, shift);
    wanted -= found.before;
    if (wanted == found.inside) break;
  }

  // The kept ones meet in one list, in any order, and are sorted there.  Logits that
  // someone writes meanwhile could make other candidates of this pass than were
  // counted: more than were kept have no place, and fewer are as many as came.
  Winner* list = plan.winners + user * plan.list;
  uint32_t* counter = plan.cluster > 1 ? cluster_peer(slots, 0) : slots;
  each_candidate<T, kSampling>(a, plan, filter, user, t, [&](const Winner& w) {
    if (bound.side(w) > 0) return;
    const uint32_t place = atomicAdd(counter, 1u);
    if (place < kept) list[place] = w;
  });
  if (plan.cluster > 1)
    cluster_sync();
  else
    __syncthreads();
  if (rank != 0) return;
  if (slots[0] < kept) kept = slots[0];
  int64_t n = 1;
  while (n < kept) n *= 2;
  const Winner last{0xffffffffu, 0xffffffffu, 0xffffffffu, 0};
  const bool fits = n <= kSharedList;
  for (int64_t i = threadIdx.x; i < n; i += kStepThreads) {
    if (fits)
      sorted[i] = i < kept ? list[i] : last;
    else if (i >= kept)
      list[i] = last;
  }
  __syncthreads();
  if (fits) list = sorted;
  sort_winners(list, n);
  for (int64_t i = threadIdx.x; i < a.width; i += kStepThreads) {
    const int64_t o = user * a.width + i;
    const bool real = i < kept;
    const Winner w = real ? list[i] : last;
    const float key = real ? of_falling_key(w.key) : -INFINITY;
    a.out_scores[o] = kSampling && real ? w.score : key;
    if constexpr (kSampling) a.out_perturbed[o] = key;
    a.out_parent[o] = real ? static_cast<int64_t>(w.parent) : -1;
    a.out_token[o] = real ? a.labels[w.node] : -1;
    a.out_node[o] = real ? static_cast<int64_t>(w.node) : -1;
  }
}

// ---- beam search in shared memory ----

constexpr int kMostBeams = kStepThreads, kMostWidth = 256;
// Candidates that a block holds at a time, and how many it adds between two looks.
constexpr int kRoom = 2048, kAdded = 1024;
constexpr uint64_t kNoCandidate = ~uint64_t{0};

// A beam of this block, in shared memory.
struct Beam {
  int32_t begin, count;  // its children
  float score, top, base;
};

// The 16-byte packs of a row's part [from, from + n), and what lies beside them.
template <class T>
struct RowPart {
  static constexpr int kSize = Pack<T>::kSize, kAhead = 16 / kSize;
  struct Batch {
    Pack<T> packs[kAhead];
  };
  const T* from;
  int first, packs, n;

  __device__ RowPart(const T* row, int begin, int end) : from(row + begin), n(end - begin) {
    const int64_t lead = before_boundary(from);
    first = lead < n ? static_cast<int>(lead) : n;
    packs = (n - first) / kSize;
  }

  // Packs k, k + threads, ...; -inf where there is none.
  __device__ __forceinline__ Batch load_batch(int k, int threads) const {
    Batch batch;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (k + j * threads < packs) {
        batch.packs[j] = load_pack(from + first + (k + j * threads) * kSize);
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i) store(&batch.packs[j].v[i], -INFINITY);
      }
    }
    return batch;
  }

  // This thread's part of the sum.  `batch` is its first one; the next is on its way
  // while one is added.
  __device__ __forceinline__ Sum sum(Batch batch, int thread, int threads, float rate) const {
    Sum sum{-INFINITY, 0};
    for (int k = thread; k < packs; k += kAhead * threads) {
      const Batch next = load_batch(k + kAhead * threads, threads);
      float most = -INFINITY;
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float x = load(&batch.packs[j].v[i]);
          most = x > most ? x : most;
        }
      raise(sum, most, rate);
      // Against a top of -inf a difference is NaN for -inf too; those rows have nothing yet.
      const float top = sum.top > -INFINITY ? sum.top : 0.f;
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          sum.e += power_of_two((load(&batch.packs[j].v[i]) - top) * rate);
      batch = next;
    }
    for (int i = thread; i < first; i += threads) add(sum, load(from + i), rate);
    for (int i = first + packs * kSize + thread; i < n; i += threads)
      add(sum, load(from + i), rate);
    return sum;
  }
};

// Sorts list[0 .. n), n a power of two.
__device__ __forceinline__ void sort_keys(uint64_t* list, int n) {
  for (int run = 2; run <= n; run *= 2) {
    for (int gap = run / 2; gap > 0; gap /= 2) {
      for (int pair = static_cast<int>(threadIdx.x); pair < n / 2; pair += kStepThreads) {
        const int i = 2 * pair - (pair & (gap - 1)), j = i + gap;
        const bool up = (i & run) == 0;
        const uint64_t x = list[i], y = list[j];
        if ((y < x) == up) list[i] = y, list[j] = x;
      }
      // Up to 32 apart, a warp's 32 pairs are 64 entries that no other warp touches.
      const int next = gap > 1 ? gap / 2 : run;
      if (gap <= kWarp && next <= kWarp)
        __syncwarp();
      else
        __syncthreads();
    }
  }
  __syncthreads();
}

// Adds a warp's candidates to the room, which holds them.  Every lane is here.
__device__ __forceinline__ void push(uint64_t* room, uint32_t* count, uint64_t candidate) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned with = __ballot_sync(0xffffffffu, candidate != kNoCandidate);
  if (with == 0) return;
  const int first = __ffs(static_cast<int>(with)) - 1;
  uint32_t place = 0;
  if (lane == first) place = atomicAdd(count, static_cast<uint32_t>(__popc(with)));
  place = __shfl_sync(0xffffffffu, place, first);
  if (candidate != kNoCandidate) room[place + __popc(with & ((1u << lane) - 1u))] = candidate;
}

// Leaves at the room's start, in any order, the candidates that may be among the best
// `width` of its `count`, and few others; returns their number.  A histogram over the
// range of their keys tells which those are.  Every thread of the block is here.
__device__ __forceinline__ int thin_out(uint64_t* room, int count, int width) {
  constexpr int kSteps = kStepThreads;  // a thread counts one
  GENREC_SHARED(uint32_t, counts, kSteps);
  GENREC_SHARED(uint32_t, warp_counts, kWarps);
  GENREC_SHARED(uint32_t, facts, 4);  // the least key, the largest, the last step, how many
  uint64_t mine[kRoom / kStepThreads];
  uint32_t least = ~0u, most = 0;
#pragma unroll
  for (int j = 0; j < kRoom / kStepThreads; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kStepThreads;
    mine[j] = i < count ? room[i] : kNoCandidate;
    const uint32_t key = static_cast<uint32_t>(mine[j] >> 32);
    if (i < count) least = key < least ? key : least, most = key > most ? key : most;
  }
  least = __reduce_min_sync(0xffffffffu, least);
  most = __reduce_max_sync(0xffffffffu, most);
  counts[threadIdx.x] = 0;
  if (threadIdx.x == 0) facts[0] = ~0u, facts[1] = 0, facts[3] = 0;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) atomicMin(&facts[0], least), atomicMax(&facts[1], most);
  __syncthreads();
  least = facts[0];
  const uint32_t span = facts[1] - least;
  const int shift = span < kSteps ? 0 : 24 - __clz(static_cast<int>(span));
  const auto step_of = [&](uint64_t candidate) {
    return static_cast<uint32_t>(candidate >> 32) - least >> shift;
  };
#pragma unroll
  for (int j = 0; j < kRoom / kStepThreads; ++j)
    if (mine[j] != kNoCandidate) atomicAdd(&counts[step_of(mine[j])], 1u);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const uint32_t own = counts[threadIdx.x];
  uint32_t upto = own;
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, upto, static_cast<unsigned>(by));
    if (lane >= by) upto += other;
  }
  if (lane == kWarp - 1) warp_counts[warp] = upto;
  __syncthreads();
  for (int i = 0; i < warp; ++i) upto += warp_counts[i];
  const uint32_t wanted = static_cast<uint32_t>(width < count ? width : count);
  if (upto - own < wanted && wanted <= upto) facts[2] = threadIdx.x;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kRoom / kStepThreads; ++j)
    push(room, &facts[3],
         mine[j] != kNoCandidate && step_of(mine[j]) <= facts[2] ? mine[j] : kNoCandidate);
  __syncthreads();
  return static_cast<int>(facts[3]);
}

// Leaves the best of room[0 .. count) in order at its start, and returns how many of
// them can win.  Every thread of the block is here.
__device__ __forceinline__ int keep_best(uint64_t* room, int count, int width) {
  if (count > 2 * width && count > 2 * kWarp) count = thin_out(room, count, width);
  int n = 1;
  while (n < count) n *= 2;
  for (int i = count + static_cast<int>(threadIdx.x); i < n; i += kStepThreads)
    room[i] = kNoCandidate;
  __syncthreads();
  sort_keys(room, n);
  return count < width ? count : width;
}

// How many of list[0 .. n), ascending, come before x.  n is a power of two.
__device__ __forceinline__ int count_before(const uint64_t* list, int n, uint64_t x) {
  int at = 0;
  for (int step = n / 2; step > 0; step /= 2)
    if (list[at + step - 1] < x) at += step;
  return at + (list[at] < x ? 1 : 0);
}

// A beam's child number `offset` as a candidate: its key, then the beam, then the
// offset, which orders siblings as their nodes do.
template <class T>
__device__ __forceinline__ uint64_t candidate_of(const StepArgs& a, const UserFilter& filter,
                                                 const Beam& own, const T* x, int beam, int shift,
                                                 int offset) {
  const int64_t child = static_cast<int64_t>(own.begin) + offset;
  const int64_t label = a.labels[child];
  if (label < 0 || label >= a.V) return kNoCandidate;
  // Adding 0 makes -0 of 0, whose order would differ.
  const float score = ((load(x + label) - own.top) * a.inv_temperature + own.base) + 0.f;
  if (!(score > -INFINITY) || !may_enter(filter, child)) return kNoCandidate;
  const uint32_t place = static_cast<uint32_t>(beam) << shift | static_cast<uint32_t>(offset);
  return static_cast<uint64_t>(falling_key(score)) << 32 | place;
}

// Shared memory, 27 KB: the block's beams, the first numbers of their children, the
// room, and the list that other blocks read.
template <class T>
__global__ void __launch_bounds__(kStepThreads, 3) best_children(StepArgs a, Plan plan, int shift) {
  GENREC_SHARED(Beam, beams, kMostBeams);
  GENREC_SHARED(int64_t, upto, kMostBeams);
  GENREC_SHARED(uint64_t, room, kRoom);
  GENREC_SHARED(uint64_t, best, kMostWidth);
  GENREC_SHARED(Sum, sums, kWarps);
  GENREC_SHARED(uint32_t, held, 1);
  GENREC_SHARED(uint32_t, children, 1);
  const int rank = plan.cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int64_t user = blockIdx.x / plan.cluster;
  const Team t = team_of(plan, rank);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int W = static_cast<int>(a.W), width = static_cast<int>(a.width);
  const int mine = rank < W ? (W - rank + plan.cluster - 1) / plan.cluster : 0;
  const float rate = a.inv_temperature * static_cast<float>(kLog2e);
  const bool whole = a.softmax == Softmax::vocab;
  const int begin = whole ? 0 : static_cast<int>(a.level_begin);
  const int end = whole ? static_cast<int>(a.V) : static_cast<int>(a.level_end);
  const auto row_at = [&](int i) {  // the logits of this block's beam number i
    return row_of<T>(a, user * a.W + rank + static_cast<int64_t>(i) * plan.cluster);
  };

  // The first row is on its way while the beams' children are looked up.
  typename RowPart<T>::Batch first{};
  if (a.softmax != Softmax::children && t.index < mine)
    first = RowPart<T>(row_at(t.index), begin, end).load_batch(t.thread, t.threads);
  const UserFilter filter = filter_of(a.filter, user);
  if (threadIdx.x == 0) held[0] = 0, children[0] = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < mine; i += kStepThreads) {
    const int64_t row = user * a.W + rank + static_cast<int64_t>(i) * plan.cluster;
    const Children c = children_of(a, row);
    // No trie has more children than columns: more than that is no run of labels.
    const int64_t n = c.end - c.begin;
    const int count = static_cast<int>(n < 0 ? 0 : n < a.V ? n : a.V);
    beams[i] = {static_cast<int32_t>(c.begin), count, a.scores[row], -INFINITY, -INFINITY};
    atomicAdd(&children[0], static_cast<uint32_t>(count < kRoom ? count : kRoom + 1));
  }
  __syncthreads();
  // Where all children fit, a warp adds those of its beam as soon as it knows its sum.
  const bool fits = children[0] <= kRoom;

  const int rounds = (mine + t.teams - 1) / t.teams;
  for (int round = 0; round < rounds; ++round) {
    const int i = t.index + round * t.teams;
    const bool live = i < mine && beams[i].count > 0;
    Sum sum{-INFINITY, 0};
    if (live && a.softmax == Softmax::children) {
      sum = sum_part<T>(a, filter, {beams[i].begin, beams[i].begin + int64_t{beams[i].count}},
                        user * a.W + rank + static_cast<int64_t>(i) * plan.cluster, t);
    } else if (live) {
      const RowPart<T> row(row_at(i), begin, end);
      sum = row.sum(round == 0 ? first : row.load_batch(t.thread, t.threads), t.thread, t.threads,
                    rate);
    }
    sum = merge_warp(sum, rate);
    if (plan.warps > 1) {
      if (lane == 0) sums[warp] = sum;
      __syncthreads();
      sum = sums[t.index * plan.warps];
      for (int other = 1; other < plan.warps; ++other)
        sum = merge(sum, sums[t.index * plan.warps + other], rate);
    }
    if (live) {
      Beam own{beams[i].begin, beams[i].count, beams[i].score, -INFINITY, -INFINITY};
      // The log of the sum is not a number where a logit is NaN or +inf, or none above -inf.
      if (sum.top > -INFINITY && sum.top < INFINITY && sum.e == sum.e) {
        const float base = own.score - logf(sum.e);
        own.top = sum.top, own.base = base == base ? base : -INFINITY;
      }
      if (!fits && t.thread == 0) beams[i].top = own.top, beams[i].base = own.base;
      if (fits && own.base > -INFINITY) {
        const T* x = row_at(i);
        for (int at = 0; at < own.count; at += t.threads) {
          const int offset = at + t.thread;
          push(room, held,
               offset < own.count
                   ? candidate_of<T>(a, filter, own, x, rank + i * plan.cluster, shift, offset)
                   : kNoCandidate);
        }
      }
    }
    if (plan.warps > 1) __syncthreads();  // whoever still reads what the next round writes
  }
  __syncthreads();

  if (!fits) {
    // Children in one sequence over all beams, so that no beam of many keeps the rest
    // waiting; a beam without a score has none.
    int64_t count = 0;
    if (threadIdx.x < mine && beams[threadIdx.x].base > -INFINITY) count = beams[threadIdx.x].count;
    upto[threadIdx.x] = count;
    __syncthreads();
    for (int by = 1; by < kMostBeams; by *= 2) {
      const int64_t before = threadIdx.x >= by ? upto[threadIdx.x - by] : 0;
      __syncthreads();
      upto[threadIdx.x] += before;
      __syncthreads();
    }
    const int64_t total = upto[kMostBeams - 1];
    uint64_t floor = kNoCandidate;  // what is not before it cannot win
    for (int64_t from = 0; from < total; from += kAdded) {
#pragma unroll
      for (int j = 0; j < kAdded / kStepThreads; ++j) {
        const int64_t at = from + j * kStepThreads + threadIdx.x;
        uint64_t candidate = kNoCandidate;
        if (at < total) {
          int i = 0;  // the first beam whose children end after it
          for (int step = kMostBeams / 2; step > 0; step /= 2)
            if (upto[i + step - 1] <= at) i += step;
          candidate = candidate_of<T>(a, filter, beams[i], row_at(i), rank + i * plan.cluster,
                                      shift, static_cast<int>(at - (i > 0 ? upto[i - 1] : 0)));
        }
        push(room, held, candidate < floor ? candidate : kNoCandidate);
      }
      __syncthreads();
      const int now = static_cast<int>(held[0]);
      __syncthreads();  // before the next ones are added
      if (now <= kRoom - kAdded) continue;
      const int kept = keep_best(room, now, width);
      if (kept == width) floor = room[width - 1];
      if (threadIdx.x == 0) held[0] = static_cast<uint32_t>(kept);
      __syncthreads();
    }
  }

  int count = keep_best(room, static_cast<int>(held[0]), width);
  const int list = static_cast<int>(plan.list);
  for (int i = static_cast<int>(threadIdx.x); i < list; i += kStepThreads)
    best[i] = i < count ? room[i] : kNoCandidate;
  if (plan.cluster > 1) {
    cluster_sync();
    for (int i = static_cast<int>(threadIdx.x); i < plan.cluster * list; i += kStepThreads)
      room[i] = cluster_peer(best, static_cast<unsigned>(i / list))[i % list];
    cluster_sync();  // nobody leaves while its list is read
  } else {
    __syncthreads();
  }

  // An own candidate's rank is how many of all come before it.
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kStepThreads) {
    const uint64_t own = best[i];
    int place = i;
    for (int other = 0; other < plan.cluster; ++other)
      if (other != rank) place += count_before(room + other * list, list, own);
    if (place >= width) continue;
    const uint32_t where = static_cast<uint32_t>(own);
    const int beam = static_cast<int>(where >> shift);
    const int64_t node = static_cast<int64_t>(beams[(beam - rank) / plan.cluster].begin) +
                         (where & ((1u << shift) - 1u));
    const int64_t o = user * a.width + place;
    a.out_scores[o] = of_falling_key(static_cast<uint32_t>(own >> 32));
    a.out_parent[o] = beam;
    a.out_token[o] = a.labels[node];
    a.out_node[o] = node;
  }
  if (rank != 0) return;
  if (plan.cluster > 1) {
    count = 0;
    for (int other = 0; other < plan.cluster; ++other)
      count += count_before(room + other * list, list, kNoCandidate);
  }
  for (int i = count + static_cast<int>(threadIdx.x); i < width; i += kStepThreads) {
    const int64_t o = user * a.width + i;
    a.out_scores[o] = -INFINITY;
    a.out_parent[o] = a.out_token[o] = a.out_node[o] = -1;
  }
}

// ---- launches ----

int64_t power_of_two_from(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

int64_t states_bytes(const StepArgs& a) {
  return a.U * a.W * static_cast<int64_t>(sizeof(BeamState));
}

// Bits of a candidate's word that tell a beam's children apart; -1 where there are not
// enough, or where beams or winners are too many for `best_children`.
int child_bits(const StepArgs& a) {
  if (a.sampling || a.W > kMostBeams || a.width > kMostWidth) return -1;
  int bits = 32;
  for (int64_t beams = 1; beams < a.W; beams *= 2) --bits;
  if (bits > 30) bits = 30;
  return a.V <= int64_t{1} << bits ? bits : -1;
}

int64_t workspace(const StepArgs& a) {
  if (child_bits(a) >= 0) return 0;
  return states_bytes(a) + a.U * power_of_two_from(a.width) * static_cast<int64_t>(sizeof(Winner));
}

// One to eight blocks a user, of at most two a processor in all: users are few and have
// beams to share.  More than one wave of clusters would take twice as long.
template <class Kernel>
Plan plan_of(const StepArgs& a, Kernel kernel) {
  Plan plan;
  plan.list = power_of_two_from(a.width);
  const DeviceLimits limits = device_limits();
  if (limits.capability >= 90 && knows_clusters(kernel))
    while (plan.cluster < 8 && 2 * plan.cluster <= a.W &&
           2 * plan.cluster * a.U <= 2 * limits.multiprocessors)
      plan.cluster *= 2;
  const int64_t beams = (a.W + plan.cluster - 1) / plan.cluster;
  while (plan.warps < kWarps && 2 * plan.warps * beams <= kWarps) plan.warps *= 2;
  return plan;
}

template <class Kernel, class... Arguments>
int launch_users(const StepArgs& a, const Plan& plan, void* stream, Kernel kernel,
                 Arguments... more) {
  Launch how{a.U * plan.cluster, kStepThreads};
  how.cluster = plan.cluster;
  how.stream = stream;
  return launch(kernel, how, a, plan, more...);
}

template <class T, bool kSampling>
int launch_step(const StepArgs& a, void* stream) {
  if constexpr (!kSampling)
    if (const int shift = child_bits(a); shift >= 0)
      return launch_users(a, plan_of(a, best_children<T>), stream, best_children<T>, shift);
  Plan plan = plan_of(a, step_users<T, kSampling>);
  plan.states = static_cast<BeamState*>(a.workspace);
  plan.winners = reinterpret_cast<Winner*>(static_cast<char*>(a.workspace) + states_bytes(a));
  return launch_users(a, plan, stream, step_users<T, kSampling>);
}

template <class T>
int step_of(const StepArgs& a, void* stream) {
  return a.sampling ? launch_step<T, true>(a, stream) : launch_step<T, false>(a, stream);
}

int step(const StepArgs& a, void* stream) {
  switch (a.dtype) {
    case DType::f32: return step_of<float>(a, stream);
    case DType::bf16: return step_of<bf16_t>(a, stream);
    case DType::f16: return step_of<f16_t>(a, stream);
    default: return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace

// Declared in trie.cpp.
extern const CudaKernels trie_cuda_kernels;
const CudaKernels trie_cuda_kernels{step, workspace};

}  // namespace genrec::trie
