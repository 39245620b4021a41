"""A local certificate authority and the server's certificate, because the Python package fal-client requires HTTPS."""

import datetime
import ipaddress
import os
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import certifi
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from server.net.fal_hosts import CERTIFICATE_NAMES

#: Host names in the certificate: the server's own, and fal's for clients that are redirected here. OpenSSL and Node
#: refuse the wildcard *.localhost, so each name under localhost is listed.
NAMES = (
    "localhost",
    "queue.localhost",
    "rest.localhost",
    "ws.localhost",
    *CERTIFICATE_NAMES,
)
ADDRESSES = ("127.0.0.1", "::1")
_AUTHORITY_DAYS = 3650
_CERTIFICATE_DAYS = 397
_RENEW_DAYS = 30

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class CertificateFiles:
    """The paths of the certificate files, all in PEM format.

    `bundle` holds the public authorities and the local one, because SSL_CERT_FILE replaces a client's usual list.
    """

    authority: Path
    bundle: Path
    certificate: Path
    key: Path


def certificate_files(data_dir: Path) -> CertificateFiles:
    """Return the paths of the certificate files, whether the files exist or not."""
    directory = data_dir / "tls"
    return CertificateFiles(
        directory / "ca.pem", directory / "bundle.pem", directory / "cert.pem", directory / "key.pem"
    )


def ensure_certificate(data_dir: Path, *hosts: str) -> CertificateFiles:
    """Make sure that the authority and a current certificate exist; return the paths of their files.

    A certificate that expires soon or has other names is replaced. `hosts` are names and addresses that the certificate
    covers in addition to the usual ones. Raises ValueError for a damaged file, naming the file, and OSError.
    """
    files = certificate_files(data_dir)
    directory = files.authority.parent
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority_key = directory / "ca.key"
    if not (authority_key.exists() and files.authority.exists()):
        _make_authority(files.authority, authority_key)
        files.certificate.unlink(missing_ok=True)
    issuer, issuer_key = _read(files.authority, x509.load_pem_x509_certificate), _read(authority_key, _load_key)
    _write(files.bundle, b"\n".join(path.read_bytes() for path in (*_usual_authorities(), files.authority)), 0o644)
    names = _alternative_names(hosts)
    if not (files.certificate.exists() and files.key.exists() and _is_current(files, names)):
        _make_certificate(files, issuer, issuer_key, names)
    return files


def _usual_authorities() -> Sequence[Path]:
    """Return the file of the public authorities, and this machine's own file, which often has a company's authority."""
    here = ssl.get_default_verify_paths().cafile
    return [Path(certifi.where()), *([Path(here)] if here else [])]


def _alternative_names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    names, addresses = list(NAMES), [ipaddress.ip_address(address) for address in ADDRESSES]
    for host in filter(None, hosts):
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            names.append(host)
        else:
            # A server listens on an unspecified address such as 0.0.0.0, but no client connects to one.
            addresses += [] if address.is_unspecified else [address]
    entries = [*map(x509.DNSName, dict.fromkeys(names)), *map(x509.IPAddress, dict.fromkeys(addresses))]
    return x509.SubjectAlternativeName(entries)


def _read(path: Path, load: Callable[[bytes], Loaded]) -> Loaded:
    try:
        return load(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is malformed; delete it, and the server makes a new one") from None


def _load_key(content: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(content, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not a key of an elliptic curve")
    return key


def _is_current(files: CertificateFiles, names: x509.SubjectAlternativeName) -> bool:
    certificate = _read(files.certificate, x509.load_pem_x509_certificate)
    # Read the key only to check it: the error names a damaged file, but the error of a listener would not.
    _read(files.key, _load_key)
    covered = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return certificate.not_valid_after_utc > _now() + datetime.timedelta(days=_RENEW_DAYS) and covered == names


def _make_authority(path: Path, key_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("flux-server local authority")
    certificate = (
        _builder(name, name, key.public_key(), _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(key_path, _pem(key), 0o600)
    _write(path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _make_certificate(
    files: CertificateFiles,
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    names: x509.SubjectAlternativeName,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_name("flux-server"), issuer.subject, key.public_key(), _CERTIFICATE_DAYS)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(is_authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    _write(files.key, _pem(key), 0o600)
    _write(files.certificate, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # Valid from an hour ago, so that clients whose clock is a little behind accept the certificate.
        .not_valid_before(_now() - datetime.timedelta(hours=1))
        .not_valid_after(_now() + datetime.timedelta(days=days))
    )


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file that has `mode` from its first byte on, and appears whole or not at all."""
    temp_path = path.with_suffix(".part")
    temp_path.unlink(missing_ok=True)
    with os.fdopen(os.open(temp_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    temp_path.rename(path)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
