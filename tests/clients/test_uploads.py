"""Tests of uploads over a real socket, in every form that fal's SDKs have used."""

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

from tests.support.error_bodies import error_message, first_field_error
from tests.support.server_process import TEST_MODELS, Server, serving

ALICE = {"authorization": "Key alice:secret"}
BOB = {"authorization": "Key bob:secret"}
V3_QUERY = "?storage_type=fal-cdn-v3"
PROXY_PATH = "/api/fal/proxy"
LOCAL_ORIGIN, FOREIGN_ORIGIN = "http://localhost:3000", "https://evil.example"
INITIATE_BODY = {"content_type": "text/plain", "file_name": "hello.txt"}
CONTENT = b"Hello, World!"


@dataclass(frozen=True)
class Upload:
    """A file to upload, with the owner's key and further headers."""

    content: bytes = CONTENT
    content_type: str = "text/plain"
    file_name: str = "hello.txt"
    key: Mapping[str, str] = field(default_factory=lambda: ALICE)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def initiate_body(self) -> dict[str, str]:
        """Return the body of an initiate request."""
        return {"content_type": self.content_type, "file_name": self.file_name}

    @property
    def post_headers(self) -> dict[str, str]:
        """Return the headers of fal-client's uploads, without the authorization."""
        return {"content-type": self.content_type, "x-fal-file-name": self.file_name, **self.headers}


def ok(answer: httpx.Response) -> Any:
    """Check for a 200 JSON answer and return its body."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def initiate(client: httpx.Client, upload: Upload, path: str, host: str = "rest.fal.ai") -> dict[str, str]:
    """Initiate an upload and return its upload URL and file URL."""
    headers = {"host": host, **upload.key, **upload.headers}
    initiated: dict[str, str] = ok(client.post(path, json=upload.initiate_body, headers=headers))
    assert initiated.keys() == {"upload_url", "file_url"}
    return initiated


def initiate_and_put(client: httpx.Client, upload: Upload, path: str, host: str, **key: str) -> str:
    """Initiate an upload, PUT the content and return the file URL."""
    initiated = initiate(client, upload, path, host)
    headers = {"content-type": upload.content_type, **key}
    answer = client.put(initiated["upload_url"], content=upload.content, headers=headers)
    ok(answer)
    return initiated["file_url"]


def by_client(client: httpx.Client, upload: Upload) -> str:
    """Upload as @fal-ai/client does, with no key in the PUT; return the file URL."""
    return initiate_and_put(client, upload, f"/storage/upload/initiate{V3_QUERY}", "rest.fal.ai")


def by_older_client(client: httpx.Client, upload: Upload) -> str:
    """Upload as @fal-ai/client up to 1.1 and @fal-ai/serverless-client do: older host, no query. Return the URL."""
    return initiate_and_put(client, upload, "/storage/upload/initiate", "rest.alpha.fal.ai")


def by_gcs(client: httpx.Client, upload: Upload) -> str:
    """Upload as fal-client does with its repository "fal": the PUT carries the key. Return the file URL."""
    return initiate_and_put(client, upload, "/storage/upload/initiate?storage_type=gcs", "rest.fal.ai", **upload.key)


def slices(content: bytes, count: int = 3) -> dict[int, bytes]:
    """Split the content into numbered parts. The last part is the shortest."""
    size = -(-len(content) // count)
    return {number: content[(number - 1) * size : number * size] for number in range(1, count + 1)}


def by_client_multipart(client: httpx.Client, upload: Upload) -> str:
    """Upload as @fal-ai/client does above 90 MiB: untyped parts in order, ETags from the bodies. Return the URL."""
    initiated = initiate(client, upload, f"/storage/upload/initiate-multipart{V3_QUERY}")
    url = httpx.URL(initiated["upload_url"])
    parts = []
    for number, chunk in slices(upload.content).items():
        answer = client.put(url.copy_with(path=f"{url.path}/{number}"), content=chunk)
        part = ok(answer)
        assert part == {"partNumber": number, "etag": answer.headers["etag"]}
        parts.append(part)
    ok(client.post(url.copy_with(path=f"{url.path}/complete"), json={"parts": parts}))
    return initiated["file_url"]


def by_toolkit_multipart(client: httpx.Client, upload: Upload) -> str:
    """Upload as the toolkit of the fal framework does: parts out of order, ETags from the headers. Return the URL."""
    initiated = initiate(client, upload, f"/storage/upload/initiate-multipart{V3_QUERY}")
    parts = []
    for number, chunk in reversed(slices(upload.content).items()):
        answer = client.put(f"{initiated['upload_url']}/{number}", content=chunk)
        ok(answer)
        parts.append({"partNumber": number, "etag": answer.headers["etag"]})
    ok(client.post(f"{initiated['upload_url']}/complete", json={"parts": parts}))
    return initiated["file_url"]


def create_token(client: httpx.Client, key: Mapping[str, str] = ALICE) -> dict[str, Any]:
    """Request an upload token as fal-client does, and return it with its fields."""
    headers = {"host": "rest.fal.ai", "accept": "application/json", "content-type": "application/json", **key}
    token: dict[str, Any] = ok(client.post(f"/storage/auth/token{V3_QUERY}", content="{}", headers=headers))
    return token


def bearer(token: Mapping[str, str]) -> dict[str, str]:
    """Return the authorization header that fal-client builds from a token."""
    return {"authorization": f"{token['token_type']} {token['token']}"}


def by_fal_client(client: httpx.Client, upload: Upload) -> str:
    """Upload as fal-client does: request a token, then POST all bytes in one request. Return the file URL."""
    headers = {"host": "v3.fal.media", **bearer(create_token(client, upload.key)), **upload.post_headers}
    answer = ok(client.post("/files/upload", content=upload.content, headers=headers))
    return str(answer["access_url"])


def by_old_fal_client(client: httpx.Client, upload: Upload) -> str:
    """Upload as fal-client up to 0.5.1 does: older host, the key instead of a token. Return the file URL."""
    headers = {"host": "fal.media", **upload.key, **upload.post_headers}
    return str(ok(client.post("/files/upload", content=upload.content, headers=headers))["access_url"])


def by_fal_client_multipart(client: httpx.Client, upload: Upload) -> str:
    """Upload as fal-client does above 100 MiB: parallel parts, listed unsorted, ETags from headers. Return the URL."""
    token = create_token(client, upload.key)
    headers = {"accept": "application/json", **bearer(token), **upload.post_headers}
    initiated = ok(client.post(f"{token['base_url']}/files/upload/multipart", headers=headers))
    url = f"{initiated['access_url']}/multipart/{initiated['uploadId']}"

    def send_part(number: int, chunk: bytes) -> dict[str, Any]:
        part_headers = {**bearer(token), "content-type": upload.content_type, "accept-encoding": "identity"}
        answer = client.put(f"{url}/{number}", content=chunk, headers=part_headers)
        ok(answer)
        return {"partNumber": number, "etag": answer.headers["etag"]}

    chunks = slices(upload.content, 11)
    with ThreadPoolExecutor(10) as threads:
        parts = list(threads.map(send_part, chunks.keys(), chunks.values()))
    unsorted = [*parts[5:], *parts[:5]]
    ok(client.post(f"{url}/complete", json={"parts": unsorted}, headers=bearer(token)))
    return str(initiated["access_url"])


UPLOADERS: dict[str, Callable[[httpx.Client, Upload], str]] = {
    "@fal-ai/client": by_client,
    "@fal-ai/client, older": by_older_client,
    "@fal-ai/client, multipart": by_client_multipart,
    "fal toolkit, multipart": by_toolkit_multipart,
    "fal-client": by_fal_client,
    "fal-client 0.5.1": by_old_fal_client,
    "fal-client, multipart": by_fal_client_multipart,
    "fal-client, repository fal": by_gcs,
}
every_client = pytest.mark.parametrize("sdk", UPLOADERS)


@every_client
def test_an_upload_is_served_at_its_url(server_with_keys: Server, keyless_client: httpx.Client, sdk: str) -> None:
    content = bytes(range(256)) * 1000
    url = UPLOADERS[sdk](keyless_client, Upload(content, "image/png", "a.png"))
    assert url.startswith(f"{server_with_keys.url}/files/")
    assert url.endswith(".png")
    answer = keyless_client.get(url)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.content == content
    part = keyless_client.get(url, headers={"range": "bytes=256-259"})
    assert (part.status_code, part.content) == (206, bytes(range(4)))
    head = keyless_client.head(url)
    assert (head.headers["content-length"], head.content) == (str(len(content)), b"")


@every_client
def test_empty_file(keyless_client: httpx.Client, sdk: str) -> None:
    url = UPLOADERS[sdk](keyless_client, Upload(b""))
    assert (keyless_client.get(url).status_code, keyless_client.get(url).content) == (200, b"")


@every_client
@pytest.mark.parametrize("file_name", ["photo.JPG", "lora.safetensors"])
def test_the_url_keeps_the_extension_of_the_file_name(keyless_client: httpx.Client, sdk: str, file_name: str) -> None:
    url = UPLOADERS[sdk](keyless_client, Upload(content_type="application/octet-stream", file_name=file_name))
    assert url.rpartition(".")[2] == file_name.rpartition(".")[2].lower()
    assert keyless_client.get(url).content == CONTENT


@every_client
def test_uploads_to_a_server_without_keys(constrained_client: httpx.Client, sdk: str) -> None:
    for key in ({}, {"authorization": "Key whatever"}):
        url = UPLOADERS[sdk](constrained_client, Upload(key=key))
        assert constrained_client.get(url).content == CONTENT


REST_ROUTES = ["plain", "rest.fal.ai", "rest.alpha.fal.ai", "v3.fal.media", "rest.localhost", "proxy"]


def post_to_rest_host(client: httpx.Client, route: str, path: str, **options: Any) -> httpx.Response:
    """POST to fal's REST host by one of the routes to it."""
    headers = dict(options.pop("headers", {}))
    if route == "proxy":
        return client.post(PROXY_PATH, headers={**headers, "x-fal-target-url": f"https://rest.fal.ai{path}"}, **options)
    host = {} if route == "plain" else {"host": f"{route}:{client.base_url.port}"}
    return client.post(path, headers={**headers, **host}, **options)


def base_url_for(client: httpx.Client, route: str) -> str:
    """Return the base of the URLs that the server gives a client on this route."""
    host = "rest.localhost" if route == "rest.localhost" else "127.0.0.1"
    return f"http://{host}:{client.base_url.port}"


@pytest.mark.parametrize("route", REST_ROUTES)
@pytest.mark.parametrize("slash", ["", "/"], ids=["plain", "slash"])
@pytest.mark.parametrize("form", ["initiate", "initiate-multipart"])
def test_every_route_to_the_rest_host(constrained_client: httpx.Client, route: str, slash: str, form: str) -> None:
    initiated = ok(
        post_to_rest_host(constrained_client, route, f"/storage/upload/{form}{slash}{V3_QUERY}", json=INITIATE_BODY)
    )
    base = base_url_for(constrained_client, route)
    assert initiated["upload_url"].startswith(f"{base}/storage/upload/")
    assert initiated["file_url"].startswith(f"{base}/files/")
    upload_path, file_path = (initiated[name].removeprefix(base) for name in ("upload_url", "file_url"))
    if form == "initiate":
        ok(constrained_client.put(f"{upload_path}{slash}", content=CONTENT))
    else:
        part = ok(constrained_client.put(f"{upload_path}/1{slash}", content=CONTENT))
        ok(constrained_client.post(f"{upload_path}/complete{slash}", json={"parts": [part]}))
    assert constrained_client.get(file_path).content == CONTENT


@pytest.mark.parametrize("route", REST_ROUTES)
def test_every_route_to_a_token(keyless_client: httpx.Client, route: str) -> None:
    token = ok(post_to_rest_host(keyless_client, route, f"/storage/auth/token{V3_QUERY}", json={}, headers=ALICE))
    assert token.keys() == {"token", "token_type", "base_url", "expires_at"}
    assert token["token_type"] == "Bearer"
    assert token["base_url"] == base_url_for(keyless_client, route)
    headers = {**bearer(token), "content-type": "text/plain"}
    assert ok(keyless_client.post("/files/upload", content=CONTENT, headers=headers))["access_url"]


def test_token_expiry_is_readable_by_older_python(keyless_client: httpx.Client) -> None:
    expires_at = create_token(keyless_client)["expires_at"]
    # datetime.fromisoformat of Python before 3.11 does not accept "Z".
    assert expires_at.endswith("+00:00")
    assert datetime.fromisoformat(expires_at) - datetime.now(UTC) > timedelta(minutes=2)


# -- private and expiring files


LIFECYCLE_NAMES = ["x-fal-object-lifecycle", "x-fal-object-lifecycle-preference"]


def with_lifecycle(name: str, **preference: object) -> Upload:
    """Return an upload by Alice with this lifecycle preference in a header of this name."""
    return Upload(headers={name: json.dumps(preference)})


@every_client
@pytest.mark.parametrize("name", LIFECYCLE_NAMES)
@pytest.mark.parametrize("acl", ["forbid", "hide"])
def test_a_private_file_needs_its_owners_key(keyless_client: httpx.Client, sdk: str, name: str, acl: str) -> None:
    url = UPLOADERS[sdk](keyless_client, with_lifecycle(name, initial_acl={"default": acl}))
    for headers in ({}, BOB, {"authorization": "Key nobody"}, bearer(create_token(keyless_client))):
        assert error_message(keyless_client.get(url, headers=headers), 404) == "File not found"
        assert keyless_client.head(url, headers=headers).status_code == 404
    assert keyless_client.get(url, headers=ALICE).content == CONTENT
    assert keyless_client.get(url, headers={"authorization": "Bearer alice:secret"}).content == CONTENT


def test_a_private_file_looks_like_a_missing_one(keyless_client: httpx.Client) -> None:
    private = keyless_client.get(by_client(keyless_client, with_lifecycle(LIFECYCLE_NAMES[0], initial_acl="forbid")))
    missing = keyless_client.get(f"/files/{'0' * 32}.txt")
    assert (private.status_code, private.json()) == (missing.status_code, missing.json())


@every_client
@pytest.mark.parametrize("name", LIFECYCLE_NAMES)
def test_a_file_expires(keyless_client: httpx.Client, sdk: str, name: str) -> None:
    url = UPLOADERS[sdk](keyless_client, with_lifecycle(name, expiration_duration_seconds=1e-9))
    assert error_message(keyless_client.get(url, headers=ALICE), 404) == "File not found"


@every_client
def test_a_public_file_needs_no_key(keyless_client: httpx.Client, sdk: str) -> None:
    preference = {"expiration_duration_seconds": 3600, "initial_acl": {"default": "allow"}}
    upload = with_lifecycle("x-fal-object-lifecycle", **preference)
    assert keyless_client.get(UPLOADERS[sdk](keyless_client, upload)).content == CONTENT


def test_generated_images_can_be_private(keyless_client: httpx.Client) -> None:
    headers = {**ALICE, LIFECYCLE_NAMES[1]: json.dumps({"initial_acl": {"default": "forbid"}})}
    url = keyless_client.post("/test/null", json={"prompt": "x"}, headers=headers).json()["images"][0]["url"]
    assert [keyless_client.get(url, headers=key).status_code for key in ({}, BOB, ALICE)] == [404, 404, 200]


def test_invalid_lifecycle_is_refused(keyless_client: httpx.Client) -> None:
    for path in ("/storage/upload/initiate", "/files/upload", "/files/upload/multipart"):
        for bad in ("{", '{"expiration_duration_seconds": "soon"}', '{"initial_acl": "perhaps"}'):
            headers = {**ALICE, "x-fal-object-lifecycle": bad}
            error_message(keyless_client.post(path, json=INITIATE_BODY, headers=headers), 400)


# -- authorization


AUTHENTICATED_PATHS = [
    "/storage/auth/token",
    "/storage/upload/initiate",
    "/storage/upload/initiate-multipart",
    "/files/upload",
    "/files/upload/multipart",
]


@pytest.mark.parametrize("path", AUTHENTICATED_PATHS)
@pytest.mark.parametrize("key", [{}, {"authorization": "Key nobody"}, {"authorization": "Bearer x.y.z"}])
def test_an_upload_needs_a_key(
    server_with_keys: Server, keyless_client: httpx.Client, path: str, key: dict[str, str]
) -> None:
    before = stored_names(server_with_keys)
    error_message(keyless_client.post(path, json=INITIATE_BODY, headers=key), 401)
    assert stored_names(server_with_keys) <= before


@pytest.mark.parametrize("path", AUTHENTICATED_PATHS)
def test_a_token_of_another_scope_is_refused(keyless_client: httpx.Client, path: str) -> None:
    token = ok(keyless_client.post("/tokens/", json={"allowed_apps": ["flux", "null"]}, headers=ALICE))
    error_message(keyless_client.post(path, json=INITIATE_BODY, headers={"authorization": f"Bearer {token}"}), 401)


@pytest.mark.parametrize(
    "path", ["/storage/auth/token", "/storage/upload/initiate", "/tokens/", "/test/null", "/queue/test/null"]
)
def test_an_upload_token_is_valid_only_for_uploads(keyless_client: httpx.Client, path: str) -> None:
    body = {**INITIATE_BODY, "prompt": "x", "allowed_apps": ["flux"]}
    error_message(keyless_client.post(path, json=body, headers=bearer(create_token(keyless_client))), 401)


def test_a_token_uploads_as_its_keys_owner(keyless_client: httpx.Client) -> None:
    upload = Upload(key=BOB, headers={"x-fal-object-lifecycle": '{"initial_acl": {"default": "hide"}}'})
    url = by_fal_client(keyless_client, upload)
    assert [keyless_client.get(url, headers=key).status_code for key in (ALICE, BOB)] == [404, 200]


def test_the_upload_url_needs_no_key(keyless_client: httpx.Client) -> None:
    for headers in ({}, BOB, {"authorization": "nonsense"}):
        initiated = initiate(keyless_client, Upload(), "/storage/upload/initiate")
        ok(keyless_client.put(initiated["upload_url"], content=CONTENT, headers=headers))
        assert keyless_client.get(initiated["file_url"]).content == CONTENT


REQUESTS_BY_PAGES = [
    ("/storage/upload/initiate", {"json": INITIATE_BODY}),
    ("/files/upload", {"content": CONTENT, "headers": {"content-type": "text/plain"}}),
    ("/files/upload/multipart", {"headers": {"content-type": "text/plain"}}),
]


@pytest.mark.parametrize(("path", "options"), REQUESTS_BY_PAGES)
def test_a_foreign_page_cannot_upload_to_a_server_without_keys(
    constrained_server: Server, constrained_client: httpx.Client, path: str, options: dict[str, Any]
) -> None:
    before = stored_names(constrained_server)
    headers = {**options.get("headers", {}), "origin": FOREIGN_ORIGIN}
    error_message(constrained_client.post(path, **{**options, "headers": headers}), 403)
    assert stored_names(constrained_server) <= before


def test_a_page_on_this_machine_can_upload(constrained_client: httpx.Client) -> None:
    initiated = ok(
        constrained_client.post("/storage/upload/initiate", json=INITIATE_BODY, headers={"origin": LOCAL_ORIGIN})
    )
    preflight_headers = {
        "origin": LOCAL_ORIGIN,
        "access-control-request-method": "PUT",
        "access-control-request-headers": "content-type",
    }
    preflight = constrained_client.options(initiated["upload_url"], headers=preflight_headers)
    assert preflight.status_code == 200
    assert "PUT" in preflight.headers["access-control-allow-methods"]
    answer = constrained_client.put(initiated["upload_url"], content=CONTENT, headers={"origin": LOCAL_ORIGIN})
    ok(answer)
    assert answer.headers["access-control-allow-origin"] in ("*", LOCAL_ORIGIN)


# -- how files are served


ATTACHMENTS = [
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
INLINE = ["image/png", "image/jpeg", "image/webp", "IMAGE/PNG", "image/png; x=y"]
SVG_WITH_SCRIPT = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"


@pytest.mark.parametrize("content_type", [*ATTACHMENTS, *INLINE])
@pytest.mark.parametrize("sdk", ["@fal-ai/client", "fal-client"])
def test_only_images_are_served_inline(constrained_client: httpx.Client, sdk: str, content_type: str) -> None:
    upload = Upload(SVG_WITH_SCRIPT, content_type, "my page.png")
    answer = constrained_client.get(UPLOADERS[sdk](constrained_client, upload))
    assert (answer.status_code, answer.content) == (200, SVG_WITH_SCRIPT)
    assert answer.headers["content-type"].startswith(content_type)
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"].replace(" ", "").split(";")
    assert {"sandbox", "default-src'none'"} <= set(policy)
    disposition = answer.headers.get("content-disposition", "inline")
    is_inline = content_type in INLINE
    assert disposition.partition(";")[0] == ("inline" if is_inline else "attachment")
    assert is_inline or "my%20page.png" in disposition


@pytest.mark.parametrize(
    ("file_name", "encoded_name"),
    [
        ("a.txt", "a.txt"),
        ("März.txt", "M%C3%A4rz.txt"),
        ('a"; x="b.txt', "a%22%3B%20x%3D%22b.txt"),
        ("a\r\nb.txt", "ab.txt"),
    ],
)
def test_an_attachment_keeps_its_file_name(constrained_client: httpx.Client, file_name: str, encoded_name: str) -> None:
    answer = constrained_client.get(by_client(constrained_client, Upload(file_name=file_name)))
    disposition = answer.headers["content-disposition"]
    assert disposition in (f'attachment; filename="{encoded_name}"', f"attachment; filename*=utf-8''{encoded_name}")
    assert "x" not in answer.headers


@pytest.mark.parametrize("content_type", ["image/пнг", "text/plain; name=файл", "text/plain\r\nx: y", "\0", ""])
def test_odd_content_types_are_served_as_attachments(constrained_client: httpx.Client, content_type: str) -> None:
    initiated = initiate(constrained_client, Upload(content_type=content_type), "/storage/upload/initiate")
    ok(constrained_client.put(initiated["upload_url"], content=CONTENT))
    answer = constrained_client.get(initiated["file_url"])
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "x" not in answer.headers


# -- limits and refused requests


@pytest.fixture(scope="module")
def limited_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server with limits of one mebibyte per file and two megabytes per owner."""
    settings = {"keys": "alice:secret,bob:secret", "max_upload_mib": "1", "max_uploads_gb": "0.002"}
    with serving(tmp_path_factory.mktemp("small"), TEST_MODELS, max_body_mib="1", **settings) as running:
        yield running.ready()


@pytest.fixture
def limited_client(limited_server: Server) -> Iterator[httpx.Client]:
    """Open a plain HTTP client of `limited_server`."""
    with httpx.Client(base_url=limited_server.url, timeout=60, trust_env=False) as client:
        yield client


def stored_names(server: Server) -> set[str]:
    """Return the names of all files of a server, including unfinished uploads."""
    directories = [server.data_dir / "files", server.data_dir / "uploads"]
    # os.walk instead of rglob, which fails if a directory disappears during the scan.
    return {name for directory in directories for _, _, names in os.walk(directory) for name in names}


def assert_too_large(answer: httpx.Response, limit: int) -> None:
    """Check for a 413 answer that states the limit."""
    assert str(limit) in error_message(answer, 413)


MAX_FILE_BYTES, MAX_OWNER_BYTES = 2**20, 2_000_000


@pytest.mark.parametrize("size", [MAX_FILE_BYTES + 1, 4 * MAX_FILE_BYTES])
def test_oversized_file(limited_server: Server, limited_client: httpx.Client, size: int) -> None:
    content, before = b"x" * size, stored_names(limited_server)
    initiated = initiate(limited_client, Upload(), "/storage/upload/initiate")
    assert_too_large(limited_client.put(initiated["upload_url"], content=content), MAX_FILE_BYTES)
    assert_too_large(limited_client.post("/files/upload", content=content, headers=ALICE), MAX_FILE_BYTES)
    initiated = initiate(limited_client, Upload(), "/storage/upload/initiate-multipart")
    assert_too_large(limited_client.put(f"{initiated['upload_url']}/1", content=content), MAX_FILE_BYTES)
    assert limited_client.get(initiated["file_url"]).status_code == 404
    assert stored_names(limited_server) <= before


def test_oversized_file_with_chunked_encoding(limited_client: httpx.Client) -> None:
    chunks = (b"x" * 65_536 for _ in range(17))
    assert_too_large(limited_client.post("/files/upload", content=chunks, headers=ALICE), MAX_FILE_BYTES)


def pending_uploads(server: Server) -> set[str]:
    """Return the unfinished uploads, which count against the limit of their owner."""
    return {path.name for path in (server.data_dir / "uploads").iterdir()}


def test_an_upload_that_cannot_be_resumed_is_deleted(limited_server: Server, limited_client: httpx.Client) -> None:
    """Check one-request uploads that are too large or cut off. Their client has no upload ID with which to resume."""
    before, url = pending_uploads(limited_server), httpx.URL(limited_server.url)
    assert_too_large(
        limited_client.post("/files/upload", content=b"x" * (MAX_FILE_BYTES + 1), headers=ALICE), MAX_FILE_BYTES
    )
    with socket.create_connection((url.host, url.port)) as connection:
        headers = "Host: 127.0.0.1\r\nAuthorization: Key alice:secret\r\nContent-Length: 1000\r\n"
        connection.sendall(f"POST /files/upload HTTP/1.1\r\n{headers}\r\nonly this".encode())
        while pending_uploads(limited_server) <= before:
            continue
    while pending_uploads(limited_server) != before:
        continue


def test_parts_that_exceed_the_file_limit_together(limited_client: httpx.Client) -> None:
    initiated = initiate(limited_client, Upload(), "/storage/upload/initiate-multipart")
    half = b"x" * (MAX_FILE_BYTES // 2)
    for number in (1, 2):
        ok(limited_client.put(f"{initiated['upload_url']}/{number}", content=half))
    assert_too_large(limited_client.put(f"{initiated['upload_url']}/3", content=b"x"), MAX_FILE_BYTES)


def test_owner_over_the_storage_limit(limited_server: Server, limited_client: httpx.Client) -> None:
    upload = Upload(b"x" * 10**6, key=BOB)
    assert [limited_client.get(by_fal_client(limited_client, upload)).status_code for _ in range(2)] == [200, 200]
    before = stored_names(limited_server)
    assert_too_large(limited_client.post("/files/upload", content=b"x", headers=BOB), MAX_OWNER_BYTES)
    assert stored_names(limited_server) <= before
    # Alice has not reached the limit.
    assert limited_client.get(by_fal_client(limited_client, Upload())).status_code == 200


@pytest.mark.parametrize("path", ["/storage/upload/initiate", "/storage/upload/initiate-multipart"])
def test_json_bodies_of_uploads_have_the_usual_size_limit(limited_client: httpx.Client, path: str) -> None:
    body = {**INITIATE_BODY, "ignored": "x" * MAX_FILE_BYTES}
    assert_too_large(limited_client.post(path, json=body, headers=ALICE), MAX_FILE_BYTES)
    initiated = initiate(limited_client, Upload(), "/storage/upload/initiate-multipart")
    ok(limited_client.put(f"{initiated['upload_url']}/1", content=CONTENT))
    parts = {"parts": [{"partNumber": 1, "etag": "x" * MAX_FILE_BYTES}]}
    assert_too_large(limited_client.post(f"{initiated['upload_url']}/complete", json=parts), MAX_FILE_BYTES)


UNKNOWN_ID = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("upload_id", [UNKNOWN_ID, "x", "..%5C..", "%00", "%C3%A4"])
def test_unknown_upload(constrained_client: httpx.Client, upload_id: str) -> None:
    for base in (f"/storage/upload/{upload_id}", f"/files/{UNKNOWN_ID}.txt/multipart/{upload_id}"):
        error_message(constrained_client.put(f"{base}/1", content=CONTENT), 404)
        error_message(constrained_client.post(f"{base}/complete", json={"parts": []}), 404)
    error_message(constrained_client.put(f"/storage/upload/{upload_id}", content=CONTENT), 404)


def test_finished_upload_cannot_be_overwritten(constrained_client: httpx.Client) -> None:
    initiated = initiate(constrained_client, Upload(), "/storage/upload/initiate")
    ok(constrained_client.put(initiated["upload_url"], content=CONTENT))
    error_message(constrained_client.put(initiated["upload_url"], content=b"something else"), 404)
    assert constrained_client.get(initiated["file_url"]).content == CONTENT


def test_incomplete_file_is_not_found(constrained_client: httpx.Client) -> None:
    initiated = initiate(constrained_client, Upload(), "/storage/upload/initiate-multipart")
    ok(constrained_client.put(f"{initiated['upload_url']}/1", content=CONTENT))
    error_message(constrained_client.get(initiated["file_url"]), 404)


def test_the_error_names_the_missing_part(constrained_client: httpx.Client) -> None:
    initiated = initiate(constrained_client, Upload(), "/storage/upload/initiate-multipart")
    for number in (1, 3):
        ok(constrained_client.put(f"{initiated['upload_url']}/{number}", content=CONTENT))
    parts = [{"partNumber": number, "etag": '"x"'} for number in (3, 2, 1)]
    assert "2" in error_message(
        constrained_client.post(f"{initiated['upload_url']}/complete", json={"parts": parts}), 400
    )


@pytest.mark.parametrize(("number", "status"), [("0", 400), ("10001", 400), ("-1", 400), ("x", 422), ("1.5", 422)])
def test_invalid_part_number(constrained_client: httpx.Client, number: str, status: int) -> None:
    initiated = initiate(constrained_client, Upload(), "/storage/upload/initiate-multipart")
    answer = constrained_client.put(f"{initiated['upload_url']}/{number}", content=CONTENT)
    if status == 422:
        assert first_field_error(answer)["loc"][-1] == "part_number"
    else:
        assert "10000" in error_message(answer, 400)


BAD_INITIATE_BODIES: list[tuple[Any, list[str]]] = [
    ({"content_type": 5}, ["body", "content_type"]),
    ({"file_name": None}, ["body", "file_name"]),
    ({"file_name": "x" * 1025}, ["body", "file_name"]),
    ({"content_type": "x" * 256}, ["body", "content_type"]),
    ([], ["body"]),
    ("x", ["body"]),
]


@pytest.mark.parametrize(("body", "loc"), BAD_INITIATE_BODIES)
def test_bad_initiate_body(constrained_client: httpx.Client, body: object, loc: list[str]) -> None:
    assert first_field_error(constrained_client.post("/storage/upload/initiate", json=body))["loc"] == loc


@pytest.mark.parametrize("parts", [[{}], [{"partNumber": 0}], [{"partNumber": "x"}], [1], {}, None])
def test_bad_list_of_parts(constrained_client: httpx.Client, parts: object) -> None:
    initiated = initiate(constrained_client, Upload(), "/storage/upload/initiate-multipart")
    answer = constrained_client.post(f"{initiated['upload_url']}/complete", json={"parts": parts})
    assert first_field_error(answer)["loc"][:2] == ["body", "parts"]


@pytest.mark.parametrize("path", ["/storage/upload/initiate", "/storage/upload/initiate-multipart"])
def test_broken_json(constrained_client: httpx.Client, path: str) -> None:
    assert first_field_error(constrained_client.post(path, content="{"))["type"] == "json_invalid"


@pytest.mark.parametrize("path", ["/files/upload", "/files/x.txt"])
@pytest.mark.parametrize("host", ["v3.fal.media", "fal.media"])
def test_the_proxy_route_cannot_reach_the_file_host(constrained_client: httpx.Client, host: str, path: str) -> None:
    error_message(constrained_client.post(PROXY_PATH, headers={"x-fal-target-url": f"https://{host}{path}"}), 404)


# -- interruptions and concurrency


def test_a_part_cut_off_by_a_disconnect_is_deleted(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        initiated = initiate(client, Upload(), "/storage/upload/initiate-multipart")
        connection = http.client.HTTPConnection("127.0.0.1", client.base_url.port, timeout=60)
        connection.putrequest("PUT", f"{urlsplit(initiated['upload_url']).path}/1")
        connection.putheader("content-length", "1000000")
        connection.endheaders(b"half")
        while not stored_names(server):
            client.get("/health")
        connection.close()
        while stored_names(server):
            client.get("/health")
        ok(client.put(f"{initiated['upload_url']}/1", content=CONTENT))
        ok(client.post(f"{initiated['upload_url']}/complete", json={"parts": [{"partNumber": 1, "etag": "x"}]}))
        assert client.get(initiated["file_url"]).content == CONTENT
        assert server.stop() == 0
        assert "Traceback" not in server.output


def test_concurrent_parts(constrained_client: httpx.Client) -> None:
    initiated = initiate(constrained_client, Upload(), "/storage/upload/initiate-multipart")
    chunks = {number: f"<{number}>".encode() * 100 for number in range(1, 101)}

    def send_part(number: int) -> dict[str, Any]:
        answer: dict[str, Any] = ok(
            constrained_client.put(f"{initiated['upload_url']}/{number}", content=chunks[number])
        )
        return answer

    with ThreadPoolExecutor(10) as threads:
        parts = list(threads.map(send_part, reversed(chunks)))
    ok(constrained_client.post(f"{initiated['upload_url']}/complete", json={"parts": parts}))
    assert constrained_client.get(initiated["file_url"]).content == b"".join(chunks.values())


def test_concurrent_puts_to_one_url(constrained_client: httpx.Client) -> None:
    initiated = initiate(constrained_client, Upload(), "/storage/upload/initiate")
    with ThreadPoolExecutor(4) as threads:
        answers = list(
            threads.map(lambda _: constrained_client.put(initiated["upload_url"], content=CONTENT), range(4))
        )
    statuses = {answer.status_code for answer in answers}
    assert 200 in statuses
    assert statuses <= {200, 404}
    assert constrained_client.get(initiated["file_url"]).content == CONTENT


def test_an_upload_continues_after_the_server_was_killed(tmp_path: Path) -> None:
    with serving(tmp_path, TEST_MODELS) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        initiated = {
            name: urlsplit(url).path
            for name, url in initiate(client, Upload(), f"/storage/upload/initiate-multipart{V3_QUERY}").items()
        }
        ok(client.put(f"{initiated['upload_url']}/2", content=b"World!"))
        finished_path = urlsplit(by_fal_client(client, Upload())).path
        server.kill()
    with serving(tmp_path, TEST_MODELS) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.get(finished_path).content == CONTENT
        ok(client.put(f"{initiated['upload_url']}/1", content=b"Hello, "))
        parts = [{"partNumber": number, "etag": '"x"'} for number in (2, 1)]
        ok(client.post(f"{initiated['upload_url']}/complete", json={"parts": parts}))
        assert client.get(initiated["file_url"]).content == CONTENT


def test_a_multipart_form_is_refused(client: httpx.Client) -> None:
    """Refuse the form that `curl -F` sends; otherwise the server would store the multipart envelope with the file."""
    answer = client.post("/files/upload", files={"file": ("in.png", b"x", "image/png")})
    assert answer.status_code == 400
    assert "--data-binary" in answer.json()["detail"]
