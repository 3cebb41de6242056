"""An item's URLs -> their bytes, within limits on bytes and time, from public addresses only.

Fetching caller-supplied URLs can expose internal addresses (SSRF). httpcore is used because it does nothing by itself:
no redirects, cookies, proxies, decompression or retries. Its connections go through `_PublicNetwork`, which resolves a
name once, refuses it if any of its addresses is not public, and connects to the addresses that were checked; TLS still
verifies the certificate against the name. A redirect is checked like a new URL, from the allow-list on.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urljoin

import httpcore

from embedder.errors import InvalidRequest, MediaTooLarge, MediaUnavailable, system_limit
from embedder.inputs.address import Address, allowed_address, has_url, is_public, is_url
from embedder.inputs.formats import MediaKind
from embedder.inputs.items import EmbeddingItem, Image, Part, Video
from embedder.settings import Settings

MAX_FETCHES = 16  # items fetched at a time, each up to `max_body_bytes`
MAX_REDIRECTS = 5
CANCEL_POLL_S = 0.2
# h11, which parses the responses, is Python code. While 16 servers sent small chunks, or endless 1xx responses, as fast
# as they could, the event loop's latency rose from 0.1 ms to 22 ms (95th percentile, two cores).
MAX_HEAD_BYTES = 2**16  # of a response, together with the 1xx responses before it
MAX_CHUNKS, MIN_CHUNK_BYTES = 1000, 64  # above this number, the average must be as large as that
HEADERS = [("accept-encoding", "identity"), ("user-agent", "qwen3-vl-embedding-service")]

Resolve = Callable[[str, int], list[str]]  # host, port -> IP addresses; raises OSError


def resolve_host(host: str, port: int) -> list[str]:
    """Resolve a host to all its IP addresses, v4 and v6."""
    return [str(sockaddr[0]) for *_, sockaddr in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Fetcher:
    """Replaces the URLs of an item by their bytes. Runs in the calling thread; thread-safe.

    `resolve`, `network` and `ssl_context` replace name resolution, connections and the trusted certificates.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        resolve: Resolve = resolve_host,
        network: httpcore.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._network = _PublicNetwork(resolve, network or httpcore.AnyIOBackend(), settings.url_timeout_s)
        is_on = bool(settings.url_hosts)  # loading the root certificates takes time
        self._ssl_context = ssl_context or (httpcore.default_ssl_context() if is_on else None)

    def __call__(self, item: EmbeddingItem, is_cancelled: Callable[[], bool]) -> EmbeddingItem:
        """The item with bytes instead of URLs; the same item if it has no URL.

        Raises `InvalidRequest` for a URL that is not allowed, `MediaTooLarge`, and `MediaUnavailable` if the server
        does not deliver, or within `CANCEL_POLL_S` after `is_cancelled` returns true.
        """
        return asyncio.run(self._fetch_until_cancelled(item, is_cancelled)) if has_url(item) else item

    async def _fetch_until_cancelled(self, item: EmbeddingItem, is_cancelled: Callable[[], bool]) -> EmbeddingItem:
        task = asyncio.ensure_future(self._fetch_item(item))
        while not task.done():
            await asyncio.wait([task], timeout=CANCEL_POLL_S)
            if is_cancelled():
                task.cancel()
        if task.cancelled():
            raise MediaUnavailable("fetching was cancelled together with the request")
        return task.result()

    async def _fetch_item(self, item: EmbeddingItem) -> EmbeddingItem:
        """Fetch one URL after the other. All together are limited to `max_body_bytes`."""
        num_bytes_left = self._settings.max_body_bytes

        async def bytes_of(source: Any, kind: MediaKind) -> Any:
            nonlocal num_bytes_left
            if not is_url(source):
                return source
            data = await self._fetch(source, kind, num_bytes_left)
            num_bytes_left -= len(data)
            return data

        parts: list[Part] = []
        for part in item.parts:
            match part:
                case Image(source):
                    parts.append(Image(await bytes_of(source, "image")))
                case Video(tuple(frames)):
                    parts.append(replace(part, source=tuple([await bytes_of(frame, "image") for frame in frames])))
                case Video(source):
                    parts.append(replace(part, source=await bytes_of(source, "video")))
                case _:
                    parts.append(part)
        return replace(item, parts=tuple(parts))

    async def _fetch(self, url: str, kind: MediaKind, num_bytes_left: int) -> bytes:
        settings = self._settings
        address = allowed_address(url, settings.url_hosts)
        name = f"{kind} at {address.host}"
        max_bytes = settings.max_image_bytes if kind == "image" else settings.max_video_bytes
        with _translated_errors(name, settings.url_timeout_s):
            async with asyncio.timeout(settings.url_timeout_s):
                return await self._follow_redirects(address, name, min(max_bytes, num_bytes_left))

    async def _follow_redirects(self, address: Address, name: str, max_bytes: int) -> bytes:
        """Fetch an address and follow redirects. Errors do not name redirect targets, which may be internal."""
        async with httpcore.AsyncConnectionPool(self._ssl_context, network_backend=self._network) as pool:
            for _ in range(MAX_REDIRECTS + 1):
                url = httpcore.URL(scheme=address.scheme, host=address.host, port=address.port, target=address.target)
                headers = [("host", address.authority), *HEADERS]
                async with pool.stream("GET", url, headers=headers) as response:
                    if response.status not in (301, 302, 303, 307, 308):
                        return await _read(response, name, max_bytes)
                    location = _header(response, b"location")
                try:
                    address = allowed_address(urljoin(address.url, location), self._settings.url_hosts)
                except (InvalidRequest, ValueError) as error:  # ValueError: urljoin, for unbalanced brackets
                    raise MediaUnavailable(f"{name}: redirects to a URL that is not allowed") from error
        raise MediaUnavailable(f"{name}: more than {MAX_REDIRECTS} redirects")


class _NoPublicAddress(httpcore.ConnectError):
    """A name has no address, or one that is not public."""


class _PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only. The address that is checked is the one that is connected to."""

    def __init__(self, resolve: Resolve, network: httpcore.AsyncNetworkBackend, timeout_s: float) -> None:
        self._resolve = resolve
        self._network = network
        self._timeout_s = timeout_s
        # getaddrinfo has no timeout. A lookup that hangs keeps its thread after its item has failed.
        self._lookups = ThreadPoolExecutor(MAX_FETCHES, thread_name_prefix="lookup")

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address of the host that answers. The addresses share the time limit."""
        try:
            ips = await asyncio.get_running_loop().run_in_executor(self._lookups, self._resolve, host, port)
        except (OSError, UnicodeError) as error:  # UnicodeError: the name is not valid in IDNA
            raise _NoPublicAddress from error
        if not ips or not all(is_public(ip) for ip in ips):
            raise _NoPublicAddress
        for ip in ips:
            try:
                return _HeadLimit(await self._network.connect_tcp(ip, port, self._timeout_s / len(ips)))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                if system_limit(error):  # another address would not help
                    raise
        raise httpcore.ConnectError


class _HeadTooLarge(httpcore.ProtocolError):
    """A response has a larger head than `MAX_HEAD_BYTES`."""


class _HeadLimit(httpcore.AsyncNetworkStream):
    """A connection that counts the bytes of a response's head: h11 only limits each of those that are 1xx responses."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._num_bytes_left: int | None = MAX_HEAD_BYTES

    def end_head(self) -> None:
        """End the head: what follows is the body, which is not limited here."""
        self._num_bytes_left = None

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read some bytes. Raises `_HeadTooLarge`."""
        if self._num_bytes_left is None:
            return await self._stream.read(max_bytes, timeout)
        if not self._num_bytes_left:
            raise _HeadTooLarge
        data = await self._stream.read(min(max_bytes, self._num_bytes_left), timeout)
        self._num_bytes_left -= len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write a request, whose response begins with a head."""
        self._num_bytes_left = MAX_HEAD_BYTES
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """The same connection, encrypted."""
        return _HeadLimit(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """What the connection says about itself."""
        return self._stream.get_extra_info(info)


_REASONS: dict[type[Exception], str] = {
    _NoPublicAddress: "its name has no address, or one that is not public",
    httpcore.NetworkError: "cannot connect, or the certificate is not valid",
    _HeadTooLarge: f"the head of the response has more than {MAX_HEAD_BYTES} bytes",
    httpcore.ProtocolError: "the response is cut off or not HTTP",
    OSError: "the connection broke",  # inside TLS
}


@contextmanager
def _translated_errors(name: str, timeout_s: float) -> Iterator[None]:
    """Translate httpcore's errors, whose messages can contain internal addresses."""
    try:
        yield
    except TimeoutError as error:
        raise MediaUnavailable(f"{name}: not complete after {timeout_s:g} s (EMBEDDER_URL_TIMEOUT_S)") from error
    except tuple(_REASONS) as error:
        if system_limit(error):  # not the fault of the URL's owner
            raise
        reason = next(reason for kind, reason in _REASONS.items() if isinstance(error, kind))
        raise MediaUnavailable(f"{name}: {reason}") from error


async def _read(response: httpcore.Response, name: str, max_bytes: int) -> bytes:
    """Read the body. Its bytes are counted as they arrive, in addition to the declared length."""
    if response.status != 200:
        raise MediaUnavailable(f"{name}: responded with status {response.status}; needed: 200")
    if (encoding := _header(response, b"content-encoding")) not in ("", "identity"):
        raise MediaUnavailable(f"{name}: responded with content-encoding {encoding[:20]}; needed: none")
    response.extensions["network_stream"].end_head()
    data = bytearray()

    def check(num_bytes: int) -> None:
        if num_bytes > max_bytes:
            raise MediaTooLarge(
                f"{name}: more than {max_bytes} bytes, the limit of one file or what is left for the item "
                "(EMBEDDER_MAX_IMAGE_BYTES, EMBEDDER_MAX_VIDEO_BYTES)"
            )

    check(int(_header(response, b"content-length") or 0))  # h11 accepts numbers only
    num_chunks = 0
    async for chunk in response.aiter_stream():
        data += chunk
        check(len(data))
        num_chunks += 1
        if num_chunks > MAX_CHUNKS + len(data) // MIN_CHUNK_BYTES:
            raise MediaUnavailable(f"{name}: sends its body in chunks of fewer than {MIN_CHUNK_BYTES} bytes")
    return bytes(data)


def _header(response: httpcore.Response, wanted: bytes) -> str:
    return ", ".join(value.decode("latin-1") for name, value in response.headers if name.lower() == wanted)
