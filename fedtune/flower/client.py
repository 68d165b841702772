"""The ClientApp: in a deployment a messenger to the resident worker, in a simulation the node itself."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedtune.flower.messages import as_array, content, read_array, read_turn
from fedtune.flower.plugin import Plugin
from fedtune.flower.visit import BYE, Turn, ask, dismiss, worker_name

if TYPE_CHECKING:
    from fedtune.flower.station import OpenWorker, Station

_MEMORY = "fedtune.memory"
_stations: "dict[tuple[int, int], Station]" = {}


def client_app(open_worker: "OpenWorker | None" = None, mods: list[Any] | None = None) -> ClientApp:
    """Makes the ClientApp.

    Args:
        open_worker: opens a node's model and data; fedtune's own trainer when None. It must be a function of a module
            of the app, and import torch only when it is called: the resident worker imports it by name.
        mods: Flower's client mods. They see one packed array; those that count bytes or log work, those that read
            numbers (clipping, noise) find none and fail.
    """
    app = ClientApp(mods=mods)
    opener = _place(open_worker) if open_worker else None

    def reply(message: Message, context: Context) -> Message:
        return _reply(message, context, open_worker, opener)

    for register in (app.query(), app.train()):
        register(reply)
    return app


def _reply(message: Message, context: Context, open_worker: "OpenWorker | None", opener: list[str] | None) -> Message:
    array, turn = read_array(message), read_turn(message)
    state = context.state.array_records.get(_MEMORY)
    kept = state[_MEMORY].data if state else b""
    if _is_resident(context):
        stype, body, left = _visit(array, turn, kept, context, opener)
    else:
        stype, body, left = _play(array, turn, kept, context, open_worker)
    if left:
        context.state[_MEMORY] = ArrayRecord({_MEMORY: as_array("fedtune.memory.v1", left)})
    return Message(content(as_array(stype, body)), reply_to=message)


def _play(
    array: Array, turn: Turn, kept: bytes, context: Context, open_worker: "OpenWorker | None"
) -> tuple[str, bytes, bytes]:
    """Does the work in this process."""
    station = _station(context, open_worker)
    station.kept = kept
    stype, body = station.answer(array.stype, turn, array.data)
    return stype, body, station.kept


def _visit(
    array: Array, turn: Turn, kept: bytes, context: Context, opener: list[str] | None
) -> tuple[str, bytes, bytes]:
    """Hands the packet to this SuperNode's worker for this run."""
    name = worker_name(context.run_id, context.node_id)
    header = {
        "stype": array.stype,
        "turn": dict(turn),
        "run_config": dict(context.run_config),
        "node_config": dict(context.node_config),
        "opener": opener,
    }
    if array.stype == BYE:
        dismiss(name, header)
        return BYE, b"", b""
    answer, (body, left) = ask(name, header, array.data, kept)
    return str(answer["stype"]), body, left


def _is_resident(context: Context) -> bool:
    """Whether the work goes to a resident worker: in a deployment, unless `flower.resident` says otherwise."""
    wish, ray = Plugin.read(context.run_config).resident, sys.modules.get("ray")
    simulated = ray is not None and ray.is_initialized()  # a simulation's actors are Ray's
    return wish == "on" or (wish == "auto" and not simulated)


def _station(context: Context, open_worker: "OpenWorker | None") -> "Station":
    """The node's station in this process: an actor of a simulation keeps the last ones it played."""
    from fedtune.flower.resident import find_opener
    from fedtune.flower.settings import read_identity
    from fedtune.flower.station import Station

    key = (context.run_id, context.node_id)
    station = _stations.pop(key, None)
    if station is None:
        identity = read_identity(context.run_config, context.node_config)
        station = Station(identity, open_worker or find_opener(None), resident=False)
    while len(_stations) >= Plugin.read(context.run_config).keep:
        _stations.pop(next(iter(_stations)))
    _stations[key] = station
    return station


def _place(open_worker: Callable[..., Any]) -> list[str]:
    """Says where the resident worker finds a function: folder, module, name."""
    module, name = open_worker.__module__, open_worker.__qualname__
    source = inspect.getsourcefile(open_worker)
    if source is None or "<" in name or module == "__main__":
        raise ValueError(f"open_worker: expected a function of a module, got {name} of {module}")
    return [str(Path(source).resolve().parents[module.count(".")]), module, name]
