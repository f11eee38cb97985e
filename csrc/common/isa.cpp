#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace genrec {

namespace {

Isa best_isa() {
#if defined(GENREC_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("GENREC_ISA");
  if (wanted == nullptr) return best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (isa <= best && std::strcmp(wanted, isa_name(isa)) == 0) return isa;
  return best;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace genrec
