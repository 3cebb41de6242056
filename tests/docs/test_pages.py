"""Links lead somewhere, names are the code's, generated parts and log lines are up to date."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import httpx
import pytest

from docs import generate
from embedder.settings import Settings
from embedder.telemetry.metrics import Metrics
from tests.conftest import ROOT, Server
from tests.docs.markdown import DOCS, PAGES, anchors, blocks, prose

SOURCES = [ROOT / "service.py", *sorted((ROOT / "embedder").rglob("*.py"))]
SHORTEST_MESSAGE = len("bug: %s %s failed")
FOLDERS = {  # paths in prose that are no routes
    *("/cache", "/tmp", "/model", "/models", "/keys", "/v1", "/dev", "/opt"),
}


def every(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


@every(generate.PAGES)
def test_generated_parts_are_what_the_code_and_the_records_give(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert generate.rendered(text, generate.way_to_root(page)) == text, "run python docs/generate.py"


@every([*PAGES, ROOT / "CHANGELOG.md"])
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", index)}
    assert set(DOCS) - linked == {ROOT / "docs" / "README.md"}


def test_readme_is_two_screens_long() -> None:
    """What takes more words has a page in docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


@every(PAGES)
def test_names_of_settings_metrics_and_files_are_those_of_the_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    settings = {f"EMBEDDER_{name.upper()}" for name in Settings.model_fields} | {"EMBEDDER_MODLE"}  # a typing mistake
    assert set(re.findall(r"\bEMBEDDER_[A-Z_]*[A-Z]\b", text)) <= settings
    metrics = set(re.findall(r"`(embedder_\w+)`", Metrics(()).table()))
    assert set(re.findall(r"`(embedder_\w+?)(?:_bucket|_sum)?`", text)) <= metrics
    for path in re.findall(r"`((?:embedder|tests|docs|deploy|benchmarks|training)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_routes_in_the_pages_exist(small_server: Server) -> None:
    mentioned = {
        route
        for page in PAGES
        for route in re.findall(r"`(?:GET |POST )?(/[a-z0-9_./]+)`", prose(page))
        if not any(route == folder or route.startswith(f"{folder}/") for folder in FOLDERS - {"/v1"}) and route != "/v1"
    }
    assert {"/txt/embed", "/v1/embeddings", "/metrics"} <= mentioned
    with httpx.Client(base_url=small_server.url, timeout=60) as client:
        assert {route for route in mentioned if client.get(route).status_code == 404} == set()


def test_log_lines_are_those_of_the_code() -> None:
    messages = fixed_parts()
    lines = [
        line
        for page in PAGES
        for block in blocks(page)
        if block.mark == "log"
        for line in block.text.removeprefix("the service does not start: ").splitlines()
        if line
    ]
    assert len(lines) > 10
    unknown = [line for line in lines if not any(has_in_order(line, parts) for parts in messages)]
    assert not unknown


def has_in_order(line: str, parts: Iterable[str]) -> bool:
    place = 0
    for part in parts:
        place = line.find(part, place) + len(part)
        if place < len(part):
            return False
    return True


def fixed_parts() -> list[list[str]]:
    """Each longer text of the code, without its values."""
    messages = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = [node] if isinstance(node, ast.Constant) else node.values if isinstance(node, ast.JoinedStr) else []
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            known = [text for text in texts if isinstance(text, str)]
            if sum(len(text) for text in known) >= SHORTEST_MESSAGE:
                words = (re.sub(r"%[a-z.0-9]+", "\0", text) if isinstance(text, str) else "\0" for text in texts)
                messages.append("".join(words).split("\0"))
    return messages


@every(PAGES)
def test_text_is_plain_and_american(page: Path) -> None:
    banned = r"\b(colour|behaviour|licence|neighbour|whoever|of ours|is told|room for|can be had|mend|hold up)\b"
    assert re.findall(banned, prose(page), re.IGNORECASE) == []
