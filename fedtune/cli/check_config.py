"""What `fedtune doctor` looks at in a configuration: the file, the port, the model, the layers, the data."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.cli.check_machine import FAIL, OK, WARN, Check, nearest
from fedtune.cli.prepare import check_counts
from fedtune.errors import FedtuneError
from fedtune.installed import need_training
from fedtune.report.folder import refuse_centralised

if TYPE_CHECKING:
    from fedtune.config import Config
    from fedtune.method import BaseModel

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def config_checks(path: Path, overrides: tuple[str, ...], fetch: bool) -> Iterator[Check]:
    """A configuration, its model and its data. Later checks are left out when an earlier one fails."""
    from fedtune.config import load
    from fedtune.config.unused import unused

    try:
        config = load(path, overrides)
    except FedtuneError as error:
        yield Check(FAIL, "configuration", str(error), "Mend the keys named")
        return
    yield Check(OK, "configuration", f"{path}: {config.method.name}, {config.rounds.count} rounds")
    if said := unused(config):
        yield Check(WARN, "unused keys", said, "Nothing, if you know it: the keys serve other methods or codecs")
    yield _folder(config.run.folder)
    yield from _counts(config)
    yield _port(config.server.address)
    yield from _model(config, fetch)
    yield _data(config)


def fetch_demo() -> Iterator[Check]:
    """Fetches the model and the data of `fedtune init --demo`."""
    from fedtune.config import parse
    from fedtune.config.template import demo

    config = parse(demo())
    yield from _model(config, fetch=True)
    yield _data(config)


def _folder(folder: Path) -> Check:
    try:
        refuse_centralised(folder)
    except FedtuneError as error:
        return Check(FAIL, "run.folder", str(error), "Choose another run.folder")
    if nearest(folder).is_dir() and os.access(nearest(folder), os.W_OK):
        return Check(OK, "run.folder", f"{folder}{' (a run is there: it will go on)' if folder.exists() else ''}")
    return Check(FAIL, "run.folder", f"{folder} cannot be written", "Choose another run.folder")


def _counts(config: "Config") -> Iterator[Check]:
    """Whether the simulation has the clients its rounds wait for; a server's clients are elsewhere."""
    from fedtune.config.schema import SimulationConfig

    try:
        check_counts(config)
    except FedtuneError as error:
        state = WARN if config.simulation == SimulationConfig() else FAIL
        yield Check(state, "rounds", str(error), "Needed for `fedtune simulate`: as many simulation.clients as that")


def _port(address: str) -> Check:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_server((host.strip("[]"), int(port)), family=_family(host)):
            return Check(OK, "server.address", f"{address} is free")
    except ValueError:
        return Check(FAIL, "server.address", address, "Write HOST:PORT")
    except OSError as error:
        mend = "Needed only for `fedtune server`: stop the other program, or choose another port"
        return Check(WARN, "server.address", f"{address}: {error.strerror}", mend)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _model(config: "Config", fetch: bool) -> Iterator[Check]:
    """The model on disk, and whether the method's layers and the clients' ranks fit it."""
    from fedtune.base import open_base
    from fedtune.locate import locate_model

    name, revision = config.model.name, config.model.revision
    try:
        folder = _fetch_model(name, revision) if fetch else locate_model(name, revision)
    except FedtuneError as error:
        if fetch or name.startswith(("/", ".", "~")):
            yield Check(FAIL, "model", str(error), "Put model.name right: a folder, a hub id or a built-in model")
        else:
            mend = "It is fetched on first use; `fedtune doctor --fetch` does it now"
            yield Check(WARN, "model", f"{name} is not here yet", mend)
        return
    try:
        base = open_base(folder, name)
    except FedtuneError as error:
        yield Check(FAIL, "model", str(error), "Put the model's folder right, or name another")
        return
    values = sum(spec.nbytes / _BYTES.get(spec.dtype, 8) for spec in base.weights.specs)
    yield Check(OK, "model", f"{config.model.name}: {values / 1e6:.1f} M weights in {folder}")
    yield _layers(config, base)


def _fetch_model(name: str, revision: str) -> Path:
    from fedtune.hub import find_model
    from fedtune.locate import BUILT_IN

    if name not in BUILT_IN:
        return find_model(name, revision)  # which a coordinator's machine can do without torch
    need_training()
    from fedtune.training.models import resolve_model

    return resolve_model(name, revision)


def _layers(config: "Config", base: "BaseModel") -> Check:
    """Whether every client may join, and what an update of the largest will weigh."""
    from fedtune.config.members import member_config, member_of
    from fedtune.rounds import admit, begin

    try:
        state = begin(config.method, base, config.run.seed)
        nbytes = []
        for index in range(config.simulation.clients):
            client = member_config(config, index, config.server.address).client
            member = admit(config.method, member_of(client))
            nbytes.append(config.method.template(state, member).nbytes)
    except FedtuneError as error:
        return Check(FAIL, "layers and ranks", str(error), "Mend [method] or simulation.ranks")
    said = f"{len(nbytes)} clients, updates of {min(nbytes) / 1e6:.2f} to {max(nbytes) / 1e6:.2f} MB"
    if max(nbytes) > config.server.max_update_mb * 2**20:
        return Check(FAIL, "layers and ranks", said, "Raise server.max_update_mb, or lower the ranks")
    return Check(OK, "layers and ranks", said)


def _data(config: "Config") -> Check:
    """How many rows each client of the simulation has."""
    try:
        from fedtune.training.data import all_client_rows

        counts = [len(rows) for rows in all_client_rows(config)]
    except FedtuneError as error:
        return Check(FAIL, "data", str(error), "Mend [data] or [simulation]")
    except ImportError as error:
        return Check(WARN, "data", f"not looked at: {error}", "pip install 'fedtune[client]'")
    shown = ", ".join(str(count) for count in counts[:12]) + (", ..." if len(counts) > 12 else "")
    return Check(OK, "data", f"{sum(counts)} training rows; by client: {shown}")
