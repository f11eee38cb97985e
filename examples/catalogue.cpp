// Reads a catalogue that genrec wrote (Trie.save, genrec export) and follows paths in it, in plain
// C++: no torch, no genrec.  docs/catalogue.md describes the arrays.
//
//   c++ -std=c++20 -O2 examples/catalogue.cpp -o catalogue
//   ./catalogue catalogue.safetensors 0 71 130 192    the items at these columns, one a level
//   ./catalogue catalogue.safetensors 0 71            the columns that may follow these
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

// A safetensors file: eight bytes of header length, a JSON header, the tensors end to end.
class Catalogue {
 public:
  explicit Catalogue(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    std::uint64_t length = 0;
    if (bytes_.size() >= 8) std::memcpy(&length, bytes_.data(), 8);
    if (bytes_.size() < 8 || length > bytes_.size() - 8)
      throw std::runtime_error(path + ": no safetensors file");
    header_.assign(bytes_.data() + 8, length);
    data_ = 8 + length;
    while (has("first_child." + std::to_string(first_child_.size())))
      first_child_.push_back(integers("first_child." + std::to_string(first_child_.size())));
    labels_ = integers("labels");
    items_ = integers("items");
    repeats_ = integers("repeats");
  }

  std::size_t levels() const { return first_child_.size(); }

  // The children of a node: they are numbered in one row within the level below, and the labels
  // of all levels' nodes but the root's stand one level after the other.
  std::vector<std::int64_t> columns(std::size_t level, std::int64_t node) const {
    const auto begin = labels_.begin() + start(level);
    return {begin + first_child_[level][node], begin + first_child_[level][node + 1]};
  }

  // The child of a node at a column, -1 where there is none.
  std::int64_t child(std::size_t level, std::int64_t node, std::int64_t column) const {
    const auto below = columns(level, node);
    const auto at = std::lower_bound(below.begin(), below.end(), column);
    if (at == below.end() || *at != column) return -1;
    return first_child_[level][node] + (at - below.begin());
  }

  // The items at a leaf: one, and one more for each time that the leaf stands in `repeats`.
  std::vector<std::int64_t> items(std::int64_t leaf) const {
    const auto [low, high] = std::equal_range(repeats_.begin(), repeats_.end(), leaf);
    const auto first = items_.begin() + leaf + (low - repeats_.begin());
    return {first, first + 1 + (high - low)};
  }

 private:
  bool has(const std::string& name) const {
    return header_.find("\"" + name + "\":{") != std::string::npos;
  }

  // An array of the file.  Its entry is {"dtype":"I32","shape":[n],"data_offsets":[begin,end]}; a
  // JSON library finds it too.
  std::vector<std::int64_t> integers(const std::string& name) const {
    const auto entry = header_.find("\"" + name + "\":{");
    if (entry == std::string::npos) throw std::runtime_error(name + ": not in the file");
    const auto offsets = header_.find("\"data_offsets\":[", entry) + 16;
    char* rest = nullptr;
    const auto begin = std::strtoull(header_.data() + offsets, &rest, 10);
    const auto end = std::strtoull(rest + 1, nullptr, 10);
    const bool wide = header_.compare(header_.find("\"dtype\":\"", entry) + 9, 3, "I64") == 0;
    const std::size_t each = wide ? 8 : 4;
    if (begin > end || data_ + end > bytes_.size())
      throw std::runtime_error(name + ": outside the file");
    std::vector<std::int64_t> values((end - begin) / each);
    for (std::size_t i = 0; i < values.size(); ++i) {
      std::int32_t narrow = 0;
      const char* source = bytes_.data() + data_ + begin + i * each;
      if (wide) {
        std::memcpy(&values[i], source, 8);
      } else {
        std::memcpy(&narrow, source, 4);
        values[i] = narrow;
      }
    }
    return values;
  }

  std::int64_t start(std::size_t level) const {
    std::int64_t sum = 0;
    for (std::size_t l = 0; l < level; ++l) sum += first_child_[l].back();
    return sum;
  }

  std::vector<char> bytes_;
  std::string header_;
  std::size_t data_ = 0;
  std::vector<std::vector<std::int64_t>> first_child_;
  std::vector<std::int64_t> labels_, items_, repeats_;
};

int main(int count, char** words) try {
  if (count < 2) throw std::runtime_error("usage: catalogue FILE [COLUMN ...]");
  const Catalogue catalogue(words[1]);
  std::int64_t node = 0;
  std::size_t level = 0;
  for (; level < std::size_t(count - 2); ++level) {
    if (level == catalogue.levels()) throw std::runtime_error("more columns than levels");
    node = catalogue.child(level, node, std::atoll(words[2 + level]));
    if (node < 0) throw std::runtime_error("no such path");
  }
  const bool leaf = level == catalogue.levels();
  for (const auto value : leaf ? catalogue.items(node) : catalogue.columns(level, node))
    std::cout << value << '\n';
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
