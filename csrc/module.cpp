// genrec_ext._C: what Python needs of C++ besides operators.  Torch-free, so it
// loads, and can say what is wrong, where torch or the operator libraries cannot.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "common/isa.h"
#include "trie/build.h"

namespace py = pybind11;

namespace {

// Hands an array's memory to numpy without a copy.
template <class T>
py::array_t<T> as_numpy(genrec::trie::Array<T>&& values) {
  T* data = values.data.get();
  py::capsule owner(data, [](void* p) { delete[] static_cast<T*>(p); });
  values.data.release();
  return py::array_t<T>(static_cast<py::ssize_t>(values.size), data, owner);
}

template <class T>
py::tuple build_trie(const py::array_t<T, py::array::c_style>& codes,
                     const std::vector<int64_t>& offsets, const std::vector<int64_t>& sizes,
                     int64_t threads) {
  if (codes.ndim() != 2)
    throw std::invalid_argument("codes must have shape [N, L], got " +
                                std::to_string(codes.ndim()) + " dimensions");
  const T* data = codes.data();
  const int64_t N = codes.shape(0), L = codes.shape(1);
  if (static_cast<int64_t>(offsets.size()) != L || static_cast<int64_t>(sizes.size()) != L)
    throw std::invalid_argument("offsets and sizes must have " + std::to_string(L) + " entries");
  genrec::trie::Built built;
  {
    py::gil_scoped_release release;
    built = genrec::trie::build(data, N, L, offsets.data(), sizes.data(), threads);
  }
  py::list first_child;
  for (auto& level : built.first_child) first_child.append(as_numpy(std::move(level)));
  return py::make_tuple(first_child, as_numpy(std::move(built.labels)),
                        as_numpy(std::move(built.items)), as_numpy(std::move(built.repeats)));
}

template <class T>
void define_build_trie(py::module_& m) {
  m.def("build_trie", &build_trie<T>, py::arg("codes").noconvert(), py::arg("offsets"),
        py::arg("sizes"), py::arg("threads"),
        "codes [N, L] int32 or int64, offsets [L], sizes [L] -> (first_child per level, labels, "
        "items [N], repeats); see csrc/trie/build.h");
}

py::dict build_facts() {
  py::dict facts;
  facts["version"] = GENREC_VERSION;
  facts["torch"] = GENREC_TORCH_VERSION;
  facts["compiler"] = GENREC_COMPILER;
  facts["cuda_architectures"] = GENREC_CUDA_ARCHS;  // "" where the CUDA library was not built
#if defined(GENREC_X86)
  facts["instruction_sets"] = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
  facts["instruction_sets"] = std::vector<std::string>{"baseline"};
#endif
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Trie builder and build facts of genrec_ext; needs no torch.";
  define_build_trie<int32_t>(m);
  define_build_trie<int64_t>(m);
  m.def("build_facts", &build_facts, "What was built: versions, instruction sets, architectures.");
  m.def(
      "instruction_set", [] { return genrec::isa_name(genrec::active_isa()); },
      "The instruction set that CPU kernels run on in this process.");
}
