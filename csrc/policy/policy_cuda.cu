// CUDA kernels of the policy family.  Torch-free: raw pointers and a stream in,
// an error code out.
//
// One block a row for what reads logits, one thread a sequence for the scalar
// mathematics between.  A loss is three launches: normalise, score, gradient.
// No index is trusted: a token, range or column list that points outside the row
// is treated as outside the support.
#include "common/row_cuda.cuh"
#include "policy/advantages.h"
#include "policy/kernels.h"
#include "policy/sequence.h"

namespace genrec::policy {
namespace {

using namespace genrec::cuda;

// The columns of row r = n * T + t: the range [first, first + n) or a list.
struct RowColumns {
  const int32_t* list;
  int64_t first, n;
};

__device__ __forceinline__ int64_t bounded(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

__device__ RowColumns columns_of(const Scores& in, int64_t r) {
  const Support& s = in.support;
  if (s.columns != nullptr) {
    const int64_t begin = bounded(s.begin[r], 0, s.num_columns);
    return {s.columns + begin, 0, bounded(s.end[r], begin, s.num_columns) - begin};
  }
  if (s.ranges != nullptr) {
    const int64_t first = bounded(s.ranges[2 * (r % in.T)], 0, in.V);
    return {nullptr, first, bounded(s.ranges[2 * (r % in.T) + 1], first, in.V) - first};
  }
  return {nullptr, 0, in.V};
}

__device__ bool holds(const RowColumns& c, int64_t column) {
  if (c.list == nullptr) return column >= c.first && column < c.first + c.n;
  return lists(c.list, c.n, column);
}

template <class T>
__device__ const T* row_of(const Scores& in, int64_t r) {
  return static_cast<const T*>(in.logits) + (r / in.T) * in.stride_n + (r % in.T) * in.stride_t;
}

__device__ bool scored(const Scores& in, const RowColumns& c, int64_t r) {
  const int64_t token = in.tokens[r];
  return token >= 0 && token < in.V && holds(c, token);
}

// What a row's normaliser, entropy and log-probability are written to: strided,
// so that one kernel serves token_logps and the fused loss.
template <class S>
struct RowOutputs {
  S *top, *log_sum, *entropy, *logp;
  int64_t stride, norm_stride;
};

template <class T>
__global__ void __launch_bounds__(kThreads) normalize_rows(Scores in, RowOutputs<acc_t<T>> out) {
  using S = acc_t<T>;
  const int64_t r = blockIdx.x;
  const S inv = static_cast<S>(in.inv_temperature);
  if (!counts(in.mask, r)) {
    if (threadIdx.x == 0)
      out.top[r * out.norm_stride] = out.log_sum[r * out.norm_stride] =
          out.entropy[r * out.stride] = out.logp[r * out.stride] = S(0);
    return;
  }
  const RowColumns c = columns_of(in, r);
  const T* x = row_of<T>(in, r);
  Partial<S> mine{-INFINITY, S(0), S(0)};
  for (int64_t i = threadIdx.x; i < c.n; i += kThreads) {
    const int64_t v = c.list == nullptr ? c.first + i : c.list[i];
    if (v >= 0 && v < in.V) add(mine, load(x + v), inv);
  }
  const Partial<S> all = merge_block(mine, inv);
  if (threadIdx.x != 0) return;
  const bool none = c.n == 0;
  const S log_sum = none ? S(0) : all.top == -INFINITY ? S(NAN) : log(all.e);
  const S top = none ? S(0) : all.top;
  out.top[r * out.norm_stride] = top;
  out.log_sum[r * out.norm_stride] = log_sum;
  out.entropy[r * out.stride] = none ? S(0) : log_sum - all.w / all.e;
  out.logp[r * out.stride] = scored(in, c, r) ? (load(x + in.tokens[r]) - top) * inv - log_sum
                                              : static_cast<S>(kOutsideLogp);
}

template <class S>
struct RowInputs {
  const S *top, *log_sum, *entropy, *slope, *entropy_slope;  // entropy_slope may be null
  int64_t stride, norm_stride, slope_stride;
};

// Each thread reads a column before it writes it, so the gradient may take the
// logits' own memory.  The token's own column is written last, by expm1.
template <class T>
__global__ void __launch_bounds__(kThreads)
    grad_rows(Scores in, RowInputs<acc_t<T>> row, T* grad, int64_t grad_n, int64_t grad_t) {
  using S = acc_t<T>;
  const int64_t r = blockIdx.x;
  const S inv = static_cast<S>(in.inv_temperature);
  const RowColumns c = columns_of(in, r);
  const T* x = row_of<T>(in, r);
  T* g = grad + (r / in.T) * grad_n + (r % in.T) * grad_t;
  const bool counted = counts(in.mask, r), held = counted && scored(in, c, r);
  const S a = held ? row.slope[r * row.slope_stride] * inv : S(0);
  const S b = counted && row.entropy_slope != nullptr ? row.entropy_slope[r] * inv : S(0);
  const S top = row.top[r * row.norm_stride], log_sum = row.log_sum[r * row.norm_stride];
  const S entropy = row.entropy[r * row.stride];
  const int64_t token = held ? in.tokens[r] : -1;
  const bool still = a == S(0) && b == S(0);
  for (int64_t v = threadIdx.x; v < in.V; v += kThreads) {
    S out = S(0);
    if (!still && holds(c, v)) {
      const S logp = (load(x + v) - top) * inv - log_sum, p = exp(logp);
      const S spread = p == S(0) || b == S(0) ? S(0) : p * (logp + entropy);
      out = (v == token ? a * -expm1(logp) : -a * p) - b * spread;
    }
    store(g + v, out);
  }
}

template <class S>
__global__ void score_sequences(SequenceArgs q, S* workspace) {
  const int64_t n = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (n >= q.N) return;
  S* rows = workspace + n * q.T * kWorkspace;
  S entropy = 0;
  int64_t count = 0;
  for (int64_t t = 0; t < q.T; ++t)
    if (counts(q.mask, n * q.T + t)) entropy += rows[t * kWorkspace + 2], ++count;
  sequence_loss<S>(
      q, n, count > 0 ? entropy / count : S(0), [&](int64_t t) { return rows[t * kWorkspace + 3]; },
      [&](int64_t t, S slope) { rows[t * kWorkspace + 4] = slope; });
}

template <class S>
__global__ void score_logps(SequenceArgs q, const S* logps, S* grad) {
  const int64_t n = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (n >= q.N) return;
  sequence_loss<S>(
      q, n, S(0), [&](int64_t t) { return logps[n * q.T + t]; },
      [&](int64_t t, S slope) { grad[n * q.T + t] = slope; });
}

template <class T>
__global__ void scale_rows(ScaleArgs a) {
  using S = acc_t<T>;
  const int64_t total = a.N * a.inner, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
       i += step)
    store(static_cast<T*>(a.out) + i,
          load(static_cast<const T*>(a.grad) + i) *
              static_cast<const S*>(a.factor)[a.shared ? 0 : i / a.inner]);
}

// One block; each thread adds a contiguous part, thread 0 adds the parts in order.
template <class S>
__global__ void __launch_bounds__(kThreads) add_up(SumArgs a) {
  GENREC_SHARED(double, parts, kThreads);
  const int64_t share = (a.N + kThreads - 1) / kThreads, first = threadIdx.x * share;
  double total = 0;
  for (int64_t n = first; n < a.N && n < first + share; ++n)
    total += static_cast<const S*>(a.values)[n];
  parts[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads; ++i) total += parts[i];
  *static_cast<S*>(a.total) = static_cast<S>(total);
}

// One block.  Threads take groups in turn, then the batch's statistics are made
// by thread 0 in order: rewards are few, and the order fixes the bits.
template <class S>
__global__ void __launch_bounds__(kThreads) advantages(AdvantagesArgs a) {
  const S* rewards = static_cast<const S*>(a.rewards);
  const S* weights = static_cast<const S*>(a.weights);
  S* out = static_cast<S*>(a.advantages);
  const int64_t N = a.B * a.G;
  for (int64_t b = threadIdx.x; b < a.B; b += kThreads)
    group_advantages(a, b, rewards, weights, out);
  __syncthreads();
  GENREC_SHARED(Spread, batch, 1);
  if (threadIdx.x == 0)
    batch[0] = spread(N, a.unbiased, [&](int64_t n) { return static_cast<double>(out[n]); });
  __syncthreads();
  for (int64_t n = threadIdx.x; n < N; n += kThreads)
    out[n] = batch_advantage(a, n, rewards, out[n], batch[0]);
}

Launch on(int64_t blocks, int threads, void* stream) {
  Launch how{blocks, threads};
  how.stream = stream;
  return how;
}

int64_t blocks_for(int64_t n, int threads) { return (n + threads - 1) / threads; }

template <class F>
int by_dtype(DType type, const F& f) {
  switch (type) {
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::f64: return f(static_cast<double*>(nullptr));
    case DType::bf16: return f(static_cast<bf16_t*>(nullptr));
    case DType::f16: return f(static_cast<f16_t*>(nullptr));
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

template <class F>
int by_accumulator(DType type, const F& f) {
  return type == DType::f64 ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

int token_logps(const TokenLogpsArgs& a, void* stream) {
  return by_dtype(a.in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using S = acc_t<T>;
    S* norm = static_cast<S*>(a.norm);
    const RowOutputs<S> out{norm, norm + 1, static_cast<S*>(a.entropy), static_cast<S*>(a.logps),
                            1,    2};
    return launch(normalize_rows<T>, on(a.in.N * a.in.T, kThreads, stream), a.in, out);
  });
}

int token_logps_backward(const TokenLogpsBackwardArgs& a, void* stream) {
  return by_dtype(a.in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using S = acc_t<T>;
    const S* norm = static_cast<const S*>(a.norm);
    const RowInputs<S> row{norm,
                           norm + 1,
                           static_cast<const S*>(a.entropy),
                           static_cast<const S*>(a.grad_logps),
                           static_cast<const S*>(a.grad_entropy),
                           1,
                           2,
                           1};
    return launch(grad_rows<T>, on(a.in.N * a.in.T, kThreads, stream), a.in, row,
                  static_cast<T*>(a.grad_logits), a.in.T * a.in.V, a.in.V);
  });
}

int sage_loss(const SageLossArgs& a, void* stream) {
  return by_dtype(a.in.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using S = acc_t<T>;
    S* w = static_cast<S*>(a.workspace);
    const int64_t rows = a.in.N * a.in.T;
    const RowOutputs<S> out{w, w + 1, w + 2, w + 3, kWorkspace, kWorkspace};
    int code = launch(normalize_rows<T>, on(rows, kThreads, stream), a.in, out);
    if (code != cudaSuccess) return code;
    code = launch(score_sequences<S>, on(blocks_for(a.in.N, 64), 64, stream), a.sequence, w);
    if (code != cudaSuccess || a.grad_logits == nullptr) return code;
    const RowInputs<S> row{w, w + 1, w + 2, w + 4, nullptr, kWorkspace, kWorkspace, kWorkspace};
    return launch(grad_rows<T>, on(rows, kThreads, stream), a.in, row,
                  static_cast<T*>(a.grad_logits), a.grad_stride_n, a.grad_stride_t);
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
  const int64_t blocks = blocks_for(a.N * a.inner, kThreads);
  return by_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    return launch(scale_rows<T>, on(blocks > 65536 ? 65536 : blocks, kThreads, stream), a);
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
