"""Where and how the coordinator listens: address, TLS, and who a certificate says a client is."""

import errno
import ipaddress
import socket
from typing import Any

import grpc
import grpc.aio

from fedtune.config.schema import ServerConfig
from fedtune.errors import ConfigError, ProtocolError, problem
from fedtune.pem import read_authority, read_pair

_REMEDY = "Give server.cert, server.key and server.client_ca, or set server.insecure = true on a network you trust"


def parse_address(address: str, name: str = "server.address") -> tuple[str, int]:
    """Splits host:port, also [::1]:port; raises ConfigError when it is neither."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(problem(name, "host:port, such as 127.0.0.1:7070", repr(address)))
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def credentials(server: ServerConfig) -> grpc.ServerCredentials | None:
    """Returns mutual TLS credentials, or None for plain text.

    Raises:
        ConfigError: only some of the three files are given, one is unusable, or plain text would leave this machine.
    """
    files = {"server.cert": server.cert, "server.key": server.key, "server.client_ca": server.client_ca}
    missing = [name for name, path in files.items() if path is None]
    if len(missing) == len(files):
        if not server.insecure and not is_loopback(parse_address(server.address)[0]):
            raise ConfigError(problem("server.address", "a loopback address without TLS", server.address, _REMEDY))
        return None
    if server.cert is None or server.key is None or server.client_ca is None:
        raise ConfigError(problem("server", "cert, key and client_ca together", f"no {' and no '.join(missing)}"))
    cert, key = read_pair("server.cert", server.cert, "server.key", server.key)
    return grpc.ssl_server_credentials(
        [(key, cert)], read_authority("server.client_ca", server.client_ca), require_client_auth=True
    )


def bind(server: grpc.aio.Server, address: str, tls: grpc.ServerCredentials | None) -> int:
    """Binds the port and returns it; raises ConfigError, saying why, when that cannot be."""
    host, port = parse_address(address)
    try:
        _probe(host, port)
    except OSError as error:
        raise cannot_bind("server.address", address, error) from error
    try:
        bound = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(problem("server.address", "an address to listen at", f"{address} ({error})")) from error
    if bound == 0:
        raise ConfigError(problem("server.address", "an address to listen at", f"{address}, which gRPC cannot bind"))
    return bound


def cannot_bind(name: str, address: str, error: OSError) -> ConfigError:
    """Builds the error for an address at which this machine cannot listen: taken, unknown, elsewhere or forbidden."""
    want, remedy = "an address of this machine", "0.0.0.0 and [::] stand for all of them"
    if isinstance(error, socket.gaierror):
        want = "a host name that can be looked up"
    elif error.errno == errno.EADDRINUSE:
        want, remedy = "a free port", "Stop the program that uses it, or choose another port (0 takes a free one)"
    elif error.errno in (errno.EACCES, errno.EPERM):
        want, remedy = "a port this user may use", "Choose one above 1023"
    return ConfigError(problem(name, want, f"{address}: {error.strerror or error}", remedy))


def check_identity(context: "grpc.aio.ServicerContext[Any, Any]", client_id: str) -> None:
    """With mutual TLS a client's id is its certificate's: the common name, or the last part of a URI in it.

    Raises:
        ProtocolError: the certificate names somebody else.
    """
    auth = context.auth_context()
    if "x509_pem_cert" not in auth and "x509_common_name" not in auth:
        return
    names = {_text(value) for value in auth.get("x509_common_name", [])}
    names |= {_text(v).rsplit("/", 1)[-1] for v in auth.get("x509_subject_alternative_name", []) if b"://" in v}
    if client_id not in names:
        remedy = "Set client.id to the name in client.cert"
        raise ProtocolError(problem("client.id", f"one of {sorted(names)}, as in the certificate", client_id, remedy))


def reachable(host: str, port: int) -> str:
    """Returns the address under which programs on this machine find the coordinator."""
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _probe(host: str, port: int) -> None:
    """Binds once with the plain socket API, whose OSError says what is wrong."""
    family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(where)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
