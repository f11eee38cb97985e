"""What a run says while it goes: lines into metrics.jsonl, and into the trackers asked for.

Writes files of a run folder, or what a tracker's own library writes; knows nothing of models.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..tensor_file import naming
from . import checkpoint

LINES = "metrics.jsonl"
NAMES = "tracking.json"
PROJECT = "genrec"
"""Of trackio and, where WANDB_PROJECT says no other, of wandb."""


class Tracker(Protocol):
    """Somewhere that keeps a run's figures besides its folder."""

    held: int
    """How many of the run's lines it has already, where it goes on with an earlier run."""

    def line(self, index: int, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Keeps the figures of one line: its place among all, and the stage and step it is of."""

    def close(self, failed: bool) -> None:
        """Everything is on disk or sent afterwards."""


class Journal:
    """A run's lines, on disk as soon as they are there, and in its trackers.

    ``metrics.jsonl`` always ends with the last line noted, whatever ends the process.  A run that
    resumes begins with the lines up to its checkpoint, and repeats those after it; a tracker takes
    each line once, by its place.

    Args:
        folder: the run folder.
        track: names out of ``TRACKERS``.
        config: what the run was started with, plain values.
        lines: those of the run that this one resumes, up to its checkpoint.
        resume: go on with the tracked runs that the folder names, where there are any.

    Raises:
        ImportError: a tracker's package is missing; says how to get it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with Journal(folder, (), {}) as journal:
    ...     journal.note({"stage": "sft", "step": 3, "loss": 0.5, "seconds": 1.0})
    >>> (folder / LINES).read_text()
    '{"stage": "sft", "step": 3, "loss": 0.5, "seconds": 1.0}\\n'
    """

    def __init__(
        self,
        folder: Path,
        track: Sequence[str],
        config: Mapping[str, Any],
        lines: Sequence[Mapping[str, Any]] = (),
        resume: bool = False,
    ) -> None:
        check(track)
        self._path = folder / LINES
        checkpoint.save_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = self._path.open("a", encoding="utf-8")
        self._count, self._stage, self._step = 0, "", 0
        names = _names(folder, track, resume)
        self._trackers = [TRACKERS[name](folder, names.get(name), config) for name in track]
        for line in lines:
            self._tell(line)

    def note(self, line: Mapping[str, Any]) -> None:
        """A line: ``stage``, ``step`` where it has one, ``seconds``, and figures, nested or not."""
        with naming(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._tell(line)

    def finish(self, figures: Mapping[str, Any]) -> None:
        """The run's last figures, nested by what they are of; they are in no line of the file."""
        self._tell({"stage": self._stage, "step": self._step, **figures}, prefix="")

    def _tell(self, line: Mapping[str, Any], prefix: str | None = None) -> None:
        self._stage = line["stage"]
        own = line["codes"] if isinstance(line.get("codes"), Mapping) else {}
        self._step = line.get("step", own.get("step", self._step))
        rest = {name: v for name, v in line.items() if name not in ("stage", "step", "seconds")}
        values = dict(_flat(rest, f"{self._stage}/" if prefix is None else prefix))
        for tracker in self._trackers:
            if self._count >= tracker.held:
                tracker.line(self._count, self._stage, self._step, values)
        self._count += 1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with naming(self._path):
            self._file.close()
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)


class Silence:
    """A journal of a process that is not the first: it says nothing."""

    def note(self, line: Mapping[str, Any]) -> None:
        pass

    def finish(self, figures: Mapping[str, Any]) -> None:
        pass

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def check(track: Sequence[str]) -> None:
    """An ImportError where a tracker's package is missing, before anything is trained."""
    for name in track:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            raise ImportError(
                f"track: {name} is not installed; run `pip install {name}`, or "
                "`pip install genrec-ext[tracking]` for all trackers"
            )


class _TensorBoard:
    """Event files in RUN/tensorboard, a scalar a figure over the steps of its stage.

    They are written anew from all lines when a run resumes: an event file cannot take back what it
    says of steps that are repeated.
    """

    held = 0

    def __init__(self, folder: Path, name: str | None, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        del name
        place = folder / "tensorboard"
        for file in place.glob("events.out.tfevents.*"):
            file.unlink()
        self._writer = SummaryWriter(str(place), flush_secs=10)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")

    def line(self, index: int, stage: str, step: int, values: Mapping[str, float]) -> None:
        del index, stage
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        del failed
        self._writer.close()


class _Trackio:
    """A run of trackio's project ``genrec``, local or where its environment variables say."""

    def __init__(self, folder: Path, name: str | None, config: Mapping[str, Any]) -> None:
        import trackio

        del folder
        self._run = trackio.init(
            project=PROJECT,
            name=name,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        # Nothing public says it for local and remote runs alike.
        self.held = self._run._next_step

    def line(self, index: int, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, f"{stage}/step": step}, step=index)

    def close(self, failed: bool) -> None:
        del failed
        self._run.finish()


class _WandB:
    """A run of Weights & Biases; WANDB_MODE, WANDB_PROJECT and so on have their meaning."""

    def __init__(self, folder: Path, name: str | None, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=folder.name,
            dir=str(folder),
            config=dict(config),
            resume="allow",
        )
        self.held = self._run.step
        self._stages: set[str] = set()

    def line(self, index: int, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({**values, f"{stage}/step": step}, step=index)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


TRACKERS: dict[str, Callable[[Path, str | None, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _WandB,
}


def _names(folder: Path, track: Sequence[str], resume: bool) -> dict[str, str]:
    """The tracked runs' names: those in the folder where a run resumes, else new ones."""
    path = folder / NAMES
    names = json.loads(path.read_text()) if resume and path.is_file() else {}
    for name in track:
        if name != "tensorboard" and name not in names:  # which lies in the folder itself
            when = time.strftime("%Y%m%d-%H%M%S")
            names[name] = f"{folder.resolve().name}-{when}-{uuid.uuid4().hex[:6]}"
    if names:
        checkpoint.save_json(path, names)
    return names


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Numbers by their path; of lists by the number of the place, from 1."""
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            value = {str(place): part for place, part in enumerate(value, 1)}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)
