// CUDA kernels of the tokenizer family.  Torch-free: raw pointers and a stream in,
// an error code out.
//
// Nearest codewords: a block keeps a tile of rows through all levels, and scores it
// against 64 codewords at a time in f32, as a matrix product would, but keeps only each
// row's best and second best; nearest.h says how the codes are those of float64
// nevertheless.  What the levels have left of a row is not stored: it is taken from
// the row and the codewords chosen so far, in double; of long rows a rounded copy is.
//
// Balanced assignment: two launches an iteration, rows' normalisers with columns' sums
// by block of rows, then the columns' potentials; on logarithms throughout.
//
// Every sum is folded in a fixed order, no index but the kernels' own is used, and
// nothing waits for the device, so every call can be captured in a graph.
#include <cfloat>

#include "common/row_cuda.cuh"
#include "tokenizer/kernels.h"
#include "tokenizer/nearest.h"

namespace genrec::tokenizer {
namespace {

using namespace genrec::cuda;

constexpr unsigned kAll = 0xffffffffu;

// ---- doubles as the definition has them ----

// What the levels before this one have left of a row's dimension.
template <class S>
__device__ __forceinline__ double left_over(const QuantizeArgs& a, int64_t n, int64_t d,
                                            int64_t level) {
  const S* codebooks = static_cast<const S*>(a.codebooks);
  double r = static_cast<double>(static_cast<const S*>(a.x)[n * a.D + d]);
  for (int64_t l = 0; l < level; ++l)
    r -= static_cast<double>(codebooks[(l * a.K + a.codes[n * a.L + l]) * a.D + d]);
  return r;
}

// |r - e|^2, summed in the order of the dimensions, each product rounded.  left(d) is
// what is left of the row.
template <class S, class Left>
__device__ __forceinline__ double direct_distance(const S* e, int64_t D, const Left& left) {
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) {
    const double difference = left(d) - static_cast<double>(e[d]);
    sum = __dadd_rn(sum, __dmul_rn(difference, difference));
  }
  return sum;
}

// The first of a codebook's nearest to a row among the codewords that may(k), found by a
// warp; 0 where no distance is finite.
template <class S, class Left, class May>
__device__ __forceinline__ int64_t nearest_direct(const QuantizeArgs& a, int64_t level,
                                                  const Left& left, const May& may) {
  const S* codebook = static_cast<const S*>(a.codebooks) + level * a.K * a.D;
  double least = INFINITY;
  long long nearest = 0;
  for (int64_t k = threadIdx.x % kWarp; k < a.K; k += kWarp) {
    if (!may(k)) continue;
    const double distance = direct_distance(codebook + k * a.D, a.D, left);
    if (distance < least) least = distance, nearest = k;
  }
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) {
    const double other = __shfl_xor_sync(kAll, least, width);
    const long long at = __shfl_xor_sync(kAll, nearest, width);
    if (other < least || (other == least && other < INFINITY && at < nearest))
      least = other, nearest = at;
  }
  return least < INFINITY ? nearest : 0;
}

// What is left of a row's dimension before `level`, with what is asked of it written.
template <class S>
__device__ __forceinline__ double settle(const QuantizeArgs& a, int64_t n, int64_t d,
                                         int64_t level) {
  const S* codebooks = static_cast<const S*>(a.codebooks);
  const double r = left_over<S>(a, n, d, level);
  if (level < a.L) {
    if (a.residuals != nullptr)
      static_cast<S*>(a.residuals)[(n * a.L + level) * a.D + d] = static_cast<S>(r);
    return r;
  }
  double total = 0;
  for (int64_t l = 0; l < a.L; ++l)
    total += static_cast<double>(codebooks[(l * a.K + a.codes[n * a.L + l]) * a.D + d]);
  static_cast<S*>(a.quantized)[n * a.D + d] = static_cast<S>(total);
  return r;
}

// ---- nearest codewords, f32 ----

constexpr int kQuantizeThreads = 128;
constexpr int kQuantizeWarps = kQuantizeThreads / kWarp;
constexpr int kGroup = 16;  // threads that share rows, each with codewords of its own
constexpr int kGroups = kQuantizeThreads / kGroup;
constexpr int kEach = 4;  // codewords a thread has at once
constexpr int kCodewords = kGroup * kEach;
// Dimensions that are in shared memory at once, in packs of four; rows there begin in
// different banks.
constexpr int kDims = 64, kPacks = kDims / 4, kPitch = kPacks + 1;

using Four = Pack<float>;

// |e|^2 / 2 of every codeword and of the padding, a warp each.
__global__ __launch_bounds__(kThreads) void half_norms(QuantizeArgs a, int64_t Kp) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t level = i / Kp, k = i % Kp;
  if (level >= a.L) return;
  double norm = 0;
  if (k < a.K) {
    const float* e = static_cast<const float*>(a.codebooks) + (level * a.K + k) * a.D;
    for (int64_t d = lane; d < a.D; d += kWarp) norm += static_cast<double>(e[d]) * e[d];
  }
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) norm += __shfl_xor_sync(kAll, norm, width);
  // A finite one stays finite in f32, so that the bound knows of it.
  const bool finite = k < a.K && norm - norm == 0;
  const double half = 0.5 * norm < 0x1p127 ? 0.5 * norm : 0x1p127;
  if (lane == 0) a.half_norms[i] = finite ? static_cast<float>(half) : INFINITY;
}

// The best and the second best of a row among the codewords seen so far.
struct Ranked {
  float best = INFINITY, second = INFINITY;
  int index = 0;
};

__device__ __forceinline__ void rank_one(Ranked& r, float score, int k) {
  r.second = fminf(r.second, fmaxf(r.best, score));
  r.index = score < r.best ? k : r.index;
  r.best = fminf(score, r.best);  // a NaN is passed over
}

__device__ __forceinline__ Ranked merge_group(Ranked r) {
#pragma unroll
  for (int width = kGroup / 2; width > 0; width /= 2) {
    const float best = __shfl_xor_sync(kAll, r.best, width);
    const float second = __shfl_xor_sync(kAll, r.second, width);
    const int index = __shfl_xor_sync(kAll, r.index, width);
    r.second = fminf(fmaxf(r.best, best), fminf(r.second, second));
    if (best < r.best) r.index = index;  // equals are compared once more
    r.best = fminf(r.best, best);
  }
  return r;
}

__device__ __forceinline__ float max_group(float x) {
#pragma unroll
  for (int width = kGroup / 2; width > 0; width /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, width));
  return x;
}

// Four of a codeword's dimensions from d; 0 beyond the last.
__device__ __forceinline__ Four load_four(const float* e, int64_t d, int64_t D, bool aligned) {
  if (aligned && d + 4 <= D) return load_pack(e + d);
  Four v;
#pragma unroll
  for (int j = 0; j < 4; ++j) v.v[j] = d + j < D ? e[d + j] : 0.f;
  return v;
}

// Rows are shared out as row = group + kGroups * i, codewords as k = thread + kGroup * j.
template <int kRowsAThread>
__global__ __launch_bounds__(kQuantizeThreads, 4) void quantize_rows(QuantizeArgs a, int64_t Kp) {
  constexpr int kRows = kGroups * kRowsAThread;
  GENREC_SHARED(Four, rows, kRows * kPitch);
  GENREC_SHARED(Four, codewords, kCodewords * kPitch);
  GENREC_SHARED(double, norms, kRows);
  GENREC_SHARED(float, limits, kRows);  // scores up to this are looked at again; -inf: none
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = threadIdx.x / kGroup, thread = threadIdx.x % kGroup;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows, D = a.D, K = a.K;
  // A row stays in shared memory for a whole level, or lies where, after the last, the sum
  // of its codewords will be.
  const bool resident = D <= kDims;
  float* kept = static_cast<float*>(a.quantized);
  const bool aligned = D % 4 == 0 && before_boundary(static_cast<const float*>(a.codebooks)) == 0;

  // Shared memory of codewords, for squares of what is left of the rows.
  constexpr int kSquarePitch = kWarp + 1;
  static_assert(kRows * kSquarePitch * sizeof(double) <= sizeof(Four) * kCodewords * kPitch);
  double* squares = reinterpret_cast<double*>(codewords);

  const auto keep_at = [&](int row, int64_t d, float x) {
    rows[row * kPitch + d / 4].v[d % 4] = x;
  };

  for (int64_t level = 0;; ++level) {
    // Squares are summed in the order of the dimensions, by a thread a row.
    double norm = 0;
    for (int64_t d0 = 0; d0 < D; d0 += kWarp) {
      __syncthreads();  // what lay here has been read
      const int64_t d = d0 + lane;
      for (int row = warp; row < kRows; row += kQuantizeWarps) {
        const bool there = first + row < a.N && d < D;
        const double r = there ? settle<float>(a, first + row, d, level) : 0;
        squares[row * kSquarePitch + lane] = __dmul_rn(r, r);
        if (resident)
          keep_at(row, d, static_cast<float>(r));
        else if (there && level < a.L)
          kept[(first + row) * D + d] = static_cast<float>(r);
      }
      __syncthreads();
      if (threadIdx.x < kRows)
        for (int i = 0; i < kWarp && d0 + i < D; ++i)
          norm = __dadd_rn(norm, squares[threadIdx.x * kSquarePitch + i]);
    }
    if (threadIdx.x < kRows) {
      norms[threadIdx.x] = norm;
      if (level > 0 && first + threadIdx.x < a.N)
        static_cast<float*>(a.squared_error)[(first + threadIdx.x) * a.L + level - 1] =
            static_cast<float>(norm);
    }
    if (level == a.L) return;

    const float* codebook = static_cast<const float*>(a.codebooks) + level * K * D;
    const float* halves = a.half_norms + level * Kp;
    Ranked ranked[kRowsAThread];
    float largest = 0;  // half norm
    for (int64_t k0 = 0; k0 < Kp; k0 += kCodewords) {
      float products[kRowsAThread][kEach] = {};
      for (int64_t d0 = 0; d0 < D; d0 += kDims) {
        const int packs = static_cast<int>(((D - d0 < kDims ? D - d0 : kDims) + 3) / 4);
        __syncthreads();  // what lay here has been read
        for (int i = threadIdx.x; i < kCodewords * kPacks; i += kQuantizeThreads) {
          const int k = i / kPacks, p = i % kPacks;
          if (p >= packs) continue;
          // One that is not finite must not make its row's scores NaN.
          Four e{};
          if (halves[k0 + k] < INFINITY)
            e = load_four(codebook + (k0 + k) * D, d0 + 4 * p, D, aligned);
          codewords[k * kPitch + p] = e;
        }
        if (!resident)
          for (int row = warp; row < kRows; row += kQuantizeWarps)
            for (int64_t d = lane; d < 4 * packs; d += kWarp) {
              const bool there = first + row < a.N && d0 + d < D;
              keep_at(row, d, there ? kept[(first + row) * D + d0 + d] : 0.f);
            }
        __syncthreads();
        for (int p = 0; p < packs; ++p) {
          Four e[kEach];
#pragma unroll
          for (int j = 0; j < kEach; ++j) e[j] = codewords[(thread + kGroup * j) * kPitch + p];
#pragma unroll
          for (int i = 0; i < kRowsAThread; ++i) {
            const Four r = rows[(group + kGroups * i) * kPitch + p];
#pragma unroll
            for (int c = 0; c < 4; ++c)
#pragma unroll
              for (int j = 0; j < kEach; ++j) products[i][j] += r.v[c] * e[j].v[c];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int k = static_cast<int>(k0) + thread + kGroup * j;
        const float half_norm = halves[k];
        if (half_norm < INFINITY) largest = fmaxf(largest, half_norm);
#pragma unroll
        for (int i = 0; i < kRowsAThread; ++i) rank_one(ranked[i], half_norm - products[i][j], k);
      }
    }
    __syncthreads();  // norms are there, also where there are no dimensions

    // A half norm below f32's normal numbers may have lost up to 2^-150.
    const double longest = sqrt(2 * static_cast<double>(max_group(largest)) + 0x1p-149);
#pragma unroll
    for (int i = 0; i < kRowsAThread; ++i) {
      const Ranked r = merge_group(ranked[i]);
      const int row = group + kGroups * i;
      const int64_t n = first + row;
      if (thread != i % kGroup) continue;
      float limit = -INFINITY;
      if (n < a.N) {
        const double bound = score_bound(sqrt(norms[row]), longest, D);
        const double reach = static_cast<double>(r.best) + 2 * bound;
        if (!(bound < kMostBound) || !(r.best < INFINITY) || D > kMostDims)
          limit = INFINITY;
        else if (!(static_cast<double>(r.second) > reach))
          limit = nextafterf(static_cast<float>(reach), INFINITY);  // upwards
        a.codes[n * a.L + level] = r.index;
      }
      limits[row] = limit;
    }
    __syncthreads();

    // Close calls, a warp a row.  What is left of it lies in the warp's part of the
    // codewords' memory, where it fits.
    constexpr int kHeld =
        static_cast<int>(sizeof(Four) / sizeof(double)) * kCodewords * kPitch / kQuantizeWarps;
    double* held = squares + warp * kHeld;
    for (int row = warp; row < kRows; row += kQuantizeWarps) {
      const float limit = limits[row];
      if (limit == -INFINITY) continue;
      const int64_t n = first + row;
      __syncwarp();  // the row before has been read
      for (int64_t d = lane; d < D && D <= kHeld; d += kWarp)
        held[d] = left_over<float>(a, n, d, level);
      __syncwarp();
      const auto left = [&](int64_t d) {
        return D <= kHeld ? held[d] : left_over<float>(a, n, d, level);
      };
      const int64_t code = nearest_direct<float>(a, level, left, [&](int64_t k) {
        if (limit == INFINITY) return true;
        float product = 0;
        for (int64_t d = 0; d < D; d += 4) {
          const Four e = load_four(codebook + k * D, d, D, aligned);
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (d + c < D) product += e.v[c] * static_cast<float>(left(d + c));
        }
        return halves[k] - product <= limit;
      });
      if (lane == 0) a.codes[n * a.L + level] = code;
    }
    __syncthreads();  // the codes are there, and the rows have been read
  }
}

// ---- nearest codewords, f64: right, not fast; a warp a row ----

__global__ __launch_bounds__(kQuantizeThreads) void quantize_doubles(QuantizeArgs a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kQuantizeWarps + threadIdx.x / kWarp;
  if (n >= a.N) return;
  const int lane = threadIdx.x % kWarp;
  for (int64_t level = 0;; ++level) {
    double norm = 0;  // summed in the order of the dimensions
    for (int64_t d0 = 0; d0 < a.D; d0 += kWarp) {
      const double r = d0 + lane < a.D ? settle<double>(a, n, d0 + lane, level) : 0;
      const double square = __dmul_rn(r, r);
      for (int i = 0; i < kWarp && d0 + i < a.D; ++i)
        norm = __dadd_rn(norm, __shfl_sync(kAll, square, i));
    }
    if (level > 0 && lane == 0) static_cast<double*>(a.squared_error)[n * a.L + level - 1] = norm;
    if (level == a.L) return;
    const int64_t code = nearest_direct<double>(
        a, level, [&](int64_t d) { return left_over<double>(a, n, d, level); },
        [](int64_t) { return true; });
    __syncwarp();  // every lane has read the codes before
    if (lane == 0) a.codes[n * a.L + level] = code;
    __syncwarp();
  }
}

int quantize(const QuantizeArgs& a, void* stream) {
  const auto blocks = [](int64_t n, int64_t each) { return (n + each - 1) / each; };
  Launch how{0, kQuantizeThreads};
  how.stream = stream;
  if (a.dtype == DType::f64) {
    how.blocks = blocks(a.N, kQuantizeWarps);
    return launch(quantize_doubles, how, a);
  }
  const int64_t Kp = padded(a.K, kCodewords);
  Launch before{blocks(a.L * Kp, kThreads / kWarp), kThreads};
  before.stream = stream;
  const int code = launch(half_norms, before, a, Kp);
  if (code != static_cast<int>(cudaSuccess)) return code;
  // Tiles as large as leave every processor two blocks.
  constexpr int kLarge = 8, kSmall = 2;
  const int64_t wanted = 2 * device_limits().multiprocessors;
  const bool large = blocks(a.N, kGroups * kLarge) >= wanted;
  how.blocks = blocks(a.N, kGroups * (large ? kLarge : kSmall));
  return launch(large ? quantize_rows<kLarge> : quantize_rows<kSmall>, how, a, Kp);
}

// ---- balanced assignment ----

constexpr int kWarps = kThreads / kWarp;
constexpr int kChunk = 32;  // rows whose normalisers are held at once

// Where a column of a block of rows begins: below every exponent.
constexpr float kNoTop = -FLT_MAX;

__device__ __forceinline__ float sinkhorn_scale(const SinkhornArgs& a) {
  return static_cast<float>(kLog2e / a.epsilon);
}

// A row's largest potential - cost, and log2 of its sum of exp((potential - cost - top) /
// epsilon): apart, since together the digits of the sum would be lost.
struct Normaliser {
  float top, log_sum;
};

// By a warp.
__device__ __forceinline__ Normaliser row_normaliser(const SinkhornArgs& a, int64_t n,
                                                     float scale) {
  const int lane = threadIdx.x % kWarp;
  const float* cost = a.cost + n * a.K;
  float top = -INFINITY;
  for (int64_t k = lane; k < a.K; k += kWarp) top = fmaxf(top, a.potentials[k] - cost[k]);
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2)
    top = fmaxf(top, __shfl_xor_sync(kAll, top, width));
  float sum = 0;
  for (int64_t k = lane; k < a.K; k += kWarp)
    sum += power_of_two((a.potentials[k] - cost[k] - top) * scale);
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) sum += __shfl_xor_sync(kAll, sum, width);
  return {top, log2f(sum)};
}

__global__ __launch_bounds__(kThreads) void clear_potentials(SinkhornArgs a) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k < a.K) a.potentials[k] = 0;
}

// A block of rows: each row's normaliser, then what its columns sum to, over 2^top.
__global__ __launch_bounds__(kThreads) void sum_columns(SinkhornArgs a) {
  GENREC_SHARED(Normaliser, normalisers, kChunk);
  const float scale = sinkhorn_scale(a);
  const int64_t block = blockIdx.x, begin = block * a.block_rows;
  const int64_t end = begin + a.block_rows < a.N ? begin + a.block_rows : a.N;
  float* tops = a.tops + block * a.K;
  float* sums = a.sums + block * a.K;
  for (int64_t from = begin; from < end; from += kChunk) {
    const int rows = static_cast<int>(end - from < kChunk ? end - from : kChunk);
    for (int i = threadIdx.x / kWarp; i < rows; i += kWarps) {
      const Normaliser normaliser = row_normaliser(a, from + i, scale);
      if (threadIdx.x % kWarp == 0) normalisers[i] = normaliser;
    }
    __syncthreads();
    for (int64_t k = threadIdx.x; k < a.K; k += kThreads) {
      const float potential = a.potentials[k];
      float top = from == begin ? kNoTop : tops[k], sum = from == begin ? 0 : sums[k];
      for (int i = 0; i < rows; ++i) {
        const float y = potential - a.cost[(from + i) * a.K + k];
        const float t = (y - normalisers[i].top) * scale - normalisers[i].log_sum;
        const float high = t > top ? t : top;
        const float e = power_of_two((t > top ? top : t) - high);
        sum = t > top ? sum * e + 1 : sum + e;
        top = high;
      }
      tops[k] = top;
      sums[k] = sum;
    }
    __syncthreads();
  }
}

constexpr int kColumnThreads = 1024, kColumnWarps = kColumnThreads / kWarp;

// The next potentials: a block has 32 columns, each warp every 32nd block of rows.
__global__ __launch_bounds__(kColumnThreads) void set_potentials(SinkhornArgs a) {
  GENREC_SHARED(float, part_tops, kColumnThreads);
  GENREC_SHARED(double, part_sums, kColumnThreads);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float top = -INFINITY;
  double sum = 0;
  if (k < a.K) {
    for (int64_t b = warp; b < a.blocks; b += kColumnWarps) top = fmaxf(top, a.tops[b * a.K + k]);
    for (int64_t b = warp; b < a.blocks; b += kColumnWarps)
      sum += static_cast<double>(a.sums[b * a.K + k] * power_of_two(a.tops[b * a.K + k] - top));
  }
  part_tops[threadIdx.x] = top;
  part_sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || k >= a.K) return;
  for (int i = 1; i < kColumnWarps; ++i) top = fmaxf(top, part_tops[i * kWarp + lane]);
  sum = 0;
  for (int i = 0; i < kColumnWarps; ++i)
    sum += part_sums[i * kWarp + lane] *
           static_cast<double>(power_of_two(part_tops[i * kWarp + lane] - top));
  const double share = log2(static_cast<double>(a.N) / static_cast<double>(a.K));
  const double step = share - static_cast<double>(top) - log2(sum);
  a.potentials[k] += static_cast<float>(step * a.epsilon / kLog2e);
}

__global__ __launch_bounds__(kThreads) void write_plan(SinkhornArgs a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (n >= a.N) return;
  const float scale = sinkhorn_scale(a);
  const Normaliser row = row_normaliser(a, n, scale);
  for (int64_t k = threadIdx.x % kWarp; k < a.K; k += kWarp) {
    const float y = a.potentials[k] - a.cost[n * a.K + k];
    a.plan[n * a.K + k] = power_of_two((y - row.top) * scale - row.log_sum);
  }
}

int sinkhorn(const SinkhornArgs& a, int64_t iterations, void* stream) {
  const auto with = [&](int64_t blocks, int threads = kThreads) {
    Launch how{blocks, threads};
    how.stream = stream;
    return how;
  };
  int code = launch(clear_potentials, with((a.K + kThreads - 1) / kThreads), a);
  for (int64_t i = 0; i < iterations && code == static_cast<int>(cudaSuccess); ++i) {
    code = launch(sum_columns, with(a.blocks), a);
    if (code == static_cast<int>(cudaSuccess))
      code = launch(set_potentials, with((a.K + kWarp - 1) / kWarp, kColumnThreads), a);
  }
  if (code != static_cast<int>(cudaSuccess)) return code;
  return launch(write_plan, with((a.N + kWarps - 1) / kWarps), a);
}

}  // namespace

// Declared in tokenizer.cpp.
extern const CudaKernels tokenizer_cuda_kernels;
const CudaKernels tokenizer_cuda_kernels{kCodewords, quantize, sinkhorn};

}  // namespace genrec::tokenizer
