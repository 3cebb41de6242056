"""The rules of the house that can be read from the sources: who imports whom, and one door per outside library."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import embedder
import embedder.model

ROOT = Path(embedder.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Steps beside the path, and what they may import of it. Everything may import `torchvision_shim`.
AROUND = {
    "__init__": {"library"},
    "awaiting": {"engine", "errors", "postprocess", "request"},
    "budget": {"errors", "preprocess", "request", "settings"},
    "bulk": {"checkpoint", "errors", "library", "postprocess", "request", "settings"},
    "chat": {"errors", "request", "settings"},
    "checkpoint": {"settings", "errors"},
    "cohere": {"chat", "errors", "postprocess", "request", "response", "settings"},
    "connection": set(),
    "edge": {"errors", "keys", "lifecycle", "log", "openai", "response", "values"},
    "keys": {"settings"},
    "lifecycle": set(),
    "log": set(),
    "metrics": {"errors", "observer", "postprocess", "settings"},
    "native": {"errors", "postprocess", "request", "response", "settings"},
    "observer": {"postprocess", "preprocess", "request"},
    "openai": {"chat", "errors", "postprocess", "request", "response", "settings"},
    "openapi": {"chat", "cohere", "native", "openai", "request", "response", "settings"},
    "playground": {"awaiting", "engine", "errors", "media", "request", "response", "settings"},
    "random_checkpoint": set(),
    "torchvision_shim": set(),
    "tracing": {"observer", "settings"},
    "values": set(),
    "verify": {"chat", "errors", "library", "preprocess", "request"},
}

DOORS = {  # each outside library, and every module that imports it when it runs
    "PIL": {"budget", "library", "media", "playground", "verify"},
    "av": {"video"},
    "bentoml": {"lifecycle", "log"},  # and service.py
    "circus": {"lifecycle"},
    "click": {"lifecycle"},
    "flash_attn": {"model"},
    "httpcore": {"fetch"},
    "huggingface_hub": {"checkpoint", "random_checkpoint"},
    "lance": {"bulk"},
    "opentelemetry": {"tracing"},
    "orjson": {"bulk", "request", "response"},
    "prometheus_client": {"metrics"},
    "pyarrow": {"bulk"},
    "pybase64": {"media", "response"},
    "pydantic": {"address", "cohere", "log", "native", "openai", "openapi", "request", "response", "settings"},
    "qwen_vl_utils": {"media", "verify"},
    "ray": {"bulk"},
    "safetensors": {"model", "random_checkpoint"},
    "starlette": {"edge"},
    "tokenizers": {"preprocess", "random_checkpoint"},
    "tqdm": {"bulk"},
    "torch": {"library", "model", "packing", "pooling", "random_checkpoint", "torchvision_shim", "verify"},
    "transformers": {"model", "random_checkpoint", "verify"},
    "uvicorn": {"connection", "lifecycle"},
    # not outside, but each with a door: threads, and the futures that come from them
    "threading": {"engine", "media"},
    "concurrent": {"awaiting", "bulk", "engine", "fetch", "library"},
}


def module_name(path: Path) -> str:
    """`embedder/media.py` -> media; all of `embedder/model/` -> model."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def path_order() -> list[str]:
    """The steps in the order of the map in `embedder/__init__.py`."""
    text = (embedder.__doc__ or "").split("The path of an item", 1)[1]
    names = [match[1] for line in text.splitlines() if (match := re.match(r"    (\w[\w/, ]*?)/?  +\S", line))]
    return [name for group in names for name in group.split(", ")]


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from runtime_nodes(node)


def imported(node: ast.AST) -> Iterator[str]:
    """Full names of what an import statement names: `from embedder.inputs import image as media` -> embedder.media."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside_arrows() -> set[tuple[str, str]]:
    """(importer, imported) among our own modules, type checking included."""
    arrows = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in imported(node):
                parts = name.split(".")
                if parts[0] == "embedder":
                    arrows.add((module_name(path), parts[1]))
    return {(importer, name) for importer, name in arrows if importer != name}


def test_map_names_every_module_and_no_other() -> None:
    words = set(re.findall(r"`(\w+)`", (embedder.__doc__ or "").split("Around it:", 1)[1])) | set(path_order())
    modules = {module_name(path) for path in FILES} - {"__init__"}
    assert modules <= words
    assert set(path_order()) <= modules


def test_path_has_its_steps_in_the_order_an_item_walks_them() -> None:
    assert " ".join(path_order()) == (
        "settings errors request address fetch media video prompt preprocess cache scheduler packing model pooling "
        "postprocess response"
    )


def test_imports_point_up_the_path() -> None:
    order = path_order()
    allowed = {name: set(order[:index]) for index, name in enumerate(order)} | AROUND
    before_response = set(order[: order.index("response")])
    allowed["engine"] = before_response | {"observer"}
    allowed["library"] = before_response | {"budget", "checkpoint", "engine", "observer"}
    wrong = {
        (importer, name)
        for importer, name in inside_arrows()
        if name != "torchvision_shim" and name not in allowed[importer]
    }
    assert not wrong


def test_model_imports_point_up_its_own_path() -> None:
    order = re.findall(r"^(\w+)  +\S", embedder.model.__doc__ or "", flags=re.MULTILINE)
    assert set(order) == {path.stem for path in (ROOT / "model").glob("*.py")} - {"__init__"}
    for path in (ROOT / "model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in imported(node):
                if name.startswith("embedder.model."):
                    assert order.index(name.split(".")[2]) < order.index(path.stem), (path.stem, name)


def test_each_outside_library_has_its_door() -> None:
    doors: dict[str, set[str]] = {}
    for path in FILES:
        for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
            for name in imported(node):
                library = name.split(".")[0]
                if library in DOORS or library not in {*sys.stdlib_module_names, "embedder", "numpy"}:
                    doors.setdefault(library, set()).add(module_name(path))
    assert doors == DOORS


def test_environment_is_read_by_settings_and_checkpoint_alone() -> None:
    """And by `bulk`, which tells Ray something that Ray reads there."""
    readers = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else [name]
            if {"environ", "environb", "getenv"} & set(names):
                readers.add(module_name(path))
    assert readers == {"settings", "checkpoint", "bulk"}


def test_wall_clock_is_not_read() -> None:
    """It jumps; every deadline is of the monotonic clock."""
    readers = {
        module_name(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if ast.unparse(node) in ("time.time", "datetime.now", "datetime.datetime.now", "datetime.utcnow")
    }
    assert readers == set()


def test_exception_is_caught_whole_at_the_engines_boundary_alone() -> None:
    catchers = {
        module_name(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    }
    assert catchers == {"engine"}


@pytest.mark.parametrize(
    "modules",
    [
        "embedder",
        "embedder, embedder.model.checkpoint, embedder.inputs.items, embedder.engine.scheduler, embedder.inputs.prompt",
    ],
)
def test_light_imports_load_neither_torch_nor_transformers(modules: str) -> None:
    code = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'torchvision'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert run.stdout.strip() == "[]"
