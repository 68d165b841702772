"""What a coordinator says of its run, asked over its Status call."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from fedtune.config.schema import ClientConfig


@dataclass(frozen=True, slots=True)
class RemoteClient:
    """One client as the coordinator sees it: `state` is idle, training, submitted or gone."""

    id: str
    state: str
    rank: int
    depth: int
    round: int
    step: int
    steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class RemoteStatus:
    """A run as its coordinator sees it: `phase` is waiting, training, finished or failed."""

    run_id: str
    name: str
    phase: str
    round: int
    rounds: int
    bytes_up: int
    bytes_down: int
    clients: tuple[RemoteClient, ...]


def fetch_status(client: ClientConfig, timeout_s: float = 5.0) -> RemoteStatus:
    """Asks the coordinator at `client.address`.

    Raises:
        UnavailableError: nobody answers there.
        ConfigError: the address is on another machine and there is no TLS.
    """
    import grpc

    from fedtune import wire
    from fedtune.errors import UnavailableError, problem
    from fedtune.wire.v1 import coordinator_pb2 as pb

    channel = importlib.import_module("fedtune_client.channel").open_channel(client)
    call = channel.unary_unary(
        wire.STATUS,
        request_serializer=pb.StatusRequest.SerializeToString,
        response_deserializer=pb.StatusReply.FromString,
    )
    try:
        reply = call(pb.StatusRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        remedy = "Is the coordinator running there? Does it ask for TLS?"
        raise UnavailableError(problem(client.address, "a coordinator's answer", error.code().name, remedy)) from error
    finally:
        channel.close()
    clients = tuple(
        RemoteClient(c.client_id, c.state, c.rank, c.depth, c.round, c.step, c.steps, c.loss) for c in reply.clients
    )
    return RemoteStatus(
        reply.run_id, reply.name, reply.phase, reply.round, reply.rounds, reply.bytes_up, reply.bytes_down, clients
    )


def running_address(folder: Path) -> str | None:
    """Reads where the coordinator of a run folder listens, or listened last; None when it never did."""
    try:
        return (folder / "address").read_text().strip() or None
    except OSError:
        return None
