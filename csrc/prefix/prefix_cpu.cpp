// CPU kernels of the prefix family.  Compiled once an instruction set, each time
// into its own namespace; torch-free.
//
// A pointwise row stands on its own: it is read from memory once, and its gradient
// is written while it is in cache.  A pairwise user's rows need one another: all are
// normalised, then all are written, from the nearest cache that holds them.
#include "common/scores_cpu.h"
#include "prefix/kernels.h"
#include "prefix/pairwise.h"

namespace genrec::GENREC_ISA {
namespace {

using namespace genrec::prefix;

// ---- the k-th largest of a row ----

// Memory for one row's contest.
class Contest {
 public:
  Contest() = default;
  Contest(const Contest&) = delete;
  Contest& operator=(const Contest&) = delete;
  ~Contest() { std::free(floats_); }

  // Room for `count` floats and a vector more.
  float* reserve(int64_t count) {
    if (count + kLanes > capacity_) {
      std::free(floats_);
      capacity_ = 2 * (count + kLanes);
      floats_ = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(capacity_)));
    }
    return floats_;
  }

 private:
  float* floats_ = nullptr;
  int64_t capacity_ = 0;
};

GENREC_INLINE vint load_keys(const float* p) {
  vint v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The k-th largest of n >= k floats; leaves them as keys.  There is room for a vector
// beyond them.
float kth_of(float* x, int64_t n, int64_t k) {
  for (int lane = 0; lane < kLanes; ++lane) x[n + lane] = -INFINITY;
  vint most = vint{} + INT32_MIN, least = vint{} + INT32_MAX;
  for (int64_t i = 0; i < n; i += kLanes) {
    const vint key = order_key(load(x + i));
    std::memcpy(x + i, &key, sizeof key);
    most = key > most ? key : most;
    least = key < least ? key : least;
  }
  int64_t low = INT32_MAX, high = INT32_MIN;  // between them lies the bound that k keys reach
  for (int lane = 0; lane < kLanes; ++lane) {
    low = least[lane] < low ? least[lane] : low;
    high = most[lane] >= high ? int64_t{most[lane]} + 1 : high;
  }
  while (high - low > 1) {
    const int32_t middle = static_cast<int32_t>(low + (high - low) / 2);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes)
      count += __builtin_popcount(lanes_of(load_keys(x + i) >= middle));
    if (count == k) {  // then it is the smallest of these
      vint smallest = vint{} + INT32_MAX;
      for (int64_t i = 0; i < n; i += kLanes) {
        const vint key = load_keys(x + i);
        smallest = (key >= middle) & (key < smallest) ? key : smallest;
      }
      int32_t bound = INT32_MAX;
      for (int lane = 0; lane < kLanes; ++lane)
        bound = smallest[lane] < bound ? smallest[lane] : bound;
      return of_order_key(bound);
    }
    (count > k ? low : high) = middle;
  }
  return of_order_key(static_cast<int32_t>(low));
}

// The k-th largest logit of a row, -inf where it has fewer.  NaNs are passed over.
//
// The row is dealt to groups: the k-th largest of the groups' largest is no larger than
// what is sought, and little else lies above it.
template <class T>
float kth_largest(const RowView<T>& row, int64_t k, Contest& contest) {
  if (row.n < k) return -INFINITY;
  // Vectors of groups: twice as many groups as k, where the row is long enough.
  const int64_t vectors = (row.n + kLanes - 1) / kLanes;
  int64_t groups = (2 * k + kLanes - 1) / kLanes;
  groups = groups < 8 ? 8 : groups;
  groups = groups > vectors ? vectors : groups;
  float* room = contest.reserve(row.n + 2 * groups * kLanes);
  float* tops = room + row.n + kLanes;  // behind what is collected later
  float some[kLanes];
  const auto each = [&](const auto& take) __attribute__((always_inline)) {
    int64_t i = 0;
    if (row.columns == nullptr) {
      for (; i + kLanes <= row.n; i += kLanes) take(load_floats(row.x + i));
      if (i < row.n) take(load_some(row.x + i, static_cast<int>(row.n - i), -INFINITY));
      return;
    }
    for (; i < row.n; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane)
        some[lane] = i + lane < row.n ? to_float(row.x[row.columns[i + lane]]) : -INFINITY;
      take(load(some));
    }
  };
  for (int64_t i = 0; i < groups * kLanes; i += kLanes) store(tops + i, splat(-INFINITY));
  float* at = tops;
  each([&](vfloat v) __attribute__((always_inline)) {
    store(at, vmax(v, load(at)));  // in this order a NaN is passed over
    at += kLanes;
    at = at == tops + groups * kLanes ? tops : at;
  });
  const float bound = kth_of(tops, groups * kLanes, k);
  int64_t n = 0;
  each([&](vfloat v) __attribute__((always_inline)) {
    const uint32_t mask = lanes_greater(v, splat(bound));
    if (!kCompresses && mask == 0) return;
    compress(room + n, v, mask);
    n += __builtin_popcount(mask);
  });
  return n < k ? bound : kth_of(room, n, k);
}

// Doubles are for gradcheck and for oracles: by halving, without memory.
double kth_largest(const RowView<double>& row, int64_t k) {
  const auto reaching = [&](int64_t bound) {
    int64_t count = 0;
    for (int64_t i = 0; i < row.n; ++i) {
      const double x = row.x[row.columns ? row.columns[i] : i];
      int64_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      count += x == x && (bits < 0 ? bits ^ INT64_MAX : bits) >= bound;
    }
    return count;
  };
  if (row.n < k) return -INFINITY;
  int64_t low = 0;  // bit by bit from the sign: the largest bound that k entries reach
  if (reaching(0) < k) low = INT64_MIN;
  for (int bit = 62; bit >= 0; --bit)
    if (reaching(low + (int64_t{1} << bit)) >= k) low += int64_t{1} << bit;
  if (reaching(low) < k) return -INFINITY;
  const int64_t bits = low < 0 ? low ^ INT64_MAX : low;
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// ---- pointwise ----

template <class T>
void rows(const RowsArgs& a, int64_t first_n, int64_t last_n) {
  using S = acc_t<T>;
  const Scores& in = a.in;
  const S inv = static_cast<S>(in.inv_temperature);
  const bool with_grad = a.grad_logits != nullptr;
  const S choices = a.beam.choices ? *static_cast<const S*>(a.beam.choices) : S(1);
  const bool whole = in.support.ranges == nullptr && in.support.begin == nullptr;
  Keeper keeper;
  Contest contest;
  for (int64_t n = first_n; n < last_n; ++n)
    for (int64_t t = 0; t < in.T; ++t) {
      const int64_t r = n * in.T + t, token = in.tokens[r];
      int64_t first;
      const RowView<T> row = supported<T>(in, n, t, first);
      T* g = with_grad ? static_cast<T*>(a.grad_logits) + r * in.V : nullptr;
      // Floats are kept where the gradient will be, if it stays in a cache; others beside it
      // while they fit.
      float* room = nullptr;
      if constexpr (sizeof(T) == sizeof(float))
        if (whole && !a.grad_streamed) room = g;
      if constexpr (sizeof(S) == sizeof(float))
        if (room == nullptr && with_grad && keeper.reserve(floats_of(row.n))) room = keeper.data();
      RowState<T> state;
      normalize_row<false>(row, inv, room, state);
      const T* x = static_cast<const T*>(in.logits) + n * in.stride_n + t * in.stride_t;
      const S logp = holds(row, first, token)
                         ? at_most_0(log_softmax<S>(to_float(x[token]), state.z, inv))
                         : static_cast<S>(kOutsideLogp);
      S weight = 1;
      if (a.beam.width > 0) {
        S bound = -INFINITY;
        if constexpr (sizeof(S) == sizeof(float))
          bound = kth_largest(row, a.beam.width, contest);
        else
          bound = kth_largest(row, a.beam.width);
        weight = row.n > 1 ? a.beam.of_token<S>(logp, log_softmax<S>(bound, state.z, inv)) : S(0);
      }
      static_cast<S*>(a.logps)[r] = weight == 0 ? S(0) : weight * logp;
      if (!with_grad) continue;
      const double factor = a.factors.of_token<S>(t) * a.outer.of_user<S>(n) / choices;
      const S slope = static_cast<S>(-factor * weight) * inv;
      write_grad<T>(in, n, t, state, {slope, S(0)}, {g, in.V, a.grad_is_zero, a.grad_streamed});
    }
  if (a.grad_streamed) streamed();
}

template <class T>
void choices(const ChoicesArgs& a) {
  int64_t count = 0;
  for (int64_t n = 0; n < a.in.N; ++n)
    for (int64_t t = 0; t < a.in.T; ++t) {
      int64_t first;
      count += supported<T>(a.in, n, t, first).n > 1;
    }
  *static_cast<acc_t<T>*>(a.count) = static_cast<acc_t<T>>(count > 1 ? count : 1);
}

template <class S>
void finish(const FinishArgs& a) {
  const S* logps = static_cast<const S*>(a.logps);
  const S choices = a.choices ? *static_cast<const S*>(a.choices) : S(1);
  double total = 0;
  for (int64_t n = 0; a.losses != nullptr && n < a.N; ++n) {
    double loss = 0;
    for (int64_t t = 0; t < a.T; ++t) loss -= a.factors.of_token<S>(t) * logps[n * a.T + t];
    static_cast<S*>(a.losses)[n] = static_cast<S>(loss * a.scale / choices);
  }
  double before = 0;  // the sum of the tokens before, over all users
  for (int64_t t = 0; t < a.T; ++t) {
    double sum = 0;
    for (int64_t n = 0; n < a.N; ++n) sum += logps[n * a.T + t];
    total -= a.factors.of_token<S>(t) * sum;
    before += sum;
    if (t < a.factors.P)
      static_cast<S*>(a.levels)[t] =
          static_cast<S>(-before / static_cast<double>(a.N > 0 ? a.N : 1) /
                         ((t + 1) * a.factors.prefix_temperature));
  }
  if (a.total != nullptr) *static_cast<S*>(a.total) = static_cast<S>(total * a.scale / choices);
}

// ---- pairwise ----

// From one user's log-probabilities to the loss of each prefix and, where wanted,
// the slopes.
template <class S>
void pairwise_user(const PairwiseArgs& a, int64_t n, double* powers) {
  const int64_t P = a.factors.P;
  S* slopes = a.slopes ? static_cast<S*>(a.slopes) + n * a.C * a.T : nullptr;
  for (int64_t t = 0; t < P; ++t) {
    double top = 0;  // the positive's own
    for (int64_t i = 1; i < a.C; ++i) {
      powers[i] = ahead_of_positive<S>(a, n, i, t);
      top = powers[i] > top || powers[i] != powers[i] ? powers[i] : top;
    }
    double others = 0;
    for (int64_t i = 1; i < a.C; ++i) others += powers[i] = relative_power(powers[i], top);
    const double sum = others + exp(-top);
    static_cast<S*>(a.user_levels)[t * a.N + n] =
        static_cast<S>((top == 0 ? std::log1p(others) : top + std::log(sum)) / (t + 1));
    if (slopes == nullptr) continue;
    const double slope = prefix_slope<S>(a, n, t) / sum;
    for (int64_t i = 1; i < a.C; ++i) slopes[i * a.T + t] = static_cast<S>(slope * powers[i]);
    slopes[t] = static_cast<S>(-slope * others);
  }
  for (int64_t i = 0; slopes != nullptr && i < a.C; ++i) slopes_by_token(a, n, i, slopes + i * a.T);
}

template <class T>
void pairwise(const PairwiseArgs& a, int64_t first_n, int64_t last_n) {
  using S = acc_t<T>;
  const Scores& in = a.in;
  const S inv = static_cast<S>(in.inv_temperature);
  RowState<T>* states =
      static_cast<RowState<T>*>(std::malloc(sizeof(RowState<T>) * static_cast<size_t>(in.T + 1)));
  double* powers = static_cast<double*>(std::malloc(sizeof(double) * static_cast<size_t>(a.C + 1)));
  for (int64_t n = first_n; n < last_n; ++n) {
    T* grad = a.grad_logits ? static_cast<T*>(a.grad_logits) + n * in.T * in.V : nullptr;
    const auto x_of = [&](int64_t r) {
      return static_cast<const T*>(in.logits) + n * in.stride_n + r * in.stride_t;
    };
    // Where floats are kept until the slopes are known.
    const auto kept = [&](int64_t r) -> float* {
      if constexpr (sizeof(T) == sizeof(float))
        if (grad != nullptr && !a.grad_streamed) return grad + r * in.V;
      return nullptr;
    };
    for (int64_t r = 0; r < in.T; ++r) {
      const T* x = x_of(r);
      const RowView<T> row{x, nullptr, in.V, in.stride_t};
      normalize_row<false>(row, inv, kept(r), states[r]);
      // A small prefix temperature magnifies what a float would round off.
      const double logp =
          log_softmax<double>(to_float(x[in.tokens[n * in.T + r]]),
                              {states[r].z.top, states[r].z.log_sum, 0}, in.inv_temperature);
      static_cast<double*>(a.logps)[n * in.T + r] = at_most_0(logp);
    }
    pairwise_user<S>(a, n, powers);
    if (grad == nullptr) continue;
    const S* slopes = static_cast<const S*>(a.slopes) + n * in.T;
    for (int64_t r = 0; r < in.T; ++r)
      write_grad<T>(in, n, r, states[r], {slopes[r] * inv, S(0)},
                    {grad + r * in.V, in.V, false, a.grad_streamed});
  }
  if (a.grad_streamed) streamed();
  std::free(powers);
  std::free(states);
}

template <class S>
void pairwise_from_logps(const PairwiseArgs& a, int64_t first_n, int64_t last_n) {
  double* powers = static_cast<double*>(std::malloc(sizeof(double) * static_cast<size_t>(a.C + 1)));
  for (int64_t n = first_n; n < last_n; ++n) pairwise_user<S>(a, n, powers);
  std::free(powers);
}

template <class S>
void finish_pairwise(const FinishPairwiseArgs& a) {
  double cross_entropy = 0, total = 0;
  for (int64_t n = 0; n < a.N; ++n)
    for (int64_t t = 0; t < a.T; ++t) cross_entropy -= logp_at<S>(a, n * a.C * a.T + t);
  for (int64_t t = 0; t < a.factors.P; ++t) {
    double sum = 0;
    for (int64_t n = 0; n < a.N; ++n) sum += static_cast<const S*>(a.user_levels)[t * a.N + n];
    const double mean = sum / static_cast<double>(a.N > 0 ? a.N : 1);
    static_cast<S*>(a.levels)[t] = static_cast<S>(mean);
    total += a.factors.beta * static_cast<const S*>(a.factors.weights)[t] * mean;
  }
  total += a.factors.per_token * cross_entropy / static_cast<double>(a.N > 0 ? a.N : 1);
  *static_cast<S*>(a.total) = static_cast<S>(total);
}

// ---- for every element type ----

template <class F>
void by_accumulator(DType type, const F& f) {
  if (type == DType::f64) return f.template operator()<double>();
  f.template operator()<float>();
}

void rows_any(const RowsArgs& a, int64_t first, int64_t last) {
  by_dtype(a.in.dtype, [&]<class T>() { rows<T>(a, first, last); });
}
void choices_any(const ChoicesArgs& a) {
  by_dtype(a.in.dtype, [&]<class T>() { choices<T>(a); });
}
void finish_any(const FinishArgs& a) {
  by_accumulator(a.dtype, [&]<class S>() { finish<S>(a); });
}
void pairwise_any(const PairwiseArgs& a, int64_t first, int64_t last) {
  by_dtype(a.in.dtype, [&]<class T>() { pairwise<T>(a, first, last); });
}
void pairwise_from_logps_any(const PairwiseArgs& a, int64_t first, int64_t last) {
  by_accumulator(a.dtype, [&]<class S>() { pairwise_from_logps<S>(a, first, last); });
}
void finish_pairwise_any(const FinishPairwiseArgs& a) {
  by_accumulator(a.dtype, [&]<class S>() { finish_pairwise<S>(a); });
}

}  // namespace

// Declared in prefix.cpp for each instruction set that was built.
extern const prefix::CpuKernels prefix_kernels;
const prefix::CpuKernels prefix_kernels{
    rows_any, choices_any, finish_any, pairwise_any, pairwise_from_logps_any, finish_pairwise_any};

}  // namespace genrec::GENREC_ISA
