"""An address at which nobody can listen: why not, and no talk of free ports where that is not it."""

import asyncio
import errno
import socket

import grpc.aio
import pytest
from fedtune_server.listen import bind, cannot_bind

from fedtune.errors import ConfigError


def at(address):
    async def main():
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        try:
            return bind(server, address, None)
        finally:
            await server.stop(0)

    return asyncio.run(main())


def test_a_free_port_is_bound():
    assert at("127.0.0.1:0") > 0
    assert at("localhost:0") > 0


def test_a_taken_port():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match=r"a free port.*Stop the program"),
    ):
        at(f"127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("port", [0, 7070])
def test_a_host_that_does_not_resolve(port):
    with pytest.raises(ConfigError, match="a host name that can be looked up") as caught:
        at(f"no-such-host.invalid:{port}")
    assert "free port" not in str(caught.value)


@pytest.mark.parametrize("port", [0, 7070])
def test_an_address_of_another_machine(port):
    with pytest.raises(ConfigError, match=r"an address of this machine, got 192\.0\.2\.1"):
        at(f"192.0.2.1:{port}")


def test_a_port_that_is_not_for_everybody():
    error = cannot_bind("server.address", "127.0.0.1:80", PermissionError(errno.EACCES, "Permission denied"))
    assert str(error).startswith("server.address: expected a port this user may use, got 127.0.0.1:80: Permission")
