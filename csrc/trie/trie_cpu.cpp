// CPU kernels of constrained decoding.  Compiled once an instruction set;
// torch-free.
//
// A user's beams are taken in turn: a beam's row is normalised, and while it is
// in cache its children compete.  Those that beat the worst of the best so far
// enter a pool; when the pool is full, it is cut back to the best.  Candidates
// come, and stay, in order of (parent, token), so among equal scores the earlier
// ones are kept, and no sum depends on how the work is cut: equal input gives
// equal bits for any number of threads.
#include <cstdlib>
#include <cstring>

#include "common/row.h"
#include "trie/filter.h"
#include "trie/gumbel.h"
#include "trie/kernels.h"

namespace genrec::GENREC_ISA {
namespace {

using namespace genrec::trie;

GENREC_INLINE int count_lanes(uint32_t mask) { return __builtin_popcount(mask); }

template <class T>
T* allocate(int64_t n) {
  return static_cast<T*>(std::malloc(sizeof(T) * static_cast<size_t>(n)));
}

// Memory of a call: on the stack where `kNear` bytes are enough, since a small step is over
// before the heap has tidied up.
template <int64_t kNear>
class Memory {
 public:
  explicit Memory(int64_t bytes)
      : data_(bytes > kNear ? std::malloc(static_cast<size_t>(bytes)) : near_) {}
  Memory(const Memory&) = delete;
  ~Memory() {
    if (data_ != near_) std::free(data_);
  }
  void* data() { return data_; }

 private:
  alignas(64) unsigned char near_[kNear];
  void* data_;
};

// The two lists of `width` words that a user's best are sorted in.
class Words {
 public:
  explicit Words(int64_t width) : memory_(2 * width * static_cast<int64_t>(sizeof(uint64_t))) {}
  uint64_t* data() { return static_cast<uint64_t*>(memory_.data()); }

 private:
  Memory<int64_t{4} << 10> memory_;
};

// ---- the best so far ----

class Pool {
 public:
  explicit Pool(int64_t width)
      : width_(width),
        capacity_(2 * width + 64),
        // Vectors are added whole, and a pad of them ends the keys.
        room_(capacity_ + 2 * kLanes),
        memory_(4 * room_ * static_cast<int64_t>(sizeof(float))),
        key_(static_cast<float*>(memory_.data())),
        score_(key_ + room_),
        parent_(reinterpret_cast<int32_t*>(key_ + 2 * room_)),
        node_(reinterpret_cast<int32_t*>(key_ + 3 * room_)) {}

  void clear() { n_ = 0, worst_ = -INFINITY; }
  int64_t size() const { return n_; }
  // Only a key above this can still enter.
  float worst() const { return worst_; }

  // Adds the lanes of the mask; their keys are above `worst` and not NaN.
  template <bool kScores>
  void add(vfloat key, vfloat score, int32_t parent, vint node, uint32_t mask) {
    compress(key_ + n_, key, mask);
    if constexpr (kScores) compress(score_ + n_, score, mask);
    compress(node_ + n_, node, mask);
    const vint parents = vint{} + parent;
    std::memcpy(parent_ + n_, &parents, sizeof parents);
    n_ += count_lanes(mask);
    if (n_ >= capacity_) cut<kScores>();
  }

  void add(const Contender& k) {
    if (!(k.key > worst_)) return;
    key_[n_] = k.key, score_[n_] = k.score, parent_[n_] = k.parent, node_[n_] = k.node;
    if (++n_ >= capacity_) cut<true>();
  }

  Contender operator[](int64_t i) const { return {key_[i], score_[i], parent_[i], node_[i]}; }

  // Cuts the pool back to the best; of equal keys the first stay.
  template <bool kScores>
  void cut() {
    if (n_ <= width_) return;
    for (int i = 0; i < kLanes; ++i) key_[n_ + i] = -INFINITY;
    // The largest bound that at least `width` keys reach.
    vfloat most = splat(-INFINITY), least = splat(INFINITY);
    for (int64_t i = 0; i < n_; i += kLanes) most = vmax(load(key_ + i), most);
    for (int64_t i = 0; i + kLanes <= n_; i += kLanes) {
      const vfloat v = load(key_ + i);
      least = v < least ? v : least;
    }
    for (int64_t i = n_ / kLanes * kLanes; i < n_; ++i)
      least = splat(key_[i]) < least ? splat(key_[i]) : least;
    int64_t low = order_key(-max_lanes(-least)), high = int64_t{order_key(max_lanes(most))} + 1;
    int64_t reach = n_;
    while (high - low > 1 && reach != width_) {
      const int64_t middle = low + (high - low) / 2;
      const int64_t count = reaching(static_cast<int32_t>(middle));
      if (count >= width_)
        low = middle, reach = count;
      else
        high = middle;
    }
    const int32_t bound = static_cast<int32_t>(low);
    // Of those at the bound itself only so many stay.
    int64_t at_bound = reach == width_ ? width_ : width_ - reaching(bound + 1), n = 0;
    for (int64_t i = 0; i < n_; i += kLanes) {
      const vfloat key = load(key_ + i);
      const vint order = order_key(key);
      uint32_t keep = lanes_of(order >= bound);
      if (i + kLanes > n_) keep &= kAllLanes >> (kLanes - static_cast<int>(n_ - i));
      if (reach != width_)
        for (uint32_t equal = keep & lanes_of(order == bound); equal != 0; equal &= equal - 1)
          if (at_bound-- <= 0) keep &= ~(equal & -equal);
      if (keep == 0) continue;
      move<kScores>(i, n, keep);
      n += count_lanes(keep);
    }
    n_ = n;
    worst_ = of_order_key(bound);
  }

 private:
  int64_t reaching(int32_t bound) const {
    vint count{};
    for (int64_t i = 0; i < n_; i += kLanes) count -= order_key(load(key_ + i)) >= bound;
    int64_t total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += count[lane];
    return total;
  }

  template <bool kScores>
  void move(int64_t from, int64_t to, uint32_t mask) {
    vint parent, node;
    std::memcpy(&parent, parent_ + from, sizeof parent);
    std::memcpy(&node, node_ + from, sizeof node);
    const vfloat score = load(score_ + from);
    compress(key_ + to, load(key_ + from), mask);
    if constexpr (kScores) compress(score_ + to, score, mask);
    compress(parent_ + to, parent, mask);
    compress(node_ + to, node, mask);
  }

  int64_t width_, capacity_, room_, n_ = 0;
  float worst_ = -INFINITY;
  Memory<int64_t{12} << 10> memory_;
  float *key_, *score_;
  int32_t *parent_, *node_;
};

// ---- a beam's children ----

// A beam without a node or without a score continues nowhere.
bool alive(const StepArgs& a, int64_t row) {
  return a.nodes[row] >= 0 && a.scores[row] > -INFINITY;
}

struct Children {
  const int32_t* labels;
  int64_t begin, end;
  bool dense;  // their columns follow one another
  UserFilter filter;
  bool listed;  // whether some are forbidden one by one
  int64_t words;
};

// Whether the node is one of this level, and its children of the next.
bool is_node(const StepArgs& a, int64_t node) {
  if (node < 0 || node >= a.level_nodes) return false;
  const int64_t begin = a.first_child[node], end = a.first_child[node + 1];
  return 0 <= begin && begin <= end && end <= a.next_nodes;
}

// Nodes lie anywhere in the trie: what rows to come will look at is asked for
// early, first where the children are, then their labels.
constexpr int64_t kNear = 4, kFar = 8;

GENREC_INLINE void ask_for_children(const StepArgs& a, int64_t row) {
  if (row < a.U * a.W && a.nodes[row] >= 0 && a.nodes[row] < a.level_nodes)
    prefetch(a.first_child + a.nodes[row]);
}
GENREC_INLINE void ask_for_labels(const StepArgs& a, int64_t row) {
  if (row < a.U * a.W && is_node(a, a.nodes[row])) prefetch(a.labels + a.first_child[a.nodes[row]]);
}

Children children_of(const StepArgs& a, const UserFilter& filter, int64_t node) {
  Children c{a.labels, a.first_child[node],  a.first_child[node + 1], false, filter,
             false,    a.filter.closed_words};
  const int64_t n = c.end - c.begin;
  c.dense = n > 0 && c.labels[c.begin] >= 0 && c.labels[c.end - 1] < a.V &&
            c.labels[c.end - 1] - int64_t{c.labels[c.begin]} == n - 1;
  // Most beams meet nothing that is taken.
  const int64_t at = first_not_before(filter.taken, filter.num_taken, c.begin);
  if (at == filter.num_taken || filter.taken[at] >= c.end) c.filter.num_taken = 0;
  c.listed = c.filter.forbidden != nullptr || c.filter.num_taken > 0;
  return c;
}

// The logits of up to kLanes children from `child` on, and which of them count.
// Labels outside the row are left out, and said in `outside`.  (Labels ascend below a node, so that
// the first and the last say it of all; where they do not, nothing outside is read, but not every
// such label need be met.)
template <class T>
GENREC_INLINE vfloat look_at(const StepArgs& a, const Children& c, const T* x, int64_t child,
                             uint32_t& mask, bool& outside) {
  const int rest = c.end - child < kLanes ? static_cast<int>(c.end - child) : kLanes;
  mask = kAllLanes >> (kLanes - rest);
  vfloat v;
  if (c.dense) {
    const T* from = x + c.labels[c.begin] + (child - c.begin);
    v = rest == kLanes ? load_floats(from) : load_some(from, rest, 0);
  } else {
    int32_t tail[kLanes];
    const int32_t* at = c.labels + child;
    if (rest < kLanes) {
      for (int i = 0; i < kLanes; ++i) tail[i] = i < rest ? at[i] : 0;
      at = tail;
    }
    const uint32_t inside = lanes_below(at, static_cast<uint32_t>(a.V));
    outside |= (mask & ~inside) != 0;
    mask &= inside;
    v = gather_floats(x, a.V, at, mask);
  }
  return v;
}

// The lanes of the mask that may be entered.
GENREC_INLINE uint32_t open_lanes(const Children& c, int64_t child, uint32_t mask) {
  if (c.filter.closed != nullptr) {
    const int64_t word = child >> 5;
    uint64_t bits = static_cast<uint32_t>(c.filter.closed[word]);
    if (word + 1 < c.words)
      bits |= static_cast<uint64_t>(static_cast<uint32_t>(c.filter.closed[word + 1])) << 32;
    mask &= ~static_cast<uint32_t>(bits >> (child & 31));
  }
  if (!c.listed) return mask;
  for (uint32_t left = mask; left != 0; left &= left - 1)
    if (!may_enter(c.filter, child + __builtin_ctz(left))) mask &= ~(left & -left);
  return mask;
}

// The normaliser over a node's allowed children, for softmax = "children".
template <class T>
Normalizer<float> normalize_children(const StepArgs& a, const Children& c, const T* x,
                                     bool& outside) {
  float block[kBlock + kLanes];
  RunningSum run;
  int64_t n = 0;
  for (int64_t child = c.begin; child < c.end; child += kLanes) {
    uint32_t mask;
    const vfloat v = look_at(a, c, x, child, mask, outside);
    mask = open_lanes(c, child, mask);
    compress(block + n, v, mask);
    n += count_lanes(mask);
    if (n >= kBlock) {
      add_block<false, false>(run, block, kBlock, a.inv_temperature, nullptr);
      n -= kBlock;
      for (int64_t i = 0; i < n; ++i) block[i] = block[kBlock + i];
    }
  }
  if (n > 0) add_block<false, false>(run, block, n, a.inv_temperature, nullptr);
  return finish(run);
}

template <class T>
Normalizer<float> normalize_beam(const StepArgs& a, const Children& c, const T* x, bool& outside) {
  switch (a.softmax) {
    case Softmax::vocab:
      return normalize_plain(RowView<T>{x, nullptr, a.V, a.stride}, a.inv_temperature);
    case Softmax::level:
      return normalize_plain(
          RowView<T>{x + a.level_begin, nullptr, a.level_end - a.level_begin, a.stride},
          a.inv_temperature);
    default: return normalize_children(a, c, x, outside);
  }
}

// ---- beam search ----

// The first of columns [column, end) whose logit is above the bound; `end` where none is.
template <class T>
GENREC_INLINE int64_t first_above(const T* x, int64_t column, int64_t end, float bound) {
  const vfloat bounds = splat(bound);
  for (; column + 4 * kLanes <= end; column += 4 * kLanes) {
    uint64_t above = 0;
    for (int i = 0; i < 4; ++i)
      above |= uint64_t{lanes_greater(load_floats(x + column + i * kLanes), bounds)} << i * kLanes;
    if (above != 0) return column + __builtin_ctzll(above);
  }
  for (; column < end; column += kLanes) {
    const int64_t rest = end - column;
    const vfloat v = rest < kLanes ? load_some(x + column, static_cast<int>(rest), -INFINITY)
                                   : load_floats(x + column);
    const uint32_t above = lanes_greater(v, bounds);
    if (above != 0) return column + __builtin_ctz(above);
  }
  return end;
}

// A beam's row as its children enter the pool: a child's score is
// (logit - top) / temperature + base.
template <class T>
struct ScoredRow {
  const T* x;
  float top, inv_temperature, base;
};

// Passes over children whose logits are too low to enter the pool.  To read all the columns between
// them, which lie side by side, takes less than to gather theirs, if not too few are theirs.
template <class T>
class Skip {
 public:
  // The row is that of the user's beam number `beams`, counted from 1; a chunk's pool has seen
  // fewer, and from its first beam on.
  Skip(const StepArgs& a, const Children& c, const ScoredRow<T>& row, int64_t beams)
      : c_(c), row_(row) {
    const int64_t n = c.end - c.begin;
    if (n <= kLanes || c.dense) return;
    const int64_t first = c.labels[c.begin], last = c.labels[c.end - 1];
    if (first < 0 || last >= a.V || last - first < n - 1) return;  // for `look_at` to find out
    column_ = first, end_ = last + 1, absent_ = end_ - first - n;
    // A vector of children is gathered in the time of some sixteen that are loaded.  And of the
    // children seen so far `width` are the best: one in so many of this beam's enters.
    pays_ = absent_ < 15 * n && n * beams > 32 * a.width;
  }

  bool pays() const { return pays_; }

  // The first child, from this one on, that may score more than `worst`; c.end where none does.
  GENREC_INLINE_MEMBER int64_t next(int64_t child, float worst) {
    if (worst == -INFINITY) return child;
    if (worst != worst_) worst_ = worst, bound_ = least_logit(worst);
    const int64_t here = c_.labels[child];
    column_ = first_above(row_.x, here > column_ ? here : column_, end_, bound_);
    if (column_ == end_) return c_.end;
    // Of the columns from here to there so many are children's at most, and at least.
    const int64_t most = column_ - here;
    const int64_t least = most > absent_ ? most - absent_ : 0;
    const int64_t left = c_.end - child;
    const int64_t from = child + (least < left ? least : left);
    const int64_t to = child + (most < left ? most : left);
    return from + first_not_before(c_.labels + from, to - from, column_);
  }

 private:
  // No logit up to this one scores more than `worst`.  In exact numbers that takes a logit above
  // top + (worst - base) * temperature.  The margin is several times what rounding can make of it,
  // here and in a score: each time at most 2^-24 of what is rounded, or, where that is tiny,
  // 2^-126, in logits or in scores, even where such numbers are taken for 0.
  float least_logit(float worst) const {
    const double temperature = 1. / row_.inv_temperature, top = row_.top, base = row_.base;
    const double apart = (worst - base) * temperature;
    const double size = std::fabs(top) + (std::fabs(double{worst}) + std::fabs(base)) * temperature;
    const double bound = top + apart - 1e-6 * size - 0x1p-124 * (1 + temperature);
    if (!(bound > -0x1.fffffep127)) return -INFINITY;  // NaN too
    // From there on a logit's distance from the top is infinite, and so is its score.
    const double infinite = 0x1.fffffcp127 + (top < 0 ? top : 0);
    return static_cast<float>(bound < infinite ? bound : infinite);
  }

  const Children& c_;
  const ScoredRow<T>& row_;
  float worst_ = -INFINITY, bound_ = -INFINITY;
  int64_t column_ = 0, end_ = 0, absent_ = 0;
  bool pays_ = false;
};

template <bool kSkip, class T>
void enter(const StepArgs& a, const Children& c, const ScoredRow<T>& row, int32_t beam,
           Skip<T>& skip, Pool& pool, bool& outside) {
  for (int64_t child = c.begin; child < c.end; child += kLanes) {
    if constexpr (kSkip) {
      child = skip.next(child, pool.worst());
      if (child >= c.end) break;
    }
    uint32_t mask;
    const vfloat v = look_at(a, c, row.x, child, mask, outside);
    // Adding 0 makes -0 of 0, whose order would differ.
    const vfloat total = ((v - row.top) * row.inv_temperature + row.base) + 0.f;
    mask = open_lanes(c, child, mask & lanes_greater(total, splat(pool.worst())));
    if (mask != 0) pool.add<false>(total, total, beam, counting(static_cast<int32_t>(child)), mask);
  }
}

template <class T>
void search_beam(const StepArgs& a, const Children& c, int32_t beam, const T* x, float score,
                 Pool& pool, bool& outside) {
  const Normalizer<float> z = normalize_beam(a, c, x, outside);
  const ScoredRow<T> row{x, z.top, a.inv_temperature, score - z.log_sum};
  if (!(row.base > -INFINITY)) return;  // the row's normaliser is not a number
  Skip<T> skip(a, c, row, int64_t{beam} + 1);
  if (skip.pays())
    enter<true>(a, c, row, beam, skip, pool, outside);
  else
    enter<false>(a, c, row, beam, skip, pool, outside);
}

// ---- sampling ----

// Arrays that grow to the largest fan-out.
struct Scratch {
  float *score = nullptr, *key = nullptr;
  int32_t* node = nullptr;
  int64_t room = 0;

  void fit(int64_t n) {
    if (n <= room) return;
    free_all();
    room = n;
    score = allocate<float>(n + kLanes);
    key = allocate<float>(n + kLanes);
    node = allocate<int32_t>(n + kLanes);
  }
  void free_all() { std::free(score), std::free(key), std::free(node); }
  ~Scratch() { free_all(); }
};

template <class T>
void sample_beam(const StepArgs& a, const Children& c, int64_t user, int32_t beam, const T* x,
                 Scratch& s, Pool& pool, bool& outside) {
  const Normalizer<float> z = normalize_beam(a, c, x, outside);
  const float score = a.scores[user * a.W + beam], base = score - z.log_sum;
  const float perturbed = a.perturbed != nullptr
                              ? a.perturbed[user * a.W + beam]
                              : score + root_gumbel(a.seed, static_cast<uint64_t>(user), beam);
  if (!(base > -INFINITY) || perturbed != perturbed) return;
  s.fit(c.end - c.begin);
  int64_t n = 0;
  for (int64_t child = c.begin; child < c.end; child += kLanes) {
    uint32_t mask;
    const vfloat v = look_at(a, c, x, child, mask, outside);
    const vfloat total = (v - z.top) * a.inv_temperature + base;
    mask = open_lanes(c, child, mask & lanes_greater(total, splat(-INFINITY)));
    compress(s.score + n, total, mask);
    compress(s.node + n, counting(static_cast<int32_t>(child)), mask);
    n += count_lanes(mask);
  }
  for (int64_t i = 0; i < n; ++i)
    s.key[i] = s.score[i] + gumbel(a.seed, static_cast<uint64_t>(user), a.level,
                                   static_cast<uint32_t>(s.node[i]));
  float top = -INFINITY;
  for (int64_t i = 0; i < n; ++i) top = s.key[i] > top ? s.key[i] : top;
  for (int64_t i = 0; i < n; ++i) s.key[i] = carried_down(s.key[i], top, perturbed) + 0.f;
  for (int64_t i = 0; i < n; i += kLanes) {
    uint32_t mask = n - i < kLanes ? kAllLanes >> (kLanes - static_cast<int>(n - i)) : kAllLanes;
    const vfloat key = load(s.key + i);
    mask &= lanes_greater(key, splat(pool.worst()));
    if (mask == 0) continue;
    vint node;
    std::memcpy(&node, s.node + i, sizeof node);
    pool.add<true>(key, load(s.score + i), beam, node, mask);
  }
}

// ---- a user ----

// Sorts 64-bit words, upwards, where they stand, no two of them equal.  `spare` has room for as
// many.
void sort_words(uint64_t* words, uint64_t* spare, int64_t n) {
  if (n <= 96) {  // few enough to count, vector by vector, how many each has before it
    for (int64_t i = 0; i < n; ++i) {
      uint64_t before = 0;
      for (int64_t j = 0; j < n; ++j) before += words[j] < words[i];
      spare[before] = words[i];
    }
    std::memcpy(words, spare, sizeof(uint64_t) * static_cast<size_t>(n));
    return;
  }
  // By the upper half alone, a digit of 8 bits at a time; the lower one ascends already.
  uint64_t *from = words, *to = spare;
  for (int shift = 32; shift < 64; shift += 8) {
    int64_t count[257] = {};
    for (int64_t i = 0; i < n; ++i) ++count[(from[i] >> shift & 255) + 1];
    if (count[(from[0] >> shift & 255) + 1] == n) continue;  // all have the same digit
    for (int digit = 0; digit < 256; ++digit) count[digit + 1] += count[digit];
    for (int64_t i = 0; i < n; ++i) to[count[from[i] >> shift & 255]++] = from[i];
    uint64_t* swap = from;
    from = to, to = swap;
  }
  if (from != words) std::memcpy(words, from, sizeof(uint64_t) * static_cast<size_t>(n));
}

// The pool's best, best first; `words` has room for twice the width.
void write_user(const StepArgs& a, int64_t user, Pool& pool, uint64_t* words) {
  const bool sampling = a.sampling;
  sampling ? pool.cut<true>() : pool.cut<false>();
  const int64_t n = pool.size();
  for (int64_t i = 0; i < n; ++i) {
    // Flipped, so that the largest key is first; then the earliest place.
    const uint32_t order = ~(static_cast<uint32_t>(order_key(pool[i].key)) ^ 0x80000000u);
    words[i] = uint64_t{order} << 32 | static_cast<uint64_t>(i);
  }
  sort_words(words, words + a.width, n);
  const int64_t first = user * a.width;
  for (int64_t i = 0; i < n; ++i) {
    const Contender best = pool[static_cast<int64_t>(words[i] & 0xffffffffu)];
    a.out_scores[first + i] = sampling ? best.score : best.key;
    if (sampling) a.out_perturbed[first + i] = best.key;
    a.out_parent[first + i] = best.parent;
    a.out_token[first + i] = a.labels[best.node];
    a.out_node[first + i] = best.node;
  }
  for (int64_t o = first + n; o < first + a.width; ++o) {
    a.out_scores[o] = -INFINITY;
    if (sampling) a.out_perturbed[o] = -INFINITY;
    a.out_parent[o] = a.out_token[o] = a.out_node[o] = -1;
  }
}

template <class T>
int64_t step(const StepArgs& a, int64_t first_task, int64_t last_task) {
  Pool pool(a.width);
  Scratch scratch;
  Words words(a.width);
  int64_t first_bad = -1;
  const int64_t first_row = first_task / a.chunks * a.W + a.W * (first_task % a.chunks) / a.chunks;
  for (int64_t i = 0; i < kFar; ++i) ask_for_children(a, first_row + i);
  for (int64_t i = 0; i < kNear; ++i) ask_for_labels(a, first_row + i);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t user = task / a.chunks, chunk = task % a.chunks;
    const UserFilter filter = filter_of(a.filter, user);
    pool.clear();
    for (int64_t beam = a.W * chunk / a.chunks; beam < a.W * (chunk + 1) / a.chunks; ++beam) {
      const int64_t row = user * a.W + beam;
      ask_for_children(a, row + kFar);
      ask_for_labels(a, row + kNear);
      bool outside = a.nodes[row] != -1 && !is_node(a, a.nodes[row]);
      if (outside && first_bad < 0) first_bad = row;
      if (outside || !alive(a, row)) continue;
      const T* x = static_cast<const T*>(a.logits) + row * a.stride;
      const Children c = children_of(a, filter, a.nodes[row]);
      if (a.sampling)
        sample_beam(a, c, user, static_cast<int32_t>(beam), x, scratch, pool, outside);
      else
        search_beam(a, c, static_cast<int32_t>(beam), x, a.scores[row], pool, outside);
      if (outside && first_bad < 0) first_bad = row;
    }
    if (a.chunks == 1) {
      write_user(a, user, pool, words.data());
      continue;
    }
    a.sampling ? pool.cut<true>() : pool.cut<false>();
    Contender* kept = static_cast<Contender*>(a.workspace) + task * a.width;
    for (int64_t i = 0; i < a.width; ++i)
      kept[i] = i < pool.size() ? pool[i] : Contender{-INFINITY, -INFINITY, -1, -1};
  }
  return first_bad;
}

int64_t step_any(const StepArgs& a, int64_t first_task, int64_t last_task) {
  switch (a.dtype) {
    case DType::bf16: return step<bf16_t>(a, first_task, last_task);
    case DType::f16: return step<f16_t>(a, first_task, last_task);
    default: return step<float>(a, first_task, last_task);
  }
}

void merge(const StepArgs& a, int64_t first_user, int64_t last_user) {
  Pool pool(a.width);
  Words words(a.width);
  for (int64_t user = first_user; user < last_user; ++user) {
    pool.clear();
    const Contender* kept = static_cast<const Contender*>(a.workspace) + user * a.chunks * a.width;
    for (int64_t i = 0; i < a.chunks * a.width; ++i) pool.add(kept[i]);
    write_user(a, user, pool, words.data());
  }
}

}  // namespace

// Declared in trie.cpp for each instruction set that was built.
extern const trie::CpuKernels trie_kernels;
const trie::CpuKernels trie_kernels{step_any, merge};

}  // namespace genrec::GENREC_ISA
