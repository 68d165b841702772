"""What nodes answer, checked: the trust boundary of the strategy."""

import math
import re
from dataclasses import dataclass

from flwr.app import Message

from fedtune import wire
from fedtune.capability import Capability
from fedtune.errors import ProtocolError, WireError, problem
from fedtune.flower.messages import read_array
from fedtune.flower.packets import HELLO, LACK, RESIDENT, UPDATE, Packet, unpack
from fedtune.method import Member
from fedtune.wire.convert import capability_from_proto, parse
from fedtune.wire.frames import sha256
from fedtune.wire.v1 import coordinator_pb2 as pb

_TEXT = 300


@dataclass(frozen=True, slots=True)
class Update:
    """An update as it came: its payload is not decoded yet. `control` counts the bytes around the payload."""

    weight: int
    metrics: dict[str, float]
    payload: memoryview
    control: int


@dataclass(frozen=True, slots=True)
class Lack:
    """A node holds another version than was thought, and asks for what leads from there."""

    have: int


def read_hello(message: Message) -> tuple[Member, Capability | None, bool]:
    """Reads who a node is, what it has measured, and whether it is resident.

    Raises:
        WireError: the reply is an error, or not what was asked for.
        ProtocolError: the node speaks another protocol.
    """
    packet, _ = _packet(message, (HELLO,))
    reply = parse(pb.Hello, packet.headers[0])
    if reply.protocol_major != wire.PROTOCOL_MAJOR:
        raise ProtocolError(problem("protocol", wire.PROTOCOL_MAJOR, reply.protocol_major))
    if not _is_id(reply.client_id):
        raise WireError(problem("client.id", "small letters, digits and hyphens", repr(reply.client_id[:80])))
    able = capability_from_proto(reply.capability) if reply.HasField("capability") else None
    return Member(reply.client_id, reply.rank, reply.alpha, reply.depth), able, RESIDENT in reply.features


def read_update(message: Message, client: str, state_digest: str, max_bytes: int) -> Update | Lack:
    """Reads the answer to a task; raises WireError unless it is one of `client`'s, trained from `state_digest`."""
    packet, stype = _packet(message, (UPDATE, LACK))
    if stype == LACK:
        return Lack(parse(pb.FetchRequest, packet.headers[0]).have)
    header = parse(pb.SubmitHeader, packet.headers[0])
    nbytes = packet.payload.nbytes
    if nbytes > max_bytes:
        raise WireError(
            problem(f"update of {client}", f"at most {max_bytes} bytes", nbytes, "See server.max_update_mb")
        )
    if header.client_id != client:
        raise WireError(problem("update: client", client, repr(header.client_id[:80])))
    if header.state_digest != state_digest:
        raise WireError(problem(f"update of {client}: state digest", state_digest, repr(header.state_digest[:64])))
    if header.nbytes != nbytes or header.sha256 != sha256([packet.payload]):
        raise WireError(problem(f"update of {client}", "the bytes its header announces", "others"))
    if len(header.metrics) > wire.MAX_METRICS:
        raise WireError(problem(f"metrics of {client}", f"at most {wire.MAX_METRICS}", len(header.metrics)))
    metrics = {name[:64]: value for name, value in header.metrics.items() if math.isfinite(value)}
    return Update(header.weight, metrics, packet.payload, len(packet.headers[0]) + 16)


def _packet(message: Message, kinds: tuple[str, ...]) -> tuple[Packet, str]:
    if message.has_error():
        raise WireError(f"the node failed: {str(message.error.reason or message.error.code)[:_TEXT]}")
    try:
        array = read_array(message)
    except ValueError as error:
        raise WireError(str(error)) from error
    if array.stype not in kinds:
        raise WireError(problem("reply", " or ".join(kinds), repr(array.stype[:80])))
    packet = unpack(array.data)
    if len(packet.headers) != 1:
        raise WireError(problem("reply", "one header", len(packet.headers)))
    return packet, array.stype


def _is_id(text: str) -> bool:
    return re.fullmatch(wire.CLIENT_ID, text) is not None
