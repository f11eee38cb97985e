// What trie.cpp hands to the decoding kernels.  Torch-free.
//
// A trie's level l is two arrays: first_child [n + 1] and labels [n'], where the
// children of node i are the nodes first_child[i] .. first_child[i + 1] - 1 of
// the next level, in ascending order of label.  A label is a column of the logits.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genrec::trie {

enum class Softmax : int { vocab, level, children };

struct BeamStepArgs {
  DType dtype = DType::f32;      // f32, bf16 or f16
  const void* logits = nullptr;  // [U * W, V], unit stride along V
  int64_t U = 0, W = 0, V = 0, stride = 0;
  const float* scores = nullptr;         // [U, W]
  const int64_t* nodes = nullptr;        // [U, W], -1: dead
  const int32_t* first_child = nullptr;  // [n + 1]
  const int32_t* labels = nullptr;       // [n']
  int64_t next_nodes = 0;                // n'
  int64_t level_begin = 0, level_end = 0;
  Softmax softmax = Softmax::vocab;
  float inv_temperature = 1;
  const bool* forbidden = nullptr;  // [n'] or, with forbidden_stride n', [U, n']
  int64_t forbidden_stride = 0;
  int64_t width = 0;
  float* norms = nullptr;  // [U * W, 2], scratch: maximum and log of the sum
  float* out_scores = nullptr;
  int64_t* out_parent = nullptr;
  int64_t* out_token = nullptr;
  int64_t* out_node = nullptr;  // each [U, width]
};

// One instruction set's kernels.
struct CpuKernels {
  void (*normalize_beams)(const BeamStepArgs&, int64_t first_row, int64_t last_row);
  void (*select_beams)(const BeamStepArgs&, int64_t first_user, int64_t last_user);
};

}  // namespace genrec::trie
