// CUDA kernels of the prefix family.  Torch-free: raw pointers and a stream in, an
// error code out.
//
// A pointwise row stands on its own: one launch reads it, keeps it in shared memory
// where it fits, finds the k-th largest there if asked, and leaves its gradient.
// The pairwise loss takes its log-probabilities from policy's kernels; here is what
// lies between them and their slopes.  No index is trusted, nothing waits for the
// device, and every sum is folded in a fixed order.
#include "common/scores_cuda.cuh"
#include "prefix/kernels.h"
#include "prefix/pairwise.h"

namespace genrec::prefix {
namespace {

using namespace genrec::cuda;

// ---- the k-th largest of a row ----

// Keys in the order of the numbers.
__device__ __forceinline__ uint32_t rising_key(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
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

constexpr int kDigits = 256;

// What the threads of a row know of the k-th largest.
struct Search {
  uint64_t prefix;  // its digits so far
  uint32_t left;    // of those with this prefix, the left-th largest
  bool none;        // there are fewer than k
};

// Digit by digit from the highest, by a histogram of those that share the digits so
// far.  Every thread of the block is here; the row's have `thread` of `threads`, whole
// warps, and a histogram and a search of their own.  each(f) calls f for every entry
// of this thread.
template <class S, class Each>
__device__ __forceinline__ S kth_largest(int64_t k, int thread, int threads, uint32_t* histogram,
                                         Search* search, const Each& each) {
  using Key = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;
  constexpr int kBits = 8 * sizeof(Key);
  if (thread == 0) *search = {0, static_cast<uint32_t>(k), false};
  for (int shift = kBits - 8; shift >= 0; shift -= 8) {
    for (int i = thread; i < kDigits; i += threads) histogram[i] = 0;
    __syncthreads();
    const Key prefix = static_cast<Key>(search->prefix);
    each([&](S x) {
      const Key key = rising_key(x);
      if (shift == kBits - 8 || (key ^ prefix) >> (shift + 8) == 0)
        atomicAdd(&histogram[(key >> shift) & (kDigits - 1)], 1u);
    });
    __syncthreads();
    if (thread < kWarp) {  // a lane counts eight digits, the first lane the largest
      constexpr int kEach = kDigits / kWarp;
      const int top = kDigits - 1 - thread * kEach;
      uint32_t mine = 0;
      for (int i = 0; i < kEach; ++i) mine += histogram[top - i];
      uint32_t upto = mine;
#pragma unroll
      for (int width = 1; width < kWarp; width *= 2) {
        const uint32_t before = __shfl_up_sync(0xffffffffu, upto, width);
        if (thread >= width) upto += before;
      }
      const uint32_t left = search->left;
      const uint32_t all = __shfl_sync(0xffffffffu, upto, kWarp - 1);
      __syncwarp();
      if (all < left) {
        if (thread == 0) search->none = true;
      } else if (upto >= left && upto - mine < left) {
        uint32_t above = upto - mine;
        int digit = top;
        for (; above + histogram[digit] < left; --digit) above += histogram[digit];
        search->prefix = prefix | static_cast<Key>(digit) << shift;
        search->left = left - above;
      }
    }
    __syncthreads();
  }
  return search->none ? static_cast<S>(-INFINITY)
                      : of_rising_key<S>(static_cast<Key>(search->prefix));
}

// ---- pointwise ----

constexpr int kWarps = kThreads / kWarp;

// How a block takes rows: kWarps / warps of them, `warps` warps a row.
struct RowsPlan {
  int warps = 0;
  int64_t row_bytes = 0;  // of a kept row; 0: rows are read again
  size_t shared = 0;
};

// Shared memory: the rows' states, the warps' sums, for the k-th largest histograms
// and searches, then the rows.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t<T>) == 8 ? 1 : 3)
    weighted_rows(RowsArgs a, RowsPlan plan) {
  using S = acc_t<T>;
  const Scores& in = a.in;
  GENREC_SHARED(RowState<S>, states, kWarps);
  GENREC_SHARED(Partial<S>, sums, kWarps);
  GENREC_SHARED(Search, searches, kWarps);
  GENREC_DYNAMIC_SHARED(unsigned char, memory);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int local = warp / plan.warps, part = warp % plan.warps, count = kWarps / plan.warps;
  uint32_t* histogram = reinterpret_cast<uint32_t*>(memory) + local * kDigits;
  unsigned char* kept = memory + (a.beam.width > 0 ? count * kDigits * sizeof(uint32_t) : 0);
  const int64_t r = blockIdx.x * static_cast<int64_t>(count) + local;
  const bool mine = r < in.N * in.T;
  const S rate = static_cast<S>(in.inv_temperature * kLog2e);

  // A kept row starts as far from a 16-byte boundary as the logits it is read from.
  RowColumns c{nullptr, 0, 0};
  const T* x = nullptr;
  T* keep = nullptr;
  Partial<S> sum = empty_partial<S>();
  if (mine) {
    c = columns_of(in, r);
    x = row_of<T>(in, r);
    if (plan.row_bytes > 0) {
      keep = reinterpret_cast<T*>(kept + local * plan.row_bytes);
      if (c.list == nullptr) keep += reinterpret_cast<uintptr_t>(x + c.first) % 16 / sizeof(T);
    }
    sum = sum_part<T>(in, c, x, share_of(c.n, part, plan.warps), lane, kWarp, keep);
  }
  sum = merge_warp(sum, rate);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (mine && part == 0 && lane == 0)
    states[local] = state_of<T>(in, c, r, merge_parts(sums + warp, plan.warps, rate));

  S bound = static_cast<S>(-INFINITY);
  if (a.beam.width > 0)
    bound =
        kth_largest<S>(a.beam.width, part * kWarp + lane, plan.warps * kWarp, histogram,
                       &searches[local], [&](const auto& f) {
                         for (int64_t i = part * kWarp + lane; i < c.n; i += plan.warps * kWarp) {
                           const int64_t v = c.list == nullptr ? c.first + i : c.list[i];
                           if (v < 0 || v >= in.V) continue;
                           const S entry = load(keep != nullptr ? keep + i : x + v);
                           if (entry == entry) f(entry);
                         }
                       });
  __syncthreads();
  if (!mine) return;
  RowState<S> row = states[local];
  row.logp = row.logp > S(0) ? S(0) : row.logp;  // by rounding; NaN stays
  S weight = S(1);
  if (a.beam.width > 0) {
    const S log_bound = (bound - row.z.top) * static_cast<S>(in.inv_temperature) - row.z.log_sum;
    weight = c.n > 1 ? a.beam.of_token<S>(row.logp, log_bound) : S(0);
  }
  if (part == 0 && lane == 0)
    static_cast<S*>(a.logps)[r] = weight == S(0) ? S(0) : weight * row.logp;
  if (a.grad_logits == nullptr) return;
  const S choices = a.beam.choices != nullptr ? *static_cast<const S*>(a.beam.choices) : S(1);
  const double factor =
      a.factors.of_token<S>(r % in.T) * a.outer.of_user<S>(r / in.T) / static_cast<double>(choices);
  const RowSlope<S> slope = slope_of<T>(in, c, r, row.z, static_cast<S>(-factor * weight), S(0));
  const RowSource<T> from =
      keep != nullptr ? RowSource<T>{keep, true} : RowSource<T>{x + c.first, false};
  write_grad<T>(c, from, slope, slope.a == S(0) ? -1 : in.tokens[r],
                static_cast<S>(in.inv_temperature), static_cast<T*>(a.grad_logits) + r * in.V,
                share_of(in.V, part, plan.warps), lane, kWarp);
}

template <class S>
__global__ void __launch_bounds__(kThreads) choices(ChoicesArgs a) {
  GENREC_SHARED(double, parts, kThreads);
  const double count = sum_block(a.in.N * a.in.T, parts,
                                 [&](int64_t r) { return columns_of(a.in, r).n > 1 ? 1.0 : 0.0; });
  if (threadIdx.x == 0) *static_cast<S*>(a.count) = static_cast<S>(count > 1 ? count : 1);
}

template <class S>
__global__ void __launch_bounds__(kThreads) finish_rows(FinishArgs a) {
  GENREC_SHARED(double, parts, kThreads);
  const S* logps = static_cast<const S*>(a.logps);
  const S choices = a.choices != nullptr ? *static_cast<const S*>(a.choices) : S(1);
  if (a.losses != nullptr)
    for (int64_t n = threadIdx.x; n < a.N; n += kThreads) {
      double loss = 0;
      for (int64_t t = 0; t < a.T; ++t) loss -= a.factors.of_token<S>(t) * logps[n * a.T + t];
      static_cast<S*>(a.losses)[n] = static_cast<S>(loss * a.scale / choices);
    }
  double total = 0, before = 0;  // the sum of the tokens before, over all users
  for (int64_t t = 0; t < a.T; ++t) {
    const double sum =
        sum_block(a.N, parts, [&](int64_t n) { return static_cast<double>(logps[n * a.T + t]); });
    total -= a.factors.of_token<S>(t) * sum;
    before += sum;
    if (t < a.factors.P && threadIdx.x == 0)
      static_cast<S*>(a.levels)[t] =
          static_cast<S>(-before / static_cast<double>(a.N > 0 ? a.N : 1) /
                         ((t + 1) * a.factors.prefix_temperature));
  }
  if (a.total != nullptr && threadIdx.x == 0)
    *static_cast<S*>(a.total) = static_cast<S>(total * a.scale / choices);
}

// ---- pairwise ----

// The largest of value(begin) .. value(n - 1) and `least`, NaN where one is; as sum_block.
template <class Value>
__device__ __forceinline__ double max_block(int64_t begin, int64_t n, double least, double* parts,
                                            const Value& value) {
  const auto larger = [](double a, double b) { return b > a || b != b ? b : a; };
  double mine = least;
  for (int64_t i = begin + threadIdx.x; i < n; i += kThreads) mine = larger(mine, value(i));
  __syncthreads();  // whoever still reads the last one
  parts[threadIdx.x] = mine;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < width)
      parts[threadIdx.x] = larger(parts[threadIdx.x], parts[threadIdx.x + width]);
  }
  __syncthreads();
  return parts[0];
}

// A block a user; a thread's candidates are its own in every step.
template <class S>
__global__ void __launch_bounds__(kThreads) pairwise(PairwiseArgs a) {
  GENREC_SHARED(double, parts, kThreads);
  const int64_t n = blockIdx.x;
  S* slopes = a.slopes != nullptr ? static_cast<S*>(a.slopes) + n * a.C * a.T : nullptr;
  for (int64_t t = 0; t < a.factors.P; ++t) {
    const auto ahead = [&](int64_t i) { return ahead_of_positive<S>(a, n, i, t); };
    const double top = max_block(1, a.C, 0, parts, ahead);
    const double others = sum_block(
        a.C, parts, [&](int64_t i) { return i == 0 ? 0.0 : relative_power(ahead(i), top); });
    const double sum = others + exp(-top);
    if (threadIdx.x == 0)
      static_cast<S*>(a.user_levels)[t * a.N + n] =
          static_cast<S>((top == 0 ? log1p(others) : top + log(sum)) / (t + 1));
    if (slopes == nullptr) continue;
    const double slope = prefix_slope<S>(a, n, t) / sum;
    for (int64_t i = threadIdx.x; i < a.C; i += kThreads)
      slopes[i * a.T + t] =
          static_cast<S>(i == 0 ? -slope * others : slope * relative_power(ahead(i), top));
  }
  for (int64_t i = threadIdx.x; slopes != nullptr && i < a.C; i += kThreads)
    slopes_by_token(a, n, i, slopes + i * a.T);
}

template <class S>
__global__ void __launch_bounds__(kThreads) finish_pairs(FinishPairwiseArgs a) {
  GENREC_SHARED(double, parts, kThreads);
  const double users = static_cast<double>(a.N > 0 ? a.N : 1);
  const double cross_entropy = sum_block(
      a.N * a.T, parts, [&](int64_t i) { return -logp_at<S>(a, i / a.T * a.C * a.T + i % a.T); });
  double total = a.factors.per_token * cross_entropy / users;
  for (int64_t t = 0; t < a.factors.P; ++t) {
    const double sum = sum_block(a.N, parts, [&](int64_t n) {
      return static_cast<double>(static_cast<const S*>(a.user_levels)[t * a.N + n]);
    });
    total += a.factors.beta * static_cast<const S*>(a.factors.weights)[t] * (sum / users);
    if (threadIdx.x == 0) static_cast<S*>(a.levels)[t] = static_cast<S>(sum / users);
  }
  if (threadIdx.x == 0) *static_cast<S*>(a.total) = static_cast<S>(total);
}

// ---- launches ----

template <class T>
RowsPlan plan_rows(const RowsArgs& a) {
  constexpr int64_t kWarpRow = 2048;  // a warp a row of up to this many columns
  RowsPlan plan;
  plan.warps = a.in.V <= kWarpRow ? 1 : kWarps;
  const int64_t count = kWarps / plan.warps;
  const int64_t histograms =
      a.beam.width > 0 ? count * kDigits * static_cast<int64_t>(sizeof(uint32_t)) : 0;
  plan.shared = static_cast<size_t>(histograms);
  if (a.grad_logits == nullptr && a.beam.width == 0) return plan;
  // 16 more bytes, since a kept row starts where its logits do.
  const int64_t row_bytes = round_up(a.in.V * static_cast<int64_t>(sizeof(T)), 16) + 16;
  // Besides, the block's states and sums.
  constexpr int64_t kOwn = 2048;
  if (histograms + count * row_bytes + kOwn > device_limits().shared_per_block) return plan;
  plan.row_bytes = row_bytes;
  plan.shared = static_cast<size_t>(histograms + count * row_bytes);
  return plan;
}

int rows_of(const RowsArgs& a, void* stream) {
  return by_dtype(a.in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const RowsPlan plan = plan_rows<T>(a);
    Launch how = on(blocks_for(a.in.N * a.in.T, kWarps / plan.warps), kThreads, stream);
    how.shared = plan.shared;
    return launch(weighted_rows<T>, how, a, plan);
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
    return launch(finish_rows<S>, on(1, kThreads, stream), a);
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
