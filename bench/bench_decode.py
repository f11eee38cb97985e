"""The whole loop of constrained beam search in Hugging Face transformers.

python bench/bench_decode.py [--device cuda] [--quick]

`generate(num_beams=W)` under our TrieLogitsProcessor, and under transformers' own
PrefixConstrainedLogitsProcessor over a Python dictionary, against sid_beam_search as
custom_generate.  Weights are random, from a fixed seed; all methods must return the same sequences,
but for users whose scores are tied to float rounding.
"""

from __future__ import annotations

import argparse
import logging

import torch
import transformers
from common import interleaved, ms, write
from transformers import (
    PrefixConstrainedLogitsProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from genrec_ext import Trie
from genrec_ext.integrations.hf import TrieLogitsProcessor, sid_beam_search

ITEMS, LEVELS, CODES, FIRST, EOS, PROMPT = 20_000, 4, 256, 32, 1, 120
OFFSETS = [FIRST + CODES * level for level in range(LEVELS)]
SPECIAL = {"pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": 2}


def t5():
    """The size of TIGER's model (arXiv 2305.05065)."""
    config = T5Config(
        vocab_size=1100,
        d_model=128,
        d_ff=1024,
        num_heads=6,
        d_kv=64,
        num_layers=4,
        num_decoder_layers=4,
        decoder_start_token_id=0,
        **SPECIAL,
    )
    return T5ForConditionalGeneration(config)


def qwen3():
    """The shape of a small Qwen3: grouped keys, a head that is wide for its body."""
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        # Large enough that beams are not nearly tied.
        initializer_range=0.1,
        **SPECIAL,
    )
    return Qwen3ForCausalLM(config)


def dictionary_fn(codes, start):
    """`prefix_allowed_tokens_fn` over nested dictionaries, as most code on the web has it."""
    root = {}
    for path in codes.tolist():
        node = root
        for code, offset in zip(path, OFFSETS):
            node = node.setdefault(code + offset, {})

    def allowed(batch_id, input_ids):
        node = root
        for token in input_ids[start:].tolist():
            node = node.get(token, {})
        # transformers refuses an empty list; beams that no item is left for get one.
        return list(node) or [EOS]

    return allowed


def history(users, length, device):
    """Prompts of unequal length, padded on the left."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST, OFFSETS[-1] + CODES, (users, length), generator=g)
    mask = torch.ones_like(ids)
    for user in range(users):
        short = user * length // (3 * users)
        ids[user, :short], mask[user, :short] = 0, 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def methods(model, codes, trie, given, width):
    start = 1 if model.config.is_encoder_decoder else given["input_ids"].shape[1]
    common = {**given, "max_new_tokens": LEVELS, "return_dict_in_generate": True}

    def theirs(processor):
        return model.generate(
            **common,
            min_new_tokens=LEVELS,
            num_beams=width,
            num_return_sequences=width,
            output_scores=True,
            logits_processor=[processor],
        )

    def ours(softmax):
        settings = {"trie": trie, "sid_beams": width, "sid_softmax": softmax}
        return model.generate(**common, custom_generate=sid_beam_search, **settings)

    processor = TrieLogitsProcessor(trie, start, EOS)
    plain = PrefixConstrainedLogitsProcessor(dictionary_fn(codes, start), width)
    return {
        "generate, dictionary": lambda: theirs(plain),
        "generate, TrieLogitsProcessor": lambda: theirs(processor),
        "sid_beam_search": lambda: ours("vocab"),
        "sid_beam_search, level": lambda: ours("level"),
    }


def check(run, users, width):
    """How many of all rows differ, where only a near-tie may make them differ."""
    out = {name: method() for name, method in run.items() if name != "sid_beam_search, level"}
    want = out.pop("generate, TrieLogitsProcessor")
    # A GPU's products are summed in another order for another number of rows.
    rounding = 1e-3 if want.sequences.is_cuda else 1e-4
    differing = 0
    for name, got in out.items():
        same = (got.sequences == want.sequences).all(-1)
        gap = (got.sequences_scores - want.sequences_scores).abs().max()
        assert gap < rounding, f"{name}: scores differ by {gap}"
        # Rows of one score within rounding may change places, no others.
        for row in (~same).nonzero().flatten().tolist():
            user = row // width * width
            scores = want.sequences_scores[user : user + width]
            near = (scores - want.sequences_scores[row]).abs() < rounding
            assert near.sum() > 1 or row == user + width - 1, f"{name}: row {row} differs"
        differing = max(differing, int((~same).sum()))
    return differing


def whole(value):
    return f"{value:,.0f}" if value >= 100 else ms(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="4 users x 10 beams")
    options = parser.parse_args()
    quick, device = options.quick, options.device
    logging.disable(logging.WARNING)
    codes = torch.randint(0, CODES, (ITEMS, LEVELS), generator=torch.Generator().manual_seed(0))
    trie = Trie.from_items(codes, level_offsets=OFFSETS).to(device)
    rows, raw = [], []
    for name, make in (("T5, 4.6 M", t5), ("Qwen3, 12.6 M", qwen3)):
        torch.manual_seed(0)
        model = make().eval().to(device)
        for users, width in ((4, 10),) if quick else ((8, 50), (8, 128)):
            given = history(users, PROMPT, device)
            run = methods(model, codes, trie, given, width)
            differing = check(run, users, width)
            times = interleaved(run, 3, warmup=int(device == "cuda"), device=device)
            medians = [times[method]["median"] for method in run]
            raw.append(
                {
                    "model": name,
                    "attention": model.config._attn_implementation,
                    "parameters": sum(x.numel() for x in model.parameters()),
                    "users": users,
                    "beams": width,
                    "prompt": PROMPT,
                    "items": ITEMS,
                    "rows_reordered_by_near_ties": differing,
                    "times": times,
                }
            )
            rows.append(
                [
                    name,
                    f"{users} x {width}",
                    *(
                        f"{whole(time['median'])} ({whole(time['p20'])} to {whole(time['p80'])})"
                        for time in times.values()
                    ),
                    f"{medians[1] / medians[2]:.1f}",
                    f"{medians[0] / medians[2]:.1f}",
                ]
            )
    columns = [f"{method} (p20 to p80)" for method in run]
    header = ["model", "users x beams", *columns, "processor / ours", "dictionary / ours"]
    title = f"Constrained beam search in transformers {transformers.__version__}, the whole loop"
    report = "decode-quick" if quick else f"decode-{device}"
    command = "python bench/bench_decode.py" + (" --device cuda" if device == "cuda" else "")
    write(report, title, command, header, rows, raw, device)


if __name__ == "__main__":
    main()
