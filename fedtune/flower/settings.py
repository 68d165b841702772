"""Flower's run config and node config as a fedtune configuration: the same names, `section.key`.

Flower carries only text, numbers and truth values, so a list is written as text (`"4, 8, 16"`), and an empty text
means: leave the default. `flower.*` are keys of the plug-in itself.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias, get_origin

from fedtune.config import Config, parse
from fedtune.config.members import member_config
from fedtune.errors import ConfigError, problem
from fedtune.flower.plugin import Plugin
from fedtune.methods import METHODS

Scalars: TypeAlias = Mapping[str, str | int | float | bool]

NODE_SECTIONS = ("client", "data")
_OURS = "flower"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a node is: its configuration, with its id and rank in `[client]`, and its part of the data (None: all)."""

    config: Config
    index: int | None


def read_config(run_config: Scalars) -> Config:
    """Reads a run config; raises ConfigError listing every fault."""
    Plugin.read(run_config)
    return parse(_sections(run_config), "--run-config")


def read_identity(run_config: Scalars, node_config: Scalars) -> Identity:
    """Reads who this node is.

    Either its node config names `client.id` (and then, as a rule, `data.name`), or it has Flower's `partition-id` and
    is the simulated client of that number. What the node config says of its data and its machine goes before the run
    config, which is the coordinator's.

    Raises:
        ConfigError: a wrong key or value, or nothing that says who the node is.
    """
    merged, own = dict(run_config), _own(node_config)
    partition = node_config.get("partition-id")
    if partition is not None:
        partition = _whole("partition-id", partition)
        merged["simulation.clients"] = _count(run_config, node_config, partition, "data.name" in own)
    config = parse(_sections({**merged, **own}), "--run-config with --node-config")
    if "client.id" in own:
        return Identity(config, None)
    if partition is None:
        want = 'client.id="NAME" or partition-id=N'
        raise ConfigError(
            problem("--node-config of this SuperNode", want, ", ".join(map(str, node_config)) or "nothing")
        )
    member = member_config(config, partition, config.client.address)
    given = {key[7:]: getattr(config.client, key[7:]) for key in own if key.startswith("client.")}
    config = replace(member, client=replace(member.client, **given))
    return Identity(config, None if "data.name" in own else partition)


def _own(node_config: Scalars) -> dict[str, Any]:
    """Picks fedtune's keys; the others are Flower's or somebody else's."""
    own = {key: value for key, value in node_config.items() if "." in key}
    strange = [key for key in own if key.partition(".")[0] not in NODE_SECTIONS]
    if strange:
        want = " and ".join(f"{section}.*" for section in NODE_SECTIONS)
        raise ConfigError(problem("--node-config", f"keys of {want}", strange[0], "The rest belongs to the run"))
    return own


def _count(run_config: Scalars, node_config: Scalars, partition: int, own_data: bool) -> int:
    """How many parts the data is dealt into: Flower's number, which a number in the run config must agree with."""
    stated, flower = run_config.get("simulation.clients", ""), node_config.get("num-partitions")
    if flower is None:
        if stated == "" and not own_data:
            remedy = "Add num-partitions=N, the number of SuperNodes"
            raise ConfigError(problem("--node-config", "num-partitions beside partition-id", "none", remedy))
        return partition + 1 if stated == "" else _whole("simulation.clients", stated)
    if stated != "" and _whole("simulation.clients", stated) != _whole("num-partitions", flower):
        remedy = "Set both to the number of SuperNodes, or leave simulation.clients empty"
        raise ConfigError(problem("simulation.clients", f"num-partitions, which is {flower}", stated, remedy))
    return _whole("num-partitions", flower)


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(problem(name, "a whole number from 0 on", repr(value)))
    return value


def _sections(flat: Scalars) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    name = str(flat.get("method.name") or "flora")
    for key, value in flat.items():
        section, dot, field = key.partition(".")
        if not dot:
            raise ConfigError(problem(key, "section.key, such as rounds.count", "no section"))
        if value == "" or section == _OURS or (section == "method" and not _belongs(field, name)):
            continue
        *tables, last = field.split(".")
        inner = nested.setdefault(section, {})
        for table in tables:
            inner = inner.setdefault(table, {})
            if not isinstance(inner, dict):
                raise ConfigError(problem(key, f"keys of {table}, or {table} alone", "both"))
        inner[last] = _value(section, field, value, name)
    return nested


def method_tables() -> dict[str, type]:
    """Tables within `[method]`, such as `uplink`: their names and dataclasses, of all methods together."""
    found = [f for kind in METHODS.values() for f in fields(kind)]  # type: ignore[arg-type]  # methods are dataclasses
    return {f.name: type(f.default) for f in found if is_dataclass(f.default)}


def _belongs(field: str, method: str) -> bool:
    """Whether a key of `[method]` is this method's; an app lists the keys of every method."""
    others = {f.name for kind in METHODS.values() for f in fields(kind)}  # type: ignore[arg-type]  # all are dataclasses
    own = {f.name for f in fields(METHODS[method])} if method in METHODS else others  # type: ignore[arg-type]  # methods are dataclasses
    return field.partition(".")[0] in own or field.partition(".")[0] not in others


def _value(section: str, field: str, value: object, method: str) -> object:
    """Turns the text of a list into the list."""
    if not isinstance(value, str) or not _takes_tuple(section, field, method):
        return value
    text = value.strip()
    try:
        return tomllib.loads(f"value = {text if text.startswith('[') else f'[{text}]'}")["value"]
    except tomllib.TOMLDecodeError:
        return [part.strip() for part in text.strip("[]").split(",") if part.strip()]


def _takes_tuple(section: str, field: str, method: str) -> bool:
    kind: Any = METHODS.get(method) if section == "method" else type(getattr(Config(), section, None))
    table, _, field = field.rpartition(".")
    kind = method_tables().get(table) if table else kind
    if kind is None or not is_dataclass(kind):
        return False
    return any(f.name == field and get_origin(f.type) is tuple for f in fields(kind))
