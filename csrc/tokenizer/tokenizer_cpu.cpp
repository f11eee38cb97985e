// CPU kernels of the tokenizer family.  Compiled once an instruction set, each time
// into its own namespace; torch-free.
//
// Nearest codewords are sought in f32, a tile of rows against a few codewords at a
// time; nearest.h says how the codes are those of float64 nevertheless.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/vec.h"
#include "tokenizer/kernels.h"
#include "tokenizer/nearest.h"

namespace genrec::GENREC_ISA {
namespace {

using namespace genrec::tokenizer;

// ---- doubles as the definition has them ----

using vdouble = double __attribute__((vector_size(kLanes * 4)));
inline constexpr int kDoubles = kLanes / 2;

// Vectors of rows in a tile: with the block's six codewords they fill the registers.
inline constexpr int kRowVectors = kLanes == 16 ? 4 : 2;
inline constexpr int kRows = kRowVectors * kLanes;
inline constexpr int kRowDoubles = kRows / kDoubles;

GENREC_INLINE vdouble load_doubles(const double* p) {
  vdouble v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
GENREC_INLINE void store_doubles(double* p, vdouble v) { std::memcpy(p, &v, sizeof v); }

// As many floats as a vector has doubles.
using vfloats = float __attribute__((vector_size(kLanes * 2)));
GENREC_INLINE vdouble load_doubles(const float* p) {
  vfloats v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vdouble);
}
GENREC_INLINE void store_doubles(float* p, vdouble v) {
  const vfloats f = __builtin_convertvector(v, vfloats);
  std::memcpy(p, &f, sizeof f);
}
GENREC_INLINE vdouble splat_double(double x) { return x - vdouble{}; }

// A product that is rounded before it is added to anything: contracted to an FMA it
// would differ from the definition in its last bit.
template <class V>
GENREC_INLINE V rounded(V product) {
#if defined(__x86_64__) || defined(_M_X64)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

// |r - e|^2, summed in the order of the dimensions.
template <class S>
double direct_distance(const double* r, const S* e, int64_t D) {
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) {
    const double difference = r[d] - static_cast<double>(e[d]);
    sum += rounded(difference * difference);
  }
  return sum;
}

// The first of the nearest; NaN and infinite distances are nearer than nothing.
template <class S>
int64_t nearest_of_all(const double* r, const S* codebook, int64_t K, int64_t D) {
  double least = INFINITY;
  int64_t nearest = 0;
  for (int64_t k = 0; k < K; ++k) {
    const double distance = direct_distance(r, codebook + k * D, D);
    if (distance < least) least = distance, nearest = k;
  }
  return nearest;
}

// ---- a tile of rows ----

// Everything lies by dimension, so that a vector holds the same dimension of several rows.
class Tile {
 public:
  explicit Tile(int64_t D)
      : memory_(std::aligned_alloc(64, bytes(D))),
        residual(static_cast<double*>(memory_)),
        norms(residual + D * kRows),
        row(norms + kRows),
        rounded_residual(reinterpret_cast<float*>(row + (D + 7) / 8 * 8)),
        codewords(rounded_residual + D * kRows) {}
  Tile(const Tile&) = delete;
  Tile& operator=(const Tile&) = delete;
  ~Tile() { std::free(memory_); }

 private:
  static size_t bytes(int64_t D) {
    const auto n = static_cast<size_t>(D);
    return (sizeof(double) * (2 * n * kRows + kRows + (n + 7) / 8 * 8) + sizeof(float) * n * kRows +
            63) /
           64 * 64;
  }
  void* memory_;

 public:
  double* residual;         // [D, kRows]
  double* norms;            // [kRows]: squared
  double* row;              // [D]: one row of the residual
  float* rounded_residual;  // [D, kRows]
  void* codewords;          // S [D, kRows]
};

template <class S>
void load_tile(const S* x, int64_t rows, int64_t D, Tile& tile) {
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t d = 0; d < D; ++d)
      tile.residual[d * kRows + i] = i < rows ? static_cast<double>(x[i * D + d]) : 0;
}

// Leaves the residual's f32 form and norms; subtracts the chosen codewords before,
// where there are any.
template <class S, bool kSubtract>
void settle(Tile& tile, int64_t D) {
  vdouble sums[kRowDoubles] = {};
  const S* codewords = static_cast<const S*>(tile.codewords);
  for (int64_t d = 0; d < D; ++d)
    for (int v = 0; v < kRowDoubles; ++v) {
      const int64_t at = d * kRows + v * kDoubles;
      vdouble r = load_doubles(tile.residual + at);
      if constexpr (kSubtract) {
        r -= load_doubles(codewords + at);
        store_doubles(tile.residual + at, r);
      }
      if constexpr (sizeof(S) == sizeof(float)) store_doubles(tile.rounded_residual + at, r);
      sums[v] += rounded(r * r);
    }
  for (int v = 0; v < kRowDoubles; ++v) store_doubles(tile.norms + v * kDoubles, sums[v]);
}

// ---- nearest codewords, f32 ----

// |e|^2 / 2 - r.e of a block of codewords and kVectors vectors of rows.
template <int kVectors>
struct Scores {
  vfloat of[kCodewordBlock][kVectors];
};

template <int kVectors>
GENREC_INLINE Scores<kVectors> block_scores(const float* r, const float* negated,
                                            const float* half_norms, int64_t D) {
  Scores<kVectors> s;
#pragma GCC unroll 6
  for (int j = 0; j < kCodewordBlock; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) s.of[j][v] = splat(half_norms[j]);
  for (int64_t d = 0; d < D; ++d) {
    vfloat x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load(r + d * kRows + v * kLanes);
#pragma GCC unroll 6
    for (int j = 0; j < kCodewordBlock; ++j) {
      const vfloat e = splat(negated[j * D + d]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) s.of[j][v] += e * x[v];
    }
  }
  return s;
}

struct Ranking {
  float best[kRows], second[kRows];
  int32_t index[kRows];
};

void rank(const float* r, const float* negated, const float* half_norms, int64_t Kp, int64_t D,
          Ranking& out) {
  vfloat best[kRowVectors], second[kRowVectors];
  vint index[kRowVectors];
  for (int v = 0; v < kRowVectors; ++v) {
    best[v] = second[v] = splat(INFINITY);
    index[v] = vint{};
  }
  for (int64_t k = 0; k < Kp; k += kCodewordBlock) {
    const Scores<kRowVectors> s = block_scores<kRowVectors>(r, negated + k * D, half_norms + k, D);
#pragma GCC unroll 6
    for (int j = 0; j < kCodewordBlock; ++j) {
      const vint here = vint{} + static_cast<int32_t>(k + j);
#pragma GCC unroll 4
      for (int v = 0; v < kRowVectors; ++v) {
        const vfloat score = s.of[j][v];
        second[v] = vmin(second[v], vmax(best[v], score));
        index[v] = score < best[v] ? here : index[v];
        best[v] = vmin(score, best[v]);  // in this order a NaN is passed over
      }
    }
  }
  for (int v = 0; v < kRowVectors; ++v) {
    store(out.best + v * kLanes, best[v]);
    store(out.second + v * kLanes, second[v]);
    std::memcpy(out.index + v * kLanes, &index[v], sizeof(vint));
  }
}

// Codes of a tile's first `rows` rows.
void nearest_codes(const QuantizeArgs& a, int64_t level, int64_t rows, Tile& tile, int64_t* codes) {
  const int64_t D = a.D, K = a.K, Kp = padded(a.K, kCodewordBlock);
  const float* codebook = static_cast<const float*>(a.codebooks) + level * K * D;
  const float* negated = a.negated + level * Kp * D;
  const float* half_norms = a.half_norms + level * Kp;
  Ranking ranking;
  rank(tile.rounded_residual, negated, half_norms, Kp, D, ranking);

  float limits[kRows];  // -inf where the ranking stands
  bool close[kRowVectors] = {};
  for (int i = 0; i < kRows; ++i) {
    limits[i] = -INFINITY;
    codes[i] = ranking.index[i];
    if (i >= rows) continue;
    const double bound = score_bound(std::sqrt(tile.norms[i]), a.largest[level], D);
    if (!(bound < kMostBound) || !(ranking.best[i] < INFINITY) || D > kMostDims) [[unlikely]] {
      for (int64_t d = 0; d < D; ++d) tile.row[d] = tile.residual[d * kRows + i];
      codes[i] = nearest_of_all(tile.row, codebook, K, D);
      continue;
    }
    const double limit = static_cast<double>(ranking.best[i]) + 2 * bound;
    if (static_cast<double>(ranking.second[i]) > limit) [[likely]]
      continue;
    // To f32 upwards.
    limits[i] = std::nextafterf(static_cast<float>(limit), INFINITY);
    close[i / kLanes] = true;
  }

  for (int v = 0; v < kRowVectors; ++v) {
    if (!close[v]) [[likely]]
      continue;
    double least[kLanes];
    for (double& distance : least) distance = INFINITY;
    const vfloat limit = load(limits + v * kLanes);
    const float* r = tile.rounded_residual + v * kLanes;
    for (int64_t k = 0; k < Kp; k += kCodewordBlock) {
      const Scores<1> s = block_scores<1>(r, negated + k * D, half_norms + k, D);
      for (int j = 0; j < kCodewordBlock; ++j) {
        uint32_t mask = lanes_of(s.of[j][0] <= limit);
        for (; mask != 0; mask &= mask - 1) {
          const int lane = __builtin_ctz(mask);
          const int row = v * kLanes + lane;
          for (int64_t d = 0; d < D; ++d) tile.row[d] = tile.residual[d * kRows + row];
          const double distance = direct_distance(tile.row, codebook + (k + j) * D, D);
          if (distance < least[lane]) least[lane] = distance, codes[row] = k + j;
        }
      }
    }
  }
}

// ---- nearest codewords, f64: right, not fast ----

void nearest_codes_double(const QuantizeArgs& a, int64_t level, Tile& tile, int64_t* codes) {
  const double* codebook = static_cast<const double*>(a.codebooks) + level * a.K * a.D;
  using vlong = int64_t __attribute__((vector_size(kLanes * 4)));
  for (int v = 0; v < kRowDoubles; ++v) {
    const double* r = tile.residual + v * kDoubles;
    vdouble least = splat_double(INFINITY);
    vlong nearest{};
    for (int64_t k = 0; k < a.K; ++k) {
      vdouble sum{};
      for (int64_t d = 0; d < a.D; ++d) {
        const vdouble difference = load_doubles(r + d * kRows) - codebook[k * a.D + d];
        sum += rounded(difference * difference);
      }
      nearest = sum < least ? vlong{} + k : nearest;
      least = sum < least ? sum : least;
    }
    std::memcpy(codes + v * kDoubles, &nearest, sizeof nearest);
  }
}

// ---- all levels ----

template <class S>
void quantize(const QuantizeArgs& a, int64_t first, int64_t last) {
  const int64_t D = a.D, K = a.K, L = a.L;
  const S* x = static_cast<const S*>(a.x);
  const S* codebooks = static_cast<const S*>(a.codebooks);
  S* quantized = static_cast<S*>(a.quantized);
  S* squared_error = static_cast<S*>(a.squared_error);
  S* residuals = static_cast<S*>(a.residuals);
  Tile tile(D);
  int64_t codes[kRows];
  for (int64_t n = first; n < last; n += kRows) {
    const int64_t rows = last - n < kRows ? last - n : kRows;
    load_tile(x + n * D, rows, D, tile);
    settle<S, false>(tile, D);
    for (int64_t l = 0; l < L; ++l) {
      if (residuals != nullptr)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t d = 0; d < D; ++d)
            residuals[((n + i) * L + l) * D + d] = static_cast<S>(tile.residual[d * kRows + i]);
      if constexpr (sizeof(S) == sizeof(float)) {
        nearest_codes(a, l, rows, tile, codes);
      } else {
        nearest_codes_double(a, l, tile, codes);
      }
      S* chosen = static_cast<S*>(tile.codewords);
      for (int64_t i = 0; i < kRows; ++i) {
        const S* e = codebooks + (l * K + codes[i]) * D;
        for (int64_t d = 0; d < D; ++d) chosen[d * kRows + i] = e[d];
      }
      settle<S, true>(tile, D);
      for (int64_t i = 0; i < rows; ++i) {
        a.codes[(n + i) * L + l] = codes[i];
        squared_error[(n + i) * L + l] = static_cast<S>(tile.norms[i]);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < D; ++d) tile.row[d] = 0;
      for (int64_t l = 0; l < L; ++l) {
        const S* e = codebooks + (l * K + a.codes[(n + i) * L + l]) * D;
        for (int64_t d = 0; d < D; ++d) tile.row[d] += static_cast<double>(e[d]);
      }
      for (int64_t d = 0; d < D; ++d) quantized[(n + i) * D + d] = static_cast<S>(tile.row[d]);
    }
  }
}

void quantize_any(const QuantizeArgs& a, int64_t first, int64_t last) {
  if (a.dtype == DType::f64) return quantize<double>(a, first, last);
  quantize<float>(a, first, last);
}

void prepare(const QuantizeArgs& a) {
  const int64_t D = a.D, Kp = padded(a.K, kCodewordBlock);
  const float* codebooks = static_cast<const float*>(a.codebooks);
  for (int64_t l = 0; l < a.L; ++l) {
    double largest = 0;
    for (int64_t k = 0; k < Kp; ++k) {
      const float* e = codebooks + (l * a.K + k) * D;
      float* to = a.negated + (l * Kp + k) * D;
      double norm = k < a.K ? 0 : INFINITY;
      if (k < a.K)
        for (int64_t d = 0; d < D; ++d) norm += static_cast<double>(e[d]) * e[d];
      const bool finite = norm - norm == 0;
      for (int64_t d = 0; d < D; ++d) to[d] = finite ? -e[d] : 0.f;
      a.half_norms[l * Kp + k] = finite ? static_cast<float>(0.5 * norm) : INFINITY;
      largest = finite && norm > largest ? norm : largest;
    }
    a.largest[l] = std::sqrt(largest);
  }
}

// ---- balanced assignment ----

// Memory for a thread's rows of K, each padded to whole vectors.
class SinkhornRoom {
 public:
  explicit SinkhornRoom(const SinkhornArgs& a)
      : width((a.K + kLanes - 1) / kLanes * kLanes),
        memory_(static_cast<float*>(std::malloc(5 * sizeof(float) * static_cast<size_t>(width)))),
        y(memory_),
        potentials(y + width),
        factors(potentials + width),
        tops(factors + width),
        sums(tops + width) {
    for (int64_t k = 0; k < width; ++k) {
      potentials[k] = k < a.K ? a.potentials[k] : 0;
      factors[k] = k < a.K ? std::exp2(a.drift[k]) : 0;
    }
  }
  SinkhornRoom(const SinkhornRoom&) = delete;
  SinkhornRoom& operator=(const SinkhornRoom&) = delete;
  ~SinkhornRoom() { std::free(memory_); }

  int64_t width;

 private:
  float* memory_;

 public:
  float *y, *potentials, *factors, *tops, *sums;
};

// Leaves y = potential - cost, -inf in the padding, and returns its maximum.
float row_top(const float* cost, int64_t K, SinkhornRoom& room) {
  vfloat top0 = splat(-INFINITY), top1 = top0;
  int64_t k = 0;
  for (; k + 2 * kLanes <= K; k += 2 * kLanes) {
    const vfloat a = load(room.potentials + k) - load(cost + k);
    const vfloat b = load(room.potentials + k + kLanes) - load(cost + k + kLanes);
    store(room.y + k, a);
    store(room.y + k + kLanes, b);
    top0 = vmax(a, top0);
    top1 = vmax(b, top1);
  }
  for (; k < K; k += kLanes) {
    const int n = K - k < kLanes ? static_cast<int>(K - k) : kLanes;
    const vfloat a = load(room.potentials + k) - load_some(cost + k, n, INFINITY);
    store(room.y + k, a);
    top0 = vmax(a, top0);
  }
  return max_lanes(vmax(top0, top1));
}

// Exponents below this give 0: the plan's elements stay clear of subnormal numbers, which
// cost hundreds of cycles each.
constexpr float kLeastExponent = -100;

GENREC_INLINE vfloat exp2_or_zero(vfloat t) {
  return exp2_any(t < kLeastExponent ? splat(-INFINITY) : t);
}

// Turns y into exp((y - top) / epsilon) and returns its sum.
float row_exponentials(float top, float scale, SinkhornRoom& room) {
  vfloat sum{};
  for (int64_t k = 0; k < room.width; k += kLanes) {
    const vfloat e = exp2_or_zero((load(room.y + k) - top) * scale);
    store(room.y + k, e);
    sum += e;
  }
  return sum_lanes(sum);
}

// Writes a row's exponentials, over that of its top, where the plan will be, and
// returns their sum.
float renew_row(const SinkhornArgs& a, int64_t n, float scale, SinkhornRoom& room) {
  const float top = row_top(a.cost + n * a.K, a.K, room);
  const float total = row_exponentials(top, scale, room);
  std::memcpy(a.plan + n * a.K, room.y, sizeof(float) * static_cast<size_t>(a.K));
  return total;
}

// The same sum at the present potentials, from what renew_row wrote.
float row_sum(const float* row, int64_t K, const SinkhornRoom& room) {
  vfloat sum0{}, sum1{};
  int64_t k = 0;
  for (; k + 2 * kLanes <= K; k += 2 * kLanes) {
    sum0 += load(row + k) * load(room.factors + k);
    sum1 += load(row + k + kLanes) * load(room.factors + k + kLanes);
  }
  for (; k < K; k += kLanes) {
    const int n = K - k < kLanes ? static_cast<int>(K - k) : kLanes;
    sum0 += load_some(row + k, n, 0) * load(room.factors + k);
  }
  return sum_lanes(sum0 + sum1);
}

void add_row(const float* row, float weight, int64_t K, SinkhornRoom& room) {
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes)
    store(room.sums + k, load(room.sums + k) + load(row + k) * weight);
  if (k < K) {
    const vfloat r = load_some(row + k, static_cast<int>(K - k), 0);
    store(room.sums + k, load(room.sums + k) + r * weight);
  }
}

// Sums of the plan's columns by block of rows, each row normalised on the way.  Without
// kExact, a sum is short of the column's factor; with it, sums are over 2^top and taken on
// logarithms, as the whole of a column may be too small for float.
template <bool kExact>
void sinkhorn_blocks(const SinkhornArgs& a, int64_t first, int64_t last) {
  const int64_t K = a.K;
  const float scale = static_cast<float>(kLog2e / a.epsilon);
  SinkhornRoom room(a);
  for (int64_t block = first; block < last; ++block) {
    for (int64_t k = 0; k < room.width; ++k) room.tops[k] = kExact ? -FLT_MAX : 0, room.sums[k] = 0;
    const int64_t end = (block + 1) * a.block_rows < a.N ? (block + 1) * a.block_rows : a.N;
    for (int64_t n = block * a.block_rows; n < end; ++n) {
      if constexpr (kExact) {
        const float top = row_top(a.cost + n * K, K, room);
        vfloat sum{};
        for (int64_t k = 0; k < room.width; k += kLanes)
          sum += exp2_or_zero((load(room.y + k) - top) * scale);
        const float row = std::log2(sum_lanes(sum));
        for (int64_t k = 0; k < room.width; k += kLanes) {
          const vfloat t = (load(room.y + k) - top) * scale - row;
          const vfloat before = load(room.tops + k), so_far = load(room.sums + k);
          const vfloat high = vmax(t, before);
          const vfloat e = exp2_or_zero(vmin(t, before) - high);
          store(room.tops + k, high);
          store(room.sums + k, t > before ? so_far * e + 1.f : so_far + e);
        }
      } else {
        const float* row = a.plan + n * K;
        const float total = a.renew ? renew_row(a, n, scale, room) : row_sum(row, K, room);
        add_row(row, 1 / total, K, room);
      }
    }
    std::memcpy(a.tops + block * K, room.tops, sizeof(float) * static_cast<size_t>(K));
    std::memcpy(a.sums + block * K, room.sums, sizeof(float) * static_cast<size_t>(K));
  }
}

// How far, in powers of 2, a potential may move from where the rows' exponentials were
// taken.
constexpr float kFarthest = 10;

// Elements of the plan below 2^(kLeastExponent + 2 kFarthest) are lost where it is not
// summed on logarithms: less than N 2^-48 of a sum above this.
constexpr double kSmallSum = 0x1p-32;

// The next potentials; or nothing, where a column's sum has lost its digits.
Columns sinkhorn_columns(const SinkhornArgs& a, bool exact) {
  const double share = std::log2(static_cast<double>(a.N) / static_cast<double>(a.K));
  const double scale = kLog2e / a.epsilon;
  float farthest = exact ? INFINITY : 0;
  for (int write = 0; write < 2; ++write)
    for (int64_t k = 0; k < a.K; ++k) {
      double top = exact ? -INFINITY : a.drift[k], sum = 0;
      if (exact)
        for (int64_t b = 0; b < a.blocks; ++b) top = std::fmax(top, a.tops[b * a.K + k]);
      for (int64_t b = 0; b < a.blocks; ++b)
        sum += exact ? a.sums[b * a.K + k] * std::exp2(a.tops[b * a.K + k] - top)
                     : static_cast<double>(a.sums[b * a.K + k]);
      if (write == 0 && !exact && std::exp2(top) * sum < kSmallSum) return Columns::lost;
      if (write == 0) continue;
      const double step = share - top - std::log2(sum);
      a.potentials[k] += static_cast<float>(step / scale);
      a.drift[k] += static_cast<float>(step);
      if (!(std::fabs(a.drift[k]) <= farthest)) farthest = std::fabs(a.drift[k]);
    }
  if (farthest <= kFarthest) return Columns::near;
  for (int64_t k = 0; k < a.K; ++k) a.drift[k] = 0;
  return Columns::far;
}

void sinkhorn_plan(const SinkhornArgs& a, int64_t first, int64_t last) {
  const float scale = static_cast<float>(kLog2e / a.epsilon);
  SinkhornRoom room(a);
  for (int64_t n = first; n < last; ++n) {
    const float top = row_top(a.cost + n * a.K, a.K, room);
    const float inverse = 1 / row_exponentials(top, scale, room);
    for (int64_t k = 0; k < a.K; ++k) a.plan[n * a.K + k] = room.y[k] * inverse;
  }
}

}  // namespace

// Declared in tokenizer.cpp for each instruction set that was built.
extern const tokenizer::CpuKernels tokenizer_kernels;
const tokenizer::CpuKernels tokenizer_kernels{kRows,
                                              prepare,
                                              quantize_any,
                                              sinkhorn_blocks<false>,
                                              sinkhorn_blocks<true>,
                                              sinkhorn_columns,
                                              sinkhorn_plan};

}  // namespace genrec::GENREC_ISA
