"""Where a client may connect to, and with what."""

from dataclasses import replace

import pytest
from fedtune_client.channel import is_loopback, open_channel

from fedtune.config.schema import ClientConfig
from fedtune.errors import ConfigError


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1", "ipv4:127.0.0.1:1"])
def test_this_machine_needs_no_tls(address):
    assert is_loopback(address)
    open_channel(ClientConfig(address=address)).close()


@pytest.mark.parametrize("address", ["10.0.0.1:1", "example.org:1", "localhost.example.org:1", "[::2]:1", "0.0.0.0:1"])
def test_another_machine_needs_tls(address):
    with pytest.raises(ConfigError, match=r"client\.ca"):
        open_channel(ClientConfig(address=address))
    open_channel(ClientConfig(address=address, insecure=True)).close()


def test_a_missing_pem_file_is_named(tmp_path):
    config = ClientConfig(address="example.org:1", ca=tmp_path / "ca.pem")
    with pytest.raises(ConfigError, match=r"client\.ca: expected a readable PEM file, got .*ca\.pem"):
        open_channel(config)


def test_a_certificate_comes_with_its_key(tmp_path):
    (tmp_path / "cert.pem").write_text("x")
    with pytest.raises(ConfigError, match="both or neither"):
        open_channel(replace(ClientConfig(address="example.org:1"), cert=tmp_path / "cert.pem"))
