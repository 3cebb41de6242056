"""A podman of one's own: storage in a temporary folder, builds without a daemon, and a base image where no registry is.

The image under test is `bentoml containerize`'s. Only what it starts from may be a stand-in: Debian with Python and
pip, under the name of the production base, where that cannot be pulled.
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
STAND_IN_SETTINGS = {
    "etc/pip.conf": "[install]\nbreak-system-packages = true\n",
    "etc/uv/uv.toml": "system-certs = true\n",
}
# Builds need no OCI runtime; containers run by runc and with limits that it may set, for crun refuses some hosts.
RUN = ["--runtime", "runc", "run", "--ulimit", "nofile=4096:8192", "--ulimit", "nproc=4096:8192", "--network", "host"]


def missing() -> str:
    """Why no container can be built here, or nothing."""
    if os.geteuid() != 0:
        return "needs root: containers are built and run without a daemon or user namespaces"
    absent = [tool for tool in ("podman", "runc", "mmdebstrap") if shutil.which(tool) is None]
    return f"needs {', '.join(absent)}: apt-get install --no-install-recommends {' '.join(absent)}" if absent else ""


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A folder; while it is there, podman and BentoML keep everything they store inside it."""
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
    """What the command prints, or `CalledProcessError`."""
    run = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False)
    if check and run.returncode:
        print(run.stdout, run.stderr, file=sys.stderr)
        run.check_returncode()
    return run.stdout.strip()


def prepare_build(folder: Path) -> list[str]:
    """Base image, torch's wheel, and mounts for the time of the build alone; gives options for `deploy.build`.

    The image gets the build of torch that this environment has, and trusts what this machine trusts.
    """
    if not podman("pull", "--quiet", BASE, check=False):
        print(f"{BASE} cannot be pulled: the base is a stand-in made of Debian's packages", flush=True)
        make_stand_in(folder)
    trusted = ssl.get_default_verify_paths().cafile
    wheels = folder / "wheels"
    wheels.mkdir()
    torch = f"torch=={version('torch')}"
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, torch], check=True)
    mounts = [f"{wheels}:/mnt:ro"] + ([f"{trusted}:{trusted}:ro"] if trusted else [])
    (folder / "containers.conf").write_text(f"[containers]\nvolumes = {json.dumps(mounts)}\n")
    return ["build-arg=UV_FIND_LINKS=/mnt"]


def make_stand_in(folder: Path) -> None:
    """Python, pip and certificates of Debian, of the release and Python version of the production base."""
    hooks = []
    for name, text in STAND_IN_SETTINGS.items():
        source = folder / Path(name).name
        source.write_text(text)
        hooks += [
            f'--customize-hook=mkdir -p "$1/{Path(name).parent}"',
            f"--customize-hook=copy-in {source} /{Path(name).parent}",
        ]
    archive = str(folder / "base.tar")
    packages = "--include=python3,python3-pip,ca-certificates"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", packages, *hooks, "bookworm", archive], check=True)
    path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as the real one has it
    podman("import", "--quiet", "--change", path, archive, f"localhost/{BASE}")
    Path(archive).unlink()
