"""Configuration: YAML and command-line overrides -> one frozen dataclass; and back to a file.

This module owns no fields: every room declares its own dataclass, and tyro turns it into flags
(``--batch-size`` and ``--batch_size`` both work). ``--config file.yaml`` is read as if its entries
stood on the command line before the flags, so a file and flags build the same object and flags win.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from raypipe.errors import ConfigError, MissingInput, UnknownName

T = TypeVar("T")


def parse(cls: type[T], args: Sequence[str], *, prog: str, description: str = "") -> T:
    """Build ``cls`` from ``args``; ``--config FILE`` supplies values that flags override.

    Raises ConfigError (a wrong flag, or a value that breaks a rule), UnknownName (a key of the file
    is no field), MissingInput (no such file); --help ends in SystemExit(0).
    """
    import tyro

    file, rest = _take_config_flag(args)
    given = [*_file_to_flags(cls, file), *rest] if file else rest
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                cls,
                args=given,
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(f"{_unboxed(said.getvalue())}; see {prog} --help") from None


def only_from_file(args: Sequence[str]) -> frozenset[str]:
    """Names of the options that ``--config FILE`` sets and no flag overrides."""
    file, rest = _take_config_flag(args)
    if file is None:
        return frozenset()
    names = {key.replace("-", "_") for key, _ in _flatten(_read_file(file))}
    flags = {arg[2:].partition("=")[0].replace("-", "_") for arg in rest if arg.startswith("--")}
    return frozenset(names - flags - {flag.removeprefix("no_") for flag in flags})


def to_dict(config: Any) -> Any:
    """``config`` as plain JSON types (dataclasses -> dicts, paths -> text)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, Enum):
        return config.name
    return str(config) if isinstance(config, Path) else config


def save(config: Any, path: Path) -> None:
    """Write the resolved ``config`` as YAML that ``--config`` reads back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def dumps(config: Any) -> str:
    """``config`` as one stable JSON text."""
    return json.dumps(to_dict(config), sort_keys=True)


def _unboxed(text: str) -> str:
    """The one line of what tyro draws as a box: its parts, without the words of each option's help.

    A part's own rows stand at the box's edge, what it lists 4 columns in, help 8 columns in.
    """
    if "│" not in text:  # where the locale is not UTF-8 it draws none
        rows = [row[1:].rstrip() for row in text.splitlines() if row.startswith("  ")]
        text = "\n".join("│ ─ │" if set(row) == {" ", "-"} else f"│{row}" for row in rows)
    parts: list[str] = []
    for part in re.split(r"^│ ─+ │$", text, flags=re.MULTILINE):
        rows = [row.strip("│")[1:].rstrip() for row in part.splitlines() if row.startswith("│")]
        head = " ".join(row for row in rows if not row.startswith(" "))
        listed = ", ".join(row.strip() for row in rows if re.match(r" {4}\S", row))
        if head and not head.startswith("For full helptext"):
            parts.append(f"{head} {listed}".rstrip(" ."))
    return "; ".join(parts) or " ".join(text.replace("│", " ").split())


def _take_config_flag(args: Sequence[str]) -> tuple[Path | None, list[str]]:
    rest, file = list(args), None
    for index, arg in enumerate(rest):
        if arg == "--config":
            if index + 1 >= len(rest):
                raise ConfigError("--config names no file; write --config FILE.yaml")
            file, rest = Path(rest[index + 1]), rest[:index] + rest[index + 2 :]
            break
        if arg.startswith("--config="):
            file, rest = Path(arg.partition("=")[2]), rest[:index] + rest[index + 1 :]
            break
    if file is not None and not file.is_file():
        raise MissingInput(f"--config {file}: no such file; give a YAML file of options")
    return file, rest


def _read_file(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        raise ConfigError(
            f"--config {file}: not YAML{where}; write 'option: value' lines"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {file}: holds no mapping; write 'option: value' lines")
    return values


def _file_to_flags(cls: type, file: Path) -> list[str]:
    known = _fields(cls)
    flags: list[str] = []
    for key, value in _flatten(_read_file(file)):
        name = key.replace("-", "_")
        if name not in known:
            raise UnknownName.of("option", key, known, f"in {file}")
        flags += _flag(name, value, switch=known[name] is bool)
    return flags


def _flatten(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Nested groups are flat on the command line (prefixes are omitted), so here too."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += _flatten(value) if isinstance(value, dict) else [(str(key), value)]
    return pairs


def _flag(name: str, value: Any, *, switch: bool) -> list[str]:
    """switch : a bool, so --name or --no-name; one that may also be left open takes its value."""
    flag = "--" + name.replace("_", "-")
    if value is None and not switch:
        return [flag, "None"]
    if isinstance(value, bool) and switch:
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, (list, tuple)):
        return [flag, *(str(item) for item in value)]
    return [flag, str(value)]


def _fields(cls: type) -> dict[str, Any]:
    """Option name -> type, nested groups flattened."""
    import typing

    found: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints.get(field.name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found |= _fields(kind)
        else:
            found[field.name] = kind
    return found
