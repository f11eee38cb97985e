// What lets one header of scalar math serve g++, clang and nvcc.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define GENREC_HD __host__ __device__ __forceinline__
// Before a loop whose body is long, which is not unrolled: a GPU waits for code as for memory.
#define GENREC_ROLLED _Pragma("unroll 1")
#else
// Internal linkage on purpose: these headers are compiled once an instruction
// set, and the linker must not fold the AVX-512 copy into the baseline one.
#define GENREC_HD __attribute__((always_inline)) inline
#define GENREC_ROLLED
#endif
