"""The training run: data, tokens, sft, bilevel, rl, evaluation, report.

Everything that a run does in order, with its clock, its checkpoints and its files; the stages
themselves are in ``sft`` and ``rl``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import platform
import time
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__, baselines, tokenizers
from ..data import Interactions, Split, generate, leave_one_out
from ..models import CompactRecommender
from ..ops import sid_report
from ..trie import Trie
from . import checkpoint, distributed, evaluation, per_user, report, settings, tracking
from . import run as run_module
from .bilevel import BilevelTrainer, summarize
from .checkpoint import Checkpoints
from .config import TrainConfig
from .distributed import Processes
from .identifiers import first_ids
from .per_user import PerUser
from .rl import SageTrainer
from .sft import NonFiniteLossError, SFTTrainer

METRIC = "recall@10"
# What a finished run leaves beside its model.
OUTCOME = "metrics.json", "report.html", per_user.FILE, "tokenizer.safetensors", "failed_batch.pt"
# Of a time budget: what the stages before it leave for a stage, and what all leave for the end, a
# share or some validations' worth (two test rankings are wider than a validation's).
_STAGE_SHARE = {"sft": 0.0, "bilevel": 0.4, "rl": 0.2}
_END_SHARE, _END_VALIDATIONS = 0.06, 6
_VALIDATIONS = 7  # of a stage that has epochs, evenly spread
_RL_VALIDATIONS = 5


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains, evaluates and writes a run folder.

    Writes ``config.yaml``, ``metrics.json``, ``metrics.jsonl`` (line by line as it goes; the same
    lines go to the trackers of ``config.track``), ``model.pt``, ``checkpoints/``,
    ``report.html``, ``test_users.npz`` (what :mod:`genrec_ext.training.per_user` says of each test
    user) and for an RQ-VAE ``tokenizer.safetensors`` into ``config.out``, and returns the content
    of ``metrics.json``: ``test`` (the kept model's figures), ``stages`` (for each:
    ``valid`` and ``test`` figures, steps, seconds; for sft and bilevel also ``padding``, the mean
    over epochs of the share of padded positions; for bilevel ``codes``, see
    ``genrec_ext.training.bilevel``), ``ids`` (what :func:`genrec_ext.sid_report` says of the kept
    model's semantic IDs), ``baselines``, for the generated catalogue ``best_possible``, ``seconds``
    and ``config``.

    Under ``torchrun``, or where torch.distributed is initialised, all processes train one model;
    the first of them writes.

    Raises:
        ValueError: torch has no such ``device`` here.
        DataError: the data cannot be read.
        CheckpointError: the folder holds a run and neither ``resume`` nor ``overwrite`` is set, or
            another run is writing there; ``resume`` finds a checkpoint of another run or a damaged
            one, or a checkpoint cannot be written.
        ImportError: the ``[train]`` extra is not installed.
        ConnectionError: another process ended, or did not answer in time.
        FloatingPointError: a loss is not finite; ``failed_batch.pt`` holds what it is of.
    """
    for module in ("dacite", "matplotlib", "safetensors", "sklearn", "tqdm", "yaml"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"{module} is missing; run `pip install genrec-ext[train]`")
    idle = config.without_effect()
    if idle:
        warnings.warn(
            f"{', '.join(idle)}: given, but nothing in this run reads "
            f"{'it' if len(idle) == 1 else 'them'} (objective {config.sft.objective}, stages "
            f"{','.join(config.stages)})",
            stacklevel=2,
        )
    tracking.check(config.track)
    distributed.check_device(config.device)
    with (
        distributed.joined(config.parallel, 60 * config.timeout, config.device) as processes,
        checkpoint.writing_alone(Path(config.out), processes),
    ):
        return _Training(config, processes).run()


def summary(metrics: dict[str, Any]) -> str:
    """The result of a run for a terminal."""
    return report.text_table(metrics)


class _Training:
    """One run and its clock."""

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.started = time.monotonic()
        self.folder = Path(config.out)
        self.checkpoints = Checkpoints(self.folder, processes)
        self._spare_another_run()
        self.device = distributed.own_device(config.device)
        torch.manual_seed(config.seed)
        self.best_possible: dict[str, Any] | None = None
        self.source: dict[str, Any] = {
            "path": run_module.GENERATED if config.data is None else str(config.data),
            "index": config.index,
            "seed": config.seed,
            "reading": config.reading,
            "split": config.split,
        }
        self.data = self._open()
        self.source["fingerprint"] = self.data.fingerprint()
        if self.data.report is not None:
            self.source["files"] = list(self.data.report.files)
            # By name, so that a table which comes beside it later is not taken in its place.
            self.source["index"] = self.data.report.index
        self.split: Split = run_module.split_data(self.data, self.source)
        self.counts = self.split.train_counts()
        self.tokenizer: tokenizers.RQVAE | None = None  # one that may learn with the recommender
        codes, sizes = self._codes()
        self.model = CompactRecommender(
            config.model_settings(), codes, sizes, self._features(), seed=config.seed
        ).to(self.device)
        self._trie = self.model.trie()
        self._decoded = self.model.codes.clone()  # the IDs that the trie has
        self.stages: dict[str, Any] = {}
        self.log: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None  # the state with the best validation, its figures
        self.earlier = 0.0  # seconds of the runs that this one resumes
        self.saved = 0.0
        self.validation_seconds = 0.0  # the longest so far
        self.ranked: evaluation.Ranking | None = None  # of the test users, by the kept model

    # ---- what a run starts from ----

    def _spare_another_run(self) -> None:
        held = (self.folder / run_module.MODEL_FILE).exists() or self.checkpoints.numbers()
        if held and not (self.config.resume or self.config.overwrite):
            raise checkpoint.CheckpointError(
                f"{self.folder}: holds a run; --resume goes on with it, --overwrite takes its "
                "place, or give another folder as --out"
            )

    def _open(self) -> Interactions:
        if self.config.data is None:
            catalogue = generate(self.config.seed)
            split = leave_one_out(catalogue.data)
            self.best_possible = evaluation.figures(
                catalogue.best_items(evaluation.KS[-1]),
                split.test_targets,
                split,
                None,
                histories=split.test_histories(),
            )
            return catalogue.data
        return run_module.open_data(self.source)

    def _codes(self) -> tuple[torch.Tensor, list[int]]:
        """Every item's semantic ID, and how many codes each level has."""
        if self.config.learns_tokenizer():
            self.embeddings = tokenizers.item_embeddings(
                self.data, self.split, seed=self.config.seed
            )
            self.tokenizer = self._fitted()
            return first_ids(
                self.tokenizer.fitted_codes, self.tokenizer.codebook_size, self.config.seed
            )
        codes = self.data.codes
        if codes is None:
            codes = tokenizers.tokenize(self.data, self.split, seed=self.config.seed)
        assert codes is not None
        return torch.from_numpy(codes), [int(size) for size in codes.max(0) + 1]

    def _fitted_path(self) -> Path:
        name = hashlib.sha256(json.dumps(self.identity()).encode()).hexdigest()[:16]
        return self.checkpoints.folder / f"tokenizer-{name}.safetensors"

    def _fitted(self) -> tokenizers.RQVAE:
        """The RQ-VAE that the run starts from: fitted by the first process, read by the others and
        by who resumes."""
        path = self._fitted_path()
        if self.processes.first and not (self.config.resume and path.exists()):
            settings = {"seed": self.config.seed, **self.config.rqvae}
            fitted = tokenizers.RQVAE(**settings).fit(self.embeddings, progress=True)
            path.parent.mkdir(exist_ok=True)
            fitted.save(path)
        self.processes.wait()
        return tokenizers.RQVAE.load(path)

    @property
    def trie(self) -> Trie:
        """The catalogue as the model's semantic IDs are now."""
        if not torch.equal(self._decoded, self.model.codes):
            self._trie, self._decoded = self.model.trie(), self.model.codes.clone()
        return self._trie

    @property
    def group(self) -> np.ndarray | None:
        """Which items share an ID."""
        return evaluation.collision_groups(self.model.codes.cpu().numpy())

    def _features(self) -> torch.Tensor | None:
        """Item vectors from texts and from training co-visits, side by side."""
        config, parts = self.config, []
        if config.text_features and self.data.texts is not None and any(self.data.texts):
            if importlib.util.find_spec("sklearn") is None:
                raise ImportError("scikit-learn is missing; run `pip install genrec-ext[train]`")
            parts.append(
                tokenizers.text_embeddings(self.data.texts, config.text_features, config.seed)
            )
        if config.covisitation_features:
            parts.append(
                tokenizers.covisitation_embeddings(
                    self.split.train, self.data.num_items, config.covisitation_features, config.seed
                )
            )
        return torch.cat(parts, 1) if parts else None

    # ---- clock, log and checkpoint ----

    def seconds(self) -> float:
        """Wall-clock seconds of the whole run, resumed parts included."""
        return self.earlier + time.monotonic() - self.started

    def left(self, stage: str) -> float:
        """Seconds that a stage may still take; infinite without a budget."""
        if self.config.minutes is None:
            return float("inf")
        budget = self.config.minutes * 60
        later = max(_END_SHARE * budget, _END_VALIDATIONS * self.validation_seconds)
        at = self.config.stages.index(stage)
        later += budget * sum(_STAGE_SHARE[name] for name in self.config.stages[at + 1 :])
        return budget - later - self.seconds()

    def note(self, **line: Any) -> None:
        """A line of ``metrics.jsonl`` and of the trackers."""
        line["seconds"] = round(self.seconds(), 2)
        self.log.append(line)
        self.journal.note(line)

    def identity(self) -> dict[str, Any]:
        """What two runs must share for one to resume the other."""
        content = self.config.as_json()
        free = "out data minutes resume overwrite device save_seconds parallel timeout track"
        for name in free.split():
            del content[name]
        for stage in ("sft", "bilevel", "rl"):
            if stage == "sft" or stage in self.config.stages:
                # The step's batch is what matters, not how many processes share it.
                content[stage]["users"] *= self.processes.world
            else:
                del content[stage]
        return {"config": json.dumps(content, sort_keys=True), "data": self.source["fingerprint"]}

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.seconds() - self.saved >= self.config.save_seconds

    def save(self, stage: str, trainer: Any, *, force: bool = False) -> None:
        """A checkpoint from which the run goes on to the same bits, where one is due."""
        if not (force or self.processes.agree(self.due())):
            return
        state = trainer.state_dict()
        self.checkpoints.save(
            {
                "identity": self.identity(),
                "stage": stage,
                "trainer": state,
                "seen": self.processes.gather(state.get("seen")),  # by each, of its own share
                "best": self.best,
                "stages": self.stages,
                "log": self.log,
                "seconds": self.seconds(),
            }
        )
        self.saved = self.seconds()  # once written, so that slow disks leave time to train

    def restored(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None."""
        if not self.config.resume:  # not before, as data and settings may turn out to be unusable
            self.checkpoints.clear(keep=self._fitted_path().name)
            if self.processes.first:
                for name in (run_module.MODEL_FILE, *OUTCOME):
                    (self.folder / name).unlink(missing_ok=True)
            return None
        content = self.checkpoints.load(self.device)
        if content is None:
            return None
        if content["identity"] != self.identity():
            raise checkpoint.CheckpointError(
                f"{self.checkpoints.folder}: written by a run with other settings or data; repeat "
                "that run's options or leave out --resume"
            )
        self.best, self.stages = content["best"], content["stages"]
        self.log, self.earlier = content["log"], content["seconds"]
        self.started, self.saved = time.monotonic(), content["seconds"]
        return content

    # ---- validation ----

    def validate(self, stage: str, step: int) -> bool:
        """Validates, keeps the state if it is the best so far, and says so."""
        began = time.monotonic()
        found = evaluation.rank(
            self.model,
            self.trie,
            self.split.valid_histories(),
            width=evaluation.VALIDATION_WIDTH,
            processes=self.processes,
        )
        figures = evaluation.figures(found.items, self.split.valid_targets, self.split, self.group)
        self.validation_seconds = max(self.validation_seconds, time.monotonic() - began)
        self.note(stage=stage, step=step, valid=figures)
        better = self.best is None or figures[METRIC] > self.best["valid"][METRIC]
        if better:
            state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            self.best = {"stage": stage, "step": step, "valid": figures, "state": state}
            if self.tokenizer is not None:
                state = {k: v.detach().clone() for k, v in self.tokenizer.state_dict().items()}
                self.best["tokenizer"] = state
        return better

    def take_best(self) -> None:
        """Goes back to the best state so far."""
        assert self.best is not None
        self.model.load_state_dict(self.best["state"])

    def finish_stage(self, stage: str, steps: int, seconds: float) -> None:
        """Goes back to the best state so far and takes its test figures."""
        assert self.best is not None
        self.take_best()
        if self.ranked is None or self.best["stage"] == stage:
            self.ranked = self.rank_test()
        self.stages[stage] = {
            "valid": self.best["valid"],
            "test": evaluation.test_figures(
                self.ranked, self.split, self.model.codes.cpu().numpy()
            ),
            "steps": steps,
            "seconds": round(seconds, 2),
            "kept": {"stage": self.best["stage"], "step": self.best["step"]},
        }

    def rank_test(self) -> evaluation.Ranking:
        """The model's ranking for the test users."""
        progress = "test" if self.processes.first else None
        return evaluation.rank_test(
            self.model, self.trie, self.split, progress=progress, processes=self.processes
        )

    # ---- the stages ----

    def run(self) -> dict[str, Any]:
        restored, config = self.restored(), self.config
        if self.processes.first:  # not of a run that is refused
            settings.save(self.folder / "config.yaml", config)
        self.journal: tracking.Journal | tracking.Silence = tracking.Silence()
        if self.processes.first:
            self.journal = tracking.Journal(
                self.folder, config.track, config.as_json(), self.log, config.resume
            )
        with self.journal:
            for stage in config.stages:
                if stage in self.stages:
                    continue
                # A checkpoint is of the stage that it was written in; it may be one just ended.
                state = restored if restored is not None and restored["stage"] == stage else None
                restored = None
                if stage == "rl":
                    self.rl(state)
                else:
                    self.supervised(stage, state)
            return self.finish()

    def _trainer(self, stage: str) -> SFTTrainer:
        config = self.config
        if stage == "sft":
            return SFTTrainer(
                self.model, self.split.train, config.sft_settings(), config.seed, self.processes
            )
        assert self.tokenizer is not None
        return BilevelTrainer(
            self.model,
            self.split.train,
            self.tokenizer,
            self.embeddings,
            config.sft_settings(),
            config.bilevel,
            config.seed,
            self.processes,
        )

    def supervised(self, stage: str, restored: dict[str, Any] | None) -> None:
        """sft or bilevel: epochs, with validations between."""
        from tqdm import tqdm

        if restored is None and self.best is not None:
            self.take_best()  # of the stage before
        trainer = self._trainer(stage)
        if restored is not None:
            state = restored["trainer"]
            if len(restored["seen"]) == self.processes.world:
                state = {**state, "seen": restored["seen"][self.processes.rank]}
            trainer.load_state_dict(state)
        began, first_epoch = self.seconds(), trainer.epoch
        stale = self._stale_validations(stage)
        bar = tqdm(
            total=trainer.epochs * trainer.epoch_steps,
            initial=trainer.step,
            desc=stage,
            unit="step",
            mininterval=1.0,
            disable=not self.processes.first,
        )

        def progress(_: int, parts: dict[str, float]) -> None:
            bar.update()
            loss = parts.get("loss", parts.get("token_loss", math.nan))
            bar.set_postfix(loss=f"{loss:.3f}", epoch=trainer.epoch, refresh=False)

        def stop() -> bool:
            due = trainer.step > before and self.due()
            return self.processes.agree(due or self.left(stage) <= 0)

        while not trainer.done and stale < self.config.patience:
            before = trainer.step
            try:
                losses = trainer.train_epoch(stop=stop, progress=progress)
            except NonFiniteLossError as error:
                bar.close()
                raise FloatingPointError(f"{error}; {self._keep_failed(trainer, error)}") from error
            left = self.processes.agree(self.left(stage))
            out_of_time = left <= 0
            if trainer.step % trainer.epoch_steps and not out_of_time:
                self.save(stage, trainer)  # a long epoch
                continue
            if losses and trainer.step > before:
                self.note(stage=stage, step=trainer.step, epoch=trainer.epoch, **losses)
            if isinstance(trainer, BilevelTrainer):
                for update in trainer.take_updates():
                    self.note(stage=stage, codes=update)
            # Plan for the budget by the pace so far, validations included.
            took = self.processes.agree(self.seconds() - began)
            pace = took / max(trainer.epoch - first_epoch, 1)
            if left < pace * (trainer.epochs - trainer.epoch):
                trainer.shorten(trainer.epoch + int(left / pace))
                bar.total = trainer.epochs * trainer.epoch_steps
            every = max(1, trainer.epochs // _VALIDATIONS)
            if trainer.done or out_of_time or trainer.epoch % every == 0:
                with trainer.averaged():
                    stale = 0 if self.validate(stage, trainer.step) else stale + 1
                bar.set_description(
                    f"{stage}, validation {METRIC} {self.log[-1]['valid'][METRIC]:.4f}"
                )
            self.save(stage, trainer)
            if out_of_time:
                break
        bar.close()
        self.finish_stage(stage, trainer.step, self.seconds() - began)
        mine = [line for line in self.log if line["stage"] == stage]
        shares = [line["padding"] for line in mine if "padding" in line]
        self.stages[stage]["padding"] = float(np.mean(shares)) if shares else None
        if isinstance(trainer, BilevelTrainer):
            updates = [line["codes"] for line in mine if "codes" in line]
            self.stages[stage]["codes"] = summarize(updates)
        self.save(stage, trainer, force=True)

    def _keep_failed(self, trainer: SFTTrainer | SageTrainer, error: NonFiniteLossError) -> str:
        """Writes down what a loss that is not finite is of; says where."""
        name = (
            "failed_batch.pt" if self.processes.first else f"failed_batch-{self.processes.rank}.pt"
        )
        path = self.folder / name
        batch = {field.name: getattr(error.batch, field.name) for field in fields(error.batch)}
        if self.processes.sharded:  # the others may be on their way, and hold parts of the state
            checkpoint.save(path, {"stage": trainer.stage, "batch": batch})
            return f"its batch is in {path}"
        state = {"stage": trainer.stage, "trainer": trainer.state_dict(), "batch": batch}
        checkpoint.save(path, state)
        return f"its batch and the trainer's state before it are in {path}"

    def _stale_validations(self, stage: str) -> int:
        """Validations since the best one, from the log: what patience has already been spent."""
        if self.best is None:
            return 0
        steps = [line["step"] for line in self.log if line["stage"] == stage and "valid" in line]
        if self.best["stage"] != stage:
            return len(steps)
        return sum(step > self.best["step"] for step in steps)

    def rl(self, restored: dict[str, Any] | None) -> None:
        from tqdm import tqdm

        self.take_best()
        trainer = SageTrainer(
            self.model,
            self.trie,
            self.split.train,
            self.counts,
            self.config.rl,
            self.config.seed,
            self.processes,
        )
        if restored is not None:
            trainer.load_state_dict(restored["trainer"])
        began = self.seconds()
        every = max(1, self.config.rl.steps // _RL_VALIDATIONS)
        bar = tqdm(
            total=self.config.rl.steps,
            initial=trainer.step,
            desc="rl",
            unit="step",
            mininterval=1.0,
            disable=not self.processes.first,
        )

        def progress(_: int, figures: dict[str, float]) -> None:
            bar.update()
            bar.set_postfix(
                loss=f"{figures['loss']:.3f}", ratio=f"{figures['ratio']:.3f}", refresh=False
            )
            self.note(stage="rl", step=trainer.step, **figures)

        def out_of_time() -> bool:
            return self.processes.agree(self.left("rl") <= 0)

        def stop() -> bool:
            due = trainer.step > before and self.due()
            return self.processes.agree(due or self.left("rl") <= 0)

        end = self.config.rl.steps
        while trainer.step < end and not out_of_time():
            before = trainer.step
            try:
                trainer.run(every - trainer.step % every, stop=stop, progress=progress)
            except NonFiniteLossError as error:
                bar.close()
                raise FloatingPointError(f"{error}; {self._keep_failed(trainer, error)}") from error
            if trainer.step == end or trainer.step % every == 0 or out_of_time():
                self.validate("rl", trainer.step)
                bar.set_description(f"rl, validation {METRIC} {self.log[-1]['valid'][METRIC]:.4f}")
            self.save("rl", trainer)
        bar.close()
        self.finish_stage("rl", trainer.step, self.seconds() - began)
        self.save("rl", trainer, force=True)

    # ---- what a run leaves behind ----

    def baselines(self) -> dict[str, Any]:
        histories = self.split.test_histories()
        return {
            name: evaluation.figures(
                baseline(self.split.train, histories, self.data.num_items, evaluation.KS[-1]),
                self.split.test_targets,
                self.split,
                None,
                codes=self.model.codes.cpu().numpy(),
                histories=histories,
            )
            for name, baseline in (
                ("popularity", baselines.popularity),
                ("covisitation", baselines.covisitation),
            )
        }

    def finish(self) -> dict[str, Any]:
        self.take_best()
        last = self.stages[[stage for stage in self.config.stages if stage in self.stages][-1]]
        metrics: dict[str, Any] = {
            "test": last["test"],
            "stages": self.stages,
            "ids": sid_report(self.model.codes.cpu()),
            "baselines": self.baselines(),
        }
        if self.best_possible is not None:
            metrics["best_possible"] = self.best_possible
        metrics["seconds"] = round(self.seconds(), 2)
        metrics["config"] = {
            "name": self.data.name,
            **self.config.as_json(),
            "fingerprint": self.source["fingerprint"],
            "level_sizes": self.model.level_sizes,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "genrec": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "processes": self.processes.world,
        }
        histories = self.split.test_histories()
        ranking = self.rank_test() if self.ranked is None else self.ranked
        if not self.processes.first:
            return metrics
        run_module.save(self.folder, self.model, self.data, self.source)
        if self.tokenizer is not None:
            self._save_tokenizer(self.tokenizer)
        codes = self.model.codes.cpu().numpy()
        PerUser.of(ranking, self.data, self.split, codes).save(self.folder)
        items = ranking.items[:, : evaluation.LENGTH]
        report.write(
            self.folder / "report.html",
            metrics,
            self.log,
            items,
            self.counts,
            self.split.test_targets,
            codes,
            self._titles(),
            self._examples(histories, items),
        )
        checkpoint.save_json(self.folder / "metrics.json", metrics)
        self.journal.finish({"test": metrics["test"], "baselines": metrics["baselines"]})
        return metrics

    def _save_tokenizer(self, tokenizer: tokenizers.RQVAE) -> None:
        """The tokenizer that belongs to the kept model."""
        assert self.best is not None
        tokenizer.load_state_dict(self.best["tokenizer"])
        tokenizer.cpu().eval().keep(self.embeddings)
        tokenizer.save(self.folder / "tokenizer.safetensors")

    def _titles(self) -> list[str]:
        """What to call the items."""
        ids = self.data.item_ids
        if self.data.titles is None:
            return [f"item {item}" for item in ids]
        return [title or f"item {item}" for title, item in zip(self.data.titles, ids, strict=True)]

    def _examples(self, histories: list[np.ndarray], items: np.ndarray) -> list[report.Example]:
        """Six users for the report: the first three that were hit, and three others at random."""
        targets = self.split.test_targets
        hits = np.flatnonzero((items[:, :5] == targets[:, None]).any(1))[:3]
        others = np.setdiff1d(np.arange(len(targets)), hits)
        rng = np.random.default_rng(self.config.seed)
        users = [*hits, *rng.choice(others, size=min(3, len(others)), replace=False)]
        return [
            report.Example(
                histories[u][-5:].tolist(),
                [item for item in items[u, :5].tolist() if item >= 0],
                int(targets[u]),
            )
            for u in users
        ]
