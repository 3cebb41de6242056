"""Names of routes, as labels of metrics and as names of spans: templates, of which there are few."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope

_PARAMETER = re.compile(r"\\\{\w+\\\}")  # `{model}`, after `re.escape`


def named_path(scope: Scope) -> str:
    """The path by which the name of a request is looked up: none for the page at `/`, unlike for `POST /`."""
    return "" if scope["path"] == "/" and scope["method"] != "POST" else scope["path"]


class RouteNames:
    """Finds the template of a path. `templates`: paths, with parameters such as `{model}` that may hold slashes."""

    def __init__(self, templates: Collection[str]) -> None:
        self.templates = tuple(templates)
        self._fixed = frozenset(one for one in templates if "{" not in one)
        self._patterns = [
            (re.compile(_PARAMETER.sub(".+", re.escape(one)), re.DOTALL), one) for one in templates if "{" in one
        ]

    def of(self, path: str) -> str | None:
        """The template of a path, with or without slashes at its end; None if there is none."""
        path = path.rstrip("/") or path[:1]
        if path in self._fixed:
            return path
        return next((template for pattern, template in self._patterns if pattern.fullmatch(path)), None)
