"""The connection to the coordinator: plain on this machine, TLS to any other."""

import ipaddress

import grpc

from fedtune import wire
from fedtune.config.schema import ClientConfig
from fedtune.errors import ConfigError, problem
from fedtune.pem import read_authority, read_pair

# A subchannel of its own: another client in this process must not share our reconnect clock. A connection attempt
# may take ten seconds, since a TLS handshake with a busy or distant coordinator takes its time.
_OPTIONS = {"grpc.use_local_subchannel_pool": 1, "grpc.min_reconnect_backoff_ms": 10_000}


def open_channel(client: ClientConfig) -> grpc.Channel:
    """Opens a channel; the first connection is made by the first call.

    Raises:
        ConfigError: the address is not on this machine and there is no TLS, or a PEM file is unusable.
    """
    options = list({**dict(wire.CHANNEL_OPTIONS), **_OPTIONS}.items())
    if client.ca or client.cert or client.key:
        return grpc.secure_channel(client.address, _credentials(client), options)
    if not (is_loopback(client.address) or client.insecure):
        remedy = "Set client.ca (and client.cert, client.key), or client.insecure = true on a network you trust"
        raise ConfigError(problem("client.address", "a loopback address when there is no TLS", client.address, remedy))
    return grpc.insecure_channel(client.address, options)


def is_loopback(address: str) -> bool:
    """Tells whether `host:port` stays on this machine."""
    if address.startswith("unix:"):
        return True
    host = address.removeprefix("ipv4:").removeprefix("ipv6:").rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _credentials(client: ClientConfig) -> grpc.ChannelCredentials:
    if bool(client.cert) != bool(client.key):
        raise ConfigError(problem("client.cert and client.key", "both or neither", f"{client.cert} and {client.key}"))
    ca = read_authority("client.ca", client.ca) if client.ca else None
    if client.cert is None or client.key is None:
        return grpc.ssl_channel_credentials(ca)
    cert, key = read_pair("client.cert", client.cert, "client.key", client.key)
    return grpc.ssl_channel_credentials(ca, key, cert)
