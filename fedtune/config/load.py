"""TOML to `Config`: all faults are reported together, each with its key, its value and what would be right."""

import difflib
import tomllib
from dataclasses import fields, is_dataclass
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fedtune.codecs.compression import Compression
from fedtune.config.schema import Config
from fedtune.errors import ConfigError, ProtocolError
from fedtune.method import Member, Method
from fedtune.methods import METHODS, FLoRA
from fedtune.outer import ServerOptimizer
from fedtune.rounds import admit

_DORA = (
    "DoRA is not supported: its magnitudes divide by the norm of W + B A, so no stack or mean of clients' factors is "
    "the mean of their models; use LoRA, with rslora if the rank is large"
)
_ADALORA = (
    "AdaLoRA is not supported: each client would prune singular values of its own by its own schedule, and what is "
    "left does not fit together; for ranks that differ use flora, florist or flexlora"
)
_REFUSED = {"dora": _DORA, "use_dora": _DORA, "adalora": _ADALORA, "use_adalora": _ADALORA}


def load(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Reads a TOML file.

    Args:
        path: the file.
        overrides: `section.key=value` in TOML syntax, as given with `--set`; a bare word is taken as a string.

    Raises:
        ConfigError: the file is missing, is not TOML, or any key or value is wrong; the message lists every fault.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). `fedtune init {path}` writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return overridden(raw, overrides, str(path))


def overridden(raw: dict[str, Any], overrides: tuple[str, ...], source: str = "configuration") -> Config:
    """Validates a nested mapping after changing keys of it, as `load` and `parse` do."""
    for override in overrides:
        _override(raw, override)
    return parse(raw, source)


def parse(raw: dict[str, Any], source: str = "configuration", *, whole: bool = True) -> Config:
    """Validates a nested mapping; raises ConfigError listing every fault.

    Args:
        raw: sections and their keys.
        source: what errors call it.
        whole: method and rounds are to fit together; False for settings that say nothing of rounds.
    """
    sections = dict(raw)
    method, faults = _method(sections.pop("method", {}))
    try:
        config = TypeAdapter(Config).validate_python({**sections, "method": method})
    except ValidationError as error:
        faults = _faults(error, raw) + faults
    else:
        faults += [*_enough(config), *_plan(config)] if whole else []
    if faults:
        head = f"{source}: {len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise ConfigError("\n".join([head, *(f"  {fault}" for fault in faults)]))
    return config


def _method(raw: Any) -> tuple[Method, list[str]]:
    """Builds the method that `name` asks for, from its own fields."""
    if not isinstance(raw, dict):
        return FLoRA(), [f"method: expected a table, got {raw!r}"]
    options = dict(raw)
    name = options.pop("name", FLoRA.name)
    refused = [f"method.{key}: {_REFUSED[key]}" for key in options if key in _REFUSED]
    if refused:
        return FLoRA(), refused
    if not isinstance(name, str) or name not in METHODS:
        if str(name).lower() in _REFUSED:
            return FLoRA(), [f"method.name: {_REFUSED[str(name).lower()]}"]
        return FLoRA(), [f"method.name: expected one of {', '.join(METHODS)}, got {name!r}"]
    try:
        return TypeAdapter(METHODS[name]).validate_python(options), []
    except ValidationError as error:
        return FLoRA(), _faults(error, {"method": raw}, "method")


def _enough(config: Config) -> list[str]:
    """Whether rounds are large enough for the method."""
    least, rounds = config.method.least_updates, config.rounds
    certain = ceil(rounds.quorum * min(rounds.clients or rounds.min_clients, rounds.min_clients))
    if certain >= least:
        return []
    why = f"{least} updates a round (min_clients, times quorum), so that robust folding can compare clients"
    return [f"rounds.min_clients: expected enough for {why}, got {certain}"]


def _plan(config: Config) -> list[str]:
    """Whether the method takes what planning gives to clients."""
    if not config.rounds.plan_s:
        return []
    try:
        admit(config.method, Member("client", depth=1))
    except ProtocolError as error:
        return [f"rounds.plan_s: gives clients adapters of less than full depth: {error}"]
    return []


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    *sections, field = key.strip().split(".")
    if not (equals and field and all(sections) and sections):
        raise ConfigError(f"--set {text}: expected section.key=value, such as rounds.count=5")
    if "\n" in text:
        raise ConfigError(f"--set {key.strip()}: expected one line, got {text!r}; write \\n inside double quotes")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    table: Any = raw
    for section in sections:
        table = table.setdefault(section, {}) if isinstance(table, dict) else None
    if isinstance(table, dict):  # anything else is reported by `parse`
        table[field] = parsed


def _faults(error: ValidationError, raw: dict[str, Any], *section: str) -> list[str]:
    return [_fault(detail, raw, section) for detail in error.errors()]


def _fault(detail: ErrorDetails, raw: dict[str, Any], section: tuple[str, ...]) -> str:
    location = [*section, *(str(part) for part in detail["loc"])]
    key = ".".join(location)
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known, others = _known(location[:-1], raw), _with(location)
        if others:
            name = raw.get("method", {}).get("name", FLoRA.name)
            return f"{key}: unknown key; {name} does not have it, but {', '.join(others)}; remove it"
        near = difflib.get_close_matches(location[-1], known, 1)
        return f"{key}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
    message = detail["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]} (got {detail['input']!r})"


def _with(location: list[str]) -> list[str]:
    """Names the methods that have a key of `[method]`."""
    if len(location) != 2 or location[0] != "method":
        return []
    return [
        name for name, kind in METHODS.items() if is_dataclass(kind) and location[1] in {f.name for f in fields(kind)}
    ]


def _known(section: list[str], raw: dict[str, Any]) -> list[str]:
    """Lists the keys a section may have."""
    if not section:
        return [field.name for field in fields(Config)]
    if section[0] == "method":
        if len(section) > 1:
            return [f.name for f in fields(ServerOptimizer if section[1] == "server_optimizer" else Compression)]
        method = METHODS.get(str(raw.get("method", {}).get("name", "flora")))
        return ["name", *(f.name for f in fields(method))] if method and is_dataclass(method) else ["name"]
    kind = next((field.type for field in fields(Config) if field.name == section[0]), None)
    return [f.name for f in fields(kind)] if isinstance(kind, type) and is_dataclass(kind) else []
