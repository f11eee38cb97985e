// CUDA kernels of constrained decoding.  Torch-free: raw pointers and a stream in,
// an error code out.
//
// One launch a step.  A user is taken by one block, or on devices with clusters by
// up to eight: each normalises the rows of its own beams, then all choose together.
// A candidate is ordered by (key, parent, node), no two alike, so equal input gives
// equal bits.  How many warps take a row depends on the call's shape and on the device, and
// the last bits of its sum with them.  There are two ways to choose:
//
// - `best_children`, for beam search of up to 256 beams and widths: a warp's rows come
//   through a ring in shared memory, so that the next is on its way while one's children
//   are looked at; it keeps their candidates there too, and drops those that can no longer
//   win whenever that is full; a block puts in order what its warps kept, and the blocks
//   of a user look for the rank of their own in each other's lists.
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
__device__ __forceinline__ bool before(uint64_t a, uint64_t b) { return a < b; }

// ---- beams ----

struct Children {
  int64_t begin, end;  // none for a dead beam and for what is no node
};

__device__ __forceinline__ Children children_of(const StepArgs& a, int64_t node, float score) {
  if (node < 0 || node >= a.level_nodes || !(score > -INFINITY)) return {0, 0};
  const int64_t begin = a.first_child[node], end = a.first_child[node + 1];
  if (begin < 0 || end > a.next_nodes) return {0, 0};
  return {begin, end};
}
__device__ __forceinline__ Children children_of(const StepArgs& a, int64_t row) {
  return children_of(a, a.nodes[row], a.scores[row]);
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

__device__ __forceinline__ Team team_of(const Plan& plan, int rank, int block_warps = kWarps) {
  const int bits = log2_of(plan.warps), warp = threadIdx.x / kWarp, threads = kWarp << bits;
  const int index = warp >> bits, teams = block_warps >> bits;
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

// Sorts list[0 .. n), n a power of two, in shared or in global memory, by a whole warp or a
// whole block.
template <bool kBlock, class T, class N>
__device__ __forceinline__ void sort_list(T* list, N n) {
  const int threads = kBlock ? static_cast<int>(blockDim.x) : kWarp;
  const int thread = static_cast<int>(threadIdx.x) & (threads - 1);
#pragma unroll 1
  for (N run = 2; run <= n; run *= 2)
#pragma unroll 1
    for (N gap = run / 2; gap > 0; gap /= 2) {
#pragma unroll 1
      for (N pair = thread; pair < n / 2; pair += threads) {
        const N i = 2 * pair - (pair & (gap - 1)), j = i + gap;
        const bool up = (i & run) == 0;
        const T x = list[i], y = list[j];
        if (before(y, x) == up) list[i] = y, list[j] = x;
      }
      if constexpr (kBlock)
        __syncthreads();
      else
        __syncwarp();
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
  sort_list<true>(list, n);
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
//
// A step is short, and what a block runs it must fetch first: loops that do not stream a
// row stay rolled, and each piece is written out in one place.

constexpr int kMostThreads = 512, kMostWarps = kMostThreads / kWarp;
constexpr int kMostBeams = 256, kMostWidth = 256;
// A warp holds at least 1 << kWarpRoomBits candidates at a time, and a multiple of kStride.
constexpr int kWarpRoomBits = 8;
constexpr int kStride = 4 * kWarp;
// What a block has a list of its own for.
constexpr int kFew = kMostThreads;
constexpr uint64_t kNoCandidate = ~uint64_t{0};
// A warp's ring: its stages, of that many packs a lane, of 16 bytes.  More stages were no
// faster.
constexpr int kStages = 2, kStagePacks = 4, kStageBytes = kStagePacks * kWarp * 16;

// A beam of this block.
struct Beam {
  int32_t begin, count;  // its children
  float score;
};

// The 16-byte packs of a row's part [from, from + n), and what lies beside them.
template <class T>
struct RowPart {
  static constexpr int kSize = Pack<T>::kSize;
  const T* from;
  int first, packs, n;
  int turn;  // the pack that is read first: the last ones are still in cache afterwards

  // Columns [begin, end), those before `last` being wanted again.
  __device__ __forceinline__ RowPart(const T* row, int begin, int end, int last)
      : from(row + begin), n(end - begin) {
    first = static_cast<int>(before_boundary(from));
    first = first < n ? first : n;
    packs = (n - first) / kSize;
    turn = (last - begin - first + kSize - 1) / kSize;
    if (turn < 0 || turn >= packs) turn = 0;
  }

  // The pack that is read as number k.
  __device__ __forceinline__ const T* pack(int k) const {
    k += turn;
    return from + first + (k < packs ? k : k - packs) * kSize;
  }

  // What lies beside the packs.
  __device__ __forceinline__ void add_rest(Sum& sum, int thread, int threads, float rate) const {
    const int rest = n - packs * kSize;
#pragma unroll 1
    for (int i = thread; i < rest; i += threads)
      add(sum, load(from + (i < first ? i : i + packs * kSize)), rate);
  }
};

// A warp's rows on their way through its ring in shared memory, stage by stage: a lane
// reads there what it has copied itself.
struct Ring {
  unsigned char* memory;  // the lane's first pack
  int at = 0;             // the stage that is read next, and then filled

  __device__ __forceinline__ Pack<float>* stage() const {
    return reinterpret_cast<Pack<float>*>(memory + at * kStageBytes);
  }
  __device__ __forceinline__ void advance() { at = (at + 1) % kStages; }

  template <class T>
  __device__ __forceinline__ void fill(const RowPart<T>& part, int k, int threads) {
#pragma unroll
    for (int j = 0; j < kStagePacks; ++j)
      if (k + j * threads < part.packs) copy_async(stage() + j * kWarp, part.pack(k + j * threads));
    commit_copies();
  }

  // Adds the oldest stage, once it has come: the row's packs k, k + threads, ...
  template <class T>
  __device__ __forceinline__ void add_to(Sum& sum, const RowPart<T>& part, int k, int threads,
                                         float rate) const {
    constexpr int kSize = Pack<T>::kSize;
    wait_for_copies_but<kStages - 1>();
    Pack<T> packs[kStagePacks];
    float most = -INFINITY;
#pragma unroll
    for (int j = 0; j < kStagePacks; ++j) {
      if (k + j * threads < part.packs) {
        packs[j] = load_pack(reinterpret_cast<const T*>(stage() + j * kWarp));
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i) store(&packs[j].v[i], -INFINITY);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) most = larger_of(most, load(&packs[j].v[i]));
    }
    raise(sum, most, rate);
    // Against a top of -inf a difference is NaN for -inf too; those rows have nothing yet.
    const float top = sum.top > -INFINITY ? sum.top : 0.f;
#pragma unroll
    for (int j = 0; j < kStagePacks; ++j)
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum.e += power_of_two((load(&packs[j].v[i]) - top) * rate);
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

__device__ __forceinline__ uint32_t key_of(uint64_t candidate) {
  return static_cast<uint32_t>(candidate >> 32);
}

// A warp's candidates: a list of `room` in shared memory, twice the width at least, and what
// cannot win any more.
struct WarpList {
  uint64_t* list;
  int room, width;
  int count = 0;                  // the same in every lane
  uint64_t floor = kNoCandidate;  // what is not before it cannot win

  // Adds the candidates of the lanes that have one.  Every lane is here.
  __device__ __forceinline__ void push(bool has, uint64_t candidate, int lane) {
    if (count + kWarp > room) {
      thin(lane);
      has = has && candidate < floor;
    }
    append(has, candidate, lane);
  }

  __device__ __forceinline__ void append(bool has, uint64_t candidate, int lane) {
    const unsigned with = __ballot_sync(0xffffffffu, has);
    if (has) list[count + __popc(with & ((1u << lane) - 1u))] = candidate;
    count += __popc(with);
    __syncwarp();
  }

  // Drops those that cannot win, until there is room again: looks for a key that at least
  // `width` of them do not exceed, nor many more.
  __device__ __forceinline__ void thin(int lane) {
    const int enough = (width + room) / 2;
#pragma unroll 1
    for (int i = count + lane; i < room; i += kWarp) list[i] = kNoCandidate;
    __syncwarp();
    uint32_t low = ~0u, high = 0;
#pragma unroll 1
    for (int i = lane; i < count; i += kWarp) {
      const uint32_t mine = key_of(list[i]);
      low = mine < low ? mine : low, high = mine > high ? mine : high;
    }
    low = __reduce_min_sync(0xffffffffu, low);
    high = __reduce_max_sync(0xffffffffu, high);
    int within = count;  // have a key of at most `high`
#pragma unroll 1
    while (within > enough && low < high) {
      const uint32_t middle = low + (high - low) / 2;
      int upto = 0;
#pragma unroll 1
      for (int i = lane; i < room; i += kStride)
#pragma unroll
        for (int j = 0; j < kStride; j += kWarp) upto += key_of(list[i + j]) <= middle ? 1 : 0;
      upto = __reduce_add_sync(0xffffffffu, upto);
      if (upto < width)
        low = middle + 1;
      else
        high = middle, within = upto;
    }
    __syncwarp();
    if (within > enough) {  // too many have the same score
      sort_list<false>(list, room);
      count = width, floor = list[width - 1];
      __syncwarp();
      return;
    }
    const int full = count;
    count = 0;
#pragma unroll 1
    for (int from = 0; from < full; from += kWarp) {
      const uint64_t mine = list[from + lane];
      __syncwarp();                              // all have read before one writes
      append(key_of(mine) <= high, mine, lane);  // never one that is none
    }
    floor = (uint64_t{high} + 1) << 32;  // no score has the largest key
  }
};

// Leaves the best of all warps' candidates in order at the start of `few`, or of `room`
// where they do not fit, and returns how many of them can win; warp w's are from
// room + (w << bits) on.  Many are thinned out first: a histogram over the range of their
// keys tells which may be among the best.  Every thread of the block is here.
__device__ __forceinline__ int keep_best(uint64_t*& few, uint64_t* room, const WarpList& own,
                                         int bits) {
  GENREC_SHARED(uint32_t, steps, kMostThreads);  // a thread counts one step of the range
  GENREC_SHARED(int, warp_steps, kMostWarps);
  GENREC_SHARED(uint32_t, range, 2);
  GENREC_SHARED(int, facts, 4);  // how many there are, the last step, how many up to it, placed
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int threads = static_cast<int>(blockDim.x);
  steps[thread] = 0;
  if (thread == 0) range[0] = ~0u, range[1] = 0, facts[0] = 0, facts[3] = 0;
  __syncthreads();
  if (lane == 0) atomicAdd(&facts[0], own.count);
  __syncthreads();
  int count = facts[0];
  uint32_t least = 0;
  int shift = 0, last = INT32_MAX;
  if (count > kFew / 2) {
    uint32_t low = ~0u, high = 0;
#pragma unroll 1
    for (int i = lane; i < own.count; i += kWarp) {
      const uint32_t key = key_of(own.list[i]);
      low = key < low ? key : low, high = key > high ? key : high;
    }
    low = __reduce_min_sync(0xffffffffu, low);
    high = __reduce_max_sync(0xffffffffu, high);
    if (lane == 0) atomicMin(&range[0], low), atomicMax(&range[1], high);
    __syncthreads();
    least = range[0];
    // As many steps as threads, each of a power of two.
    shift = max(0, 32 - log2_of(threads) - __clz(static_cast<int>(range[1] - least)));
#pragma unroll 1
    for (int i = lane; i < own.count; i += kWarp)
      atomicAdd(&steps[(key_of(own.list[i]) - least) >> shift], 1u);
    __syncthreads();
    const int mine = static_cast<int>(steps[thread]);
    int upto = static_cast<int>(sum_up_to(steps[thread], lane));
    if (lane == kWarp - 1) warp_steps[warp] = upto;
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < warp; ++i) upto += warp_steps[i];
    if (upto - mine < own.width && own.width <= upto) facts[1] = thread, facts[2] = upto;
    __syncthreads();
    last = facts[1], count = facts[2];
  }
  if (count <= kFew) {
    const auto kept = [&](int i) {
      return static_cast<int>((key_of(own.list[i]) - least) >> shift) <= last;
    };
    int mine = 0;
#pragma unroll 1
    for (int i = lane; i < own.count; i += kWarp) mine += kept(i) ? 1 : 0;
    const int upto = static_cast<int>(sum_up_to(static_cast<uint32_t>(mine), lane));
    int place = 0;
    if (lane == kWarp - 1) place = atomicAdd(&facts[3], upto);
    place = __shfl_sync(0xffffffffu, place, kWarp - 1) + upto - mine;
#pragma unroll 1
    for (int i = lane; i < own.count; i += kWarp)
      if (kept(i)) few[place++] = own.list[i];
  }
  if (count > threads) {  // a wide step, or many scores are nearly alike
    const bool fits = count <= kFew;
    int n = kFew;
    if (!fits) few = room, n = threads / kWarp << bits;
#pragma unroll 1
    for (int i = fits ? count + thread : own.count + lane; i < (fits ? n : 1 << bits);
         i += fits ? threads : kWarp)
      (fits ? few : own.list)[i] = kNoCandidate;
    __syncthreads();
    sort_list<true>(few, n);
    return own.width;
  }
  // Each comes after as many as are less; several threads count for one where there are more.
  int slots = kWarp;
  while (slots < count) slots *= 2;
  const int i = thread & (slots - 1), part = thread >> log2_of(slots);
  const int each = (count * slots + threads - 1) >> log2_of(threads);
  const int end = min((part + 1) * each, count);
  steps[thread] = 0;
  __syncthreads();
  const uint64_t mine = i < count ? few[i] : kNoCandidate;
  uint32_t less = 0;
#pragma unroll 4
  for (int j = part * each; j < end; ++j) less += few[j] < mine ? 1 : 0;
  atomicAdd(&steps[i], less);
  __syncthreads();
  if (part == 0 && i < count) few[steps[i]] = mine;
  __syncthreads();
  return min(count, own.width);
}

constexpr int kLargestCluster = 8;  // what every device with clusters grants

// How many of the lists [cluster, n], each ascending, come before x, but for list `but`, in
// which it is number `own`; or any number from `width` on, if that many do.  n is a power
// of two.  All lists are searched at once.
__device__ __forceinline__ int count_before(const uint64_t* lists, int cluster, int n, int but,
                                            int own, int width, uint64_t x) {
  int at[kLargestCluster] = {}, sure = own;
#pragma unroll 1
  for (int step = n / 2; sure < width; step /= 2) {
    const int ahead = step > 0 ? step : 1;  // the last round looks at the entry that is left
    uint64_t found[kLargestCluster];
#pragma unroll
    for (int i = 0; i < kLargestCluster; ++i)
      found[i] = lists[(i < cluster ? i : 0) * n + at[i] + ahead - 1];
    sure = own;
#pragma unroll
    for (int i = 0; i < kLargestCluster; ++i) {
      at[i] += found[i] < x ? ahead : 0;
      sure += i < cluster && i != but ? at[i] : 0;
    }
    if (step == 0) break;
  }
  return sure;
}

// How a block's shared memory is laid out, and the bits of a candidate's place.
struct ChildrenPlan {
  int shift;  // a place is the beam's number, then the child's within its run in `shift` bits
  int room;   // candidates a warp holds are 1 << room
};

// Dynamic shared memory: the warps' rings, their rooms, then every block's list of a user.
template <class T>
__global__ void __launch_bounds__(kMostThreads, 1)
    best_children(StepArgs a, Plan plan, ChildrenPlan how) {
  GENREC_SHARED(Beam, beams, kMostBeams);
  GENREC_SHARED(Sum, sums, kMostWarps);
  GENREC_SHARED(int, list_counts, kLargestCluster);
  GENREC_SHARED(uint64_t, few, kFew);
  GENREC_DYNAMIC_SHARED(unsigned char, memory);
  constexpr int kAtOnce = 4;  // children of a thread whose logits are on their way
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  uint64_t* room = reinterpret_cast<uint64_t*>(memory + warps * kStages * kStageBytes);
  uint64_t* lists = room + (warps << how.room);
  const int rank = plan.cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int cluster_bits = log2_of(plan.cluster);
  const int64_t user = blockIdx.x >> cluster_bits;
  const Team t = team_of(plan, rank, warps);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int W = static_cast<int>(a.W), width = static_cast<int>(a.width);
  const uint32_t V = static_cast<uint32_t>(a.V);
  const int mine = (W - rank + plan.cluster - 1) >> cluster_bits;  // W is at least `cluster`
  const float rate = a.inv_temperature * static_cast<float>(kLog2e);
  const bool whole = a.softmax == Softmax::vocab;
  const int begin = whole ? 0 : static_cast<int>(a.level_begin);
  const int end = whole ? static_cast<int>(a.V) : static_cast<int>(a.level_end);
  const int wanted = whole ? static_cast<int>(a.level_end) : begin;
  const auto row_number = [&](int i) {  // of this block's beam number i
    return user * a.W + rank + static_cast<int64_t>(i) * plan.cluster;
  };
  const auto part_of_row = [&](int i) {
    return RowPart<T>(row_of<T>(a, row_number(i)), begin, end, wanted);
  };

  if (plan.cluster > 1) cluster_arrive();  // its peers may write to this block from here on
  // A team's lane r looks up the beam of its round r, of which there are no more than lanes.
  // The first row, dead or not, is on its way meanwhile.
  const int looked_up = t.index + lane * t.teams;
  int64_t node = -1;
  Beam of_lane{0, 0, -INFINITY};
  if (looked_up < mine) {
    node = a.nodes[row_number(looked_up)];
    of_lane.score = a.scores[row_number(looked_up)];
  }
  Ring ring{memory + warp * kStages * kStageBytes + lane * 16};
  const int streamed =
      a.softmax == Softmax::children ? 0 : (mine - t.index + t.teams - 1) / t.teams;
  int coming_round = 0, coming_pack = 0;  // what is copied next: the round, the row's pack
  RowPart<T> coming = part_of_row(t.index);
  const auto fill = [&] {
    ring.fill(coming, coming_pack + t.thread, t.threads);
    coming_pack += kStagePacks * t.threads;
    ring.advance();
  };
  int full = 0;  // stages
#pragma unroll 1
  for (; full < kStages && streamed > 0 && coming_pack < coming.packs; ++full) fill();
  const Children c = children_of(a, node, of_lane.score);
  of_lane.begin = static_cast<int32_t>(c.begin);
  // No trie has more children than columns: more than that is no run of labels.
  of_lane.count = static_cast<int>(c.end < c.begin ? 0 : min(c.end - c.begin, a.V));
  if (looked_up < mine && t.thread == lane) beams[looked_up] = of_lane;
  const auto fill_on = [&] {  // that row or the next one whose beam is not dead
    while (coming_round < streamed && coming_pack >= coming.packs) {
      coming_pack = 0;
      if (++coming_round >= streamed) break;
      if (__shfl_sync(0xffffffffu, of_lane.count, coming_round) > 0)
        coming = part_of_row(t.index + coming_round * t.teams);
      else
        coming_pack = coming.packs;
    }
    if (coming_round < streamed)
      fill();
    else
      commit_copies(), ring.advance();
  };
#pragma unroll 1
  for (; full < kStages; ++full) fill_on();
  const UserFilter filter = filter_of(a.filter, user);

  WarpList candidates{room + (warp << how.room), 1 << how.room, width};
  const int rounds = (mine + t.teams - 1) / t.teams;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int i = t.index + round * t.teams;  // no beam has a child from `mine` on
    const Beam own{__shfl_sync(0xffffffffu, of_lane.begin, round),
                   __shfl_sync(0xffffffffu, of_lane.count, round),
                   __shfl_sync(0xffffffffu, of_lane.score, round)};
    const int64_t row = row_number(i);
    const T* x = row_of<T>(a, row);
    // The first children's labels are on their way while the row is read.
    int32_t labels[kAtOnce];
    float logits[kAtOnce];
    const int32_t* from = a.labels + own.begin;
    const auto fetch_labels = [&](int at) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int offset = at + j * t.threads + t.thread;
        labels[j] = offset < own.count ? from[offset] : -1;
      }
    };
    const auto fetch_logits = [&] {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        logits[j] = static_cast<uint32_t>(labels[j]) < V ? load(x + labels[j]) : -INFINITY;
    };
    fetch_labels(0);
    Sum sum{-INFINITY, 0};
    if (round < streamed && (own.count > 0 || round == 0)) {
      const RowPart<T> part = part_of_row(i);
#pragma unroll 1
      for (int k = 0; k < part.packs; k += kStagePacks * t.threads) {
        ring.add_to(sum, part, k + t.thread, t.threads, rate);
        fill_on();
      }
      part.add_rest(sum, t.thread, t.threads, rate);
    } else if (own.count > 0) {
      sum = sum_part<T>(a, filter, {own.begin, own.begin + int64_t{own.count}}, row, t);
    }
    fetch_logits();
    fetch_labels(kAtOnce * t.threads);
    sum = merge_under_one_top(sum, rate);
    if (plan.warps > 1) {
      if (lane == 0) sums[warp] = sum;
      __syncthreads();
      sum = sums[t.index * plan.warps];
#pragma unroll 1
      for (int other = 1; other < plan.warps; ++other)
        sum = merge(sum, sums[t.index * plan.warps + other], rate);
      __syncthreads();  // before the next round writes
    }
    // The log of the sum is not a number where a logit is NaN or +inf, or none above -inf.
    float base = -INFINITY;
    if (sum.top > -INFINITY && sum.top < INFINITY && sum.e == sum.e) base = own.score - logf(sum.e);
    if (!(base > -INFINITY)) continue;
    const uint32_t place = static_cast<uint32_t>(rank + i * plan.cluster) << how.shift;
#pragma unroll 1
    for (int at = 0; at < own.count; at += kAtOnce * t.threads) {
      float now[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) now[j] = logits[j];
      fetch_logits();
      fetch_labels(at + 2 * kAtOnce * t.threads);
      const int groups = min(kAtOnce, (own.count - at + t.threads - 1) / t.threads);
#pragma unroll 1
      for (int j = 0; j < groups; ++j) {
        const int offset = at + j * t.threads + t.thread;
        // Adding 0 makes -0 of 0, whose order would differ.
        const float score = ((now[0] - sum.top) * a.inv_temperature + base) + 0.f;
        const uint64_t candidate = static_cast<uint64_t>(falling_key(score)) << 32 |
                                   (place | static_cast<uint32_t>(offset));
        const bool has = score > -INFINITY && candidate < candidates.floor &&
                         may_enter(filter, int64_t{own.begin} + offset);
        if (__any_sync(0xffffffffu, has)) candidates.push(has, candidate, lane);
#pragma unroll
        for (int next = 0; next + 1 < kAtOnce; ++next) now[next] = now[next + 1];
      }
    }
  }

  // The block's best go to every block of the user, each of which then finds the rank of
  // its own: how many of all come before it.
  uint64_t* best = few;
  const int count = keep_best(best, room, candidates, how.room);
  const int list = static_cast<int>(plan.list), i = static_cast<int>(threadIdx.x);
  const uint64_t own = i < count ? best[i] : kNoCandidate;
  const int beam = static_cast<int>(static_cast<uint32_t>(own) >> how.shift);
  int64_t token = -1;
  node = -1;
  if (own != kNoCandidate) {
    node = int64_t{beams[(beam - rank) >> cluster_bits].begin} +
           (static_cast<uint32_t>(own) & ((1u << how.shift) - 1u));
    token = a.labels[node];
  }
  if (plan.cluster > 1) cluster_wait();
#pragma unroll 1
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
    const int better = count_before(lists, plan.cluster, list, rank, i, width, own);
    if (better < width) {
      const int64_t o = user * a.width + better;
      a.out_scores[o] = of_falling_key(key_of(own));
      a.out_parent[o] = beam;
      a.out_token[o] = token;
      a.out_node[o] = node;
    }
  }
  if (rank != 0) return;
  int found = 0;
#pragma unroll 1
  for (int other = 0; other < plan.cluster; ++other) found += list_counts[other];
#pragma unroll 1
  for (int o = found + i; o < width; o += static_cast<int>(blockDim.x)) {
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

// A block a user; or up to eight, where users are few and have beams to share.  Those are
// no more than `most` in all and run at once, since a second wave would take as long as
// the first.
// `shared(cluster)` is a block's dynamic shared memory.
template <class Kernel, class Shared>
Launch launch_of(const StepArgs& a, Kernel kernel, int threads, int64_t most, const Shared& shared,
                 Plan& plan) {
  plan.list = power_of_two_from(a.width);
  const auto with = [&](int cluster) {
    Launch how{a.U * cluster, threads, shared(cluster)};
    how.cluster = cluster;
    return how;
  };
  plan.cluster = 1;
  if (device_limits().capability >= 90 && knows_clusters(kernel))
    for (int next = 2; next <= kLargestCluster && next <= a.W && next * a.U <= most; next *= 2) {
      if (clusters_at_once(kernel, with(next)) < a.U) break;
      plan.cluster = next;
    }
  const int64_t beams = (a.W + plan.cluster - 1) / plan.cluster;
  const int warps = threads / kWarp;
  while (plan.warps < warps && 2 * plan.warps * beams <= warps) plan.warps *= 2;
  return with(plan.cluster);
}

template <class T>
int launch_children(const StepArgs& a, int shift, void* stream) {
  const DeviceLimits limits = device_limits();
  constexpr int64_t kOwn = 10 << 10;  // besides, static arrays
  ChildrenPlan children{shift, kWarpRoomBits};
  const int64_t list = power_of_two_from(a.width);
  while ((1 << children.room) < 2 * list) ++children.room;
  Plan plan;
  const auto launch_with = [&](int threads) {
    plan = Plan{};
    return launch_of(
        a, best_children<T>, threads, limits.multiprocessors,
        [&](int cluster) {
          const size_t words = (static_cast<size_t>(threads / kWarp) << children.room) +
                               static_cast<size_t>(cluster * list);
          return static_cast<size_t>(threads / kWarp * kStages * kStageBytes) +
                 words * sizeof(uint64_t);
        },
        plan);
  };
  Launch how = launch_with(kMostThreads);
  // Half the threads where their memory does not fit or they would have nothing to read.
  constexpr int64_t kStageColumns = kStageBytes / sizeof(T);
  const int64_t columns = a.softmax == Softmax::vocab   ? a.V
                          : a.softmax == Softmax::level ? a.level_end - a.level_begin
                                                        : 0;
  const int64_t beams = (a.W + plan.cluster - 1) / plan.cluster;
  if (static_cast<int64_t>(how.shared) + kOwn > limits.shared_per_block ||
      beams * ((columns + kStageColumns - 1) / kStageColumns) <= kWarps)
    how = launch_with(kStepThreads);
  how.stream = stream;
  return launch(best_children<T>, how, a, plan, children);
}

template <class T, bool kSampling>
int launch_step(const StepArgs& a, void* stream) {
  if constexpr (!kSampling)
    if (const int shift = child_bits(a); shift >= 0) return launch_children<T>(a, shift, stream);
  Plan plan;
  Launch how = launch_of(
      a, step_users<T, kSampling>, kStepThreads, int64_t{2} * device_limits().multiprocessors,
      [](int) { return size_t{0}; }, plan);
  how.stream = stream;
  plan.states = static_cast<BeamState*>(a.workspace);
  plan.winners = reinterpret_cast<Winner*>(static_cast<char*>(a.workspace) + states_bytes(a));
  return launch(step_users<T, kSampling>, how, a, plan);
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
