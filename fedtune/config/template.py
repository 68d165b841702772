"""The schema written out: a commented TOML for `fedtune init`, and the reference page of the documentation.

Both are made from the dataclasses of `fedtune.config.schema` and their docstrings, so they cannot fall behind.
"""

import dataclasses
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.codecs.compression import Compression
from fedtune.config.schema import Config
from fedtune.methods import METHODS, FLoRA
from fedtune.outer import ServerOptimizer

Values = Mapping[str, Mapping[str, object]]

_HEADER = """\
# A fedtune run. A line that starts with `#key =` shows a default: remove the `#` to change it.
# Check the file and the machine with:  fedtune doctor {name}
# Start it with:                        fedtune simulate {name}
"""
_PAGE = """\
# Configuration

One TOML file holds everything. `fedtune init` writes one with every key and its default, `fedtune doctor FILE` checks
it, and `--set section.key=value` changes one setting for one command. The file is checked whole before anything heavy
is loaded; all faults are reported together.

`[method]`, `[training]`, `[model]` and `run.seed` are shared: the coordinator sends them to its clients, whose own are
not looked at, but for a `model.name` that is a folder: there a client finds its copy of the model. Everything else
concerns one machine. A run folder belongs to one set of shared settings.

This page is made from the schema: `python -m fedtune.config.template > docs/configuration.md`.
"""
_SUMMARY = {
    "run": "what the run is called, where its results go, and its seed",
    "model": "the pretrained model",
    "data": "the rows to train on, and which columns hold what",
    "method": "the federated method",
    "training": "what every client does in one round",
    "rounds": "how many rounds, and whom a round waits for",
    "server": "where the coordinator listens (`fedtune server`)",
    "client": "this client (`fedtune client`)",
    "simulation": "clients on this machine (`fedtune simulate`), and how the data is dealt out to them",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the configuration: section, name, default and what it does."""

    section: str
    name: str
    default: object
    text: str


def keys(section: str, kind: type | None = None) -> list[Key]:
    """Lists the keys of a section in the schema's order; `kind` picks a method's class for `method`."""
    kind = kind or section_type(section)
    texts = described(kind)
    found = [Key(section, f.name, _default(f), texts.get(f.name, "")) for f in dataclasses.fields(kind)]
    if section == "method":
        names = " or ".join(f"`{name}`" for name in METHODS)
        found.insert(0, Key("method", "name", getattr(kind, "name", ""), f"{names}."))
    return found


def sections() -> list[str]:
    """Names of the sections in the schema's order."""
    return [field.name for field in dataclasses.fields(Config)]


def section_type(section: str) -> type:
    """The dataclass behind a section; for `method` that of FLoRA."""
    return type(getattr(Config(), section))


def described(kind: type) -> dict[str, str]:
    """Reads the `Attributes:` part of a class's docstring: what each field does."""
    _, _, part = textwrap.dedent("        " + (kind.__doc__ or "")).partition("Attributes:\n")
    texts: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(part).strip()):
        names, _, text = entry.partition(": ")
        texts.update({name.strip(): " ".join(text.split()) for name in names.split(",")})
    return texts


def template(values: Values, name: str = "config.toml") -> str:
    """Returns a TOML file with every key of the schema: those in `values` set, the others as comments."""
    parts = [_HEADER.format(name=name)]
    for section in sections():
        parts.append(f"[{section}]  # {_SUMMARY[section]}\n" + "".join(_lines(section, values.get(section, {}))))
    return "\n".join(parts)


def reference() -> str:
    """Returns docs/configuration.md: the tables of every section as Markdown."""
    parts = [_PAGE]
    for section in sections():
        if section != "method":
            parts.append(_table(f"## `[{section}]`: {_SUMMARY[section]}", keys(section)))
    for name, kind in METHODS.items():
        parts.append(_table(f'## `[method]` with `name = "{name}"`', keys("method", kind)))
    parts.append(_table("## `[method.uplink]`: how tensors travel", keys("method.uplink", Compression)))
    outer = keys("method.server_optimizer", ServerOptimizer)
    parts.append(_table("## `[method.server_optimizer]`: the coordinator's own step", outer))
    return "\n".join(parts)


def toml_value(value: object) -> str:
    """Writes a default as TOML."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return re.sub(r"e([+-]?)0*(\d)", r"e\1\2", repr(value))
    return str(value) if isinstance(value, int) else json.dumps(str(value))


def demo() -> dict[str, dict[str, object]]:
    """Values for a first run: the built-in model and data."""
    return {
        "run": {"name": "demo", "folder": "runs/demo"},
        "model": {"name": "smollm2-135m"},
        "data": {"name": "vader", "max_rows": 4000, "held_out_rows": 100},
        "method": {"name": FLoRA.name, "rank": 8, "target_modules": ["q_proj", "v_proj"]},
        "training": {"steps": 4, "batch_size": 8, "learning_rate": 2e-3, "max_length": 128},
        "rounds": {"count": 3},
        "simulation": {"clients": 4, "ranks": [16, 8, 8, 4], "partition": "iid"},
    }


def own_data(file: Path, columns: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """Values for a run on the user's own file; `columns` say which hold the text (see `[data]`)."""
    values = demo()
    values["run"] = {"name": "run", "folder": "runs/run"}
    values["data"] = {"name": str(file), **columns, "held_out": 0.1}
    values["training"] = {"steps": 10, "batch_size": 8, "max_length": 256}
    return values


def _lines(section: str, values: Mapping[str, object]) -> Iterator[str]:
    shown = ""
    for key in keys(section):
        if key.text != shown:
            yield from (
                f"{line}\n" for line in textwrap.wrap(key.text, 110, initial_indent="# ", subsequent_indent="# ")
            )
        shown = key.text
        if key.name in values:
            yield f"{key.name} = {toml_value(values[key.name])}\n"
        else:
            yield f"#{key.name} = {toml_value('file.pem' if key.default is None else key.default)}\n"


def _table(title: str, rows: list[Key]) -> str:
    lines = [title, "", "| key | default | what it does |", "|---|---|---|"]
    lines += [f"| `{row.name}` | {_shown(row.default)} | {row.text} |" for row in rows]
    return "\n".join(lines) + "\n"


def _shown(default: object) -> str:
    return "none" if default is None else f"`{toml_value(default)}`"


def _default(field: "dataclasses.Field[Any]") -> object:
    """The default of a schema field, whether given plainly or through pydantic's `Field`."""
    default = field.default
    default = getattr(default, "default", default) if type(default).__name__ == "FieldInfo" else default
    if isinstance(default, ServerOptimizer):
        return default.name
    return default.codec if isinstance(default, Compression) else default


if __name__ == "__main__":
    sys.stdout.write(reference())
