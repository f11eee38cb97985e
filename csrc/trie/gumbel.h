// Gumbel noise of a node, and how it is carried down the tree: what the CPU and
// the CUDA kernels share.  Numbers come from a counter, so a draw depends on
// (seed, user, level, node) alone; logarithms are made here of additions and
// multiplications, so that both devices draw the same to rounding.
//
// Sampling without replacement by the k largest perturbed log-probabilities, top
// down: Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them",
// 2019 (arXiv 1903.06059), section 4.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/portable.h"

namespace genrec::trie {

// The first word of Philox4x32-10 (Salmon et al. 2011).
GENREC_HD uint32_t philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

GENREC_HD float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
GENREC_HD uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// log x for a normal x > 0, to about 2 ulp; about -88 for 0.
GENREC_HD float log_of(float x) {
  const uint32_t bits = bits_of_float(x);
  // x = 2^e m, m in [sqrt(1/2), sqrt(2)).
  const int32_t e = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float m = float_of_bits(bits - (static_cast<uint32_t>(e) << 23));
  // log m = 2 artanh s.
  const float s = (m - 1.f) / (m + 1.f), z = s * s;
  const float r = z * (0.66666667f + z * (0.4f + z * (0.28571429f + z * 0.22222222f)));
  const float n = static_cast<float>(e);
  return n * 0.693359375f + (n * -2.12194440e-4f + s * r) + 2.f * s;
}

// e^x for x <= 0; 0 where that is below the normal floats.
GENREC_HD float exp_of(float x) {
  const float held = x > -87.f ? x : -87.f;
  const float shifted = held * 1.44269504f + 12582912.f;  // rounds to the nearest integer
  const float n = shifted - 12582912.f;
  const float f = (held - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.f / 720;
  p = p * f + 1.f / 120;
  p = p * f + 1.f / 24;
  p = p * f + 1.f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.f;
  p = p * f + 1.f;
  const int32_t power = static_cast<int32_t>(n) + 127;
  const float scaled = p * float_of_bits(static_cast<uint32_t>(power) << 23);
  return x > -87.f ? scaled : 0.f;
}

// log(1 + y) for y > -1: the digits that 1 + y loses are put back.
GENREC_HD float log1p_of(float y) {
  const float w = 1.f + y;
  return log_of(w) + (y - (w - 1.f)) / w;
}

// log(1 - e^d) for d < 0.
GENREC_HD float log1mexp_of(float d) {
  // Near 0, 1 - e^d by its series; elsewhere it has its digits.
  float p = -1.f / 40320;
  p = p * d - 1.f / 5040;
  p = p * d - 1.f / 720;
  p = p * d - 1.f / 120;
  p = p * d - 1.f / 24;
  p = p * d - 1.f / 6;
  p = p * d - 0.5f;
  p = p * d - 1.f;
  const float near = log_of(p * d), far = log1p_of(-exp_of(d));
  return d > -0.69314718f ? near : far;
}

// A Gumbel variable of location 0, -log(-log(1 - u)), of a counter's word.
GENREC_HD float gumbel_of(uint32_t word) {
  // u in (0, 1) or, in the upper half, 1 - u: whichever is small has all its digits,
  // and so has the noise, from -3.14 to 22.87.
  const bool upper = (word >> 31) != 0;
  const float small = (static_cast<float>(upper ? ~word : word) + 0.5f) * 0x1p-32f;
  const float w = upper ? small : 1.f - small;
  const float lost = upper ? 0.f : (-small - (w - 1.f)) / w;  // as in log1p_of
  return -log_of(-(log_of(w) + lost));
}

GENREC_HD float gumbel(uint64_t seed, uint64_t user, uint32_t level, uint32_t node) {
  return gumbel_of(
      philox(seed, node, level, static_cast<uint32_t>(user), static_cast<uint32_t>(user >> 32)));
}

// The noise of a beam that no parent conditions.
GENREC_HD float root_gumbel(uint64_t seed, uint64_t user, int64_t beam) {
  return gumbel(seed, user, 0xffffffffu, static_cast<uint32_t>(beam));
}

// A child's perturbed log-probability g, given that the largest of its siblings'
// and its own, `top`, is to be the parent's:
//   -log(exp(-parent) - exp(-top) + exp(-g)).
// A parent of +inf leaves -log(exp(-g) - exp(-top)).
GENREC_HD float carried_down(float g, float top, float parent) {
  const float d = g - top;
  const float rest = log1mexp_of(d < 0.f ? d : -1.f);
  const float v = parent - g + rest;
  // parent - v, without the digits that a large parent would cost.
  const float lower = v > 0.f ? g - rest : parent;
  const float result = lower - log1p_of(exp_of(v > 0.f ? -v : v));
  return d < 0.f ? result : parent;
}

}  // namespace genrec::trie
