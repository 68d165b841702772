"""What the coordinator sends: hellos, and the task packets of one round, one for each version that nodes may hold."""

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Array

from fedtune import wire
from fedtune.codecs import raw
from fedtune.config import Shared
from fedtune.flower.messages import as_array
from fedtune.flower.packets import HELLO, TASK, pack
from fedtune.flower.visit import Turn
from fedtune.method import Member
from fedtune.rounds import Round
from fedtune.tensors import Manifest
from fedtune.wire.convert import manifest_to_proto
from fedtune.wire.frames import sha256
from fedtune.wire.v1 import coordinator_pb2 as pb


@dataclass(frozen=True, slots=True)
class Order:
    """One node's task: an array it may share with others, what is said to it alone, and bytes of payload in it."""

    array: Array
    turn: Turn
    payload: int


def welcome(shared: Shared, base_digest: str, run_id: str) -> pb.Welcome:
    """What every packet of a run begins with: what all share."""
    return pb.Welcome(
        protocol_major=wire.PROTOCOL_MAJOR,
        protocol_minor=wire.PROTOCOL_MINOR,
        features=list(wire.FEATURES),
        run_id=run_id,
        settings_json=shared.to_json(),
        settings_digest=shared.digest(),
        base_digest=base_digest,
    )


def hello(greeting: pb.Welcome) -> Array:
    """Asks a node who it is."""
    return as_array(HELLO, pack([greeting.SerializeToString()]))


class Orders:
    """The tasks of one round.

    A packet depends on the version a node holds and on nothing else of it, so nodes at the same version get the same
    array: it is built once, and Flower stores it once.
    """

    def __init__(self, current: Round, digest: str, greeting: pb.Welcome, members: Sequence[Member]) -> None:
        self._round, self._digest, self._greeting = current, digest, greeting
        self._shapes: list[Manifest] = []
        for member in members:
            shape = current.method.template(current.state, member)
            if shape not in self._shapes:
                self._shapes.append(shape)
        self._arrays: dict[int, tuple[Array, int]] = {}

    def order(self, member: Member, since: int, accepted: int) -> Order:
        """Returns the task of a member.

        Args:
            member: who.
            since: version its model holds; -1: only the base.
            accepted: round of its last update that was folded in; 0: none.
        """
        shape = self._shapes.index(self._round.method.template(self._round.state, member))
        if since not in self._arrays:
            self._arrays[since] = self._array(member, since)
        turn: Turn = {
            "client": member.id,
            "rank": member.rank,
            "alpha": member.alpha,
            "depth": member.depth,
            "shape": shape,
            "accepted": accepted,
        }
        array, payload = self._arrays[since]
        return Order(array, turn, payload)

    def _array(self, member: Member, since: int) -> tuple[Array, int]:
        task = self._round.task(member, since)
        payload = list(raw.encode(task.payload, task.broadcast))
        header = pb.FetchHeader(
            since=since,
            version=task.version,
            broadcast=manifest_to_proto(task.broadcast),
            nbytes=task.broadcast.nbytes,
            sha256=sha256(payload),
        )
        headers = [self._greeting.SerializeToString(), header.SerializeToString()]
        return as_array(TASK, pack([*headers, *map(self._task, self._shapes)], payload)), header.nbytes

    def _task(self, shape: Manifest) -> bytes:
        message = pb.Task(
            round=self._round.number,
            version=self._round.number - 1,
            state_digest=self._digest,
            update=manifest_to_proto(shape),
        )
        return message.SerializeToString()
