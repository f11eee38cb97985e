"""A saved run: the model with all that recommending and evaluating need, in one file."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import data as data_module
from ..data import Interactions, Split
from ..models import CompactConfig, CompactRecommender
from ..trie import Trie
from . import checkpoint, distributed, evaluation

MODEL_FILE = "model.pt"
GENERATED = "generated"


@dataclass
class Run:
    """What ``model.pt`` holds, ready to use."""

    model: CompactRecommender
    trie: Trie
    item_ids: list[str]
    titles: list[str] | None
    source: dict[str, Any]
    """Where the data were and what was made of them: path, index, seed, reading, split and
    fingerprint."""


def save(
    folder: Path, model: CompactRecommender, data: Interactions, source: dict[str, Any]
) -> None:
    """Writes ``model.pt`` into a run folder."""
    checkpoint.save(
        folder / MODEL_FILE,
        {
            "model": model.state_dict(),
            "config": dataclasses.asdict(model.config),
            "level_sizes": model.level_sizes,
            "item_ids": data.item_ids,
            "titles": data.titles,
            "source": source,
        },
    )


def load(folder: str | Path, device: str = "cpu") -> Run:
    """Opens a run folder, or what :func:`genrec_ext.training.export` made of one.

    Raises:
        CheckpointError: there is no usable ``model.pt``, nor an export.
        ValueError: torch has no such ``device`` here.
    """
    from .export import CONFIG, load_export

    distributed.check_device(device)

    if not (Path(folder) / MODEL_FILE).exists() and (Path(folder) / CONFIG).exists():
        return load_export(Path(folder), device)
    content = checkpoint.load(Path(folder) / MODEL_FILE)
    try:
        model = restored(content["model"], content["config"], content["level_sizes"], device)
        return Run(model, model.trie(), content["item_ids"], content["titles"], content["source"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(
            f"{Path(folder) / MODEL_FILE}: no model that this version knows ({error!r})"
        ) from error


def restored(
    state: dict[str, torch.Tensor], config: dict[str, Any], level_sizes: list[int], device: str
) -> CompactRecommender:
    """A model of its state and settings, ready to decode."""
    features = state.get("items.features")
    model = CompactRecommender(CompactConfig(**config), state["items.codes"], level_sizes, features)
    model.load_state_dict(state)
    return model.to(device).eval()


def open_data(source: dict[str, Any]) -> Interactions:
    """The data of a run: what its ``source`` says, or the generated catalogue."""
    if source["path"] in (None, GENERATED):
        return data_module.generate(source["seed"]).data
    # Who has few items can still be learned from where the split is by time.
    fewest = 1 if source.get("split") == "time" else 3
    return data_module.load(
        source["path"],
        index=source["index"],
        seed=source["seed"],
        min_interactions=fewest,
        **source.get("reading", {}),
    )


def split_data(data: Interactions, source: dict[str, Any]) -> Split:
    """The split of a run."""
    if source.get("split") == "time":
        return data_module.time_split(data, quantiles=(0.8, 0.9))
    return data_module.leave_one_out(data)


def evaluate(
    folder: str | Path,
    *,
    data: str | Path | None = None,
    device: str = "cpu",
    clock: evaluation.DecodeClock | None = None,
) -> dict[str, Any]:
    """The test figures of a run, made again from its model and the data.

    Args:
        folder: the run folder.
        data: the run's data; default: where they were when it was trained.
        device: where to decode.
        clock: is told how long decoding took.

    Returns:
        The same dict as ``metrics.json``'s ``test``, to the last digit on the same device.

    Raises:
        ValueError: the data are not those that the run was trained on.
    """
    run = load(folder, device)
    source = run.source
    found = open_data(source if data is None else {**source, "path": str(data)})
    if found.fingerprint() != source["fingerprint"]:
        read = [] if found.report is None else list(found.report.files)
        others = ""
        if source.get("files", read) != read:
            others = f"; read {', '.join(read)}, where the run read {', '.join(source['files'])}"
        raise ValueError(
            f"data: {data or source['path']} is not what {folder} was trained on (fingerprint "
            f"{found.fingerprint()[:12]}, expected {source['fingerprint'][:12]}{others})"
        )
    split = split_data(found, source)
    progress = None if importlib.util.find_spec("tqdm") is None else "test"
    ranking = evaluation.rank_test(run.model, run.trie, split, clock, progress)
    return evaluation.test_figures(ranking, split, run.model.codes.cpu().numpy())


def recommend(
    folder: str | Path, history: Sequence[object], k: int = 10, *, unseen: bool = False
) -> list[dict[str, Any]]:
    """The best items after a history.

    Args:
        folder: the run folder.
        history: the data's own item ids, as text or as numbers, oldest first; empty for a new user.
        k: how many, at least 1.
        unseen: leave out the items of the history.

    Returns:
        A dict an item, best first: ``item`` (id), ``title`` (or None) and ``score``, the
        log-probability of its semantic ID.  Items that share one are listed together.

    Raises:
        ValueError: an id is none of the catalogue's, or k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    run = load(folder)
    place = {key: i for i, key in enumerate(run.item_ids)}
    told = [str(key) for key in history]  # blanks around an id count where it has them
    keys = [key if key in place else key.strip() for key in told if key.strip()]
    unknown = [key for key in keys if key not in place]
    if unknown:
        raise ValueError(
            f"history: unknown item ids {', '.join(unknown[:5])}; the catalogue has "
            f"{len(run.item_ids)} items such as {', '.join(run.item_ids[:3])}"
        )
    items = np.array([place[key] for key in keys], dtype=np.int64)
    forbidden = torch.zeros(len(run.item_ids), dtype=torch.bool)
    if unseen:
        forbidden[items] = True
    found = evaluation.decode(
        run.model, run.trie, [items], max(k, evaluation.WIDTH), forbidden if unseen else None
    )
    result: list[dict[str, Any]] = []
    for leaf, score in zip(found.leaves[0].tolist(), found.scores[0].tolist(), strict=True):
        if leaf < 0:
            break
        for item in run.trie.items_of(leaf).tolist():
            if not forbidden[item]:
                title = run.titles[item] if run.titles else None
                result.append({"item": run.item_ids[item], "title": title, "score": score})
    return result[:k]
