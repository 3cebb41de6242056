"""Connections stay HTTP/1.1, whatever other protocol a caller offers."""

from __future__ import annotations

from typing import Any

import httptools

_FRAMING = (b"content-length", b"transfer-encoding")  # headers that say where a body ends


def ignore_upgrade(protocol: Any) -> None:
    """Give a protocol, whose parser has raised `HttpParserUpgrade` at the end of a head, a parser for what follows.

    Every JDK HttpClient, and `curl --http2`, offers `Upgrade: h2c` with its first request. A server may ignore the
    offer (RFC 9110, section 7.8), but httptools 0.9 treats everything after the head as the other protocol, and the
    body is lost. The new parser gets only the headers that say where the body ends, as a head of its own.
    """
    protocol.parser = httptools.HttpRequestParser(_AfterHead(protocol))
    framing = [name + b": " + value for name, value in protocol.headers if name in _FRAMING]
    protocol.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, b"\r\n"]))


class _AfterHead:
    """Callbacks of the new parser: the protocol's, except for the first head, which the protocol has seen."""

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._has_seen_head = False
        self.on_body = protocol.on_body

    def on_message_begin(self) -> None:
        if self._has_seen_head:
            self._protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._has_seen_head:
            self._protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_seen_head:
            self._protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._has_seen_head:
            self._protocol.on_headers_complete()
        self._has_seen_head = True

    def on_message_complete(self) -> None:
        self._protocol.on_message_complete()
