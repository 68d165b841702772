"""The edge of every call: refusals become status codes, faults of ours never become a silent stall."""

import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from fedtune.errors import FedtuneError, StorageError
from fedtune.wire.status import code_of, metadata_of
from fedtune_server.run import Run

T = TypeVar("T")
Context: TypeAlias = "grpc.aio.ServicerContext[object, bytes | Message]"


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds the coordinator waits for a peer, and the slowest rate (bytes a second) it puts up with."""

    hello_s: float = 10.0
    ready_s: float = 3600.0
    frame_s: float = 60.0
    submit_s: float = 60.0
    min_rate: float = 32 * 1024


DEFAULT_PATIENCE = Patience()


class SilentError(Exception):
    """A stream did not deliver in time."""


class DuplicateError(Exception):
    """Another update of this client is part of the round already."""


class NoTaskError(Exception):
    """The task is unknown, or its round is closed."""


async def guarded(run: Run, context: Context, call: Callable[[], Awaitable[T]]) -> T:
    """Runs one call; an error ends it with the status code the contract names."""
    try:
        return await call()
    except DuplicateError as error:
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(error))
    except NoTaskError as error:
        await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
    except SilentError as error:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
    except FedtuneError as error:
        if isinstance(error, StorageError):
            run.healthy = False
            run.events.emit("storage_failed", reason=str(error))
        await context.abort(code_of(error), str(error), metadata_of(error))
    except grpc.aio.AbortError:
        raise
    except Exception:
        run.events.emit("internal_error", reason=traceback.format_exc()[-2000:])
        await context.abort(grpc.StatusCode.INTERNAL, "The coordinator met a fault of its own; its log says more")
    raise AssertionError("abort returned")
