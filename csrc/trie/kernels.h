// What trie.cpp hands to the decoding kernels.  Torch-free, and the same for the
// CPU and the CUDA library.
//
// A trie's level l is two arrays: first_child [n + 1] and labels [n'], where the
// children of node i are the nodes first_child[i] .. first_child[i + 1] - 1 of
// the next level, in ascending order of label.  A label is a column of the logits.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/portable.h"

namespace genrec::trie {

enum class Softmax : int { vocab, level, children };

// Which nodes of the next level, n' of them, a user may not enter: the union of
// what is given.
struct Filter {
  const bool* forbidden = nullptr;  // [n'] or, with forbidden_stride n', [U, n']
  int64_t forbidden_stride = 0;
  const int32_t* closed = nullptr;      // [closed_rows, closed_words], a bit a node
  const int64_t* closed_row = nullptr;  // [U] or null: row 0 for all; outside: none
  int64_t closed_rows = 0, closed_words = 0;
  const int32_t* taken = nullptr;        // [num_taken], each user's ascending
  const int64_t* taken_begin = nullptr;  // [U + 1]
  int64_t num_taken = 0;
};

struct StepArgs {
  DType dtype = DType::f32;      // f32, bf16 or f16
  const void* logits = nullptr;  // [U * W, V], unit stride along V
  int64_t U = 0, W = 0, V = 0, stride = 0;
  const float* scores = nullptr;         // [U, W]
  const int64_t* nodes = nullptr;        // [U, W], -1: dead
  const int32_t* first_child = nullptr;  // [level_nodes + 1]
  int64_t level_nodes = 0;
  const int32_t* labels = nullptr;  // [next_nodes]
  int64_t next_nodes = 0;           // n'
  int64_t level_begin = 0, level_end = 0;
  Softmax softmax = Softmax::vocab;
  float inv_temperature = 1;
  Filter filter;
  int64_t width = 0;

  // Sampling, by Gumbel noise; softmax is `children` then.
  bool sampling = false;
  const float* perturbed = nullptr;  // [U, W]; null: the scores and noise of their own
  uint64_t seed = 0;
  uint32_t level = 0;

  float* out_scores = nullptr;     // each [U, width]
  float* out_perturbed = nullptr;  // when sampling
  int64_t* out_parent = nullptr;
  int64_t* out_token = nullptr;
  int64_t* out_node = nullptr;

  // CPU: each user's beams are taken in this many chunks, and with more than one
  // the chunks' best meet in `workspace`, `width` of them a chunk.
  int64_t chunks = 1;
  void* workspace = nullptr;
};

// A candidate that left its chunk.
struct Contender {
  float key;    // what it is chosen by: its score, or when sampling, perturbed
  float score;  // when sampling
  int32_t parent, node;
};

// One instruction set's kernels.
struct CpuKernels {
  // Tasks are numbered user * chunks + chunk.  Returns the least row, if any, whose
  // node is none of the level's or whose children have labels outside the logits, else
  // -1; those were left out.  Of labels that do not ascend, some may not be looked at.
  int64_t (*step)(const StepArgs&, int64_t first_task, int64_t last_task);
  // Users whose beams were taken in several chunks.
  void (*merge)(const StepArgs&, int64_t first_user, int64_t last_user);
};

// The CUDA library's: launches on the stream and returns a cudaError_t.
struct CudaKernels {
  int (*step)(const StepArgs&, void* stream);
  // Bytes of workspace that it takes.
  int64_t (*workspace)(const StepArgs&);
};

}  // namespace genrec::trie
