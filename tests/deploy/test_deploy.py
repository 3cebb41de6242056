"""The files in deploy/ are valid and agree with the code: settings, ports, paths, versions, timeouts."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import embedder
from deploy import version
from deploy.container_test import UNLISTED
from embedder.model.checkpoint import PUBLISHED, PUBLISHED_REVISION
from embedder.settings import PREFIX, Settings
from embedder.telemetry.metrics import Metrics
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
OVERLAYS = sorted(path.name for path in (DEPLOY / "kubernetes" / "overlays").iterdir())
SETTINGS = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["embedder"]

Object = dict[str, Any]


def render_overlay(name: str) -> list[Object]:
    """The objects of an overlay, rendered by kubectl."""
    return kustomize(DEPLOY / "kubernetes" / "overlays" / name)


def kustomize(folder: Path) -> list[Object]:
    kubectl = Path(sys.executable).with_name("kubectl")
    run = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=True)
    assert not run.stderr, "kustomize warns about deprecated fields"
    return list(yaml.safe_load_all(run.stdout))


@pytest.mark.slow  # imports torch
@pytest.mark.parametrize(
    ("variables", "port"),
    [({}, "3000"), ({"BENTOML_PORT": "8080"}, "8080"), ({"AIP_HTTP_PORT": "8081", "BENTOML_PORT": "3000"}, "8081")],
)
def test_image_listens_on_the_port_that_the_platform_names(
    variables: dict[str, str], port: str, tmp_path: Path
) -> None:
    """The entrypoint of BentoML's images reads this file."""
    activate = tmp_path / "activate"
    program = "from service import Qwen3VLEmbedding as one; print(*one.image.post_commands, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    (command,) = [line for line in run.stdout.splitlines() if "/activate" in line]
    subprocess.run(["sh", "-c", command.replace("/app/.venv/bin/activate", str(activate))], check=True)
    script = f"source {activate}; echo $BENTOML_HOME $BENTOML_PORT"
    run = subprocess.run(["bash", "-euc", script], env=variables, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["/tmp/bentoml", port]


@pytest.fixture(scope="module", params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    """The objects of an overlay."""
    return render_overlay(request.param)


@pytest.fixture(scope="module")
def overlay(objects: list[Object]) -> dict[str, Object]:
    """The objects by kind."""
    return {thing["kind"]: thing for thing in objects}


def pod_specs(overlay: dict[str, Object]) -> Iterator[Object]:
    for kind in ("Deployment", "Job"):
        yield overlay[kind]["spec"]["template"]["spec"]


def container_of(overlay: dict[str, Object]) -> Object:
    container: Object = overlay["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    return container


def test_objects_are_valid_kubernetes(objects: list[Object]) -> None:
    """Unknown fields are errors. The validator has no schemas for the kinds of the Prometheus operator and KEDA."""
    import kubernetes_validate

    assert len(objects) >= 8
    for thing in objects:
        if thing["kind"] not in ("ServiceMonitor", "ScaledObject"):
            kubernetes_validate.validate(thing, "1.32", strict=True)


def test_validation_rejects_a_misspelled_field(overlay: dict[str, Object]) -> None:
    import kubernetes_validate

    wrong = {**overlay["Service"], "spec": {**overlay["Service"]["spec"], "selektor": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.32", strict=True)


def test_selectors_find_the_pods(overlay: dict[str, Object]) -> None:
    labels = overlay["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [overlay["Deployment"]["spec"]["selector"], overlay["PodDisruptionBudget"]["spec"]["selector"]]
    selectors += [{"matchLabels": overlay["Service"]["spec"]["selector"]}]
    for selector in selectors:
        assert "app.kubernetes.io/instance" in selector["matchLabels"], "a namespace may have several models"
        assert selector["matchLabels"].items() <= labels.items()
        assert not selector["matchLabels"].items() <= overlay["Job"]["spec"]["template"]["metadata"]["labels"].items()
    if "ServiceMonitor" in overlay:
        monitor = overlay["ServiceMonitor"]["spec"]
        assert monitor["selector"]["matchLabels"].items() <= overlay["Service"]["metadata"]["labels"].items()
        assert [(endpoint["port"], endpoint["path"]) for endpoint in monitor["endpoints"]] == [("http", "/metrics")]


def test_two_models_never_answer_one_service(overlay: dict[str, Object]) -> None:
    """A Deployment's selector cannot be changed, so another revision needs another name."""
    deployment, service = overlay["Deployment"], overlay["Service"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    revision = overlay["ConfigMap"]["data"]["EMBEDDER_REVISION"]
    assert service["spec"]["selector"]["qwen3-vl-embedding/revision"] == revision


def test_overlays_can_run_next_to_each_other() -> None:
    names = [(thing["kind"], thing["metadata"]["name"]) for name in OVERLAYS for thing in render_overlay(name)]
    assert len(names) == len(set(names))


def test_live_service_selects_the_pods_of_one_overlay() -> None:
    import kubernetes_validate

    by_kind = {thing["kind"]: thing for thing in kustomize(DEPLOY / "kubernetes" / "live")}
    for thing in by_kind.values():
        kubernetes_validate.validate(thing, "1.32", strict=True)
    selector = by_kind["Service"]["spec"]["selector"]
    pods = {
        name: {thing["kind"]: thing for thing in render_overlay(name)}["Deployment"]["spec"]["template"]["metadata"]
        for name in OVERLAYS
    }
    assert [name for name in OVERLAYS if selector.items() <= pods[name]["labels"].items()] == ["2b"]
    (rule,) = by_kind["Ingress"]["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"]["name"] == by_kind["Service"]["metadata"]["name"]


def test_settings_ports_and_paths_match_the_service(overlay: dict[str, Object]) -> None:
    container = container_of(overlay)
    names = {variable["name"] for variable in container["env"]} | overlay["ConfigMap"]["data"].keys()
    assert {name for name in names if name.startswith(PREFIX)} <= SETTINGS
    assert container["ports"] == [{"name": "http", "containerPort": 3000}]
    assert overlay["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    probes = [container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    assert {probe["httpGet"]["port"] for probe in probes} == {"http"}
    assert [probe["httpGet"]["path"] for probe in probes] == ["/readyz", "/readyz", "/livez"]
    assert {"/readyz", "/livez", "/metrics"} <= {*UNLISTED}, "the container test requests each path"
    assert all(probe["timeoutSeconds"] >= 3 for probe in probes), "the default of 1 s is too short for a busy worker"


def test_settings_are_accepted_by_the_service(overlay: dict[str, Object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in overlay["ConfigMap"]["data"].items():
        monkeypatch.setenv(name, value)
    settings = Settings.from_environment()
    assert re.fullmatch(r"[0-9a-f]{40}", settings.revision), "pinned"
    assert settings.model != PUBLISHED or settings.revision == PUBLISHED_REVISION


def test_stop_waits_for_the_longest_request(overlay: dict[str, Object]) -> None:
    """As the documentation says: a body, its items, and 10 s, of which `SENDING_S` are for responses being sent."""
    stop_s = 2 * Settings().request_timeout_s + 10
    pre_stop_s = container_of(overlay)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert overlay["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == pre_stop_s + stop_s
    assert int(COMPOSE["stop_grace_period"].removesuffix("s")) == stop_s


def test_model_is_fetched_where_the_service_runs(overlay: dict[str, Object]) -> None:
    """Because its volume can be mounted on one node only."""
    service, fetch = (overlay[kind]["spec"]["template"] for kind in ("Deployment", "Job"))
    assert fetch["spec"]["tolerations"] == service["spec"]["tolerations"]
    (term,) = fetch["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert term["labelSelector"]["matchLabels"].items() <= service["metadata"]["labels"].items()


PAIR = {"MODEL": "owner/embedder", "REVISION": "one", "RERANKER": "owner/reranker", "RERANKER_REVISION": "two"}


@pytest.mark.parametrize(
    ("settings", "downloads"),
    [
        ({}, ["Qwen/Qwen3-VL-Embedding-2B --revision 9f2f7e710d6d81056aa5c0a4f04764fec6bb7bda"]),
        (PAIR, ["owner/embedder --revision one", "owner/reranker --revision two"]),
        (PAIR | {"RERANKER_REVISION": ""}, ["owner/embedder --revision one", "owner/reranker"]),
        (PAIR | {"MODEL": ""}, ["owner/reranker --revision two"]),
        (PAIR | {"MODEL": "/model"}, ["owner/reranker --revision two"]),
        (PAIR | {"RERANKER": "bundled"}, ["owner/embedder --revision one"]),
        (PAIR | {"MODEL": "/models/2b", "RERANKER": "./reranker"}, []),
    ],
)
def test_job_downloads_the_models_that_are_hub_ids(
    settings: dict[str, str], downloads: list[str], tmp_path: Path
) -> None:
    run = run_job({f"{PREFIX}{name}": value for name, value in settings.items()}, "echo", tmp_path)
    assert run.stdout.splitlines() == [f"download {model}" for model in downloads]
    assert run.returncode == 0


def test_job_fails_with_a_download(tmp_path: Path) -> None:
    run = run_job({f"{PREFIX}{name}": value for name, value in PAIR.items()}, "exit 3;", tmp_path)
    assert run.returncode == 3


def run_job(settings: dict[str, str], hf: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command of the job, with a program that runs `hf` and its arguments instead of Hugging Face's `hf`."""
    by_kind = {thing["kind"]: thing for thing in render_overlay("2b")}
    (fetch,) = by_kind["Job"]["spec"]["template"]["spec"]["containers"]
    assert not any("$(" in argument for argument in fetch["args"]), "Kubernetes would replace it"
    assert set(re.findall(rf"{PREFIX}[A-Z_]+", fetch["args"][-1])) == {f"{PREFIX}{name}" for name in PAIR} <= SETTINGS
    program = folder / "hf"
    program.write_text(f'#!/bin/sh\n{hf} "$@"\n')
    program.chmod(0o755)
    variables = by_kind["ConfigMap"]["data"] | settings | {"PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run(fetch["args"], env=variables, capture_output=True, text=True, check=False)


def test_pods_are_as_hardened_as_the_container_test(overlay: dict[str, Object]) -> None:
    for pod in pod_specs(overlay):
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 1034)
        assert pod["automountServiceAccountToken"] is False
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/tmp", "/cache"}
    assert COMPOSE["read_only"] is True
    assert COMPOSE["cap_drop"] == ["ALL"]
    assert COMPOSE["security_opt"] == ["no-new-privileges:true"]


def test_autoscaler_waits_for_a_second_full_batch(overlay: dict[str, Object]) -> None:
    import promql_parser

    if "HorizontalPodAutoscaler" in overlay:
        (metric,) = overlay["HorizontalPodAutoscaler"]["spec"]["metrics"]
        name, tokens = metric["pods"]["metric"]["name"], metric["pods"]["target"]["averageValue"]
    elif "ScaledObject" in overlay:
        scaled = overlay["ScaledObject"]["spec"]
        assert scaled["scaleTargetRef"]["name"] == overlay["Deployment"]["metadata"]["name"]
        (trigger,) = scaled["triggers"]
        query = trigger["metadata"]["query"]
        promql_parser.parse(query)
        name, service = re.findall(r'sum\((\w+)\{service="([^"]+)"\}\)', query)[0]
        assert service == overlay["Service"]["metadata"]["name"]
        tokens = trigger["metadata"]["threshold"]
    else:
        assert overlay["Deployment"]["spec"]["replicas"] == 1
        return
    assert "replicas" not in overlay["Deployment"]["spec"], "applying it again would reset the autoscaler's number"
    assert int(tokens) == 2 * Settings().max_batch_tokens
    assert f"`{name}`" in Metrics(()).table()


def test_images_have_the_packages_version(overlay: dict[str, Object]) -> None:
    image = f"qwen3-vl-embedding:{embedder.__version__}"
    assert {container["image"] for pod in pod_specs(overlay) for container in pod["containers"]} == {image}


def test_every_file_states_the_packages_version() -> None:
    for path, text in version.stated(ROOT, embedder.__version__).items():
        assert path.read_text(encoding="utf-8") == text, "run python -m deploy.version"
    assert f"## [{embedder.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_other_file_states_the_version() -> None:
    """A version of 0.x is that of this project where the line names it."""
    known = {path.relative_to(ROOT).as_posix() for path in version.stated(ROOT, embedder.__version__)}
    command = ["git", "grep", "-lE", rf"(qwen3-vl-embedding|version|newTag).*\b{re.escape(embedder.__version__)}\b"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    elsewhere = {"embedder/__init__.py", "CHANGELOG.md", "deploy/requirements.txt", "pyproject.toml"}
    assert {path for path in found if not path.startswith(("benchmarks/results/", "tests/"))} <= known | elsewhere


def test_compose_file_is_valid_and_names_known_settings() -> None:
    import compose_spec

    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    assert compose_spec.PyCompose.from_yaml(text).service_names() == ["embedder"]
    with pytest.raises(ValueError, match="read_onli"):
        compose_spec.PyCompose.from_yaml(text.replace("read_only", "read_onli"))
    assert COMPOSE["environment"].keys() <= SETTINGS
    assert COMPOSE["environment"]["EMBEDDER_REVISION"] == PUBLISHED_REVISION


def test_locked_packages_are_those_of_pyproject_with_hashes() -> None:
    text = (DEPLOY / "requirements.txt").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE))
    assert len(locked) == len(re.findall(r"^\w", text, re.MULTILINE))
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    for requirement in map(Requirement, dependencies):
        assert requirement.specifier.contains(locked[requirement.name]), requirement
