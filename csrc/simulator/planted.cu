// Small kernels with one planted bug each, and correct twins: what the simulator
// must report and what it must let pass.  `planted NAME...` runs them and exits with
// 0, or with 2 where a result is wrong, or with 3 where a launch failed, and says
// which; a sanitizer ends it in its own way.  `planted --list` prints the names;
// python_tests/test_simulator.py says which build must catch each, and how.
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "common/cuda.cuh"

namespace {

using namespace genrec::cuda;

constexpr int kWrong = -1;  // beside the cudaError_t of a launch

int verdict(int code, bool right) { return code != cudaSuccess ? code : right ? 0 : kWrong; }

// Exactly n elements on the heap, so that AddressSanitizer sees both ends.
template <class T>
std::unique_ptr<T[]> array(size_t n, T value = T()) {
  std::unique_ptr<T[]> p(new T[n]);
  for (size_t i = 0; i < n; ++i) p[i] = value;
  return p;
}

Launch with_shared(int64_t blocks, int threads, size_t shared) {
  Launch how{blocks, threads};
  how.shared = shared;
  return how;
}

Launch with_cluster(int64_t blocks, int threads, int cluster) {
  Launch how{blocks, threads};
  how.cluster = cluster;
  return how;
}

// ---- races ----

__global__ void blocks_write_one_word(int* out) {
  if (threadIdx.x == 0) out[0] = static_cast<int>(blockIdx.x);
}

__global__ void swap_neighbours(int* out, int how) {
  GENREC_SHARED(int, s, 64);
  const unsigned t = threadIdx.x;
  s[t] = static_cast<int>(t);
  if (how == 1) __shfl_sync(~0u, static_cast<int>(t), 0);
  if (how == 2) __syncwarp();
  out[t] = s[t ^ 1];
}

template <int kHow>
int run_swap() {
  auto out = array<int>(64);
  const int code = launch(swap_neighbours, {1, 64}, out.get(), kHow);
  bool right = true;
  for (int t = 0; t < 64; ++t) right = right && out[t] == (t ^ 1);
  return verdict(code, right);
}

__global__ void reverse_block(int* out, bool barrier) {
  GENREC_SHARED(int, s, 128);
  const unsigned t = threadIdx.x;
  s[t] = static_cast<int>(t);
  if (barrier) __syncthreads();
  out[t] = s[127 - t];
}

template <bool kBarrier>
int run_reverse() {
  auto out = array<int>(128);
  const int code = launch(reverse_block, {1, 128}, out.get(), kBarrier);
  bool right = true;
  for (int t = 0; t < 128; ++t) right = right && out[t] == 127 - t;
  return verdict(code, right);
}

__global__ void broadcast_in_a_loop(int* out, bool second_barrier) {
  GENREC_SHARED(int, s, 1);
  for (int i = 0; i < 4; ++i) {
    if (threadIdx.x == 0) s[0] = i;
    __syncthreads();
    out[threadIdx.x] += s[0];
    if (second_barrier) __syncthreads();
  }
}

template <bool kSecond>
int run_broadcast() {
  auto out = array<int>(96);
  const int code = launch(broadcast_in_a_loop, {1, 96}, out.get(), kSecond);
  bool right = true;
  for (int t = 0; t < 96; ++t) right = right && out[t] == 0 + 1 + 2 + 3;
  return verdict(code, right);
}

__global__ void plain_beside_atomic(int* out) {
  if (threadIdx.x == 1)
    out[0] = 5;
  else
    atomicAdd(out, 1);
}

// Each block writes its part; the last to arrive adds them up.
__global__ void last_block_adds(int* parts, unsigned* arrived, int* total, bool fences) {
  GENREC_SHARED(unsigned, before, 1);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    if (fences) __threadfence();
    before[0] = atomicAdd(arrived, 1u);
  }
  __syncthreads();
  if (before[0] != gridDim.x - 1 || threadIdx.x != 0) return;
  if (fences) __threadfence();
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b];
  *total = sum;
}

template <bool kFences>
int run_last_block() {
  auto parts = array<int>(7);
  auto arrived = array<unsigned>(1);
  auto total = array<int>(1);
  const int code =
      launch(last_block_adds, {7, 32}, parts.get(), arrived.get(), total.get(), kFences);
  return verdict(code, total[0] == 28);
}

__global__ void count_by_value(const int* x, int n, unsigned* counts) {
  GENREC_SHARED(unsigned, s, 8);
  if (threadIdx.x < 8) s[threadIdx.x] = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x))
    atomicAdd(&s[x[i]], 1u);
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(&counts[threadIdx.x], s[threadIdx.x]);
}

int run_counts() {
  auto x = array<int>(1000);
  for (int i = 0; i < 1000; ++i) x[i] = i % 8;
  auto counts = array<unsigned>(8);
  const int code = launch(count_by_value, {3, 64}, x.get(), 1000, counts.get());
  bool right = true;
  for (int i = 0; i < 8; ++i) right = right && counts[i] == 375;
  return verdict(code, right);
}

// ---- barriers and warp collectives ----

__global__ void half_block_at_barrier(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void early_return_before_barrier(int* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void two_barriers(int* out) {
  if ((threadIdx.x & 1) != 0)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void full_mask_in_half_a_warp(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, static_cast<int>(threadIdx.x), 1);
}

__global__ void lane_outside_the_mask(int* out) {
  const unsigned mask = 0xffffu << (threadIdx.x & 16);
  out[threadIdx.x] = __shfl_sync(mask, static_cast<int>(threadIdx.x), 0);
}

__global__ void mask_lacks_the_caller(int* out) {
  out[threadIdx.x] = __shfl_sync(0xffffu, static_cast<int>(threadIdx.x), 0);
}

__global__ void mask_of_lanes_never_there(int* out) {
  if (threadIdx.x >= 32) out[threadIdx.x] = __any_sync(~0u, 1);
}

__global__ void two_collectives(int* out) {
  if (threadIdx.x < 7)
    out[threadIdx.x] = __any_sync(~0u, 1);
  else
    out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
}

// Lane 0 waits for lane 1, which waits for lane 2, which waits for lane 0.
__global__ void wait_for_each_other(int* out) {
  const unsigned t = threadIdx.x;
  if (t < 3) __syncwarp(1u << t | 1u << (t + 1) % 3);
  out[t] = 1;
}

__global__ void wait_for_a_flag(int* flag) {
  while (atomicAdd(flag, 0) == 0) {
  }
}

template <void (*kKernel)(int*), int kThreads = 64>
int run_simple() {
  auto out = array<int>(64);
  return launch(kKernel, {1, kThreads}, out.get());
}

int run_two_blocks_one_word() {
  auto out = array<int>(1);
  return launch(blocks_write_one_word, {2, 32}, out.get());
}

// Halves of a warp on their own, lanes by value, votes and reductions.
__global__ void collectives(int* out) {
  const int t = static_cast<int>(threadIdx.x), lane = t & 31;
  const unsigned half = 0xffffu << (lane & 16);
  int sum = lane;
  if (lane < 16)
    for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(half, sum, d, 16);
  else
    for (int d = 8; d > 0; d /= 2) sum += __shfl_down_sync(half, sum, d, 16);
  bool right = lane >= 16 ? lane != 16 || sum == 376 : sum == 120;
  const unsigned same = __match_any_sync(~0u, lane % 3);
  right = right && __popc(same) == (lane % 3 == 2 ? 10 : 11);
  right = right && __reduce_add_sync(same, 1) == __popc(same);
  right = right && __ballot_sync(~0u, lane % 2) == 0xaaaaaaaau;
  right = right && __shfl_up_sync(~0u, lane, 1) == (lane == 0 ? 0 : lane - 1);
  right = right && __all_sync(~0u, lane < 32) && !__any_sync(~0u, lane == 32);
  right = right && __syncthreads_count(t < 7) == 7 && __syncthreads_or(t == 3);
  out[t] = right && !__syncthreads_and(t < 3);
}

int run_collectives() {
  auto out = array<int>(96);
  const int code = launch(collectives, {1, 96}, out.get());
  bool right = true;
  for (int t = 0; t < 96; ++t) right = right && out[t] == 1;
  return verdict(code, right);
}

// ---- memory ----

__global__ void word_never_written(float* out) {
  GENREC_SHARED(float, s, 64);
  if (threadIdx.x < 63) s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[63 - threadIdx.x];
}

int run_never_written() {
  auto out = array<float>(64);
  const int code = launch(word_never_written, {1, 64}, out.get());
  bool right = true;
  for (int t = 0; t < 64; ++t) right = right && out[t] == 1;
  return verdict(code, right);
}

__global__ void wide_load_of_narrow_array(float* out) {
  GENREC_SHARED(float, s, 64);
  s[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x < 16) out[threadIdx.x] = reinterpret_cast<const float4*>(s)[threadIdx.x].w;
}

__global__ void past_a_static_array(float* out) {
  GENREC_SHARED(float, s, 32);
  s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x & 31];
}

// The same where the compiler cannot see the array's length.
__global__ void past_a_static_array_by_pointer(float* out) {
  GENREC_SHARED(float, s, 63);
  float* p = s;
  if (threadIdx.x < 63) p[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = p[threadIdx.x];
}

template <void (*kKernel)(float*)>
int run_floats() {
  auto out = array<float>(64);
  return launch(kKernel, {1, 64}, out.get());
}

__global__ void fill_dynamic(int* out) {
  GENREC_DYNAMIC_SHARED(int, s);
  for (int i = 0; i < 400; ++i) s[threadIdx.x + 64 * i] = i;
  __syncthreads();
  out[threadIdx.x] = s[63 - threadIdx.x + 64 * 399];
}

template <int kBytes>
int run_dynamic() {
  auto out = array<int>(64);
  const int code = launch(fill_dynamic, with_shared(1, 64, kBytes), out.get());
  return verdict(code, out[0] == 399);
}

__global__ void static_too_large(int* out) {
  GENREC_SHARED(double, s, 7000);
  s[threadIdx.x] = 1;
  out[threadIdx.x] = static_cast<int>(s[threadIdx.x]);
}

__global__ void shift_by(int* out, int by) { out[threadIdx.x] = 1 << by; }

template <int kBy>
int run_shift() {
  auto out = array<int>(32);
  return launch(shift_by, {1, 32}, out.get(), kBy);
}

__global__ void copy_shifted(const int* in, int* out, int from, int to) {
  const int t = static_cast<int>(threadIdx.x);
  out[t + to] = in[t + from];
}

template <int kFrom, int kTo>
int run_copy() {
  auto in = array<int>(64), out = array<int>(64);
  return launch(copy_shifted, {1, 64}, in.get(), out.get(), kFrom, kTo);
}

// ---- clusters ----

// How a block of `sum_of_ranks` strays from the correct one.
enum class Stray { none, reads_early, leaves_early, writes_early, skips_a_barrier, beyond };

__global__ void sum_of_ranks(int* out, Stray stray) {
  GENREC_SHARED(int, mine, 1);
  const unsigned rank = cluster_rank(), size = 4;
  if (stray == Stray::writes_early) {
    if (threadIdx.x == 0) *cluster_peer(mine, (rank + 1) % size) = static_cast<int>(rank) + 1;
  } else if (threadIdx.x == 0) {
    mine[0] = static_cast<int>(rank) + 1;
  }
  if (stray == Stray::skips_a_barrier && rank == 2) return;
  if (stray != Stray::reads_early) cluster_sync();
  int sum = 0;
  for (unsigned r = 0; r < size; ++r)
    sum += *cluster_peer(mine, stray == Stray::beyond ? r + 1 : r);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
  if (stray != Stray::leaves_early) cluster_sync();
}

template <Stray kStray>
int run_cluster() {
  auto out = array<int>(8);
  const int code = launch(sum_of_ranks, with_cluster(8, 64, 4), out.get(), kStray);
  bool right = true;
  for (int b = 0; b < 8; ++b) right = right && out[b] == 10;
  return verdict(code, right);
}

// The barrier in two halves.
enum class Halves { both, wait_alone, arrive_twice, arrive_alone, read_between };

__global__ void sum_in_halves(int* out, Halves halves) {
  GENREC_SHARED(int, mine, 1);
  if (threadIdx.x == 0) mine[0] = static_cast<int>(cluster_rank()) + 1;
  if (halves != Halves::wait_alone) cluster_arrive();
  if (halves == Halves::arrive_twice) cluster_arrive();
  if (halves == Halves::arrive_alone) return;
  int sum = 0;
  const auto add_up = [&] {
    for (unsigned r = 0; r < 4; ++r) sum += *cluster_peer(mine, r);
  };
  if (halves == Halves::read_between) add_up();
  cluster_wait();
  if (halves != Halves::read_between) add_up();
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
  cluster_sync();
}

template <Halves kHalves>
int run_halves_of_a_barrier() {
  auto out = array<int>(8);
  const int code = launch(sum_in_halves, with_cluster(8, 64, 4), out.get(), kHalves);
  bool right = true;
  for (int b = 0; b < 8; ++b) right = right && out[b] == 10;
  return verdict(code, right);
}

// Two groups of asynchronous copies, of which each thread reads what it has copied itself.
enum class Copies { waited_for, read_too_early, unaligned, left_behind };

__global__ void copy_in_groups(const float* in, float* out, Copies copies) {
  GENREC_SHARED(float4, s, 128);
  const unsigned t = threadIdx.x;
  for (unsigned half = 0; half < 2; ++half) {
    copy_async(s + 64 * half + t, in + 4 * (64 * half + t) + (copies == Copies::unaligned));
    commit_copies();
  }
  if (copies == Copies::read_too_early)
    wait_for_copies_but<2>();
  else
    wait_for_copies_but<1>();
  out[t] = s[t].x;
  if (copies != Copies::left_behind) wait_for_copies();
  out[64 + t] = s[64 + t].x;
}

template <Copies kCopies>
int run_copies() {
  auto in = array<float>(4 * 128 + 4), out = array<float>(128);
  for (int i = 0; i < 4 * 128; ++i) in[i] = static_cast<float>(i);
  const int code = launch(copy_in_groups, {1, 64}, in.get(), out.get(), kCopies);
  bool right = true;
  for (int i = 0; i < 128; ++i) right = right && out[i] == static_cast<float>(4 * i);
  return verdict(code, right);
}

// The pointer is made while the peer lives and used after it has ended.
__global__ void read_after_the_end(int* out) {
  GENREC_SHARED(int, mine, 1);
  GENREC_SHARED(int, flag, 1);
  if (threadIdx.x == 0) mine[0] = 7, flag[0] = 0;
  cluster_sync();
  const int* theirs = cluster_peer(mine, 1 - cluster_rank());
  if (cluster_rank() == 1) return;
  for (int i = 0; i < 5000; ++i) atomicAdd(flag, 1);  // time enough for the other to leave
  out[0] = *theirs;
}

int run_read_after_the_end() {
  auto out = array<int>(1);
  const int code = launch(read_after_the_end, with_cluster(2, 1, 2), out.get());
  return verdict(code, out[0] == 7);
}

template <int kBlocks, int kThreads, int kCluster>
int run_shape() {
  auto out = array<int>(1);
  return launch(wait_for_a_flag, with_cluster(kBlocks, kThreads, kCluster), out.get());
}

// A launch that forgets to tell the kernel of its dynamic shared memory.
int run_without_attribute() {
  auto out = array<int>(64);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 100 << 10;
  return cudaLaunchKernelEx(&config, fill_dynamic, out.get());
}

// Static and dynamic memory that fit the plain limit by themselves only.
__global__ void static_beside_dynamic(float* out) {
  GENREC_DYNAMIC_SHARED(float, moved);
  GENREC_SHARED(float, s, 8192);
  s[threadIdx.x] = 1;
  moved[threadIdx.x] = s[threadIdx.x];
  out[threadIdx.x] = moved[threadIdx.x];
}

int run_static_beside_dynamic() {
  auto out = array<float>(64);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 20 << 10;
  return cudaLaunchKernelEx(&config, static_beside_dynamic, out.get());
}

__global__ void dynamic_peer(float* out) {
  GENREC_DYNAMIC_SHARED(float, s);
  const unsigned t = threadIdx.x;
  s[t] = static_cast<float>(blockIdx.x * 32 + t);
  cluster_sync();
  out[blockIdx.x * 32 + t] = cluster_peer(s, 1 - cluster_rank())[31 - t];
  cluster_sync();
}

int run_dynamic_peer() {
  auto out = array<float>(128);
  Launch how = with_shared(4, 32, 32 * sizeof(float));
  how.cluster = 2;
  const int code = launch(dynamic_peer, how, out.get());
  bool right = true;
  for (int i = 0; i < 128; ++i)
    right = right && out[i] == static_cast<float>((i ^ 32) / 32 * 32 + 31 - i % 32);
  return verdict(code, right);
}

// ---- the shapes of this project's kernels, each with one slip ----

enum class Slip { none, no_barrier, aligned_head, long_tail };

// A row's sum: vectors of four where the row allows, a head before, a tail after.
__global__ void sum_row(const float* x, int V, float* out, Slip slip) {
  GENREC_SHARED(float, parts, 64);
  const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int offset = static_cast<int>(reinterpret_cast<uintptr_t>(x) / sizeof(float) % 4);
  const int head = slip == Slip::aligned_head ? 0 : offset == 0 ? 0 : min(4 - offset, V);
  const int vectors = (V - head) / 4, tail = head + 4 * vectors;
  const int end = slip == Slip::long_tail ? V + 1 : V;
  float sum = 0;
  if (t < head) sum += x[t];
  for (int i = t; i < vectors; i += threads) {
    const float4 v = reinterpret_cast<const float4*>(x + head)[i];
    sum += v.x + v.y + v.z + v.w;
  }
  if (tail + t < end) sum += x[tail + t];
  parts[t] = sum;
  for (int width = threads / 2; width > 0; width /= 2) {
    if (slip != Slip::no_barrier) __syncthreads();
    if (t < width) parts[t] += parts[t + width];
  }
  if (t == 0) *out = parts[0];
}

template <Slip kSlip>
int run_sum_row() {
  bool right = true;
  int code = 0;
  for (int offset = 0; offset < 4 && code == 0; ++offset)
    for (int V : {1, 2, 3, 5, 256, 1001, 1003}) {
      auto x = array<float>(static_cast<size_t>(offset + V), 1.0f);
      auto out = array<float>(1);
      code = launch(sum_row, {1, 64}, x.get() + offset, V, out.get(), kSlip);
      right = right && out[0] == static_cast<float>(V);
      if (code != 0) break;
    }
  return verdict(code, right);
}

// The gradient of a row over its own logits.  Reading the token's logit in every
// thread races with the thread that overwrites it.
__global__ void gradient_in_place(float* x, int V, int token, bool first) {
  GENREC_SHARED(float, chosen, 1);
  if (threadIdx.x == 0) chosen[0] = x[token];
  __syncthreads();
  for (int v = static_cast<int>(threadIdx.x); v < V; v += static_cast<int>(blockDim.x))
    x[v] = x[v] - (first ? chosen[0] : x[token]);
}

template <bool kFirst>
int run_in_place() {
  auto x = array<float>(500, 3.0f);
  const int code = launch(gradient_in_place, {1, 128}, x.get(), 500, 77, kFirst);
  bool right = true;
  for (int v = 0; v < 500; ++v) right = right && x[v] == 0;
  return verdict(code, right);
}

__global__ void gather_columns(const float* x, int V, const int* columns, int n, float* out,
                               bool trusts) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    const int v = columns[i];
    out[i] = trusts || (v >= 0 && v < V) ? x[v] : 0.0f;
  }
}

template <bool kTrusts>
int run_gather() {
  auto x = array<float>(100, 1.0f), out = array<float>(40);
  auto columns = array<int>(40, 3);
  columns[20] = 100;
  return launch(gather_columns, {1, 32}, x.get(), 100, columns.get(), 40, out.get(), kTrusts);
}

// Two blocks share a row and both write the column where their shares meet.
__global__ void shares_overlap(float* x, int V, int extra) {
  const int share = V / static_cast<int>(gridDim.x), first = share * static_cast<int>(blockIdx.x);
  for (int v = first + static_cast<int>(threadIdx.x); v < min(V, first + share + extra);
       v += static_cast<int>(blockDim.x))
    x[v] = 1;
}

template <int kExtra>
int run_shares() {
  auto x = array<float>(256);
  const int code = launch(shares_overlap, {4, 32}, x.get(), 256, kExtra);
  bool right = true;
  for (int v = 0; v < 256; ++v) right = right && x[v] == 1;
  return verdict(code, right);
}

// ---- conversions ----

__global__ void convert_halves(const float* in, int n, uint16_t* out, float* back) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  out[i] = float_to_half_bits(in[i]);
  back[i] = half_bits_to_float(out[i]);
}

// Every half keeps its value, and what lies between two goes to the nearer, or to
// the even one.
int run_halves() {
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> values, wanted;
  const auto value = [](int bits) {  // of a finite positive half
    const int e = bits >> 10, f = bits & 1023;
    return e == 0 ? std::ldexp(static_cast<float>(f), -24)
                  : std::ldexp(static_cast<float>(1024 + f), e - 25);
  };
  for (int bits = 0; bits < 0x7c00; bits += 7) {
    const float a = value(bits), b = bits == 0x7bff ? 65536.0f : value(bits + 1);
    const float up = bits == 0x7bff ? infinity : b, middle = (a + b) / 2;
    const float even = bits % 2 == 0 ? a : up;
    for (float x : {a, std::nextafter(middle, a), middle, std::nextafter(middle, infinity)}) {
      const float nearest = x == middle ? even : x < middle ? a : up;
      values.insert(values.end(), {x, -x});
      wanted.insert(wanted.end(), {nearest, -nearest});
    }
  }
  for (float x : {65504.0f, 65519.996f, 65520.0f, 1e9f, infinity, 1e-30f, 0.0f}) {
    values.push_back(x);
    wanted.push_back(x >= 65520 ? infinity : x > 1 ? 65504.0f : 0.0f);
  }
  const int n = static_cast<int>(values.size());
  std::vector<uint16_t> out(values.size());
  std::vector<float> back(values.size());
  int code =
      launch(convert_halves, {(n + 255) / 256, 256}, values.data(), n, out.data(), back.data());
  bool right = true;
  for (int i = 0; i < n; ++i) right = right && back[i] == wanted[i];
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (code == 0) code = launch(convert_halves, {1, 1}, &nan, 1, out.data(), back.data());
  return verdict(code, right && back[0] != back[0]);
}

struct Case {
  const char* name;
  int (*run)();
};

const Case cases[] = {
    {"ok_swap_with_syncwarp", run_swap<2>},
    {"ok_reverse", run_reverse<true>},
    {"ok_broadcast", run_broadcast<true>},
    {"ok_last_block", run_last_block<true>},
    {"ok_counts", run_counts},
    {"ok_collectives", run_collectives},
    {"ok_dynamic_48_kib_and_more", run_dynamic<100 << 10>},
    {"ok_cluster", run_cluster<Stray::none>},
    {"ok_cluster_dynamic", run_dynamic_peer},
    {"ok_cluster_in_halves", run_halves_of_a_barrier<Halves::both>},
    {"ok_copies", run_copies<Copies::waited_for>},
    {"ok_sum_row", run_sum_row<Slip::none>},
    {"ok_in_place", run_in_place<true>},
    {"ok_gather", run_gather<false>},
    {"ok_shares", run_shares<0>},
    {"ok_halves", run_halves},
    {"two_blocks_write_one_word", run_two_blocks_one_word},
    {"missing_syncwarp", run_swap<0>},
    {"shuffle_as_fence", run_swap<1>},
    {"missing_syncthreads", run_reverse<false>},
    {"missing_barrier_in_reuse_loop", run_broadcast<false>},
    {"plain_beside_atomic", run_simple<plain_beside_atomic>},
    {"last_block_without_fence", run_last_block<false>},
    {"half_block_at_barrier", run_simple<half_block_at_barrier>},
    {"early_return_before_barrier", run_simple<early_return_before_barrier>},
    {"two_barriers", run_simple<two_barriers>},
    {"full_mask_in_half_a_warp", run_simple<full_mask_in_half_a_warp>},
    {"lane_outside_the_mask", run_simple<lane_outside_the_mask>},
    {"mask_lacks_the_caller", run_simple<mask_lacks_the_caller>},
    {"mask_of_lanes_never_there", run_simple<mask_of_lanes_never_there, 40>},
    {"two_collectives", run_simple<two_collectives>},
    {"wait_for_each_other", run_simple<wait_for_each_other>},
    {"wait_for_a_flag", run_simple<wait_for_a_flag>},
    {"word_never_written", run_never_written},
    {"wide_load_of_narrow_array", run_floats<wide_load_of_narrow_array>},
    {"past_a_static_array", run_floats<past_a_static_array>},
    {"past_a_static_array_by_pointer", run_floats<past_a_static_array_by_pointer>},
    {"dynamic_too_small", run_dynamic<64 * 400 * 4 - 4>},
    {"dynamic_over_the_limit", run_dynamic<300 << 10>},
    {"dynamic_without_attribute", run_without_attribute},
    {"static_beside_dynamic", run_static_beside_dynamic},
    {"static_too_large", run_simple<static_too_large>},
    {"shift_too_far", run_shift<32>},
    {"shift_negative", run_shift<-1>},
    {"read_past_the_end", run_copy<1, 0>},
    {"read_before_the_start", run_copy<-1, 0>},
    {"write_past_the_end", run_copy<0, 1>},
    {"peer_without_barrier", run_cluster<Stray::reads_early>},
    {"peer_before_its_start", run_cluster<Stray::writes_early>},
    {"peer_may_have_left", run_cluster<Stray::leaves_early>},
    {"peer_has_left", run_read_after_the_end},
    {"peer_beyond_the_cluster", run_cluster<Stray::beyond>},
    {"cluster_barrier_skipped", run_cluster<Stray::skips_a_barrier>},
    {"cluster_waits_alone", run_halves_of_a_barrier<Halves::wait_alone>},
    {"cluster_arrives_twice", run_halves_of_a_barrier<Halves::arrive_twice>},
    {"cluster_arrives_alone", run_halves_of_a_barrier<Halves::arrive_alone>},
    {"peer_before_the_wait", run_halves_of_a_barrier<Halves::read_between>},
    {"copy_read_too_early", run_copies<Copies::read_too_early>},
    {"copy_unaligned", run_copies<Copies::unaligned>},
    {"copy_left_behind", run_copies<Copies::left_behind>},
    {"cluster_not_dividing", run_shape<6, 32, 4>},
    {"cluster_too_large", run_shape<16, 32, 16>},
    {"too_many_threads", run_shape<1, 1025, 1>},
    {"row_sum_without_barrier", run_sum_row<Slip::no_barrier>},
    {"row_head_taken_for_aligned", run_sum_row<Slip::aligned_head>},
    {"row_tail_off_by_one", run_sum_row<Slip::long_tail>},
    {"in_place_reads_what_others_write", run_in_place<false>},
    {"column_not_checked", run_gather<true>},
    {"shares_overlap", run_shares<1>},
};

int run_one(const char* name) {
  for (const Case& c : cases) {
    if (std::strcmp(name, c.name) != 0) continue;
    const int code = c.run();
    if (code == kWrong) return std::printf("%s: wrong\n", name), 2;
    if (code == cudaSuccess) return std::printf("%s: ok\n", name), 0;
    std::printf("%s: %s\n", name, cudaGetErrorString(static_cast<cudaError_t>(code)));
    return 3;
  }
  return std::printf("%s: no such case\n", name), 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (const Case& c : cases) std::puts(c.name);
    return 0;
  }
  int worst = argc < 2 ? 1 : 0;
  for (int i = 1; i < argc; ++i) worst = std::max(worst, run_one(argv[i]));
  return worst;
}
