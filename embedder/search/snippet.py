"""The line of a page's text layer that shows best why the page was found."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")


def find_snippet(text: str, question: str, max_chars: int) -> str:
    """The line with most of the question's words, else the first line; shortened, and without control characters."""
    wanted = {word.lower() for word in _WORD.findall(question)}
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    # the first of several equal ones
    best = max(lines, key=lambda line: len(wanted & {word.lower() for word in _WORD.findall(line)}))
    shown = printable(best)
    return shown if len(shown) <= max_chars else f"{shown[: max_chars - 1]}…"


def printable(text: str) -> str:
    """The text with a question mark for each character that a terminal could obey."""
    return "".join(character if character.isprintable() else "?" for character in text)
