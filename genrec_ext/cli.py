"""The ``genrec`` command: demo, train, evaluate, compare, recommend, export, tokenize, data, info.

Parses arguments, calls ``training``, ``tokenizers`` or ``data`` and prints; no logic lives here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._version import __version__
from .tokenizers import command, kinds

OBJECTIVES = ("ce", "msl", "bear", "apao-pointwise", "apao-pairwise")  # as training has them


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="genrec", description="Generative recommendation: train, decode, evaluate."
    )
    parser.add_argument("--version", action="version", version=f"genrec {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="the whole product on a generated catalogue, in a few minutes"
    )
    demo.add_argument("--out", default="runs/demo", help="run folder (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)

    train = commands.add_parser("train", help="train a recommender and evaluate it")
    train.add_argument(
        "--data",
        help="a folder with X.inter.json (and X.index*.json, X.item.json) or a text file of "
        "'user item item ...' lines, or what else `genrec data` reads; default: the generated "
        "catalogue",
    )
    _reading_options(train.add_argument_group("reading the data"))
    train.add_argument(
        "--split",
        choices=("leave-one-out", "time"),
        help="each user's last items, or what comes after the 80%% and 90%% quantiles of all times "
        "(default: leave-one-out)",
    )
    train.add_argument("--out", help="run folder; needed unless the configuration names it")
    train.add_argument("--config", help="a YAML file of settings, such as a run's own config.yaml")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any setting, such as sft.rate=1e-3 or model.width=96; stronger than --config, weaker "
        "than the options here; may be repeated",
    )
    train.add_argument("--index", help="which X.index*.json, where there are several")
    train.add_argument(
        "--minutes", type=_positive(float), help="wall-clock budget of the whole command"
    )
    train.add_argument("--epochs", type=_positive(int), help="epochs of the sft stage")
    train.add_argument("--seed", type=int, help="of everything random (default: 0)")
    train.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cpu)")
    train.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="of the sft stage: cross-entropy over all codes of a level (ce) or those that can "
        "follow (msl), BEAR, or APAO's two forms (default: msl)",
    )
    train.add_argument("--stages", help="of sft, bilevel and rl, in this order (default: sft,rl)")
    train.add_argument(
        "--tokenizer",
        choices=("data", "rqvae"),
        help="the data's semantic IDs, or residual k-means where they have none (data), or an "
        "RQ-VAE (default: rqvae for the stage bilevel, else data)",
    )
    bilevel = train.add_argument_group("the stage bilevel")
    bilevel.add_argument(
        "--joint",
        choices=("bilevel", "alternating", "simultaneous"),
        help="how tokenizer and recommender share it: BLOGER, ETEGRec's whole epochs in turn, or "
        "both at every step (default: bilevel)",
    )
    bilevel.add_argument(
        "--order", choices=("0", "1", "fd", "2"), help="of the meta-gradient (default: fd)"
    )
    bilevel.add_argument(
        "--surgery",
        choices=("projection", "released", "none"),
        help="of conflicting gradients (default: projection)",
    )
    bilevel.add_argument(
        "--updates-per-epoch", type=_positive(int), help="of the tokenizer (default: 1)"
    )
    train.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="under torchrun: every process holds the whole model, or a part of it (default: ddp)",
    )
    train.add_argument(
        "--resume", action="store_true", help="go on from the run folder's checkpoint"
    )
    train.add_argument(
        "--overwrite", action="store_true", help="take the place of the run in the folder"
    )
    train.add_argument(
        "--track",
        action="append",
        choices=("tensorboard", "trackio", "wandb"),
        help="send figures there too, as they come; may be repeated (RUN/tensorboard, trackio's "
        "and wandb's project genrec)",
    )

    evaluate = commands.add_parser("evaluate", help="repeat a run's test figures")
    evaluate.add_argument("run", help="run folder")
    evaluate.add_argument("--data", help="the data of the run (default: where they were)")
    evaluate.add_argument("--device", default="cpu")

    compare = commands.add_parser(
        "compare", help="runs on the same data side by side, with intervals over users"
    )
    compare.add_argument("runs", nargs="*", metavar="run", help="run folders")
    compare.add_argument(
        "--group",
        action="append",
        default=[],
        type=_group,
        metavar="NAME=RUN,RUN,..",
        help="runs that count as one, such as seeds of one setting; after the plain ones",
    )
    compare.add_argument(
        "--metric",
        action="append",
        help="recall@K, ndcg@K, mrr@K or hit@K; cold_, rare_, head_ or tail_ before it for those "
        "targets alone; coverage@K, entropy@K or gini@K; diversity@10, list_entropy@10, "
        "tail_share@10 or miscalibration@10; may be repeated (default: recall and ndcg at 5 and "
        "10)",
    )
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument("--out", metavar="FILE", help="draw a picture, X.png")

    recommend = commands.add_parser("recommend", help="items for a history")
    recommend.add_argument("run", help="run folder")
    recommend.add_argument(
        "--history",
        required=True,
        type=_history,
        help="item ids of the data, oldest first: apart by commas, or a JSON list",
    )
    recommend.add_argument("-k", type=_positive(int), default=10, help="how many (default: 10)")
    recommend.add_argument("--unseen", action="store_true", help="leave out items of the history")
    recommend.add_argument("--json", action="store_true", help="print JSON")

    export = commands.add_parser(
        "export", help="a run's model as safetensors and JSON, with a model card"
    )
    export.add_argument("run", help="run folder")
    export.add_argument("--out", required=True, help="the folder to write")
    export.add_argument("--license", help="of the model, for the card, such as apache-2.0")

    tokenize = commands.add_parser("tokenize", help="semantic IDs for a catalogue")
    tokenize.add_argument(
        "--items",
        required=True,
        help="X.item.json (titles, brands, ...), .npy (floats, a row an item) or .parquet",
    )
    tokenize.add_argument("--out", required=True, help="the index table, X.index.json")
    tokenize.add_argument("--ids", help="for .npy: a file with an item id a line (default: 0, 1..)")
    tokenize.add_argument("--id-column", help="for .parquet (default: item_id)")
    tokenize.add_argument("--embedding-column", help="for .parquet (default: embedding, if any)")
    tokenize.add_argument("--text-column", help="for .parquet, instead (default: text)")
    tokenize.add_argument(
        "--encoder",
        help="of texts: tfidf, or the name or folder of a sentence-transformers model "
        "(default: tfidf)",
    )
    tokenize.add_argument(
        "--dimensions",
        type=_positive(int),
        help=f"of tfidf's vectors (default: {command.DIMENSIONS})",
    )
    tokenize.add_argument(
        "--method", choices=list(kinds()), default="residual-kmeans", help="(default: %(default)s)"
    )
    tokenize.add_argument(
        "--levels", type=_positive(int), default=3, help="codes an item (default: %(default)s)"
    )
    tokenize.add_argument(
        "--codebook-size", type=_positive(int), default=256, help="(default: %(default)s)"
    )
    tokenize.add_argument("--seed", type=int, default=0)
    tokenize.add_argument(
        "--collisions",
        choices=command.COLLISIONS,
        default="suffix",
        help="what to do about items that share an ID: nothing, append a level, change the fewest "
        "last codes, the same with room for --capacity items an ID, or balanced assignments "
        "(default: %(default)s)",
    )
    tokenize.add_argument("--capacity", type=_positive(int), help="of --collisions capacity")
    tokenize.add_argument("--save-tokenizer", metavar="FILE", help="X.safetensors, besides")
    tokenize.add_argument("--json", action="store_true", help="print JSON")
    _data_parser(commands)

    info = commands.add_parser("info", help="what is installed and what this machine will use")
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _data_parser(commands: Any) -> None:
    data = commands.add_parser("data", help="read a data set and print its card")
    data.add_argument("path", nargs="+", help="a file, a folder, or the files of one data set")
    _reading_options(data)
    data.add_argument(
        "--split",
        choices=("leave-one-out", "time"),
        help="with the figures of this split; time: at the 80%% and 90%% quantiles",
    )
    data.add_argument("--json", action="store_true", help="print JSON")


def _reading_options(parser: Any) -> None:
    """What :func:`genrec_ext.data.load` takes."""
    parser.add_argument("--format", help="which format (default: recognised)")
    parser.add_argument(
        "--columns",
        type=_columns,
        help="such as user=who,item=what,time=when; or user=0,item=1; time= for none",
    )
    parser.add_argument("--time-unit", choices=("s", "ms", "us", "ns"))
    parser.add_argument(
        "--skip-malformed", action="store_true", help="count and leave out malformed rows"
    )
    parser.add_argument(
        "--drop-duplicates", action="store_true", help="leave out what repeats user, item and time"
    )
    parser.add_argument("--min-rating", type=float)
    parser.add_argument("--min-user", type=_positive(int), help="of the core (default: 1)")
    parser.add_argument("--min-item", type=_positive(int), help="of the core (default: 1)")


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of a run's configuration that were given as options."""

    def given(*names: str) -> dict[str, Any]:
        values = {name: getattr(arguments, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    options = given(
        *("data", "out", "index", "minutes", "epochs", "seed", "device", "stages", "tokenizer"),
        *("split", "track", "parallel"),
    )
    bilevel = given("joint", "order", "surgery", "updates_per_epoch")
    if bilevel.get("order", "fd") != "fd":
        bilevel["order"] = int(bilevel["order"])
    nested = {"bilevel": bilevel, "sft": given("objective"), "reading": _reading(arguments)}
    for name in ("resume", "overwrite"):
        if getattr(arguments, name):
            options[name] = True
    return {**options, **{name: part for name, part in nested.items() if part}}


def _reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of :func:`genrec_ext.data.load`, of the options that were given."""
    given = {
        name: getattr(arguments, name)
        for name in ("format", "columns", "time_unit", "min_rating", "min_user", "min_item")
        if getattr(arguments, name) is not None
    }
    if arguments.skip_malformed:
        given["malformed"] = "skip"
    if arguments.drop_duplicates:
        given["duplicates"] = "drop"
    return given


def _group(text: str) -> tuple[str, list[str]]:
    name, _, runs = text.partition("=")
    found = [run for run in runs.split(",") if run]
    if not name or not found:
        raise argparse.ArgumentTypeError(f"must be NAME=RUN,RUN,.., got {text}")
    return name, found


def _history(text: str) -> list[Any]:
    if not text.lstrip().startswith("["):
        return text.split(",")
    try:
        return list(json.loads(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is no JSON list: {error}") from error


def _columns(text: str) -> dict[str, str | int | None]:
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    return {role: int(name) if name.isdecimal() else name or None for role, name in pairs}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 for bad input."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "info":
        from . import info

        facts = info.collect()
        print(info.as_json(facts) if arguments.json else info.as_text(facts))
        return 0 if facts["operators"] else 1
    try:
        return _tokenize(arguments) if arguments.command == "tokenize" else _run(arguments)
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        print(f"genrec: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = ""
        if arguments.command == "train":
            hint = "; the same command with --resume goes on from its last checkpoint, if any"
        print(f"genrec: interrupted{hint}", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "data":
        return _data(arguments)
    from . import models, training

    if arguments.command == "demo":
        # The catalogue is small, and what comes next depends on the order of the last two items.
        config = training.TrainConfig(
            out=arguments.out,
            seed=arguments.seed,
            overwrite=True,
            minutes=3.5,
            model=models.CompactConfig(width=64),
            sft=training.SFTConfig(leave_out=0.0, average=0.0),
        )
        print(training.summary(training.train(config)))
        print(f"\nopen {Path(arguments.out) / 'report.html'}")
    elif arguments.command == "train":
        config = training.settings.load(arguments.config, arguments.set, _options(arguments))
        metrics = training.train(config)
        if os.environ.get("RANK", "0") == "0":  # under torchrun, once for all
            print(training.summary(metrics))
            print(f"\nopen {Path(config.out) / 'report.html'}")
    elif arguments.command == "evaluate":
        clock = training.DecodeClock()
        figures = training.evaluate(
            arguments.run, data=arguments.data, device=arguments.device, clock=clock
        )
        print(json.dumps(figures, indent=2))
        print(f"genrec: {clock}", file=sys.stderr)  # the figures alone can be read by a program
    elif arguments.command == "compare":
        return _compare(arguments)
    elif arguments.command == "export":
        for path in training.export(arguments.run, arguments.out, license=arguments.license):
            print(path)
    else:
        found = training.recommend(
            arguments.run, arguments.history, arguments.k, unseen=arguments.unseen
        )
        if arguments.json:
            print(json.dumps(found, indent=2))
        else:
            for place, item in enumerate(found, 1):
                title = f"  {item['title']}" if item["title"] else ""
                print(f"{place:>3}  {item['item']:>8}  {item['score']:8.4f}{title}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from .training import compare

    groups: dict[str, list[str]] = {}
    for name, runs in [*((run, [run]) for run in arguments.runs), *arguments.group]:
        if name in groups:
            raise ValueError(f"{name}: given twice; expected each run and each group's name once")
        groups[name] = runs
    if not groups:
        raise ValueError("compare: no runs; expected run folders, or --group NAME=RUN,RUN,..")
    found = compare.compare_runs(groups, arguments.metric or compare.METRICS)
    if arguments.out:
        compare.plot(found, arguments.out)
    print(json.dumps(found, indent=2) if arguments.json else compare.text(found))
    return 0


def _tokenize(arguments: argparse.Namespace) -> int:
    options = vars(arguments).copy()
    as_json = options.pop("json")
    del options["command"]
    found = command.tokenize_items(**options, progress=command.can_show_progress())
    print(json.dumps(found, indent=2) if as_json else command.summary(found))
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from . import data

    found = data.load(
        arguments.path if len(arguments.path) > 1 else arguments.path[0],
        min_interactions=3 if arguments.split == "leave-one-out" else 1,
        **_reading(arguments),
    )
    split = None
    if arguments.split == "leave-one-out":
        split = data.leave_one_out(found)
    elif arguments.split == "time":
        split = data.time_split(found, quantiles=(0.8, 0.9))
    if arguments.json:
        print(json.dumps(data.card_facts(found, split), indent=2))
    else:
        print(data.data_card(found, split))
    return 0


if __name__ == "__main__":
    sys.exit(main())
