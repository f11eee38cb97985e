"""A training step of APAO's pairwise loss on Hugging Face T5, against a step of cross-entropy.

Steps of forward, backward and AdamW on the same batch: cross-entropy as transformers has it; the
pairwise loss with each distinct prefix decoded once, over all prefix lengths and over all but the
longest; and the pairwise loss as published, whose encoder states are repeated for every candidate.
The model has TIGER's size.

    python bench/pairwise_t5.py [--device cuda] [--quick] [--batches 16 64] [--naive 16]
        [--negatives 100] [--repeats 9]
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import interleaved, ms, peak_memory, table, write_report
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from genrec_ext import prefix_pairwise_loss
from genrec_ext.candidates import Candidates, CandidateSampler
from genrec_ext.integrations.hf import sid_pairwise_logps
from genrec_ext.ops import prefix_pairwise_loss_from_logps

LEVELS, CODES, ITEMS, LENGTH, FIRST = 4, 256, 12101, 80, 32
OFFSETS = [FIRST + CODES * level for level in range(LEVELS)]
BETA = 0.5


def model_of(dropout: float, device: str) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=FIRST + CODES * LEVELS + 44,
        d_model=128,
        d_kv=64,
        d_ff=1024,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=6,
        dropout_rate=dropout,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).to(device).train()


class Steps:
    """The three steps over one batch, a model and an optimiser each."""

    def __init__(self, batch: int, negatives: int, dropout: float, device: str) -> None:
        g = torch.Generator().manual_seed(1)
        codes = torch.randint(0, CODES, (ITEMS, LEVELS), generator=g)
        tokens = codes + torch.tensor(OFFSETS)
        history = torch.randint(0, ITEMS, (batch, LENGTH // LEVELS), generator=g)
        lengths = torch.randint(5, LENGTH // LEVELS + 1, (batch, 1), generator=g)
        lengths[0] = LENGTH // LEVELS
        self.ids = tokens[history].flatten(1)
        self.mask = (torch.arange(LENGTH // LEVELS) < lengths).repeat_interleave(LEVELS, 1)
        self.ids = (self.ids * self.mask).to(device)
        self.mask = self.mask.long().to(device)
        self.samplers = {
            prefixes: CandidateSampler(codes, negatives=negatives, prefixes=prefixes).to(device)
            for prefixes in (LEVELS - 1, LEVELS)
        }
        self.positives = torch.randint(0, ITEMS, (batch,), generator=g).to(device)
        self.labels = tokens.to(device)[self.positives]
        self.offsets = torch.tensor(OFFSETS, device=device)
        self.seed = 0
        names = ("ce", "once", "once, 3 lengths", "naive")
        self.models = {name: model_of(dropout, device) for name in names}
        self.optimizers = {
            name: torch.optim.AdamW(model.parameters(), lr=1e-5)
            for name, model in self.models.items()
        }

    def _update(self, name: str, loss: Tensor) -> Tensor:
        loss.backward()
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
        return loss.detach()

    def draw(self, prefixes: int = LEVELS) -> Candidates:
        self.seed += 1
        return self.samplers[prefixes].draw(self.positives, self.seed)

    def ce(self) -> Tensor:
        out = self.models["ce"](input_ids=self.ids, attention_mask=self.mask, labels=self.labels)
        return self._update("ce", out.loss)

    def once(self, name: str = "once", prefixes: int = LEVELS) -> Tensor:
        drawn = self.draw(prefixes)
        logps = sid_pairwise_logps(
            self.models[name],
            drawn,
            input_ids=self.ids,
            attention_mask=self.mask,
            offsets=OFFSETS,
            prefixes=prefixes,
        )
        weights = torch.full((prefixes,), 1 / prefixes, device=logps.device)
        loss, _ = prefix_pairwise_loss_from_logps(
            logps, drawn.duplicates, drawn.log_scale, weights, BETA
        )
        return self._update(name, loss)

    def naive(self) -> Tensor:
        drawn, model = self.draw(), self.models["naive"]
        C = drawn.items.shape[1]
        tokens = drawn.codes + self.offsets
        states = model.get_encoder()(input_ids=self.ids, attention_mask=self.mask)[0]
        out = model(
            encoder_outputs=(states.repeat_interleave(C, 0),),
            attention_mask=self.mask.repeat_interleave(C, 0),
            labels=tokens.flatten(0, 1),
        )
        loss, _ = prefix_pairwise_loss(
            out.logits.view(*tokens.shape, -1),
            tokens,
            drawn.duplicates,
            drawn.log_scale,
            torch.full((LEVELS,), 1 / LEVELS, device=states.device),
            BETA,
        )
        return self._update("naive", loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--negatives", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--naive", type=int, nargs="*", default=[16], help="batches it is run at")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="4 users, 20 negatives, one repeat")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.naive, args.negatives, args.repeats = [4], [4], 20, 1
    rows, raw = [], []
    for dropout in (0.0, 0.1):
        for batch in args.batches:
            steps = Steps(batch, args.negatives, dropout, args.device)
            short = lambda steps=steps: steps.once("once, 3 lengths", LEVELS - 1)
            methods = {"ce": steps.ce, "once": steps.once, "once, 3 lengths": short}
            if batch in args.naive:
                methods["naive"] = steps.naive
            repeats = {name: args.repeats for name in methods}
            if "naive" in repeats:
                repeats["naive"] = min(3, args.repeats)
            times = interleaved(methods, repeats, device=args.device)
            memory = {name: peak_memory(method, args.device) for name, method in methods.items()}
            drawn = steps.draw()
            nodes = sum(len(context.users) for context in drawn.contexts) / batch
            base = times["ce"]["median"]
            for name, time in times.items():
                rows.append(
                    [
                        f"{dropout}",
                        f"{batch}",
                        name,
                        f"{ms(time['median'])} ({ms(time['p20'])} to {ms(time['p80'])})",
                        f"{time['median'] / base:.2f}",
                        f"{memory[name]:.0f}",
                    ]
                )
            raw.append(
                {
                    "dropout": dropout,
                    "batch": batch,
                    "negatives": args.negatives,
                    "contexts_a_user": nodes,
                    "times": times,
                    "peak_mib": memory,
                }
            )
            print(rows[-len(times) :], f"contexts a user {nodes:.0f}", flush=True)
    header = ["dropout", "batch", "step", "ms (p20 to p80)", "times cross-entropy", "peak MiB"]
    command = "python bench/pairwise_t5.py" + (" --device cuda" if args.device == "cuda" else "")
    write_report(
        "pairwise-t5-quick" if args.quick else f"pairwise-t5-{args.device}",
        "Pairwise steps on Hugging Face T5",
        command,
        [
            f"T5 of width 128, 4 + 4 layers, 6 heads of 64, 1024 inner; {LENGTH} tokens read, "
            f"{LEVELS} levels of {CODES} codes, {args.negatives} negatives.",
            "",
            *table(header, rows),
        ],
        raw,
        device=args.device,
    )


if __name__ == "__main__":
    main()
