// How the CUDA library's torch side launches: on the tensor's device, on torch's
// stream there.
#pragma once

#include "common/cuda_runtime.h"
#include "common/torch_stable.h"

namespace genrec {

// Calls launch(stream), which returns a cudaError_t.
template <class Launch>
inline void launch_on_device_of(const Tensor& where, const Launch& launch) {
#if !defined(GENREC_SIMULATOR)  // whose device is the CPU
  const torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
#endif
  check_launch(launch(current_stream(where.get_device_index())));
}

}  // namespace genrec
