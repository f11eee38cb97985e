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
