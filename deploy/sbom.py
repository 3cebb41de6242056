"""Bills of materials in CycloneDX format, with licenses.

    python -m deploy.sbom lock FOLDER                   # of the CPU and the CUDA image, from the lock files
    python -m deploy.sbom image IMAGE > image.cdx.json  # of a built image, with the packages of its base

`lock` writes `cpu.cdx.json`, `cuda.cdx.json` and `licenses.md` to FOLDER, and asks the package index for the licenses.
It exits with status 1 if a package states none. In `image`, the CycloneDX tool runs inside the image, from a mounted
folder that is not part of the result; Debian packages are listed without licenses.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.spdx import fixup_id, is_expression
from cyclonedx.validation.json import JsonStrictValidator

import embedder
from deploy.lock import CPU_LOCK, CUDA_LOCK, HERE, locked_versions

TOOL = "cyclonedx-bom==7.5.0"
LOOK = """
import runpy, sys
sys.path.append("/tool")
sys.argv = ["cyclonedx-py", "environment", "--output-format", "JSON", "--output-reproducible", sys.executable]
runpy.run_module("cyclonedx_py", run_name="__main__")
"""
IMAGES = {"cpu": (CPU_LOCK,), "cuda": (CPU_LOCK, CUDA_LOCK)}
NOT_STATED = {"cuda-toolkit": "LicenseRef-NVIDIA-Proprietary"}  # an empty package that requires the libraries
UNKNOWN = "not stated"
SPDX_OF_CLASSIFIER = {
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
SCHEMA = SchemaVersion.V1_6

Document = dict[str, Any]


def bill_of_lock(names: Sequence[str], licenses: Mapping[str, str]) -> Document:
    """The CycloneDX document of the packages in the lock files `names`, with the license of each."""
    text = "".join((HERE / name).read_text(encoding="utf-8") for name in names)
    options = ["--output-reproducible", "--spec-version", SCHEMA.to_version(), "-"]
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", *options]
    run = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True)
    document: Document = json.loads(run.stdout)
    document["metadata"]["component"] = {
        "bom-ref": "root",
        "type": "application",
        "name": "qwen3-vl-embedding",
        "version": embedder.__version__,
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }
    for component in document["components"]:
        del component["description"]  # the line of the lock file
        component["licenses"] = [as_cyclonedx(licenses[component["name"]])]
    if fault := JsonStrictValidator(SCHEMA).validate_str(json.dumps(document)):
        raise ValueError(f"the document is not valid CycloneDX: {fault}")
    return document


def read_licenses(versions: Mapping[str, str]) -> dict[str, str]:
    """The license of each package by its name, as its metadata in the package index states it."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 29)]
    platforms += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
    wheels = ["--only-binary", ":all:", "--python-version", "3.11", *(f"--platform={name}" for name in platforms)]
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder) / "wanted.txt", Path(folder) / "report.json"
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--no-deps", *wheels]
        command = [*pip, "--target", folder, "--report", report, "-r", wanted]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    by_name = {normalized(metadata["name"]): license_of(metadata) for metadata in found}
    return {name: NOT_STATED.get(name, by_name[normalized(name)]) for name in versions}


def license_of(metadata: Mapping[str, Any]) -> str:
    """The license in a package's metadata: an SPDX expression if there is one, else the words of its author."""
    if expression := metadata.get("license_expression"):
        return str(expression)
    stated = str(metadata.get("license") or "").strip()
    if stated and is_expression(text := fixup_id(stated) or stated):
        return str(text)
    classifiers = [line for line in metadata.get("classifier", ()) if line.startswith("License :: ")]
    words = [line.rpartition(" :: ")[2] for line in classifiers]
    if words and set(words) <= SPDX_OF_CLASSIFIER.keys():
        return " OR ".join(SPDX_OF_CLASSIFIER[word] for word in words)
    return stated.partition("\n")[0].strip() or " OR ".join(words) or UNKNOWN


def as_cyclonedx(text: str) -> Document:
    return {"expression": text} if is_expression(text) else {"license": {"name": text}}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licenses_table(documents: Mapping[str, Document]) -> str:
    """The packages of all images as Markdown, by license."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for image, document in documents.items():
        for part in document["components"]:
            (entry,) = part["licenses"]
            text = entry.get("expression") or entry["license"]["name"]
            rows.setdefault((text, part["name"], part["version"]), []).append(image)
    lines = [f"# Licenses of the packages in the images, version {embedder.__version__}", ""]
    lines += ["| license | package | version | images |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} | {', '.join(images)} |" for row, images in sorted(rows.items())]
    return "\n".join(lines) + "\n"


def write_bills(folder: Path) -> list[str]:
    """Write the documents of both images. Returns the names of packages that state no license."""
    licenses = read_licenses(locked_versions(CPU_LOCK, CUDA_LOCK))
    documents = {image: bill_of_lock(names, licenses) for image, names in IMAGES.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for image, document in documents.items():
        (folder / f"{image}.cdx.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"{folder / image}.cdx.json: {len(document['components'])} packages")
    (folder / "licenses.md").write_text(licenses_table(documents), encoding="utf-8")
    print(f"{folder / 'licenses.md'}: {len(set(licenses.values()))} licenses")
    return sorted(name for name, text in licenses.items() if text == UNKNOWN)


def bill_of_image(image: str, engine: Sequence[str]) -> Document:
    """The CycloneDX document of `image`. `engine`: the command that runs a container, such as `docker run`."""
    with tempfile.TemporaryDirectory() as tool:
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-warn-conflicts", "--target", tool, TOOL]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        look = [*engine, "--rm", "--user", "root", "-v", f"{tool}:/tool:ro", "--entrypoint"]
        document: Document = json.loads(output_of([*look, "python", image, "-c", LOOK]))
        packages = output_of([*look, "dpkg-query", image, "--show", "--showformat", r"${Package} ${Version}\n"])
    for line in packages.splitlines():
        name, version = line.split()
        purl = f"pkg:deb/debian/{name}@{version}"
        document["components"].append(
            {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}
        )
    return document


def output_of(command: Sequence[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True)
    sources.add_parser("lock").add_argument("folder", type=Path)
    image = sources.add_parser("image")
    image.add_argument("image")
    image.add_argument("--engine", default="docker run", help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    if chosen.source == "image":
        json.dump(bill_of_image(chosen.image, chosen.engine.split()), sys.stdout, indent=1)
    elif unknown := write_bills(chosen.folder):
        raise SystemExit(f"without a license in their metadata: {', '.join(unknown)}. Add them to NOT_STATED")


if __name__ == "__main__":
    main()
