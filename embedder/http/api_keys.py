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
from collections.abc import Iterable, Iterator
from pathlib import Path

from embedder.settings import Settings

logger = logging.getLogger(__name__)

Headers = Iterable[tuple[bytes, bytes]]


class ApiKeys:
    """All keys; without any, the service is open to everyone.

    Raises `ValueError` if a setting names a source of keys that holds none.
    """

    def __init__(self, settings: Settings) -> None:
        self._from_setting: tuple[bytes, ...] = ()
        self._from_file: tuple[bytes, ...] = ()
        self._path = Path(settings.api_key_file) if settings.api_key_file else None
        if settings.api_key is not None:
            self._from_setting = _digests(settings.api_key.get_secret_value().encode().split(b","))
            if not self._from_setting:
                raise ValueError("EMBEDDER_API_KEY holds no key; allowed: one, or several with commas between them")
        if self._path:
            self._stamp = _stamp(self._path)
            self._from_file = _read(self._path)

    @property
    def are_needed(self) -> bool:
        """Whether callers need a key."""
        return bool(self._from_setting or self._from_file)

    def open_for(self, headers: Headers) -> bool:
        """Whether no key is needed, or the headers hold one as `Authorization: Bearer` or `x-api-key`."""
        if self._path:
            self._read_again(self._path)
        known = (*self._from_setting, *self._from_file)
        matches = [hmac.compare_digest(one, other) for one in _digests(_presented(headers)) for other in known]
        return any(matches) or not known

    def _read_again(self, path: Path) -> None:
        """Read the file if it has changed. If it cannot be read, or is empty, the keys read before stay valid."""
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._from_file = _read(path)
        except ValueError as error:
            logger.error("%s; the keys read before it stay valid", error)
        else:
            logger.info("EMBEDDER_API_KEY_FILE has changed: %d keys", len(self._from_file))


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Values that change when the file is written or replaced; None if it does not exist."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def _read(path: Path) -> tuple[bytes, ...]:
    """Digests of the file's keys, one per line. Raises `ValueError` if there are none."""
    try:
        digests = _digests(path.read_bytes().splitlines())
    except OSError as error:
        raise ValueError(f"EMBEDDER_API_KEY_FILE={str(path)!r} cannot be read: {error.strerror}") from error
    if not digests:
        raise ValueError(
            f"EMBEDDER_API_KEY_FILE={str(path)!r} holds no key; allowed: one or more, each on its own line"
        )
    return digests


def _digests(keys: Iterable[bytes]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.strip()).digest() for key in keys if key.strip())


def _presented(headers: Headers) -> Iterator[bytes]:
    for name, value in headers:
        match name.lower():
            case b"x-api-key":
                yield value
            case b"authorization":
                scheme, _, key = value.strip().partition(b" ")
                if scheme.lower() == b"bearer":
                    yield key
