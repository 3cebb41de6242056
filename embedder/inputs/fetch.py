"""An item's URLs -> the bytes behind them, within limits of bytes and time, from public addresses alone.

httpcore speaks HTTP and does nothing unasked: no redirects, cookies, proxies, decompression or retries. It opens its
connections through `_PublicNetwork`, which looks a name up once, refuses it where any of its addresses is not public,
and connects to the addresses it has checked; TLS holds the certificate to the name all the same. A redirect is a new
URL, and starts again at the allow-list.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import urljoin

import httpcore

from embedder.errors import InvalidRequest, MediaTooLarge, MediaUnavailable
from embedder.inputs.address import Address, allowed_address, has_url, is_public, is_url
from embedder.inputs.items import EmbeddingItem, Image, Part, Video
from embedder.settings import Settings

MAX_FETCHES = 16  # items at a time; each may hold `max_body_bytes`
MAX_REDIRECTS = 5
CANCELLED_WITHIN_S = 0.2
HEADERS = [("accept-encoding", "identity"), ("user-agent", "qwen3-vl-embedding-service")]

Kind = Literal["image", "video"]
Resolve = Callable[[str, int], list[str]]  # a host and port -> IP addresses; raises OSError


def resolve_host(host: str, port: int) -> list[str]:
    """Every IP address of a host, v4 and v6, as this machine looks names up."""
    return [str(sockaddr[0]) for *_, sockaddr in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Fetcher:
    """Puts bytes in the place of an item's URLs, in the calling thread; may be called in many at once.

    `resolve` and `network` are how names are looked up and connections opened; `ssl_context` says whom TLS trusts.
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
        is_on = bool(settings.url_hosts)  # reading the roots of trust takes time
        self._ssl_context = ssl_context or (httpcore.default_ssl_context() if is_on else None)

    def __call__(self, item: EmbeddingItem, is_cancelled: Callable[[], bool]) -> EmbeddingItem:
        """The item with the bytes behind its URLs; the item itself where it has none.

        Raises `InvalidRequest` for a URL that may not be fetched, `MediaTooLarge`, and `MediaUnavailable` for what its
        owner must mend; that too, soon after `is_cancelled` has turned true.
        """
        return asyncio.run(self._unless_cancelled(item, is_cancelled)) if has_url(item) else item

    async def _unless_cancelled(self, item: EmbeddingItem, is_cancelled: Callable[[], bool]) -> EmbeddingItem:
        task = asyncio.ensure_future(self._fill(item))
        while not task.done():
            await asyncio.wait([task], timeout=CANCELLED_WITHIN_S)
            if is_cancelled():
                task.cancel()
        if task.cancelled():
            raise MediaUnavailable("given up together with the request")
        return task.result()

    async def _fill(self, item: EmbeddingItem) -> EmbeddingItem:
        """One URL after the other. Together they bring no more than a body could have."""
        num_bytes_left = self._settings.max_body_bytes

        async def filled(source: Any, kind: Kind) -> Any:
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
                    parts.append(Image(await filled(source, "image")))
                case Video(tuple(frames)):
                    parts.append(replace(part, source=tuple([await filled(frame, "image") for frame in frames])))
                case Video(source):
                    parts.append(replace(part, source=await filled(source, "video")))
                case _:
                    parts.append(part)
        return replace(item, parts=tuple(parts))

    async def _fetch(self, url: str, kind: Kind, num_bytes_left: int) -> bytes:
        settings = self._settings
        address = allowed_address(url, settings.url_hosts)
        name = f"{kind} at {address.host}"
        max_bytes = settings.max_image_bytes if kind == "image" else settings.max_video_bytes
        with _told_by_name(name, settings.url_timeout_s):
            async with asyncio.timeout(settings.url_timeout_s):
                return await self._follow(address, name, min(max_bytes, num_bytes_left))

    async def _follow(self, address: Address, name: str, max_bytes: int) -> bytes:
        """The bytes at an address, or where it redirects to. What that is, is not told: it may be internal."""
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
                except (InvalidRequest, ValueError) as error:  # urljoin's, of brackets that do not match
                    raise MediaUnavailable(f"{name}: redirects to what may not be fetched") from error
        raise MediaUnavailable(f"{name}: more than {MAX_REDIRECTS} redirects")


class _NoPublicAddress(httpcore.ConnectError):
    """A name leads nowhere, or to an address that is not public."""


class _PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connections to public addresses alone. Nothing comes between the check of an address and its use."""

    def __init__(self, resolve: Resolve, network: httpcore.AsyncNetworkBackend, timeout_s: float) -> None:
        self._resolve = resolve
        self._network = network
        self._timeout_s = timeout_s
        # The system's look-up has no time-out: an item leaves a hanging one behind, and these are all there are.
        self._lookups = ThreadPoolExecutor(MAX_FETCHES, thread_name_prefix="lookup")

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """To the first address of the host that answers, each tried for its share of the time."""
        try:
            ips = await asyncio.get_running_loop().run_in_executor(self._lookups, self._resolve, host, port)
        except (OSError, UnicodeError) as error:  # a label of over 63 letters is not in Python's idna
            raise _NoPublicAddress from error
        if not ips or not all(is_public(ip) for ip in ips):
            raise _NoPublicAddress
        for ip in ips:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._network.connect_tcp(ip, port, self._timeout_s / len(ips))
        raise httpcore.ConnectError


_REASONS: dict[type[Exception], str] = {
    _NoPublicAddress: "its name leads to no address, or not to public ones alone",
    httpcore.NetworkError: "no connection, or none with a valid certificate",
    httpcore.ProtocolError: "the answer is cut off or not HTTP",
    OSError: "the connection broke",  # in the middle of TLS
}


@contextmanager
def _told_by_name(name: str, timeout_s: float) -> Iterator[None]:
    """What goes wrong at an address, in our words: the library's may hold addresses."""
    try:
        yield
    except TimeoutError as error:
        raise MediaUnavailable(f"{name}: not complete after {timeout_s:g} s, the limit") from error
    except tuple(_REASONS) as error:
        reason = next(reason for kind, reason in _REASONS.items() if isinstance(error, kind))
        raise MediaUnavailable(f"{name}: {reason}") from error


async def _read(response: httpcore.Response, name: str, max_bytes: int) -> bytes:
    """The body, counted as it comes, whatever its header says."""
    if response.status != 200:
        raise MediaUnavailable(f"{name}: answered {response.status}; needed: 200")
    if (encoding := _header(response, b"content-encoding")) not in ("", "identity"):
        raise MediaUnavailable(f"{name}: is sent compressed ({encoding[:20]}), though not asked for")
    data = bytearray()

    def check(num_bytes: int) -> None:
        if num_bytes > max_bytes:
            raise MediaTooLarge(f"{name}: over {max_bytes} bytes, its own limit or what its item has left")

    check(int(_header(response, b"content-length") or 0))  # a number: h11 refuses others
    async for chunk in response.aiter_stream():
        data += chunk
        check(len(data))
    return bytes(data)


def _header(response: httpcore.Response, wanted: bytes) -> str:
    return ", ".join(value.decode("latin-1") for name, value in response.headers if name.lower() == wanted)
