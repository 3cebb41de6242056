"""`python -m deploy.container_test`: builds the image from a clean clone and runs it as production should.

Prints a line for each thing that was shown, the image's size and how long it takes to start. Exits 1 where something
fails, and 0 with the reason where no container can be built. What is not committed is not in the image.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

import embedder
from deploy.build import ROOT, build, revision
from deploy.podman import RUN, missing, podman, prepare_build, workspace
from deploy.sbom import bill_of_materials
from embedder.http.openapi import EXAMPLES
from embedder.model.checkpoint import BUNDLED, PUBLISHED, PUBLISHED_REVISION

IMAGE = f"localhost/container-test:{embedder.__version__}"
WITH_MODEL = "localhost/container-test:with-model"
HARDENED = ["--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp:mode=1777", "--cap-drop", "all"]
HARDENED += ["--security-opt", "no-new-privileges"]
MOUNTED = ["-v", f"{BUNDLED}:/model:ro", "-e", "EMBEDDER_MODEL=/model"]
UNLISTED = ("/livez", "/readyz", "/metrics", "/docs.json", "/playground", "/")  # routes that /openapi.json leaves out
MAX_BYTES = 1_800_000_000  # with torch's CPU build
NOT_IN_THE_IMAGE = """
    for tool in cc c++ gcc g++ clang make nvcc rustc cargo git; do command -v $tool; done
    find / -xdev -path /proc -prune -o '(' -path '/root/.cache/*' -o -name 'tests' -path '/home/*' -o -name 'training' \
        -path '/home/*' -o -name default_model -o -path '/tmp/*' -o -name '*.safetensors' ')' -print
"""


@contextlib.contextmanager
def container(image: str, *options: str) -> Iterator[tuple[str, httpx.Client]]:
    """A container that answers /readyz, by its id, and a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    listen = ["-e", "BENTOML_HOST=127.0.0.1", "-e", f"BENTOML_PORT={port}"]
    name = podman(*RUN, "--detach", *HARDENED, *listen, *options, image)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + 300
            while not is_ready(client):
                if time.monotonic() > deadline or state(name, "Running") != "true":
                    raise SystemExit(f"FAILED: not ready\n{logs(name)}")
                time.sleep(0.2)
            yield name, client
    finally:
        podman("rm", "--force", "--time", "0", name)


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def state(name: str, field: str) -> str:
    return podman("inspect", name, "--format", f"{{{{.State.{field}}}}}")


def logs(name: str) -> str:
    run = subprocess.run(["podman", "logs", name], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def require(is_so: bool, fact: str, otherwise: object = "") -> None:
    """Print the fact, or end with what was found in its place."""
    if not is_so:
        raise SystemExit(f"FAILED: {fact}: {otherwise}")
    print(f"ok: {fact}", flush=True)


def check_image() -> None:
    facts = json.loads(podman("image", "inspect", IMAGE))[0]
    require(facts["User"] == "bentoml", "the image's user is not root", facts["User"])
    wanted = {"version": embedder.__version__, "revision": revision(ROOT).removesuffix("-dirty")}
    labels = {name: facts["Labels"].get(f"org.opencontainers.image.{name}") for name in wanted}
    require(labels == wanted, "labels say version and commit", labels)
    found = podman(*RUN, "--rm", "--user", "root", "--entrypoint", "bash", IMAGE, "-c", NOT_IN_THE_IMAGE, check=False)
    require(not found, "no compilers, caches, tests, training data or weights are in the image", found)
    require(facts["Size"] < MAX_BYTES, f"the image has {facts['Size'] / 1e6:,.0f} MB", f"over {MAX_BYTES:,}")


def check_routes() -> None:
    started = time.monotonic()
    with container(IMAGE, *MOUNTED) as (name, client):
        print(f"ready after {time.monotonic() - started:.1f} s, read-only, without capabilities, on this machine")
        require(podman("exec", name, "id", "-u") == "1034", "it runs as user 1034")
        paths = client.get("/openapi.json").json()["paths"]
        paths |= {path: ["get"] for path in UNLISTED}
        for path, operations in paths.items():
            for method in operations:
                bodies = list(EXAMPLES.get(path, {"": None}).values())
                statuses = [client.request(method, path, json=body).status_code for body in bodies]
                require(set(statuses) == {200}, f"{method.upper()} {path} answers", statuses)
        podman("stop", "--time", "30", name)
        require(state(name, "ExitCode") == "0", "SIGTERM ends it with status 0", logs(name))


def check_models(folder: Path) -> None:
    snapshot = folder / f"cache/huggingface/hub/models--{PUBLISHED.replace('/', '--')}/snapshots/{PUBLISHED_REVISION}"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to("/model")
    offline = ["-v", f"{BUNDLED}:/model:ro", "-v", f"{folder}/cache:/cache:ro", "-e", "HF_HUB_OFFLINE=1"]
    with container(IMAGE, *offline) as (_, client):
        info = client.get("/info").json()
    require(info["revision"] == PUBLISHED_REVISION, "the pinned 2B is served from a mounted cache, offline", info)

    podman(
        "build",
        "-f",
        str(ROOT / "deploy/Containerfile.model"),
        "--build-arg",
        f"IMAGE={IMAGE}",
        "-t",
        WITH_MODEL,
        str(BUNDLED),
    )
    with container(WITH_MODEL) as (_, client):
        info = client.get("/info").json()
    require(info["model"] == "/model", "a model is served from a layer of the image", info)

    command = ["podman", *RUN, "--rm", *HARDENED, "-e", "HF_HUB_OFFLINE=1", IMAGE]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    output = run.stdout + run.stderr
    require(run.returncode != 0 and "set EMBEDDER_MODEL to its folder" in output, "without a model it ends", output)


def check_death() -> None:
    """BentoML replaces no worker in a container: the container must end, for the orchestrator to start another."""
    with container(IMAGE, *MOUNTED) as (name, client):
        kill = "import psutil; psutil.Process(1).children()[0].kill()"
        podman("exec", name, "python", "-c", kill)
        killed = time.monotonic()
        answers = set()
        while state(name, "Running") == "true" and time.monotonic() < killed + 60:
            answers.add(is_ready(client))
            time.sleep(0.2)
        seconds = time.monotonic() - killed
        status = state(name, "ExitCode")
        require(answers == {False}, "after its worker was killed the container is not ready", answers)
        require(status not in ("", "0"), f"it ended {seconds:.0f} s after that with status {status}", logs(name))


def check_sbom() -> None:
    parts = bill_of_materials(IMAGE, ["podman", *RUN])["components"]
    by_name = {part["name"]: part for part in parts}
    require({"torch", "bentoml", "libc6"} <= by_name.keys(), f"the bill of materials lists {len(parts)} packages")
    require("licenses" in by_name["bentoml"] and "cyclonedx-bom" not in by_name, "licenses, too, and not its own tool")


def main() -> None:
    if reason := missing():
        print(f"not tested: {reason}", file=sys.stderr)
        sys.exit(2)
    with workspace() as folder:
        began = time.monotonic()
        options = prepare_build(folder)
        subprocess.run(["git", "clone", "--quiet", ROOT, folder / "clone"], check=True)
        os.environ["CONTAINERS_CONF"] = str(folder / "containers.conf")
        build(folder / "clone", IMAGE, "podman", options)
        del os.environ["CONTAINERS_CONF"]
        print(f"built in {time.monotonic() - began:.0f} s", flush=True)
        check_image()
        check_routes()
        check_models(folder)
        check_death()
        check_sbom()


if __name__ == "__main__":
    main()
