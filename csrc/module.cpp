// genrec_ext._C: what Python needs of C++ besides operators.  Torch-free, so it
// loads, and can say what is wrong, where torch or the operator libraries cannot.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "common/isa.h"
#include "trie/build.h"
#include "trie/edit.h"

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

py::tuple arrays_of(genrec::trie::Built&& built) {
  py::list first_child;
  for (auto& level : built.first_child) first_child.append(as_numpy(std::move(level)));
  return py::make_tuple(first_child, as_numpy(std::move(built.labels)),
                        as_numpy(std::move(built.items)), as_numpy(std::move(built.repeats)));
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
  return arrays_of(std::move(built));
}

template <class T>
void define_build_trie(py::module_& m) {
  m.def("build_trie", &build_trie<T>, py::arg("codes").noconvert(), py::arg("offsets"),
        py::arg("sizes"), py::arg("threads"),
        "codes [N, L] int32 or int64, offsets [L], sizes [L] -> (first_child per level, labels, "
        "items [N], repeats); see csrc/trie/build.h");
}

// ---- edits: csrc/trie/edit.h, on arrays that the Python side has checked ----

// The memory of an array that must be one of T already: a converted copy would be
// gone before it is used.
template <class T>
T* data_of(const py::handle& array, const char* name, int64_t size = -1) {
  using Exact = py::array_t<T, py::array::c_style>;
  if (!py::isinstance<Exact>(array))
    throw py::type_error(std::string(name) + " is not a contiguous array of its type");
  const auto exact = py::reinterpret_borrow<Exact>(array);
  if (size >= 0 && exact.size() != size)
    throw std::invalid_argument(std::string(name) + " must have " + std::to_string(size) +
                                " entries, got " + std::to_string(exact.size()));
  return const_cast<T*>(exact.data());
}

int64_t size_of(const py::handle& array) { return py::reinterpret_borrow<py::array>(array).size(); }

genrec::trie::View view_of(const py::tuple& arrays) {
  if (arrays.size() != 4)
    throw std::invalid_argument("a trie is (first_child, labels, items, repeats)");
  genrec::trie::View view;
  for (const py::handle& first : py::reinterpret_borrow<py::sequence>(arrays[0])) {
    view.first_child.push_back(data_of<int32_t>(first, "first_child"));
    view.nodes.push_back(size_of(first) - 1);
  }
  view.labels = data_of<int32_t>(arrays[1], "labels");
  view.items = data_of<int32_t>(arrays[2], "items");
  view.repeats = data_of<int32_t>(arrays[3], "repeats");
  view.N = size_of(arrays[2]);
  view.nodes.push_back(view.N - size_of(arrays[3]));
  return view;
}

// Rows of closed bits, M of them in each array.  As uint32: bits have no sign.
std::vector<uint32_t*> bits_of(const genrec::trie::View& view, const py::list& rows, int64_t M) {
  if (static_cast<int64_t>(rows.size()) != view.levels() + 1)
    throw std::invalid_argument("bits must have " + std::to_string(view.levels() + 1) + " rows");
  std::vector<uint32_t*> result;
  for (int64_t l = 0; l <= view.levels(); ++l)
    result.push_back(reinterpret_cast<uint32_t*>(
        data_of<int32_t>(rows[l], "bits", M * genrec::trie::words(view.bits(l)))));
  return result;
}

py::array_t<int32_t> place_items(const py::array_t<int32_t, py::array::c_style>& items,
                                 int64_t threads) {
  const int32_t* from = items.data();
  const int64_t N = items.size();
  genrec::trie::Array<int32_t> place_of;
  {
    py::gil_scoped_release release;
    place_of = genrec::trie::place_items(from, N, threads);
  }
  return as_numpy(std::move(place_of));
}

int64_t close_items(const py::tuple& trie, const py::array& allowed, const py::object& also,
                    const py::list& bits, int64_t threads) {
  const genrec::trie::View view = view_of(trie);
  const auto rows = bits_of(view, bits, 1);
  const bool* open = data_of<bool>(allowed, "allowed", view.N);
  const uint32_t* more = nullptr;
  if (!also.is_none())
    more = reinterpret_cast<const uint32_t*>(
        data_of<int32_t>(also, "also", genrec::trie::words(view.N)));
  py::gil_scoped_release release;
  return genrec::trie::close_items(view, open, more, rows, threads);
}

int64_t set_places(const py::tuple& trie, const py::array& places, bool closed,
                   const py::list& bits) {
  const genrec::trie::View view = view_of(trie);
  const auto rows = bits_of(view, bits, 1);
  const int64_t* data = data_of<int64_t>(places, "places");
  const int64_t K = places.size();
  py::gil_scoped_release release;
  return genrec::trie::set_places(view, data, K, closed, rows);
}

py::list take_items(const py::tuple& trie, const py::array& place_of, const py::array& seen,
                    const std::optional<py::list>& bits, int64_t M, const py::object& row_of,
                    int64_t threads) {
  const genrec::trie::View view = view_of(trie);
  if (seen.ndim() != 2) throw std::invalid_argument("seen must have shape [U, S]");
  const int64_t U = seen.shape(0), S = seen.shape(1);
  std::vector<const uint32_t*> rows;
  if (bits)
    for (const uint32_t* row : bits_of(view, *bits, M)) rows.push_back(row);
  const int32_t* places = data_of<int32_t>(place_of, "place_of", view.N);
  const int64_t* items = data_of<int64_t>(seen, "seen");
  const int64_t* row = row_of.is_none() ? nullptr : data_of<int64_t>(row_of, "row", U);
  genrec::trie::Taken taken;
  {
    py::gil_scoped_release release;
    taken = genrec::trie::take_items(view, places, items, U, S, bits ? &rows : nullptr, M, row,
                                     threads);
  }
  py::list result;
  for (size_t l = 0; l < taken.nodes.size(); ++l)
    result.append(
        py::make_tuple(py::array_t<int32_t>(static_cast<py::ssize_t>(taken.nodes[l].size()),
                                            taken.nodes[l].data()),
                       py::array_t<int64_t>(static_cast<py::ssize_t>(taken.begin[l].size()),
                                            taken.begin[l].data())));
  return result;
}

py::tuple merge_tries(const py::tuple& base, const py::tuple& more,
                      const std::optional<py::list>& bits, int64_t threads) {
  const genrec::trie::View a = view_of(base), b = view_of(more);
  std::vector<const uint32_t*> rows;
  if (bits)
    for (const uint32_t* row : bits_of(a, *bits, 1)) rows.push_back(row);
  genrec::trie::Merged merged;
  {
    py::gil_scoped_release release;
    merged = genrec::trie::merge(a, b, bits ? &rows : nullptr, threads);
  }
  py::list carried;
  for (auto& row : merged.bits) carried.append(as_numpy(std::move(row)).attr("view")("int32"));
  return py::make_tuple(arrays_of(std::move(merged.trie)),
                        bits ? py::object(carried) : py::object(py::none()));
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
  m.doc() = "Trie builder, its edits and build facts of genrec_ext; needs no torch.";
  define_build_trie<int32_t>(m);
  define_build_trie<int64_t>(m);
  m.def("place_items", &place_items, py::arg("items").noconvert(), py::arg("threads"),
        "items [N] -> place_of [N] int32, its inverse.");
  m.def("close_items", &close_items, py::arg("trie"), py::arg("allowed"), py::arg("also"),
        py::arg("bits"), py::arg("threads"),
        "Writes bits, of what allowed [N] bool and also (bits by place, or None) leave open -> how "
        "many items are closed.");
  m.def("set_places", &set_places, py::arg("trie"), py::arg("places"), py::arg("closed"),
        py::arg("bits"), "Closes or opens items by place, in bits -> how many changed.");
  m.def("take_items", &take_items, py::arg("trie"), py::arg("place_of"), py::arg("seen"),
        py::arg("bits"), py::arg("rows"), py::arg("row_of"), py::arg("threads"),
        "seen [U, S] int64 -> for each row of bits (nodes int32, begin [U + 1] int64).");
  m.def("merge_tries", &merge_tries, py::arg("base"), py::arg("more"), py::arg("bits"),
        py::arg("threads"), "-> (the arrays of both, bits or None).");
  m.def("build_facts", &build_facts, "What was built: versions, instruction sets, architectures.");
  m.def(
      "instruction_set", [] { return genrec::isa_name(genrec::active_isa()); },
      "The instruction set that CPU kernels run on in this process.");
}
