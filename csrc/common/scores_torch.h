// The torch side of every family that scores tokens: what a caller can get wrong in
// logits, tokens and support, memory for a gradient, and how a kernel is run.
//
// Compiled into both libraries; what differs is how a kernel is run, and that the
// host can look at indices only where they are in its memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "common/scores.h"
#include "common/torch_stable.h"
#if defined(GENREC_CUDA_LIBRARY)
#include "common/launch_torch.h"
#else
#include "common/isa.h"
#include "common/mapped.h"
#endif

namespace genrec {
namespace {

// A new tensor for the gradient of logits [N, T, V]; `blank` where it holds zeros.
struct Gradient {
  Tensor values;
  bool blank = false;
  bool streamed = false;  // so large that it is better written past the caches
};

// Whether rows are normalised over part of their columns.
inline bool is_supported(const Scores& s) {
  return s.support.ranges != nullptr || s.support.begin != nullptr;
}

#if defined(GENREC_CUDA_LIBRARY)

inline constexpr bool kOnHost = false;

template <class Args>
inline void run(int (*launch)(const Args&, void*), const Args& args, int64_t N, int64_t,
                const Tensor& where) {
  if (N == 0) return;
  launch_on_device_of(where, [&](void* stream) { return launch(args, stream); });
}

template <class Args>
inline void run(int (*launch)(const Args&, void*), const Args& args, const Tensor& where) {
  run(launch, args, 1, 0, where);
}

inline Gradient new_gradient(const Tensor& like, const Scores&) {
  return {new_tensor(like, like.scalar_type(), {like.size(0), like.size(1), like.size(2)}), false};
}

#else

inline constexpr bool kOnHost = true;

// A thread is worth waking for about this many logits.
inline constexpr int64_t kGrain = 16384;

// `work`: how many logits a sequence reads.
template <class Args>
inline void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t N,
                int64_t work, const Tensor&) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, N, grain,
                              [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

template <class Args>
inline void run(void (*kernel)(const Args&), const Args& args, const Tensor&) {
  kernel(args);
}

// Where the gradient of scores with a support is written: a span a row, or nothing
// where rows are many.
inline std::vector<Span> written_spans(const Scores& s, int64_t element_size) {
  constexpr int64_t kFew = 4096;
  std::vector<Span> spans;
  if (s.N * s.T > kFew) return spans;
  spans.reserve(static_cast<size_t>(s.N * s.T));
  const Support& u = s.support;
  for (int64_t i = 0; i < s.N * s.T; ++i) {
    if (!counts(s.mask, i)) continue;  // nothing is written, and its bounds may be anything
    int64_t first = 0, last = 0;
    if (u.ranges != nullptr) {
      first = u.ranges[i % s.T * 2];
      last = u.ranges[i % s.T * 2 + 1];
    } else if (u.begin[i] < u.end[i]) {
      first = u.columns[u.begin[i]];
      last = u.columns[u.end[i] - 1] + 1;
    }
    if (first < last)
      spans.push_back({(i * s.V + first) * element_size, (i * s.V + last) * element_size});
  }
  return spans;
}

inline Gradient new_gradient(const Tensor& like, const Scores& s) {
  const int64_t N = like.size(0), T = like.size(1), V = like.size(2);
  const int64_t element_size = static_cast<int64_t>(like.element_size());
  // Pages come one by one: worth it where a row has many that stay untouched.
  constexpr int64_t kLongRow = int64_t{16} << 10;
  if (is_supported(s) && V * element_size >= kLongRow)
    if (std::optional<Tensor> blank = new_blank(like, {N, T, V}, written_spans(s, element_size)))
      return {*blank, true};
  // From there on little of it would be left in a cache for its reader, and to bring its lines in
  // before they are written costs as much as to read the logits.
  constexpr int64_t kStreamed = int64_t{16} << 20;
  return {new_whole(like, {N, T, V}), false, N * T * V * element_size >= kStreamed};
}

#endif

// What each of N losses is multiplied with; below 0 stands for their mean, so that callers need not
// know N, which under a trace has no value.
inline double scale_of(double scale, int64_t N) {
  return scale < 0 ? 1.0 / static_cast<double>(std::max<int64_t>(N, 1)) : scale;
}

inline void* memory_of(const std::optional<Tensor>& t) {
  return t.has_value() ? t->mutable_data_ptr() : nullptr;
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  require(false, name, " must be float32, float64, bfloat16 or float16, got ",
          torch::headeronly::toString(t.scalar_type()));
  return DType::f32;
}

inline ScalarType accumulate_type(DType t) {
  return t == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

// Small inputs are made contiguous; logits only where a row is not.
inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  if (!t.has_value()) return std::nullopt;
  return torch::stable::contiguous(*t);
}

// Logits, tokens, mask and support of a call: checked, and held while kernels run.
struct Rows {
  Tensor logits, tokens;
  std::optional<Tensor> mask, ranges, columns, begin, end;
  Scores scores;
};

inline void check_indices(const Rows& rows, bool validate);

// Whether no two rows of logits [N, T, V] share an element.
inline bool rows_apart(const Tensor& logits) {
  const int64_t V = logits.size(2);
  int64_t size[2] = {logits.size(0), logits.size(1)};
  int64_t stride[2] = {logits.stride(0), logits.stride(1)};
  if (size[0] == 0 || size[1] == 0) return true;
  // A dimension of one index has no step; else rows are laid out by the smaller
  // step first.
  if (size[1] > 1 && (size[0] == 1 || stride[1] < stride[0])) {
    std::swap(size[0], size[1]);
    std::swap(stride[0], stride[1]);
  }
  const int64_t inner = size[0] > 1 ? stride[0] * (size[0] - 1) + V : V;
  return (size[0] <= 1 || stride[0] >= V) && (size[1] <= 1 || stride[1] >= inner);
}

inline Rows make_rows(const Tensor& logits, const Tensor& tokens, const std::optional<Tensor>& mask,
                      const std::optional<Tensor>& ranges, const std::optional<Tensor>& columns,
                      const std::optional<Tensor>& begin, const std::optional<Tensor>& end,
                      double temperature, bool validate, bool inplace) {
  const DType dtype = dtype_of(logits, "logits");
  require(logits.dim() == 3, "logits must have shape [N, T, V], got ", shape_text(logits));
  const int64_t N = logits.size(0), T = logits.size(1), V = logits.size(2);
  require(V > 0, "logits must have at least one column, got shape ", shape_text(logits));
  require_temperature(temperature);
  require_tensor(tokens, "tokens", ScalarType::Long, {N, T}, logits);
  if (mask) require_tensor(*mask, "mask", ScalarType::Bool, {N, T}, logits);
  require(!(ranges && columns), "ranges and columns exclude each other: give one support");
  if (ranges) require_tensor(*ranges, "ranges", ScalarType::Long, {T, 2}, logits);
  require(columns.has_value() == begin.has_value() && begin.has_value() == end.has_value(),
          "columns, column_begin and column_end must be given together");
  if (columns) {
    require_tensor(*columns, "columns", ScalarType::Int, {columns->numel()}, logits);
    require_tensor(*begin, "column_begin", ScalarType::Long, {N, T}, logits);
    require_tensor(*end, "column_end", ScalarType::Long, {N, T}, logits);
  }
  const bool unit = V == 1 || logits.stride(2) == 1;
  require(!inplace || unit, "logits must have unit stride along V for a gradient in place");
  require(!inplace || rows_apart(logits),
          "logits must have rows of their own memory for a gradient in place, got strides ",
          logits.stride(0), ", ", logits.stride(1), " for V = ", V);
  Rows rows{unit ? logits : torch::stable::contiguous(logits),
            torch::stable::contiguous(tokens),
            contiguous(mask),
            contiguous(ranges),
            contiguous(columns),
            contiguous(begin),
            contiguous(end),
            {}};
  Scores& s = rows.scores;
  s.dtype = dtype;
  s.logits = rows.logits.const_data_ptr();
  s.N = N, s.T = T, s.V = V;
  s.stride_n = rows.logits.stride(0), s.stride_t = rows.logits.stride(1);
  s.tokens = rows.tokens.const_data_ptr<int64_t>();
  s.mask = data_or_null<bool>(rows.mask);
  s.support.ranges = data_or_null<int64_t>(rows.ranges);
  s.support.columns = data_or_null<int32_t>(rows.columns);
  s.support.begin = data_or_null<int64_t>(rows.begin);
  s.support.end = data_or_null<int64_t>(rows.end);
  s.support.num_columns = rows.columns ? rows.columns->numel() : 0;
  s.inv_temperature = 1 / temperature;
  check_indices(rows, validate);
  return rows;
}

// Every index that a kernel will follow, before it runs.  CUDA kernels check
// for themselves, since looking here would wait for the device.
inline void check_indices(const Rows& rows, bool validate) {
  if (!kOnHost) {
    require(!validate,
            "validate=True looks at the tokens on the host and is for CPU tensors; on CUDA a token "
            "outside its support scores -100 and moves no logit");
    return;
  }
  const Scores& s = rows.scores;
  const Support& u = s.support;
  if (u.ranges != nullptr)
    for (int64_t t = 0; t < s.T; ++t) {
      const int64_t start = u.ranges[2 * t], end = u.ranges[2 * t + 1];
      require(0 <= start && start <= end && end <= s.V, "ranges[", t, "] must satisfy 0 <= start",
              " <= end <= V = ", s.V, ", got [", start, ", ", end, ")");
    }
  const int64_t M = u.num_columns;
  for (int64_t r = 0; r < s.N * s.T; ++r) {
    if (s.mask != nullptr && !s.mask[r]) continue;
    const int64_t token = s.tokens[r];
    require<std::out_of_range>(0 <= token && token < s.V, "tokens[", r / s.T, ", ", r % s.T,
                               "] must lie in [0, V = ", s.V, "), got ", token);
    bool held = true;
    if (u.ranges != nullptr)
      held = u.ranges[2 * (r % s.T)] <= token && token < u.ranges[2 * (r % s.T) + 1];
    if (u.begin != nullptr) {
      require<std::out_of_range>(0 <= u.begin[r] && u.begin[r] <= u.end[r] && u.end[r] <= M,
                                 "column_begin and column_end at [", r / s.T, ", ", r % s.T,
                                 "] must satisfy 0 <= begin <= end <= ", M, ", got ", u.begin[r],
                                 " and ", u.end[r]);
      held = false;
      int64_t before = -1;
      for (int64_t i = u.begin[r]; i < u.end[r]; ++i) {
        require<std::out_of_range>(before < u.columns[i] && u.columns[i] < s.V, "columns[", i,
                                   "] must ascend within [0, V = ", s.V, "), got ", u.columns[i],
                                   " after ", before);
        before = u.columns[i];
        held = held || before == token;
      }
    }
    require(held || !validate, "tokens[", r / s.T, ", ", r % s.T, "] = ", token,
            " is outside its support");
  }
}

// How many columns a sequence has: what parallel grain is made of.
inline int64_t work_of(const Scores& s) { return s.T * s.V; }

template <class Enum>
inline Enum one_of(const std::string& value, const char* name,
                   std::initializer_list<std::pair<const char*, Enum>> choices) {
  std::string accepted;
  for (const auto& [text, result] : choices) {
    if (value == text) return result;
    accepted += std::string(accepted.empty() ? "" : ", ") + '"' + text + '"';
  }
  require(false, name, " must be one of ", accepted, ", got \"", value, "\"");
  return choices.begin()->second;
}

inline void require_at_least_zero(double x, const char* name) {
  require(x >= 0, name, " must be at least 0, got ", x);  // +inf is a bound that never binds
}

}  // namespace
}  // namespace genrec
