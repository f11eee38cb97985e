// What this project's .cu files use of CUDA's language and runtime, for g++ or
// clang, so that a test runs them on a CPU.  README.md beside this file says what
// is modelled.  Reached through common/cuda.cuh only; needs no CUDA toolkit.
#pragma once

#include <math.h>  // beside <cmath>: ::exp(float) computes in float, as under nvcc

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>

// ---- the language ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
// CUDA's alignments, so that a vector access of a row that is not aligned to them
// is what it is on a device: an error.
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- the runtime ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);
cudaError_t cudaGetLastError();
// Of the latest failure: the simulator's account of it.
const char* cudaGetErrorString(cudaError_t code);

namespace genrec::simulator {

// A call in a kernel, for reports: the default argument takes the caller's line.
struct Place {
  const char* file;
  int line;
};
#define GENREC_HERE ::genrec::simulator::Place here = {__builtin_FILE(), __builtin_LINE()}

using Body = void (*)(void*);
cudaError_t set_dynamic_shared(const void* kernel, int bytes);
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, Body body, void* arguments);

void* static_shared(const void* key, const char* name, size_t bytes, size_t alignment, Place here);
void* dynamic_shared();

// Waits for every thread of the block, and says for how many `predicate` held.
int block_barrier(const char* name, bool predicate, Place here);
void cluster_barrier(Place here);
void arrive_at_cluster(Place here);
void wait_for_cluster(Place here);
unsigned rank_in_cluster();
// Asynchronous copies are made as late as may be: when their thread waits for them.
struct Copy {
  void* to;
  const void* from;
};
void copy_later(Copy, Place here);
void end_group();
// The thread's oldest copy, which it now makes, but for the newest groups; -1: any.
bool next_copy(Copy&, int newest_groups);
void* peer_shared(void* mine, unsigned rank, Place here);

// Waits for the lanes of `mask`; `all` gets each one's value.
void meet_lanes(const char* name, unsigned mask, uint64_t value, uint64_t (&all)[32], Place here);
void sync_lanes(unsigned mask, Place here);
int lane();
[[noreturn]] void fail_at(const char* what, Place here);

void before_atomic(void* address);  // other threads may come first
void fence();

template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  return std::bit_cast<To>(x);
}
template <class T>
uint64_t to_word(T x) {
  if constexpr (sizeof(T) == 8)
    return std::bit_cast<uint64_t>(x);
  else
    return std::bit_cast<uint32_t>(x);
}
template <class T>
T from_word(uint64_t word) {
  if constexpr (sizeof(T) == 8)
    return std::bit_cast<T>(word);
  else
    return std::bit_cast<T>(static_cast<uint32_t>(word));
}

template <class T, class... Choices>
inline constexpr bool is_one_of = (std::is_same_v<T, Choices> || ...);

// `source` is a lane, or -1 where the shuffle gives a lane its own value back.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, Place here) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "shuffles move numbers of 4 or 8 bytes");
  uint64_t all[32];
  meet_lanes(name, mask, to_word(value), all, here);
  if (source < 0) return value;
  if ((mask >> source & 1) == 0)
    fail_at("a shuffle reads a lane that its mask does not name", here);
  return from_word<T>(all[source]);
}

template <class T, class F>
T reduce_lanes(const char* name, unsigned mask, T value, Place here, const F& f) {
  static_assert(is_one_of<T, int, unsigned>, "CUDA reduces int and unsigned across a warp");
  uint64_t all[32];
  meet_lanes(name, mask, to_word(value), all, here);
  T result = value;
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) != 0 && i != lane()) result = f(result, from_word<T>(all[i]));
  return result;
}

// Read, change, write, with no order beyond itself, as on a device.
template <class T, class F>
T change(T* p, const F& f) {
  before_atomic(p);
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do next = f(old);
  while (!__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits >> 15) << 31;
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) {  // fraction * 2^-24, exact in float
    const float x = static_cast<float>(fraction) * 0x1p-24f;
    return sign == 0 ? x : -x;
  }
  const uint32_t high = exponent == 31 ? 255u : exponent + 112u;
  return std::bit_cast<float>(sign | high << 23 | fraction << 13);
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;  // NaN, as the device's conversion gives it
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
  if (size < 0x38800000u) {  // below 2^-14: the sum's last bit weighs 2^-24
    const float sum = std::bit_cast<float>(size) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000u));
  }
  const uint32_t rounded = size + 0xfffu + (size >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace genrec::simulator

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int value) {
  return genrec::simulator::set_dynamic_shared(reinterpret_cast<const void*>(kernel), value);
}

// One block a processor, whatever it asks for, and no processor left over.
template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*)(P...),
                                           const cudaLaunchConfig_t* config) {
  const cudaError_t code = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, 0);
  if (config->numAttrs > 0) *count /= static_cast<int>(config->attrs[0].val.clusterDim.x);
  return code;
}

template <class... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               std::type_identity_t<P>... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } call{kernel, {arguments...}};
  const auto body = [](void* p) {
    const Call& c = *static_cast<Call*>(p);
    std::apply(c.kernel, c.arguments);
  };
  return genrec::simulator::run(*config, reinterpret_cast<const void*>(kernel), body, &call);
}

// ---- inside a kernel ----

// Of the thread that the CPU is in: set whenever it changes.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

#define GENREC_SHARED(T, name, n)                                    \
  static const char genrec_shared_key_##name = 0;                    \
  T(&name)                                                           \
  [n] = *static_cast<T(*)[n]>(::genrec::simulator::static_shared(    \
      &genrec_shared_key_##name, #name, sizeof(T) * (n), alignof(T), \
      ::genrec::simulator::Place{__FILE__, __LINE__}))
#define GENREC_DYNAMIC_SHARED(T, name) \
  T* name = static_cast<T*>(::genrec::simulator::dynamic_shared())

inline void __syncthreads(GENREC_HERE) {
  genrec::simulator::block_barrier("__syncthreads", true, here);
}
inline int __syncthreads_count(int predicate, GENREC_HERE) {
  return genrec::simulator::block_barrier("__syncthreads_count", predicate != 0, here);
}
inline int __syncthreads_and(int predicate, GENREC_HERE) {
  const unsigned all = blockDim.x;
  return genrec::simulator::block_barrier("__syncthreads_and", predicate != 0, here) ==
         static_cast<int>(all);
}
inline int __syncthreads_or(int predicate, GENREC_HERE) {
  return genrec::simulator::block_barrier("__syncthreads_or", predicate != 0, here) != 0;
}
inline void __syncwarp(unsigned mask = ~0u, GENREC_HERE) {
  genrec::simulator::sync_lanes(mask, here);
}
inline void __threadfence() { genrec::simulator::fence(); }
inline void __threadfence_block() { genrec::simulator::fence(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, GENREC_HERE) {
  const int first = genrec::simulator::lane() & -width;
  return genrec::simulator::shuffle("__shfl_sync", mask, value, first | (source & (width - 1)),
                                    here);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int change, int width = 32, GENREC_HERE) {
  const int me = genrec::simulator::lane(), source = me ^ change;
  return genrec::simulator::shuffle("__shfl_xor_sync", mask, value,
                                    source < (me & -width) + width ? source : -1, here);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, GENREC_HERE) {
  const int me = genrec::simulator::lane(), source = me + static_cast<int>(by);
  return genrec::simulator::shuffle("__shfl_down_sync", mask, value,
                                    source < (me & -width) + width ? source : -1, here);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, GENREC_HERE) {
  const int me = genrec::simulator::lane(), source = me - static_cast<int>(by);
  return genrec::simulator::shuffle("__shfl_up_sync", mask, value,
                                    source >= (me & -width) ? source : -1, here);
}

namespace genrec::simulator {
inline unsigned ballot(const char* name, unsigned mask, bool predicate, Place here) {
  uint64_t all[32];
  meet_lanes(name, mask, predicate, all, here);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>((mask >> i & 1) != 0 && all[i]) << i;
  return result;
}
}  // namespace genrec::simulator

inline unsigned __ballot_sync(unsigned mask, int predicate, GENREC_HERE) {
  return genrec::simulator::ballot("__ballot_sync", mask, predicate != 0, here);
}
inline int __any_sync(unsigned mask, int predicate, GENREC_HERE) {
  return genrec::simulator::ballot("__any_sync", mask, predicate != 0, here) != 0;
}
inline int __all_sync(unsigned mask, int predicate, GENREC_HERE) {
  return genrec::simulator::ballot("__all_sync", mask, predicate != 0, here) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, GENREC_HERE) {
  uint64_t all[32];
  const uint64_t mine = genrec::simulator::to_word(value);
  genrec::simulator::meet_lanes("__match_any_sync", mask, mine, all, here);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i)
    result |= static_cast<unsigned>((mask >> i & 1) != 0 && all[i] == mine) << i;
  return result;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, GENREC_HERE) {
  return genrec::simulator::reduce_lanes("__reduce_add_sync", mask, value, here, [](T a, T b) {
    return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, GENREC_HERE) {
  return genrec::simulator::reduce_lanes("__reduce_min_sync", mask, value, here,
                                         [](T a, T b) { return b < a ? b : a; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, GENREC_HERE) {
  return genrec::simulator::reduce_lanes("__reduce_max_sync", mask, value, here,
                                         [](T a, T b) { return a < b ? b : a; });
}

// Each for the types that CUDA has it for; the value takes the address's type.
#define GENREC_ATOMIC(name, expression, ...)                                                \
  template <class T>                                                                        \
  T name(T* p, std::type_identity_t<T> value) {                                             \
    static_assert(genrec::simulator::is_one_of<T, __VA_ARGS__>, "CUDA has no such " #name); \
    return genrec::simulator::change(p, [=](T old) -> T { return expression; });            \
  }
using genrec_ull = unsigned long long;
GENREC_ATOMIC(atomicAdd, static_cast<T>(old + value), int, unsigned, genrec_ull, float, double)
GENREC_ATOMIC(atomicSub, static_cast<T>(old - value), int, unsigned)
GENREC_ATOMIC(atomicMax, old < value ? value : old, int, unsigned, genrec_ull, long long)
GENREC_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, genrec_ull, long long)
GENREC_ATOMIC(atomicOr, old | value, int, unsigned, genrec_ull)
GENREC_ATOMIC(atomicAnd, old& value, int, unsigned, genrec_ull)
GENREC_ATOMIC(atomicXor, old ^ value, int, unsigned, genrec_ull)
GENREC_ATOMIC(atomicExch, (static_cast<void>(old), value), int, unsigned, genrec_ull, float)
#undef GENREC_ATOMIC
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  static_assert(genrec::simulator::is_one_of<T, int, unsigned, genrec_ull, unsigned short>,
                "CUDA has no such atomicCAS");
  return genrec::simulator::change(p, [=](T old) { return old == expected ? value : old; });
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> value) {
  *p = value;
}

// Macros, since the C library declares functions of these names.
#define __expf(x) (::std::exp(static_cast<float>(x)))
#define __logf(x) (::std::log(static_cast<float>(x)))
#define __log2f(x) (::std::log2(static_cast<float>(x)))
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
// Rounded before it is added to anything, also where the compiler may contract.
inline double __dmul_rn(double a, double b) {
  volatile double product = a * b;
  return product;
}
inline unsigned __float_as_uint(float x) { return genrec::simulator::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return genrec::simulator::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return genrec::simulator::bits_as<float>(x); }
inline float __int_as_float(int x) { return genrec::simulator::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return genrec::simulator::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return genrec::simulator::bits_as<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1;
}
using std::max;
using std::min;

namespace genrec::cuda {

inline unsigned cluster_rank() { return simulator::rank_in_cluster(); }
inline void cluster_sync(GENREC_HERE) { simulator::cluster_barrier(here); }
inline void cluster_arrive(GENREC_HERE) { simulator::arrive_at_cluster(here); }
inline void cluster_wait(GENREC_HERE) { simulator::wait_for_cluster(here); }
inline void copy_async(void* to, const void* from, GENREC_HERE) {
  simulator::copy_later({to, from}, here);
}
inline void commit_copies() { simulator::end_group(); }
inline void make_copies(int newest_groups) {
  for (simulator::Copy c; simulator::next_copy(c, newest_groups);)
    *static_cast<uint4*>(c.to) = *static_cast<const uint4*>(c.from);
}
template <int kNewest>
void wait_for_copies_but() {
  make_copies(kNewest);
}
inline void wait_for_copies() { make_copies(-1); }
template <class T>
T* cluster_peer(T* shared, unsigned rank, GENREC_HERE) {
  return static_cast<T*>(simulator::peer_shared(shared, rank, here));
}
inline float half_bits_to_float(uint16_t bits) { return simulator::half_to_float(bits); }
inline uint16_t float_to_half_bits(float x) { return simulator::float_to_half(x); }

}  // namespace genrec::cuda
