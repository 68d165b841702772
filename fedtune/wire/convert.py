"""Messages to values and back, with every check: what comes out of here fits the contract.

A manifest arrives from the coordinator only, but a client still bounds it: a wrong one must give a sentence, not an
allocation of a petabyte.
"""

from dataclasses import astuple
from math import inf
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from fedtune.capability import Capability, Cost
from fedtune.errors import WireError, problem
from fedtune.tensors import DTYPES, Manifest, TensorSpec
from fedtune.wire.v1 import coordinator_pb2 as pb

M = TypeVar("M", bound=Message)

MAX_NAME = 256
MAX_DIMS = 8
MAX_DIM = 2**40
MAX_BYTES = 2**44
MAX_SPECS = 1_000_000

DTYPE_OF_PROTO: dict[int, str] = {
    pb.DTYPE_FLOAT64: "float64",
    pb.DTYPE_FLOAT32: "float32",
    pb.DTYPE_FLOAT16: "float16",
    pb.DTYPE_BFLOAT16: "bfloat16",
    pb.DTYPE_INT64: "int64",
    pb.DTYPE_INT32: "int32",
    pb.DTYPE_UINT8: "uint8",
}
_PROTO_OF_DTYPE = {name: value for value, name in DTYPE_OF_PROTO.items()}


def parse(kind: type[M], data: bytes) -> M:
    """Parses one message; raises WireError when the bytes are not one."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise WireError(problem(kind.__name__, "a serialized message", f"{len(data)} bytes that are none")) from error


def manifest_to_proto(manifest: Manifest) -> pb.Manifest:
    """Writes a manifest; raises WireError when it breaks a bound of the wire."""
    _bounds(manifest)
    specs = (pb.TensorSpec(name=s.name, shape=s.shape, dtype=_enum(s.dtype)) for s in manifest.specs)
    return pb.Manifest(specs=specs)


def manifest_from_proto(message: pb.Manifest, max_bytes: int = MAX_BYTES) -> Manifest:
    """Reads a manifest.

    Raises:
        WireError: an unknown dtype, a name that is empty, too long or there twice, a shape or a total out of bounds.
    """
    if len(message.specs) > MAX_SPECS:
        raise WireError(problem("manifest", f"at most {MAX_SPECS} tensors", len(message.specs)))
    manifest = Manifest(tuple(TensorSpec(s.name, tuple(s.shape), _dtype(s)) for s in message.specs))
    _bounds(manifest, max_bytes)
    return manifest


def capability_to_proto(able: Capability) -> pb.Capability:
    """Writes what a client measured."""
    seconds, memory = (pb.Cost(fixed=c.fixed, block=c.block, rank=c.rank) for c in (able.seconds, able.memory))
    return pb.Capability(seconds=seconds, memory=memory, room=able.room)


def capability_from_proto(message: pb.Capability) -> Capability:
    """Reads what a client measured; raises WireError for a number that is negative or not finite."""
    seconds, memory = (Cost(c.fixed, c.block, c.rank) for c in (message.seconds, message.memory))
    able = Capability(seconds, memory, message.room)
    for number in (*astuple(seconds), *astuple(memory), able.room):
        if not 0 <= number < inf:
            raise WireError(problem("capability", "finite numbers, at least 0", number))
    return able


def _bounds(manifest: Manifest, max_bytes: int = MAX_BYTES) -> None:
    for spec in manifest.specs:
        if not 1 <= len(spec.name.encode()) <= MAX_NAME:
            raise WireError(problem("manifest: name", f"1 to {MAX_NAME} bytes", repr(spec.name[:40])))
        if len(spec.shape) > MAX_DIMS or any(size > MAX_DIM for size in spec.shape):
            want = f"at most {MAX_DIMS} sizes of at most {MAX_DIM}"
            raise WireError(problem(f"manifest: shape of {spec.name}", want, spec.shape[: MAX_DIMS + 1]))
    if len(set(manifest.names)) != len(manifest.specs):
        raise WireError(problem("manifest", "each name once", f"{_twice(manifest.names)} twice"))
    if manifest.nbytes > max_bytes:
        raise WireError(problem("manifest", f"at most {max_bytes} bytes", manifest.nbytes))


def _twice(names: list[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]  # None, which is what `or` wants


def _dtype(spec: pb.TensorSpec) -> str:
    name = DTYPE_OF_PROTO.get(spec.dtype)
    if name is None:
        raise WireError(problem(f"manifest: dtype of {spec.name[:40]}", f"one of {', '.join(DTYPES)}", spec.dtype))
    return name


def _enum(dtype: str) -> pb.DType.ValueType:
    return pb.DType.ValueType(_PROTO_OF_DTYPE[dtype])
