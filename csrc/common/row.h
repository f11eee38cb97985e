// One row of logits: its normaliser and entropy, and the gradient of its
// log-softmax.  Shared by every family that scores rows.
//
// A row comes from memory once.  Where its columns lie side by side its exponentials are summed
// against a guess of its largest logit (guess_sum).  Lists of columns, and rows for which no guess
// will do, go the long way: in blocks that fit the first-level cache, a block's maximum is taken,
// then its exponentials are summed against the running maximum (add_block).  Half types become
// floats in registers.  Sums of a block are f32 in vector lanes, sums of blocks are double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/vec.h"

namespace genrec::GENREC_ISA {

inline constexpr int64_t kBlock = 1024;

// softmax_v = exp((x_v - top) / temperature - log_sum).  `top` and `log_sum`
// stay apart: their sum would cost large logits their digits.
template <class S>
struct Normalizer {
  S top;      // the row's maximum, or what lies as near to it as its log-sum-exp
  S log_sum;  // log sum exp((x - top) / temperature); NaN if any logit is NaN or
              // +inf, or none is above -inf
  S entropy;  // nats
};

// A row without columns: nothing to choose from, nothing to learn.
template <class S>
GENREC_INLINE Normalizer<S> empty_row() {
  return {S(0), S(0), S(0)};
}

struct RunningSum {
  float top = -INFINITY;
  double sum = 0;       // sum of e^d, d = (x - top) / temperature
  double weighted = 0;  // sum of d e^d
  bool poisoned = false;
};

// Asks for the memory of rows of n columns that are read one after the other, the next one `step`
// elements after this one, and all of them where they are `even`.  In two strides, into the
// second-level cache and from there into the first: the first alone cannot have enough lines on
// their way.  (With 6144 for the first stride an AMD EPYC took a third longer over rows of 8,192
// floats from memory; an Intel Xeon was measured with 6144 alone.)
template <class T>
class Ahead {
 public:
  Ahead(const T* x, int64_t n, int64_t step, bool even)
      : far_(x, n, step, even, 12288), near_(x, n, step, even, 4096) {}

  // What comes after elements [i, i + count) of this row.
  GENREC_INLINE_MEMBER void ask(int64_t i, int64_t count) const {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    const T *far = far_.of(i), *near = near_.of(i);
    for (int64_t at = 0; at < count; at += kLine) prefetch_far(far + at);
    for (int64_t at = 0; at < count; at += kLine) prefetch(near + at);
  }

 private:
  struct Place {
    Place(const T* x, int64_t n, int64_t step, bool even, int64_t bytes) {
      // Beyond the next row nobody has said where uneven ones lie.
      const int64_t wanted = bytes / static_cast<int64_t>(sizeof(T));
      const int64_t distance = even || wanted < n ? wanted : n, rows = distance / n;
      here = x + distance + rows * (step - n);
      next = here + (step - n);
      turn = (rows + 1) * n - distance;
    }
    const T* of(int64_t i) const { return (i < turn ? here : next) + i; }

    const T *here, *next;  // until a row's end is passed, and from there on
    int64_t turn;
  };
  Place far_, near_;
};

template <class E>
GENREC_INLINE float block_top(const E* x, int64_t n) {
  vfloat top0 = splat(-INFINITY), top1 = top0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    vfloat a, b;
    load_pair(x + i, a, b);
    top0 = vmax(a, top0);  // in this order a NaN is passed over
    top1 = vmax(b, top1);
  }
  for (; i + kLanes <= n; i += kLanes) top0 = vmax(load_floats(x + i), top0);
  if (i < n) top1 = vmax(load_some(x + i, static_cast<int>(n - i), -INFINITY), top1);
  return max_lanes(vmax(top0, top1));
}

// Adds n logits to the sum.  With kKeep, leaves each one's e^d in kept[0 .. n),
// d against the top as it is after this block, pairs of vectors in load_pair's
// order; kept may be x itself.  Without kWeighted, the entropy's sum is left out.  `ahead`, if
// given, is of the row whose element `at` is x.
template <bool kKeep, bool kWeighted, class E>
static void add_block(RunningSum& run, const E* x, int64_t n, float inv_temperature, float* kept,
                      const Ahead<E>* ahead = nullptr, int64_t at = 0) {
  const float top = block_top(x, n);
  if (top > run.top) {
    if (run.top > -INFINITY) {
      const double shift = (static_cast<double>(run.top) - top) * inv_temperature;
      const double factor = std::exp(shift);
      run.weighted = factor == 0 ? 0 : (run.weighted + run.sum * shift) * factor;
      run.sum *= factor;
    }
    run.top = top;
  }
  if (run.top == -INFINITY) {  // nothing but -inf and NaN so far: e^d is undefined
    for (int64_t i = 0; i < n; ++i) {
      const float v = to_float(x[i]);
      run.poisoned = run.poisoned || v != v;
      if constexpr (kKeep) kept[i] = 0;
    }
    return;
  }
  const vfloat vtop = splat(run.top);
  const float rate = inv_temperature * kLog2e;
  vfloat sum0{}, sum1{}, weighted0{}, weighted1{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    // The next block comes while this one is worked on.
    if (ahead != nullptr) ahead->ask(at + i, 2 * kLanes);
    vfloat a, b;
    load_pair(x + i, a, b);
    const vfloat t0 = (a - vtop) * rate, t1 = (b - vtop) * rate;
    // 2^t is 0 below the floor, and t held there keeps 0 * -inf from making a NaN.
    const vfloat h0 = hold(t0), h1 = hold(t1);
    const vfloat e0 = exp2_held(t0, h0), e1 = exp2_held(t1, h1);
    sum0 += e0;
    sum1 += e1;
    if constexpr (kWeighted) weighted0 += e0 * h0, weighted1 += e1 * h1;
    if constexpr (kKeep) store(kept + i, e0), store(kept + i + kLanes, e1);
  }
  for (; i < n; i += kLanes) {
    const int rest = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    const vfloat v = rest == kLanes ? load_floats(x + i) : load_some(x + i, rest, -INFINITY);
    const vfloat t = (v - vtop) * rate, h = hold(t), e = exp2_held(t, h);
    sum0 += e;
    if constexpr (kWeighted) weighted0 += e * h;
    if constexpr (kKeep) rest == kLanes ? store(kept + i, e) : store_some(kept + i, e, rest);
  }
  run.sum += sum_lanes(sum0 + sum1);
  if constexpr (kWeighted) run.weighted += sum_lanes(weighted0 + weighted1) * kLn2;
}

GENREC_INLINE Normalizer<float> finish(const RunningSum& run) {
  if (run.poisoned || run.top == -INFINITY) return {run.top, NAN, NAN};
  const double log_sum = std::log(run.sum);
  return {run.top, static_cast<float>(log_sum),
          static_cast<float>(log_sum - run.weighted / run.sum)};
}

// The columns of one row: x[0 .. n), or x[columns[0 .. n)] where columns is given.
template <class T>
struct RowView {
  const T* x;
  const int32_t* columns;
  int64_t n;
  int64_t step;      // from here to the row that is read next, most often
  bool even = true;  // whether that is as far as from there to the one after it
};

template <class T>
GENREC_INLINE void gather(const RowView<T>& row, int64_t at, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(row.x[row.columns[at + i]]);
}

inline constexpr int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

template <class T>
static Normalizer<acc_t<T>> normalize(const RowView<T>& row, acc_t<T> inv_temperature) {
  if (row.n == 0) return empty_row<float>();
  float scratch[kBlock];
  RunningSum run;
  const Ahead<T> ahead(row.x, row.n, row.step, row.even);
  for (int64_t at = 0; at < row.n; at += kBlock) {
    const int64_t n = row.n - at < kBlock ? row.n - at : kBlock;
    if (row.columns == nullptr) {
      add_block<false, true>(run, row.x + at, n, inv_temperature, nullptr, &ahead, at);
    } else {
      gather(row, at, n, scratch);
      add_block<false, true>(run, scratch, n, inv_temperature, nullptr);
    }
  }
  return finish(run);
}

// (v - guess) rate, where the product of guess and rate is taken as `shift`.  Where a product and
// a sum are rounded once, v rate - shift keeps its digits; in the compiler's hands it might not be.
#if defined(__AVX512F__)
inline constexpr bool kFused = true;
GENREC_INLINE vfloat exponents(vfloat v, float rate, float, float shift) {
  return (vfloat)_mm512_fmsub_ps((__m512)v, _mm512_set1_ps(rate), _mm512_set1_ps(shift));
}
#elif defined(__FMA__)
inline constexpr bool kFused = true;
GENREC_INLINE vfloat exponents(vfloat v, float rate, float, float shift) {
  return (vfloat)_mm256_fmsub_ps((__m256)v, _mm256_set1_ps(rate), _mm256_set1_ps(shift));
}
#else
inline constexpr bool kFused = false;
GENREC_INLINE vfloat exponents(vfloat v, float rate, float guess, float) {
  return (v - guess) * rate;
}
#endif

// Of a row's powers 2^t.
struct Powers {
  double sum = 0, weighted = 0;  // of 2^t, and of t 2^t where wanted
};

// The powers 2^((x - guess) rate) of a row of columns side by side, where the product of
// guess and rate is taken as `shift`.  With kKeep, leaves each of them in kept[0 .. n), pairs of
// vectors in load_pair's order; kept may be memory of the next use.
template <bool kKeep, bool kWeighted, class T>
GENREC_INLINE Powers sum_of_powers(const RowView<T>& row, float rate, float guess, float shift,
                                   float* kept) {
  constexpr int64_t kKeptAhead = 2048 / static_cast<int64_t>(sizeof(T));
  const T* x = row.x;
  const int64_t n = row.n;
  const Ahead<T> ahead(x, n, row.step, row.even);
  Powers all;
  for (int64_t at = 0; at < n; at += 4 * kBlock) {
    const int64_t last = n - at < 4 * kBlock ? n : at + 4 * kBlock;
    vfloat sum0{}, sum1{}, sum2{}, sum3{}, weighted0{}, weighted1{};
    const auto power = [&](vfloat v, vfloat& weighted) __attribute__((always_inline)) {
      const vfloat t = exponents(v, rate, guess, shift), e = exp2_any(t);
      // Held, as 0 * -inf would make a NaN.
      if constexpr (kWeighted) weighted += e * hold(t);
      return e;
    };
    int64_t i = at;
    for (; i + 4 * kLanes <= last; i += 4 * kLanes) {
      ahead.ask(i, 4 * kLanes);
      if constexpr (kKeep)
        for (int64_t line = 0; line < 4 * kLanes; line += 16)
          prefetch_to_write(kept + i + kKeptAhead + line);
      vfloat a, b, c, d;
      load_pair(x + i, a, b);
      load_pair(x + i + 2 * kLanes, c, d);
      a = power(a, weighted0), b = power(b, weighted1);
      c = power(c, weighted0), d = power(d, weighted1);
      sum0 += a, sum1 += b, sum2 += c, sum3 += d;
      if constexpr (kKeep) {
        store(kept + i, a), store(kept + i + kLanes, b);
        store(kept + i + 2 * kLanes, c), store(kept + i + 3 * kLanes, d);
      }
    }
    // Whoever reads what is kept takes pairs as long as there are any, and no bit of a sum depends
    // on whether anything is kept.
    for (; i + 2 * kLanes <= last; i += 2 * kLanes) {
      vfloat a, b;
      load_pair(x + i, a, b);
      a = power(a, weighted0), b = power(b, weighted1);
      sum0 += a, sum1 += b;
      if constexpr (kKeep) store(kept + i, a), store(kept + i + kLanes, b);
    }
    for (; i < last; i += kLanes) {
      const int rest = last - i < kLanes ? static_cast<int>(last - i) : kLanes;
      const vfloat v =
          power(rest == kLanes ? load_floats(x + i) : load_some(x + i, rest, -INFINITY), weighted0);
      sum0 += v;
      if constexpr (kKeep) rest == kLanes ? store(kept + i, v) : store_some(kept + i, v, rest);
    }
    all.sum += sum_lanes((sum0 + sum1) + (sum2 + sum3));
    if constexpr (kWeighted) all.weighted += sum_lanes(weighted0 + weighted1);
  }
  return all;
}

// A row's powers against the largest of its first few logits, which is close enough for nearly
// every row, or against its largest; where they are not `good`, the row has to go the long way.
struct Guess {
  float rate, guess, shift;
  bool good;
  double sum, log_sum, entropy;  // of the powers; entropy in nats
};

template <class T>
GENREC_INLINE bool take_guess(const RowView<T>& row, int64_t looked_at, Guess& g) {
  const float top = block_top(row.x, looked_at);
  if (!(top > g.guess)) return false;
  g.guess = top;
  g.shift = static_cast<float>(static_cast<double>(top) * g.rate);
  return g.shift > -4096 && g.shift < 4096;  // beyond, x rate has lost too many digits
}

template <bool kKeep, bool kWeighted, class T>
GENREC_INLINE void take_powers(const RowView<T>& row, Guess& g, float* kept) {
  const Powers powers = sum_of_powers<kKeep, kWeighted>(row, g.rate, g.guess, g.shift, kept);
  g.sum = powers.sum;
  // Above, the guess lay so far below the largest logit that rounding shows.
  g.good = powers.sum < 0x1p30;
  if (!g.good) return;
  g.log_sum = std::log(powers.sum);
  g.entropy = kWeighted ? g.log_sum - powers.weighted / powers.sum * kLn2 : 0;
}

template <bool kKeep, bool kWeighted, class T>
GENREC_INLINE Guess guess_sum(const RowView<T>& row, float inv_temperature, float* kept) {
  Guess g{inv_temperature * kLog2e, -INFINITY, 0, false, NAN, NAN, NAN};
  if (!(g.rate > 1e-30f)) return g;  // a normaliser in the logits' scale might be infinite
  if (take_guess(row, row.n < 4 * kLanes ? row.n : 4 * kLanes, g))
    take_powers<kKeep, kWeighted>(row, g, kept);
  if (!g.good && take_guess(row, row.n, g)) take_powers<kKeep, kWeighted>(row, g, kept);
  if constexpr (kWeighted)
    if (g.good && !(2 * g.entropy >= g.log_sum)) {  // little was left of the difference
      Guess other = g;
      if (take_guess(row, row.n, other)) take_powers<false, true>(row, other, nullptr);
      g.entropy = other.entropy;
    }
  return g;
}

// The normaliser that a good guess gives.
GENREC_INLINE Normalizer<float> finish(const Guess& g, float inv_temperature) {
  // Of the sum's own rate and shift; `top` takes what a float can hold of it.
  const double shift = kFused ? g.shift : static_cast<double>(g.guess) * g.rate;
  const double log_sum = g.log_sum + shift * kLn2, top = log_sum * (1 / (g.rate * kLn2));
  // What its own power is off by: a certain token has probability 1.
  constexpr double kNoise = 1.5e-7;
  if (std::fabs(log_sum - static_cast<double>(g.guess) * g.rate * kLn2) < kNoise)
    return {g.guess, 0, g.entropy > kNoise ? static_cast<float>(g.entropy) : 0};
  const float held = static_cast<float>(top);
  return {held, static_cast<float>((top - held) * inv_temperature),
          static_cast<float>(g.entropy > 0 ? g.entropy : 0)};
}

// The normaliser without the entropy, of columns side by side; of none, log_sum is NaN.
template <class T>
static Normalizer<float> normalize_plain(const RowView<T>& row, float inv_temperature) {
  if (row.n == 0) return {-INFINITY, NAN, NAN};
  const Guess g = guess_sum<false, false>(row, inv_temperature, nullptr);
  if (g.good) return finish(g, inv_temperature);
  RunningSum run;
  for (int64_t at = 0; at < row.n; at += kBlock)
    add_block<false, false>(run, row.x + at, row.n - at < kBlock ? row.n - at : kBlock,
                            inv_temperature, nullptr);
  return finish(run);
}

// Columns that a gradient is written to, side by side.
template <class G>
struct Columns {
  G* g;
  int64_t n;
  int64_t own_at;  // the column of `own`, whatever the others are made of; or -1
  acc_t<G> own;
  bool streamed;  // past the caches, where memory is worth more than what they hold
};

// Writes what pair(i, a, b) gives of columns [i, i + 2 kLanes), and some(i, count) of the last.
// `number`: none of it is NaN.
template <class G, class Pair, class Some>
GENREC_INLINE void write_columns(const Columns<G>& out, bool number, const Pair& pair,
                                 const Some& some) {
  constexpr int64_t kPair = 2 * kLanes;
  constexpr int kVector = kLanes * 4 / static_cast<int>(sizeof(G));
  const int64_t pairs = number ? out.n / kPair * kPair : 0;
  int64_t i = 0;
  vfloat a, b;
  if (kStreams && out.streamed && reinterpret_cast<uintptr_t>(out.g) % sizeof(vfloat) == 0)
    for (; i < pairs; i += kPair) {
      pair(i, a, b);
      alignas(64) G part[kPair];
      store_pair(part, a, b);
      // A line that went past the caches is slow to come back.
      if (i <= out.own_at && out.own_at < i + kPair) from_float(part + (out.own_at - i), out.own);
      for (int at = 0; at < kPair; at += kVector) {
        vfloat v;
        std::memcpy(&v, part + at, sizeof v);
        stream(out.g + i + at, v);
      }
    }
  const int64_t done = i;
  for (; i < pairs; i += kPair) {
    pair(i, a, b);
    store_pair(out.g + i, a, b);
  }
  for (; i + kLanes <= out.n; i += kLanes) store_floats(out.g + i, some(i, kLanes));
  if (i < out.n) {
    const int rest = static_cast<int>(out.n - i);
    store_some(out.g + i, some(i, rest), rest);
  }
  if (out.own_at >= done) from_float(out.g + out.own_at, out.own);
}

// The gradient factor p of columns from their powers; out.g may be `kept`.
template <class G>
GENREC_INLINE void scale_kept(const float* kept, const Columns<G>& out, float factor) {
  write_columns(
      out, factor == factor,
      [&](int64_t i, vfloat& a, vfloat& b) __attribute__((always_inline)) {
        a = load(kept + i) * factor;
        b = load(kept + i + kLanes) * factor;
      },
      [&](int64_t i, int count) __attribute__((always_inline)) {
        return (count == kLanes ? load(kept + i) : load_some(kept + i, count, 0)) * factor;
      });
}

// The same from the logits.
template <class T>
GENREC_INLINE void scale_powers(const T* x, const Columns<T>& out, const Guess& guess,
                                float factor) {
  const auto one = [&](vfloat v) __attribute__((always_inline)) {
    return exp2_any(exponents(v, guess.rate, guess.guess, guess.shift)) * factor;
  };
  write_columns(
      out, factor == factor,
      [&](int64_t i, vfloat& a, vfloat& b) __attribute__((always_inline)) {
        prefetch(x + i + kBlock);
        load_pair(x + i, a, b);
        a = one(a), b = one(b);
      },
      [&](int64_t i, int count) __attribute__((always_inline)) {
        return one(count == kLanes ? load_floats(x + i) : load_some(x + i, count, -INFINITY));
      });
}

// A list's exponentials as its sum was made of them: from these its gradient is one
// multiplication a column instead of a second exponential.
struct Kept {
  float* e;     // [n], e^((x - tops[i / kBlock]) / temperature), in load_pair's order
  float* tops;  // [blocks_of(n)]
};

template <bool kWeighted, class T>
static Normalizer<float> normalize_list(const RowView<T>& row, float inv_temperature, Kept kept) {
  if (row.n == 0) return empty_row<float>();
  RunningSum run;
  for (int64_t at = 0; at < row.n; at += kBlock) {
    const int64_t n = row.n - at < kBlock ? row.n - at : kBlock;
    gather(row, at, n, kept.e + at);
    add_block<true, kWeighted>(run, kept.e + at, n, inv_temperature, kept.e + at);
    kept.tops[at / kBlock] = run.top;
  }
  return finish(run);
}

// Double rows are for gradcheck and for oracles: right, not fast.
template <>
[[maybe_unused]] Normalizer<double> normalize(const RowView<double>& row, double inv_temperature) {
  if (row.n == 0) return empty_row<double>();
  const auto at = [&](int64_t i) { return row.x[row.columns ? row.columns[i] : i]; };
  double top = -INFINITY;
  for (int64_t i = 0; i < row.n; ++i) top = at(i) > top || at(i) != at(i) ? at(i) : top;
  double sum = 0, weighted = 0;
  for (int64_t i = 0; i < row.n; ++i) {
    const double d = (at(i) - top) * inv_temperature, e = std::exp(d);
    sum += e;
    if (e != 0) weighted += e * d;
  }
  const double log_sum = std::log(sum);
  return {top, log_sum, log_sum - weighted / sum};
}

// A row's normaliser, and what its sum left for its gradient.
enum class Left { nothing, powers, powers_kept, exponentials };

template <class T>
struct RowState {
  Normalizer<acc_t<T>> z;
  Left left = Left::nothing;
  Guess guess{};                // unless `nothing` or `exponentials`
  Kept kept{nullptr, nullptr};  // with powers_kept, e are the powers
};

// How many floats normalize_row may leave of n columns.
inline constexpr int64_t floats_of(int64_t n) { return n + blocks_of(n); }

// A row's state; of a guess only what its gradient takes is set.  `room` is for
// floats_of(row.n), or for row.n where the columns are side by side, or null.  Without kWeighted
// there is no entropy.
template <bool kWeighted, class T>
GENREC_INLINE void normalize_row(const RowView<T>& row, acc_t<T> inv_temperature, float* room,
                                 RowState<T>& state) {
  state.left = Left::nothing;
  if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
    state.kept = {room, room + row.n};
    if (row.columns == nullptr && row.n > 1) {
      const Guess g = room == nullptr ? guess_sum<false, kWeighted>(row, inv_temperature, nullptr)
                                      : guess_sum<true, kWeighted>(row, inv_temperature, room);
      if (g.good) {
        const Normalizer<float> z = finish(g, inv_temperature);
        // Field by field: what was just written in small parts is slow to be copied as a whole.
        state.z.top = z.top, state.z.log_sum = z.log_sum, state.z.entropy = z.entropy;
        state.guess.rate = g.rate, state.guess.guess = g.guess, state.guess.shift = g.shift;
        state.guess.sum = g.sum;
        state.left = room == nullptr ? Left::powers : Left::powers_kept;
        return;
      }
    } else if (row.columns != nullptr && room != nullptr) {
      state.z = normalize_list<kWeighted>(row, inv_temperature, state.kept);
      state.left = Left::exponentials;
      return;
    }
  }
  state.z = normalize(row, inv_temperature);
}

// log softmax of one logit.
template <class S>
GENREC_INLINE S log_softmax(S x, const Normalizer<S>& z, S inv_temperature) {
  return (x - z.top) * inv_temperature - z.log_sum;
}

// Above by rounding alone; NaN stays.
template <class S>
GENREC_INLINE S at_most_0(S logp) {
  return logp > 0 ? S(0) : logp;
}

// The gradient of  a * logp[token] + b * entropy  with respect to the logits is
//   (a (1[v = token] - p_v) - b p_v (log p_v + H)) / temperature.
// This writes all but the token's own column rightly; grad_token gives that one.
template <class S>
struct RowSlopes {
  S logp;     // a / temperature
  S entropy;  // b / temperature
};

template <class E, class G>
GENREC_INLINE void grad_block(const E* x, const Columns<G>& out, const Normalizer<float>& z,
                              float inv_temperature, RowSlopes<float> slope) {
  const vfloat top = splat(z.top), rate = splat(inv_temperature * kLog2e);
  const vfloat log2_sum = splat(z.log_sum * kLog2e), ln2 = splat(static_cast<float>(kLn2));
  const vfloat minus_a = splat(-slope.logp), minus_b = splat(-slope.entropy);
  const bool number = z.log_sum == z.log_sum && z.top < INFINITY && slope.logp == slope.logp &&
                      slope.entropy == slope.entropy;  // then no value is NaN
  const auto write = [&](const auto& one) __attribute__((always_inline)) {
    write_columns(
        out, number,
        [&](int64_t i, vfloat& a, vfloat& b) __attribute__((always_inline)) {
          prefetch(x + i + kBlock);
          if (sizeof(E) * kLanes >= 64) prefetch(x + i + kLanes + kBlock);
          load_pair(x + i, a, b);
          a = one(a), b = one(b);
        },
        [&](int64_t i, int count) __attribute__((always_inline)) {
          return one(count == kLanes ? load_floats(x + i) : load_some(x + i, count, -INFINITY));
        });
  };
  if (slope.entropy == 0) {
    write([&](vfloat v) __attribute__((always_inline)) {
      return minus_a * exp2_any((v - top) * rate - log2_sum);
    });
  } else {
    write([&](vfloat v) __attribute__((always_inline)) {
      const vfloat t = (v - top) * rate - log2_sum, held = hold(t);
      return exp2_held(t, held) * (minus_a + minus_b * (held * ln2 + z.entropy));
    });
  }
}

GENREC_INLINE void grad_block(const double* x, const Columns<double>& out,
                              const Normalizer<double>& z, double inv_temperature,
                              RowSlopes<double> slope) {
  for (int64_t i = 0; i < out.n; ++i) {
    const double logp = log_softmax(x[i], z, inv_temperature), p = std::exp(logp);
    const double spread = p == 0 || slope.entropy == 0 ? 0 : p * (logp + z.entropy);
    out.g[i] = -slope.logp * p - slope.entropy * spread;
  }
  if (out.own_at >= 0) out.g[out.own_at] = out.own;
}

// 1 - e^logp with all its digits, also where e^logp is near 1.
GENREC_INLINE double rest_of(double logp) { return -std::expm1(logp); }
GENREC_INLINE float rest_of(float logp) {
  // A few terms of its series, or a double's difference: several times as fast as expm1f.
  const double x = logp;
  return static_cast<float>(x > -1e-3 ? -x * (1 + x * (0.5 + x / 6)) : 1 - std::exp(x));
}

template <class S>
GENREC_INLINE S grad_token(S logp, const Normalizer<S>& z, RowSlopes<S> slope) {
  if (slope.entropy == 0) return slope.logp * rest_of(logp);
  const S p = std::exp(logp), spread = p == 0 ? S(0) : p * (logp + z.entropy);
  return slope.logp * rest_of(logp) - slope.entropy * spread;
}

// The gradient -a p of a row's n columns from what normalize kept of them.
template <class G>
GENREC_INLINE void grad_kept(Kept kept, int64_t n, const Normalizer<float>& z,
                             float inv_temperature, float a, G* g) {
  const float scale = -a * std::exp(-z.log_sum);
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t last = n - at < kBlock ? n : at + kBlock;
    const float top = kept.tops[at / kBlock];
    const float factor = top == z.top ? scale : scale * std::exp((top - z.top) * inv_temperature);
    scale_kept(kept.e + at, Columns<G>{g + at, last - at, -1, 0, false}, factor);
  }
}

template <class T>
GENREC_INLINE void zero(T* g, int64_t n) {
  std::memset(static_cast<void*>(g), 0, sizeof(T) * static_cast<size_t>(n));
}

// Where a gradient goes: a row of V elements.  `blank`: the memory is zero
// already, and what lies outside the support is left untouched.
template <class T>
struct GradRow {
  T* g;
  int64_t V;
  bool blank;
  bool streamed;
};

// The gradient of the token's own column, which is not made like the others'; at -1 of none.
template <class S>
struct OwnColumn {
  int64_t at;
  S value;
};

template <class T>
GENREC_INLINE void zero(const GradRow<T>& out) {
  if (!out.blank) zero(out.g, out.V);
}

// Writes the gradient of a whole row: by `slope` on the row's own columns, which
// start at `first` where they are a range, `own` on the token's, and 0 elsewhere; that by the
// entropy only where nothing is left of the row's sum.  The gradient may take the logits' own
// memory: what a range still needs is never behind the writer, and lists of columns go
// through a buffer.
template <class T>
static void grad_row(const RowView<T>& row, int64_t first, const GradRow<T>& out,
                     const RowState<T>& state, acc_t<T> inv_temperature, RowSlopes<acc_t<T>> slope,
                     OwnColumn<acc_t<T>> own) {
  using S = acc_t<T>;
  if (row.columns != nullptr) {
    S* values = static_cast<S*>(std::malloc(sizeof(S) * static_cast<size_t>(row.n + kLanes)));
    if (state.left == Left::exponentials) {
      if constexpr (sizeof(S) == sizeof(float))
        grad_kept(state.kept, row.n, state.z, inv_temperature, slope.logp, values);
    } else {
      for (int64_t i = 0; i < row.n; ++i) values[i] = to_float(row.x[row.columns[i]]);
      grad_block(values, Columns<S>{values, row.n, -1, 0, false}, state.z, inv_temperature, slope);
    }
    zero(out);
    for (int64_t i = 0; i < row.n; ++i) from_float(out.g + row.columns[i], values[i]);
    std::free(values);
    if (own.at >= 0) from_float(out.g + own.at, own.value);
    return;
  }
  const int64_t last = first + row.n;
  if (!out.blank) zero(out.g, first), zero(out.g + last, out.V - last);
  const Columns<T> columns{out.g + first, row.n, own.at < 0 ? -1 : own.at - first, own.value,
                           out.streamed};
  if constexpr (sizeof(S) == sizeof(float)) {
    if (state.left == Left::powers || state.left == Left::powers_kept) {
      const float factor = static_cast<float>(-slope.logp / state.guess.sum);
      return state.left == Left::powers ? scale_powers(row.x, columns, state.guess, factor)
                                        : scale_kept(state.kept.e, columns, factor);
    }
  }
  grad_block(row.x, columns, state.z, inv_temperature, slope);
}

}  // namespace genrec::GENREC_ISA
