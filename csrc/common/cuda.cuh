// The one header through which .cu and .cuh files see CUDA: nvcc's own, or the
// simulator that runs the same source on a CPU in the tests.  Torch-free.
//
// Three habits let one source serve both: kernels are launched by `launch`,
// shared memory is declared by the two macros below, and what a cluster's blocks
// share is reached by `cluster_peer`.
#pragma once

#if defined(GENREC_SIMULATOR)
#include "simulator/cuda_simulator.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A block's static shared array T name[n], uninitialised.
#define GENREC_SHARED(T, name, n) __shared__ T name[n]
// T* name: the launch's dynamic shared memory, aligned to 16 bytes.  The byte array
// has one name for every T, since nvcc folds them into one declaration.
#define GENREC_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(16) unsigned char genrec_dynamic_shared_[]; \
  T* name = reinterpret_cast<T*>(genrec_dynamic_shared_)
#endif

#include <cstddef>
#include <cstdint>

namespace genrec::cuda {

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared = 0;  // bytes of dynamic shared memory
  int cluster = 1;    // blocks a cluster, compute capability 9.0 or later; divides `blocks`
  void* stream = nullptr;
};

struct DeviceLimits {
  int capability;        // 80, 90, 100, ...; 0 where there is no device
  int shared_per_block;  // bytes, the most that a launch may ask for
  int multiprocessors;
};

// Of the current device; asked once a thread and device, with no synchronisation.
inline DeviceLimits device_limits() {
  thread_local int known = -1;
  thread_local DeviceLimits limits{};
  int device = 0, major = 0, minor = 0;
  DeviceLimits found{};
  if (cudaGetDevice(&device) != cudaSuccess) return {};
  if (device == known) return limits;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&found.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                             device) != cudaSuccess ||
      cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device) !=
          cudaSuccess)
    return {};
  found.capability = 10 * major + minor;
  known = device;
  return limits = found;
}

// What a block may have, static arrays included, without saying so to the kernel first;
// and how much of it a launch asks for without looking at the static ones.
inline constexpr size_t kPlainShared = 48 << 10, kSurelyPlain = 8 << 10;

// Lets the kernel's blocks have as much dynamic shared memory as the device has beside
// their static arrays.  Always the same number, whatever is `wanted`: threads that launch
// at once do not lower one another's.
template <class... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), [[maybe_unused]] size_t wanted) {
#if defined(GENREC_SIMULATOR)
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(wanted));
#else
  cudaFuncAttributes own{};
  const cudaError_t code = cudaFuncGetAttributes(&own, kernel);
  if (code != cudaSuccess) return code;
  return cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
      device_limits().shared_per_block - static_cast<int>(own.sharedSizeBytes));
#endif
}

// A launch's configuration, and room for what it points to.
struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};

  explicit LaunchConfig(const Launch& how) {
    config.gridDim = dim3(static_cast<unsigned>(how.blocks));
    config.blockDim = dim3(static_cast<unsigned>(how.threads));
    config.dynamicSmemBytes = how.shared;
    config.stream = static_cast<cudaStream_t>(how.stream);
    if (how.cluster > 1) {
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = static_cast<unsigned>(how.cluster);
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
      config.attrs = &cluster;
      config.numAttrs = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

// A launch as a function call, which formatters and simulators understand; none
// for an empty grid.  Returns a cudaError_t.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
  if (how.blocks == 0) return static_cast<int>(cudaSuccess);
  if (how.blocks < 0 || how.blocks > INT32_MAX || how.threads < 1 || how.cluster < 1)
    return static_cast<int>(cudaErrorInvalidConfiguration);
  cudaError_t code = cudaSuccess;
  if (how.shared > kSurelyPlain) code = allow_shared(kernel, how.shared);
  if (code == cudaSuccess) {
    const LaunchConfig with(how);
    code = cudaLaunchKernelEx(&with.config, kernel, static_cast<Parameters>(arguments)...);
  }
  // The caller reports it; left in place, torch would too, at an unrelated call.
  if (code != cudaSuccess) cudaGetLastError();
  return static_cast<int>(code);
}

// How many clusters of a launch the current device runs at once, which depends on how its
// processors are grouped; 0 where they do not fit it.  Asked once a thread for the launches
// that it makes over and over.
template <class... Parameters>
int clusters_at_once(void (*kernel)(Parameters...), const Launch& how) {
  struct Known {
    void (*kernel)(Parameters...) = nullptr;
    int device = -1, threads = 0, cluster = 0;
    size_t shared = 0;
    int count = 0;
  };
  constexpr int kKnown = 64;
  thread_local Known known[kKnown];
  thread_local int oldest = 0;
  Known asked{kernel, -1, how.threads, how.cluster, how.shared, 0};
  if (cudaGetDevice(&asked.device) != cudaSuccess) return 0;
  for (const Known& k : known)
    if (k.kernel == asked.kernel && k.device == asked.device && k.threads == asked.threads &&
        k.cluster == asked.cluster && k.shared == asked.shared)
      return k.count;
  const LaunchConfig with(how);
  if ((how.shared > kSurelyPlain && allow_shared(kernel, how.shared) != cudaSuccess) ||
      cudaOccupancyMaxActiveClusters(&asked.count, kernel, &with.config) != cudaSuccess) {
    cudaGetLastError();
    asked.count = 0;
  }
  known[oldest] = asked;
  oldest = (oldest + 1) % kKnown;
  return asked.count;
}

// Whether the kernel's code that this device runs was compiled for devices with
// clusters: code for older ones runs on newer devices too, and has none.
template <class... Parameters>
bool knows_clusters([[maybe_unused]] void (*kernel)(Parameters...)) {
#if defined(GENREC_SIMULATOR)
  return true;
#else
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.ptxVersion >= 90;
#endif
}

#if !defined(GENREC_SIMULATOR)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define GENREC_HAS_CLUSTERS 1
#endif

// This block's rank in its cluster: 0 where there is none.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if defined(GENREC_HAS_CLUSTERS)
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// A barrier of every thread of the cluster, after which each block sees what the
// others wrote to shared memory, its own and theirs.
__device__ __forceinline__ void cluster_sync() {
#if defined(GENREC_HAS_CLUSTERS)
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;\n" ::
          : "memory");
#else
  __syncthreads();
#endif
}

// The same in two halves: what a thread does between them waits for nobody.
__device__ __forceinline__ void cluster_arrive() {
#if defined(GENREC_HAS_CLUSTERS)
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(GENREC_HAS_CLUSTERS)
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same shared variable in the cluster's block of this rank.  It may be touched
// only after a barrier of the cluster that this block's start precedes, and before one
// that its end follows.
template <class T>
__device__ __forceinline__ T* cluster_peer(T* shared, unsigned rank) {
#if defined(GENREC_HAS_CLUSTERS)
  uint64_t peer;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(peer)
               : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(peer);
#else
  static_cast<void>(rank);
  return shared;
#endif
}

// Starts the copy of 16 bytes from global to shared memory, both aligned to that.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}

// Makes one group of the copies that this thread has started since the last one.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all groups but the newest, and shows their copies to this thread.
template <int kNewest>
__device__ __forceinline__ void wait_for_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// Waits for every copy that this thread has started, and shows it to it.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// IEEE binary16, rounded to nearest even.
__device__ __forceinline__ float half_bits_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t float_to_half_bits(float x) {
  return __half_as_ushort(__float2half_rn(x));
}

#endif

}  // namespace genrec::cuda
