// The decoding kernels on random cases, against their definition in float64
// written below: `check_trie TRIALS [SEED]` exits with 0 where all agree and says
// what does not.
#include <algorithm>
#include <cstdlib>
#include <tuple>
#include <vector>

#include "simulator/check.h"
#include "trie/gumbel.h"
#include "trie/kernels.h"

namespace genrec::trie {

extern const CudaKernels trie_cuda_kernels;

namespace {

using namespace genrec::check;

// Exactly as large as its contract says; null where it is empty and optional.
template <class V>
class Array {
 public:
  explicit Array(int64_t n) : n_(n), values_(new V[static_cast<size_t>(n)]()) {}
  V& operator[](int64_t i) { return values_[static_cast<size_t>(i)]; }
  const V& operator[](int64_t i) const { return values_[static_cast<size_t>(i)]; }
  V* data() const { return values_.get(); }
  int64_t size() const { return n_; }

 private:
  int64_t n_;
  std::unique_ptr<V[]> values_;
};

struct Shape {
  int64_t U, W, V, width, most;  // most: the largest fan-out
};
// Clusters of several sizes and none, one beam, wide fan-outs, more candidates than a block
// holds, more winners than fit shared memory, beams whose number takes two digits, more
// candidates than a warp holds.
constexpr Shape kLarge[] = {
    {1, 40, 300, 50, 40},     {3, 7, 70, 9, 70},        {2, 1, 3000, 20, 3000},
    {1, 70, 64, 1500, 60},    {5, 3, 1000, 5, 9},       {1, 16, 2100, 300, 900},
    {1, 1100, 2, 1050, 2},    {1, 16, 2100, 100, 2000}, {1, 256, 9, 256, 9},
    {70, 2, 40, 3, 40},       {3, 5, 70, 300, 70},      {1, 200, 200, 7, 180},
    {1, 20, 1500, 128, 1500},
};
constexpr int64_t kLargeShapes = sizeof kLarge / sizeof kLarge[0];

// Philox4x32-10, written a second time.
uint32_t first_word(uint64_t seed, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint64_t key = seed;
  for (int round = 0; round < 10; ++round) {
    const uint64_t x = 0xD2511F53ull * a, y = 0xCD9E8D57ull * c;
    const uint32_t next[4] = {
        static_cast<uint32_t>((y >> 32) ^ b ^ (key & 0xffffffffu)), static_cast<uint32_t>(y),
        static_cast<uint32_t>((x >> 32) ^ d ^ (key >> 32)), static_cast<uint32_t>(x)};
    a = next[0], b = next[1], c = next[2], d = next[3];
    key = ((key + 0x9E3779B9ull) & 0xffffffffull) | (((key >> 32) + 0xBB67AE85ull) & 0xffffffffull)
                                                        << 32;
  }
  return a;
}

double noise_of(uint32_t word) {
  const double u = (word + 0.5) / 4294967296.0;
  return -std::log(-std::log1p(-u));
}

double noise(uint64_t seed, int64_t user, uint32_t level, int64_t node) {
  return noise_of(
      first_word(seed, static_cast<uint32_t>(node), level, static_cast<uint32_t>(user), 0));
}

double carried(double g, double top, double parent) {
  if (!(g < top)) return parent;
  const double rest = std::log(-std::expm1(g - top)), v = parent - g + rest;
  return (v > 0 ? g - rest : parent) - std::log1p(std::exp(-std::abs(v)));
}

// The noise's own arithmetic over all that it may meet: both ends of the words and
// what is between, and children far from their parent and next to each other.
void check_noise(Random& random) {
  const auto check_word = [](uint32_t word) {
    const double want = noise_of(word);
    expect("noise of word", word, gumbel_of(word), want, 3e-7 * (1 + std::abs(want)));
  };
  for (uint32_t i = 0; i < 2000; ++i)
    for (const uint32_t end : {0u, 1u << 24, 1u << 31})
      check_word(end + i), check_word(end - 1 - i);
  for (int i = 0; i < 4000; ++i) check_word(static_cast<uint32_t>(random.next()));
  for (int i = 0; i < 4000; ++i) {
    const double reach[] = {1, 30, 1e4, 1e30};
    const float parent = static_cast<float>(reach[random.below(4)] * random.normal());
    const float top = static_cast<float>(reach[random.below(3)] * random.normal());
    const float g = top - static_cast<float>(std::exp(25 * random.uniform() - 17));
    for (const float last : {parent, INFINITY, top, g}) {
      const double want = carried(g, top, last);
      expect("carried", i, carried_down(g, top, last), want, 2e-6 * (1 + std::abs(want)));
      // A child that is larger by more than rounding stays so.
      const float h = g + 0.5f * (top - g), low = carried_down(g, top, last);
      if (carried_down(h, top, last) < low) complain("children change their order");
      if (low > last) complain("a child above its parent");
    }
    expect("largest", i, carried_down(top, top, parent), parent, 0);
    expect("none", i, carried_down(g, top, -INFINITY), -kInf, 0);
  }
}

struct Candidate {
  double key, score;
  int64_t parent, node;
};

void check_step(Random& random, DType dtype) {
  Shape s{1 + random.below(4), 1 + random.below(12), 2 + random.below(60), 1 + random.below(20),
          1 + random.below(12)};
  if (random.large >= 0) s = kLarge[random.large];
  StepArgs a;
  a.dtype = dtype;
  a.U = s.U, a.W = s.W, a.V = s.V, a.width = s.width;
  // The last of the large shapes: one beam has all winners, in a single warp where there are
  // no clusters.
  const bool crowd = random.large == kLargeShapes - 1;
  a.sampling = !crowd && random.one_in(3);
  a.softmax = a.sampling ? Softmax::children : static_cast<Softmax>(random.below(3));
  a.level = static_cast<uint32_t>(random.below(9));
  a.seed = random.next();
  a.inv_temperature = static_cast<float>(0.5 + random.uniform());
  a.level_begin = random.below(a.V / 2 + 1);
  a.level_end = random.one_in(9) ? a.level_begin : a.V - random.below(a.V / 3 + 1);
  // One value everywhere: every score a tie, and the order by parent and node alone.
  const bool ties = !crowd && !a.sampling && (s.W > 1000 || random.one_in(4));
  trial_text += "U=" + std::to_string(a.U) + " W=" + std::to_string(a.W) +
                " V=" + std::to_string(a.V) + " width=" + std::to_string(a.width) +
                (a.sampling ? " sampling" : "") + (ties ? " ties" : "") +
                " softmax=" + std::to_string(static_cast<int>(a.softmax));

  // ---- a level of a trie ----
  a.level_nodes = 1 + random.below(30);
  Array<int32_t> first_child(a.level_nodes + 1);
  std::vector<int32_t> labels_list;
  for (int64_t node = 0; node < a.level_nodes; ++node) {
    const int64_t fan = std::min<int64_t>(a.V, crowd  ? s.most
                                               : ties ? (s.most > 1000 ? s.most : 3)
                                                      : random.below(s.most + 1));
    std::vector<int32_t> columns;
    if (random.one_in(3)) {  // side by side
      const int64_t at = random.below(a.V - fan + 1);
      for (int64_t i = 0; i < fan; ++i) columns.push_back(static_cast<int32_t>(at + i));
    } else {
      for (int64_t v = 0; v < a.V && static_cast<int64_t>(columns.size()) < fan; ++v)
        if (random.below(a.V - v) < fan - static_cast<int64_t>(columns.size()))
          columns.push_back(static_cast<int32_t>(v));
    }
    labels_list.insert(labels_list.end(), columns.begin(), columns.end());
    first_child[node + 1] = static_cast<int32_t>(labels_list.size());
  }
  a.next_nodes = static_cast<int64_t>(labels_list.size());
  Array<int32_t> labels(a.next_nodes);
  std::copy(labels_list.begin(), labels_list.end(), labels.data());
  // Columns that the logits do not have, and nodes that the level does not have, are no children.
  const bool foreign = !ties && random.one_in(5);
  if (foreign)
    for (int64_t i = 0; i < a.next_nodes; ++i)
      if (random.one_in(9)) labels[i] = random.one_in(2) ? -1 : static_cast<int32_t>(a.V + 3);
  a.first_child = first_child.data();
  a.labels = labels.data();

  // ---- beams and logits ----
  const int64_t rows = a.U * a.W;
  a.stride = a.V + random.below(5);
  const int64_t lead = random.below(8);
  Buffer logits(dtype, lead + (rows - 1) * a.stride + a.V);
  Array<float> scores(rows), perturbed(rows);
  Array<int64_t> nodes(rows);
  const bool special = !ties && random.one_in(3);
  // A few values everywhere: many ties among what wins.  And one beam that has all winners.
  const int64_t values = random.one_in(4) ? 2 + random.below(30) : 0;
  const int64_t ahead = crowd || (!ties && random.one_in(4)) ? random.below(s.W) : -1;
  for (int64_t i = 0; i < logits.size(); ++i)
    logits.set(i, ties         ? 0.5
                  : values > 0 ? 0.25 * static_cast<double>(random.below(values))
                               : 3 * random.normal());
  for (int64_t row = 0; row < rows; ++row) {
    scores[row] = ties                ? -1.f
                  : random.one_in(11) ? -INFINITY
                                      : static_cast<float>(-9 * random.uniform());
    if (ahead >= 0 && row % s.W != ahead) scores[row] -= 40;
    if (crowd && row % s.W == ahead) scores[row] = -1;
    perturbed[row] = scores[row] + static_cast<float>(random.normal());
    nodes[row] = !crowd && random.one_in(7) ? -1 : random.below(a.level_nodes);
    if (foreign && random.one_in(9)) nodes[row] = random.one_in(2) ? -5 : a.level_nodes;
    if (!special || !random.one_in(4)) continue;
    const int64_t from = lead + row * a.stride;
    switch (random.below(4)) {
      case 0: logits.set(from + random.below(a.V), kNan); break;
      case 1: logits.set(from + random.below(a.V), kInf); break;
      case 2:
        for (int64_t v = 0; v < a.V; ++v) logits.set(from + v, -kInf);
        break;
      default:
        for (int64_t v = 0; v < a.V; ++v)
          if (random.one_in(2)) logits.set(from + v, -kInf);
    }
  }
  a.logits = logits.at(lead);
  a.scores = scores.data();
  a.nodes = nodes.data();
  const bool root = a.sampling && random.one_in(2);
  a.perturbed = a.sampling && !root ? perturbed.data() : nullptr;

  // ---- filters ----
  Filter& f = a.filter;
  const bool shared = random.one_in(2);
  Array<bool> forbidden(shared ? a.next_nodes : a.U * a.next_nodes);
  for (int64_t i = 0; i < forbidden.size(); ++i) forbidden[i] = random.one_in(6);
  if (random.one_in(3))
    f.forbidden = forbidden.data(), f.forbidden_stride = shared ? 0 : a.next_nodes;
  f.closed_words = (a.next_nodes + 31) / 32;
  f.closed_rows = 1 + random.below(3);
  Array<int32_t> closed(f.closed_rows * f.closed_words);
  for (int64_t i = 0; i < closed.size(); ++i)
    closed[i] = static_cast<int32_t>(random.next() & random.next() & random.next());
  Array<int64_t> closed_row(a.U);
  for (int64_t u = 0; u < a.U; ++u) closed_row[u] = random.below(f.closed_rows + 2) - 1;
  if (random.one_in(3)) f.closed = closed.data();
  if (random.one_in(2)) f.closed_row = closed_row.data();
  Array<int64_t> taken_begin(a.U + 1);
  std::vector<int32_t> taken_list;
  for (int64_t u = 0; u < a.U; ++u) {
    for (int64_t node = 0; node < a.next_nodes; ++node)
      if (random.one_in(8)) taken_list.push_back(static_cast<int32_t>(node));
    taken_begin[u + 1] = static_cast<int64_t>(taken_list.size());
  }
  f.num_taken = static_cast<int64_t>(taken_list.size());
  Array<int32_t> taken(f.num_taken);
  std::copy(taken_list.begin(), taken_list.end(), taken.data());
  if (random.one_in(3)) f.taken = taken.data(), f.taken_begin = taken_begin.data();
  const auto may_enter = [&](int64_t u, int64_t node) {
    if (f.forbidden && f.forbidden[u * f.forbidden_stride + node]) return false;
    if (f.closed) {
      const int64_t row = f.closed_row ? closed_row[u] : 0;
      if (row >= 0 && row < f.closed_rows &&
          (static_cast<uint32_t>(closed[row * f.closed_words + node / 32]) >> (node % 32) & 1) != 0)
        return false;
    }
    return f.taken == nullptr || !std::binary_search(taken.data() + taken_begin[u],
                                                     taken.data() + taken_begin[u + 1], node);
  };

  // ---- the step, twice ----
  const int64_t n = a.U * a.width;
  struct Out {
    Array<float> scores, perturbed;
    Array<int64_t> parent, token, node;
    explicit Out(int64_t n) : scores(n), perturbed(n), parent(n), token(n), node(n) {}
  };
  const auto run = [&](Out& out) {
    Array<char> workspace(trie_cuda_kernels.workspace(a));
    std::memset(workspace.data(), 0x5b, static_cast<size_t>(workspace.size()));
    a.workspace = workspace.data();
    a.out_scores = out.scores.data();
    a.out_perturbed = a.sampling ? out.perturbed.data() : nullptr;
    a.out_parent = out.parent.data();
    a.out_token = out.token.data();
    a.out_node = out.node.data();
    expect_success("step", trie_cuda_kernels.step(a, nullptr));
  };
  Out out(n), again(n);
  run(out);
  const bool twice = random.one_in(3);
  if (twice) run(again);
  if (twice &&
      (std::memcmp(out.scores.data(), again.scores.data(),
                   sizeof(float) * static_cast<size_t>(n)) ||
       std::memcmp(out.node.data(), again.node.data(), sizeof(int64_t) * static_cast<size_t>(n)) ||
       std::memcmp(out.parent.data(), again.parent.data(),
                   sizeof(int64_t) * static_cast<size_t>(n))))
    complain("a second run differs");

  // ---- the definition ----
  for (int64_t u = 0; u < a.U; ++u) {
    std::vector<Candidate> all;
    for (int64_t w = 0; w < a.W; ++w) {
      const int64_t row = u * a.W + w, node = nodes[row];
      if (node < 0 || node >= a.level_nodes || !(scores[row] > -INFINITY)) continue;
      const auto x = [&](int64_t v) {
        return logits[lead + row * a.stride + v] * a.inv_temperature;
      };
      std::vector<int64_t> children;
      for (int64_t c = first_child[node]; c < first_child[node + 1]; ++c)
        if (labels[c] >= 0 && labels[c] < a.V && may_enter(u, c)) children.push_back(c);
      double top = -kInf, sum = 0;
      bool number = true;
      const auto each = [&](const auto& with) {
        if (a.softmax == Softmax::children)
          for (const int64_t c : children) with(x(labels[c]));
        else
          for (int64_t v = a.softmax == Softmax::vocab ? 0 : a.level_begin;
               v < (a.softmax == Softmax::vocab ? a.V : a.level_end); ++v)
            with(x(v));
      };
      each([&](double v) { number = number && v < kInf, top = std::max(top, v); });
      if (!number || top == -kInf) continue;
      each([&](double v) { sum += std::exp(v - top); });
      std::vector<Candidate> own;
      double largest = -kInf;
      for (const int64_t c : children) {
        const double score = scores[row] + x(labels[c]) - top - std::log(sum);
        if (!(score > -kInf)) continue;
        double key = score;
        if (a.sampling) key += noise(a.seed, u, a.level, c);
        largest = std::max(largest, key);
        own.push_back({key, score, w, c});
      }
      if (a.sampling) {
        const double parent =
            root ? scores[row] + noise(a.seed, u, 0xffffffffu, w) : perturbed[row];
        for (Candidate& c : own) c.key = carried(c.key, largest, parent);
      }
      all.insert(all.end(), own.begin(), own.end());
    }
    const int64_t kept = std::min<int64_t>(a.width, static_cast<int64_t>(all.size()));
    const double slack = a.sampling ? 2e-4 : 4e-6;
    std::sort(all.begin(), all.end(), [&](const Candidate& p, const Candidate& q) {
      // Ties to a float may differ in the last bits of their definition.
      const double by = ties ? std::round(1e4 * q.key) - std::round(1e4 * p.key) : q.key - p.key;
      return by != 0 ? by < 0 : std::tie(p.parent, p.node) < std::tie(q.parent, q.node);
    });
    for (int64_t i = 0; i < a.width; ++i) {
      const int64_t o = u * a.width + i;
      if (i >= kept) {
        expect("no score", o, out.scores[o], -kInf, 0);
        expect("no node", o, static_cast<double>(out.node[o]), -1, 0);
        expect("no parent", o, static_cast<double>(out.parent[o]), -1, 0);
        expect("no token", o, static_cast<double>(out.token[o]), -1, 0);
        if (a.sampling) expect("no perturbed", o, out.perturbed[o], -kInf, 0);
        continue;
      }
      const float key = a.sampling ? out.perturbed[o] : out.scores[o];
      // The i-th best of the definition, and a candidate that is there, and in order.
      expect("key", o, key, all[static_cast<size_t>(i)].key, slack * (1 + std::abs(key)));
      const auto own = std::find_if(all.begin(), all.end(), [&](const Candidate& c) {
        return c.parent == out.parent[o] && c.node == out.node[o];
      });
      if (own == all.end()) {
        complain("a candidate that is none");
        continue;
      }
      expect("own key", o, key, own->key, slack * (1 + std::abs(key)));
      expect("score", o, out.scores[o], own->score, 4e-6 * (1 + std::abs(own->score)));
      expect("token", o, static_cast<double>(out.token[o]), labels[own->node], 0);
      if (ties)
        expect("tie", o, static_cast<double>(out.node[o]),
               static_cast<double>(all[static_cast<size_t>(i)].node), 0);
      if (i == 0) continue;
      const float last = a.sampling ? out.perturbed[o - 1] : out.scores[o - 1];
      if (last < key || (last == key && std::tie(out.parent[o - 1], out.node[o - 1]) >=
                                            std::tie(out.parent[o], out.node[o])))
        complain("out of order, or twice");
    }
  }
}

}  // namespace
}  // namespace genrec::trie

int main(int argc, char** argv) {
  using namespace genrec::trie;
  using namespace genrec::check;
  using genrec::DType;
  const int trials = argc > 1 ? std::atoi(argv[1]) : 10;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  Random noise_random{seed, -1};
  check_noise(noise_random);
  for (int i = 0; i < trials; ++i)
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      Random random{seed * 1000003 + static_cast<uint64_t>(4 * i) + static_cast<uint64_t>(dtype),
                    -1};
      const std::string name = "trial " + std::to_string(i) + ": ";
      for (int small = 0; small < 2; ++small) {
        trial_text = name;
        check_step(random, dtype);
      }
      random.large = (3 * i + static_cast<int>(dtype)) % kLargeShapes;
      trial_text = name;
      check_step(random, dtype);
    }
  std::printf("%d trials, %d failures\n", trials, failures);
  return failures == 0 ? 0 : 1;
}
