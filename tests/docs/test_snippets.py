"""What README.md and docs/ show is what happens: commands and snippets run, requests get the responses shown."""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest
import yaml

from tests.conftest import ROOT, Server
from tests.docs.markdown import PAGES, Block, blocks

BLOCKS = {page: blocks(page) for page in PAGES}
REASONS = {
    "needs docker",
    "needs podman",
    "needs a cluster",
    "needs a GPU",
    "needs the hub",
    "needs the 8B",
    "needs a host to fetch from",
    "takes minutes",
    "tests/docs/test_install.py runs it",
}
SET_UP = "python3 -m venv"  # commands that install: tests/docs/test_install.py, and CI itself
VOLATILE = {"attention", "created", "unix", "version"}  # differ by machine, from run to run, or with each release


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone, for commands that write files."""
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    return tmp_path


SLOW_PAGES = {
    ROOT / "docs" / page
    for page in (
        "operations/troubleshooting.md",
        "guides/search-your-pictures.md",
        "guides/rerank-search-results.md",
        "guides/clients.md",
    )
}
RERANKING_PAGES = {
    ROOT / "docs" / page for page in ("api/bentoml.md", "api/rerank.md", "guides/rerank-search-results.md")
}


@pytest.fixture
def page_server(page: Path, small_server: Server, request: pytest.FixtureRequest) -> Server:
    """What `localhost:3000` is on the page: the service as the quickstart starts it, or with a reranker."""
    if page not in RERANKING_PAGES:
        return small_server
    pair: Server = request.getfixturevalue("bundled_pair_server")
    return pair


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page in SLOW_PAGES else page for page in PAGES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_blocks_of_a_page_do_what_it_says(
    page: Path, clone: Path, page_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, as a reader would: later blocks use the files of earlier ones."""
    monkeypatch.chdir(clone)
    answer = (0, "")
    for block, following in itertools.zip_longest(BLOCKS[page], BLOCKS[page][1:]):
        if block.reason or (block.language == "sh" and SET_UP in block.text):
            continue
        if block.mark.startswith("request: "):
            answer = send(block, page_server)
            shows_response = following is not None and following.mark.startswith("response")
            assert shows_response or answer[0] == 200, f"{block}: got {answer}"
        elif block.mark.startswith("response"):
            check_response(block, *answer)
        elif block.language == "sh":
            answer = (200, run_command(block, page_server))
        elif block.language == "python":
            check_printed(block, run_python(block, page_server))
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)


def run_command(block: Block, server: Server) -> str:
    """Output of a command that asks `localhost:3000`, which is the test's server here."""
    command = block.text.replace("localhost:3000", server.url.removeprefix("http://"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDDER_")}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block}: {done.stderr}"
    return done.stdout


def run_python(block: Block, server: Server) -> str:
    """Output of a program, run in this process: importing the clients takes longer than all requests together."""
    program = compile(block.text.replace("http://localhost:3000", server.url), str(block), "exec")
    output = io.StringIO()
    with contextlib.redirect_stdout(output), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # snippets leave it to the end of the program to close clients
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(program, names)  # what the documentation shows
        names.clear()
        gc.collect()
    return output.getvalue()


def send(block: Block, server: Server) -> tuple[int, str]:
    method, path = block.mark.removeprefix("request: ").split()
    picture = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    body = json.loads(block.text.replace("<base64>", base64.b64encode(picture.getvalue()).decode()))
    response = httpx.request(method, f"{server.url}{path}", json=body, timeout=60)
    return response.status_code, response.text


def check_response(block: Block, status: int, text: str) -> None:
    expected = block.mark.removeprefix("response").removeprefix(": ") or "200"
    assert status == int(expected), f"{block}: got {status} {text[:300]}"
    got = json.loads(text)
    assert is_as_shown(json.loads(block.text), got), f"{block}: got {shortened(got)}"


def is_as_shown(shown: Any, got: Any, name: str = "") -> bool:
    """Whether a response is the one that is shown, where "..." stands for what is left out."""
    if name in VOLATILE:
        return type(shown) is type(got)
    if isinstance(shown, dict):
        return (
            isinstance(got, dict)
            and list(shown) == list(got)
            and all(is_as_shown(shown[key], got[key], key) for key in shown)
        )
    if isinstance(shown, list):
        if not isinstance(got, list):
            return False
        if shown and shown[-1] == "...":
            shown, got = shown[:-1], got[: len(shown) - 1]
        return len(shown) == len(got) and all(map(is_as_shown, shown, got))
    if isinstance(shown, str):
        pattern = re.escape(shown).replace(re.escape("..."), ".*")
        return isinstance(got, str) and re.fullmatch(pattern, got, re.DOTALL) is not None
    if isinstance(shown, float):
        return isinstance(got, int | float) and math.isclose(shown, got, abs_tol=2e-3)
    return bool(shown == got)


def shortened(got: Any) -> str:
    """A response with long lists of numbers cut."""
    return re.sub(r"((?:-?\d[\d.e-]*, ){3})(?:-?\d[\d.e-]*, )+-?\d[\d.e-]*", r'\1"..."', json.dumps(got))


def check_printed(block: Block, output: str) -> None:
    """What follows `#` in the line of a `print` is what it prints, numbers to two digits."""
    promised = " ".join(re.findall(r"^ *print\(.*  # (.+)$", block.text, re.MULTILINE)).split()
    printed = output.split()
    assert promised, f"{block}: the snippet prints nothing that could be compared"
    assert len(promised) == len(printed), f"{block}: got {output}"
    for shown, got in zip(promised, printed, strict=True):
        assert shown == got or math.isclose(number(shown), number(got), abs_tol=0.011), f"{block}: got {output}"


def number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def test_blocks_that_are_not_run_say_why_and_are_the_minority() -> None:
    every = [block for of_page in BLOCKS.values() for block in of_page if block.language in ("sh", "python", "json")]
    skipped = Counter(block.reason for block in every if block.reason)
    unknown = [reason for reason in skipped if reason not in REASONS and not names_a_test(reason)]
    assert not unknown
    assert skipped.total() <= len(every) / 3, skipped


def names_a_test(reason: str) -> bool:
    """`covered by tests/..py`, for what another test runs."""
    return any((ROOT / path).is_file() for path in re.findall(r"tests/\S+\.py", reason))


def test_every_request_shows_its_response() -> None:
    """On the API pages."""
    for of_page in BLOCKS.values():
        for block, following in itertools.pairwise(of_page):
            if block.mark.startswith("request: ") and block.page.parent.name == "api":
                assert following.mark.startswith("response"), str(block)
