"""Errors keep their meaning across the wire."""

import grpc
import pytest

from fedtune.errors import DataError, ModelError, ProtocolError, StorageError, UnavailableError, WireError
from fedtune.wire.status import KIND_KEY, code_of, error_of, metadata_of

CODE = grpc.StatusCode


@pytest.mark.parametrize("cls", [WireError, ProtocolError, ModelError, UnavailableError])
def test_error_comes_back_as_what_it_was(cls):
    error = cls("why")
    back = error_of(code_of(error), str(error), metadata_of(error))
    assert type(back) is cls
    assert str(back) == "why"


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (WireError, CODE.INVALID_ARGUMENT),
        (ProtocolError, CODE.FAILED_PRECONDITION),
        (ModelError, CODE.FAILED_PRECONDITION),
        (StorageError, CODE.UNAVAILABLE),
        (UnavailableError, CODE.UNAVAILABLE),
        (DataError, CODE.INTERNAL),
    ],
)
def test_codes_of_the_contract(cls, code):
    assert code_of(cls("x")) == code


def test_a_full_disk_of_the_coordinator_is_no_fault_of_the_clients_disk():
    error = StorageError("disk full")
    assert type(error_of(code_of(error), str(error), metadata_of(error))) is UnavailableError


@pytest.mark.parametrize(
    "code", [CODE.UNAVAILABLE, CODE.DEADLINE_EXCEEDED, CODE.INTERNAL, CODE.CANCELLED, CODE.UNKNOWN, CODE.NOT_FOUND]
)
def test_what_another_try_may_mend(code):
    assert type(error_of(code, None)) is UnavailableError


@pytest.mark.parametrize("code", [CODE.UNAUTHENTICATED, CODE.PERMISSION_DENIED, CODE.UNIMPLEMENTED, CODE.ABORTED])
def test_what_no_other_try_mends(code):
    assert type(error_of(code, "no")) is ProtocolError


def test_metadata_cannot_name_an_arbitrary_error():
    error = error_of(CODE.INVALID_ARGUMENT, "x", [("other", "y"), (KIND_KEY, "StorageError")])
    assert type(error) is WireError
