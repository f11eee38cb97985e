"""What defines a training run.  Dataclasses only."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models import CompactConfig
from ..tokenizers import RQVAE
from .bilevel import BilevelConfig
from .distributed import PARALLEL
from .objective import OF_OBJECTIVE, SOFTMAX
from .rl import RLConfig
from .sft import SFTConfig
from .tracking import TRACKERS

STAGES = ("sft", "bilevel", "rl")
DEFAULT_STAGES = ("sft", "rl")
TOKENIZERS = ("data", "rqvae")
SPLITS = ("leave-one-out", "time")
READING = {
    "format": (str,),
    "columns": (dict,),
    "time_unit": (str,),
    "malformed": (str,),
    "duplicates": (str,),
    "min_rating": (float, int),
    "min_user": (int,),
    "min_item": (int,),
}
"""What `reading` may say, and how: arguments of :func:`genrec_ext.data.load`."""


def _changed(config: Any) -> list[str]:
    """The fields of a stage's settings that are not what they are by default."""
    default = type(config)()
    names = (field.name for field in dataclasses.fields(config))
    return [name for name in names if getattr(config, name) != getattr(default, name)]


@dataclass(frozen=True)
class TrainConfig:
    """A run of ``genrec train``.

    Attributes:
        out: run folder.
        data: what :func:`genrec_ext.data.load` takes; None for the generated catalogue.
        index: which table of semantic IDs, where the data have several.
        reading: further arguments of :func:`genrec_ext.data.load`, such as ``min_user``.
        split: ``"leave-one-out"``, or ``"time"``: what lies before the 80% quantile of all times is
            trained on, targets lie after the 90% quantile, those of validation between; see
            :func:`genrec_ext.data.time_split`.
        minutes: wall-clock budget of the whole run, evaluation included.  Where the epochs would
            not fit, fewer are planned, so that the learning rate still comes down.
        epochs: of the sft stage; None takes ``sft.epochs``.
        seed: everything random follows from it.
        device: a torch device.
        stages: some of ``"sft"``, ``"bilevel"`` and ``"rl"``, in this order; rl needs one before.
        resume: go on from the run folder's newest checkpoint, and with its tracked runs.
        overwrite: take the place of the run that the folder holds, which is refused without.
        save_seconds: from one checkpoint to the next, at least; 0 for one after every step.
        parallel: under torchrun, ``"ddp"``: each process holds the whole model; ``"fsdp"``:
            weights, gradients and optimiser state are split among them.
        timeout: minutes that a process waits for the others, before it ends with an error.
        track: where figures go besides the run folder: some of ``"tensorboard"``, ``"trackio"`` and
            ``"wandb"``; see :mod:`genrec_ext.training.tracking`.
        patience: validations without improvement after which sft or bilevel ends.
        tokenizer: ``"data"``: the data's own semantic IDs, or residual k-means where they have
            none; ``"rqvae"``: an RQ-VAE over the items' texts, or over what they occur with where
            there are no texts; None: rqvae where the bilevel stage asks for it, else data.
        rqvae: arguments of :class:`genrec_ext.tokenizers.RQVAE`; its seed is the run's if none is
            given.
        text_features: size of item features made from texts, 0 for none.
        covisitation_features: size of item features made from training co-visits, 0 for none.
        model: the model's settings; the objectives ``"ce"`` and ``"msl"`` decide on its softmax.
        sft, bilevel, rl: the stages' settings; bilevel's lower problem has sft's.
    """

    out: str | Path
    data: str | Path | None = None
    index: str | None = None
    reading: dict[str, Any] = field(default_factory=dict)
    split: str = "leave-one-out"
    minutes: float | None = None
    epochs: int | None = None
    seed: int = 0
    device: str = "cpu"
    stages: tuple[str, ...] = DEFAULT_STAGES
    resume: bool = False
    overwrite: bool = False
    save_seconds: float = 15.0
    parallel: str = "ddp"
    timeout: float = 10.0
    track: tuple[str, ...] = ()
    patience: int = 4
    tokenizer: str | None = None
    rqvae: dict[str, Any] = field(default_factory=dict)
    text_features: int = 64
    covisitation_features: int = 64
    model: CompactConfig = field(default_factory=CompactConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    rl: RLConfig = field(default_factory=RLConfig)

    def __post_init__(self) -> None:
        if self.stages != tuple(s for s in STAGES if s in self.stages) or self.stages[:1] in (
            (),
            ("rl",),
        ):
            raise ValueError(
                f"stages must be of {','.join(STAGES)}, in this order, and not rl alone, which "
                f"fine-tunes what another trained; got {','.join(self.stages)}"
            )
        if len(set(self.track)) < len(self.track) or not set(self.track) <= set(TRACKERS):
            raise ValueError(
                f"track must be some of {', '.join(TRACKERS)}, each once, got "
                f"{','.join(self.track)}"
            )
        if self.tokenizer not in (None, *TOKENIZERS):
            raise ValueError(
                f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {self.tokenizer!r}"
            )
        if "bilevel" in self.stages and not self.learns_tokenizer():
            raise ValueError(
                f"tokenizer must be rqvae for the stage bilevel, got {self.tokenizer!r}: the stage "
                "needs one that can learn"
            )
        if self.rqvae and not self.learns_tokenizer():
            raise ValueError(f"rqvae: {self.rqvae}; expected none, as tokenizer is not rqvae")
        try:
            codebook = RQVAE(**self.rqvae).codebook  # and for its errors
        except (TypeError, ValueError) as error:
            raise ValueError(f"rqvae: {self.rqvae}; {error}") from error
        if self.index is not None and self.learns_tokenizer():
            raise ValueError(
                f"index: {self.index!r}; expected none, as semantic IDs come from an RQ-VAE"
            )
        if "bilevel" in self.stages:
            if codebook != "gradient":
                raise ValueError(
                    f"rqvae: codebook {codebook!r}; expected 'gradient' for the stage bilevel"
                )
            self.bilevel.check_objective(self.sft.objective)
        elif self.bilevel != BilevelConfig():
            changed = ", ".join(_changed(self.bilevel))
            raise ValueError(
                f"bilevel: {changed} given without the stage bilevel; got {','.join(self.stages)}"
            )
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.reading and self.data is None:
            raise ValueError(f"reading: {self.reading}; expected none without data to read")
        for name, value in self.reading.items():
            if name not in READING:
                raise ValueError(f"reading.{name}: no such field; there are {', '.join(READING)}")
            if not isinstance(value, READING[name]) or isinstance(value, bool):
                kinds = " or ".join(kind.__name__ for kind in READING[name])
                raise ValueError(f"reading.{name}: {value!r}; expected {kinds}")
        for name in ("text_features", "covisitation_features"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.parallel not in PARALLEL:
            raise ValueError(
                f"parallel must be one of {', '.join(PARALLEL)}, got {self.parallel!r}"
            )
        if self.parallel == "fsdp" and "bilevel" in self.stages:
            raise ValueError(
                "parallel: 'fsdp' with the stage bilevel, which needs the whole model at once; "
                "expected 'ddp'"
            )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: give one")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2^63), got {self.seed}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        if not self.save_seconds >= 0:
            raise ValueError(f"save_seconds must be 0 or more, got {self.save_seconds}")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be positive, got {self.timeout}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")

    def without_effect(self) -> list[str]:
        """Settings that were changed and that nothing in this run reads."""
        read = OF_OBJECTIVE.get(self.sft.objective or "", ())
        idle = {name for names in OF_OBJECTIVE.values() for name in names}.difference(read)
        found = [f"sft.{name}" for name in _changed(self.sft) if name in idle]
        if "rl" not in self.stages:
            found += [f"rl.{name}" for name in _changed(self.rl)]
        if (
            "softmax" in _changed(self.model)
            and self.model.softmax != self.model_settings().softmax
        ):
            found.append("model.softmax")
        return found

    def learns_tokenizer(self) -> bool:
        """Whether semantic IDs come from an RQ-VAE."""
        return self.tokenizer == "rqvae" or (self.tokenizer is None and "bilevel" in self.stages)

    def sft_settings(self) -> SFTConfig:
        """The sft stage's settings with this run's epochs."""
        if self.epochs is None:
            return self.sft
        return dataclasses.replace(self.sft, epochs=self.epochs)

    def model_settings(self) -> CompactConfig:
        """The model's settings, normalised as the sft stage's objective says."""
        if self.sft.objective not in SOFTMAX:
            return self.model
        return dataclasses.replace(self.model, softmax=SOFTMAX[self.sft.objective])

    def as_json(self) -> dict[str, Any]:
        """All settings as plain values."""
        content = dataclasses.asdict(self)
        content["model"] = dataclasses.asdict(self.model_settings())
        content["out"], content["stages"] = str(self.out), ",".join(self.stages)
        content["data"] = None if self.data is None else str(self.data)
        return json.loads(json.dumps(content))
