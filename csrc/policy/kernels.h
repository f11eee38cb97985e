// What policy.cpp hands to the policy kernels: plain pointers and numbers.
// Torch-free, and the same for the CPU and the CUDA library.
//
// Shapes: N sequences, T tokens a sequence, V columns.  `S` below is float,
// or double where the logits are double.
#pragma once

#include <cstdint>

#include "common/scores.h"
#include "policy/objective.h"

namespace genrec::policy {

struct TokenLogpsArgs {
  Scores in;
  void* logps = nullptr;      // S [N, T]
  void* entropy = nullptr;    // S [N, T], nats
  void* norm = nullptr;       // S [N, T, 2]: top and log_sum of the row's normaliser
  void* workspace = nullptr;  // CUDA only: S [N, T, kWorkspace]
};

struct TokenLogpsBackwardArgs {
  Scores in;
  const void* norm = nullptr;          // S [N, T, 2]
  const void* entropy = nullptr;       // S [N, T]
  const void* grad_logps = nullptr;    // S [N, T]
  const void* grad_entropy = nullptr;  // S [N, T] or null: 0
  void* grad_logits = nullptr;         // like logits, contiguous
  bool grad_is_zero = false;           // CPU only: it needs no zeros outside the support
  bool grad_streamed = false;          // CPU only: it is written past the caches
};

inline constexpr int kStats = 6;  // ratio, coefficient, capped share, entropy, p, divergence

struct SequenceArgs {
  int64_t N = 0, T = 0;
  const bool* mask = nullptr;        // [N, T] or null
  const void* old_logps = nullptr;   // S [N, T]
  const void* ref_logps = nullptr;   // S [N, T] or null
  const void* advantages = nullptr;  // S [N]
  const void* entropy = nullptr;     // S [N] or null: 1
  const void* boost = nullptr;       // S [N] or null: 1
  ObjectiveConfig objective;
  double scale = 1;        // the reduction's factor: 1, 1 / N or 1 / normalizer
  void* losses = nullptr;  // S [N], already scaled
  void* stats = nullptr;   // S [N, kStats]
};

struct SageLossArgs {
  Scores in;
  SequenceArgs sequence;
  void* grad_logits = nullptr;  // null: no gradient wanted; may be the logits themselves
  int64_t grad_stride_n = 0, grad_stride_t = 0;
  bool grad_is_zero = false;   // CPU only: it needs no zeros outside the support
  bool grad_streamed = false;  // CPU only: it is written past the caches
  bool with_entropy = true;    // that of `stats` is wanted; on CUDA it costs nothing
  void* workspace = nullptr;   // CUDA only: S [N, T, kWorkspace]
};

// Between launches on CUDA: a row's maximum, log of its sum, entropy,
// log-probability and slope, then the sums of up to kMaxParts parts of it.
inline constexpr int kRowState = 5;
inline constexpr int kMaxParts = 8;
inline constexpr int kWorkspace = kRowState + 3 * kMaxParts;

struct SageFromLogpsArgs {
  DType dtype = DType::f32;  // f32 or f64
  SequenceArgs sequence;
  const void* logps = nullptr;  // S [N, T]
  void* grad_logps = nullptr;   // S [N, T]
};

struct ScaleArgs {
  DType dtype = DType::f32;
  int64_t N = 0, inner = 0;      // grad is N rows of `inner` elements
  const void* grad = nullptr;    // contiguous
  const void* factor = nullptr;  // S [N], or S [1] where `shared`
  bool shared = false;
  void* out = nullptr;  // may be grad
  // In place, CPU: grad is [N, T, V] and only these columns can differ from 0.
  int64_t T = 0;
  Support support;
  int64_t num_columns = 0;  // of support.columns
};

// Adds in the order of the sequences, in double: the same bits every time.
struct SumArgs {
  DType dtype = DType::f32;  // f32 or f64
  int64_t N = 0;
  const void* values = nullptr;  // S [N]
  void* total = nullptr;         // S []
};

struct AdvantagesArgs {
  DType dtype = DType::f32;  // f32 or f64
  int64_t B = 0, G = 0, M = 0;
  const void* rewards = nullptr;  // S [B, G, M], NaN: the objective does not apply
  const void* weights = nullptr;  // S [M]
  bool unbiased = false;          // divide squares by n - 1 instead of n
  double clamp = 0;               // 0: none
  void* advantages = nullptr;     // S [B, G]
};

// A group's standard deviation below this counts as no spread at all.
inline constexpr double kNoSpread = 1e-6;
// Added to each standard deviation before it divides.
inline constexpr double kSpreadFloor = 1e-4;

// One instruction set's kernels.  Those with a range work on the sequences
// [first, last); the others on the whole.
struct CpuKernels {
  void (*token_logps)(const TokenLogpsArgs&, int64_t first, int64_t last);
  void (*token_logps_backward)(const TokenLogpsBackwardArgs&, int64_t first, int64_t last);
  void (*sage_loss)(const SageLossArgs&, int64_t first, int64_t last);
  void (*sage_loss_from_logps)(const SageFromLogpsArgs&, int64_t first, int64_t last);
  void (*scale)(const ScaleArgs&, int64_t first, int64_t last);
  void (*sum)(const SumArgs&);
  void (*advantages)(const AdvantagesArgs&);
};

// The CUDA library's kernels: each launches on the stream and returns a cudaError_t.
struct CudaKernels {
  int (*token_logps)(const TokenLogpsArgs&, void* stream);
  int (*token_logps_backward)(const TokenLogpsBackwardArgs&, void* stream);
  int (*sage_loss)(const SageLossArgs&, void* stream);
  int (*sage_loss_from_logps)(const SageFromLogpsArgs&, void* stream);
  int (*scale)(const ScaleArgs&, void* stream);
  int (*sum)(const SumArgs&, void* stream);
  int (*advantages)(const AdvantagesArgs&, void* stream);
};

}  // namespace genrec::policy
