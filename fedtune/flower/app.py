"""A Flower app written out: a small folder that `flwr run` takes, with a configuration as its run config.

It ships nothing of fedtune, which is installed where SuperLink and SuperNodes run, and names no dependencies, so that
Flower has nothing to download.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from fedtune.config import Config
from fedtune.config.template import Key, keys
from fedtune.errors import ConfigError, StorageError, problem
from fedtune.flower.plugin import Plugin
from fedtune.flower.settings import method_tables
from fedtune.methods import METHODS

SECTIONS = ("run", "model", "data", "method", "training", "rounds", "simulation", "client", "server")
_NODE_ONLY = ("id", "address", "rank", "alpha", "depth", "folder", "ca", "cert", "key", "insecure")
_FLOWERS_OWN = ("address", "cert", "key", "client_ca", "insecure", "metrics_address")
_OURS = """
# Of the plug-in itself.
[tool.flwr.app.config.flower]
resident = "{resident}"  # a worker that keeps the model between rounds: on, off, or auto: in a deployment
idle_s = {idle_s:g}       # seconds after which a resident worker that nobody asks ends
keep = {keep}           # simulation: nodes whose model an actor keeps in memory
"""
_HEADER = """\
# A Flower app that runs fedtune. Run it with:  flwr run {folder} CONNECTION --stream
# Change any key below for one run with:         --run-config 'rounds.count=5 method.rank=8'
# An empty text stands for the default; a list is written as text: simulation.ranks = "4, 8, 16".
[project]
name = "{name}"
version = "1.0.0"
description = "Federated fine-tuning with fedtune"
license = {{ text = "Apache-2.0" }}
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.flwr.app]
publisher = "fedtune"
fab-include = ["{package}/**/*.py"]

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"
"""
_FILES = {
    "__init__.py": '"""A Flower app that runs fedtune."""\n',
    "server_app.py": '"""The coordinator\'s side."""\n\n'
    "from fedtune.flower.server import server_app\n\napp = server_app()\n",
    "client_app.py": '"""A node\'s side. To train with a loop of your own: client_app(open_worker=...)."""\n\n'
    "from fedtune.flower.client import client_app\n\napp = client_app()\n",
}


def write_app(folder: Path, config: Config, package: str = "fedtune_app") -> None:
    """Writes an app that runs `config`.

    Args:
        folder: new or empty; its name becomes the app's.
        config: the run, as far as nodes share it; what belongs to one machine is left to `--node-config`.
        package: name of the Python package inside.

    Raises:
        ConfigError: the folder is not empty.
        StorageError: it cannot be written.
    """
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(problem(str(folder), "a new or empty folder", "one with files in it"))
        (folder / package).mkdir(parents=True)
        (folder / "pyproject.toml").write_text(project(config, folder, package))
        for name, text in _FILES.items():
            (folder / package / name).write_text(text)
    except OSError as error:
        raise StorageError(problem(str(folder), "a folder that can be written", error.strerror or error)) from error


def project(config: Config, folder: Path, package: str) -> str:
    """Returns the app's `pyproject.toml`."""
    head = _HEADER.format(folder=folder.name, name=_name(folder), package=package)
    return head + "".join(_section(section, config) for section in SECTIONS) + _OURS.format(**asdict(Plugin()))


def _section(section: str, config: Config) -> str:
    values = asdict(getattr(config, section))
    if section != "method":
        return _table(section, _keys(section), values)
    tables = method_tables()
    # Flower takes only keys that are listed, so those of every method are. A default that is not every method's is left
    # out: it would be taken for a choice when `method.name` is changed.
    listed = [key for kind in METHODS.values() for key in keys("method", kind) if key.name not in tables]
    own = {key.name: key.default for key in keys("method", type(config.method))}
    apart = {key.name for key in listed if key.default != own.get(key.name, key.default)}
    chosen = {name: value for name, value in values.items() if name not in apart or value != own[name]}
    found = {key.name: key for key in listed}
    text = _table(section, list(found.values()), {**chosen, "name": config.method.name})
    inner = [_table(f"method.{name}", keys(name, kind), values.get(name, {})) for name, kind in tables.items()]
    return "".join([text, *inner])


def _table(title: str, listed: list[Key], values: Mapping[str, object]) -> str:
    lines = [f"{key.name} = {_shown(values.get(key.name, ''), key)}" for key in listed]
    return "\n".join(["", f"[tool.flwr.app.config.{title}]", *lines, ""])


def _keys(section: str) -> list[Key]:
    hidden = _NODE_ONLY if section == "client" else _FLOWERS_OWN if section == "server" else ()
    return [key for key in keys(section) if key.name not in hidden]


def _shown(value: object, key: Key) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        plain = all(not isinstance(part, str) or re.fullmatch(r"[A-Za-z_][\w.-]*", part) for part in value)
        value = ", ".join(map(str, value)) if plain else f"[{', '.join(_quoted(str(part)) for part in value)}]"
    if key.section == "simulation" and key.name == "clients":
        value = ""  # Flower's own number of nodes
    return repr(value) if isinstance(value, int | float) else _quoted(str(value or ""))


def _quoted(text: str) -> str:
    """A TOML string: JSON's escapes are TOML's; DEL is the one that JSON leaves."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _name(folder: Path) -> str:
    """An app's name: a letter, then letters, digits and hyphens, at most 32."""
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")
    return (name if name[:1].isalpha() else f"fedtune-{name}".strip("-"))[:32]
