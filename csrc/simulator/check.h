// What the checks of all families share: random numbers, buffers of a type chosen
// at run time, and how a trial fails.  Every buffer is on the heap and exactly as
// large as its contract says, so that AddressSanitizer sees a step outside.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>

#include "common/dtype.h"
#include "simulator/cuda_simulator.h"

namespace genrec::check {

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// ---- numbers and buffers ----

struct Random {
  uint64_t state;
  int64_t large = -1;  // a shape of the family's large ones to take, or -1
  uint64_t next() {    // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  double normal() {
    return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform());
  }
};

inline size_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }
inline DType accumulator_of(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }
// Half a unit in the last place, and what a second rounding adds.
inline double epsilon(DType t) {
  switch (t) {
    case DType::f64: return 1.01 * 0x1p-53;
    case DType::f32: return 1.01 * 0x1p-24;
    case DType::bf16: return 1.01 * 0x1p-8;
    case DType::f16: return 1.01 * 0x1p-11;
  }
  return 0;
}

// Elements of a type chosen at run time, as doubles.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType type, int64_t n) : type_(type), n_(n), bytes_(new char[bytes()]) {
    std::memset(bytes_.get(), 0x5b, bytes());  // what is never written shows
  }
  Buffer(const Buffer& other) : Buffer(other.type_, other.n_) {
    std::memcpy(bytes_.get(), other.bytes_.get(), bytes());
  }
  Buffer& operator=(Buffer&&) = default;
  Buffer(Buffer&&) = default;
  int64_t size() const { return n_; }
  size_t bytes() const { return static_cast<size_t>(n_) * size_of(type_); }
  void* at(int64_t i) const { return bytes_.get() + static_cast<size_t>(i) * size_of(type_); }
  void* data() const { return at(0); }
  bool same_bits(const Buffer& other, int64_t i) const {
    return std::memcmp(at(i), other.at(i), size_of(type_)) == 0;
  }
  double operator[](int64_t i) const {
    uint16_t half = 0;
    float x = 0;
    double wide = 0;
    switch (type_) {
      case DType::f64: std::memcpy(&wide, at(i), 8); return wide;
      case DType::f32: std::memcpy(&x, at(i), 4); return x;
      case DType::f16: std::memcpy(&half, at(i), 2); return simulator::half_to_float(half);
      case DType::bf16: {
        std::memcpy(&half, at(i), 2);
        return simulator::bits_as<float>(static_cast<uint32_t>(half) << 16);
      }
    }
    return 0;
  }
  void set(int64_t i, double value) {
    const float x = static_cast<float>(value);
    uint16_t half = simulator::float_to_half(x);
    switch (type_) {
      case DType::f64: std::memcpy(at(i), &value, 8); break;
      case DType::f32: std::memcpy(at(i), &x, 4); break;
      case DType::bf16:
        half = static_cast<uint16_t>(simulator::bits_as<uint32_t>(x) >> 16);
        [[fallthrough]];
      case DType::f16: std::memcpy(at(i), &half, 2); break;
    }
  }

 private:
  DType type_ = DType::f32;
  int64_t n_ = 0;
  std::unique_ptr<char[]> bytes_;
};

// ---- what a trial is about, and how it fails ----

inline std::string trial_text;
inline int failures = 0;

inline void complain(const std::string& what) {
  if (++failures <= 5) std::printf("FAILED %s\n  in %s\n", what.c_str(), trial_text.c_str());
}

inline void expect(const char* what, int64_t i, double got, double want, double bound) {
  const bool right = want != want       ? got != got
                     : std::isinf(want) ? got == want
                                        : std::abs(got - want) <= bound;
  if (right) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s[%lld]: got %.9g, want %.9g within %.3g", what,
                static_cast<long long>(i), got, want, bound);
  complain(text);
}

inline void expect_success(const char* what, int code) {
  if (code != cudaSuccess)
    complain(std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(code)));
}

}  // namespace genrec::check
