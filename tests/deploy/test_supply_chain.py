"""Bills of materials, licenses, known vulnerabilities and newest versions of the locked packages."""

from __future__ import annotations

import json
from importlib.metadata import distributions
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.audit import audit, read_result
from deploy.lock import CPU_LOCK, CUDA_LOCK, locked_versions
from deploy.newest import differences, held_back
from deploy.sbom import UNKNOWN, bill_of_lock, license_of, licenses_table, write_bills


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"license_expression": "Apache-2.0 OR MIT", "license": "see the file"}, "Apache-2.0 OR MIT"),
        ({"license_expression": "LicenseRef-NVIDIA-Proprietary"}, "LicenseRef-NVIDIA-Proprietary"),
        ({"license": "mit"}, "MIT"),
        ({"license": "MPL-2.0 AND MIT", "classifier": ["License :: OSI Approved :: MIT License"]}, "MPL-2.0 AND MIT"),
        ({"license": "Apache 2.0", "classifier": ["License :: OSI Approved :: Apache Software License"]}, "Apache-2.0"),
        ({"license": "", "classifier": ["License :: OSI Approved :: BSD License"]}, "BSD License"),
        ({"license": "Their License\n\nPermission is hereby..", "classifier": ["Topic :: Text"]}, "Their License"),
        ({"license": "Vendor", "classifier": ["License :: Other/Proprietary License"]}, "Vendor"),
        ({"classifier": []}, UNKNOWN),
    ],
)
def test_license_is_an_spdx_expression_where_the_metadata_has_one(metadata: dict[str, Any], expected: str) -> None:
    assert license_of(metadata) == expected


@pytest.mark.slow
def test_bill_has_each_locked_package_with_license_and_hashes() -> None:
    """The real tool, on the lock of the packages that only the CUDA image has. The document is validated."""
    locked = locked_versions(CUDA_LOCK)
    document = bill_of_lock([CUDA_LOCK], dict.fromkeys(locked, "LicenseRef-Test") | {"triton": "MIT"})
    parts = {part["name"]: part for part in document["components"]}
    assert {name: part["version"] for name, part in parts.items()} == locked
    assert parts["triton"]["licenses"] == [{"expression": "MIT"}]
    assert parts["nvidia-cublas"]["licenses"] == [{"license": {"name": "LicenseRef-Test"}}]
    assert all("hashes" in json.dumps(part["externalReferences"]) for part in parts.values())
    table = licenses_table({"cpu": {"components": []}, "cuda": document})
    assert f"| MIT | triton | {locked['triton']} | cuda |" in table


@pytest.mark.slow
def test_each_locked_package_states_a_license(tmp_path: Any) -> None:
    """Asks the package index."""
    assert write_bills(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.cdx.json", "cuda.cdx.json", "licenses.md"}


VERSIONS = {"one": "1.0", "two": "2.0"}
KNOWN = {"name": "one", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
CLEAN = [{"name": name, "version": version, "vulns": []} for name, version in VERSIONS.items()]
SKIPPED = {"name": "two", "skip_reason": "Dependency not found on PyPI and could not be audited: two (2.0)"}


@pytest.mark.parametrize(
    ("packages", "status", "text"),
    [
        (CLEAN, 0, "2 packages checked, 0 known vulnerabilities"),
        ([KNOWN, CLEAN[1]], 1, "one 1.0: PYSEC-1, fixed in 1.1"),
        ([KNOWN, SKIPPED], 1, "NOT CHECKED: 1 of 2 packages (two)"),
        ([CLEAN[0], SKIPPED], 2, "1 packages checked"),
        ([SKIPPED], 2, "NOT CHECKED: 2 of 2 packages (one, two)"),
    ],
)
def test_audit_does_not_pass_packages_that_were_not_checked(packages: list[Any], status: int, text: str) -> None:
    result = read_result(json.dumps({"dependencies": packages}), "", VERSIONS)
    assert result.status == status
    assert text in str(result)


def test_audit_names_the_reason_if_pip_audit_fails() -> None:
    result = read_result("", "Traceback\nConnectionError: no route to the database\n", VERSIONS)
    assert (result.status, result.unchecked) == (2, ("one", "two"))
    assert str(result).endswith("ConnectionError: no route to the database")


def test_audit_of_a_package_that_no_index_knows_is_not_a_pass() -> None:
    """The real pip-audit, with or without a network."""
    assert audit({"a-package-that-nobody-has-published": "0.0.1"}).status == 2


def test_newest_versions_are_compared_with_the_lock() -> None:
    locked = locked_versions(CPU_LOCK)
    assert differences(locked, {**locked, "torch": f"{locked['torch']}+cpu"}) == []
    newer = differences(locked, {**locked, "pillow": "99.0"})
    assert newer == [f"pillow: locked {locked['pillow']}, newest 99.0"]


def test_packages_that_the_tests_hold_back_are_named() -> None:
    tested = {"typer": "0.27", "torch": "2.13+cpu", "pytest": "9"}
    assert held_back({"typer": "0.27", "torch": "2.13", "nvidia-nccl": "2"}, tested) == []
    assert held_back({"typer": "0.29"}, tested) == ["typer: newest 0.29, but 0.27 with the packages of the tests"]


def test_locked_versions_are_those_that_the_packages_of_the_tests_allow() -> None:
    """Otherwise the image would have versions with which the tests cannot run."""
    locked = {canonicalize_name(name): version for name, version in locked_versions(CPU_LOCK).items()}
    wrong = []
    for package in distributions():
        for requirement in map(Requirement, package.requires or ()):
            version = locked.get(canonicalize_name(requirement.name))
            is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if version and is_needed and not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{package.name} needs {requirement}, {version} is locked")
    assert not wrong
