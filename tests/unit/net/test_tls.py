"""Tests of the local authority and its certificate, which the ssl module verifies over real sockets."""

import datetime
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path

import certifi
import pytest
from cryptography import x509

from server.net import tls


def handshake(files: tls.CertificateFiles, name: str, trusted: Path) -> None:
    """Connect to a real TLS listener by this name. Raises SSLCertVerificationError if the client rejects it."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(files.certificate, files.key)
    client_context = ssl.create_default_context(cafile=str(trusted))
    # Python 3.13 sets this flag by default.
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=_respond_once, args=(listener, server_context))
        server.start()
        try:
            with (
                socket.create_connection(listener.getsockname()) as plain,
                client_context.wrap_socket(plain, server_hostname=name) as secure,
            ):
                assert secure.recv(2) == b"ok"
        finally:
            server.join()


def _respond_once(listener: socket.socket, context: ssl.SSLContext) -> None:
    plain, _ = listener.accept()
    with plain, suppress(OSError), context.wrap_socket(plain, server_side=True) as secure:
        secure.sendall(b"ok")


def contents(data_dir: Path) -> dict[str, bytes]:
    """Return the content of every file in the directory tls, by file name."""
    return {path.name: path.read_bytes() for path in (data_dir / "tls").iterdir()}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def files(data_dir: Path) -> tls.CertificateFiles:
    return tls.ensure_certificate(data_dir, "127.0.0.1")


@pytest.mark.parametrize("name", [*tls.NAMES, *tls.ADDRESSES])
def test_a_client_that_trusts_the_authority_connects_under_every_name(files: tls.CertificateFiles, name: str) -> None:
    handshake(files, name, files.authority)


@pytest.mark.parametrize("name", ["localhost", "queue.localhost", "127.0.0.1", "queue.fal.run"])
def test_a_client_that_trusts_the_bundle_connects_too(files: tls.CertificateFiles, name: str) -> None:
    handshake(files, name, files.bundle)


def test_the_bundle_includes_the_public_authorities(files: tls.CertificateFiles) -> None:
    assert Path(certifi.where()).read_bytes() in files.bundle.read_bytes()


@pytest.mark.parametrize("name", ["example.com", "evil.localhost", "127.0.0.2", "notfal.ai", "a.b.c.fal.ai"])
def test_the_certificate_is_not_valid_for_other_names(files: tls.CertificateFiles, name: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
        handshake(files, name, files.authority)


def test_a_client_that_does_not_trust_the_authority_does_not_connect(files: tls.CertificateFiles) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(files, "localhost", Path(certifi.where()))


def test_existing_files_stay_unchanged(tmp_path: Path) -> None:
    tls.ensure_certificate(tmp_path, "127.0.0.1")
    before = contents(tmp_path)
    tls.ensure_certificate(tmp_path, "127.0.0.1")
    assert contents(tmp_path) == before
    assert set(before) == {"ca.pem", "ca.key", "bundle.pem", "cert.pem", "key.pem"}


def test_keys_are_private(data_dir: Path, files: tls.CertificateFiles) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in (data_dir / "tls").iterdir()}
    assert {name: modes[name] for name in ("ca.key", "key.pem")} == {"ca.key": 0o600, "key.pem": 0o600}
    assert (data_dir / "tls").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("host", ["192.168.7.7", "gpu.lan", "2001:db8::7"])
def test_another_host_gets_a_new_certificate_of_the_same_authority(tmp_path: Path, host: str) -> None:
    tls.ensure_certificate(tmp_path, "127.0.0.1")
    before = contents(tmp_path)
    files = tls.ensure_certificate(tmp_path, host)
    after = contents(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"cert.pem", "key.pem"}
    handshake(files, host, files.authority)
    handshake(files, "localhost", files.authority)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "localhost"])
def test_a_wildcard_or_known_host_adds_no_name(tmp_path: Path, host: str) -> None:
    tls.ensure_certificate(tmp_path, "127.0.0.1")
    before = contents(tmp_path)
    tls.ensure_certificate(tmp_path, host)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("missing", ["cert.pem", "key.pem", "bundle.pem"])
def test_a_missing_file_is_made_again(tmp_path: Path, missing: str) -> None:
    files = tls.ensure_certificate(tmp_path, "127.0.0.1")
    authority = files.authority.read_bytes()
    (tmp_path / "tls" / missing).unlink()
    tls.ensure_certificate(tmp_path, "127.0.0.1")
    assert files.authority.read_bytes() == authority
    handshake(files, "localhost", files.bundle)


@pytest.mark.parametrize("missing", ["ca.pem", "ca.key"])
def test_a_new_authority_signs_a_new_certificate(tmp_path: Path, missing: str) -> None:
    tls.ensure_certificate(tmp_path, "127.0.0.1")
    (tmp_path / "tls" / missing).unlink()
    files = tls.ensure_certificate(tmp_path, "127.0.0.1")
    handshake(files, "localhost", files.authority)


@pytest.mark.parametrize(("days", "is_renewed"), [(0, False), (360, False), (370, True), (500, True)])
def test_the_certificate_is_renewed_before_it_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, is_renewed: bool
) -> None:
    files = tls.ensure_certificate(tmp_path, "127.0.0.1")
    before = contents(tmp_path)
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    monkeypatch.setattr(tls, "_now", lambda: later)
    tls.ensure_certificate(tmp_path, "127.0.0.1")
    after = contents(tmp_path)
    assert (before["cert.pem"] != after["cert.pem"]) is is_renewed
    assert before["ca.pem"] == after["ca.pem"]
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    assert certificate.not_valid_after_utc > later + datetime.timedelta(days=29)


def test_the_certificate_is_valid_no_longer_than_browsers_allow(files: tls.CertificateFiles) -> None:
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    validity = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert validity <= datetime.timedelta(days=398)


@pytest.mark.parametrize("name", ["ca.pem", "ca.key", "cert.pem", "key.pem"])
@pytest.mark.parametrize("content", [b"garbage", b""])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / "tls" / name
    tls.ensure_certificate(tmp_path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is malformed; delete it, and the server makes a new one"):
        tls.ensure_certificate(tmp_path)
    path.unlink()
    handshake(tls.ensure_certificate(tmp_path), "localhost", tmp_path / "tls" / "ca.pem")
