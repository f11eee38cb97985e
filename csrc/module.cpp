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

// Hands a vector's memory to numpy without a copy.
template <class T>
py::array_t<T> as_array(std::vector<T>&& values) {
  auto* held = new std::vector<T>(std::move(values));
  py::capsule owner(held, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(static_cast<py::ssize_t>(held->size()), held->data(), owner);
}

py::tuple build_trie(py::array_t<int64_t, py::array::c_style> codes) {
  if (codes.ndim() != 2)
    throw std::invalid_argument("codes must have shape [N, L], got " +
                                std::to_string(codes.ndim()) + " dimensions");
  const int64_t *data = codes.data(), N = codes.shape(0), L = codes.shape(1);
  genrec::trie::Built built;
  {
    py::gil_scoped_release release;
    built = genrec::trie::build(data, N, L);
  }
  py::list first_child, labels;
  for (auto& level : built.levels) {
    first_child.append(as_array(std::move(level.first_child)));
    labels.append(as_array(std::move(level.codes)));
  }
  return py::make_tuple(as_array(std::move(built.order)), first_child, labels,
                        as_array(std::move(built.first_item)));
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
  m.def("build_trie", &build_trie, py::arg("codes"),
        "codes [N, L] int64 -> (order [N], first_child per level, codes per level, first_item)");
  m.def("build_facts", &build_facts, "What was built: versions, instruction sets, architectures.");
  m.def(
      "instruction_set", [] { return genrec::isa_name(genrec::active_isa()); },
      "The instruction set that CPU kernels run on in this process.");
}
