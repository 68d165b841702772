"""The gRPC service: four methods, two of them raw, registered by hand."""

from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from fedtune.wire import FETCH, JOIN, SERVER_OPTIONS, SERVICE, STATUS, SUBMIT
from fedtune.wire.v1 import coordinator_pb2 as pb
from fedtune_server.control import Control
from fedtune_server.guard import Context, guarded
from fedtune_server.run import Run
from fedtune_server.transfer import Transfer


class Health:
    """grpc.health.v1 for the whole server and for the service: SERVING while the disk takes writes."""

    def __init__(self) -> None:
        self._servicer = health_aio.HealthServicer()

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the health service."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set(self, serving: bool) -> None:
        """Publishes the answer to Check and Watch."""
        kind = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            await self._servicer.set(name, kind.SERVING if serving else kind.NOT_SERVING)

    async def drain(self) -> None:
        """Says NOT_SERVING from now on."""
        await self._servicer.enter_graceful_shutdown()


def build(run: Run, control: Control, transfer: Transfer, health: Health) -> grpc.aio.Server:
    """Returns a server with every method registered; binding and starting are left to the caller."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, _handlers(run, control, transfer)),))
    health.register(server)
    return server


def _handlers(run: Run, control: Control, transfer: Transfer) -> "dict[str, grpc.RpcMethodHandler[Any, Any]]":
    async def join(_: object, context: Context) -> None:
        await guarded(run, context, lambda: control.join(context))

    async def status(_: object, context: Context) -> pb.StatusReply:
        return control.status()

    async def fetch(request: bytes, context: Context) -> None:
        await guarded(run, context, lambda: transfer.fetch(request, context))

    async def submit(_: object, context: Context) -> pb.SubmitReply:
        return await guarded(run, context, lambda: transfer.submit(context))

    return {
        _name(JOIN): grpc.stream_stream_rpc_method_handler(join, pb.ClientMessage.FromString, _to_bytes),
        _name(STATUS): grpc.unary_unary_rpc_method_handler(status, pb.StatusRequest.FromString, _to_bytes),
        # No deserializer and no serializer: frames are bytes already.
        _name(FETCH): grpc.unary_stream_rpc_method_handler(fetch),
        _name(SUBMIT): grpc.stream_unary_rpc_method_handler(submit, response_serializer=_to_bytes),
    }


def _to_bytes(message: Message) -> bytes:
    return message.SerializeToString()


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]
