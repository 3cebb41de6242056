"""API keys: which requests are accepted, how keys are replaced, and that no key is ever shown."""

from __future__ import annotations

import hmac
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import bentoml
import httpx
import openai
import pytest

from embedder.engine.callers import EVERYONE
from embedder.errors import InvalidKey, MissingKey
from embedder.http import api_keys as keys_module
from embedder.http.api_keys import ApiKeys
from embedder.settings import Settings
from embedder.verify.__main__ import main as verify
from tests.conftest import Server, start_server


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {key}".encode())]


def is_open(keys: ApiKeys, headers: list[tuple[bytes, bytes]]) -> bool:
    try:
        keys.caller(headers)
    except (InvalidKey, MissingKey):
        return False
    return True


def keys_of(text: str = "", file: Path | None = None) -> ApiKeys:
    return ApiKeys(Settings(api_key=text or None, api_key_file=str(file or "")))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("old-1\n\n  old-2  \n")
    return path


def replace(path: Path, text: str) -> None:
    """Replace by renaming, as a mounted secret is replaced."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def test_without_keys_every_request_is_accepted() -> None:
    keys = keys_of()
    assert is_open(keys, [])
    assert is_open(keys, bearer("anything"))
    assert not keys.are_needed


@pytest.mark.parametrize("key", ["one", "two", "drei"])
@pytest.mark.parametrize("name", ["Bearer", "bearer", "BEARER"])
def test_each_key_is_accepted_in_both_headers(key: str, name: str) -> None:
    keys = keys_of(" one,two ,,drei,")
    assert keys.are_needed
    assert is_open(keys, [(b"authorization", f"{name}  {key} ".encode())])
    assert is_open(keys, [(b"X-API-Key", key.encode())])
    assert is_open(keys, [(b"authorization", b"Bearer none"), (b"x-api-key", key.encode())])


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"one")],
        [(b"authorization", b"Basic one")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearerone")],
        [(b"x-api-key", b"")],
        [(b"x-api-key", b"on")],
        [(b"x-api-key", b"onee")],
        [(b"x-api-key", b"ONE")],
        [(b"x-api-key", b"one,two")],
        [(b"x-api-key", b"\xff\x00")],
        [(b"cookie", b"one")],
    ],
    ids=str,
)
def test_headers_without_a_known_key_are_refused(headers: list[tuple[bytes, bytes]]) -> None:
    assert not is_open(keys_of("one,two"), headers)


def test_every_key_is_compared_each_time_by_digests_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        seen.append((left, right))
        return real(left, right)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    keys = keys_of("one,two,three")
    for presented in ("one", "three", "x" * 1000, "o"):
        seen.clear()
        is_open(keys, bearer(presented))
        assert len(seen) == 3
        assert {len(digest) for pair in seen for digest in pair} == {32}


def test_few_keys_of_a_request_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_of(",".join(f"key{number}" for number in range(100)))
    digested: list[bytes] = []
    digest = keys_module._digest
    monkeypatch.setattr(keys_module, "_digest", lambda key: (digested.append(key), digest(key))[1])
    many = [(b"x-api-key", b"a")] * 250
    assert not is_open(keys, [*many, *bearer("key7")])
    assert len(digested) == keys_module.MAX_PRESENTED
    assert is_open(keys, [*many[:3], *bearer("key7")])


def test_keys_of_the_file_and_of_the_setting_are_both_accepted(key_file: Path) -> None:
    keys = keys_of("mine", key_file)
    assert all(is_open(keys, bearer(key)) for key in ("mine", "old-1", "old-2"))
    assert not any(is_open(keys, bearer(key)) for key in ("old-1\n\n  old-2", "old", ""))


def test_replaced_file_is_read_at_the_next_request(key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = keys_of("", key_file)
    with caplog.at_level(logging.INFO, "embedder.http.api_keys"):
        replace(key_file, "s3cret-1\n")
        assert is_open(keys, bearer("s3cret-1"))
        assert not is_open(keys, bearer("old-1"))
        key_file.write_text("s3cret-02\n")  # in place
        assert is_open(keys, bearer("s3cret-02"))
        assert not is_open(keys, bearer("s3cret-1"))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("fault", ["missing", "empty", "blank", "folder"])
def test_unusable_file_leaves_the_last_good_keys_and_one_line(
    fault: str, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of("", key_file)
    if fault in ("missing", "folder"):
        key_file.unlink()
    if fault == "folder":
        key_file.mkdir()
    if fault in ("empty", "blank"):
        replace(key_file, " \n\n" * (fault == "blank"))
    for _ in range(3):
        assert is_open(keys, bearer("old-1"))
        assert not is_open(keys, [])
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert str(key_file) in record.getMessage()
    if fault == "folder":
        key_file.rmdir()
    replace(key_file, "new\n")
    assert is_open(keys, bearer("new"))
    assert not is_open(keys, bearer("old-1"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_key": " , "}, "EMBEDDER_API_KEY holds no key"),
        ({"api_key_file": "/no/such/file"}, "EMBEDDER_API_KEY_FILE='/no/such/file' cannot be read: No such file"),
        ({"api_key_file": os.devnull}, "EMBEDDER_API_KEY_FILE='/dev/null' is a device or socket; allowed: a regular"),
        ({"api_key_file": os.sep}, "EMBEDDER_API_KEY_FILE='/' is a directory; allowed: a regular file"),
        ({"api_key": "one,two three"}, "EMBEDDER_API_KEY: key 2 cannot be a key: it holds a space"),
        ({"api_key": ""}, "EMBEDDER_API_KEY holds no key"),
    ],
)
def test_source_without_keys_stops_the_start(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ApiKeys(Settings(**settings))


def test_named_pipe_as_key_file_stops_the_start_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys")
    with pytest.raises(ValueError, match="is a named pipe; allowed: a regular file"):
        keys_of("", tmp_path / "keys")


@pytest.mark.parametrize("name", ["api_key", "api_key_file"])
def test_key_variable_that_is_set_and_empty_stops_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"EMBEDDER_{name.upper()}", "")
    with pytest.raises(ValueError, match=f"EMBEDDER_{name.upper()} is set and empty"):
        Settings.from_environment()


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_comments_and_a_byte_order_mark_are_no_keys(line_end: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(line_end.join(["\ufeff# ours", "one", "  # theirs", "two", ""]).encode())
    keys = keys_of("", tmp_path / "keys")
    assert is_open(keys, bearer("one"))
    assert is_open(keys, bearer("two"))
    assert not any(is_open(keys, bearer(key)) for key in ("# ours", "ours", "#", "# theirs", "\ufeff# ours"))


@pytest.mark.parametrize(
    "content",
    [
        b"s3cret-1\ns3cret-2 # of the other team\n",
        "s3cret-1\ns3cret-2\n".encode("utf-16"),
        b"s3cret-1\ns3cret-\0\n",
        "s3cret-1\ns3cret-ü\n".encode(),
        b"# only a comment\n",
        b"\xef\xbb\xbf",
        b"s" * 2**20 + b"\n",
    ],
    ids=["text after a key", "UTF-16", "NUL", "not ASCII", "no key", "only a mark", "too large"],
)
def test_file_with_something_else_than_keys_stops_the_start(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ValueError, match=r"EMBEDDER_API_KEY_FILE='.*allowed: ") as caught:
        keys_of("", tmp_path / "keys")
    assert "s3cret" not in str(caught.value).replace(str(tmp_path), "")


def test_wrong_key_and_no_key_are_told_apart() -> None:
    keys = keys_of("one")
    with pytest.raises(InvalidKey):
        keys.caller(bearer("other"))
    for headers in ([], [(b"x-api-key", b" "), (b"authorization", b"Bearer")]):
        with pytest.raises(MissingKey):
            keys.caller(headers)


def test_caller_is_the_same_for_each_request_with_a_key() -> None:
    keys = keys_of("first,second")
    caller = keys.caller(bearer("first"))
    assert caller == keys.caller([(b"x-api-key", b"first")]) != keys.caller(bearer("second"))
    assert "first" not in caller
    assert keys_of().caller(bearer("first")) == EVERYONE


def test_key_is_in_no_text_made_from_the_settings() -> None:
    settings = Settings(api_key="s3cret")
    shown = f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()} {ApiKeys(settings).__dict__}"
    with pytest.raises(ValueError, match="validation errors") as caught:
        Settings(api_key="s3cret", workers=0, max_pixels=1)
    assert "s3cret" not in shown + str(caught.value)


@pytest.fixture(scope="module")
def guarded(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with two keys in its settings and one in a file."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text("s3cret-file\n")
    settings = {"api_key": "s3cret-one,s3cret-two", "api_key_file": str(folder / "keys"), "access_log": "true"}
    server = start_server(folder, model=str(random_checkpoint), device="cpu", **settings)
    yield server
    assert server.stop() == 0
    assert "s3cret" not in server.log.read_text()
    assert "status=401" in server.log.read_text()


CLOSED = [
    ("POST", "/txt/embed"),
    ("POST", "/img/embed"),
    ("POST", "/embed"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("POST", "/v2/embed"),
    ("GET", "/info"),
    ("GET", "/openapi.json"),
    ("GET", "/docs.json"),
    ("GET", "/playground/collection"),
    ("GET", "/playground/thumbnails/0"),
    # BentoML's own
    ("POST", "/embed_texts"),
    ("POST", "/embed_images"),
    ("GET", "/metrics"),
    ("GET", "/schema.json"),
    ("GET", "/"),
    ("POST", "/"),
    ("GET", "/static_content/index.css"),
    # none at all
    ("GET", "/no-such-route"),
]


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_route_is_closed_without_a_key_and_open_with_it(method: str, path: str, guarded: Server) -> None:
    body = {"json": {"texts": ["red"]}} if method == "POST" else {}
    url = guarded.url + path
    refused = httpx.request(method, url, headers={"x-api-key": "s3cret-on"}, **body)
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Bearer error="invalid_token"')
    fields = refused.json()
    assert (fields["error_type"] if path == "/" else fields["error"]["code"]) == "invalid_api_key"
    assert "s3cret" not in refused.text
    let_in = httpx.request(method, url, headers={"x-api-key": "s3cret-one"}, **body)
    assert let_in.status_code != 401
    assert "s3cret" not in let_in.text


@pytest.mark.parametrize("path", ["/livez", "/health", "/playground"])
def test_body_for_an_open_path_needs_a_key(path: str, guarded: Server) -> None:
    answer = httpx.post(f"{guarded.url}{path}", content=b"x" * 2**20, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_api_key")


@pytest.mark.parametrize("path", ["/livez", "/healthz", "/readyz", "/health", "/playground", "/playground/script.js"])
def test_probes_and_the_page_are_open(path: str, guarded: Server) -> None:
    assert httpx.get(guarded.url + path).status_code == 200


def test_request_without_a_key_is_refused_before_its_body_arrives(guarded: Server) -> None:
    head = b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n"
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_openai_and_bentoml_clients_send_their_key(guarded: Server) -> None:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="s3cret-two") as client:
        assert len(client.embeddings.create(model="any", input="red").data) == 1
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.embeddings.create(model="any", input="red")
        assert refused.value.code == "invalid_api_key"
    with bentoml.SyncHTTPClient(guarded.url, token="s3cret-file") as bento:
        assert len(bento.embed_texts(texts=["red"])) == 1


def test_verify_needs_a_key_of_the_service(guarded: Server, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("s3cret-one\nanother\n")
    command = ["any", "--url", guarded.url]
    assert verify([*command, "--key-file", str(tmp_path / "keys")]) == 0
    assert verify(command) == 1


def test_document_says_that_a_key_is_needed(guarded: Server) -> None:
    document = httpx.get(f"{guarded.url}/openapi.json", headers={"x-api-key": "s3cret-one"}).json()
    assert document["security"] == [{"bearer": []}, {"header": []}]


def test_key_is_replaced_while_the_service_runs(guarded: Server) -> None:
    replace(guarded.log.with_name("keys"), "s3cret-new\n")
    for key, status in (("s3cret-new", 200), ("s3cret-one", 200), ("s3cret-file", 401)):
        assert httpx.get(f"{guarded.url}/info", headers={"authorization": f"Bearer {key}"}).status_code == status
