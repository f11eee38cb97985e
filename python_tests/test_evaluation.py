"""What the beams kept of targets' prefixes, against a beam search of its own."""

import numpy as np
import pytest
import torch

from genrec_ext.models import CompactConfig, CompactRecommender
from genrec_ext.training import evaluation

CODES = np.array([[a, b, c] for a in range(3) for b in range(4) for c in range(2) if a + b != 4])


@torch.no_grad()
def beams_by_hand(model, state, width):
    """The prefixes that a search keeps after each level, as sets."""
    beams, kept = [((), 0.0)], []
    for level in range(3):
        grown = []
        for prefix, score in beams:
            logits = model.level_logits(state, torch.tensor([prefix], dtype=torch.int64))[0]
            alike = [tuple(row) for row in CODES.tolist() if tuple(row[:level]) == prefix]
            children = sorted({row[level] for row in alike})
            own = logits[children].log_softmax(-1).tolist()
            grown += [((*prefix, c), score + x) for c, x in zip(children, own)]
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
        kept.append({prefix for prefix, _ in beams})
    return kept


@pytest.mark.parametrize("width", (1, 3, 6))
def test_a_trace_knows_which_level_lost_the_target(width, monkeypatch):
    monkeypatch.setattr(evaluation, "USERS", 4)  # several searches
    torch.manual_seed(1)
    model = CompactRecommender(CompactConfig(width=8, max_history=5), CODES, [3, 4, 2]).eval()
    with torch.no_grad():
        for parameter in model.depth.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, len(CODES), rng.integers(0, 5)) for _ in range(10)]
    targets = rng.integers(0, len(CODES), 10)
    trace = evaluation.PrefixTrace(model.trie(), torch.from_numpy(CODES[targets]))
    items = evaluation.rank(model, model.trie(), histories, k=1, width=width, trace=trace).items
    assert trace.kept.shape == (10, 3)
    for user, target in enumerate(targets):
        state = model.encode(model.pad([histories[user]]))
        found = beams_by_hand(model, state, width)
        wanted = [float(tuple(CODES[target, : t + 1]) in found[t]) for t in range(3)]
        assert trace.kept[user].tolist() == wanted
        assert wanted[2] >= float(items[user, 0] == target)
    assert trace.kept[:, 0].mean() > 0 and trace.kept[:, 2].mean() < 1
