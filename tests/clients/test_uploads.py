"""Uploads over a real socket, in every form that fal's SDKs have sent them."""

import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.error_bodies import fields, text
from tests.support.server_process import TEST_MODELS, Server, serving

ALICE = {"authorization": "Key alice:secret"}
BOB = {"authorization": "Key bob:secret"}
V3 = "?storage_type=fal-cdn-v3"
PROXY = "/api/fal/proxy"
PAGE, FOREIGN = "http://localhost:3000", "https://evil.example"
ANNOUNCED = {"content_type": "text/plain", "file_name": "hello.txt"}
UPLOADED = b"Hello, World!"


@dataclass(frozen=True)
class Upload:
    """A file that is sent, with whose key, and with which further headers."""

    content: bytes = UPLOADED
    content_type: str = "text/plain"
    file_name: str = "hello.txt"
    key: Mapping[str, str] = field(default_factory=lambda: ALICE)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def announcement(self) -> dict[str, str]:
        """The body of an initiate."""
        return {"content_type": self.content_type, "file_name": self.file_name}

    @property
    def named(self) -> dict[str, str]:
        """The headers of fal-client's uploads, but for its authorization."""
        return {"content-type": self.content_type, "x-fal-file-name": self.file_name, **self.headers}


def ok(answer: httpx.Response) -> Any:
    """The JSON of an answer that must be good."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def initiate(client: httpx.Client, upload: Upload, path: str, host: str = "rest.fal.ai") -> dict[str, str]:
    """Where to put a file and where it will be."""
    headers = {"host": host, **upload.key, **upload.headers}
    begun: dict[str, str] = ok(client.post(path, json=upload.announcement, headers=headers))
    assert begun.keys() == {"upload_url", "file_url"}
    return begun


def put(client: httpx.Client, upload: Upload, path: str, host: str, **key: str) -> str:
    """Initiate, then PUT."""
    begun = initiate(client, upload, path, host)
    headers = {"content-type": upload.content_type, **key}
    answer = client.put(begun["upload_url"], content=upload.content, headers=headers)
    ok(answer)
    return begun["file_url"]


def by_client(client: httpx.Client, upload: Upload) -> str:
    """@fal-ai/client: no key with the PUT."""
    return put(client, upload, f"/storage/upload/initiate{V3}", "rest.fal.ai")


def by_older_client(client: httpx.Client, upload: Upload) -> str:
    """@fal-ai/client up to 1.1, and @fal-ai/serverless-client: the older host, no query."""
    return put(client, upload, "/storage/upload/initiate", "rest.alpha.fal.ai")


def by_gcs(client: httpx.Client, upload: Upload) -> str:
    """fal-client's repository "fal", which sends its key along."""
    return put(client, upload, "/storage/upload/initiate?storage_type=gcs", "rest.fal.ai", **upload.key)


def sliced(content: bytes, count: int = 3) -> dict[int, bytes]:
    """The parts by their numbers, the last one the shortest."""
    size = -(-len(content) // count)
    return {number: content[(number - 1) * size : number * size] for number in range(1, count + 1)}


def by_client_in_parts(client: httpx.Client, upload: Upload) -> str:
    """@fal-ai/client above 90 MiB: parts in order, without a content type; ETags from the bodies."""
    begun = initiate(client, upload, f"/storage/upload/initiate-multipart{V3}")
    url = httpx.URL(begun["upload_url"])
    parts = []
    for number, chunk in sliced(upload.content).items():
        answer = client.put(url.copy_with(path=f"{url.path}/{number}"), content=chunk)
        part = ok(answer)
        assert part == {"partNumber": number, "etag": answer.headers["etag"]}
        parts.append(part)
    ok(client.post(url.copy_with(path=f"{url.path}/complete"), json={"parts": parts}))
    return begun["file_url"]


def by_toolkit_in_parts(client: httpx.Client, upload: Upload) -> str:
    """The toolkit of the fal framework: parts out of order; ETags from the headers."""
    begun = initiate(client, upload, f"/storage/upload/initiate-multipart{V3}")
    parts = []
    for number, chunk in reversed(sliced(upload.content).items()):
        answer = client.put(f"{begun['upload_url']}/{number}", content=chunk)
        ok(answer)
        parts.append({"partNumber": number, "etag": answer.headers["etag"]})
    ok(client.post(f"{begun['upload_url']}/complete", json={"parts": parts}))
    return begun["file_url"]


def token_of(client: httpx.Client, key: Mapping[str, str] = ALICE) -> dict[str, Any]:
    """A token for uploads, as fal-client asks for it."""
    headers = {"host": "rest.fal.ai", "accept": "application/json", "content-type": "application/json", **key}
    token: dict[str, Any] = ok(client.post(f"/storage/auth/token{V3}", content="{}", headers=headers))
    return token


def bearer(token: Mapping[str, str]) -> dict[str, str]:
    """The authorization that fal-client makes of a token."""
    return {"authorization": f"{token['token_type']} {token['token']}"}


def by_fal_client(client: httpx.Client, upload: Upload) -> str:
    """fal-client: a token, then the bytes in one POST."""
    headers = {"host": "v3.fal.media", **bearer(token_of(client, upload.key)), **upload.named}
    answer = ok(client.post("/files/upload", content=upload.content, headers=headers))
    return str(answer["access_url"])


def by_old_fal_client(client: httpx.Client, upload: Upload) -> str:
    """fal-client up to 0.5.1: the older host, and the key itself."""
    headers = {"host": "fal.media", **upload.key, **upload.named}
    return str(ok(client.post("/files/upload", content=upload.content, headers=headers))["access_url"])


def by_fal_client_in_parts(client: httpx.Client, upload: Upload) -> str:
    """fal-client above 100 MiB: parts at the same time, listed as they came; an ETag header on each."""
    token = token_of(client, upload.key)
    headers = {"accept": "application/json", **bearer(token), **upload.named}
    begun = ok(client.post(f"{token['base_url']}/files/upload/multipart", headers=headers))
    url = f"{begun['access_url']}/multipart/{begun['uploadId']}"

    def part(number: int, chunk: bytes) -> dict[str, Any]:
        sent = {**bearer(token), "content-type": upload.content_type, "accept-encoding": "identity"}
        answer = client.put(f"{url}/{number}", content=chunk, headers=sent)
        ok(answer)
        return {"partNumber": number, "etag": answer.headers["etag"]}

    chunks = sliced(upload.content, 11)
    with ThreadPoolExecutor(10) as threads:
        parts = list(threads.map(part, chunks.keys(), chunks.values()))
    unsorted = [*parts[5:], *parts[:5]]
    ok(client.post(f"{url}/complete", json={"parts": unsorted}, headers=bearer(token)))
    return str(begun["access_url"])


SHAPES: dict[str, Callable[[httpx.Client, Upload], str]] = {
    "@fal-ai/client": by_client,
    "@fal-ai/client, older": by_older_client,
    "@fal-ai/client, multipart": by_client_in_parts,
    "fal toolkit, multipart": by_toolkit_in_parts,
    "fal-client": by_fal_client,
    "fal-client 0.5.1": by_old_fal_client,
    "fal-client, multipart": by_fal_client_in_parts,
    "fal-client, repository fal": by_gcs,
}
by_every_shape = pytest.mark.parametrize("shape", SHAPES)


@by_every_shape
def test_what_is_sent_is_found_at_its_url(keyed: Server, keyed_client: httpx.Client, shape: str) -> None:
    content = bytes(range(256)) * 1000
    url = SHAPES[shape](keyed_client, Upload(content, "image/png", "a.png"))
    assert url.startswith(f"{keyed.url}/files/")
    assert url.endswith(".png")
    answer = keyed_client.get(url)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.content == content
    part = keyed_client.get(url, headers={"range": "bytes=256-259"})
    assert (part.status_code, part.content) == (206, bytes(range(4)))
    head = keyed_client.head(url)
    assert (head.headers["content-length"], head.content) == (str(len(content)), b"")


@by_every_shape
def test_an_empty_file_can_be_sent(keyed_client: httpx.Client, shape: str) -> None:
    url = SHAPES[shape](keyed_client, Upload(b""))
    assert (keyed_client.get(url).status_code, keyed_client.get(url).content) == (200, b"")


@by_every_shape
def test_uploads_without_a_key_where_none_is_needed(narrow_client: httpx.Client, shape: str) -> None:
    for key in ({}, {"authorization": "Key whatever"}):
        url = SHAPES[shape](narrow_client, Upload(key=key))
        assert narrow_client.get(url).content == UPLOADED


WAYS = ["plain", "rest.fal.ai", "rest.alpha.fal.ai", "v3.fal.media", "rest.localhost", "proxy"]


def rest(client: httpx.Client, way: str, path: str, **options: Any) -> httpx.Response:
    """A POST to fal's REST host, by one of the ways there."""
    headers = dict(options.pop("headers", {}))
    if way == "proxy":
        return client.post(PROXY, headers={**headers, "x-fal-target-url": f"https://rest.fal.ai{path}"}, **options)
    host = {} if way == "plain" else {"host": f"{way}:{client.base_url.port}"}
    return client.post(path, headers={**headers, **host}, **options)


def base_for(client: httpx.Client, way: str) -> str:
    """What URLs begin with for a client that came this way."""
    host = "rest.localhost" if way == "rest.localhost" else "127.0.0.1"
    return f"http://{host}:{client.base_url.port}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("slash", ["", "/"], ids=["plain", "slash"])
@pytest.mark.parametrize("form", ["initiate", "initiate-multipart"])
def test_every_way_to_the_rest_host(narrow_client: httpx.Client, way: str, slash: str, form: str) -> None:
    begun = ok(rest(narrow_client, way, f"/storage/upload/{form}{slash}{V3}", json=ANNOUNCED))
    base = base_for(narrow_client, way)
    assert begun["upload_url"].startswith(f"{base}/storage/upload/")
    assert begun["file_url"].startswith(f"{base}/files/")
    put_to, found_at = (begun[name].removeprefix(base) for name in ("upload_url", "file_url"))
    if form == "initiate":
        ok(narrow_client.put(f"{put_to}{slash}", content=UPLOADED))
    else:
        part = ok(narrow_client.put(f"{put_to}/1{slash}", content=UPLOADED))
        ok(narrow_client.post(f"{put_to}/complete{slash}", json={"parts": [part]}))
    assert narrow_client.get(found_at).content == UPLOADED


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_token(keyed_client: httpx.Client, way: str) -> None:
    token = ok(rest(keyed_client, way, f"/storage/auth/token{V3}", json={}, headers=ALICE))
    assert token.keys() == {"token", "token_type", "base_url", "expires_at"}
    assert token["token_type"] == "Bearer"
    assert token["base_url"] == base_for(keyed_client, way)
    headers = {**bearer(token), "content-type": "text/plain"}
    assert ok(keyed_client.post("/files/upload", content=UPLOADED, headers=headers))["access_url"]


def test_a_token_says_when_it_ends_so_that_every_python_can_read_it(keyed_client: httpx.Client) -> None:
    expires_at = token_of(keyed_client)["expires_at"]
    # Python before 3.11 reads no "Z".
    assert expires_at.endswith("+00:00")
    assert datetime.fromisoformat(expires_at) - datetime.now(UTC) > timedelta(minutes=2)


# -- what is kept, and for whom


LIFECYCLE_NAMES = ["x-fal-object-lifecycle", "x-fal-object-lifecycle-preference"]


def with_lifecycle(name: str, **preference: object) -> Upload:
    """An upload of Alice with this preference, in a header of this name."""
    return Upload(headers={name: json.dumps(preference)})


@by_every_shape
@pytest.mark.parametrize("name", LIFECYCLE_NAMES)
@pytest.mark.parametrize("word", ["forbid", "hide"])
def test_a_private_file_needs_its_owners_key(keyed_client: httpx.Client, shape: str, name: str, word: str) -> None:
    url = SHAPES[shape](keyed_client, with_lifecycle(name, initial_acl={"default": word}))
    for headers in ({}, BOB, {"authorization": "Key nobody"}, bearer(token_of(keyed_client))):
        assert text(keyed_client.get(url, headers=headers), 404) == "File not found"
        assert keyed_client.head(url, headers=headers).status_code == 404
    assert keyed_client.get(url, headers=ALICE).content == UPLOADED
    assert keyed_client.get(url, headers={"authorization": "Bearer alice:secret"}).content == UPLOADED


def test_a_missing_file_and_a_private_one_look_alike(keyed_client: httpx.Client) -> None:
    private = keyed_client.get(by_client(keyed_client, with_lifecycle(LIFECYCLE_NAMES[0], initial_acl="forbid")))
    missing = keyed_client.get(f"/files/{'0' * 32}.txt")
    assert (private.status_code, private.json()) == (missing.status_code, missing.json())


@by_every_shape
@pytest.mark.parametrize("name", LIFECYCLE_NAMES)
def test_a_file_expires(keyed_client: httpx.Client, shape: str, name: str) -> None:
    url = SHAPES[shape](keyed_client, with_lifecycle(name, expiration_duration_seconds=1e-9))
    assert text(keyed_client.get(url, headers=ALICE), 404) == "File not found"


@by_every_shape
def test_a_public_file_with_a_long_life_is_open(keyed_client: httpx.Client, shape: str) -> None:
    preference = {"expiration_duration_seconds": 3600, "initial_acl": {"default": "allow"}}
    upload = with_lifecycle("x-fal-object-lifecycle", **preference)
    assert keyed_client.get(SHAPES[shape](keyed_client, upload)).content == UPLOADED


def test_pictures_can_be_private_too(keyed_client: httpx.Client) -> None:
    headers = {**ALICE, LIFECYCLE_NAMES[1]: json.dumps({"initial_acl": {"default": "forbid"}})}
    url = keyed_client.post("/test/null", json={"prompt": "x"}, headers=headers).json()["images"][0]["url"]
    assert [keyed_client.get(url, headers=key).status_code for key in ({}, BOB, ALICE)] == [404, 404, 200]


def test_a_lifecycle_that_is_not_understood_is_refused(keyed_client: httpx.Client) -> None:
    for path in ("/storage/upload/initiate", "/files/upload", "/files/upload/multipart"):
        for bad in ("{", '{"expiration_duration_seconds": "soon"}', '{"initial_acl": "perhaps"}'):
            headers = {**ALICE, "x-fal-object-lifecycle": bad}
            text(keyed_client.post(path, json=ANNOUNCED, headers=headers), 400)


# -- who may send


BEGINNINGS = [
    "/storage/auth/token",
    "/storage/upload/initiate",
    "/storage/upload/initiate-multipart",
    "/files/upload",
    "/files/upload/multipart",
]


@pytest.mark.parametrize("path", BEGINNINGS)
@pytest.mark.parametrize("key", [{}, {"authorization": "Key nobody"}, {"authorization": "Bearer x.y.z"}])
def test_an_upload_needs_a_key(keyed: Server, keyed_client: httpx.Client, path: str, key: dict[str, str]) -> None:
    before = stored(keyed)
    text(keyed_client.post(path, json=ANNOUNCED, headers=key), 401)
    assert stored(keyed) <= before


@pytest.mark.parametrize("path", BEGINNINGS)
def test_a_token_of_another_scope_is_refused(keyed_client: httpx.Client, path: str) -> None:
    token = ok(keyed_client.post("/tokens/", json={"allowed_apps": ["flux", "null"]}, headers=ALICE))
    text(keyed_client.post(path, json=ANNOUNCED, headers={"authorization": f"Bearer {token}"}), 401)


@pytest.mark.parametrize(
    "path", ["/storage/auth/token", "/storage/upload/initiate", "/tokens/", "/test/null", "/queue/test/null"]
)
def test_a_token_for_uploads_is_good_for_nothing_else(keyed_client: httpx.Client, path: str) -> None:
    body = {**ANNOUNCED, "prompt": "x", "allowed_apps": ["flux"]}
    text(keyed_client.post(path, json=body, headers=bearer(token_of(keyed_client))), 401)


def test_a_token_is_that_of_its_key(keyed_client: httpx.Client) -> None:
    upload = Upload(key=BOB, headers={"x-fal-object-lifecycle": '{"initial_acl": {"default": "hide"}}'})
    url = by_fal_client(keyed_client, upload)
    assert [keyed_client.get(url, headers=key).status_code for key in (ALICE, BOB)] == [404, 200]


def test_the_address_to_put_to_is_the_secret(keyed_client: httpx.Client) -> None:
    for headers in ({}, BOB, {"authorization": "nonsense"}):
        begun = initiate(keyed_client, Upload(), "/storage/upload/initiate")
        ok(keyed_client.put(begun["upload_url"], content=UPLOADED, headers=headers))
        assert keyed_client.get(begun["file_url"]).content == UPLOADED


BEGUN_BY_PAGES = [
    ("/storage/upload/initiate", {"json": ANNOUNCED}),
    ("/files/upload", {"content": UPLOADED, "headers": {"content-type": "text/plain"}}),
    ("/files/upload/multipart", {"headers": {"content-type": "text/plain"}}),
]


@pytest.mark.parametrize(("path", "options"), BEGUN_BY_PAGES)
def test_a_foreign_page_cannot_upload_where_no_key_is_needed(
    narrow: Server, narrow_client: httpx.Client, path: str, options: dict[str, Any]
) -> None:
    before = stored(narrow)
    headers = {**options.get("headers", {}), "origin": FOREIGN}
    text(narrow_client.post(path, **{**options, "headers": headers}), 403)
    assert stored(narrow) <= before


def test_a_page_on_this_machine_can_upload(narrow_client: httpx.Client) -> None:
    begun = ok(narrow_client.post("/storage/upload/initiate", json=ANNOUNCED, headers={"origin": PAGE}))
    asked = {
        "origin": PAGE,
        "access-control-request-method": "PUT",
        "access-control-request-headers": "content-type",
    }
    allowed = narrow_client.options(begun["upload_url"], headers=asked)
    assert allowed.status_code == 200
    assert "PUT" in allowed.headers["access-control-allow-methods"]
    answer = narrow_client.put(begun["upload_url"], content=UPLOADED, headers={"origin": PAGE})
    ok(answer)
    assert answer.headers["access-control-allow-origin"] in ("*", PAGE)


# -- how it is shown


ATTACHED = [
    "text/html",
    "TEXT/HTML; charset=utf-8",
    "image/svg+xml",
    "Image/SVG+xml",
    "application/xhtml+xml",
    "text/xml",
    "text/plain",
    "text/javascript",
    "application/pdf",
    "application/octet-stream",
    "image/png+xml",
    "image/pngx",
    "multipart/mixed",
    "nonsense",
]
SHOWN = ["image/png", "image/jpeg", "image/webp", "IMAGE/PNG", "image/png; x=y"]
SCRIPT = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"


@pytest.mark.parametrize("content_type", [*ATTACHED, *SHOWN])
@pytest.mark.parametrize("shape", ["@fal-ai/client", "fal-client"])
def test_only_pictures_are_shown_as_they_are(narrow_client: httpx.Client, shape: str, content_type: str) -> None:
    upload = Upload(SCRIPT, content_type, "my page.png")
    answer = narrow_client.get(SHAPES[shape](narrow_client, upload))
    assert (answer.status_code, answer.content) == (200, SCRIPT)
    assert answer.headers["content-type"].startswith(content_type)
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"].replace(" ", "").split(";")
    assert {"sandbox", "default-src'none'"} <= set(policy)
    disposition = answer.headers.get("content-disposition", "inline")
    is_shown = content_type in SHOWN
    assert disposition.partition(";")[0] == ("inline" if is_shown else "attachment")
    assert is_shown or "my%20page.png" in disposition


@pytest.mark.parametrize(
    ("file_name", "shown"),
    [
        ("a.txt", "a.txt"),
        ("März.txt", "M%C3%A4rz.txt"),
        ('a"; x="b.txt', "a%22%3B%20x%3D%22b.txt"),
        ("a\r\nb.txt", "ab.txt"),
    ],
)
def test_an_attachment_has_the_name_that_its_owner_gave(
    narrow_client: httpx.Client, file_name: str, shown: str
) -> None:
    answer = narrow_client.get(by_client(narrow_client, Upload(file_name=file_name)))
    disposition = answer.headers["content-disposition"]
    assert disposition in (f'attachment; filename="{shown}"', f"attachment; filename*=utf-8''{shown}")
    assert "x" not in answer.headers


@pytest.mark.parametrize("content_type", ["image/пнг", "text/plain; name=файл", "text/plain\r\nx: y", "\0", ""])
def test_an_odd_content_type_harms_nobody(narrow_client: httpx.Client, content_type: str) -> None:
    begun = initiate(narrow_client, Upload(content_type=content_type), "/storage/upload/initiate")
    ok(narrow_client.put(begun["upload_url"], content=UPLOADED))
    answer = narrow_client.get(begun["file_url"])
    assert (answer.status_code, answer.content) == (200, UPLOADED)
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "x" not in answer.headers


# -- what is refused


OVER = ["@fal-ai/client", "@fal-ai/client, multipart", "fal-client", "fal-client 0.5.1", "fal-client, multipart"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes a mebibyte a file and two megabytes an owner."""
    settings = {"keys": "alice:secret,bob:secret", "max_upload_mib": "1", "max_uploads_gb": "0.002"}
    with serving(tmp_path_factory.mktemp("small"), TEST_MODELS, max_body_mib="1", **settings) as running:
        yield running.ready()


@pytest.fixture
def small_client(small: Server) -> Iterator[httpx.Client]:
    """A client of that server."""
    with httpx.Client(base_url=small.url, timeout=60, trust_env=False) as client:
        yield client


def stored(server: Server) -> set[str]:
    """The names of all files of a server, also those under way."""
    folders = [server.data_dir / "files", server.data_dir / "uploads"]
    # Not rglob, which fails where a folder goes away while it is looked through.
    return {name for folder in folders for _, _, names in os.walk(folder) for name in names}


def too_large(answer: httpx.Response, limit: int) -> None:
    """It says that it is too large, and what would not have been."""
    assert str(limit) in text(answer, 413)


LIMIT, OWNERS_LIMIT = 2**20, 2_000_000


@pytest.mark.parametrize("size", [LIMIT + 1, 4 * LIMIT])
def test_a_file_that_is_too_large(small: Server, small_client: httpx.Client, size: int) -> None:
    content, before = b"x" * size, stored(small)
    begun = initiate(small_client, Upload(), "/storage/upload/initiate")
    too_large(small_client.put(begun["upload_url"], content=content), LIMIT)
    too_large(small_client.post("/files/upload", content=content, headers=ALICE), LIMIT)
    begun = initiate(small_client, Upload(), "/storage/upload/initiate-multipart")
    too_large(small_client.put(f"{begun['upload_url']}/1", content=content), LIMIT)
    assert small_client.get(begun["file_url"]).status_code == 404
    assert stored(small) <= before


def test_a_file_that_is_too_large_in_chunks(small_client: httpx.Client) -> None:
    chunks = (b"x" * 65_536 for _ in range(17))
    too_large(small_client.post("/files/upload", content=chunks, headers=ALICE), LIMIT)


def under_way(server: Server) -> set[str]:
    """The uploads that count against their owners' limit."""
    return {path.name for path in (server.data_dir / "uploads").iterdir()}


def test_an_upload_that_nobody_can_go_on_with_is_forgotten(small: Server, small_client: httpx.Client) -> None:
    """In one request, whose client is told of no upload: too large, or left in the middle."""
    before, url = under_way(small), httpx.URL(small.url)
    too_large(small_client.post("/files/upload", content=b"x" * (LIMIT + 1), headers=ALICE), LIMIT)
    with socket.create_connection((url.host, url.port)) as connection:
        headers = "Host: 127.0.0.1\r\nAuthorization: Key alice:secret\r\nContent-Length: 1000\r\n"
        connection.sendall(f"POST /files/upload HTTP/1.1\r\n{headers}\r\nonly this".encode())
        while under_way(small) <= before:
            continue
    while under_way(small) != before:
        continue


def test_parts_that_are_too_large_together(small_client: httpx.Client) -> None:
    begun = initiate(small_client, Upload(), "/storage/upload/initiate-multipart")
    half = b"x" * (LIMIT // 2)
    for number in (1, 2):
        ok(small_client.put(f"{begun['upload_url']}/{number}", content=half))
    too_large(small_client.put(f"{begun['upload_url']}/3", content=b"x"), LIMIT)


def test_an_owner_who_has_too_much(small: Server, small_client: httpx.Client) -> None:
    upload = Upload(b"x" * 10**6, key=BOB)
    assert [small_client.get(by_fal_client(small_client, upload)).status_code for _ in range(2)] == [200, 200]
    before = stored(small)
    too_large(small_client.post("/files/upload", content=b"x", headers=BOB), OWNERS_LIMIT)
    assert stored(small) <= before
    # Alice has room.
    assert small_client.get(by_fal_client(small_client, Upload())).status_code == 200


@pytest.mark.parametrize("path", ["/storage/upload/initiate", "/storage/upload/initiate-multipart"])
def test_a_body_that_is_no_file_is_bound_like_any_other(small_client: httpx.Client, path: str) -> None:
    body = {**ANNOUNCED, "ignored": "x" * LIMIT}
    too_large(small_client.post(path, json=body, headers=ALICE), LIMIT)
    begun = initiate(small_client, Upload(), "/storage/upload/initiate-multipart")
    ok(small_client.put(f"{begun['upload_url']}/1", content=UPLOADED))
    parts = {"parts": [{"partNumber": 1, "etag": "x" * LIMIT}]}
    too_large(small_client.post(f"{begun['upload_url']}/complete", json=parts), LIMIT)


UNKNOWN = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("upload_id", [UNKNOWN, "x", "..%5C..", "%00", "%C3%A4"])
def test_an_unknown_upload(narrow_client: httpx.Client, upload_id: str) -> None:
    for base in (f"/storage/upload/{upload_id}", f"/files/{UNKNOWN}.txt/multipart/{upload_id}"):
        text(narrow_client.put(f"{base}/1", content=UPLOADED), 404)
        text(narrow_client.post(f"{base}/complete", json={"parts": []}), 404)
    text(narrow_client.put(f"/storage/upload/{upload_id}", content=UPLOADED), 404)


def test_an_upload_that_is_over(narrow_client: httpx.Client) -> None:
    begun = initiate(narrow_client, Upload(), "/storage/upload/initiate")
    ok(narrow_client.put(begun["upload_url"], content=UPLOADED))
    text(narrow_client.put(begun["upload_url"], content=b"something else"), 404)
    assert narrow_client.get(begun["file_url"]).content == UPLOADED


def test_a_file_that_has_not_come_yet(narrow_client: httpx.Client) -> None:
    begun = initiate(narrow_client, Upload(), "/storage/upload/initiate-multipart")
    ok(narrow_client.put(f"{begun['upload_url']}/1", content=UPLOADED))
    text(narrow_client.get(begun["file_url"]), 404)


def test_a_part_that_was_not_sent_is_named(narrow_client: httpx.Client) -> None:
    begun = initiate(narrow_client, Upload(), "/storage/upload/initiate-multipart")
    for number in (1, 3):
        ok(narrow_client.put(f"{begun['upload_url']}/{number}", content=UPLOADED))
    parts = [{"partNumber": number, "etag": '"x"'} for number in (3, 2, 1)]
    assert "2" in text(narrow_client.post(f"{begun['upload_url']}/complete", json={"parts": parts}), 400)


@pytest.mark.parametrize(("number", "status"), [("0", 400), ("10001", 400), ("-1", 400), ("x", 422), ("1.5", 422)])
def test_a_part_number_that_is_none(narrow_client: httpx.Client, number: str, status: int) -> None:
    begun = initiate(narrow_client, Upload(), "/storage/upload/initiate-multipart")
    answer = narrow_client.put(f"{begun['upload_url']}/{number}", content=UPLOADED)
    if status == 422:
        assert fields(answer)["loc"][-1] == "part_number"
    else:
        assert "10000" in text(answer, 400)


BAD_ANNOUNCEMENTS: list[tuple[Any, list[str]]] = [
    ({"content_type": 5}, ["body", "content_type"]),
    ({"file_name": None}, ["body", "file_name"]),
    ({"file_name": "x" * 1025}, ["body", "file_name"]),
    ({"content_type": "x" * 256}, ["body", "content_type"]),
    ([], ["body"]),
    ("x", ["body"]),
]


@pytest.mark.parametrize(("body", "loc"), BAD_ANNOUNCEMENTS)
def test_a_bad_announcement(narrow_client: httpx.Client, body: object, loc: list[str]) -> None:
    assert fields(narrow_client.post("/storage/upload/initiate", json=body))["loc"] == loc


@pytest.mark.parametrize("parts", [[{}], [{"partNumber": 0}], [{"partNumber": "x"}], [1], {}, None])
def test_a_bad_list_of_parts(narrow_client: httpx.Client, parts: object) -> None:
    begun = initiate(narrow_client, Upload(), "/storage/upload/initiate-multipart")
    answer = narrow_client.post(f"{begun['upload_url']}/complete", json={"parts": parts})
    assert fields(answer)["loc"][:2] == ["body", "parts"]


@pytest.mark.parametrize("path", ["/storage/upload/initiate", "/storage/upload/initiate-multipart"])
def test_broken_json(narrow_client: httpx.Client, path: str) -> None:
    assert fields(narrow_client.post(path, content="{"))["type"] == "json_invalid"


@pytest.mark.parametrize("path", ["/files/upload", "/files/x.txt"])
@pytest.mark.parametrize("host", ["v3.fal.media", "fal.media"])
def test_the_proxy_reaches_no_files(narrow_client: httpx.Client, host: str, path: str) -> None:
    text(narrow_client.post(PROXY, headers={"x-fal-target-url": f"https://{host}{path}"}), 404)


# -- what goes wrong on the way


def test_a_client_that_leaves_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        begun = initiate(client, Upload(), "/storage/upload/initiate-multipart")
        connection = http.client.HTTPConnection("127.0.0.1", client.base_url.port, timeout=60)
        connection.putrequest("PUT", f"{urlsplit(begun['upload_url']).path}/1")
        connection.putheader("content-length", "1000000")
        connection.endheaders(b"half")
        while not stored(server):
            client.get("/health")
        connection.close()
        while stored(server):
            client.get("/health")
        ok(client.put(f"{begun['upload_url']}/1", content=UPLOADED))
        ok(client.post(f"{begun['upload_url']}/complete", json={"parts": [{"partNumber": 1, "etag": "x"}]}))
        assert client.get(begun["file_url"]).content == UPLOADED
        assert server.stop() == 0
        assert "Traceback" not in server.output


def test_many_parts_at_the_same_time(narrow_client: httpx.Client) -> None:
    begun = initiate(narrow_client, Upload(), "/storage/upload/initiate-multipart")
    chunks = {number: f"<{number}>".encode() * 100 for number in range(1, 101)}

    def part(number: int) -> dict[str, Any]:
        answer: dict[str, Any] = ok(narrow_client.put(f"{begun['upload_url']}/{number}", content=chunks[number]))
        return answer

    with ThreadPoolExecutor(10) as threads:
        parts = list(threads.map(part, reversed(chunks)))
    ok(narrow_client.post(f"{begun['upload_url']}/complete", json={"parts": parts}))
    assert narrow_client.get(begun["file_url"]).content == b"".join(chunks.values())


def test_two_who_put_to_one_address(narrow_client: httpx.Client) -> None:
    begun = initiate(narrow_client, Upload(), "/storage/upload/initiate")
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: narrow_client.put(begun["upload_url"], content=UPLOADED), range(4)))
    statuses = {answer.status_code for answer in answers}
    assert 200 in statuses
    assert statuses <= {200, 404}
    assert narrow_client.get(begun["file_url"]).content == UPLOADED


def test_an_upload_goes_on_after_the_server_was_killed(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        begun = {
            name: urlsplit(url).path
            for name, url in initiate(client, Upload(), f"/storage/upload/initiate-multipart{V3}").items()
        }
        ok(client.put(f"{begun['upload_url']}/2", content=b"World!"))
        done = urlsplit(by_fal_client(client, Upload())).path
        server.kill()
    with serving(tmp_path, TEST_MODELS) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.get(done).content == UPLOADED
        ok(client.put(f"{begun['upload_url']}/1", content=b"Hello, "))
        parts = [{"partNumber": number, "etag": '"x"'} for number in (2, 1)]
        ok(client.post(f"{begun['upload_url']}/complete", json={"parts": parts}))
        assert client.get(begun["file_url"]).content == UPLOADED


def test_a_form_is_refused(client: httpx.Client) -> None:
    """What curl -F sends would be kept with its envelope."""
    answer = client.post("/files/upload", files={"file": ("in.png", b"x", "image/png")})
    assert answer.status_code == 400
    assert "--data-binary" in answer.json()["detail"]
