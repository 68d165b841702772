"""What is wrong with a certificate or a key is said by key and file, on both sides, before anybody listens or dials."""

import datetime
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fedtune_client.channel import open_channel
from fedtune_server.listen import credentials

from fedtune.config.schema import ClientConfig, ServerConfig
from fedtune.errors import ConfigError

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def write(folder, name, start=NOW - DAY, end=NOW + DAY, password=b""):
    """A self-signed certificate and its key; returns both files."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(who, who, key.public_key(), x509.random_serial_number(), start, end)
    cert_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    cert_file.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    kind = serialization.PrivateFormat.PKCS8
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, lock))
    return cert_file, key_file


@pytest.fixture
def files(tmp_path):
    cert, key = write(tmp_path, "good")
    other, other_key = write(tmp_path, "other")
    (tmp_path / "bad").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    return {
        "good": cert,
        "key": key,
        "other": other,
        "other_key": other_key,
        "bad": tmp_path / "bad",
        "none": tmp_path / "none",
        "old": write(tmp_path, "old", NOW - 2 * DAY, NOW - DAY),
        "new": write(tmp_path, "new", NOW + DAY, NOW + 2 * DAY),
        "locked": write(tmp_path, "locked", password=b"secret"),
    }


@pytest.fixture(params=["server", "client"])
def use(request, files):
    """Takes the files as the coordinator or as a client would; says what it calls each."""

    def take(cert=files["good"], key=files["key"], ca=files["other"]):
        if request.param == "server":
            credentials(ServerConfig(address="127.0.0.1:0", cert=cert, key=key, client_ca=ca))
        else:
            open_channel(ClientConfig(address="example.org:1", cert=cert, key=key, ca=ca)).close()

    take.side = request.param
    take.ca = {"server": r"server\.client_ca", "client": r"client\.ca"}[request.param]
    return take


def test_files_that_belong_together_are_taken(use):
    use()


@pytest.mark.parametrize("file", ["bad", "key", "none"])
def test_a_certificate_that_is_none(use, files, file):
    with pytest.raises(ConfigError, match=rf"{use.side}\.cert: expected a .*PEM.*{files[file].name}"):
        use(cert=files[file])
    with pytest.raises(ConfigError, match=rf"{use.ca}: expected a .*PEM.*{files[file].name}"):
        use(ca=files[file])


@pytest.mark.parametrize("file", ["bad", "good", "none"])
def test_a_key_that_is_none(use, files, file):
    with pytest.raises(ConfigError, match=rf"{use.side}\.key: expected a .*PEM.*{files[file].name}"):
        use(key=files[file])


def test_a_key_of_another_certificate(use, files):
    with pytest.raises(ConfigError, match=rf"{use.side}\.key: expected the private key of .*good\.pem"):
        use(key=files["other_key"])


def test_a_key_with_a_password(use, files):
    cert, key = files["locked"]
    with pytest.raises(ConfigError, match=rf"{use.side}\.key: expected .* without a password"):
        use(cert=cert, key=key)


@pytest.mark.parametrize(("which", "says"), [("old", "expired on"), ("new", "begins on")])
def test_a_certificate_out_of_date(use, files, which, says):
    cert, key = files[which]
    with pytest.raises(ConfigError, match=rf"{use.side}\.cert: .*{which}\.pem, which {says} \d{{4}}"):
        use(cert=cert, key=key)
    with pytest.raises(ConfigError, match=rf"{use.ca}: .*{which}\.pem, which {says}"):
        use(ca=cert)


def test_one_certificate_in_force_is_enough_for_an_authority(use, files, tmp_path):
    both = tmp_path / "both.pem"
    both.write_bytes(files["old"][0].read_bytes() + files["other"].read_bytes())
    use(ca=both)


def test_a_client_without_a_certificate_of_its_own_still_needs_an_authority_that_is_one(files):
    config = ClientConfig(address="example.org:1", ca=files["other"])
    open_channel(config).close()
    with pytest.raises(ConfigError, match=r"client\.ca"):
        open_channel(replace(config, ca=files["bad"]))
