# torch_stable: what the operator libraries need of torch, by path.
#
# Not find_package(Torch): the stable ABI takes one include directory and two
# libraries, while TorchConfig.cmake of a CUDA build of torch stops where no
# CUDA toolkit is installed.
if(NOT EXISTS "${GENREC_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "GENREC_TORCH_DIR=${GENREC_TORCH_DIR} is no torch package with the stable "
                      "ABI; genrec needs torch 2.11 or later.")
endif()
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${GENREC_TORCH_DIR}/include")
# 2.11: the oldest torch that the libraries will load on.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_link_directories(torch_stable INTERFACE "${GENREC_TORCH_DIR}/lib")
target_link_libraries(torch_stable INTERFACE torch_cpu c10)
