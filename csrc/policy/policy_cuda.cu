// CUDA kernels of the policy family.  Torch-free: raw pointers and a stream in,
// an error code out.
//
// A loss goes one of three ways, by what its rows are.  Halves or floats of up to kHeldRow columns
// (of up to a warp's, where there are no clusters), all or a range, stay in registers from the
// load to the gradient, in one launch.  Other rows that fit the shared memory of a block, or of a
// cluster of up to eight, are kept there, in one launch too: lists of columns, doubles, and
// somewhat longer ones.  The rest takes several launches, the rows' sums, the sequences' scalar
// mathematics, gradient, and so do sequences of more rows than a block or a cluster holds.
//
// How threads share a row and in which order its sum is folded depends on V, on the row's columns
// and where they start within 16 bytes, on the form of its support and on the device, and not on
// which kernel does it: the same logits have the same log-probability in token_logps and in the
// loss, and the ratio of a policy to itself is 1.
//
// No index is trusted: a token, range or column list that points outside the row is
// treated as outside the support.  Nothing waits for the device, so every call can be
// captured in a graph.
#include "common/held_row_cuda.cuh"
#include "common/scores_cuda.cuh"
#include "policy/advantages.h"
#include "policy/kernels.h"
#include "policy/sequence.h"

namespace genrec::policy {
namespace {

using namespace genrec::cuda;

// Where the states of rows are kept in memory: strided, so that one kernel serves
// token_logps and the loss.
template <class S>
struct RowArrays {
  S *top, *log_sum, *entropy, *logp;
  int64_t stride, norm_stride;

  __device__ void set(int64_t r, const RowState<S>& row) const {
    top[r * norm_stride] = row.z.top;
    log_sum[r * norm_stride] = row.z.log_sum;
    entropy[r * stride] = row.z.entropy;
    logp[r * stride] = row.logp;
  }
};

// The sums of a row's parts, in its workspace.
template <class S>
__device__ __forceinline__ Partial<S>* parts_of(S* workspace, int64_t r) {
  return reinterpret_cast<Partial<S>*>(workspace + r * kWorkspace + kRowState);
}

// A row of up to kWarpRow columns is one warp's, of up to kShortRow kRowWarps warps'; a
// longer one is cut into kMaxParts parts of a block each.  A short one fits the shared
// memory of every device, 99 KB.
constexpr int64_t kWarpRow = 2048;
template <class T>
constexpr int64_t kShortRow = sizeof(acc_t<T>) == 8 ? 8192 : 16384;
constexpr int kRowWarpBits = 2, kRowWarps = 1 << kRowWarpBits, kRowThreads = kRowWarps * kWarp;
__host__ __device__ __forceinline__ int warp_bits_of(int64_t V) {
  return V <= kWarpRow ? 0 : kRowWarpBits;
}

// A row on its way through a block: its columns, its logits, and its token's own.
template <class T>
struct Row {
  RowColumns c{nullptr, 0, 0};
  const T* x = nullptr;
  bool counted = false;
  Token<acc_t<T>> token{-1, false, 0};

  Row() = default;
  // r = n * T + t.
  __device__ __forceinline__ Row(const Scores& in, int64_t r, int64_t n, int64_t t)
      : counted(counts(in.mask, r)) {
    if (!counted) return;
    c = columns_of(in, r, t);
    x = row_of<T>(in, n, t);
  }

  // Two loads, one after the other, so that others had better be on their way before.
  __device__ __forceinline__ void fetch_token(const Scores& in, int64_t r) {
    if (counted) token = token_of(in, c, x, in.tokens[r]);
  }

  __device__ __forceinline__ RowState<acc_t<T>> state(const Scores& in,
                                                      const Partial<acc_t<T>>& sum) const {
    return counted ? state_of(in, c.n, sum, token) : RowState<acc_t<T>>{};
  }
};

// Sends a warp's share of a row on its way to `keep`, but for lists.
template <class T>
__device__ __forceinline__ void start_copy(const Row<T>& row, Share s, int lane, T* keep) {
  if (!row.counted || row.c.list != nullptr) return;
  const T* from = row.x + row.c.first;
  each_pack(
      from, s, lane, kWarp, [&](int64_t i) { copy_async(keep + i, from + i); },
      [&](int64_t i) { keep[i] = from[i]; });
}

// The sum of that share, in every lane, once it is there.
template <class T>
__device__ __forceinline__ Partial<acc_t<T>> sum_kept(const Scores& in, const Row<T>& row, Share s,
                                                      int lane, T* keep) {
  using S = acc_t<T>;
  constexpr int kSize = Pack<T>::kSize;
  const S rate = static_cast<S>(in.inv_temperature * kLog2e);
  if (!row.counted) return empty_partial<S>();
  if (row.c.list != nullptr)
    return merge_warp(sum_part<T>(in, row.c, row.x, s, lane, kWarp, keep), rate);
  const T* from = row.x + row.c.first;
  wait_for_copies();
  // A lane reads what it has copied itself.
  Partial<S> sum = empty_partial<S>();
  const auto larger = [&](S x) { sum.top = larger_of(sum.top, x); };
  each_pack(
      from, s, lane, kWarp,
      [&](int64_t i) {
        const Pack<T> pack = load_pack(keep + i);
#pragma unroll
        for (int j = 0; j < kSize; ++j) larger(load(&pack.v[j]));
      },
      [&](int64_t i) { larger(load(keep + i)); });
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2)
    larger(__shfl_xor_sync(0xffffffffu, sum.top, width));
  if (sum.top == S(-INFINITY)) {  // nothing but -inf and NaN
    for (int64_t i = s.begin + lane; i < s.end; i += kWarp)
      if (const S x = load(from + i); x != x) sum.e = x;
  } else {
    each_pack(
        from, s, lane, kWarp,
        [&](int64_t i) {
          const Pack<T> pack = load_pack(keep + i);
#pragma unroll
          for (int j = 0; j < kSize; ++j) add_under(sum, load(&pack.v[j]), rate);
        },
        [&](int64_t i) { add_under(sum, load(keep + i), rate); });
  }
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) {
    sum.e += __shfl_xor_sync(0xffffffffu, sum.e, width);
    sum.w += __shfl_xor_sync(0xffffffffu, sum.w, width);
  }
  return sum;
}

// The states of rows in registers.  Of one warp, a block has several rows and no barrier.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    normalize_held(Scores all, RowArrays<float> out, int warps) {
  Scores in = all;
  in.support.begin = nullptr;  // so that there is no code for lists
  const auto [r, part, lane] = held_place(warps);
  if (r >= in.N * in.T) return;
  const float rate = static_cast<float>(in.inv_temperature * kLog2e);
  Row<T> row(in, r, r / in.T, r % in.T);
  HeldRow<T, false> held;
  held.load_all(row.x + row.c.first, static_cast<int>(row.c.n), part, lane);
  row.fetch_token(in, r);
  float tops[4];
  held.find_tops(tops);
  Partial<float> sum = held.template sum_warp_of<true>(tops, rate);
  if (warps > 1) {
    GENREC_SHARED(Partial<float>, sums, kWarps);
    if (lane == 0) sums[part] = sum;
    __syncthreads();
    if (part > 0) return;
    sum = merge_held<true>(sums, warps, rate, lane);
  }
  if (part == 0 && lane == 0) out.set(r, row.state(in, sum));
}

// The states of short rows.  Shared memory: the block's rows.
template <class T>
__global__ void __launch_bounds__(kRowThreads, 6)
    normalize_rows(Scores in, RowArrays<acc_t<T>> out) {
  using S = acc_t<T>;
  GENREC_DYNAMIC_SHARED(unsigned char, memory);
  const int bits = warp_bits_of(in.V), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int local = warp >> bits, part = warp & ((1 << bits) - 1);
  const int64_t r = (blockIdx.x * static_cast<int64_t>(kRowWarps) >> bits) + local;
  const S rate = static_cast<S>(in.inv_temperature * kLog2e);
  const bool mine = r < in.N * in.T;
  Row<T> row;
  if (mine) row = Row<T>(in, r, r / in.T, r % in.T);
  const Share share = share_of_bits(row.c.n, part, bits);
  T* keep = keep_at(memory + local * kept_bytes<T>(in.V), row.c, row.x);
  start_copy<T>(row, share, lane, keep);
  if (mine) row.fetch_token(in, r);
  Partial<S> sum = sum_kept<T>(in, row, share, lane, keep);
  if (bits > 0) {
    GENREC_SHARED(Partial<S>, parts, kRowWarps);
    if (lane == 0) parts[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) sum = merge_parts(parts, kRowWarps, rate);
  }
  if (mine && part == 0 && lane == 0) out.set(r, row.state(in, sum));
}

// The sums of the parts of longer rows, a block a part.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t<T>) == 8 ? 2 : 4)
    sum_parts(Scores in, acc_t<T>* workspace) {
  using S = acc_t<T>;
  const int64_t r = blockIdx.x / kMaxParts;
  const int part = blockIdx.x % kMaxParts;
  if (!counts(in.mask, r)) return;
  const S rate = static_cast<S>(in.inv_temperature * kLog2e);
  const RowColumns c = columns_of(in, r);
  const Partial<S> mine =
      merge_warp(sum_part<T>(in, c, row_of<T>(in, r), share_of(c.n, part, kMaxParts),
                             static_cast<int>(threadIdx.x), kThreads, nullptr),
                 rate);
  GENREC_SHARED(Partial<S>, warps, kThreads / kWarp);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) parts_of(workspace, r)[part] = merge_parts(warps, kThreads / kWarp, rate);
}

template <class T>
__global__ void finish_rows(Scores in, acc_t<T>* workspace, RowArrays<acc_t<T>> out) {
  using S = acc_t<T>;
  const int64_t r = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (r >= in.N * in.T) return;
  Row<T> row(in, r, r / in.T, r % in.T);
  row.fetch_token(in, r);
  const S rate = static_cast<S>(in.inv_temperature * kLog2e);
  out.set(r, row.state(in, row.counted ? merge_parts(parts_of(workspace, r), kMaxParts, rate)
                                       : empty_partial<S>()));
}

template <class S>
struct RowSlopes {
  const S *top, *log_sum, *entropy, *by_logp, *by_entropy;  // by_entropy may be null
  int64_t stride, norm_stride, slope_stride;
};

// Rows of V columns in `parts` each, of kTeam threads: a warp a short row, since more of
// its columns are then on their way to each thread.  Six blocks a processor hide the
// memory's latency, four where a row is not the block's; doubles need more registers,
// and are for gradcheck.
template <class T, int kTeam>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t<T>) == 8 ? 2
                                            : kTeam == kThreads   ? 6
                                                                  : 4)
    grad_rows(Scores in, RowSlopes<acc_t<T>> row, T* grad, int64_t grad_n, int64_t grad_t,
              int parts) {
  using S = acc_t<T>;
  int64_t unit = blockIdx.x;
  if constexpr (kTeam != kThreads) unit = unit * (kThreads / kTeam) + threadIdx.x / kTeam;
  const int64_t r = parts == 1 ? unit : unit / parts, part = unit - r * parts;
  if (r >= in.N * in.T) return;
  const int64_t n = r / in.T, t = r - n * in.T;
  const RowColumns c = columns_of(in, r, t);
  const Normalizer<S> z{row.top[r * row.norm_stride], row.log_sum[r * row.norm_stride],
                        row.entropy[r * row.stride]};
  const RowSlope<S> slope = slope_of<T>(in, c, r, z, row.by_logp[r * row.slope_stride],
                                        row.by_entropy == nullptr ? S(0) : row.by_entropy[r]);
  write_grad<T>(c, {row_of<T>(in, n, t) + c.first, false}, slope,
                slope.a == S(0) ? -1 : in.tokens[r], static_cast<S>(in.inv_temperature),
                grad + n * grad_n + t * grad_t,
                parts == 1 ? Share{0, in.V} : share_of(in.V, part, parts),
                static_cast<int>(threadIdx.x) % kTeam, kTeam);
}

// The same for rows in registers, without slopes by the entropy.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == sizeof(float) ? 3 : 4)
    grad_held(Scores all, RowSlopes<float> given, T* grad, int64_t grad_n, int64_t grad_t,
              int warps) {
  Scores in = all;
  in.support.begin = nullptr;  // so that there is no code for lists
  const auto [r, part, lane] = held_place(warps);
  if (r >= in.N * in.T) return;
  const int64_t n = r / in.T, t = r - n * in.T;
  const RowColumns c = columns_of(in, r, t);
  const T* x = row_of<T>(in, n, t);
  HeldRow<T, false> held;
  held.load_all(x + c.first, static_cast<int>(c.n), part, lane);
  const Normalizer<float> z{given.top[r * given.norm_stride], given.log_sum[r * given.norm_stride],
                            0.f};
  const RowSlope<float> slope =
      slope_of<T>(in, c, r, z, given.by_logp[r * given.slope_stride], 0.f);
  T* g = grad + n * grad_n + t * grad_t;
  const bool moves = slope.a != 0.f;  // then the token is one of the row's columns
  const int64_t column = moves ? in.tokens[r] : c.first;
  const float own = moves ? load(x + column) : 0.f;
  // The gradient may take the logits' memory: everybody has read before anybody writes.
  if (warps > 1)
    __syncthreads();
  else
    __syncwarp();
  if (!moves) return zero_columns(g, {0, in.V}, held.thread, warps * kWarp);
  held.write(
      g, in.V, static_cast<int>(c.first), static_cast<int>(column - c.first), warps * kWarp,
      [&](int i) { return slope.without_entropy(held.logit(i)); },
      [&] { return slope.without_entropy(held.edge); },
      [&] { return slope.own(own, static_cast<float>(in.inv_temperature)); });
}

// ---- sequences ----

template <class S, class Row>
__device__ __forceinline__ S mean_entropy(const SequenceArgs& q, int64_t n, const Row& entropy) {
  S sum = 0;
  int64_t count = 0;
  GENREC_ROLLED for (int64_t t = 0; t < q.T; ++t) {
    if (!counts(q.mask, n * q.T + t)) continue;
    sum += entropy(t);
    ++count;
  }
  return count > 0 ? sum / count : S(0);
}

// Sequences whose rows have their states: a thread each.
template <class S>
__global__ void score_sequences(SequenceArgs q, S* workspace) {
  const int64_t n = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (n >= q.N) return;
  S* rows = workspace + n * q.T * kWorkspace;
  const S entropy = mean_entropy<S>(q, n, [&](int64_t t) { return rows[t * kWorkspace + 2]; });
  keep_result(q, n,
              sequence_loss<S>(
                  q, n, entropy, [&](int64_t t) { return rows[t * kWorkspace + 3]; },
                  [&](int64_t t, S slope) { rows[t * kWorkspace + 4] = slope; }));
}

// A sequence in shared memory: its rows' states and its own inputs, which are fetched
// while rows are read.
template <class S>
struct Sequence {
  RowState<S>* states;  // [T]
  S *old, *ref;         // [T]
  S* own;               // advantage, entropy, boost
  bool* mask;           // [T]

  __host__ __device__ static int64_t bytes(int64_t T) {
    return round_up(T * static_cast<int64_t>(sizeof(RowState<S>) + 2 * sizeof(S) + 1) +
                        3 * static_cast<int64_t>(sizeof(S)),
                    16);
  }
  __device__ Sequence(unsigned char* memory, int64_t T) {
    states = reinterpret_cast<RowState<S>*>(memory);
    old = reinterpret_cast<S*>(states + T);
    ref = old + T;
    own = ref + T;
    mask = reinterpret_cast<bool*>(own + 3);
  }

  __device__ void fetch(const SequenceArgs& q, int64_t n) {
    for (int64_t t = threadIdx.x; t < q.T; t += blockDim.x) {
      old[t] = static_cast<const S*>(q.old_logps)[n * q.T + t];
      ref[t] = at_or<S>(q.ref_logps, n * q.T + t, S(0));
      mask[t] = counts(q.mask, n * q.T + t);
    }
    if (threadIdx.x == 0) own[0] = static_cast<const S*>(q.advantages)[n];
    if (threadIdx.x == 1) own[1] = at_or<S>(q.entropy, n, S(1));
    if (threadIdx.x == 2) own[2] = at_or<S>(q.boost, n, S(1));
  }

  // Its loss, and the slopes of its rows in their states; for one thread.
  __device__ __forceinline__ SequenceResult<S> loss(const SequenceArgs& all) {
    SequenceArgs q = all;
    q.N = 1;
    q.mask = mask;
    q.old_logps = old;
    q.ref_logps = all.ref_logps == nullptr ? nullptr : ref;
    q.advantages = own, q.entropy = own + 1, q.boost = own + 2;
    const S entropy = mean_entropy<S>(q, 0, [&](int64_t t) { return states[t].z.entropy; });
    return sequence_loss<S>(
        q, 0, entropy, [&](int64_t t) { return states[t].logp; },
        [&](int64_t t, S slope) { states[t].slope = slope; });
  }
};

// Once a cluster's blocks have written the states of all rows to one another: the sequence's loss,
// by a thread of each block, and its result by the first of them.
template <class S>
__device__ __forceinline__ void score_shared(Sequence<S>& sequence, const SequenceArgs& q,
                                             int64_t n, int rank, int cluster) {
  if (cluster > 1)
    cluster_sync();
  else
    __syncthreads();
  if (threadIdx.x == 0) {
    const SequenceResult<S> result = sequence.loss(q);
    if (rank == 0) keep_result(q, n, result);
  }
  __syncthreads();
}

// How one launch takes sequences: `cluster` blocks a sequence, block b of it the rows b,
// b + cluster, ...
struct FusedPlan {
  int cluster = 0;  // 0: the sequence does not fit
  int rows = 0;     // a block
  size_t shared = 0;
};

constexpr int kFusedThreads = 384;

// The whole loss in one launch, for short rows.  Shared memory: the sequence, the sums of
// this block's warps, then this block's rows.
template <class T>
__global__ void __launch_bounds__(kFusedThreads, sizeof(acc_t<T>) == 8 ? 1 : 2)
    fused_sequences(Scores in, SequenceArgs q, T* grad, int64_t grad_n, int64_t grad_t,
                    FusedPlan plan) {
  using S = acc_t<T>;
  GENREC_DYNAMIC_SHARED(unsigned char, memory);
  const int bits = warp_bits_of(in.V), cluster_bits = log2_of(plan.cluster);
  Sequence<S> sequence(memory, in.T);
  Partial<S>* sums = reinterpret_cast<Partial<S>*>(memory + Sequence<S>::bytes(in.T));
  unsigned char* kept = reinterpret_cast<unsigned char*>(sums) +
                        round_up((plan.rows << bits) * static_cast<int>(sizeof(Partial<S>)), 16);
  const int rank = plan.cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int64_t n = blockIdx.x >> cluster_bits;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int local = warp >> bits, part = warp & ((1 << bits) - 1);
  const int64_t t = rank + (static_cast<int64_t>(local) << cluster_bits), r = n * in.T + t;
  const S rate = static_cast<S>(in.inv_temperature * kLog2e);

  const bool mine = t < in.T;
  Row<T> row;
  if (mine) row = Row<T>(in, r, n, t);
  const Share share = share_of_bits(row.c.n, part, bits);
  T* keep = keep_at(kept + local * kept_bytes<T>(in.V), row.c, row.x);
  start_copy<T>(row, share, lane, keep);
  sequence.fetch(q, n);
  if (mine) row.fetch_token(in, r);
  if (plan.cluster > 1) cluster_sync();  // the peers are there to be written to
  Partial<S> sum = sum_kept<T>(in, row, share, lane, keep);
  if (bits > 0) {
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (part == 0 && lane == 0) sum = merge_parts(sums + warp, kRowWarps, rate);
  }
  if (mine && part == 0 && lane == 0) {
    const RowState<S> state = row.state(in, sum);
    for (int peer = 0; peer < plan.cluster; ++peer)
      (plan.cluster > 1 ? cluster_peer(sequence.states, static_cast<unsigned>(peer))
                        : sequence.states)[t] = state;
  }
  score_shared(sequence, q, n, rank, plan.cluster);
  if (grad == nullptr || !mine) return;
  const RowState<S> state = sequence.states[t];
  const S a = row.token.held ? state.slope * static_cast<S>(in.inv_temperature) : S(0);
  write_grad<T>(row.c, {keep, true}, RowSlope<S>{state.z, rate, a, S(0)},
                a == S(0) ? -1 : row.token.column, static_cast<S>(in.inv_temperature),
                grad + n * grad_n + t * grad_t, share_of_bits(in.V, part, bits), lane, kWarp);
}

// How one launch takes sequences whose rows are held in registers: as FusedPlan, but that a row
// has `warps` of a block.
struct HeldPlan {
  int cluster = 0;  // 0: a sequence has too many rows
  int rows = 0, warps = 0;
};

// The whole loss in one launch, for rows in registers.  Shared memory: the sequence.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    held_sequences(Scores all, SequenceArgs q, T* grad, int64_t grad_n, int64_t grad_t,
                   HeldPlan plan) {
  GENREC_DYNAMIC_SHARED(unsigned char, memory);
  GENREC_SHARED(Partial<float>, sums, kWarps);
  Scores in = all;
  in.support.begin = nullptr;  // so that there is no code for lists
  const int cluster_bits = log2_of(plan.cluster);
  const int rank = plan.cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int64_t n = blockIdx.x >> cluster_bits;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int local = plan.warps == 1 ? warp : warp / plan.warps, part = warp - local * plan.warps;
  const int64_t t = rank + (static_cast<int64_t>(local) << cluster_bits), r = n * in.T + t;
  const float rate = static_cast<float>(in.inv_temperature * kLog2e);
  const float inverse = static_cast<float>(in.inv_temperature);

  const bool mine = t < in.T;
  HeldRow<T, sizeof(T) == sizeof(float)> held;
  Sequence<float> sequence(memory, in.T);
  int first = 0, own = -1;  // of the row's columns, and its token's among them
  float own_logit = 0;
  {
    Row<T> row;
    if (mine) row = Row<T>(in, r, n, t);
    first = static_cast<int>(row.c.first);
    held.load_all(row.x + first, static_cast<int>(row.c.n), part, lane);
    // On its way too before anything waits.
    const int64_t column = row.counted ? in.tokens[r] : -1;
    sequence.fetch(q, n);
    const Token<float> token = token_of<T>(in, row.c, row.x, column);
    if (token.held) own = static_cast<int>(column) - first;
    own_logit = token.logit;
  }
  if (plan.cluster > 1) cluster_sync();  // the peers are there to be written to
  float tops[4];
  held.find_tops(tops);
  Partial<float> sum = held.template sum_warp_of<true>(tops, rate);
  if (plan.warps > 1) {
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    sum = merge_held<true>(sums + (warp - part), plan.warps, rate, lane);
  }
  if (mine && part == 0 && lane < plan.cluster) {
    RowState<float>* states = sequence.states;
    if (plan.cluster > 1) states = cluster_peer(states, static_cast<unsigned>(lane));
    states[t] = state_of(in, held.n, sum, Token<float>{0, own >= 0, own_logit});
  }
  score_shared(sequence, q, n, rank, plan.cluster);
  if (grad == nullptr || !mine) return;
  const RowState<float> state = sequence.states[t];
  const RowSlope<float> slope{state.z, rate, own < 0 ? 0.f : state.slope * inverse, 0.f};
  T* g = grad + n * grad_n + t * grad_t;
  const int threads = plan.warps * kWarp;
  if (slope.a == 0.f) return zero_columns(g, {0, in.V}, held.thread, threads);
  held.write_grad(g, in.V, first, slope, sum, own, own_logit, inverse, threads);
}

template <class S>
__global__ void score_logps(SequenceArgs q, const S* logps, S* grad) {
  const int64_t n = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (n >= q.N) return;
  keep_result(q, n,
              sequence_loss<S>(
                  q, n, S(0), [&](int64_t t) { return logps[n * q.T + t]; },
                  [&](int64_t t, S slope) { grad[n * q.T + t] = slope; }));
}

// Rows of `inner` elements, each times its factor; a block takes parts of rows in turn.
// In place a factor of 1 costs nothing but the launch.
template <class T>
__global__ void __launch_bounds__(kThreads, 6) scale_rows(ScaleArgs a, int parts) {
  using S = acc_t<T>;
  for (int64_t i = blockIdx.x; i < a.N * parts; i += gridDim.x) {
    const int64_t n = i / parts;
    const T* x = static_cast<const T*>(a.grad) + n * a.inner;
    T* y = static_cast<T*>(a.out) + n * a.inner;
    const S factor = static_cast<const S*>(a.factor)[a.shared ? 0 : n];
    if (x == y && factor == S(1)) {
      if (a.shared) return;
      continue;
    }
    const bool aligned =
        (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(y)) % 16 == 0;
    const auto one = [&](int64_t i) { store(y + i, load(x + i) * factor); };
    each_pack(
        x, share_of(a.inner, i % parts, parts), static_cast<int>(threadIdx.x), kThreads,
        [&](int64_t i) {
          if (!aligned) {
            for (int j = 0; j < Pack<T>::kSize; ++j) one(i + j);
            return;
          }
          Pack<T> pack = load_pack(x + i);
#pragma unroll
          for (int j = 0; j < Pack<T>::kSize; ++j) store(&pack.v[j], load(&pack.v[j]) * factor);
          write_pack(y + i, pack);
        },
        one);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) add_up(SumArgs a) {
  GENREC_SHARED(double, parts, kThreads);
  const double total = sum_block<8>(a.N, parts, [&](int64_t n) {
    return static_cast<double>(static_cast<const S*>(a.values)[n]);
  });
  if (threadIdx.x == 0) *static_cast<S*>(a.total) = static_cast<S>(total);
}

// One block: rewards are few.  Threads take groups in turn, then share the
// batch's two passes.
template <class S>
__global__ void __launch_bounds__(kThreads, 1) advantages(AdvantagesArgs a) {
  GENREC_SHARED(double, parts, kThreads);
  const S* rewards = static_cast<const S*>(a.rewards);
  const S* weights = static_cast<const S*>(a.weights);
  S* out = static_cast<S*>(a.advantages);
  const int64_t N = a.B * a.G;
  for (int64_t b = threadIdx.x; b < a.B; b += kThreads)
    group_advantages(a, b, rewards, weights, out);
  __syncthreads();
  // As `spread` has it: NaN is left out, and an empty batch has neither.
  const auto is_number = [&](int64_t n) { return out[n] == out[n]; };
  const double count = sum_block<4>(N, parts, [&](int64_t n) { return is_number(n) ? 1.0 : 0.0; });
  const double sum =
      sum_block<4>(N, parts, [&](int64_t n) { return is_number(n) ? double(out[n]) : 0.0; });
  const double mean = count > 0 ? sum / count : 0;
  const double squares = sum_block<4>(
      N, parts, [&](int64_t n) { return is_number(n) ? (out[n] - mean) * (out[n] - mean) : 0.0; });
  const double divisor = a.unbiased ? count - 1 : count;
  const Spread batch{mean, divisor > 0 ? sqrt(squares / divisor) : 0};
  __syncthreads();
  for (int64_t n = threadIdx.x; n < N; n += kThreads)
    out[n] = batch_advantage(a, n, rewards, out[n], batch);
}

// ---- launches ----

// Into how many parts a long run of columns is cut: some columns a thread.
int parts_of_grad(int64_t columns) {
  constexpr int64_t kColumns = kThreads * 16;
  return static_cast<int>(bounded(blocks_for(columns, kColumns), 1, 1 << 16));
}

template <class T>
int launch_grad(const Scores& in, const RowSlopes<acc_t<T>>& row, T* grad, int64_t grad_n,
                int64_t grad_t, void* stream) {
  if constexpr (sizeof(acc_t<T>) == sizeof(float))
    if (row.by_entropy == nullptr && in.support.begin == nullptr && in.V <= kHeldRow) {
      const int warps = held_warps(in.V);
      return launch(grad_held<T>, on_rows(in.N * in.T, warps, stream), in, row, grad, grad_n,
                    grad_t, warps);
    }
  const int parts = parts_of_grad(in.V);
  const int64_t units = in.N * in.T * parts;
  if (in.V <= kWarpRow)
    return launch(grad_rows<T, kWarp>, on(blocks_for(units, kThreads / kWarp), kThreads, stream),
                  in, row, grad, grad_n, grad_t, parts);
  return launch(grad_rows<T, kThreads>, on(units, kThreads, stream), in, row, grad, grad_n, grad_t,
                parts);
}

template <class T>
bool has_clusters() {
  return device_limits().capability >= 90 && knows_clusters(held_sequences<T>);
}

// Whether rows are held in registers: by what all of them have in common, so that every kernel
// takes a row alike.  Without clusters, those of one warp, of which a block holds several.
template <class T>
bool holds_rows([[maybe_unused]] const Scores& in) {
  if constexpr (sizeof(acc_t<T>) == sizeof(float))
    return in.support.begin == nullptr &&
           (in.V <= kWarp * kHeld || (in.V <= kHeldRow && has_clusters<T>()));
  return false;
}

// The states of all rows.
template <class T>
int normalize(const Scores& in, acc_t<T>* workspace, const RowArrays<acc_t<T>>& out, void* stream) {
  const int64_t rows = in.N * in.T;
  if (rows == 0) return static_cast<int>(cudaSuccess);
  if constexpr (sizeof(acc_t<T>) == sizeof(float))
    if (holds_rows<T>(in)) {
      const int warps = held_warps(in.V);
      return launch(normalize_held<T>, on_rows(rows, warps, stream), in, out, warps);
    }
  if (in.V <= kShortRow<T>) {
    const int each = kRowWarps >> warp_bits_of(in.V);
    Launch how = on(blocks_for(rows, each), kRowThreads, stream);
    how.shared = static_cast<size_t>(each * kept_bytes<T>(in.V));
    return launch(normalize_rows<T>, how, in, out);
  }
  const int code = launch(sum_parts<T>, on(rows * kMaxParts, kThreads, stream), in, workspace);
  if (code != cudaSuccess) return code;
  return launch(finish_rows<T>, on(blocks_for(rows, kThreads), kThreads, stream), in, workspace,
                out);
}

int token_logps(const TokenLogpsArgs& a, void* stream) {
  return by_dtype(a.in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using S = acc_t<T>;
    S* norm = static_cast<S*>(a.norm);
    const RowArrays<S> out{norm, norm + 1, static_cast<S*>(a.entropy), static_cast<S*>(a.logps),
                           1,    2};
    return normalize<T>(a.in, static_cast<S*>(a.workspace), out, stream);
  });
}

int token_logps_backward(const TokenLogpsBackwardArgs& a, void* stream) {
  return by_dtype(a.in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using S = acc_t<T>;
    const S* norm = static_cast<const S*>(a.norm);
    const RowSlopes<S> row{norm,
                           norm + 1,
                           static_cast<const S*>(a.entropy),
                           static_cast<const S*>(a.grad_logps),
                           static_cast<const S*>(a.grad_entropy),
                           1,
                           2,
                           1};
    return launch_grad<T>(a.in, row, static_cast<T*>(a.grad_logits), a.in.T * a.in.V, a.in.V,
                          stream);
  });
}

constexpr int kLargestCluster = 8;  // what every device with clusters grants

// The smallest cluster whose blocks leave room for three others on their processor; else
// the largest that fits at all.
template <class T>
FusedPlan plan_fused(const Scores& in) {
  using S = acc_t<T>;
  const DeviceLimits limits = device_limits();
  const int most =
      limits.capability < 90 || !knows_clusters(fused_sequences<T>) ? 1 : kLargestCluster;
  FusedPlan best;
  if (in.V > kShortRow<T>) return best;
  for (int cluster = 1; cluster <= most; cluster *= 2) {
    if (cluster > 1 && cluster / 2 >= in.T) break;  // blocks without a row
    FusedPlan plan;
    plan.cluster = cluster;
    const int64_t rows = in.T == 0 ? 1 : blocks_for(in.T, cluster);
    const int bits = warp_bits_of(in.V);
    if (rows << bits > kFusedThreads / kWarp) continue;
    plan.rows = static_cast<int>(rows);
    const int64_t shared = Sequence<S>::bytes(in.T) +
                           round_up((rows << bits) * static_cast<int64_t>(sizeof(Partial<S>)), 16) +
                           rows * kept_bytes<T>(in.V);
    if (shared > limits.shared_per_block) continue;
    plan.shared = static_cast<size_t>(shared);
    best = plan;
    if (4 * shared <= limits.shared_per_block) break;
  }
  return best;
}

// The smallest cluster whose blocks have room for a sequence's rows.
template <class T>
HeldPlan plan_held(const Scores& in) {
  HeldPlan plan;
  plan.warps = held_warps(in.V);
  for (int cluster = 1; cluster <= kLargestCluster; cluster *= 2) {
    if (cluster == 2 && !has_clusters<T>()) break;
    const int64_t rows = in.T == 0 ? 1 : blocks_for(in.T, cluster);
    if (rows * plan.warps > kWarps) continue;
    plan.cluster = cluster;
    plan.rows = static_cast<int>(rows);
    break;
  }
  return plan;
}

int sage_loss(const SageLossArgs& a, void* stream) {
  return by_dtype(a.in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using S = acc_t<T>;
    S* w = static_cast<S*>(a.workspace);
    T* grad = static_cast<T*>(a.grad_logits);
    const bool held = holds_rows<T>(a.in);
    if constexpr (sizeof(S) == sizeof(float))
      if (const HeldPlan plan = held ? plan_held<T>(a.in) : HeldPlan{}; plan.cluster > 0) {
        Launch how = on(a.in.N * plan.cluster, plan.rows * plan.warps * kWarp, stream);
        how.shared = static_cast<size_t>(Sequence<S>::bytes(a.in.T));
        how.cluster = plan.cluster;
        return launch(held_sequences<T>, how, a.in, a.sequence, grad, a.grad_stride_n,
                      a.grad_stride_t, plan);
      }
    const FusedPlan plan = held ? FusedPlan{} : plan_fused<T>(a.in);
    if (plan.cluster > 0) {
      Launch how = on(a.in.N * plan.cluster, (plan.rows << warp_bits_of(a.in.V)) * kWarp, stream);
      how.shared = plan.shared;
      how.cluster = plan.cluster;
      return launch(fused_sequences<T>, how, a.in, a.sequence, grad, a.grad_stride_n,
                    a.grad_stride_t, plan);
    }
    int code = normalize<T>(a.in, w, {w, w + 1, w + 2, w + 3, kWorkspace, kWorkspace}, stream);
    if (code != cudaSuccess) return code;
    code = launch(score_sequences<S>, on(blocks_for(a.in.N, kWarp), kWarp, stream), a.sequence, w);
    if (code != cudaSuccess || grad == nullptr) return code;
    const RowSlopes<S> row{w, w + 1, w + 2, w + 4, nullptr, kWorkspace, kWorkspace, kWorkspace};
    return launch_grad<T>(a.in, row, grad, a.grad_stride_n, a.grad_stride_t, stream);
  });
}

int sage_loss_from_logps(const SageFromLogpsArgs& a, void* stream) {
  return by_accumulator(a.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    return launch(score_logps<S>, on(blocks_for(a.sequence.N, 64), 64, stream), a.sequence,
                  static_cast<const S*>(a.logps), static_cast<S*>(a.grad_logps));
  });
}

int scale(const ScaleArgs& a, void* stream) {
  return by_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const int parts = parts_of_grad(a.inner);
    // As many as are resident at once.
    const int64_t most = bounded(int64_t{6} * device_limits().multiprocessors, 1, INT32_MAX);
    return launch(scale_rows<T>, on(bounded(a.N * parts, 0, most), kThreads, stream), a, parts);
  });
}

int sum(const SumArgs& a, void* stream) {
  return by_accumulator(a.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    return launch(add_up<S>, on(1, kThreads, stream), a);
  });
}

int advantages_of(const AdvantagesArgs& a, void* stream) {
  return by_accumulator(a.dtype, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    return launch(advantages<S>, on(1, kThreads, stream), a);
  });
}

}  // namespace

extern const CudaKernels cuda_kernels;
const CudaKernels cuda_kernels{
    token_logps, token_logps_backward, sage_loss, sage_loss_from_logps, scale, sum, advantages_of};

}  // namespace genrec::policy
