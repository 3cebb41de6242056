"""Build the image from a clean clone, run it with production options, and check it: `python -m deploy.container_test`.

Prints one line per check, the image size and the start time. Exit status: 0 all checks passed, 1 a check failed, 2 this
machine cannot build containers. Uncommitted changes are not in the image.
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
from deploy.sbom import bill_of_image
from embedder.http.routes import EXAMPLES
from embedder.model.checkpoint import BUNDLED, PUBLISHED, PUBLISHED_REVISION

IMAGE = f"localhost/container-test:{embedder.__version__}"
WITH_MODEL = "localhost/container-test:with-model"
HARDENED = ["--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp:mode=1777", "--cap-drop", "all"]
HARDENED += ["--security-opt", "no-new-privileges"]
MOUNTED = ["-v", f"{BUNDLED}:/model:ro", "-e", "EMBEDDER_MODEL=/model"]
UNLISTED = ("/livez", "/readyz", "/metrics", "/docs.json", "/playground", "/")  # routes that are not in /openapi.json
MAX_BYTES = 1_800_000_000  # with torch's CPU build
NOT_IN_THE_IMAGE = """
    for tool in cc c++ gcc g++ clang make nvcc rustc cargo git; do command -v $tool; done
    find / -xdev -path /proc -prune -o '(' -path '/root/.cache/*' -o -name 'tests' -path '/home/*' -o -name 'training' \
        -path '/home/*' -o -name default_model -o -name default_reranker -o -path '/tmp/*' -o -name '*.safetensors' \
        ')' -print
"""


@contextlib.contextmanager
def container(image: str, *options: str, port_variable: str = "BENTOML_PORT") -> Iterator[tuple[str, httpx.Client]]:
    """Run a container until /readyz responds with 200; yield its id and an HTTP client."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    listen = ["-e", "BENTOML_HOST=127.0.0.1", "-e", f"{port_variable}={port}"]
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


def require(holds: bool, fact: str, found: object = "") -> None:
    """Print `fact` if it holds. Otherwise exit with what was found instead."""
    if not holds:
        raise SystemExit(f"FAILED: {fact}: {found}")
    print(f"ok: {fact}", flush=True)


def check_image() -> None:
    facts = json.loads(podman("image", "inspect", IMAGE))[0]
    require(facts["User"] == "bentoml", "the image does not run as root", facts["User"])
    wanted = {"version": embedder.__version__, "revision": revision(ROOT).removesuffix("-dirty")}
    labels = {name: facts["Labels"].get(f"org.opencontainers.image.{name}") for name in wanted}
    require(labels == wanted, "the labels contain version and commit", labels)
    found = podman(*RUN, "--rm", "--user", "root", "--entrypoint", "bash", IMAGE, "-c", NOT_IN_THE_IMAGE, check=False)
    require(not found, "the image contains no compilers, caches, tests, training data or weights", found)
    require(facts["Size"] < MAX_BYTES, f"the image has {facts['Size'] / 1e6:,.0f} MB", f"more than {MAX_BYTES:,} bytes")


def check_routes() -> None:
    started = time.monotonic()
    with container(IMAGE, *MOUNTED) as (name, client):
        print(f"ready after {time.monotonic() - started:.1f} s on this machine, read-only and without capabilities")
        require(podman("exec", name, "id", "-u") == "1034", "it runs as user 1034")
        paths = client.get("/openapi.json").json()["paths"]
        paths |= {path: ["get"] for path in UNLISTED}
        model = client.get("/v1/models").json()["data"][0]["id"]
        for path, operations in paths.items():
            for method in operations:
                url = path.replace("{id}", model)
                bodies = list(EXAMPLES.get(path, {"": None}).values())
                statuses = [client.request(method, url, json=body).status_code for body in bodies]
                require(set(statuses) == {200}, f"{method.upper()} {path} responds with 200", statuses)
        podman("stop", "--time", "30", name)
        require(state(name, "ExitCode") == "0", "the container exits with status 0 after SIGTERM", logs(name))


def check_vertex() -> None:
    route = "/v1/endpoints/1/deployedModels/2:predict"
    options = [*MOUNTED, "-e", f"AIP_PREDICT_ROUTE={route}"]
    with container(IMAGE, *options, port_variable="AIP_HTTP_PORT") as (_, client):
        body = client.post(route, json={"instances": ["red"]}).json()
    require(len(body["predictions"]) == 1, "it takes the port and the route that Vertex AI names", body)


def check_models(folder: Path) -> None:
    snapshot = folder / f"cache/huggingface/hub/models--{PUBLISHED.replace('/', '--')}/snapshots/{PUBLISHED_REVISION}"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to("/model")
    offline = ["-v", f"{BUNDLED}:/model:ro", "-v", f"{folder}/cache:/cache:ro", "-e", "HF_HUB_OFFLINE=1"]
    with container(IMAGE, *offline) as (_, client):
        info = client.get("/info").json()
    require(info["revision"] == PUBLISHED_REVISION, "it serves the pinned 2B from a mounted cache, offline", info)

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
    require(info["model"] == "/model", "it serves a model from a layer of the image", info)

    command = ["podman", *RUN, "--rm", *HARDENED, "-e", "HF_HUB_OFFLINE=1", IMAGE]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    output = run.stdout + run.stderr
    require(
        run.returncode != 0 and "set EMBEDDER_MODEL to its folder" in output,
        "it exits with a message without a model",
        output,
    )


def check_death() -> None:
    """BentoML does not replace a dead worker in a container, so the container must exit, to be restarted."""
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
        require(answers == {False}, "the container is not ready after its worker was killed", answers)
        require(status not in ("", "0"), f"it exited {seconds:.0f} s later with status {status}", logs(name))


def check_sbom() -> None:
    parts = bill_of_image(IMAGE, ["podman", *RUN])["components"]
    by_name = {part["name"]: part for part in parts}
    require({"torch", "bentoml", "libc6"} <= by_name.keys(), f"the bill of materials lists {len(parts)} packages")
    require(
        "licenses" in by_name["bentoml"] and "cyclonedx-bom" not in by_name,
        "it lists licenses, but not its own tool",
    )


def main() -> None:
    if reason := missing():
        print(f"the container test cannot run: {reason}", file=sys.stderr)
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
        check_vertex()
        check_models(folder)
        check_death()
        check_sbom()


if __name__ == "__main__":
    main()
