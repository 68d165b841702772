"""Flower's messages around fedtune's packets: one array, and beside it what is said to one node alone."""

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedtune.flower.visit import Turn

_RECORD, _ARRAY, _TURN = "fedtune", "packet", "turn"


def as_array(stype: str, data: bytes) -> Array:
    """Wraps a packet; Flower cuts it into chunks, and stores equal ones once."""
    return Array(dtype="uint8", shape=(len(data),), stype=stype, data=data)


def content(array: Array, turn: Turn | None = None) -> RecordDict:
    """Returns the content of a message."""
    records = RecordDict({_RECORD: ArrayRecord({_ARRAY: array})})
    if turn:
        records[_TURN] = ConfigRecord(dict(turn))
    return records


def read_array(message: Message) -> Array:
    """Takes the packet's array out of a message; raises ValueError when there is none."""
    record = message.content.array_records.get(_RECORD)
    if record is None or _ARRAY not in record:
        want, got = f"an array {_ARRAY!r} in the record {_RECORD!r}", ", ".join(message.content) or "nothing"
        raise ValueError(f"message: expected {want}, got {got}. A mod or another strategy may have changed it")
    return record[_ARRAY]


def read_turn(message: Message) -> Turn:
    """Takes out what is said to this node alone."""
    record = message.content.config_records.get(_TURN)
    found: dict[str, str | int | float] = {}
    for key, value in (record or {}).items():
        if isinstance(value, str | int | float):
            found[key] = value
    return found
