// Every operator's signature, on one page.
//
// Shapes: N sequences, T tokens each, V columns, L levels, U users, W beams.
// Operators named *_forward and *_backward are the kernels; those without are
// what users call.  token_logps, sage_loss and sage_loss_from_logps have their
// bodies in genrec_ext/ops: they prepare arguments and call the kernels.  Kernels
// take no keyword-only tensors: register_autograd does not know them.
//
// Support, in every scoring operator: at most one of
//   ranges [T, 2] int64                      columns [start, end) of each level
//   columns [M] int32, column_begin [N, T] int64, column_end [N, T] int64
//                                            ascending lists, as a trie keeps them
#include "common/torch_stable.h"

#define GENREC_SUPPORT                          \
  "Tensor? ranges=None, Tensor? columns=None, " \
  "Tensor? column_begin=None, Tensor? column_end=None"
#define GENREC_OBJECTIVE                                              \
  "str objective=\"sage\", float eps_pos=0.0, float eps_boost=0.5, "  \
  "float eps_neg=0.0, float entropy_penalty=1.0, bool bounded=True, " \
  "str boost_mode=\"cap\", float kl_weight=0.0, str kl=\"reverse\", " \
  "float? clip_low=None, float? clip_high=None, float early_clip=0.1"
// The same without defaults, for kernels: a forgotten argument is an error.
#define GENREC_OBJECTIVE_ALL                                       \
  "str objective, float eps_pos, float eps_boost, float eps_neg, " \
  "float entropy_penalty, bool bounded, str boost_mode, "          \
  "float kl_weight, str kl, float? clip_low, float? clip_high, float early_clip"

#define GENREC_FILTER                                                      \
  "Tensor? forbidden=None, Tensor? closed=None, Tensor? closed_row=None, " \
  "Tensor? taken=None, Tensor? taken_begin=None"

STABLE_TORCH_LIBRARY(genrec, m) {
  // ---- policy ----
  m.def("token_logps(Tensor logits, Tensor tokens, *, Tensor? mask=None, " GENREC_SUPPORT
        ", float temperature=1.0, bool validate=False) -> (Tensor logps, Tensor entropy)");
  m.def(
      "token_logps_forward(Tensor logits, Tensor tokens, Tensor? mask, Tensor? ranges, "
      "Tensor? columns, Tensor? column_begin, Tensor? column_end, float temperature, "
      "bool validate) -> (Tensor logps, Tensor entropy, Tensor norm)");
  m.def(
      "token_logps_backward(Tensor grad_logps, Tensor? grad_entropy, Tensor logits, "
      "Tensor tokens, Tensor norm, Tensor entropy, Tensor? mask, Tensor? ranges, "
      "Tensor? columns, Tensor? column_begin, Tensor? column_end, float temperature) "
      "-> Tensor grad_logits");
  m.def(
      "sage_loss(Tensor logits, Tensor tokens, Tensor old_logps, Tensor advantages, *, "
      "Tensor? mask=None, Tensor? entropy=None, Tensor? boost=None, "
      "Tensor? ref_logps=None, " GENREC_SUPPORT ", " GENREC_OBJECTIVE
      ", float temperature=1.0, str reduction=\"mean\", float? normalizer=None, "
      "bool validate=False) -> Tensor");
  // `scale` is each loss's factor, below 0 that of the mean: 1 / N.
  // loss [] or, unreduced, [N]; stats [N, 6], of which that of entropy may be 0 unless
  // with_entropy; grad like logits (empty unless with_grad).
  m.def(
      "sage_loss_forward(Tensor logits, Tensor tokens, Tensor old_logps, Tensor advantages, "
      "Tensor? mask, Tensor? entropy, Tensor? boost, Tensor? ref_logps, Tensor? ranges, "
      "Tensor? columns, Tensor? column_begin, Tensor? column_end, " GENREC_OBJECTIVE_ALL
      ", float temperature, float scale, bool with_entropy, bool reduce, bool validate, "
      "bool with_grad) "
      "-> (Tensor loss, Tensor stats, Tensor grad_logits)");
  // The same, with the gradient written over the logits.
  m.def(
      "sage_loss_forward_(Tensor(a!) logits, Tensor tokens, Tensor old_logps, "
      "Tensor advantages, Tensor? mask, Tensor? entropy, Tensor? boost, Tensor? ref_logps, "
      "Tensor? ranges, Tensor? columns, Tensor? column_begin, "
      "Tensor? column_end, " GENREC_OBJECTIVE_ALL
      ", float temperature, float scale, bool with_entropy, bool reduce, bool validate) "
      "-> (Tensor loss, Tensor stats)");
  m.def("sage_loss_backward(Tensor grad_output, Tensor grad) -> Tensor");
  // The same in the saved gradient's own memory; on the CPU it looks at the support's
  // columns alone, since the others hold zeros that may have no memory yet.
  m.def(
      "sage_loss_backward_(Tensor(a!) grad, Tensor grad_output, Tensor? ranges, "
      "Tensor? columns, Tensor? column_begin, Tensor? column_end) -> ()");
  m.def(
      "sage_loss_from_logps(Tensor logps, Tensor old_logps, Tensor advantages, *, "
      "Tensor? mask=None, Tensor? entropy=None, Tensor? boost=None, "
      "Tensor? ref_logps=None, " GENREC_OBJECTIVE
      ", str reduction=\"mean\", float? normalizer=None) -> Tensor");
  m.def(
      "sage_loss_from_logps_forward(Tensor logps, Tensor old_logps, Tensor advantages, "
      "Tensor? mask, Tensor? entropy, Tensor? boost, "
      "Tensor? ref_logps, " GENREC_OBJECTIVE_ALL
      ", float scale, bool reduce) "
      "-> (Tensor loss, Tensor stats, Tensor grad_logps)");
  // rewards [B, G, M], weights [M] -> advantages [B, G]
  m.def(
      "decoupled_advantages(Tensor rewards, Tensor weights, *, float? clamp=None, "
      "bool unbiased=False) -> Tensor");

  // ---- head ----
  // hidden [N, T, d], weight [V, d] -> logits [N, T, K] of columns [start, end) of each
  // level, K the widest; -inf where a level is narrower.
  m.def("level_logits(Tensor hidden, Tensor weight, Tensor ranges) -> Tensor");
  m.def("level_logits_forward(Tensor hidden, Tensor weight, int[] starts, int[] ends) -> Tensor");
  // A gradient that is not wanted is empty.
  m.def(
      "level_logits_backward(Tensor grad_logits, Tensor hidden, Tensor weight, int[] starts, "
      "int[] ends, bool for_hidden, bool for_weight) -> (Tensor grad_hidden, Tensor grad_weight)");
  // Zeros that take memory only where something is written; CPU.
  m.def("blank_like(Tensor like, int[] starts, int[] ends) -> Tensor");
  m.def("empty_cache() -> int");

  // ---- attention ----
  // Of each node of B users' trees to its path: query, key and value [B, W, H, D]; bias
  // [H, T, T]; path [B, W, T] int32, each level's node on the way to this one, -1 below it;
  // keep [B, W, H, T] multiplies the shares.  CPU.
  m.def(
      "path_attention_forward(Tensor query, Tensor key, Tensor value, Tensor bias, Tensor path, "
      "Tensor? keep) -> (Tensor out, Tensor shares)");
  m.def(
      "path_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
      "Tensor shares, Tensor path, Tensor? keep) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)");

  // ---- prefix ----
  // B users, P <= T prefix lengths, C candidates, the first the positive; each per_level is
  // [P], without gradient.  `grad_output` ([] or, unreduced, [B]) enters the gradient; `scale` as
  // in sage_loss_forward.
  m.def(
      "prefix_loss(Tensor logits, Tensor tokens, Tensor weights, float beta, *, "
      "float temperature=1.0, float prefix_temperature=1.0, float ce_weight=1.0, "
      "str reduction=\"mean\", " GENREC_SUPPORT
      ", bool validate=False) -> (Tensor loss, Tensor per_level)");
  m.def(
      "prefix_loss_forward(Tensor logits, Tensor tokens, Tensor weights, float beta, "
      "Tensor? ranges, Tensor? columns, Tensor? column_begin, Tensor? column_end, "
      "float temperature, float prefix_temperature, float ce_weight, bool validate, float scale, "
      "bool reduce, Tensor? grad_output, bool with_grad) "
      "-> (Tensor loss, Tensor per_level, Tensor grad_logits)");
  // Normalised over the supported columns: lists, as a trie keeps them, or ranges.
  m.def(
      "masked_softmax_loss(Tensor logits, Tensor tokens, *, float temperature=1.0, " GENREC_SUPPORT
      ", bool validate=False) -> Tensor");
  m.def(
      "beam_aware_loss(Tensor logits, Tensor tokens, *, int beam_width, float weight, float scale, "
      "float temperature=1.0, " GENREC_SUPPORT ", bool validate=False) -> Tensor");
  m.def(
      "beam_aware_loss_forward(Tensor logits, Tensor tokens, int beam_width, float weight, "
      "float scale, Tensor? ranges, Tensor? columns, Tensor? column_begin, Tensor? column_end, "
      "float temperature, bool validate, Tensor? grad_output, bool with_grad) "
      "-> (Tensor loss, Tensor grad_logits)");
  // logits [B, C, T, V], tokens [B, C, T], duplicates [P, B, C] bool, log_scale [P, B]
  m.def(
      "prefix_pairwise_loss(Tensor logits, Tensor tokens, Tensor duplicates, Tensor log_scale, "
      "Tensor weights, float beta, *, float temperature=1.0, float prefix_temperature=1.0, "
      "float ce_weight=1.0) -> (Tensor loss, Tensor per_level)");
  // The same with a user's rows in one dimension: logits [B, C * T, V], tokens [B, C * T].
  m.def(
      "prefix_pairwise_loss_forward(Tensor logits, Tensor tokens, Tensor duplicates, "
      "Tensor log_scale, Tensor weights, float beta, int candidates, float temperature, "
      "float prefix_temperature, float ce_weight, Tensor? grad_output, bool with_grad) "
      "-> (Tensor loss, Tensor per_level, Tensor grad_logits)");
  m.def(
      "prefix_pairwise_loss_from_logps(Tensor logps, Tensor duplicates, Tensor log_scale, "
      "Tensor weights, float beta, *, float prefix_temperature=1.0, float ce_weight=1.0) "
      "-> (Tensor loss, Tensor per_level)");
  m.def(
      "prefix_pairwise_loss_from_logps_forward(Tensor logps, Tensor duplicates, "
      "Tensor log_scale, Tensor weights, float beta, float prefix_temperature, float ce_weight) "
      "-> (Tensor loss, Tensor per_level, Tensor grad_logps)");

  // ---- tokenizer ----
  // x [N, D], codebooks [L, K, D] -> codes [N, L] int64, quantized [N, D], squared_error
  // [N, L], residuals [N, L, D] that each level quantizes (empty unless wanted).
  m.def(
      "residual_quantize(Tensor x, Tensor codebooks, bool return_residuals=False) "
      "-> (Tensor codes, Tensor quantized, Tensor squared_error, Tensor residuals)");
  // cost [N, K] float32 -> plan [N, K]
  m.def("sinkhorn(Tensor cost, float epsilon, int iterations) -> Tensor");
  // items [M] int64 in groups begin [G + 1] that share all codes but the last, by last
  // code; last [N] of every item; distances [M, codebook_size] float64.  CPU.
  m.def(
      "assign_last_codes(Tensor items, Tensor begin, Tensor last, int codebook_size, "
      "int capacity, Tensor? distances) -> Tensor last");

  // ---- trie ----
  // logits [U * W, V], scores and nodes [U, W] (any integers); the level's first_child [n + 1] and
  // labels [n'] int32; columns [level_begin, level_end) are the level's own, an end of -1 being V.
  // Each output is [U, width].  A node is not entered where any of these says so:
  //   forbidden [n'] or [U, n'] bool
  //   closed [M, ceil(n' / 32)] int32, a bit a node; closed_row [U] int64, each user's
  //     row or -1 (without it, row 0 for all)
  //   taken [S] int32, each user's nodes ascending; taken_begin [U + 1] int64
  m.def(
      "trie_beam_step(Tensor logits, Tensor scores, Tensor nodes, Tensor first_child, "
      "Tensor labels, int width, int level_begin, int level_end, str softmax=\"vocab\", "
      "float temperature=1.0, " GENREC_FILTER
      ") "
      "-> (Tensor scores, Tensor parent, Tensor token, Tensor node)");
  // perturbed [U, W], or without it the scores and noise of their own; normalised over the children
  // that may be entered.
  m.def(
      "trie_sample_step(Tensor logits, Tensor scores, Tensor? perturbed, Tensor nodes, "
      "Tensor first_child, Tensor labels, int width, int level, int seed, "
      "float temperature=1.0, " GENREC_FILTER
      ") "
      "-> (Tensor scores, Tensor perturbed, Tensor parent, Tensor token, Tensor node)");
}
