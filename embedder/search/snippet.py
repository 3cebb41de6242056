"""The lines of a page's text layer that show best why the page was found."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")


def find_snippet(text: str, question: str, max_chars: int) -> str:
    """The line with most of the question's words, else the first line; shortened, and without control characters."""
    if found := find_lines(text, question, 1, max_chars):
        return found[0]
    return next((_shown(line, max_chars) for line in text.splitlines() if line.strip()), "")


def find_lines(text: str, question: str, max_lines: int, max_chars: int) -> list[str]:
    """The lines with most of the question's words, in the order of the text; none if no line has any."""
    wanted = {word.lower() for word in _WORD.findall(question)}
    counts = [
        (-len(wanted & {word.lower() for word in _WORD.findall(line)}), place, line)
        for place, line in enumerate(text.splitlines())
    ]
    best = sorted(found for found in counts if found[0])[:max_lines]  # the first of several equal ones
    return [_shown(line, max_chars) for _, _, line in sorted(best, key=lambda found: found[1])]


def printable(text: str) -> str:
    """The text with a question mark for each character that a terminal could obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _shown(line: str, max_chars: int) -> str:
    shown = printable(" ".join(line.split()))
    return shown if len(shown) <= max_chars else f"{shown[: max_chars - 1]}…"
