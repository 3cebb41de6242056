"""A caller's URL -> an Address that the operator allows; and which IP addresses are public. No network here.

A URL is read once, as browsers read it (the WHATWG rules, by pydantic's parser): `http://0x7f.1` and `http://①②⑦.1` say
127.0.0.1, and no later step looks at its text again.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated, TypeGuard

from pydantic import AnyUrl, TypeAdapter, UrlConstraints, ValidationError

from embedder.errors import InvalidRequest
from embedder.inputs.items import EmbeddingItem, Image, Video, describe_value

DEFAULT_PORTS = {"https": 443, "http": 80}

_URL = TypeAdapter(Annotated[AnyUrl, UrlConstraints(max_length=8192, allowed_schemes=list(DEFAULT_PORTS))])
_SCHEME = re.compile(r"(?!data:)[A-Za-z][A-Za-z0-9+.-]{0,30}:")  # no base64 holds a colon

# Of IPv6 what is outside 2000::/3 is not public: mapped and NAT64 addresses, unique local, link-local, multicast ..
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# Inside it and of IPv4: IANA's registries of special-purpose and multicast addresses, 2026-11. Whole blocks, and also
# those of tunnels, which may lead to any IPv4 address. Python's `is_global` differs from one patch release to another.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(block)
    for block in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' NAT; a cloud's metadata at 100.100.100.200
        "127.0.0.0/8",
        "168.63.129.16/32",  # not IANA's: Azure's host agent, which answers its own machines alone
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",  # a cloud's metadata at 192.0.0.192
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
    """Where a URL leads. `host`: a name in ASCII, or an IP address. `target`: path and query, percent-encoded."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """Host, and port where it is not the scheme's, as in a URL and the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """As text, to find out where a relative redirect leads."""
        return f"{self.scheme}://{self.authority}{self.target}"


def is_url(source: object) -> TypeGuard[str]:
    """Whether a picture or clip is given by a URL of any scheme; a data URI holds what it names, and is none."""
    return isinstance(source, str) and _SCHEME.match(source) is not None


def has_url(item: EmbeddingItem) -> bool:
    """Whether something must be fetched before the item can be embedded."""
    for part in item.parts:
        match part:
            case Image(source) | Video(source):
                if any(is_url(one) for one in (source if isinstance(source, tuple) else (source,))):
                    return True
    return False


def allowed_address(url: str, url_hosts: str) -> Address:
    """A URL -> the Address it names, if `Settings.url_hosts` has it. Raises `InvalidRequest`."""
    if not url_hosts:
        raise InvalidRequest(
            f"got a URL, {describe_value(url)}, and URLs are off; send base64 or a data URI, or let the operator set "
            "EMBEDDER_URL_HOSTS"
        )
    address = _parse(url)
    if not any(_is_named_by(entry.strip(), address) for entry in url_hosts.split(",")):
        raise InvalidRequest(
            f"URL: got {address.scheme}, host {address.host}, port {address.port}; allowed: {url_hosts} (https and its "
            "own port, unless said otherwise)"
        )
    if _is_ip(address.host) and not is_public(address.host):
        raise InvalidRequest(f"URL: got the address {address.host}; allowed: public addresses")
    return address


def is_public(ip: str) -> bool:
    """Whether an IP address is one of the internet at large: not private, local, reserved, multicast or a tunnel's."""
    address = ipaddress.ip_address(ip)
    is_unicast = address.version == 4 or address in _GLOBAL_UNICAST
    return is_unicast and not any(address in block for block in _NOT_PUBLIC)


def _parse(url: str) -> Address:
    try:
        parsed = _URL.validate_python(url)
    except ValidationError as error:
        raise InvalidRequest(f"URL: got {describe_value(url)}; {error.errors()[0]['msg']}") from error
    if parsed.username is not None or parsed.password is not None:
        raise InvalidRequest("URL: got one with a user name or password; allowed: without")
    assert parsed.host is not None
    assert parsed.port is not None  # both schemes have them
    target = (parsed.path or "/") + (f"?{parsed.query}" if parsed.query else "")
    return Address(parsed.scheme, parsed.host.strip("[]"), parsed.port, target)


def _is_named_by(entry: str, address: Address) -> bool:
    """An entry of `url_hosts`: `[http://]host[:port]`, the host a name, `*.` and its end, or `*`."""
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
