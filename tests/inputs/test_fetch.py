"""Fetching by URL: forbidden addresses are never connected to, hostile servers are bounded, honest ones are read.

The test servers run on this machine, so the tests pass in a network that leads every connection to one of them and
records the public address that was asked for. The address checks are the service's own; they cannot be switched off.
"""

from __future__ import annotations

import contextlib
import gzip
import resource
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpcore
import httpx
import numpy as np
import pytest
import trustme

from embedder import Embedder
from embedder.engine.engine import Engine
from embedder.errors import EmbedderError, InvalidMedia, InvalidRequest, MediaTooLarge, MediaUnavailable, system_limit
from embedder.inputs import address, fetch
from embedder.inputs.fetch import MAX_FETCHES, MAX_REDIRECTS, Fetcher
from embedder.inputs.items import EmbeddingItem, Image, Text, Video
from embedder.settings import Settings
from tests.conftest import Server, encoded, picture, start_server

PUBLIC, OTHER_PUBLIC = "93.184.216.34", "2606:2800:220:1::1"
PNG = encoded(picture(40, 40))

Answer = bytes | Callable[[socket.socket], None]


class Site(socketserver.ThreadingTCPServer):
    """A server on this machine that answers each path as the test says, and a Fetcher that reaches it."""

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Visit)
        self.tls = tls
        self.answers: dict[str, Answer] = {}
        self.requests: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.names: dict[str, list[str]] = {}
        self.lookups: list[str] = []

    def resolve(self, host: str, port: int) -> list[str]:
        self.lookups.append(host)
        return self.names.get(host, [PUBLIC])

    def fetcher(self, **settings: Any) -> Fetcher:
        network = Diversion(self.server_address[1], self.connected)
        options = {"url_hosts": "*, http://*", "url_timeout_s": 5, **settings}
        return Fetcher(Settings(**options), resolve=self.resolve, network=network)


class Visit(socketserver.BaseRequestHandler):
    """One connection; several requests may come over it."""

    server: Site
    request: socket.socket

    def handle(self) -> None:
        if self.server.tls:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        while head := read_head(self.request):
            self.server.requests.append(head)
            answer = self.server.answers[head.split()[1]]
            if not isinstance(answer, bytes):
                answer(self.request)
                self.request.close()
                return
            self.request.sendall(answer)

    def finish(self) -> None:
        self.request.close()


def read_head(connection: socket.socket) -> str:
    head = b""
    while b"\r\n\r\n" not in head:
        try:
            received = connection.recv(4096)
        except OSError:
            return ""
        if not received:
            return ""
        head += received
    return head.decode("latin-1")


class Diversion(httpcore.AsyncNetworkBackend):
    """Connects to one port of this machine for any address, and records the address."""

    def __init__(self, port: int, connected: list[tuple[str, int]]) -> None:
        self.port = port
        self.connected = connected

    async def connect_tcp(self, host: str, port: int, timeout: float | None = None, *_: Any) -> Any:
        self.connected.append((host, port))
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self.port, timeout)


class Lookout(httpcore.AsyncNetworkBackend):
    """The real network; records every address that a connection is tried to."""

    def __init__(self) -> None:
        self.tried: list[str] = []

    async def connect_tcp(self, host: str, *options: Any) -> Any:
        self.tried.append(host)
        return await httpcore.AnyIOBackend().connect_tcp(host, *options)


def answer(body: bytes = PNG, status: str = "200 OK", **headers: str) -> bytes:
    fields = {"content-length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def redirect(location: str, status: str = "302 Found", **headers: str) -> bytes:
    return answer(b"", status, location=location, **headers)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site()) as site:
        yield site


class serving:  # noqa: N801 - a context manager
    def __init__(self, server: Any) -> None:
        self.server = server
        self.thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Any:
        self.thread.start()
        return self.server

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def get(fetcher: Fetcher, url: str, is_cancelled: Callable[[], bool] = lambda: False) -> bytes:
    """The bytes of a picture."""
    (part,) = fetcher(EmbeddingItem((Image(url),)), is_cancelled).parts
    assert isinstance(part, Image)
    assert isinstance(part.source, bytes)
    return part.source


# Forbidden addresses

NAMES = {  # addresses of the attacker's names; other names do not resolve
    "private.test": ["10.0.0.1"],
    "loopback.test": ["127.0.0.1"],
    "loopback6.test": ["::1"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "metadata.test": ["169.254.169.254"],
    "carrier.test": ["100.64.0.1"],
    "nat64.test": ["64:ff9b::7f00:1"],
    "scoped.test": ["fe80::1%lo"],
    "unspecified.test": ["0.0.0.0"],
    "mixed.test": [PUBLIC, "127.0.0.1"],
    "mixed-first.test": ["127.0.0.1", PUBLIC],
    "mixed6.test": [PUBLIC, "::1"],
    "localhost": ["127.0.0.1", "::1"],
    "localhost.": ["127.0.0.1", "::1"],
    "LOCALHOST": ["127.0.0.1"],
    "sub.localhost": ["127.0.0.1"],
    "silent.test": [],
}
HOSTS = [  # one URL each, over http and https, at the port of the listener
    *NAMES,
    *("127.0.0.1", "127.1", "127.0.1", "127.0.0.1.", "127.255.255.254", "0", "0.0.0.0", "2130706433", "017700000001"),
    *(
        "0x7f000001",
        "0x7f.1",
        "0x7F.0x0.0x0.0x1",
        "0177.0.0.1",
        "0177.1",
        "00000177.0.0.01",
        "127.0x1",
        "127.000.000.1",
    ),
    *("127%2e0%2e0%2e1", "%31%32%37.0.0.1", "127。0。0。1", "127．0.0.1", "①②⑦.⓪.⓪.①", "１２７.0.0.1", "ⓛocalhost"),
    *("loc\talhost", "localhost\\@8.8.8.8", "8.8.8.8@127.0.0.1", "8.8.8.8:80@127.0.0.1", "127.0.0.1%00.a.test"),
    *("127.0.0.1%2523@8.8.8.8", "[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    *("[0:0:0:0:0:ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]"),
    *("[2001:0:7f00:1::]", "[fe80::1]", "[fe80::1%25lo]", "[fe80::1%lo]", "[fd00:ec2::254]", "[fec0::1]", "[ff02::1]"),
    *("[::1%25lo]", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "2852039166", "0xA9.0xFE.0xA9.0xFE"),
    *("100.100.100.200", "100.64.0.1", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1", "203.0.113.1"),
    *("224.0.0.1", "240.0.0.1", "255.255.255.255", "127.0.0.1.nip.invalid", "1.2.3.4.5", "256.256.256.256", "a..b"),
    "x" * 64 + ".test",
]


class Listener(socketserver.ThreadingTCPServer):
    """Counts the connections to any address of this machine, v4 and v6, and closes them."""

    address_family = socket.AF_INET6
    daemon_threads = True

    def __init__(self) -> None:
        self.num_visits = 0
        super().__init__(("::", 0), socketserver.BaseRequestHandler)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.num_visits += 1
        return False  # closes it


def resolve_names(host: str, port: int) -> list[str]:
    """Resolve the attacker's names and literal addresses, without DNS."""
    if host in NAMES:
        return NAMES[host]
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return [str(sockaddr[0]) for *_, sockaddr in found]


def visit_all(listener: Listener, hosts: Sequence[str]) -> tuple[list[str], list[EmbedderError]]:
    """Which addresses a connection was tried to, and the errors."""
    port = listener.server_address[1]
    lookout = Lookout()
    settings = Settings(url_hosts=f"*, http://*, *:{port}, http://*:{port}", url_timeout_s=5)
    fetcher = Fetcher(settings, resolve=resolve_names, network=lookout)
    errors = []
    for host in hosts:
        for scheme in ("http", "https"):
            with pytest.raises(EmbedderError) as caught:
                get(fetcher, f"{scheme}://{host}:{port}/a.png")
            errors.append(caught.value)
    return lookout.tried, errors


def test_forbidden_addresses_are_never_connected_to() -> None:
    assert len(set(HOSTS)) == len(HOSTS) >= 60
    with serving(Listener()) as listener:
        tried, errors = visit_all(listener, HOSTS)
        assert tried == []
        assert listener.num_visits == 0
    assert {type(error) for error in errors} == {InvalidRequest, MediaUnavailable}
    messages = " ".join(error.message for error in errors if isinstance(error, MediaUnavailable))
    assert not [ip for ips in NAMES.values() for ip in ips if ip in messages.replace("127.0.0.1.nip.invalid", "")]


def test_without_the_check_of_addresses_the_same_urls_reach_the_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the test above: its listener does notice connections."""
    hosts = ["127.0.0.1", "127.1", "0x7f.1", "2130706433", "①②⑦.⓪.⓪.①", "[::1]", "[::ffff:127.0.0.1]", "localhost"]
    for module in (address, fetch):
        monkeypatch.setattr(module, "is_public", lambda _: True)
    with serving(Listener()) as listener:
        tried, _ = visit_all(listener, hosts)
        assert listener.num_visits >= 2 * len(hosts)
    assert {"127.0.0.1", "::1", "::ffff:127.0.0.1"} <= set(tried)


@pytest.mark.parametrize(
    "location",
    [
        *("http://127.0.0.1/", "http://0x7f.1/", "https://[::1]/", "//169.254.169.254/latest", "http://private.test/"),
        *(
            "http://mixed.test/",
            "file:///etc/passwd",
            "ftp://a.test/",
            "gopher://a.test/",
            "data:image/png;base64,AAAA",
        ),
        *("https://a.test:22/", "https://user@a.test/", "http://[::1/", "http://[fe80::1%25lo]/", "https://"),
    ],
)
@pytest.mark.parametrize("num_before", [0, 2])
def test_redirect_is_checked_like_a_url(location: str, num_before: int, site: Site) -> None:
    site.names = NAMES
    site.answers = {f"/{number}": redirect(f"/{number + 1}") for number in range(num_before)}
    site.answers[f"/{num_before}"] = redirect(location)
    with pytest.raises(MediaUnavailable) as caught:
        get(site.fetcher(), "http://a.test/0")
    assert site.connected == [(PUBLIC, 80)] * (num_before + 1)
    assert len(site.requests) == num_before + 1
    assert caught.value.message.startswith("image at a.test: ")
    assert not [word for word in ("127", "169", "private", "passwd", "user", "::1") if word in caught.value.message]


def test_redirect_to_a_host_outside_the_list_is_not_followed(site: Site) -> None:
    site.answers = {"/": redirect("https://b.test/")}
    with pytest.raises(MediaUnavailable, match=r"^image at a\.test: redirects to a URL that is not allowed$"):
        get(site.fetcher(url_hosts="http://a.test"), "http://a.test/")
    assert site.lookups == ["a.test"]


def test_name_is_resolved_once_per_connection_and_checked_each_time(site: Site) -> None:
    """DNS rebinding: what was checked is what is connected to."""
    turns = iter([[PUBLIC], ["127.0.0.1"]])
    site.answers = {"/": redirect("/again")}
    fetcher = Fetcher(
        Settings(url_hosts="http://*"),
        resolve=lambda *_: next(turns),
        network=Diversion(site.server_address[1], site.connected),
    )
    with pytest.raises(MediaUnavailable, match="its name has no address, or one that is not public"):
        get(fetcher, "http://rebinding.test/")
    assert site.connected == [(PUBLIC, 80)]
    assert next(turns, None) is None


# Honest servers


def test_every_url_is_replaced_by_its_bytes_and_nothing_else_changes(site: Site) -> None:
    site.answers = {"/a": answer(b"A"), "/b?c=%20d": answer(b"B"), "/v": answer(b"V")}
    parts = (
        Text("http://a.test/a"),
        Image("http://a.test/a"),
        Image(PNG),
        Video("http://a.test/v#t=5", 2.0),
        Video((b"x", "http://a.test/b?c= d", "AAAA"), 3.0),
    )
    item = EmbeddingItem(parts, "Find.", 64, False, "none")
    fetched = (Text("http://a.test/a"), Image(b"A"), Image(PNG), Video(b"V", 2.0), Video((b"x", b"B", "AAAA"), 3.0))
    assert site.fetcher()(item, lambda: False) == EmbeddingItem(fetched, "Find.", 64, False, "none")


def test_early_hints_and_many_ordinary_chunks_are_read(site: Site) -> None:
    body = b"".join(b"48\r\n" + bytes([number % 256]) * 72 + b"\r\n" for number in range(5000))
    site.answers = {"/": b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + CHUNKED + body + b"0\r\n\r\n"}
    assert get(site.fetcher(), "http://a.test/") == b"".join(bytes([number % 256]) * 72 for number in range(5000))


def test_item_without_urls_is_returned_unchanged(site: Site) -> None:
    item = EmbeddingItem((Text("https://a.test"), Image(PNG), Video((b"x",))))
    assert site.fetcher(url_hosts="")(item, lambda: False) is item


@pytest.mark.parametrize("num_redirects", [0, 1, MAX_REDIRECTS])
@pytest.mark.parametrize("status", ["301 Moved Permanently", "307 Temporary Redirect"])
def test_redirects_are_followed(num_redirects: int, status: str, site: Site) -> None:
    site.answers = {f"/{number}": redirect(f"{number + 1}?", status) for number in range(num_redirects)}
    site.answers |= {f"/{num_redirects}": answer()}
    assert get(site.fetcher(), "http://a.test/0") == PNG


@pytest.mark.parametrize("length", [1, 2, MAX_REDIRECTS + 1])
def test_number_of_redirects_is_limited(length: int, site: Site) -> None:
    site.answers = {f"/{number}": redirect(f"/{(number + 1) % length}") for number in range(length)}
    with pytest.raises(MediaUnavailable, match=f"^image at a.test: more than {MAX_REDIRECTS} redirects$"):
        get(site.fetcher(), "http://a.test/0")
    assert len(site.requests) == MAX_REDIRECTS + 1


def test_request_has_only_necessary_headers_and_no_proxy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Listener()) as listener:
        for name in ("http_proxy", "HTTPS_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{listener.server_address[1]}")
        site.answers = {"/": redirect("http://b.test:8080/b", set_cookie="a=b"), "/b": answer()}
        assert get(site.fetcher(url_hosts="http://*, http://*:8080"), "http://a.test/") == PNG
        assert listener.num_visits == 0
    assert site.connected == [(PUBLIC, 80), (PUBLIC, 8080)]
    rest = "accept-encoding: identity\r\nuser-agent: qwen3-vl-embedding-service\r\n\r\n"
    assert site.requests == [
        f"GET / HTTP/1.1\r\nhost: a.test\r\n{rest}",
        f"GET /b HTTP/1.1\r\nhost: b.test:8080\r\n{rest}",
    ]


def test_next_address_is_tried_if_one_does_not_answer(site: Site) -> None:
    class FirstIsDown(Diversion):
        async def connect_tcp(self, host: str, *options: Any) -> Any:
            if host == OTHER_PUBLIC:
                raise httpcore.ConnectError("unreachable")
            return await super().connect_tcp(host, *options)

    site.answers = {"/": answer()}
    site.names = {"a.test": [OTHER_PUBLIC, PUBLIC], "down.test": [OTHER_PUBLIC]}
    network = FirstIsDown(site.server_address[1], site.connected)
    fetcher = Fetcher(Settings(url_hosts="http://*"), resolve=site.resolve, network=network)
    assert get(fetcher, "http://a.test/") == PNG
    assert site.connected == [(PUBLIC, 80)]
    with pytest.raises(MediaUnavailable, match=r"^image at down\.test: cannot connect"):
        get(fetcher, "http://down.test/")


def test_limit_on_open_files_is_not_the_fault_of_the_url(site: Site) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def resolve(host: str, port: int) -> list[str]:
        if host == "limited.test":
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        return [PUBLIC]

    site.answers = {"/": answer()}
    fetcher = Fetcher(
        Settings(url_hosts="http://*"), resolve=resolve, network=Diversion(site.server_address[1], site.connected)
    )
    assert get(fetcher, "http://a.test/") == PNG  # imports what it needs
    try:
        with pytest.raises(httpcore.ConnectError) as caught:
            get(fetcher, "http://limited.test/")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert system_limit(caught.value)


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def secure(authority: trustme.CA, *names: str) -> tuple[Site, list[str | None], ssl.SSLContext]:
    """A site with a certificate for these names, the names that clients request (SNI), and a context that trusts it."""
    asked: list[str | None] = []
    tls, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert(*names).configure_cert(tls)
    authority.configure_trust(trusting)
    tls.sni_callback = lambda _, name, __: asked.append(name)
    return Site(tls), asked, trusting


def test_certificate_is_verified_against_the_name(authority: trustme.CA) -> None:
    site, asked, trusting = secure(authority, "a.test")
    site.answers = {"/": answer()}
    network = Diversion(site.server_address[1], site.connected)
    settings = Settings(url_hosts="*")
    with serving(site):
        fetcher = Fetcher(settings, resolve=site.resolve, network=network, ssl_context=trusting)
        assert get(fetcher, "https://a.test/") == PNG
        for url, distrusting in (("https://b.test/", trusting), ("https://a.test/", None)):
            fetcher = Fetcher(settings, resolve=site.resolve, network=network, ssl_context=distrusting)
            with pytest.raises(MediaUnavailable, match=r"test: cannot connect, or the certificate is not valid$"):
                get(fetcher, url)
    assert asked == ["a.test", "b.test", "a.test"]
    assert site.connected == [(PUBLIC, 443)] * 3
    assert len(site.requests) == 1


def test_connection_that_breaks_inside_tls_is_media_unavailable(authority: trustme.CA) -> None:
    def break_off(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        with socket.socket(fileno=connection.detach()) as plain:
            plain.sendall(b"no TLS record at all" * 100)

    site, _, trusting = secure(authority, "a.test")
    site.answers = {"/": break_off}
    network = Diversion(site.server_address[1], site.connected)
    with (
        serving(site),
        pytest.raises(MediaUnavailable, match=r"^image at a\.test: (the connection broke|cannot connect)"),
    ):
        get(
            Fetcher(Settings(url_hosts="*"), resolve=site.resolve, network=network, ssl_context=trusting),
            "https://a.test/",
        )


# Hostile servers


def pour(connection: socket.socket) -> None:
    """A body that does not end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    try:
        while True:
            connection.sendall(bytes(65536))
    except OSError:
        return


def drip(beginning: bytes) -> Callable[[socket.socket], None]:
    """A byte every 20 ms: no single read ever takes long."""

    def send(connection: socket.socket) -> None:
        connection.sendall(beginning)
        try:
            while True:
                connection.sendall(b"x")
                time.sleep(0.02)
        except OSError:
            return

    return send


def silent(connection: socket.socket) -> None:
    connection.recv(1)


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "body",
    {
        "declared": answer(bytes(2001)),
        "declared, never sent": answer(b"", content_length="99999999999999999999"),
        "not declared": b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + bytes(2001),
        "in chunks": CHUNKED + b"3e8\r\n" + bytes(1000) + b"\r\n3e9\r\n" + bytes(1001) + b"\r\n",
        "declared shorter, in chunks": CHUNKED[:-2] + b"content-length: 5\r\n\r\n7d1\r\n" + bytes(2001),
        "without end": pour,
    }.items(),
    ids=lambda case: case[0],
)
def test_bytes_over_the_limit_are_refused_while_they_arrive(body: tuple[str, Answer], site: Site) -> None:
    site.answers = {"/": body[1], "/good": answer(bytes(2000))}
    fetcher = site.fetcher(max_image_bytes=2000, max_video_bytes=2000)
    for part, kind in ((Image("http://a.test/"), "image"), (Video("http://a.test/"), "video")):
        with pytest.raises(MediaTooLarge, match=f"^{kind} at a.test: more than 2000 bytes"):
            fetcher(EmbeddingItem((part,)), lambda: False)
    assert len(get(fetcher, "http://a.test/good")) == 2000


def test_all_urls_of_an_item_share_the_limit_of_a_body(site: Site) -> None:
    site.answers = {"/": answer(bytes(1000))}
    fetcher = site.fetcher(max_body_bytes=2999)
    frames = ("http://a.test/",) * 2
    assert fetcher(EmbeddingItem((Video(frames),)), lambda: False).parts == (Video((bytes(1000),) * 2),)
    with pytest.raises(MediaTooLarge, match=r"^image at a\.test: more than 999 bytes"):
        fetcher(EmbeddingItem((Image("http://a.test/"), Video(frames))), lambda: False)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (answer(status="404 Not Found"), "responded with status 404; needed: 200"),
        (answer(status="206 Partial Content"), "responded with status 206"),
        (answer(status="503 Service Unavailable"), "responded with status 503"),
        (answer(b"", "204 No Content"), "responded with status 204"),
        (answer(b"", "302 Found"), f"more than {MAX_REDIRECTS} redirects"),  # to itself
        (answer(gzip.compress(bytes(10**6)), content_encoding="gzip"), "responded with content-encoding gzip; needed"),
        (answer(content_encoding="identity, br"), "responded with content-encoding identity, br; needed: none"),
        (answer(content_length="5000"), "the response is cut off or not HTTP"),
        (answer(content_length="-1"), "the response is cut off or not HTTP"),
        (answer(content_length="9" * 5000), "the response is cut off or not HTTP"),
        (answer(status="101 Switching Protocols", upgrade="a"), "the response is cut off or not HTTP"),
        (answer(content_length="5, 6"), "the response is cut off or not HTTP"),
        (CHUNKED + b"zz\r\n", "the response is cut off or not HTTP"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "the response is cut off or not HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000, "the head of the response has more than 65536 bytes"),
        (b"HTTP/1.1 102 Processing\r\n\r\n" * 100_000, "the head of the response has more than 65536 bytes"),
        (CHUNKED + b"1\r\na\r\n" * 100_000, "sends its body in chunks of fewer than 64 bytes"),
        (CHUNKED + (b"1;" + b"a" * 99 + b"\r\na\r\n") * 10_000, "sends its body in chunks of fewer than 64 bytes"),
        (b"", "the response is cut off or not HTTP"),
    ],
)
def test_response_that_is_not_a_file_is_media_unavailable(body: bytes, message: str, site: Site) -> None:
    def send(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):  # the fetcher has read enough
            connection.sendall(body)

    site.answers = {"/": body if b"302" in body else send}
    with pytest.raises(MediaUnavailable) as caught:
        get(site.fetcher(), "http://a.test/")
    assert caught.value.message.startswith(f"image at a.test: {message}")


@pytest.mark.parametrize(
    "body",
    [drip(b"HTTP/1.1 200 OK\r\na: "), drip(b"HTTP/1.1 200 OK\r\n\r\n"), drip(CHUNKED + b"ffff\r\n"), silent],
    ids=["header", "body", "chunk", "silence"],
)
def test_time_limit_covers_redirects_headers_and_body(body: Answer, site: Site) -> None:
    site.answers = {"/": redirect("/slow"), "/slow": body}
    start = time.monotonic()
    message = r"^image at a\.test: not complete after 0\.3 s \(EMBEDDER_URL_TIMEOUT_S\)$"
    with pytest.raises(MediaUnavailable, match=message):
        get(site.fetcher(url_timeout_s=0.3), "http://a.test/")
    assert 0.3 <= time.monotonic() - start < 20  # the servers go on for ever


def test_lookup_that_hangs_ends_at_the_time_limit() -> None:
    released = threading.Event()

    def hang(*_: object) -> list[str]:
        released.wait(30)
        return [PUBLIC]

    fetcher = Fetcher(Settings(url_hosts="*", url_timeout_s=0.3), resolve=hang, network=Lookout())
    start = time.monotonic()
    with pytest.raises(MediaUnavailable, match="not complete after"):
        get(fetcher, "https://a.test/")
    assert time.monotonic() - start < 20  # the lookup takes 30 s
    released.set()


def test_cancelled_request_frees_its_thread(site: Site) -> None:
    site.answers = {"/": silent}
    start = time.monotonic()
    with pytest.raises(MediaUnavailable, match="cancelled together with the request"):
        get(site.fetcher(url_timeout_s=60), "http://a.test/", lambda: bool(site.requests))
    assert time.monotonic() - start < 30  # the time limit is 60 s


# Through the engine


@pytest.fixture
def engine(embedder: Embedder, site: Site) -> Iterator[Engine]:
    """The steps of `embedder`, with a way to the site."""
    engine = Engine(
        embedder.preprocessor,
        embedder.models._launch,
        embedder.forward.hidden_size,
        embedder.settings.model_copy(update={"url_hosts": "http://*"}),
        fetch=site.fetcher(url_timeout_s=60),
    )
    yield engine
    engine.close()


def test_picture_by_url_has_the_vector_of_its_bytes(engine: Engine, embedder: Embedder, site: Site) -> None:
    site.answers = {"/a.png": answer()}
    vector = engine.submit(EmbeddingItem((Image("http://a.test/a.png"),))).result(30).vector
    assert np.abs(vector - embedder.embed([{"image": PNG}])[0]).max() <= 1e-6


def test_fetched_bytes_of_another_format_are_named(engine: Engine, site: Site) -> None:
    site.answers = {"/": answer(b"<!DOCTYPE html><title>Not here</title>", content_type="image/png")}
    with pytest.raises(InvalidMedia, match="an HTML page"):
        engine.submit(EmbeddingItem((Image("http://a.test/"),))).result(30)


def test_fetches_are_limited_do_not_delay_texts_and_end_with_their_requests(engine: Engine, site: Site) -> None:
    site.answers = {"/": silent, "/good": answer()}
    slow = [engine.submit(EmbeddingItem((Image("http://a.test/"),))) for _ in range(MAX_FETCHES + 4)]
    engine.submit(EmbeddingItem((Text("red"),))).result(30)
    deadline = time.monotonic() + 30
    while len(site.requests) < MAX_FETCHES and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(site.requests) == MAX_FETCHES
    for future in slow:
        future.cancel()
    engine.submit(EmbeddingItem((Image("http://a.test/good"),))).result(30)
    assert len(site.requests) == MAX_FETCHES + 1  # none of the cancelled ones started


# Through the running service


def bodies(url: str) -> list[tuple[str, dict[str, Any]]]:
    """A URL on every route that takes pictures and clips."""
    image = {"type": "image_url", "image_url": {"url": url}}
    video = {"type": "video_url", "video_url": {"url": url}}
    return [
        ("/img/embed", {"input": url}),
        ("/embed", {"items": [{"image": url}]}),
        ("/embed", {"items": [{"video": url}]}),
        ("/embed", {"items": [{"video": [url, url]}]}),
        ("/v1/embeddings", {"input": [{"image": url}]}),
        ("/v1/embeddings", {"input": {"content": [image, video]}}),
        ("/v1/embeddings", {"messages": [{"role": "user", "content": [video]}]}),
        ("/v2/embed", {"images": [url]}),
        ("/v2/embed", {"inputs": [{"content": [image]}]}),
        ("/embed_images", {"images": [url]}),
    ]


def ask(server: Server, path: str, body: Any) -> tuple[int, str, str]:
    response = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


def test_urls_are_off_by_default_on_every_route(server: Server) -> None:
    for path, body in bodies("https://a.com/a.png"):
        status, code, message = ask(server, path, body)
        assert (status, code) == (400, "invalid_request"), path
        assert "URLs are off; send base64 or a data URI, or ask the operator to set EMBEDDER_URL_HOSTS" in message


@pytest.mark.slow
def test_with_urls_on_each_item_has_its_own_error(random_checkpoint: Path, tmp_path: Path) -> None:
    hosts = "localhost, *.invalid, http://127.0.0.1"
    server = start_server(tmp_path, model=str(random_checkpoint), device="cpu", url_hosts=hosts, url_timeout_s="5")
    try:
        assert httpx.get(f"{server.url}/info").json()["limits"]["url_hosts"] == hosts
        for path, body in bodies("https://nowhere.invalid/a.png"):
            status, code, message = ask(server, path, body)
            assert (status, code) == (424, "media_unavailable"), path
            assert " at nowhere.invalid: " in message
        for url in ("https://a.com/a.png", "http://localhost/", "http://127.0.0.1/", "file:///etc/passwd"):
            assert ask(server, "/img/embed", {"input": url})[:2] == (400, "invalid_request")
        assert ask(server, "/img/embed", {"input": "https://localhost/"}) == (
            424,
            "media_unavailable",
            "item 0: image at localhost: its name has no address, or one that is not public",
        )
        items = ["red", {"image": "https://localhost/"}]
        results = httpx.post(f"{server.url}/embed", json={"items": items}, timeout=60).json()["results"]
        assert ["embedding" in result for result in results] == [True, False]
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()
