// CUDA kernels of constrained decoding.  Torch-free: raw pointers and a stream in,
// an error code out.
//
// One launch a step.  A user is taken by one block, or on devices with clusters by
// up to eight: each normalises the rows of its own beams, then all choose together.
// A candidate is ordered by (key, parent, node), no two alike, so equal input gives
// equal bits.  How many warps take a row depends on the users and beams of the call, and
// the last bits of its sum with them.  There are two ways to choose:
//
// - `best_children`, for beam search of up to 256 beams and widths: a warp keeps the
//   candidates of its rows in shared memory and drops those that can no longer win
//   whenever that is full; a block sorts what its warps kept, and the blocks of a user
//   look for the rank of their own in each other's lists.
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
  int cluster = 1;              // blocks a user, a power of two
  int warps = 1;                // warps a beam, a power of two
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
  const int bits = log2_of(plan.warps), warp = threadIdx.x / kWarp, threads = kWarp << bits;
  const int index = warp >> bits, teams = kWarps >> bits;
  return {index,
          teams,
          static_cast<int>(threadIdx.x) & (threads - 1),
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

// The sum over the lanes up to this one.
__device__ __forceinline__ uint32_t sum_up_to(uint32_t x, int lane) {
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, x, static_cast<unsigned>(by));
    if (lane >= by) x += other;
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
  const uint32_t up_to = sum_up_to(count, lane);
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
// A warp holds at least 1 << kWarpRoomBits candidates at a time.
constexpr int kWarpRoomBits = 8;
constexpr int kMostRoom = kWarps * 2 * kMostWidth;
constexpr uint64_t kNoCandidate = ~uint64_t{0};

// A beam of this block, in shared memory.
struct Beam {
  int32_t begin, count;  // its children
  float score;
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
    const PackRange whole = packs_of(from, {0, n});
    first = static_cast<int>(whole.first), packs = static_cast<int>(whole.count);
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
          most = larger_of(most, load(&batch.packs[j].v[i]));
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

// As merge_warp, under the largest top from the start.
__device__ __forceinline__ Sum merge_under_one_top(Sum a, float rate) {
  const float top = max_warp(a.top);
  if (top > -INFINITY) a.e *= power_of_two((a.top - top) * rate);  // a NaN stays
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2)
    a.e += __shfl_xor_sync(0xffffffffu, a.e, width);
  return {top, a.e};
}

// One step of a bitonic sort of list[0 .. n), n a power of two, by `threads`.
__device__ __forceinline__ void sort_step(uint64_t* list, int n, int run, int gap, int thread,
                                          int threads) {
  for (int pair = thread; pair < n / 2; pair += threads) {
    const int i = 2 * pair - (pair & (gap - 1)), j = i + gap;
    const bool up = (i & run) == 0;
    const uint64_t x = list[i], y = list[j];
    if ((y < x) == up) list[i] = y, list[j] = x;
  }
}

__device__ __forceinline__ void sort_by_block(uint64_t* list, int n) {
  for (int run = 2; run <= n; run *= 2)
    for (int gap = run / 2; gap > 0; gap /= 2) {
      sort_step(list, n, run, gap, static_cast<int>(threadIdx.x), kStepThreads);
      // Up to 32 apart, a warp's 32 pairs are 64 entries that no other warp touches.
      const int next = gap > 1 ? gap / 2 : run;
      if (gap <= kWarp && next <= kWarp)
        __syncwarp();
      else
        __syncthreads();
    }
  __syncthreads();
}

__device__ __forceinline__ void sort_by_warp(uint64_t* list, int n, int lane) {
  for (int run = 2; run <= n; run *= 2)
    for (int gap = run / 2; gap > 0; gap /= 2) {
      sort_step(list, n, run, gap, lane, kWarp);
      __syncwarp();
    }
}

// A warp's candidates: a list of `room` in shared memory, and what cannot win any more.
struct WarpList {
  uint64_t* list;
  int room, width;
  int count = 0;                  // the same in every lane
  uint64_t floor = kNoCandidate;  // what is not before it cannot win

  // Adds each lane's candidate, if it has one.  Every lane is here.
  __device__ __forceinline__ void push(uint64_t candidate, int lane) {
    if (count + kWarp > room) {  // the best of them stay: room is twice the width
      for (int i = count + lane; i < room; i += kWarp) list[i] = kNoCandidate;
      __syncwarp();
      sort_by_warp(list, room, lane);
      if (count >= width) count = width, floor = list[width - 1];
      __syncwarp();
    }
    const bool has = candidate < floor;
    const unsigned with = __ballot_sync(0xffffffffu, has);
    if (has) list[count + __popc(with & ((1u << lane) - 1u))] = candidate;
    count += __popc(with);
  }
};

// Leaves the best of all warps' candidates, of which warp w has counts[w] from room +
// (w << bits) on, in order at the room's start, and returns how many of them can win.
// Many are thinned out first: a histogram over the range of their keys tells which may
// be among the best.  Every thread of the block is here.
__device__ __forceinline__ int keep_best(uint64_t* room, const int* counts, int bits, int width) {
  GENREC_SHARED(uint32_t, steps, kStepThreads);  // a thread counts one step of the range
  GENREC_SHARED(uint32_t, warp_steps, kWarps);
  GENREC_SHARED(uint32_t, facts, 4);  // the least key, the largest, the last step, how many
  constexpr int kMine = kMostRoom / kStepThreads;
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  int total = 0;
  for (int i = 0; i < kWarps; ++i) total += counts[i];
  uint64_t mine[kMine];
#pragma unroll
  for (int j = 0; j < kMine; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kStepThreads;
    const bool held = i < kWarps << bits && (i & ((1 << bits) - 1)) < counts[i >> bits];
    mine[j] = held ? room[i] : kNoCandidate;
  }
  if (threadIdx.x == 0) facts[0] = ~0u, facts[1] = 0, facts[3] = 0;
  uint32_t least = 0, last = ~0u;
  int shift = 0;
  const auto step_of = [&](uint64_t candidate) {
    return (static_cast<uint32_t>(candidate >> 32) - least) >> shift;
  };
  if (total > 2 * width && total > 2 * kWarp) {
    uint32_t low = ~0u, high = 0;
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const uint32_t key = static_cast<uint32_t>(mine[j] >> 32);
      if (mine[j] != kNoCandidate) low = key < low ? key : low, high = key > high ? key : high;
    }
    low = __reduce_min_sync(0xffffffffu, low);
    high = __reduce_max_sync(0xffffffffu, high);
    steps[threadIdx.x] = 0;
    __syncthreads();
    if (lane == 0) atomicMin(&facts[0], low), atomicMax(&facts[1], high);
    __syncthreads();
    least = facts[0];
    const uint32_t span = facts[1] - least;
    shift = span < kStepThreads ? 0 : 24 - __clz(static_cast<int>(span));
#pragma unroll
    for (int j = 0; j < kMine; ++j)
      if (mine[j] != kNoCandidate) atomicAdd(&steps[step_of(mine[j])], 1u);
    __syncthreads();
    const uint32_t own = steps[threadIdx.x];
    uint32_t upto = sum_up_to(own, lane);
    if (lane == kWarp - 1) warp_steps[warp] = upto;
    __syncthreads();
    for (int i = 0; i < warp; ++i) upto += warp_steps[i];
    const uint32_t wanted = static_cast<uint32_t>(width);
    if (upto - own < wanted && wanted <= upto) facts[2] = threadIdx.x;
    __syncthreads();
    last = facts[2];
  } else {
    __syncthreads();  // all candidates are read
  }
#pragma unroll
  for (int j = 0; j < kMine; ++j) {
    if (j * kStepThreads >= kWarps << bits) break;
    const bool keep = mine[j] != kNoCandidate && (last == ~0u || step_of(mine[j]) <= last);
    const unsigned with = __ballot_sync(0xffffffffu, keep);
    if (with == 0) continue;
    const int first = __ffs(static_cast<int>(with)) - 1;
    uint32_t place = 0;
    if (lane == first) place = atomicAdd(&facts[3], static_cast<uint32_t>(__popc(with)));
    place = __shfl_sync(0xffffffffu, place, first);
    if (keep) room[place + __popc(with & ((1u << lane) - 1u))] = mine[j];
  }
  __syncthreads();
  const int count = static_cast<int>(facts[3]);
  int n = 1;
  while (n < count) n *= 2;
  for (int i = count + static_cast<int>(threadIdx.x); i < n; i += kStepThreads)
    room[i] = kNoCandidate;
  __syncthreads();
  sort_by_block(room, n);
  return count < width ? count : width;
}

constexpr int kLargestCluster = 8;  // what every device with clusters grants

// How many of the lists [cluster, n], each ascending, come before x, but for list `but`.
// n is a power of two.  All lists are searched at once.
__device__ __forceinline__ int count_before(const uint64_t* lists, int cluster, int n, int but,
                                            uint64_t x) {
  int at[kLargestCluster] = {};
  for (int step = n / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < kLargestCluster; ++i)
      if (i < cluster && lists[i * n + at[i] + step - 1] < x) at[i] += step;
  }
  int count = 0;
#pragma unroll
  for (int i = 0; i < kLargestCluster; ++i)
    if (i < cluster && i != but) count += at[i] + (lists[i * n + at[i]] < x ? 1 : 0);
  return count;
}

// How a block's shared memory is laid out, and the bits of a candidate's place.
struct ChildrenPlan {
  int shift;  // a place is the beam's number, then the child's within its run in `shift` bits
  int room;   // candidates a warp holds are 1 << room
};

// Dynamic shared memory: the warps' rooms, then every block's list of a user.
template <class T>
__global__ void __launch_bounds__(kStepThreads, 3)
    best_children(StepArgs a, Plan plan, ChildrenPlan how) {
  GENREC_SHARED(Beam, beams, kMostBeams);
  GENREC_SHARED(Sum, sums, kWarps);
  GENREC_SHARED(int, counts, kWarps);
  GENREC_SHARED(int, list_counts, kLargestCluster);
  GENREC_DYNAMIC_SHARED(uint64_t, room);
  constexpr int kAtOnce = 4;  // children of a thread whose labels are on their way
  uint64_t* lists = room + (kWarps << how.room);
  const int rank = plan.cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int cluster_bits = log2_of(plan.cluster);
  const int64_t user = blockIdx.x >> cluster_bits;
  const Team t = team_of(plan, rank);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int W = static_cast<int>(a.W), width = static_cast<int>(a.width);
  const int mine = (W - rank + plan.cluster - 1) >> cluster_bits;  // W is at least `cluster`
  const float rate = a.inv_temperature * static_cast<float>(kLog2e);
  const bool whole = a.softmax == Softmax::vocab;
  const int begin = whole ? 0 : static_cast<int>(a.level_begin);
  const int end = whole ? static_cast<int>(a.V) : static_cast<int>(a.level_end);
  const auto row_number = [&](int i) {  // of this block's beam number i
    return user * a.W + rank + static_cast<int64_t>(i) * plan.cluster;
  };
  const auto first_of_row = [&](int i) {
    typename RowPart<T>::Batch batch{};
    if (a.softmax != Softmax::children && i < mine)
      batch = RowPart<T>(row_of<T>(a, row_number(i)), begin, end).load_batch(t.thread, t.threads);
    return batch;
  };

  // The first row is on its way while the beams' children are looked up.
  typename RowPart<T>::Batch first = first_of_row(t.index);
  const UserFilter filter = filter_of(a.filter, user);
  for (int i = static_cast<int>(threadIdx.x); i < mine; i += kStepThreads) {
    const int64_t row = row_number(i);
    const Children c = children_of(a, row);
    // No trie has more children than columns: more than that is no run of labels.
    const int64_t n = c.end - c.begin;
    beams[i] = {static_cast<int32_t>(c.begin),
                static_cast<int>(n < 0     ? 0
                                 : n < a.V ? n
                                           : a.V),
                a.scores[row]};
  }
  if (plan.cluster > 1)
    cluster_sync();  // the peers are there to be written to
  else
    __syncthreads();

  WarpList candidates{room + (warp << how.room), 1 << how.room, width};
  const int rounds = (mine + t.teams - 1) / t.teams;
  for (int round = 0; round < rounds; ++round) {
    const int i = t.index + round * t.teams;
    const Beam own = i < mine ? beams[i] : Beam{0, 0, 0};
    // The first children's labels are on their way while the row is read.
    int32_t labels[kAtOnce];
    const auto fetch_labels = [&](int at) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int offset = at + j * t.threads + t.thread;
        labels[j] = offset < own.count ? a.labels[int64_t{own.begin} + offset] : -1;
      }
    };
    fetch_labels(0);
    Sum sum{-INFINITY, 0};
    if (own.count > 0 && a.softmax == Softmax::children)
      sum = sum_part<T>(a, filter, {own.begin, own.begin + int64_t{own.count}}, row_number(i), t);
    else if (own.count > 0)
      sum =
          RowPart<T>(row_of<T>(a, row_number(i)), begin, end).sum(first, t.thread, t.threads, rate);
    first = first_of_row(i + t.teams);  // the next row is, while children are looked at
    sum = merge_under_one_top(sum, rate);
    if (plan.warps > 1) {
      if (lane == 0) sums[warp] = sum;
      __syncthreads();
      sum = sums[t.index * plan.warps];
      for (int other = 1; other < plan.warps; ++other)
        sum = merge(sum, sums[t.index * plan.warps + other], rate);
      __syncthreads();  // before the next round writes
    }
    // The log of the sum is not a number where a logit is NaN or +inf, or none above -inf.
    float base = -INFINITY;
    if (own.count > 0 && sum.top > -INFINITY && sum.top < INFINITY && sum.e == sum.e)
      base = own.score - logf(sum.e);
    if (!(base > -INFINITY)) continue;
    const T* x = row_of<T>(a, row_number(i));
    const uint32_t place = static_cast<uint32_t>(rank + i * plan.cluster) << how.shift;
    for (int at = 0; at < own.count; at += kAtOnce * t.threads) {
      float logits[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        logits[j] = labels[j] >= 0 && labels[j] < a.V ? load(x + labels[j]) : -INFINITY;
      fetch_labels(at + kAtOnce * t.threads);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (at + j * t.threads >= own.count) break;
        const int offset = at + j * t.threads + t.thread;
        // Adding 0 makes -0 of 0, whose order would differ.
        const float score = ((logits[j] - sum.top) * a.inv_temperature + base) + 0.f;
        uint64_t candidate = kNoCandidate;
        if (score > -INFINITY && may_enter(filter, int64_t{own.begin} + offset))
          candidate = static_cast<uint64_t>(falling_key(score)) << 32 |
                      (place | static_cast<uint32_t>(offset));
        candidates.push(candidate, lane);
      }
    }
  }
  if (lane == 0) counts[warp] = candidates.count;
  __syncthreads();

  // The block's best go to every block of the user, each of which then finds the rank of
  // its own: how many of all come before it.
  const int count = keep_best(room, counts, how.room, width);
  const int list = static_cast<int>(plan.list), i = static_cast<int>(threadIdx.x);
  const uint64_t own = i < count ? room[i] : kNoCandidate;
  const int beam = static_cast<int>(static_cast<uint32_t>(own) >> how.shift);
  int64_t node = -1, token = -1;
  if (own != kNoCandidate) {
    node = int64_t{beams[(beam - rank) >> cluster_bits].begin} +
           (static_cast<uint32_t>(own) & ((1u << how.shift) - 1u));
    token = a.labels[node];
  }
  for (int peer = 0; peer < plan.cluster; ++peer) {
    const unsigned p = static_cast<unsigned>(peer);
    if (i < list) (plan.cluster > 1 ? cluster_peer(lists, p) : lists)[rank * list + i] = own;
    if (i == 0) (plan.cluster > 1 ? cluster_peer(list_counts, p) : list_counts)[rank] = count;
  }
  if (plan.cluster > 1)
    cluster_sync();
  else
    __syncthreads();
  if (own != kNoCandidate) {
    const int better = i + count_before(lists, plan.cluster, list, rank, own);
    if (better < width) {
      const int64_t o = user * a.width + better;
      a.out_scores[o] = of_falling_key(static_cast<uint32_t>(own >> 32));
      a.out_parent[o] = beam;
      a.out_token[o] = token;
      a.out_node[o] = node;
    }
  }
  if (rank != 0) return;
  int found = 0;
  for (int other = 0; other < plan.cluster; ++other) found += list_counts[other];
  for (int o = found + i; o < width; o += kStepThreads) {
    a.out_scores[user * a.width + o] = -INFINITY;
    a.out_parent[user * a.width + o] = a.out_token[user * a.width + o] = -1;
    a.out_node[user * a.width + o] = -1;
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
    while (plan.cluster < kLargestCluster && 2 * plan.cluster <= a.W &&
           2 * plan.cluster * a.U <= 2 * limits.multiprocessors)
      plan.cluster *= 2;
  const int64_t beams = (a.W + plan.cluster - 1) / plan.cluster;
  while (plan.warps < kWarps && 2 * plan.warps * beams <= kWarps) plan.warps *= 2;
  return plan;
}

template <class Kernel, class... Arguments>
int launch_users(const StepArgs& a, const Plan& plan, size_t shared, void* stream, Kernel kernel,
                 Arguments... more) {
  Launch how{a.U * plan.cluster, kStepThreads, shared};
  how.cluster = plan.cluster;
  how.stream = stream;
  return launch(kernel, how, a, plan, more...);
}

template <class T, bool kSampling>
int launch_step(const StepArgs& a, void* stream) {
  if constexpr (!kSampling)
    if (const int shift = child_bits(a); shift >= 0) {
      const Plan plan = plan_of(a, best_children<T>);
      ChildrenPlan how{shift, kWarpRoomBits};
      while ((1 << how.room) < 2 * plan.list) ++how.room;
      const size_t shared =
          static_cast<size_t>((kWarps << how.room) + plan.cluster * plan.list) * sizeof(uint64_t);
      return launch_users(a, plan, shared, stream, best_children<T>, how);
    }
  Plan plan = plan_of(a, step_users<T, kSampling>);
  plan.states = static_cast<BeamState*>(a.workspace);
  plan.winners = reinterpret_cast<Winner*>(static_cast<char*>(a.workspace) + states_bytes(a));
  return launch_users(a, plan, 0, stream, step_users<T, kSampling>);
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
