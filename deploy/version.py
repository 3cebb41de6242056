"""Write `embedder.__version__` to every file that states the version: `python -m deploy.version`.

The changelog is not one of them: its heading and date are written by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

import embedder

ROOT = Path(__file__).parents[1]
NUMBER = r"\d+\.\d+\.\d+"
STATED = {  # what is before the version, by the files that state it
    r"qwen3-vl-embedding:": (
        "deploy/README.md",
        "deploy/Containerfile.model",
        "deploy/compose.yaml",
        "docs/operations/deploy.md",
    ),
    r"newTag: ": ("deploy/kubernetes/base/kustomization.yaml",),
    r'^(?:appVersion: "|version: )': ("deploy/helm/qwen3-vl-embedding/Chart.yaml",),
    r'^  "version": "': ("docs/api/probes-and-info.md",),
}


def stated(root: Path, version: str) -> dict[Path, str]:
    """The files that state the version, and the text that each of them should have."""
    texts: dict[Path, str] = {}
    for before, names in STATED.items():
        for path in (root / name for name in names):
            text = texts.get(path) or path.read_text(encoding="utf-8")
            texts[path], count = re.subn(f"({before}){NUMBER}", rf"\g<1>{version}", text, flags=re.MULTILINE)
            if not count:
                raise ValueError(f"{path} does not state the version after {before!r}")
    return texts


def main() -> None:
    for path, text in stated(ROOT, embedder.__version__).items():
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: {embedder.__version__}")


if __name__ == "__main__":
    main()
