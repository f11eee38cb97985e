// CPU kernels of the policy family.  Compiled once an instruction set, each
// time into its own namespace; torch-free.
//
// Every call reads a sequence's logits from memory once: its T rows are
// normalised, the sequence's scalar mathematics is done, and the gradient is
// written while the rows are still in cache.  No table of log-probabilities and
// no mask of vocabulary width exists.
#include "common/scores_cpu.h"
#include "policy/advantages.h"
#include "policy/kernels.h"
#include "policy/sequence.h"

namespace genrec::GENREC_ISA {
namespace {

using namespace genrec::policy;

template <class T>
void token_logps(const TokenLogpsArgs& a, int64_t first_n, int64_t last_n) {
  using S = acc_t<T>;
  const Scores& in = a.in;
  const S inv = static_cast<S>(in.inv_temperature);
  for (int64_t n = first_n; n < last_n; ++n)
    for (int64_t t = 0; t < in.T; ++t) {
      const int64_t r = n * in.T + t, token = in.tokens[r];
      S* norm = static_cast<S*>(a.norm) + 2 * r;
      if (!counts(in.mask, r)) {
        static_cast<S*>(a.logps)[r] = static_cast<S*>(a.entropy)[r] = norm[0] = norm[1] = 0;
        continue;
      }
      int64_t first;
      const RowView<T> row = supported<T>(in, n, t, first);
      RowState<T> state;
      normalize_row<true>(row, inv, nullptr, state);
      const Normalizer<S>& z = state.z;
      const T* x = static_cast<const T*>(in.logits) + n * in.stride_n + t * in.stride_t;
      static_cast<S*>(a.logps)[r] = holds(row, first, token)
                                        ? at_most_0(log_softmax<S>(to_float(x[token]), z, inv))
                                        : static_cast<S>(kOutsideLogp);
      static_cast<S*>(a.entropy)[r] = z.entropy;
      norm[0] = z.top;
      norm[1] = z.log_sum;
    }
}

template <class T>
void token_logps_backward(const TokenLogpsBackwardArgs& a, int64_t first_n, int64_t last_n) {
  using S = acc_t<T>;
  const Scores& in = a.in;
  const S inv = static_cast<S>(in.inv_temperature);
  for (int64_t r = first_n * in.T; r < last_n * in.T; ++r) {
    const S* norm = static_cast<const S*>(a.norm) + 2 * r;
    RowState<T> state;
    state.z = {norm[0], norm[1], static_cast<const S*>(a.entropy)[r]};
    const RowSlopes<S> slope{static_cast<const S*>(a.grad_logps)[r] * inv,
                             at_or<S>(a.grad_entropy, r, S(0)) * inv};
    write_grad<T>(
        in, r / in.T, r % in.T, state, slope,
        {static_cast<T*>(a.grad_logits) + r * in.V, in.V, a.grad_is_zero, a.grad_streamed});
  }
  if (a.grad_streamed) streamed();
}

template <class T, bool kWithEntropy>
void sage_loss(const SageLossArgs& a, int64_t first_n, int64_t last_n) {
  using S = acc_t<T>;
  const Scores& in = a.in;
  const S inv = static_cast<S>(in.inv_temperature);
  // One of a sequence's rows.
  struct Row {
    RowState<T> state;
    S logp, slope;
  };
  Row* rows = static_cast<Row*>(std::malloc(sizeof(Row) * static_cast<size_t>(in.T)));
  Keeper keeper;
  for (int64_t n = first_n; n < last_n; ++n) {
    int64_t floats = 0;
    if constexpr (sizeof(S) == sizeof(float))
      for (int64_t t = 0; a.grad_logits != nullptr && t < in.T; ++t) {
        if (!counts(in.mask, n * in.T + t)) continue;  // its bounds were not checked
        int64_t first;
        floats += floats_of(supported<T>(in, n, t, first).n);
      }
    float* room = floats > 0 && keeper.reserve(floats) ? keeper.data() : nullptr;
    S entropy = 0;
    int64_t count = 0;
    for (int64_t t = 0; t < in.T; ++t) {
      if (!counts(in.mask, n * in.T + t)) continue;
      int64_t first;
      const RowView<T> row = supported<T>(in, n, t, first);
      const int64_t token = in.tokens[n * in.T + t];
      const T* x = static_cast<const T*>(in.logits) + n * in.stride_n + t * in.stride_t;
      normalize_row<kWithEntropy>(row, inv, room, rows[t].state);
      if (room != nullptr) room += floats_of(row.n);
      rows[t].logp = holds(row, first, token)
                         ? at_most_0(log_softmax<S>(to_float(x[token]), rows[t].state.z, inv))
                         : static_cast<S>(kOutsideLogp);
      entropy += rows[t].state.z.entropy;
      ++count;
    }
    const S mean_entropy = kWithEntropy && count > 0 ? entropy / count : S(0);
    keep_result(a.sequence, n,
                sequence_loss<S>(
                    a.sequence, n, mean_entropy, [&](int64_t t) { return rows[t].logp; },
                    [&](int64_t t, S slope) { rows[t].slope = slope; }));
    if (a.grad_logits == nullptr) continue;
    for (int64_t t = 0; t < in.T; ++t) {
      T* g = static_cast<T*>(a.grad_logits) + n * a.grad_stride_n + t * a.grad_stride_t;
      write_grad<T>(in, n, t, rows[t].state, {rows[t].slope * inv, S(0)},
                    {g, in.V, a.grad_is_zero, a.grad_streamed});
    }
  }
  if (a.grad_streamed) streamed();
  std::free(rows);
}

template <class S>
void sage_loss_from_logps(const SageFromLogpsArgs& a, int64_t first_n, int64_t last_n) {
  const int64_t T = a.sequence.T;
  for (int64_t n = first_n; n < last_n; ++n) {
    const S* logps = static_cast<const S*>(a.logps) + n * T;
    S* grad = static_cast<S*>(a.grad_logps) + n * T;
    keep_result(a.sequence, n,
                sequence_loss<S>(
                    a.sequence, n, S(0), [&](int64_t t) { return logps[t]; },
                    [&](int64_t t, S slope) { grad[t] = slope; }));
  }
}

// Scales one sequence's supported columns in place; false where all columns are.
template <class T, class S>
bool scale_support(const ScaleArgs& a, int64_t n, S factor) {
  const Support& s = a.support;
  if (s.ranges == nullptr && s.begin == nullptr) return false;
  const int64_t V = a.inner / a.T;
  for (int64_t t = 0; t < a.T; ++t) {
    T* row = static_cast<T*>(a.out) + n * a.inner + t * V;
    const int64_t r = n * a.T + t;
    if (s.begin != nullptr) {
      // What is wrong was not looked at, and belongs to a masked row: zeros.
      if (s.begin[r] < 0 || s.end[r] > a.num_columns) continue;
      for (int64_t i = s.begin[r]; i < s.end[r]; ++i) {
        const int64_t v = s.columns[i];
        if (0 <= v && v < V) from_float(row + v, to_float(row[v]) * factor);
      }
    } else {
      for (int64_t v = s.ranges[2 * t]; v < s.ranges[2 * t + 1]; ++v)
        from_float(row + v, to_float(row[v]) * factor);
    }
  }
  return true;
}

template <class T>
void scale(const ScaleArgs& a, int64_t first, int64_t last) {
  using S = acc_t<T>;
  for (int64_t n = first; n < last; ++n) {
    const S factor = static_cast<const S*>(a.factor)[a.shared ? 0 : n];
    const T* x = static_cast<const T*>(a.grad) + n * a.inner;
    T* y = static_cast<T*>(a.out) + n * a.inner;
    if (x == y && factor == S(1)) continue;
    if (x == y && scale_support<T>(a, n, factor)) continue;
    int64_t i = 0;
    if constexpr (sizeof(S) == sizeof(float))
      for (; i + 2 * kLanes <= a.inner; i += 2 * kLanes) {
        vfloat u, v;
        u = load_floats(x + i), v = load_floats(x + i + kLanes);
        store_floats(y + i, u * factor), store_floats(y + i + kLanes, v * factor);
      }
    for (; i < a.inner; ++i) from_float(y + i, to_float(x[i]) * factor);
  }
}

template <class S>
void sum(const SumArgs& a) {
  double total = 0;
  for (int64_t n = 0; n < a.N; ++n) total += static_cast<const S*>(a.values)[n];
  *static_cast<S*>(a.total) = static_cast<S>(total);
}

template <class S>
void advantages(const AdvantagesArgs& a) {
  const S* rewards = static_cast<const S*>(a.rewards);
  const S* weights = static_cast<const S*>(a.weights);
  S* out = static_cast<S*>(a.advantages);
  const int64_t N = a.B * a.G;
  for (int64_t b = 0; b < a.B; ++b) group_advantages(a, b, rewards, weights, out);
  const Spread batch = spread(N, a.unbiased, [&](int64_t n) -> double { return out[n]; });
  for (int64_t n = 0; n < N; ++n) out[n] = batch_advantage(a, n, rewards, out[n], batch);
}

void token_logps_any(const TokenLogpsArgs& a, int64_t first, int64_t last) {
  by_dtype(a.in.dtype, [&]<class T>() { token_logps<T>(a, first, last); });
}
void token_logps_backward_any(const TokenLogpsBackwardArgs& a, int64_t first, int64_t last) {
  by_dtype(a.in.dtype, [&]<class T>() { token_logps_backward<T>(a, first, last); });
}
void sage_loss_any(const SageLossArgs& a, int64_t first, int64_t last) {
  by_dtype(a.in.dtype, [&]<class T>() {
    a.with_entropy ? sage_loss<T, true>(a, first, last) : sage_loss<T, false>(a, first, last);
  });
}
void sage_loss_from_logps_any(const SageFromLogpsArgs& a, int64_t first, int64_t last) {
  if (a.dtype == DType::f64) return sage_loss_from_logps<double>(a, first, last);
  sage_loss_from_logps<float>(a, first, last);
}

void scale_any(const ScaleArgs& a, int64_t first, int64_t last) {
  by_dtype(a.dtype, [&]<class T>() { scale<T>(a, first, last); });
}
void sum_any(const SumArgs& a) {
  if (a.dtype == DType::f64) return sum<double>(a);
  sum<float>(a);
}
void advantages_any(const AdvantagesArgs& a) {
  if (a.dtype == DType::f64) return advantages<double>(a);
  advantages<float>(a);
}

}  // namespace

// Declared in policy.cpp for each instruction set that was built.
extern const policy::CpuKernels policy_kernels;
const policy::CpuKernels policy_kernels{token_logps_any, token_logps_backward_any,
                                        sage_loss_any,   sage_loss_from_logps_any,
                                        scale_any,       sum_any,
                                        advantages_any};

}  // namespace genrec::GENREC_ISA
