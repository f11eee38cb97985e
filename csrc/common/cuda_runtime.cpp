#include "common/cuda_runtime.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace genrec {

// The one function that only a CUDA build of torch has is found at run time, so
// that this library links and loads on a CPU build too: its schemas and
// registrations are then tested where there is no GPU.
void* current_stream(int32_t device) {
  using Find = int32_t (*)(int32_t, void**);
  static const Find find = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return torch_cuda == nullptr
               ? nullptr
               : reinterpret_cast<Find>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (find == nullptr || find(device, &stream) != 0)
    throw std::runtime_error(
        "torch's current CUDA stream is not to be had: this torch has no CUDA");
  return stream;
}

void check_launch(int code) {
  if (code != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") +
                             cudaGetErrorString(static_cast<cudaError_t>(code)));
}

}  // namespace genrec
