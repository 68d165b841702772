"""Mutual TLS between the real programs: the certificate says who a client is."""

import datetime
import ipaddress
import json
import threading
import time
from contextlib import nullcontext

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fedtune_client.log import Log
from fedtune_client.main import run
from fedtune_client.session import Session

from fedtune.config import load
from fedtune.testing import open_toy


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.file = folder / f"{name}.pem"
        certificate = self.sign(name, self.key, x509.BasicConstraints(ca=True, path_length=0))
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name):
        """Returns the files of a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        local = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        certificate, private = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        certificate.write_bytes(self.sign(name, key, local).public_bytes(serialization.Encoding.PEM))
        kind, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        private.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, none))
        return certificate, private

    def sign(self, name, key, extension):
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension, critical=False)
            .sign(self.key, hashes.SHA256())
        )


@pytest.fixture
def secured(spawn, tmp_path):
    """A coordinator that asks for certificates; returns it, its authority and a maker of client configurations."""
    authority = Authority(tmp_path, "authority")
    certificate, key = authority.issue("coordinator")
    tls = {"cert": str(certificate), "key": str(key), "client_ca": str(authority.file)}
    served = spawn(rounds={"count": 2}, server={"address": "127.0.0.1:0", **tls})
    address = served.address()

    def configure(name, issued, ca=authority.file):
        files = {"ca": ca, "cert": issued[0], "key": issued[1], "folder": tmp_path / name, "id": name}
        settings = {**files, "address": address}
        return load(tmp_path / "run.toml", tuple(f"client.{key}={value}" for key, value in settings.items()))

    return served, authority, configure


def test_a_client_with_its_own_certificate_takes_part(secured):
    served, authority, configure = secured
    assert run(configure("anna", authority.issue("anna")), open_worker=open_toy) == 0
    assert served.wait() == 0


def test_a_client_may_not_go_by_another_name(secured, capsys):
    _, authority, configure = secured
    assert run(configure("anna", authority.issue("bert")), open_worker=open_toy) == 6
    assert "client.cert" in capsys.readouterr().err


@pytest.mark.parametrize("stranger", ["client", "coordinator"])
def test_strangers_are_not_talked_to(secured, tmp_path, stranger):
    """Whether the coordinator does not know the client's authority or the client not the coordinator's."""
    served, authority, configure = secured
    other = Authority(tmp_path, "other")
    if stranger == "client":
        config = configure("anna", other.issue("anna"))
    else:
        config = configure("anna", authority.issue("anna"), other.file)
    session = Session(config, None, open_toy, nullcontext, Log(config.client.folder, "anna"))
    thread = threading.Thread(target=session.run, daemon=True)
    thread.start()
    time.sleep(2.0)
    session.stop()
    thread.join(10)
    assert not thread.is_alive()
    events = [json.loads(line) for line in (tmp_path / "anna" / "client.log").read_text().splitlines()]
    assert [event["event"] for event in events] == ["disconnected"]
    assert not [line for line in (served.folder / "events.jsonl").read_text().splitlines() if "client_joined" in line]
