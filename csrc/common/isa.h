// Which instruction set the CPU kernels run on.
//
// A kernel source is compiled once for each set, into the namespace named by
// GENREC_ISA, and a table of function pointers is chosen here at run time.
// GENREC_ISA=baseline|avx2|avx512 in the environment forces a lower one.
#pragma once

namespace genrec {

enum class Isa : int { baseline, avx2, avx512 };

// The best set that was built, that this processor has and that the
// environment admits.  Decided once.
Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace genrec

// Inside namespace genrec: declares a family's tables of kernels, an object of this
// name in the namespace of each instruction set, and cpu_<name>(), the one to use.
#if defined(GENREC_X86)
#define GENREC_CPU_KERNELS(type, name)       \
  namespace baseline {                       \
  extern const type name;                    \
  }                                          \
  namespace avx2 {                           \
  extern const type name;                    \
  }                                          \
  namespace avx512 {                         \
  extern const type name;                    \
  }                                          \
  inline const type& cpu_##name() {          \
    switch (active_isa()) {                  \
      case Isa::avx512: return avx512::name; \
      case Isa::avx2: return avx2::name;     \
      default: return baseline::name;        \
    }                                        \
  }
#else
#define GENREC_CPU_KERNELS(type, name) \
  namespace baseline {                 \
  extern const type name;              \
  }                                    \
  inline const type& cpu_##name() { return baseline::name; }
#endif
