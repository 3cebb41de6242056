"""A caller's URL -> an Address that the operator allows, and which IP addresses are public. Uses no network.

A URL is parsed once, by the WHATWG rules that browsers follow (pydantic's parser): `http://0x7f.1` and `http://①②⑦.1`
are 127.0.0.1. Later steps use the parsed Address only.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated, TypeGuard

from pydantic import AnyUrl, TypeAdapter, UrlConstraints, ValidationError

from embedder.errors import InvalidRequest
from embedder.inputs.data_uri import MAX_HEADER_CHARS
from embedder.inputs.items import EmbeddingItem, Image, Video, describe_value

DEFAULT_PORTS = {"https": 443, "http": 80}

_URL = TypeAdapter(Annotated[AnyUrl, UrlConstraints(max_length=8192, allowed_schemes=list(DEFAULT_PORTS))])
_SCHEME = re.compile(r"\s*(?!data:)[A-Z][A-Z0-9+.-]{0,30}:", re.IGNORECASE)  # no base64 holds a colon

# IPv6 addresses outside 2000::/3 are not public: IPv4-mapped, NAT64, unique local, link-local, multicast, ...
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# In 2000::/3 and IPv4: IANA's registries of special-purpose and multicast addresses, 2026-11, as whole blocks, and the
# blocks of tunnels, which can reach any IPv4 address. Python's `is_global` is not used: it changes in patch releases.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(block)
    for block in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; Alibaba Cloud's metadata at 100.100.100.200
        "127.0.0.0/8",
        "168.63.129.16/32",  # not IANA's: Azure's host agent
        "169.254.0.0/16",  # link-local; metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # Oracle Cloud's metadata at 192.0.0.192
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "2001::/23",  # Teredo, ORCHID, benchmarks
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)


@dataclass(frozen=True)
class Address:
    """A parsed URL. `host`: a name in ASCII, or an IP address. `target`: path and query, percent-encoded."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """Host, and port unless it is the scheme's default, as in a URL and the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL as text, to resolve a relative redirect against."""
        return f"{self.scheme}://{self.authority}{self.target}"


def is_url(source: object) -> TypeGuard[str]:
    """Whether an image or video is given as a URL of any scheme. A data URI is not a URL here."""
    return isinstance(source, str) and _SCHEME.match(source, 0, MAX_HEADER_CHARS) is not None


def has_url(item: EmbeddingItem) -> bool:
    """Whether the item has a URL that must be fetched."""
    for part in item.parts:
        match part:
            case Image(source) | Video(source):
                if any(is_url(one) for one in (source if isinstance(source, tuple) else (source,))):
                    return True
    return False


def allowed_address(url: str, url_hosts: str) -> Address:
    """Parse a URL and check it against `Settings.url_hosts`. Raises `InvalidRequest`."""
    if not url_hosts:
        raise InvalidRequest(
            f"got a URL, {describe_value(url)}, and URLs are off; send base64 or a data URI, or ask the operator to "
            "set EMBEDDER_URL_HOSTS"
        )
    address = _parse(url)
    if not any(_matches_entry(entry.strip(), address) for entry in url_hosts.split(",")):
        raise InvalidRequest(
            f"URL: got {address.scheme}, host {address.host}, port {address.port}; allowed: {url_hosts} (https "
            "on port 443, unless an entry names others)"
        )
    if _is_ip(address.host) and not is_public(address.host):
        raise InvalidRequest(f"URL: got the address {address.host}; allowed: public addresses")
    return address


def is_public(ip: str) -> bool:
    """Whether an IP address is on the public internet: not private, local, reserved, multicast or of a tunnel."""
    address = ipaddress.ip_address(ip)
    is_unicast = address.version == 4 or address in _GLOBAL_UNICAST
    return is_unicast and not any(address in block for block in _NOT_PUBLIC)


def _parse(url: str) -> Address:
    try:
        parsed = _URL.validate_python(url)
    except ValidationError as error:
        raise InvalidRequest(f"URL: got {describe_value(url)}; {error.errors()[0]['msg']}") from error
    if parsed.username is not None or parsed.password is not None:
        raise InvalidRequest("URL: got a URL with a user name or password; allowed: URLs without them")
    assert parsed.host is not None
    assert parsed.port is not None  # both schemes have a default
    target = (parsed.path or "/") + (f"?{parsed.query}" if parsed.query else "")
    return Address(parsed.scheme, parsed.host.strip("[]"), parsed.port, target)


def _matches_entry(entry: str, address: Address) -> bool:
    """Whether an address matches an entry of `url_hosts`: `[http://]host[:port]`; host: a name, `*.domain` or `*`."""
    scheme, _, authority = entry.lower().rpartition("://")
    host, _, port = authority.partition(":")
    scheme = scheme or "https"
    if (address.scheme, address.port) != (scheme, int(port or DEFAULT_PORTS[scheme])):
        return False
    return host in ("*", address.host) or (host.startswith("*.") and address.host.endswith(host[1:]))


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
