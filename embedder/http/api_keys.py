"""The API keys of the settings and of a file, and whether a request's headers hold one of them.

Keys are stored and compared as digests, and every known key is compared every time, so timing reveals neither the
length of a key nor how much of a guess is right. The file is read again when it changes: keys can be replaced without
a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from embedder.engine.callers import EVERYONE
from embedder.errors import InvalidKey, MissingKey
from embedder.settings import Settings

logger = logging.getLogger(__name__)

Headers = Iterable[tuple[bytes, bytes]]

MAX_FILE_BYTES = 2**20
MAX_PRESENTED = 4  # keys of a request that are looked at: each is compared with all known ones
_KEY = re.compile(rb"[!-~]+")  # ASCII without spaces: what every client and proxy can send in a header
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class ApiKeys:
    """All keys; without any, the service is open to everyone.

    Raises `ValueError` if a source of keys holds none, cannot be read, or holds something that cannot be a key.
    """

    def __init__(self, settings: Settings) -> None:
        self._from_setting: tuple[bytes, ...] = ()
        self._from_file: tuple[bytes, ...] = ()
        self._path = Path(settings.api_key_file) if settings.api_key_file else None
        if settings.api_key is not None:
            self._from_setting = _digests("EMBEDDER_API_KEY", settings.api_key.get_secret_value().encode().split(b","))
            if not self._from_setting:
                raise ValueError(
                    "EMBEDDER_API_KEY holds no key; allowed: one, or several with commas between them. "
                    "To run without API keys, unset the variable"
                )
        if self._path:
            self._stamp = _stamp(self._path)
            self._from_file = _read(self._path)

    @property
    def are_needed(self) -> bool:
        """Whether callers need a key."""
        return bool(self._from_setting or self._from_file)

    def caller(self, headers: Headers) -> str:
        """A name for the caller whose key the headers hold, as `Authorization: Bearer` or `x-api-key`.

        It is the same for each request with the key, and does not reveal it; without keys, it is `EVERYONE`. Raises
        `MissingKey` and `InvalidKey`.
        """
        if self._path:
            self._read_again(self._path)
        if not self.are_needed:
            return EVERYONE
        presented = list(_presented(headers))
        if digest := self._known_digest(presented):
            return hashlib.sha256(b"owner" + digest).hexdigest()[:32]
        if presented:
            raise InvalidKey("the API key is not known to this service; allowed: a key from its operator")
        raise MissingKey("an API key is needed: send yours as `Authorization: Bearer <key>` or as `x-api-key`")

    def _known_digest(self, presented: Iterable[bytes]) -> bytes | None:
        """The digest of the last presented key that is known. Compares all of them, in constant time each."""
        digests = [_digest(key) for key in islice(presented, MAX_PRESENTED)]
        known = (*self._from_setting, *self._from_file)
        matches = [other for digest in digests for other in known if hmac.compare_digest(digest, other)]
        return matches[-1] if matches else None

    def _read_again(self, path: Path) -> None:
        """Read the file if it has changed. If it cannot be read, or is empty, the keys read before stay valid."""
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._from_file = _read(path)
        except ValueError as error:
            logger.error("%s; the previous keys stay valid", error)
        else:
            logger.info("EMBEDDER_API_KEY_FILE has changed; it has %d keys now", len(self._from_file))


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Values that change when the file is written or replaced; None if it does not exist."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def _read(path: Path) -> tuple[bytes, ...]:
    """Digests of the file's keys, one per line. Raises `ValueError` if there are none, or what is there is unusable.

    Blank lines, lines that start with `#`, and a byte-order mark at the start of the file are not keys.
    """
    name = f"EMBEDDER_API_KEY_FILE={str(path)!r}"
    try:
        lines = _read_regular_file(path, name).removeprefix(_BYTE_ORDER_MARK).splitlines()
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    digests = _digests(name, (b"" if line.lstrip().startswith(b"#") else line for line in lines), "line ")
    if not digests:
        raise ValueError(f"{name} holds no key; allowed: one or more, each on its own line")
    return digests


def _read_regular_file(path: Path, name: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # to open a named pipe would otherwise wait for a writer
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{name} is a {_file_kind(found.st_mode)}; allowed: a regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise ValueError(f"{name} has {found.st_size} bytes; allowed: at most {MAX_FILE_BYTES}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_FILE_BYTES)
    finally:
        os.close(descriptor)


def _file_kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "directory"
    return "named pipe" if stat.S_ISFIFO(mode) else "device or socket"


def _digests(source: str, keys: Iterable[bytes], place: str = "key ") -> tuple[bytes, ...]:
    """Digests of the keys that are not blank. Raises `ValueError` for one that no header can carry, without its text.

    Such a key would shut its owner out, and is mostly something else: a comment after a key, a file in UTF-16.
    """
    stripped = [key.strip() for key in keys]
    for number, key in enumerate(stripped, start=1):
        if key and not _KEY.fullmatch(key):
            raise ValueError(
                f"{source}: {place}{number} cannot be a key: it holds a space, a control character or a character "
                "that is not ASCII; allowed: printable ASCII without spaces, in a file also lines that start with #"
            )
    return tuple(_digest(key) for key in stripped if key)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _presented(headers: Headers) -> Iterator[bytes]:
    """The keys in the headers, without the empty ones."""
    for name, value in headers:
        key = b""
        match name.lower():
            case b"x-api-key":
                key = value.strip()
            case b"authorization":
                scheme, _, rest = value.strip().partition(b" ")
                key = rest.strip() if scheme.lower() == b"bearer" else b""
        if key:
            yield key
