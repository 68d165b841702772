"""Errors across the wire: a gRPC status code, the message as details, and the error's name in the trailing metadata."""

from collections.abc import Iterable

import grpc

from fedtune import errors
from fedtune.errors import FedtuneError, ModelError, ProtocolError, StorageError, UnavailableError, WireError

KIND_KEY = "fedtune-error"
"""Trailing metadata key that carries the name of the error's class."""

_CODES: dict[type[FedtuneError], grpc.StatusCode] = {
    WireError: grpc.StatusCode.INVALID_ARGUMENT,
    ProtocolError: grpc.StatusCode.FAILED_PRECONDITION,
    ModelError: grpc.StatusCode.FAILED_PRECONDITION,
    StorageError: grpc.StatusCode.UNAVAILABLE,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
}
_ERRORS: dict[grpc.StatusCode, type[FedtuneError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: WireError,
    grpc.StatusCode.OUT_OF_RANGE: WireError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: WireError,
    grpc.StatusCode.ALREADY_EXISTS: WireError,
    grpc.StatusCode.FAILED_PRECONDITION: ProtocolError,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
    grpc.StatusCode.UNAUTHENTICATED: ProtocolError,
    grpc.StatusCode.PERMISSION_DENIED: ProtocolError,
    grpc.StatusCode.ABORTED: ProtocolError,
}
# What a peer may name: never an error that would send the user looking on the wrong machine.
_NAMED = {cls.__name__: cls for cls in (errors.WireError, errors.ProtocolError, errors.ModelError)}


def code_of(error: FedtuneError) -> grpc.StatusCode:
    """Returns the status code that a refusal travels under."""
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL)


def metadata_of(error: FedtuneError) -> tuple[tuple[str, str], ...]:
    """Returns the trailing metadata that keeps the error's class."""
    return ((KIND_KEY, type(error).__name__),)


def error_of(
    code: grpc.StatusCode, details: str | None, metadata: Iterable[tuple[str, str | bytes]] | None = None
) -> FedtuneError:
    """Builds the error a status stands for; everything that another try may mend is an UnavailableError."""
    cls = _ERRORS.get(code, UnavailableError)
    if cls is not UnavailableError:
        named = next((str(value) for key, value in metadata or () if key == KIND_KEY), "")
        cls = _NAMED.get(named, cls)
    return cls(details or code.name.lower().replace("_", " "))
