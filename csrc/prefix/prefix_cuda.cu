// CUDA kernels of the prefix family.  Torch-free: raw pointers and a stream in, an
// error code out.
//
// A pointwise row stands on its own: one launch reads it, finds its k-th largest if asked,
// and leaves its gradient.  Of up to kHeldRow halves or floats, threads keep it in their
// registers; a longer one is kept in the shared memory of a block, or of a cluster of up
// to eight, and read again where it does not fit.
// The pairwise loss takes its log-probabilities from policy's kernels; here is what
// lies between them and their slopes.  No index is trusted, nothing waits for the
// device, and every sum is folded in a fixed order.
#include "common/held_row_cuda.cuh"
#include "common/scores_cuda.cuh"
#include "prefix/kernels.h"
#include "prefix/pairwise.h"

namespace genrec::prefix {
namespace {

using namespace genrec::cuda;

// The threads of a row: a warp, a block, or the blocks of a cluster.
struct Team {
  int thread, threads, cluster;

  __device__ __forceinline__ void sync() const {
    if (cluster > 1)
      cluster_sync();
    else if (threads == kWarp)
      __syncwarp();
    else
      __syncthreads();
  }
};

// ---- the k-th largest of a row ----

// Keys in the order of the numbers.
__device__ __forceinline__ uint32_t rising_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ uint64_t rising_key(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 63) != 0 ? ~uint64_t{0} : uint64_t{1} << 63);
}
template <class S, class Key>
__device__ __forceinline__ S of_rising_key(Key key) {
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  const Key bits = key ^ ((key & kSign) != 0 ? kSign : ~Key{0});
  S x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class S>
using KeyOf = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;

constexpr int kDigits = 256;

// What the threads of a row share to find its k-th largest.
template <class S>
struct alignas(16) Selection {
  static constexpr int kRoom = 2048 / sizeof(S);
  union {
    KeyOf<S> keys[kRoom];
    uint32_t histogram[kDigits];
  };
  uint64_t prefix;  // the digits so far
  uint32_t left;    // of those with this prefix, the left-th largest
  uint32_t count;   // of the entries that are candidates
  S found;          // a bound, then the k-th largest

  __device__ __forceinline__ void put(uint32_t at, S x) {
    if (at < kRoom) keys[at] = rising_key(x);
  }
};

template <class Key>
__device__ __forceinline__ Key warp_largest(Key key) {
  if constexpr (sizeof(Key) == 4) {
    return __reduce_max_sync(0xffffffffu, key);
  } else {
#pragma unroll
    for (int width = kWarp / 2; width > 0; width /= 2) {
      const Key other = __shfl_xor_sync(0xffffffffu, key, width);
      key = other > key ? other : key;
    }
    return key;
  }
}

// By one warp, of n >= k keys: the least of the best, which are the k largest or, so
// that it is found sooner, up to `more` others with them.  Equal keys may be more.
template <class Key>
__device__ __forceinline__ Key least_of_best(const Key* keys, int n, int k, int more, int lane) {
  Key high = 0, low = ~Key{0};
  for (int i = lane; i < n; i += kWarp) {
    high = keys[i] > high ? keys[i] : high;
    low = keys[i] < low ? keys[i] : low;
  }
  high = warp_largest(high);
  low = static_cast<Key>(~warp_largest(static_cast<Key>(~low)));
  if (high == low) return high;
  // Bit by bit from the first that differs, with at least k keys not below `least`.
  int count = n;
  Key bit = Key{1} << (63 - __clzll(static_cast<long long>(high ^ low)));
  Key least = high & ~(bit | (bit - 1));
  for (; bit != 0 && count > k + more; bit >>= 1) {
    const Key next = least | bit;
    int above = 0;
    for (int i = lane; i < n; i += kWarp) above += keys[i] >= next ? 1 : 0;
    above = __reduce_add_sync(0xffffffffu, above);
    if (above < k) continue;
    least = next;
    count = above;
  }
  low = ~Key{0};
  for (int i = lane; i < n; i += kWarp) low = keys[i] >= least && keys[i] < low ? keys[i] : low;
  return static_cast<Key>(~warp_largest(static_cast<Key>(~low)));
}

// Digit by digit from the highest, by a histogram of those that share the digits so
// far: for any number of entries, of which at least k are numbers.
template <class S, class Each>
__device__ __forceinline__ S kth_by_digits(int64_t k, const Team& team, Selection<S>& s,
                                           const Each& each) {
  using Key = KeyOf<S>;
  constexpr int kBits = 8 * sizeof(Key);
  if (team.thread == 0) s.prefix = 0, s.left = static_cast<uint32_t>(k);
  for (int shift = kBits - 8; shift >= 0; shift -= 8) {
    for (int i = team.thread; i < kDigits; i += team.threads) s.histogram[i] = 0;
    team.sync();
    const Key prefix = static_cast<Key>(s.prefix);
    each([&](S x) {
      const Key key = rising_key(x);
      if (x == x && (shift == kBits - 8 || (key ^ prefix) >> (shift + 8) == 0))
        atomicAdd(&s.histogram[(key >> shift) & (kDigits - 1)], 1u);
    });
    team.sync();
    if (team.thread < kWarp) {  // a lane counts eight digits, the first lane the largest
      constexpr int kEach = kDigits / kWarp;
      const int top = kDigits - 1 - team.thread * kEach;
      uint32_t mine = 0;
      for (int i = 0; i < kEach; ++i) mine += s.histogram[top - i];
      uint32_t upto = mine;
#pragma unroll
      for (int width = 1; width < kWarp; width *= 2) {
        const uint32_t before = __shfl_up_sync(0xffffffffu, upto, width);
        if (team.thread >= width) upto += before;
      }
      const uint32_t left = s.left;
      __syncwarp();
      if (upto >= left && upto - mine < left) {
        uint32_t above = upto - mine;
        int digit = top;
        for (; above + s.histogram[digit] < left; --digit) above += s.histogram[digit];
        s.prefix = prefix | static_cast<Key>(digit) << shift;
        s.left = left - above;
      }
    }
    team.sync();
  }
  return of_rising_key<S>(static_cast<Key>(s.prefix));
}

// The k-th largest of a row of n entries, without those that are NaN; -inf where there
// are fewer.  `tops` are the largest of each of kTops parts of this thread's entries, -inf
// where a part has none.  collect(bound) counts and puts this thread's entries that are
// not below `bound`, and each(f) calls f for all of them.
//
// At least k entries are no less than the k-th largest of many parts' largest.  Those
// that are not below it are usually few more than k, and go to a list in any order; so
// the row is looked at once, and one warp does the rest.
template <class S, int kTops, class Collect, class Each>
__device__ __forceinline__ S kth_largest(int64_t k, int64_t n, const Team& team, Selection<S>& s,
                                         const S (&tops)[kTops], const Collect& collect,
                                         const Each& each) {
  constexpr int kRoom = Selection<S>::kRoom;
  if (k > n) return static_cast<S>(-INFINITY);
  int groups = kTops * team.threads;
  if (groups <= kRoom) {
#pragma unroll
    for (int i = 0; i < kTops; ++i) s.keys[i * team.threads + team.thread] = rising_key(tops[i]);
  } else {  // of neighbours together
    S top = tops[0];
#pragma unroll
    for (int i = 1; i < kTops; ++i) top = tops[i] > top ? tops[i] : top;
    int width = 1;
    for (; team.threads / width > kRoom; width *= 2) {
      const S other = __shfl_xor_sync(0xffffffffu, top, width);
      top = other > top ? other : top;
    }
    if (team.thread % width == 0) s.keys[team.thread / width] = rising_key(top);
    groups = team.threads / width;
  }
  if (team.thread == 0) s.count = 0;
  team.sync();
  if (team.thread < kWarp) {
    const int few = static_cast<int>(k);
    const S bound = k <= groups
                        ? of_rising_key<S>(least_of_best(s.keys, groups, few, few / 8, team.thread))
                        : static_cast<S>(-INFINITY);
    if (team.thread == 0) s.found = bound;
  }
  team.sync();
  collect(s.found);
  team.sync();
  const uint32_t count = s.count;
  if (count < k) return static_cast<S>(-INFINITY);
  if (count > kRoom) return kth_by_digits(k, team, s, each);
  if (team.thread < kWarp) {
    const auto key =
        least_of_best(s.keys, static_cast<int>(count), static_cast<int>(k), 0, team.thread);
    if (team.thread == 0) s.found = of_rising_key<S>(key);
  }
  team.sync();
  return s.found;
}

// ---- pointwise ----

// What the loss of user n's token t is multiplied with, but for its weight by `beam`; the
// whole warp is here, and a lane divides for a prefix.
template <class S>
__device__ __forceinline__ S factor_of(const RowsArgs& a, int64_t n, int64_t t, int lane) {
  double factor = lane == 0 ? a.factors.per_token : 0;
#pragma unroll 1
  for (int64_t u = t + lane; u < a.factors.P; u += kWarp) factor += a.factors.share<S>(u);
  factor = sum_warp(factor) * a.outer.of_user<S>(n);
  if (a.beam.choices != nullptr) factor /= *static_cast<const S*>(a.beam.choices);
  return static_cast<S>(factor);
}

// Keeps the row's log-probability and gives the slope of its gradient: 0 where it has none.
template <class S>
__device__ __forceinline__ RowSlope<S> finish_row(const RowsArgs& a, int64_t r, int64_t n,
                                                  const Partial<S>& sum, const Token<S>& token,
                                                  S bound, S factor, bool keeps) {
  const S inverse = static_cast<S>(a.in.inv_temperature);
  const RowState<S> row = state_of(a.in, n, sum, token);
  const Normalizer<S>& z = row.z;
  const S logp = row.logp > S(0) ? S(0) : row.logp;  // by rounding; NaN stays
  S weight = S(1);
  if (a.beam.width > 0)
    weight = n > 1 ? a.beam.of_token<S>(logp, (bound - z.top) * inverse - z.log_sum) : S(0);
  if (keeps) static_cast<S*>(a.logps)[r] = weight == S(0) ? S(0) : weight * logp;
  return {z, static_cast<S>(a.in.inv_temperature * kLog2e),
          token.held ? -factor * weight * inverse : S(0), S(0)};
}

// ---- rows that fit the registers ----

// Rows of all columns or a range, of halves or floats.  Of one warp, a block has several rows
// and no barrier.
template <class T, bool kBeam>
__global__ void __launch_bounds__(kThreads, kBeam ? 3 : 2) short_rows(RowsArgs a, int warps) {
  Scores in = a.in;
  in.support.begin = nullptr;  // so that there is no code for lists
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int local = warps == 1 ? warp : 0;
  const int64_t r = warps == 1 ? blockIdx.x * int64_t{kHeldRows} + warp : blockIdx.x;
  if (r >= in.N * in.T) return;
  const float rate = static_cast<float>(in.inv_temperature * kLog2e);  // above 0

  const RowColumns c = columns_of(in, r);
  const T* x = row_of<T>(in, r);
  HeldRow<T, true> row;
  const Team team{warps == 1 ? lane : static_cast<int>(threadIdx.x), warps * kWarp, 1};
  row.load_all(x + c.first, static_cast<int>(c.n), warps == 1 ? 0 : warp, lane);
  const int64_t column = in.tokens[r];
  // All loads are on their way before anything waits for one.
  __syncwarp();
  const int64_t user = r / in.T;
  const float factor =
      a.grad_logits == nullptr ? 0 : factor_of<float>(a, user, r - user * in.T, lane);
  const Token<float> found = token_of<T>(in, c, x, column);
  const int own = found.held ? static_cast<int>(column - c.first) : -1;
  const Token<float> token{0, own >= 0, found.logit};

  float tops[4];
  row.find_tops(tops);
  float bound = -INFINITY;
  if constexpr (kBeam) {
    GENREC_SHARED(Selection<float>, selections, kHeldRows);
    Selection<float>& selection = selections[local];
    const auto held = [&](const auto& f) {
#pragma unroll
      for (int j = 0; j < row.kPacks; ++j)
        if (row.pack + j * kWarp < row.packs)
#pragma unroll
          for (int i = 0; i < row.kSize; ++i) f(row.logit(j * row.kSize + i));
      if (row.edge_at >= 0) f(row.edge);
    };
    const auto collect = [&](float least) {  // with one wait for an atomic, not one a column
      uint32_t mine = 0;
      held([&](float x) { mine += x >= least ? 1 : 0; });
      uint32_t at = mine == 0 ? 0 : atomicAdd(&selection.count, mine);
      held([&](float x) {
        if (x >= least) selection.put(at++, x);
      });
    };
    const auto in_memory = [&](const auto& f) {
      for (int i = team.thread; i < row.n; i += team.threads) f(load(x + c.first + i));
    };
    bound = kth_largest(a.beam.width, row.n, team, selection, tops, collect, in_memory);
  }
  Partial<float> sum = row.template sum_warp_of<false>(tops, rate);
  if (warps > 1) {
    GENREC_SHARED(Partial<float>, sums, kWarps);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    sum = merge_held<false>(sums, warps, rate, lane);
  }

  const RowSlope<float> slope = finish_row(a, r, c.n, sum, token, bound, factor, team.thread == 0);
  if (a.grad_logits == nullptr) return;
  T* g = static_cast<T*>(a.grad_logits) + r * in.V;
  if (slope.a == 0) return zero_columns(g, {0, in.V}, team.thread, team.threads);
  row.write_grad(g, in.V, static_cast<int>(c.first), slope, sum, own, token.logit,
                 static_cast<float>(in.inv_temperature), team.threads);
}

// ---- rows of any kind ----

// How rows are taken: by a warp each, by a block, or by the blocks of a cluster.
struct RowsPlan {
  int warps = 0;  // of a block's, those of a row
  int cluster = 1;
  int64_t row_bytes = 0;  // of what a block keeps of a row; 0: it is read again
  size_t shared = 0;
};

// Shared memory: the warps' sums, for the k-th largest a selection a row, then the rows.
// A block of a cluster has its part of the V columns; of a list, there is no cluster.
template <class T, bool kBeam>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t<T>) == 8 ? 1 : 3)
    weighted_rows(RowsArgs a, RowsPlan plan) {
  using S = acc_t<T>;
  const Scores& in = a.in;
  GENREC_SHARED(Partial<S>, sums, kWarps);
  GENREC_DYNAMIC_SHARED(unsigned char, memory);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool by_warps = plan.warps == 1;
  const int local = by_warps ? warp : 0;
  const int rank = plan.cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  // Of this block's part.
  const int thread = by_warps ? lane : static_cast<int>(threadIdx.x), threads = plan.warps * kWarp;
  const Team team{rank * threads + thread, plan.cluster * threads, plan.cluster};
  const int64_t r =
      by_warps ? blockIdx.x * int64_t{kWarps} + warp : int64_t{blockIdx.x} / plan.cluster;
  if (r >= in.N * in.T) return;
  const S rate = static_cast<S>(in.inv_temperature * kLog2e);

  const RowColumns c = columns_of(in, r);
  const Share columns = share_of(in.V, rank, plan.cluster);
  RowColumns own = c;
  if (c.list == nullptr) {
    own.first = bounded(c.first, columns.begin, columns.end);
    own.n = bounded(c.first + c.n, own.first, columns.end) - own.first;
  }
  const T* x = row_of<T>(in, r);
  const int64_t column = in.tokens[r];
  Selection<S>* selection = reinterpret_cast<Selection<S>*>(memory) + local;
  T* keep = nullptr;
  if (plan.row_bytes > 0) {
    const int64_t before = kBeam ? kWarps / plan.warps * sizeof(Selection<S>) : 0;
    keep = keep_at(memory + before + local * plan.row_bytes, own, x);
  }

  Partial<S> sum = sum_part<T>(in, own, x, {0, own.n}, thread, threads, keep);
  const S tops[] = {sum.top};
  sum.w = S(0);  // only the entropy needs it
  sum = merge_warp(sum, rate);
  if (lane == 0) sums[warp] = sum;
  team.sync();
  const int64_t user = r / in.T;
  const S factor = a.grad_logits == nullptr ? S(0) : factor_of<S>(a, user, r - user * in.T, lane);
  const Token<S> token = token_of<T>(in, c, x, column);
  if (!by_warps) {
    sum = empty_partial<S>();
    for (int i = lane; i < plan.cluster * kWarps; i += kWarp) {
      Partial<S>* of = sums;
      if (plan.cluster > 1) of = cluster_peer(of, static_cast<unsigned>(i / kWarps));
      sum = merge(sum, {of[i % kWarps].top, of[i % kWarps].e, S(0)}, rate);
    }
    sum = merge_warp(sum, rate);
  }

  S bound = static_cast<S>(-INFINITY);
  if constexpr (kBeam) {
    if (plan.cluster > 1) selection = cluster_peer(selection, 0);
    const auto one_by_one = [&](const auto& f) {
      for (int64_t i = thread; i < own.n; i += threads) {
        const int64_t v = own.list == nullptr ? own.first + i : own.list[i];
        if (v >= 0 && v < in.V) f(load(keep != nullptr ? keep + i : x + v));
      }
    };
    const auto collect = [&](S least) {
      const auto one = [&](S x) {
        if (x >= least) selection->put(atomicAdd(&selection->count, 1u), x);
      };
      if (own.list != nullptr) return one_by_one(one);
      const T* from = keep != nullptr ? keep : x + own.first;
      read_packs(
          from, {0, own.n}, thread, threads,
          [&](int64_t, const Pack<T>& pack) {
#pragma unroll
            for (int j = 0; j < Pack<T>::kSize; ++j) one(load(&pack.v[j]));
          },
          [&](int64_t i) { one(load(from + i)); });
    };
    bound = kth_largest(a.beam.width, c.n, team, *selection, tops, collect, one_by_one);
  }
  if (plan.cluster > 1) team.sync();  // nobody leaves while its sums or selection are read
  const RowSlope<S> slope = finish_row(a, r, c.n, sum, token, bound, factor, team.thread == 0);
  if (a.grad_logits == nullptr) return;
  const RowSource<T> from =
      keep != nullptr ? RowSource<T>{keep, true} : RowSource<T>{x + own.first, false};
  write_grad<T>(own, from, slope, token.held ? token.column : -1,
                static_cast<S>(in.inv_temperature), static_cast<T*>(a.grad_logits) + r * in.V,
                columns, thread, threads);
}

template <class S>
__global__ void __launch_bounds__(kThreads) choices(ChoicesArgs a) {
  GENREC_SHARED(double, parts, kThreads);
  const double count = sum_block<4>(
      a.in.N * a.in.T, parts, [&](int64_t r) { return columns_of(a.in, r).n > 1 ? 1.0 : 0.0; });
  if (threadIdx.x == 0) *static_cast<S*>(a.count) = static_cast<S>(count > 1 ? count : 1);
}

constexpr int kFinishThreads = 1024;

// One block: the log-probabilities are few, and read once for all levels.  Up to
// kFinishThreads levels at a time, each thread adds those of one.
template <class S>
__global__ void __launch_bounds__(kFinishThreads) finish_rows(FinishArgs a) {
  GENREC_SHARED(double, parts, kFinishThreads);
  GENREC_SHARED(double, sums, kFinishThreads);
  GENREC_SHARED(double, factors, kFinishThreads);
  GENREC_SHARED(double, shares, kFinishThreads);
  const S* logps = static_cast<const S*>(a.logps);
  const S choices = a.choices != nullptr ? *static_cast<const S*>(a.choices) : S(1);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  double total = 0, before = 0;  // the sum of the tokens before, over all users
  for (int64_t from = 0; from < a.T; from += kFinishThreads) {
    const int levels = static_cast<int>(bounded(a.T - from, 0, kFinishThreads));
    const int users = kFinishThreads / levels;  // at a time
    const int user = thread / levels, level = thread % levels;
    double mine = 0;
    if (user < users)
      mine = sum_strided<8>(a.N, user, users, [&](int64_t n) {
        return static_cast<double>(logps[n * a.T + from + level]);
      });
    __syncthreads();  // whoever still reads those before
    parts[thread] = mine;
    // Each prefix's share by a thread of its own, as far as there are so many.
    const bool shared = a.factors.P <= kFinishThreads;
    if (shared && thread < a.factors.P) shares[thread] = a.factors.share<S>(thread);
    __syncthreads();
    if (thread < levels) {
      double factor = a.factors.per_token;
      for (int64_t u = from + thread; shared && u < a.factors.P; ++u) factor += shares[u];
      factors[thread] = shared ? factor : a.factors.of_token<S>(from + thread);
    }
    for (int t = warp; t < levels; t += kFinishThreads / kWarp) {
      const double sum = sum_warp(
          sum_strided<2>(users, lane, kWarp, [&](int64_t i) { return parts[i * levels + t]; }));
      if (lane == 0) sums[t] = sum;
    }
    __syncthreads();
    // In the order of the tokens: up to a thread's own, then all.
    if (thread < levels && from + thread < a.factors.P) {
      double upto = before;
      for (int t = 0; t <= thread; ++t) upto += sums[t];
      static_cast<S*>(a.levels)[from + thread] =
          static_cast<S>(-upto / static_cast<double>(a.N > 0 ? a.N : 1) /
                         ((from + thread + 1) * a.factors.prefix_temperature));
    }
    if (thread == 0 || levels == kFinishThreads)
      for (int t = 0; t < levels; ++t) {
        total -= factors[t] * sums[t];
        before += sums[t];
      }
  }
  if (a.total != nullptr && thread == 0)
    *static_cast<S*>(a.total) = static_cast<S>(total * a.scale / choices);
  if (a.losses == nullptr) return;
  const bool known = a.T <= kFinishThreads;  // the factors, all at once
  for (int64_t n = thread; n < a.N; n += kFinishThreads) {
    double loss = 0;
    for (int64_t t = 0; t < a.T; ++t)
      loss -= (known ? factors[t] : a.factors.of_token<S>(t)) * logps[n * a.T + t];
    static_cast<S*>(a.losses)[n] = static_cast<S>(loss * a.scale / choices);
  }
}

// ---- pairwise ----

// A block a user; each of its warps takes a level, then they meet, and a thread takes
// candidates.  What is known of a lane's first kHeld candidates it keeps.
template <class S>
__global__ void __launch_bounds__(kThreads, 2) pairwise(PairwiseArgs a) {
  constexpr int kHeld = 4;
  const int64_t n = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  S* slopes = a.slopes != nullptr ? static_cast<S*>(a.slopes) + n * a.C * a.T : nullptr;
#pragma unroll 1
  for (int64_t t = warp; t < a.factors.P; t += kWarps) {
    double held[kHeld] = {};
#pragma unroll 2
    for (int64_t u = 0; u <= t; ++u)
#pragma unroll
      for (int j = 0; j < kHeld; ++j)
        if (const int64_t i = lane + j * kWarp; i < a.C) held[j] += token_ahead<S>(a, n, i, u);
    // A duplicate counts for nothing, and the positive is ahead of itself by 0.
    double top = 0;
    const auto larger = [&](double x) { top = x > top || x != x ? x : top; };
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int64_t i = lane + j * kWarp;
      held[j] = i > 0 && i < a.C ? prefix_ahead<S>(a, n, i, t, held[j]) : -INFINITY;
      larger(held[j]);
    }
#pragma unroll 1
    for (int64_t i = lane + kHeld * kWarp; i < a.C; i += kWarp)
      larger(ahead_of_positive<S>(a, n, i, t));
#pragma unroll
    for (int width = kWarp / 2; width > 0; width /= 2)
      larger(__shfl_xor_sync(0xffffffffu, top, width));
    double others = 0;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) others += held[j] = relative_power(held[j], top);
#pragma unroll 1
    for (int64_t i = lane + kHeld * kWarp; i < a.C; i += kWarp)
      others += relative_power(ahead_of_positive<S>(a, n, i, t), top);
    others = sum_warp(others);
    const double sum = others + exp(-top);
    if (lane == 0)
      static_cast<S*>(a.user_levels)[t * a.N + n] =
          static_cast<S>((top == 0 ? log1p(others) : top + log(sum)) / (t + 1));
    if (slopes == nullptr) continue;
    const double slope = prefix_slope<S>(a, n, t) / sum;
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      if (const int64_t i = lane + j * kWarp; i < a.C)
        slopes[i * a.T + t] = static_cast<S>(i == 0 ? -slope * others : slope * held[j]);
#pragma unroll 1
    for (int64_t i = lane + kHeld * kWarp; i < a.C; i += kWarp)
      slopes[i * a.T + t] =
          static_cast<S>(slope * relative_power(ahead_of_positive<S>(a, n, i, t), top));
  }
  if (slopes == nullptr) return;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.C; i += kThreads) slopes_by_token(a, n, i, slopes + i * a.T);
}

// One block, a warp of it a level.
template <class S>
__global__ void __launch_bounds__(kThreads) finish_pairs(FinishPairwiseArgs a) {
  GENREC_SHARED(double, parts, kThreads);
  GENREC_SHARED(double, means, kWarps);
  const double users = static_cast<double>(a.N > 0 ? a.N : 1);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const S* levels = static_cast<const S*>(a.user_levels);
  double cross_entropy = 0;
#pragma unroll 1
  for (int64_t t = 0; t < a.T; ++t)
    cross_entropy += sum_strided<4>(a.N, threadIdx.x, kThreads,
                                    [&](int64_t n) { return -logp_at<S>(a, n * a.C * a.T + t); });
  cross_entropy = sum_block(kThreads, parts, [&](int64_t) { return cross_entropy; });
  double total = a.factors.per_token * cross_entropy / users;
#pragma unroll 1
  for (int64_t from = 0; from < a.factors.P; from += kWarps) {
    const int64_t t = from + warp;
    if (t < a.factors.P) {
      const double mean = sum_warp(sum_strided<4>(a.N, lane, kWarp,
                                                  [&](int64_t n) {
                                                    return static_cast<double>(levels[t * a.N + n]);
                                                  })) /
                          users;
      if (lane == 0) {
        static_cast<S*>(a.levels)[t] = static_cast<S>(mean);
        means[warp] = a.factors.beta * static_cast<const S*>(a.factors.weights)[t] * mean;
      }
    }
    __syncthreads();
    for (int i = 0; threadIdx.x == 0 && i < kWarps && from + i < a.factors.P; ++i)
      total += means[i];
    __syncthreads();
  }
  if (threadIdx.x == 0) *static_cast<S*>(a.total) = static_cast<S>(total);
}

// ---- launches ----

// A cluster is the smallest whose blocks leave room for others on their processor; else
// the largest, also where no block can keep its part: then each reads little again, which
// is still in the cache.
template <class T>
RowsPlan plan_rows(const RowsArgs& a) {
  using S = acc_t<T>;
  constexpr int64_t kWarpRow = 2048;  // a warp a row of up to this many columns
  constexpr int kLargestCluster = 8;  // what every device with clusters grants
  const DeviceLimits limits = device_limits();
  RowsPlan plan;
  plan.warps = a.in.V <= kWarpRow ? 1 : kWarps;
  const int64_t count = kWarps / plan.warps;
  const int64_t selections =
      a.beam.width > 0 ? count * static_cast<int64_t>(sizeof(Selection<S>)) : 0;
  const bool cut = plan.warps > 1 && a.in.support.begin == nullptr && limits.capability >= 90 &&
                   knows_clusters(weighted_rows<T, false>);
  const auto bytes_in = [&](int cluster) {
    return kept_bytes<T>(round_up(blocks_for(a.in.V, cluster), kPartStep));
  };
  if (cut)
    while (plan.cluster < kLargestCluster && selections + bytes_in(plan.cluster) > kPlainShared)
      plan.cluster *= 2;
  plan.shared = static_cast<size_t>(selections);
  if (a.grad_logits == nullptr && a.beam.width == 0) return plan;
  const int64_t row_bytes = bytes_in(plan.cluster);
  constexpr int64_t kOwn = 2048;  // besides, the block's sums
  if (selections + count * row_bytes + kOwn > limits.shared_per_block) return plan;
  plan.row_bytes = row_bytes;
  plan.shared = static_cast<size_t>(selections + count * row_bytes);
  return plan;
}

template <class T>
int launch_short_rows(const RowsArgs& a, void* stream) {
  const int warps = held_warps(a.in.V);
  const Launch how = on_rows(a.in.N * a.in.T, warps, stream);
  return a.beam.width > 0 ? launch(short_rows<T, true>, how, a, warps)
                          : launch(short_rows<T, false>, how, a, warps);
}

int rows_of(const RowsArgs& a, void* stream) {
  return by_dtype(a.in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if constexpr (sizeof(acc_t<T>) == sizeof(float))
      if (a.in.support.begin == nullptr && a.in.V <= kHeldRow)
        return launch_short_rows<T>(a, stream);
    const RowsPlan plan = plan_rows<T>(a);
    const int64_t rows = a.in.N * a.in.T;
    Launch how =
        on(plan.warps == 1 ? blocks_for(rows, kWarps) : rows * plan.cluster, kThreads, stream);
    how.shared = plan.shared;
    how.cluster = plan.cluster;
    return a.beam.width > 0 ? launch(weighted_rows<T, true>, how, a, plan)
                            : launch(weighted_rows<T, false>, how, a, plan);
  });
}

int choices_of(const ChoicesArgs& a, void* stream) {
  return by_accumulator(a.in.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    return launch(choices<S>, on(1, kThreads, stream), a);
  });
}

int finish_of(const FinishArgs& a, void* stream) {
  return by_accumulator(a.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    return launch(finish_rows<S>, on(1, kFinishThreads, stream), a);
  });
}

int pairwise_of(const PairwiseArgs& a, void* stream) {
  return by_accumulator(a.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    return launch(pairwise<S>, on(a.N, kThreads, stream), a);
  });
}

int finish_pairwise_of(const FinishPairwiseArgs& a, void* stream) {
  return by_accumulator(a.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    return launch(finish_pairs<S>, on(1, kThreads, stream), a);
  });
}

}  // namespace

extern const CudaKernels prefix_cuda_kernels;
const CudaKernels prefix_cuda_kernels{rows_of, choices_of, finish_of, pairwise_of,
                                      finish_pairwise_of};

}  // namespace genrec::prefix
