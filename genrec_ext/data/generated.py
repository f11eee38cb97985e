"""A small catalogue with a known truth: the embedded default of the demo and of the tests.

People buy along their tastes. Every item belongs to a taste and has a maker; what comes next
depends on the tastes of the last two items, on the maker of the last, and on popularity, which is
long-tailed. The texts tell taste and maker, so a tokenizer can find them. The process is written
out as a conditional distribution, from which the sequences are drawn, so the best Recall that any
recommender can reach is computed, not guessed. Touches no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .interactions import Interactions

# Taste -> the kinds of things that it buys; the words of titles and descriptions.
_TASTES = {
    "camping": ("tent", "lantern", "sleeping bag", "camp stove", "hammock"),
    "coffee": ("grinder", "kettle", "espresso cups", "milk frother", "drip filter"),
    "gardening": ("pruner", "watering can", "seed tray", "trowel", "raised bed"),
    "cycling": ("helmet", "bike light", "floor pump", "saddle", "pannier"),
    "painting": ("easel", "watercolor set", "palette knife", "canvas", "brush roll"),
    "baking": ("mixing bowl", "rolling pin", "loaf pan", "proofing basket", "piping bag"),
    "photography": ("tripod", "lens cap", "flash diffuser", "camera strap", "light meter"),
    "music": ("guitar strings", "metronome", "capo", "tuner", "music stand"),
    "fishing": ("reel", "tackle box", "landing net", "lure set", "rod holder"),
    "knitting": ("yarn skein", "needle case", "stitch markers", "yarn bowl", "row counter"),
    "woodworking": ("chisel", "marking gauge", "bar clamp", "hand plane", "mallet"),
    "running": ("hydration vest", "running socks", "foam roller", "armband", "headlamp"),
    "aquarium": ("air pump", "gravel vacuum", "driftwood", "heater", "fish net"),
    "astronomy": ("star chart", "eyepiece", "red flashlight", "finder scope", "moon filter"),
    "puzzles": ("jigsaw", "puzzle mat", "cube", "sorting trays", "brain teaser"),
    "office": ("stapler", "desk lamp", "label printer", "paper tray", "fountain pen"),
    "sewing": ("thread set", "seam ripper", "pin cushion", "fabric shears", "bobbin box"),
    "yoga": ("yoga mat", "cork block", "strap", "bolster", "meditation cushion"),
    "grilling": ("tongs", "smoker box", "grill brush", "meat thermometer", "skewers"),
    "sailing": ("dry bag", "deck shoes", "shackle", "compass", "life vest"),
}
_MAKERS = ("Norden", "Halvik", "Brightwell", "Casa Oriel", "Tamaro")
_STYLES = ("compact", "classic", "deluxe", "everyday", "folding", "heavy-duty", "light", "slim")

# The taste before the last falls into one of this many kinds, and each kind sends the last taste
# somewhere else: order carries information that counting what goes together averages away.
_KINDS = 3
# Chance that the next taste is the one that the last two tastes lead to, else any by popularity.
_LED = 0.75
# Chance that the next item has the last item's maker, else any by popularity.
_LOYAL = 0.8
# Chance of an item by popularity alone, whatever came before.
_STRAY = 0.1
# Share of items that are launched only when the test items are drawn, and the chance of one then.
_COLD_ITEMS = 0.05
_COLD_CHANCE = 0.08
_SHORTEST, _MEAN_LENGTH, _LONGEST = 5, 10, 40


class BestRecall(NamedTuple):
    """What the best possible recommender reaches."""

    expected: float
    """Mean over users of the chance that the test item is among the k likeliest."""
    realised: float
    """Recall@k of those rankings on the test items that were drawn."""


@dataclass(frozen=True, eq=False)
class _Process:
    """The next-item distribution. N items, T tastes, M makers."""

    taste: np.ndarray  # int64 [N]
    maker: np.ndarray  # int64 [N]
    leads_to: np.ndarray  # int64 [T, kinds]: next taste, by the last and the kind before it
    kind: np.ndarray  # int64 [T]
    taste_share: np.ndarray  # [T], sums to 1
    maker_share: np.ndarray  # [M], sums to 1
    in_cell: np.ndarray  # [N], popularity among the warm items of the same taste and maker
    overall: np.ndarray  # [N], popularity among all warm items
    cold: np.ndarray  # bool [N]

    def probabilities(self, histories: Sequence[np.ndarray], launched: np.ndarray) -> np.ndarray:
        """Distribution of the next item, float64 `[U, N]`; `launched [U]`: cold ones are on sale.

        Nobody buys an item twice.
        """
        last = np.array([history[-1] for history in histories])
        before = np.array([history[-2 if len(history) > 1 else -1] for history in histories])
        rows = np.arange(len(histories))
        led = self.leads_to[self.taste[last], self.kind[self.taste[before]]]
        taste = np.tile((1.0 - _LED) * self.taste_share, (len(rows), 1))
        taste[rows, led] += _LED
        maker = np.tile((1.0 - _LOYAL) * self.maker_share, (len(rows), 1))
        maker[rows, self.maker[last]] += _LOYAL

        fitting = taste[:, self.taste] * maker[:, self.maker]
        warm = (1.0 - _STRAY) * fitting * self.in_cell + _STRAY * self.overall
        owner = np.repeat(rows, [len(history) for history in histories])
        warm[owner, np.concatenate(histories)] = 0.0
        warm /= warm.sum(axis=1, keepdims=True)
        cold = fitting * self.cold
        cold /= cold.sum(axis=1, keepdims=True)
        share = np.where(launched, _COLD_CHANCE, 0.0)[:, None]
        return (1.0 - share) * warm + share * cold


@dataclass(frozen=True, eq=False)
class GeneratedCatalogue:
    """Interactions whose truth is known.

    Args:
        data: the interactions; texts and titles, no semantic IDs.
        cold_items: int64, items that occur in no training or validation position.
        test_probabilities: float64 `[num_users, num_items]`, the distribution from which each
            user's last item was drawn, given all items before it.
    """

    data: Interactions
    cold_items: np.ndarray
    test_probabilities: np.ndarray

    def best_items(self, k: int) -> np.ndarray:
        """The k likeliest test items of each user, int64 `[num_users, k]`, likeliest first.

        No recommender has a higher expected Recall@k, nor NDCG@k or MRR@k.
        """
        return np.argsort(-self.test_probabilities, axis=1, kind="stable")[:, :k]

    def best_recall(self, k: int) -> BestRecall:
        """The Bayes-optimal Recall@k on the test items."""
        best = self.best_items(k)
        targets = np.array([sequence[-1] for sequence in self.data.sequences])
        mass = np.take_along_axis(self.test_probabilities, best, axis=1).sum(axis=1)
        return BestRecall(
            expected=float(mass.mean()),
            realised=float((best == targets[:, None]).any(axis=1).mean()),
        )


def generate(seed: int = 0, num_users: int = 3000, num_items: int = 1000) -> GeneratedCatalogue:
    """Draw a catalogue and its users.

    Args:
        seed: everything follows from it.
        num_users: sequences of 5 to 40 items, 10 in the mean, the last being the test item.
        num_items: at least 250, so that every taste has warm items of every maker.

    Raises:
        ValueError: too few users or items.
    """
    cells = len(_TASTES) * len(_MAKERS)
    if num_users < 1:
        raise ValueError(f"num_users: {num_users}; expected 1 or more")
    if num_items < 250:
        raise ValueError(f"num_items: {num_items}; expected 250 or more")
    generator = np.random.default_rng(seed)

    # Deal all items, in random order, round the (taste, maker) cells: an id tells nothing.
    order = generator.permutation(num_items)
    cell = np.empty(num_items, dtype=np.int64)
    cell[order] = np.arange(num_items) % cells
    taste, maker = cell // len(_MAKERS), cell % len(_MAKERS)
    cold = np.zeros(num_items, dtype=bool)
    cold[order[-round(_COLD_ITEMS * num_items) :]] = True

    popularity = np.where(cold, 0.0, _zipf(generator, num_items))
    process = _Process(
        taste=taste,
        maker=maker,
        leads_to=np.stack(
            [generator.choice(len(_TASTES), size=_KINDS, replace=False) for _ in _TASTES]
        ),
        kind=generator.permutation(np.arange(len(_TASTES)) % _KINDS),
        taste_share=_zipf(generator, len(_TASTES)),
        maker_share=_zipf(generator, len(_MAKERS)),
        in_cell=popularity / np.bincount(cell, popularity)[cell],
        overall=popularity / popularity.sum(),
        cold=cold,
    )

    lengths = _SHORTEST + generator.geometric(1.0 / (_MEAN_LENGTH - _SHORTEST + 1), num_users) - 1
    lengths = np.minimum(lengths, _LONGEST)
    sequences = np.full((num_users, int(lengths.max())), -1, dtype=np.int64)
    sequences[:, 0] = _draw(generator, np.tile(process.overall, (num_users, 1)))
    test_probabilities = np.empty((num_users, num_items))
    for step in range(1, sequences.shape[1]):
        users = np.flatnonzero(lengths > step)
        final = lengths[users] == step + 1
        probabilities = process.probabilities(list(sequences[users, :step]), final)
        sequences[users, step] = _draw(generator, probabilities)
        test_probabilities[users[final]] = probabilities[final]

    titles, texts = _describe(generator, taste, maker)
    data = Interactions(
        name="generated",
        sequences=[row[:length].copy() for row, length in zip(sequences, lengths, strict=True)],
        user_ids=[str(user) for user in range(num_users)],
        item_ids=[str(item) for item in range(num_items)],
        titles=titles,
        texts=texts,
    )
    return GeneratedCatalogue(data, np.flatnonzero(cold), test_probabilities)


def _zipf(generator: np.random.Generator, size: int) -> np.ndarray:
    """Shares proportional to 1/rank, ranks at random."""
    shares = 1.0 / (1.0 + generator.permutation(size))
    return shares / shares.sum()


def _draw(generator: np.random.Generator, probabilities: np.ndarray) -> np.ndarray:
    """One column a row of `[U, N]`, by inverting each row's cumulative distribution."""
    cumulative = np.cumsum(probabilities, axis=1)
    points = generator.random((len(probabilities), 1)) * cumulative[:, -1:]
    return (cumulative <= points).sum(axis=1)


def _describe(
    generator: np.random.Generator, taste: np.ndarray, maker: np.ndarray
) -> tuple[list[str], list[str]]:
    titles, texts = [], []
    tastes = list(_TASTES.items())
    for number, (of_taste, of_maker) in enumerate(zip(taste, maker, strict=True)):
        name, things = tastes[of_taste]
        brand = _MAKERS[of_maker]
        thing, other, third = generator.permutation(things)[:3]
        style = generator.choice(_STYLES)
        title = f"{brand} {style} {thing} {100 + number}"
        titles.append(title)
        texts.append(
            f"{title} {brand} {name} A {style} {thing} for {name} by {brand}. "
            f"Goes well with our {other} and {third}."
        )
    return titles, texts
