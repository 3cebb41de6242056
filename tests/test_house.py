"""Rules of the code that can be read from its sources: which folder imports which, sizes, and a few bans."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import embedder
from tests.conftest import ROOT

PACKAGE = Path(embedder.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def trees() -> dict[Path, ast.Module]:
    """The syntax tree of each file, parsed in the process that runs these tests."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*FILES, ROOT / "service.py"]}


EVERYWHERE = {"errors", "settings", "torchvision_shim"}
MAY_IMPORT = {  # folder or module of the package -> which others it may import
    "errors": set(),
    "settings": set(),
    "torchvision_shim": set(),
    "inputs": set(),
    "engine": {"inputs"},
    "model": {"inputs"},
    "telemetry": {"engine", "inputs"},
    "loaded_model": {"engine", "inputs", "model"},
    "models": {"engine", "inputs", "loaded_model", "model"},
    "embedder": {"engine", "inputs", "models"},
    "reranker": {"engine", "inputs", "models"},
    "playground": {"engine", "inputs"},
    "http": {"documents", "engine", "inputs", "playground", "telemetry"},
    "server": {"http", "inputs", "telemetry"},
    "documents": {"inputs"},
    "bulk": {"documents", "embedder", "engine", "inputs", "model"},
    "search": {
        *{"__init__", "bulk", "documents", "embedder", "engine", "http", "inputs", "model", "models", "playground"},
        *{"reranker", "telemetry"},
    },
    "verify": {"embedder", "engine", "http", "inputs", "model", "reranker"},
    "doctor": {"http", "inputs", "model", "playground", "server"},
    "__init__": {"embedder", "reranker"},
}
ONLY_IN = {  # outside packages that only one folder may import
    "av": {"inputs"},
    "bentoml": {"server"},
    "circus": {"server"},
    "click": {"server"},
    "uvicorn": {"search", "server"},
    "httptools": {"server"},
    "httpcore": {"inputs"},
    "prometheus_client": {"telemetry"},
    "pypdfium2": {"documents"},
    "opentelemetry": {"telemetry"},
    "ray": {"bulk"},
    "torch": {"doctor", "inputs", "loaded_model", "model", "models", "torchvision_shim", "verify"},
    "transformers": {"model", "verify"},
}
WITHOUT_INDEX = {"playground", "server", "telemetry"}  # one line says what they are; `server` has a ledger
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_SERVICE_LINES = 400, 60, 200


def folder(path: Path) -> str:
    """`embedder/inputs/image.py` -> inputs; `embedder/errors.py` -> errors."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names that a module imports, for the type checker too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_folder_imports_only_the_folders_below_it() -> None:
    assert {folder(path) for path in FILES} == set(MAY_IMPORT)
    wrong = set()
    for path in FILES:
        for name in imported(trees()[path]):
            root, _, rest = name.partition(".")
            target = rest.partition(".")[0] or "__init__"
            if root == "embedder" and target in MAY_IMPORT:
                allowed = MAY_IMPORT[folder(path)] | EVERYWHERE | {folder(path)}
                if target not in allowed:
                    wrong.add((str(path.relative_to(ROOT)), name))
    assert not wrong


def test_internals_of_other_packages_stay_in_their_folder() -> None:
    wrong = {
        (str(path.relative_to(ROOT)), name)
        for path in FILES
        for name in imported(trees()[path])
        if folder(path) not in ONLY_IN.get(name.partition(".")[0], {folder(path)})
    }
    assert not wrong


def test_what_is_imported_directly_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    declared = {re.split(r"[\[<>=; ]", one)[0].lower().replace("_", "-") for one in needed}
    packages = packages_distributions()
    missing = set()
    for tree in trees().values():
        for name in {name.partition(".")[0] for name in imported(tree)} - set(sys.stdlib_module_names) - {"embedder"}:
            distributions = {one.lower().replace("_", "-") for one in packages.get(name, [name])}
            if not distributions & declared:
                missing.add(name)
    assert missing <= {"flash_attn", "lance"}  # flash-attn is optional; lance is pylance's module


def test_modules_and_functions_stay_small() -> None:
    large = {
        str(path.relative_to(ROOT)): count
        for path, limit in [*((path, MAX_MODULE_LINES) for path in FILES), (ROOT / "service.py", MAX_SERVICE_LINES)]
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > limit
    }
    assert not large
    long = {
        (str(path.relative_to(ROOT)), node.name)
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    }
    assert not long - {("embedder/http/openapi.py", "_items")}  # a table


def test_index_of_a_package_names_every_module() -> None:
    """A module counts if it begins a line, also in a list such as `tei, voyage`, or if it is in backticks."""
    missing = set()
    for init in PACKAGE.rglob("__init__.py"):
        index = ast.get_docstring(trees()[init]) or ""
        lists = re.findall(r"^ *(\w+(?:, \w+)*)", index, re.MULTILINE)
        named = {name for line in lists for name in line.split(", ")} | set(re.findall(r"`(\w+)/?`", index))
        modules = {path.stem for path in init.parent.glob("*.py")} - {"__init__", "__main__"}
        packages = {path.parent.name for path in init.parent.glob("*/__init__.py")}
        if folder(init) not in WITHOUT_INDEX:
            missing |= {(str(init.relative_to(ROOT)), name) for name in (modules | packages) - named}
    assert not missing


def test_coined_names_are_not_used_again() -> None:
    coined = (
        "Journey JOURNEYS Flight Twins Room Edge CountRequests Front awaiting to_keep accounts wire_vector of_item "
        "is_embedded_model as_it_is"
    )
    pattern = re.compile(rf"\b_?(?:{'|'.join(coined.split())})\b")
    found = {
        (str(path.relative_to(ROOT)), name)
        for path, tree in trees().items()
        for name in pattern.findall(ast.unparse(tree))
    }
    assert not found


def test_exception_is_caught_whole_only_at_the_top_of_a_request_a_start_or_a_batch() -> None:
    catchers = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for node in ast.walk(trees()[path])
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    }
    allowed = {"http/boundary.py", "server/adaptive_batching.py", "server/lifecycle.py"}
    allowed |= {"inputs/tokenizer_files.py"}  # tokenizers raises no class of its own for a file that it cannot read
    allowed |= {"bulk/actors.py"}  # Ray neither if its processes do not answer
    allowed |= {"http/batches/runner.py"}  # a line is a request
    allowed |= {"model/halves.py"}  # passes on what a thread raises
    assert {one for one in catchers if not one.startswith("engine/")} <= allowed


def test_environment_is_read_by_settings_and_for_other_packages_variables_only() -> None:
    """`checkpoint` reads Hugging Face's, `bulk` sets Ray's, `__init__` OpenMP's and torch's."""
    readers = {
        folder(path)
        for path in FILES
        for node in ast.walk(trees()[path])
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"}
    }
    assert readers <= {"settings", "model", "bulk", "__init__"}


def test_wall_clock_is_not_read() -> None:
    """It can jump, so deadlines use the monotonic clock. Times of OpenAI's batches have to outlast a restart."""
    readers = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for node in ast.walk(trees()[path])
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("time.time", "datetime.now", "datetime.datetime.now", "datetime.utcnow")
    }
    assert readers == {"http/batches/store.py"}


def test_ledger_of_tricks_names_code_and_tests_that_exist() -> None:
    ledger = ast.get_docstring(trees()[PACKAGE / "server" / "__init__.py"]) or ""
    names = re.findall(r"^(\w+)\.(\w+)(?:, (\w+)\.(\w+))?$", ledger, re.MULTILINE)
    pairs = [pair for match in names for pair in (match[:2], match[2:]) if pair[0]]
    assert len(pairs) >= 9
    for module, name in pairs:
        tree = trees()[PACKAGE / "server" / f"{module}.py"]
        assert name in {getattr(node, "name", None) for node in tree.body}, (module, name)
    tests = re.findall(r"Test: (tests/[\w/]+\.py)", ledger)
    assert len(tests) == len(names)
    assert all((ROOT / path).is_file() for path in tests)


@pytest.mark.parametrize(
    "modules",
    ["embedder", "embedder.model.checkpoint, embedder.inputs.video, embedder.engine.engine"],
)
def test_light_imports_load_neither_torch_nor_transformers(modules: str) -> None:
    code = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'torchvision'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_parent_process_loads_no_numpy() -> None:
    """It answers no requests, and finds the model before the workers start."""
    code = "import sys, service; print('numpy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "False"


def test_loading_a_model_imports_neither_transformers_nor_torchs_compiler(random_checkpoint: Path) -> None:
    """Each takes seconds of every start."""
    code = (
        "import sys, torch; from pathlib import Path; from embedder.model.weights import load_model; "
        f"load_model(Path({str(random_checkpoint)!r}), torch.float32, torch.device('cpu')); "
        "print(sorted({'transformers', 'torchvision', 'torch._dynamo'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"
