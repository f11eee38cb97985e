"""A trained run as files that other tools read: safetensors, JSON, and a model card.

Writes and reads a folder; the run itself is in ``run``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..trie import Trie
from . import checkpoint
from .run import GENERATED, Run, load, restored

FORMAT, VERSION = "genrec.recommender", 1
WEIGHTS, CONFIG, ITEMS = "model.safetensors", "config.json", "items.json"
CATALOGUE, CARD, TOKENIZER = "catalogue.safetensors", "README.md", "tokenizer.safetensors"


def export(run: str | Path, out: str | Path, *, license: str | None = None) -> list[Path]:
    """Writes a run's model for other programs and other people.

    ``out`` gets ``model.safetensors`` (the state of :class:`genrec_ext.models.CompactRecommender`),
    ``config.json`` (its settings), ``items.json`` (the items' ids and titles, in the order of
    their indices), ``catalogue.safetensors`` (:meth:`genrec_ext.Trie.save`; docs/catalogue.md
    describes its arrays), ``README.md``, a model card, and the run's ``tokenizer.safetensors`` if
    it has one.  ``genrec recommend`` and ``genrec evaluate`` take the folder like a run's.  Files
    of the same names are replaced.

    Args:
        run: a run folder.
        out: the folder to write, made if there is none.
        license: of the model, an identifier for the card; default: the card has none.

    Returns:
        The files.

    Raises:
        CheckpointError: there is no usable ``model.pt`` in ``run``.
        OSError: a file cannot be written.
        ImportError: safetensors is not installed.
    """
    from safetensors.torch import save

    found = load(run)
    metrics = _metrics(Path(run))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in found.model.state_dict().items()}
    checkpoint.save_bytes(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    source = {**found.source, "path": _name(found)}
    checkpoint.save_json(
        folder / CONFIG,
        {
            "format": FORMAT,
            "version": VERSION,
            "architecture": type(found.model).__name__,
            "genrec_version": __version__,
            "model": dataclasses.asdict(found.model.config),
            "level_sizes": found.model.level_sizes,
            "source": source,
        },
    )
    checkpoint.save_json(folder / ITEMS, {"item_ids": found.item_ids, "titles": found.titles})
    trie = Trie.from_items(
        found.model.codes,
        found.item_ids,
        level_offsets=found.model.level_offsets.tolist(),
        level_sizes=found.model.level_sizes,
    )
    trie.save(folder / CATALOGUE)
    checkpoint.save_text(folder / CARD, card(found, metrics, license))
    written = [WEIGHTS, CONFIG, ITEMS, CATALOGUE, CARD]
    tokenizer = Path(run) / TOKENIZER
    if tokenizer.exists():
        checkpoint.save_bytes(folder / TOKENIZER, tokenizer.read_bytes())
        written.append(TOKENIZER)
    return [folder / name for name in written]


def load_export(folder: Path, device: str = "cpu") -> Run:
    """Opens what :func:`export` wrote.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format.
    """
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text())
        if config.get("format") != FORMAT or config.get("version") != VERSION:
            raise checkpoint.CheckpointError(
                f"{folder / CONFIG}: format {config.get('format')!r} version "
                f"{config.get('version')!r}; this release reads {FORMAT!r} version {VERSION}"
            )
        items = json.loads((folder / ITEMS).read_text())
        state: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
        model = restored(state, config["model"], config["level_sizes"], device)
        item_ids, titles, source = items["item_ids"], items["titles"], config["source"]
        if len(item_ids) != model.num_items:
            raise ValueError(f"{ITEMS} has {len(item_ids)} items, the model {model.num_items}")
    except checkpoint.CheckpointError:
        raise
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        raise checkpoint.CheckpointError(f"{folder}: no readable export ({error!r})") from error
    return Run(model, model.trie(), item_ids, titles, source)


def _metrics(run: Path) -> dict[str, Any] | None:
    path = run / "metrics.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise checkpoint.CheckpointError(
            f"{path}: {type(found).__name__}; expected figures and their values"
        )
    return found


def _name(run: Run) -> str:
    """The data's name, without where they lie."""
    path = run.source["path"]
    return path if path == GENERATED else Path(path).name


# ---- the card ----

_FIGURES = ("recall@5", "recall@10", "ndcg@10", "cold_recall@10", "coverage@10", "invalid_rate")


def card(run: Run, metrics: dict[str, Any] | None, license: str | None = None) -> str:
    """A model card in Markdown, with the front matter that model hubs read.

    Args:
        run: the run.
        metrics: the content of its ``metrics.json``; None leaves figures and settings out.
        license: an identifier, or None.
    """
    model, name = run.model, _name(run)
    head = ["library_name: genrec", "tags: [recommendation, generative-retrieval, semantic-ids]"]
    if license is not None:
        head.append(f"license: {_yaml(license)}")
    if metrics is not None:
        head += _model_index(name, metrics)
    parameters = sum(p.numel() for p in model.parameters())
    shared = run.trie.report()["colliding_items"]
    sizes = ", ".join(map(str, model.level_sizes))
    text = [
        "---",
        *head,
        "---",
        "",
        f"# Generative recommender for {name}",
        "",
        "Writes the semantic IDs of the items that a user takes next: "
        f"{len(run.item_ids):,} items, {len(model.level_sizes)} codes each (of {sizes}), "
        f"{shared:,} items share theirs with another. A causal transformer over the history, "
        f"{parameters:,} parameters, decoded by beam search under the catalogue's trie, so that it "
        "never writes what is no item.",
        "",
        "## Use",
        "",
        "```",
        "genrec recommend THIS_FOLDER --history ID,ID,ID -k 10",
        "genrec evaluate THIS_FOLDER --data DATA",
        "```",
        "",
        "`model.safetensors` and `config.json` are the weights and settings of "
        "`genrec_ext.models.CompactRecommender`, `items.json` the items' ids and titles by "
        "index, `catalogue.safetensors` the trie, for `genrec_ext.Trie.load` or any reader of "
        "safetensors.",
    ]
    if metrics is not None:
        text += _figures(metrics) + _settings(run, metrics)
    text += [
        "",
        "## Limits",
        "",
        "Knows the items of its catalogue only. Learned from what users took in the past: it "
        "repeats what was popular then, and says little of items with few interactions or none "
        "(`cold_recall@10`, where figures are given). Histories longer than "
        f"{model.config.max_history} items are cut to their latest.",
        "",
    ]
    return "\n".join(text)


def _model_index(name: str, metrics: dict[str, Any]) -> list[str]:
    """The figures as hubs read them."""
    index = [
        {
            "name": "genrec",
            "results": [
                {
                    "task": {"type": "recommendation"},
                    "dataset": {"name": name, "type": name},
                    "metrics": [
                        {"type": figure, "value": round(metrics["test"][figure], 6)}
                        for figure in _FIGURES[:3]
                    ],
                }
            ],
        }
    ]
    return [f"model-index: {_yaml(index)}"]


def _yaml(value: Any) -> str:
    """JSON, which is YAML but for some characters: those past \\uFFFF have another escape."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if " " <= c <= "~" else f"\\U{ord(c):08x}" for c in text)


def _figures(metrics: dict[str, Any]) -> list[str]:
    split = metrics["config"].get("split", "leave-one-out")
    what = {
        "leave-one-out": "each user's last item",
        "time": "each user's last item after the 90% quantile of all times",
    }
    rows = {"this model": metrics["test"], **metrics["baselines"]}
    lines = [
        "",
        "## Figures",
        "",
        f"Test: {what.get(split, split)}, ranked among the whole catalogue.",
        "",
        f"| | {' | '.join(_FIGURES)} |",
        f"|---|{'---|' * len(_FIGURES)}",
    ]
    for name, figures in rows.items():
        cells = (figures.get(figure) for figure in _FIGURES)
        shown = ("-" if cell is None else f"{cell:.4f}" for cell in cells)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def _settings(run: Run, metrics: dict[str, Any]) -> list[str]:
    config = metrics["config"]
    stage = {**config["sft"], "epochs": config["epochs"] or config["sft"]["epochs"]}
    return [
        "",
        "## Training",
        "",
        f"`genrec train` {config['genrec']}, torch {config['torch']}, stages {config['stages']}, "
        f"seed {config['seed']}, {metrics['seconds'] / 60:.1f} minutes on "
        f"{config['device']} with {config['threads']} threads. Data: {_name(run)}, fingerprint "
        f"`{run.source['fingerprint'][:16]}`.",
        "",
        "```json",
        json.dumps({"model": config["model"], "sft": stage}, indent=1),
        "```",
    ]
