"""What a method keeps between rounds (`ClientJob.memory`), on disk: what compression left out, personal factors.

    memory.safetensors             what the last update that was accepted left behind
    outbox/000003.memory           what the update of round 3 leaves behind, once it is accepted

A turn's memory becomes durable together with its update, and counts from the moment that is accepted: then the file is
renamed to the first name. A turn whose update is refused, late or lost leaves no trace, and what it had taken from
memory is there again for the next one.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedtune.tensors import Array, Tensors

NAME = "memory.safetensors"


def to_bytes(memory: Tensors, run_id: str) -> bytes:
    """Writes the memory of one run."""
    data: bytes = save(dict(memory), metadata={"run_id": run_id})
    return data


def read(file: Path, run_id: str) -> dict[str, Array]:
    """Reads what was kept in a run; nothing when there is no such file, or it is of another run or damaged."""
    try:
        with safe_open(file, "numpy") as stored:
            if (stored.metadata() or {}).get("run_id") != run_id:
                return {}
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError):
        return {}
