// CPU kernels of constrained decoding.  Compiled once an instruction set;
// torch-free.  A step is two loops: each live beam's row is normalised, then
// each user's candidates (the children of its beams) compete.
#include <cstdlib>
#include <cstring>

#include "common/row.h"
#include "trie/kernels.h"

namespace genrec::GENREC_ISA {
namespace {

using namespace genrec::trie;

// A beam without a node or without a score continues nowhere.
bool alive(const BeamStepArgs& a, int64_t row) {
  return a.nodes[row] >= 0 && a.scores[row] > -INFINITY;
}

bool allowed(const BeamStepArgs& a, int64_t user, int64_t node) {
  return a.forbidden == nullptr || !a.forbidden[user * a.forbidden_stride + node];
}

// The normaliser over a node's allowed children, for softmax = "children".
template <class T>
Normalizer<float> normalize_children(const BeamStepArgs& a, const T* x, int64_t user, int64_t begin,
                                     int64_t end) {
  float block[kBlock];
  RunningSum run;
  int64_t n = 0;
  for (int64_t child = begin; child < end; ++child) {
    if (!allowed(a, user, child)) continue;
    block[n++] = to_float(x[a.labels[child]]);
    if (n == kBlock) add_block<false>(run, block, n, a.inv_temperature, nullptr), n = 0;
  }
  if (n > 0) add_block<false>(run, block, n, a.inv_temperature, nullptr);
  return finish(run);
}

template <class T>
void normalize_beams(const BeamStepArgs& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    if (!alive(a, row)) continue;
    const T* x = static_cast<const T*>(a.logits) + row * a.stride;
    Normalizer<float> z;
    switch (a.softmax) {
      case Softmax::vocab: z = normalize(RowView<T>{x, nullptr, a.V}, a.inv_temperature); break;
      case Softmax::level:
        z = normalize(RowView<T>{x + a.level_begin, nullptr, a.level_end - a.level_begin},
                      a.inv_temperature);
        break;
      default:
        z = normalize_children(a, x, row / a.W, a.first_child[a.nodes[row]],
                               a.first_child[a.nodes[row] + 1]);
    }
    // A level without columns has no probabilities to give.
    if (a.softmax == Softmax::level && a.level_begin == a.level_end) z.log_sum = NAN;
    a.norms[2 * row] = z.top;
    a.norms[2 * row + 1] = z.log_sum;
  }
}

struct Candidate {
  float score;
  int32_t parent;
  int64_t node;  // ascending within a parent, as its label is
};

// Score falls; ties go to the earlier parent, then to the lower token.
bool before(const Candidate& x, const Candidate& y) {
  if (x.score != y.score) return x.score > y.score;
  if (x.parent != y.parent) return x.parent < y.parent;
  return x.node < y.node;
}

// Leaves the best k of c[0 .. n) in front, in any order.  Quickselect; `before`
// is a strict order without equals, so the outcome does not depend on the pivots.
void keep_best(Candidate* c, int64_t n, int64_t k) {
  int64_t low = 0, high = n;
  while (high - low > 1) {
    const Candidate first = c[low], middle = c[low + (high - low) / 2], last = c[high - 1];
    const Candidate pivot = before(first, middle) ? (before(middle, last)  ? middle
                                                     : before(first, last) ? last
                                                                           : first)
                                                  : (before(first, last)    ? first
                                                     : before(middle, last) ? last
                                                                            : middle);
    int64_t i = low, j = high - 1;
    while (i <= j) {
      while (before(c[i], pivot)) ++i;
      while (before(pivot, c[j])) --j;
      if (i <= j) {
        const Candidate swap = c[i];
        c[i++] = c[j];
        c[j--] = swap;
      }
    }
    if (k <= j)
      high = j + 1;
    else if (k > i)
      low = i;
    else
      return;
  }
}

int compare(const void* x, const void* y) {
  const Candidate &a = *static_cast<const Candidate*>(x), &b = *static_cast<const Candidate*>(y);
  return before(a, b) ? -1 : before(b, a) ? 1 : 0;
}

template <class T>
void select_beams(const BeamStepArgs& a, int64_t first_user, int64_t last_user) {
  // The pool holds the best so far and newcomers that beat the worst of them;
  // when it is full, it is cut back to the best.
  const int64_t capacity = 4 * a.width + 1024;
  Candidate* pool =
      static_cast<Candidate*>(std::malloc(sizeof(Candidate) * static_cast<size_t>(capacity)));
  for (int64_t user = first_user; user < last_user; ++user) {
    int64_t n = 0;
    float worst = -INFINITY;  // only a score above this can still enter
    for (int64_t beam = 0; beam < a.W; ++beam) {
      const int64_t row = user * a.W + beam;
      if (!alive(a, row)) continue;
      const T* x = static_cast<const T*>(a.logits) + row * a.stride;
      const float top = a.norms[2 * row], log_sum = a.norms[2 * row + 1], score = a.scores[row];
      const int64_t end = a.first_child[a.nodes[row] + 1];
      for (int64_t child = a.first_child[a.nodes[row]]; child < end; ++child) {
        const float logp = (to_float(x[a.labels[child]]) - top) * a.inv_temperature - log_sum;
        const float total = score + logp;
        // Later candidates lose ties, so equal scores need not enter.  NaN never does.
        if (!(total > worst) || !allowed(a, user, child)) continue;
        pool[n++] = {total, static_cast<int32_t>(beam), child};
        if (n == capacity) {
          keep_best(pool, n, a.width);
          n = a.width;
          worst = pool[0].score;
          for (int64_t i = 1; i < n; ++i) worst = pool[i].score < worst ? pool[i].score : worst;
        }
      }
    }
    if (n > a.width) {
      keep_best(pool, n, a.width);
      n = a.width;
    }
    std::qsort(pool, static_cast<size_t>(n), sizeof(Candidate), compare);
    for (int64_t i = 0; i < a.width; ++i) {
      const int64_t o = user * a.width + i;
      const bool real = i < n;
      a.out_scores[o] = real ? pool[i].score : -INFINITY;
      a.out_parent[o] = real ? pool[i].parent : -1;
      a.out_token[o] = real ? a.labels[pool[i].node] : -1;
      a.out_node[o] = real ? pool[i].node : -1;
    }
  }
  std::free(pool);
}

// Calls f<T>() for the element type that `type` names.
template <class F>
void by_dtype(DType type, const F& f) {
  switch (type) {
    case DType::bf16: return f.template operator()<bf16_t>();
    case DType::f16: return f.template operator()<f16_t>();
    default: return f.template operator()<float>();
  }
}

void normalize_any(const BeamStepArgs& a, int64_t first, int64_t last) {
  by_dtype(a.dtype, [&]<class T>() { normalize_beams<T>(a, first, last); });
}
void select_any(const BeamStepArgs& a, int64_t first, int64_t last) {
  by_dtype(a.dtype, [&]<class T>() { select_beams<T>(a, first, last); });
}

}  // namespace

// Declared in trie.cpp for each instruction set that was built.
extern const trie::CpuKernels trie_kernels;
const trie::CpuKernels trie_kernels{normalize_any, select_any};

}  // namespace genrec::GENREC_ISA
