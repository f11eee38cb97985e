// What attention.cpp hands to the attention kernels: plain pointers and numbers.
// Torch-free.
//
// Shapes: B users, W nodes of each user's tree, H heads of D dimensions, T levels.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace genrec::attention {

inline constexpr int64_t kMostLevels = 64;

struct PathArgs {
  DType dtype = DType::f32;  // E: f32, bf16 or f16
  int64_t B = 0, W = 0, H = 0, D = 0, T = 0;
  const void* query = nullptr;  // E [B, W, H, D]
  const void* key = nullptr;    // E [B, W, H, D]
  const void* value = nullptr;  // E [B, W, H, D]
  const float* bias = nullptr;  // [H, T, T], by the levels of query and key
  const int32_t* path =
      nullptr;                  // [B, W, T]: each level's node on the way to this one, -1 below it
  const float* keep = nullptr;  // [B, W, H, T]: what multiplies the shares, or null

  // Forward writes these; backward reads the shares.
  float* shares = nullptr;  // [B, W, H, T]
  void* out = nullptr;      // E [B, W, H, D]

  const void* grad = nullptr;  // E [B, W, H, D]: of `out`
  void* grad_query = nullptr;  // E [B, W, H, D]
  void* grad_key = nullptr;    // E [B, W, H, D]
  void* grad_value = nullptr;  // E [B, W, H, D]
  float* grad_bias = nullptr;  // [B, H, T, T]: each user's part
};

// One instruction set's kernels; they work on the users [first, last).
struct CpuKernels {
  void (*forward)(const PathArgs&, int64_t first, int64_t last);
  void (*backward)(const PathArgs&, int64_t first, int64_t last);
};

}  // namespace genrec::attention
