"""Runs from files: YAML, `key=value` overrides and the command's options to one `TrainConfig`.

The dataclasses of ``config`` say what there is; nothing is listed again here.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import TrainConfig


class SettingsError(ValueError):
    """A setting that does not exist, is of the wrong type, or cannot be read."""


def load(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The configuration of a run.

    Args:
        path: a YAML file (JSON is YAML) of :class:`TrainConfig`'s fields, such as the `config.yaml`
            that every run leaves in its folder; None for the defaults.
        overrides: `sft.rate=1e-3`, `model.width=96`, `stages=[sft,bilevel]`: a field, dotted within
            a stage or the model, and its value in YAML.  Stronger than the file.
        options: fields and their values, nested as in the file.  Stronger than both.

    Raises:
        SettingsError: the file cannot be read, a field does not exist, a value has another type.
        ValueError: a value is out of its range; names the field.
        ImportError: the ``[train]`` extra is not installed.

    >>> config = load(overrides=["out=runs/x", "sft.rate=1e-3", "stages=[sft]"])
    >>> config.sft.rate, config.stages
    (0.001, ('sft',))
    """
    content: dict[str, Any] = {} if path is None else _read(Path(path))
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise SettingsError(f"{override!r}: expected field=value, such as sft.rate=1e-3")
        nested: Any = _yaml(value, override)
        for part in reversed(name.strip().split(".")):
            nested = {part: nested}
        content = _merged(content, nested)
    content = _merged(content, dict(options or {}))
    for several in ("stages", "track"):
        if isinstance(content.get(several), str):
            content[several] = content[several].split(",")
    _check_names(TrainConfig, content, "")
    return _built(content)


def save(path: Path, config: TrainConfig) -> None:
    """Writes a configuration for :func:`load`, in one step."""
    content = config.as_json()
    content["stages"] = list(config.stages)
    content["overwrite"] = content["resume"] = False  # who repeats a run has to say so anew
    checkpoint.save_text(path, _library("yaml").safe_dump(content, sort_keys=False))


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is missing; run `pip install genrec-ext[train]`") from error


def _yaml(text: str, source: object) -> Any:
    yaml = _library("yaml")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    if isinstance(value, str):  # YAML 1.1 takes 1e-3 for text
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        content = _yaml(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: {type(content).__name__}; expected fields and their values")
    return content


def _merged(base: dict[str, Any], stronger: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in stronger.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = _merged(result[name], value) if both else value
    return result


def _check_names(kind: type, content: dict[str, Any], place: str) -> None:
    """Every key is a field: a misspelt one would be a setting that does nothing."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in content.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            raise SettingsError(
                f"{place}{name}: no such field; "
                + (f"did you mean {place}{near[0]}?" if near else f"there are {', '.join(fields)}")
            )
        written = str(fields[name].type)
        if written.startswith("tuple") and not isinstance(value, (list, tuple)):
            raise SettingsError(f"{place}{name}: {value!r}; expected a list")
        if written.startswith(("int", "float")) and isinstance(value, bool):
            raise SettingsError(f"{place}{name}: {value!r}; expected a number")
        inner = fields[name].default_factory
        if dataclasses.is_dataclass(inner):
            if not isinstance(value, dict):
                raise SettingsError(f"{place}{name}: {value!r}; expected fields and their values")
            _check_names(inner, value, f"{place}{name}.")  # type: ignore[arg-type]


def _number(value: Any) -> Any:
    """An integer where a float is asked for, and 1e-3, which YAML 1.1 takes for text."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return value
    try:
        return float(value)
    except ValueError:
        return value


_SECTIONS: tuple[tuple[str, Any], ...] = tuple(
    (field.name, field.default_factory)
    for field in dataclasses.fields(TrainConfig)
    if dataclasses.is_dataclass(field.default_factory)
)


def _built(content: dict[str, Any]) -> TrainConfig:
    dacite = _library("dacite")
    rules = dacite.Config(cast=[tuple], type_hooks={float: _number}, strict=True)
    try:
        for name, kind in _SECTIONS:  # by themselves first, so that errors say where they are
            try:
                dacite.from_dict(kind, content.get(name, {}), rules)
            except dacite.DaciteError:
                pass  # said below, with the whole path
            except ValueError as error:
                raise SettingsError(f"{name}.{error}") from error
        return dacite.from_dict(TrainConfig, content, rules)
    except dacite.MissingValueError as error:
        raise SettingsError(f"{error.field_path}: missing; expected a value") from error
    except dacite.WrongTypeError as error:
        found = error.field_type
        kind = found.__name__ if isinstance(found, type) else str(found).replace("typing.", "")
        raise SettingsError(f"{error.field_path}: {error.value!r}; expected {kind}") from error
