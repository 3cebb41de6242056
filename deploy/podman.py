"""podman for the container test: temporary storage, builds without a daemon, and a substitute base image.

The image under test is built by `bentoml containerize`. If the production base image cannot be pulled, a substitute
with the same name is built from Debian packages.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

BASE = "python:3.11-slim-bookworm"
SUBSTITUTE_FILES = {
    "etc/pip.conf": "[install]\nbreak-system-packages = true\n",
    "etc/uv/uv.toml": "system-certs = true\n",
}
# Containers run with runc, because crun fails on some hosts, and with limits that runc may set. Builds need no runtime.
RUN = ["--runtime", "runc", "run", "--ulimit", "nofile=4096:8192", "--ulimit", "nproc=4096:8192", "--network", "host"]


def missing() -> str:
    """The reason why no container can be built on this machine, or an empty string."""
    if os.geteuid() != 0:
        return "it needs root, because it uses neither a daemon nor user namespaces"
    absent = [tool for tool in ("podman", "runc", "mmdebstrap") if shutil.which(tool) is None]
    return f"it needs {', '.join(absent)}: apt-get install --no-install-recommends {' '.join(absent)}" if absent else ""


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder in which podman and BentoML store everything."""
    with tempfile.TemporaryDirectory(prefix="container-test-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        storage = f'[storage]\ndriver = "overlay"\nrunroot = "{name}/run"\ngraphroot = "{name}/storage"\n'
        (folder / "storage.conf").write_text(storage)
        os.environ |= {
            "CONTAINERS_STORAGE_CONF": f"{name}/storage.conf",
            "BENTOML_HOME": f"{name}/bentoml",
            "BENTOML_DO_NOT_TRACK": "True",
            "BUILDAH_ISOLATION": "chroot",
        }
        try:
            yield folder
        finally:
            podman("rm", "--all", "--force", "--time", "0", check=False)
            podman("rmi", "--all", "--force", check=False)


def podman(*arguments: str, check: bool = True) -> str:
    """Run podman and return its output. Raises `CalledProcessError`."""
    run = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False)
    if check and run.returncode:
        print(run.stdout, run.stderr, file=sys.stderr)
        run.check_returncode()
    return run.stdout.strip()


def prepare_build(folder: Path) -> list[str]:
    """Prepare the base image, torch's wheel and the build mounts. Returns options for `deploy.build`.

    The image gets the torch build of this environment. The build trusts the certificates of this machine.
    """
    if not podman("pull", "--quiet", BASE, check=False):
        print(f"{BASE} cannot be pulled; the test uses a substitute base built from Debian packages", flush=True)
        build_substitute(folder)
    trusted = ssl.get_default_verify_paths().cafile
    wheels = folder / "wheels"
    wheels.mkdir()
    torch = f"torch=={version('torch')}"
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, torch], check=True)
    mounts = [f"{wheels}:/mnt:ro"] + ([f"{trusted}:{trusted}:ro"] if trusted else [])
    (folder / "containers.conf").write_text(f"[containers]\nvolumes = {json.dumps(mounts)}\n")
    return ["build-arg=UV_FIND_LINKS=/mnt"]


def build_substitute(folder: Path) -> None:
    """Import a base image with Debian's Python, pip and certificates, of the same release as the production base."""
    hooks = []
    for name, text in SUBSTITUTE_FILES.items():
        source = folder / Path(name).name
        source.write_text(text)
        hooks += [
            f'--customize-hook=mkdir -p "$1/{Path(name).parent}"',
            f"--customize-hook=copy-in {source} /{Path(name).parent}",
        ]
    archive = str(folder / "base.tar")
    packages = "--include=python3,python3-pip,ca-certificates"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", packages, *hooks, "bookworm", archive], check=True)
    path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as in the production base
    podman("import", "--quiet", "--change", path, archive, f"localhost/{BASE}")
    Path(archive).unlink()
