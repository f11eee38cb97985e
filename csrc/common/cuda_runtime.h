// What the torch side of the CUDA library needs of CUDA: torch's current stream,
// and errors as exceptions.
#pragma once

#include <cstdint>

namespace genrec {

// The cudaStream_t that torch works on, on a device.
void* current_stream(int32_t device);

// Throws std::runtime_error with CUDA's own text unless `code` is cudaSuccess.
void check_launch(int code);

}  // namespace genrec
