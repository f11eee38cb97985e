// CUDA kernels of constrained decoding.  Torch-free: raw pointers and a stream in,
// an error code out.
//
// One launch a step.  A user is taken by one block, or on devices with clusters by
// up to eight: each normalises the rows of its own beams, then all choose together.
// The best are found by radix selection: a histogram of the candidates' highest
// digit tells where the last that is kept lies, then the next digit of those that
// share it, until what is kept is known exactly.  A candidate is ordered by (key,
// parent, node), no two alike, so equal input gives equal bits.  Candidates are not
// stored: each pass computes them anew from the logits, which are in cache by then.
// No index is trusted and nothing waits for the device, so every call can be
// captured in a graph.
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
    for (int i = 0; i < kBinsAThread; ++i) mine[i] += from[first + i];
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
        const int64_t i = pair / gap * 2 * gap + pair % gap, j = i + gap;
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
      atomicAdd(&bins[word >> shift & span], 1u);
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

// ---- launches ----

int64_t power_of_two_from(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

int64_t states_bytes(const StepArgs& a) {
  return a.U * a.W * static_cast<int64_t>(sizeof(BeamState));
}

int64_t workspace(const StepArgs& a) {
  return states_bytes(a) + a.U * power_of_two_from(a.width) * static_cast<int64_t>(sizeof(Winner));
}

template <class T, bool kSampling>
int launch_step(const StepArgs& a, void* stream) {
  const auto kernel = step_users<T, kSampling>;
  Plan plan;
  plan.list = power_of_two_from(a.width);
  plan.states = static_cast<BeamState*>(a.workspace);
  plan.winners = reinterpret_cast<Winner*>(static_cast<char*>(a.workspace) + states_bytes(a));
  const DeviceLimits limits = device_limits();
  // Two blocks a processor, where users are few and have beams to share.
  if (limits.capability >= 90 && knows_clusters(kernel))
    while (plan.cluster < 8 && 2 * plan.cluster <= a.W &&
           a.U * plan.cluster < 2 * limits.multiprocessors)
      plan.cluster *= 2;
  const int64_t beams = (a.W + plan.cluster - 1) / plan.cluster;
  while (plan.warps < kWarps && 2 * plan.warps * beams <= kWarps) plan.warps *= 2;
  Launch how{a.U * plan.cluster, kStepThreads};
  how.cluster = plan.cluster;
  how.stream = stream;
  return launch(kernel, how, a, plan);
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
