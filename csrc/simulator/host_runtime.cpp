// common/cuda_runtime.h over the simulator: one stream, and its account of errors.
#include <stdexcept>
#include <string>

#include "common/cuda_runtime.h"
#include "simulator/cuda_simulator.h"

namespace genrec {

void* current_stream(int32_t) { return nullptr; }

void check_launch(int code) {
  if (code != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") +
                             cudaGetErrorString(static_cast<cudaError_t>(code)));
}

}  // namespace genrec
