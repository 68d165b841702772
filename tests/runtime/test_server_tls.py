"""Mutual TLS: who has no certificate is not heard, and who has one speaks for nobody else."""

import datetime

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedtune import wire
from fedtune.wire.v1 import coordinator_pb2 as pb

NOW = datetime.datetime.now(datetime.UTC)


class Authority:
    """A certificate authority for one test."""

    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.cert = self._build("test ca", self.key, ca=True)

    def _build(self, name, key, ca=False, uri=None):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = subject if ca else self.cert.subject
        names = [x509.UniformResourceIdentifier(uri)] if uri else [x509.DNSName("localhost")]
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(NOW - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(NOW + datetime.timedelta(hours=1))
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def issue(self, name, uri=None):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return private, pem(self._build(name, key, uri=uri))


def pem(cert):
    return cert.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def secure(spawn, tmp_path):
    ca = Authority()
    key, cert = ca.issue("coordinator")
    files = {"cert": cert, "key": key, "client_ca": pem(ca.cert)}
    for name, data in files.items():
        (tmp_path / f"{name}.pem").write_bytes(data)
    paths = {name: str(tmp_path / f"{name}.pem") for name in files}
    process = spawn(server={"address": "127.0.0.1:0", **paths})
    return ca, process.address()


def join(address, ca, client_id, identity=None):
    key, cert = identity or (None, None)
    credentials = grpc.ssl_channel_credentials(pem(ca.cert), key, cert)
    options = (("grpc.ssl_target_name_override", "localhost"), *wire.CHANNEL_OPTIONS)
    with grpc.secure_channel(address, credentials, options=options) as channel:
        call = channel.stream_stream(wire.JOIN, pb.ClientMessage.SerializeToString, pb.ServerMessage.FromString)
        hello = pb.Hello(protocol_major=1, features=wire.FEATURES, client_id=client_id)
        return next(call(iter([pb.ClientMessage(hello=hello)]), timeout=10)).WhichOneof("kind")


@pytest.mark.parametrize(("name", "uri"), [("alice", None), ("somebody", "fedtune://demo/client/alice")])
def test_certificate_names_the_client(secure, name, uri):
    ca, address = secure
    assert join(address, ca, "alice", ca.issue(name, uri)) == "welcome"


def test_certificate_of_somebody_else(secure):
    ca, address = secure
    with pytest.raises(grpc.RpcError) as caught:
        join(address, ca, "alice", ca.issue("mallory"))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "mallory" in caught.value.details()


def test_no_certificate_and_a_certificate_of_another_authority(secure):
    ca, address = secure
    for identity in (None, Authority().issue("alice")):
        with pytest.raises(grpc.RpcError) as caught:
            join(address, ca, "alice", identity)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_plain_text_to_a_tls_port(secure, connect):
    _, address = secure
    with pytest.raises(grpc.RpcError) as caught:
        connect(address).status(pb.StatusRequest(), timeout=5)
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
