"""How URLs are parsed, which of them the operator's list allows, and which addresses are public."""

from __future__ import annotations

import ipaddress
import random

import pytest

from embedder.errors import InvalidRequest
from embedder.inputs.address import Address, allowed_address, has_url, is_public, is_url
from embedder.inputs.items import EmbeddingItem, Image, Text, Video

ALL = "*, http://*"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("https://a.com/b.png", True),
        ("HTTP://a.com", True),
        ("file:///etc/passwd", True),  # to be refused as a URL
        ("gopher:x", True),
        ("data:image/png;base64,AAAA", False),
        ("iVBORw0KGgoAAAANSUhEUgAAACA=", False),
        ("/9j/4AAQSkZJRg", False),
        ("/etc/passwd", False),
        (b"https://a.com", False),
        (None, False),
    ],
)
def test_url_is_recognized_by_its_scheme(source: object, expected: bool) -> None:
    assert is_url(source) is expected


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Text("https://a.com"), False),  # a text about a URL
        (Image("https://a.com"), True),
        (Image(b"https://a.com"), False),
        (Video("https://a.com"), True),
        (Video((b"", "https://a.com")), True),
        (Video(("AAAA", b"")), False),
    ],
)
def test_images_videos_and_frames_can_be_urls(part: Text | Image | Video, expected: bool) -> None:
    assert has_url(EmbeddingItem((Text("a"), part))) is expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a.com", Address("https", "a.com", 443, "/")),
        ("HTTPS://A.com:443/b c?d=é&e#f", Address("https", "a.com", 443, "/b%20c?d=%C3%A9&e")),
        ("https://bücher.de/", Address("https", "xn--bcher-kva.de", 443, "/")),
        ("https://a。com/", Address("https", "a.com", 443, "/")),
        ("https://a.com\\@b.com/", Address("https", "a.com", 443, "/@b.com/")),
        ("https://134744072/", Address("https", "8.8.8.8", 443, "/")),
        ("https://[2606:4700:0::1111]/", Address("https", "2606:4700::1111", 443, "/")),
    ],
)
def test_url_is_parsed_as_browsers_do(url: str, expected: Address) -> None:
    assert allowed_address(url, ALL) == expected


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("https://a.com/", "a.com"),
        ("http://a.com:81/", "a.com:81"),
        ("https://[2606:4700::1]:444/", "[2606:4700::1]:444"),
    ],
)
def test_authority_has_brackets_and_a_port_where_needed(url: str, authority: str) -> None:
    address = allowed_address(url, "http://*:81, *:444, *")
    assert address.authority == authority
    assert address.url == url


@pytest.mark.parametrize(
    ("url_hosts", "url"),
    [
        ("a.com", "https://a.com/"),
        ("b.com, A.com", "https://a.com/"),
        ("*.a.com", "https://x.y.a.com/"),
        ("*", "https://anything.org/"),
        ("a.com:8443", "https://a.com:8443/"),
        ("http://a.com", "http://a.com/"),
        ("http://*:8080", "http://a.com:8080/"),
    ],
)
def test_entry_allows(url_hosts: str, url: str) -> None:
    assert allowed_address(url, url_hosts).url == url


@pytest.mark.parametrize(
    ("url_hosts", "url"),
    [
        ("a.com", "https://b.com/"),
        ("a.com", "https://xa.com/"),
        ("a.com", "https://a.com.b.com/"),
        ("a.com", "https://x.a.com/"),
        ("a.com", "https://a.com./"),
        ("a.com", "https://b.com\\@a.com/"),
        ("a.com", "https://b.com#@a.com/"),
        ("a.com", "http://a.com/"),
        ("a.com", "http://a.com:443/"),
        ("a.com", "https://a.com:80/"),
        ("a.com", "https://a.com:8443/"),
        ("a.com:8443", "https://a.com/"),
        ("http://a.com", "https://a.com/"),
        ("*.a.com", "https://a.com/"),
        ("*.a.com", "https://xa.com/"),
        ("*", "http://a.com/"),
        ("*", "https://a.com:22/"),
    ],
)
def test_entry_allows_nothing_else(url_hosts: str, url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^URL: got https?, host .*, port \d+; allowed: ") as caught:
        allowed_address(url, url_hosts)
    assert url_hosts in caught.value.message


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://a.com/", "scheme should be 'https' or 'http'"),
        ("file:///etc/passwd", "scheme should be"),
        ("https://user@a.com/", "a user name or password"),
        ("https://:word@a.com/", "a user name or password"),
        ("https://", "empty host"),
        ("https://a.com:99999/", "invalid port"),
        ("https://a.com/" + "x" * 8192, "at most 8192 characters"),
        ("https://127.0.0.1/", "got the address 127.0.0.1; allowed: public addresses"),
        ("http://[::1]/", "got the address ::1; allowed: public addresses"),
    ],
)
def test_url_that_no_list_allows_is_refused_with_the_reason(url: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        allowed_address(url, ALL)
    assert message in caught.value.message
    assert len(caught.value.message) < 200


def test_without_a_list_every_url_is_refused_and_the_setting_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"URLs are off; .* EMBEDDER_URL_HOSTS$"):
        allowed_address("https://a.com/", "")


@pytest.mark.parametrize("ip", ["8.8.8.8", "93.184.216.34", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00::1"])
def test_address_on_the_internet_is_public(ip: str) -> None:
    assert is_public(ip)


@pytest.mark.parametrize(
    "ip",
    [
        *("0.0.0.0", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.255", "168.63.129.16"),
        *("169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1"),
        *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::808:808", "64:ff9b:1::1"),
        *("100::1", "2001::1", "2001:20::1", "2001:db8::1", "2002:808:808::1", "3fff::1", "5f00::1"),
        *("fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1"),
    ],
)
def test_address_of_any_other_kind_is_not_public(ip: str) -> None:
    assert not is_public(ip)


def test_what_python_calls_not_global_is_not_public() -> None:
    numbers = random.Random(0)
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address]
    found = [ipaddress.IPv4Address(numbers.getrandbits(32)) for _ in range(4000)]
    found += [ipaddress.IPv6Address(0x2001 << 112 | numbers.getrandbits(112)) for _ in range(1000)]
    found += [ipaddress.IPv6Address(numbers.getrandbits(128)) for _ in range(1000)]
    assert [ip for ip in found if is_public(str(ip)) and (not ip.is_global or ip.is_multicast)] == []
    assert sum(is_public(str(ip)) for ip in found) > 3000
