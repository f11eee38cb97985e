// What tokenizer.cpp hands to the tokenizer kernels: plain pointers and numbers.
// Torch-free.
//
// Shapes: N vectors of D dimensions, L codebooks of K codewords.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/portable.h"

namespace genrec::tokenizer {

// Codewords that the CPU's kernels compare with a row at once; codebooks are padded to it.
inline constexpr int64_t kCodewordBlock = 6;

GENREC_HD int64_t padded(int64_t K, int64_t block) { return (K + block - 1) / block * block; }

// Residuals and distances are double, whatever S is: the codes are those of the
// definition in float64.
struct QuantizeArgs {
  DType dtype = DType::f32;  // S: f32 or f64
  int64_t N = 0, D = 0, K = 0, L = 0;
  const void* x = nullptr;          // S [N, D]
  const void* codebooks = nullptr;  // S [L, K, D]
  int64_t* codes = nullptr;         // [N, L]
  void* quantized = nullptr;        // S [N, D]
  void* squared_error = nullptr;    // S [N, L]
  void* residuals = nullptr;        // S [N, L, D], what each level quantizes; or null

  // f32 alone, filled from the codebooks before anything else.  A codeword that is not
  // finite, or only padding, has an infinite norm.
  float* half_norms = nullptr;  // [L, padded(K)]: |e|^2 / 2
  float* negated = nullptr;     // CPU: [L, padded(K), D]: -e, or 0 where the norm is infinite
  double* largest = nullptr;    // CPU: [L]: the largest |e|
};

struct SinkhornArgs {
  int64_t N = 0, K = 0;
  const float* cost = nullptr;  // [N, K]
  double epsilon = 1;
  float* potentials = nullptr;  // [K], in units of the cost
  int64_t block_rows = 1;       // rows whose column sums are taken together
  int64_t blocks = 0;
  float* tops = nullptr;  // [blocks, K]: largest log2 of the plan in a block's column
  float* sums = nullptr;  // [blocks, K]: sum of the plan there, over 2^top
  float* plan = nullptr;  // [N, K]

  // CPU: `plan` holds, until the end, its exponentials, rows not normalised.
  float* drift = nullptr;  // [K]: log2 of how far potentials are from those that `plan` holds
  bool renew = true;       // whether `plan` is to be made anew
};

// What became of the potentials: they moved a little, or too far for the exponentials
// that are held; or they did not move, as a sum has too few digits.
enum class Columns { near, far, lost };

// One instruction set's kernels.
struct CpuKernels {
  int64_t rows;  // that are quantized together
  void (*prepare)(const QuantizeArgs&);
  void (*quantize)(const QuantizeArgs&, int64_t first, int64_t last);  // vectors
  // Columns' sums of blocks, as they are or on logarithms; then the potentials.
  void (*sinkhorn_blocks)(const SinkhornArgs&, int64_t first, int64_t last);
  void (*sinkhorn_exact_blocks)(const SinkhornArgs&, int64_t first, int64_t last);
  Columns (*sinkhorn_columns)(const SinkhornArgs&, bool exact);
  void (*sinkhorn_plan)(const SinkhornArgs&, int64_t first, int64_t last);  // rows
};

// The CUDA library's: launches on the stream and returns a cudaError_t.
struct CudaKernels {
  int64_t codewords;  // what K is padded to in half_norms
  int (*quantize)(const QuantizeArgs&, void* stream);
  int (*sinkhorn)(const SinkhornArgs&, int64_t iterations, void* stream);
};

}  // namespace genrec::tokenizer
