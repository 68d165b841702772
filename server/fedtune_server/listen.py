"""Where and how the coordinator listens: address, TLS, and who a certificate says a client is."""

import ipaddress
import socket
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from fedtune.config.schema import ServerConfig
from fedtune.errors import ConfigError, ProtocolError, problem

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
        ConfigError: only some of the three files are given, one cannot be read, or plain text would leave this machine.
    """
    files = {"server.cert": server.cert, "server.key": server.key, "server.client_ca": server.client_ca}
    missing = [name for name, path in files.items() if path is None]
    if len(missing) == len(files):
        if not server.insecure and not is_loopback(parse_address(server.address)[0]):
            raise ConfigError(problem("server.address", "a loopback address without TLS", server.address, _REMEDY))
        return None
    if missing:
        raise ConfigError(problem("server", "cert, key and client_ca together", f"no {' and no '.join(missing)}"))
    pem = {name: _read(name, path) for name, path in files.items() if path is not None}
    return grpc.ssl_server_credentials(
        [(pem["server.key"], pem["server.cert"])], pem["server.client_ca"], require_client_auth=True
    )


def bind(server: grpc.aio.Server, address: str, tls: grpc.ServerCredentials | None) -> int:
    """Binds the port and returns it; raises ConfigError when it is taken."""
    host, port = parse_address(address)
    if port:
        _probe(host, port, address)
    try:
        bound = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
    except RuntimeError as error:
        raise _taken(address, str(error)) from error
    if bound == 0:
        raise _taken(address, "the address cannot be bound")
    return bound


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


def _probe(host: str, port: int, address: str) -> None:
    """Binds once with the plain socket API, whose error says what is wrong."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise _taken(address, str(error.strerror or error)) from error


def _taken(address: str, reason: str) -> ConfigError:
    remedy = "Stop the program that uses it, or choose another port (0 takes a free one)"
    return ConfigError(problem("server.address", "a free port", f"{address}: {reason}", remedy))


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(problem(name, "a PEM file", f"{path} ({error.strerror})")) from error


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
