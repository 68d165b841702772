"""What a node's method keeps between rounds (`ClientJob.memory`): personal factors, what compression left out.

It travels in Flower's context, which the SuperNode or the simulation hands to every message of a run. A turn's memory
counts once its update has been accepted, which the next task says (`accepted` in its `Turn`); that of an update which
was refused, late or lost leaves no trace. So two memories are kept: `settled`, and what the turn of `round` left.
"""

import json
from dataclasses import dataclass, field

import numpy as np

from fedtune.codecs import raw
from fedtune.flower.packets import pack, unpack
from fedtune.tensors import Array, Manifest, Tensors
from fedtune.wire.convert import manifest_from_proto, manifest_to_proto, parse
from fedtune.wire.v1 import coordinator_pb2 as pb


@dataclass
class Keeping:
    """One node's memory in the run `run_id`; `round` is that of `pending`, 0 before the first."""

    run_id: str = ""
    settled: Tensors = field(default_factory=dict)
    round: int = 0
    pending: Tensors = field(default_factory=dict)

    def settle(self, accepted: int) -> dict[str, Array]:
        """Returns the memory that counts, for a turn to change; `accepted`: round of the last update that was taken."""
        if self.round and accepted == self.round:
            self.settled, self.pending, self.round = self.pending, {}, 0  # asked again, the same is returned
        return _copied(self.settled)

    def leave(self, number: int, memory: Tensors) -> None:
        """Keeps what the turn of round `number` left."""
        self.round, self.pending = number, _copied(memory)

    def to_bytes(self) -> bytes:
        """Packs it; nothing when there is nothing to keep, so that methods without memory cost nothing."""
        if not self.settled and not self.pending:
            return b""
        both = [(part, Manifest.of(part)) for part in (self.settled, self.pending)]
        head = json.dumps({"run_id": self.run_id, "round": self.round}).encode()
        headers = [head, *(manifest_to_proto(manifest).SerializeToString() for _, manifest in both)]
        return pack(headers, (buffer for part, manifest in both for buffer in raw.encode(part, manifest)))

    @classmethod
    def from_bytes(cls, data: bytes, run_id: str) -> "Keeping":
        """Unpacks it; an empty one when `data` is empty or of another run, since Flower shares contexts among runs."""
        if not data:
            return cls(run_id)
        packet = unpack(data)
        head = json.loads(packet.headers[0])
        if head["run_id"] != run_id:
            return cls(run_id)
        settled, pending = (manifest_from_proto(parse(pb.Manifest, part)) for part in packet.headers[1:])
        cut = settled.nbytes
        settled_arrays = _copied(raw.decode(packet.payload[:cut], settled))
        return cls(run_id, settled_arrays, int(head["round"]), _copied(raw.decode(packet.payload[cut:], pending)))


def _copied(tensors: Tensors) -> dict[str, Array]:
    return {name: np.array(array) for name, array in tensors.items()}
