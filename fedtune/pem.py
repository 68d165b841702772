"""Certificates and keys, looked over before gRPC gets them: it takes anything and says nothing."""

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from fedtune.errors import ConfigError, problem


def read_authority(name: str, path: Path) -> bytes:
    """Reads the certificates of those who may vouch for the other side.

    Args:
        name: the key of the configuration, for messages.
        path: PEM file with one certificate or more.

    Returns:
        The file as it is.

    Raises:
        ConfigError: the file cannot be read, holds no certificate, or only ones that are out of date.
    """
    data = _read(name, path)
    faults = [_out_of_date(certificate) for certificate in _certificates(name, path, data)]
    if all(faults):
        raise ConfigError(problem(name, "a certificate that is in force", f"{path}, which {faults[0]}"))
    return data


def read_pair(cert_name: str, cert: Path, key_name: str, key: Path) -> tuple[bytes, bytes]:
    """Reads a certificate chain, the own certificate first, and its private key.

    Returns:
        Both files as they are: certificate, key.

    Raises:
        ConfigError: a file cannot be read or is not what it should be, the key is another certificate's or is
            encrypted, or the certificate is out of date.
    """
    cert_data, key_data = _read(cert_name, cert), _read(key_name, key)
    certificate = _certificates(cert_name, cert, cert_data)[0]
    try:
        private = load_pem_private_key(key_data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        got = f"{key} ({_first_line(error)})"
        raise ConfigError(problem(key_name, "a private key in PEM without a password", got)) from error
    if _raw(private.public_key()) != _raw(certificate.public_key()):
        raise ConfigError(problem(key_name, f"the private key of {cert_name} {cert}", f"{key}, another's"))
    fault = _out_of_date(certificate)
    if fault:
        raise ConfigError(problem(cert_name, "a certificate that is in force", f"{cert}, which {fault}"))
    return cert_data, key_data


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(problem(name, "a readable PEM file", f"{path} ({error.strerror})")) from error


def _certificates(name: str, path: Path, data: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(problem(name, "a certificate in PEM", f"{path} ({_first_line(error)})")) from error


def _out_of_date(certificate: x509.Certificate) -> str:
    """Says what is wrong with a certificate's dates; empty when nothing is."""
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if now < certificate.not_valid_before_utc:
        return f"begins on {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; is this machine's clock right?"
    return ""


def _raw(key: object) -> bytes:
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))  # type: ignore[attr-defined]  # every kind of key has it


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
