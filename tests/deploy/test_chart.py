"""The Helm chart makes the same objects as the kustomize overlays. Helm's own code renders it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedder.settings import Settings
from tests.conftest import ROOT
from tests.deploy.test_deploy import DEPLOY, SETTINGS, Object, kustomize, render_overlay
from tests.docs.markdown import blocks

CHART = DEPLOY / "helm" / "qwen3-vl-embedding"
PAGE = ROOT / "docs" / "operations" / "kubernetes.md"
HELM_LABELS = ("app.kubernetes.io/managed-by", "helm.sh/chart", "checksum/settings")
VALUES = {  # of the chart, that make the objects of an overlay
    "2b": {},
    "8b": {"files": ["values-8b.yaml"]},
    "8b-scaled": {"files": ["values-8b.yaml", "values-scaled.yaml"]},
    "8b-keda": {"files": ["values-8b.yaml", "values-scaled.yaml"], "autoscaling": {"kind": "keda"}},
    "2b-mig": {"gpu": {"resource": "nvidia.com/mig-2g.20gb"}},
}


def merged(base: Object, more: Object) -> Object:
    return base | {
        key: merged(base[key], value) if isinstance(value, dict) and key in base else value
        for key, value in more.items()
    }


def render_chart(release: str, values: Object) -> list[Object]:
    """The objects of a release, after a check of the values against the chart's schema."""
    import helm_python  # here, because it takes 2.4 s, which each process of the tests would spend on collecting them

    chosen: Object = {}
    for name in values.get("files", []):
        chosen = merged(chosen, yaml.safe_load((CHART / name).read_text(encoding="utf-8")))
    chosen = merged(chosen, {key: value for key, value in values.items() if key != "files"})
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chosen)
        rendered = chart.render(chosen, name=release, namespace="default")
    texts = [text for path, text in rendered.items() if path.endswith(".yaml")]
    return [thing for text in texts for thing in yaml.safe_load_all(text) if thing]


def comparable(objects: list[Object], names: dict[str, str]) -> dict[str, Any]:
    """The objects by kind and name, with `names` in place of theirs and without the labels that Helm adds."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {key: replaced(one) for key, one in value.items() if key not in HELM_LABELS}
            return {key: one for key, one in kept.items() if one != {} or value[key] == {}}
        if isinstance(value, list):
            return [replaced(one) for one in value]
        if isinstance(value, str):
            return names.get(value) or re.sub(r'(?<=service=")[^"]+', lambda match: names[match[0]], value)
        return value

    things = [replaced(thing) for thing in objects]
    for thing in things:
        if thing["kind"] in ("ServiceMonitor", "ScaledObject", "HorizontalPodAutoscaler"):
            del thing["metadata"]["labels"]  # of interest to nobody
    return {f"{thing['kind']} {thing['metadata']['name']}": thing for thing in things}


def job_of(objects: list[Object]) -> Object:
    (job,) = [thing for thing in objects if thing["kind"] == "Job"]
    return job


def require_same_objects(chart: list[Object], overlay: list[Object], name: str) -> None:
    """Compare the objects of a release named `one` with those of an overlay whose names end with `name`."""
    (settings,) = [thing["metadata"]["name"] for thing in overlay if thing["kind"] == "ConfigMap"]
    parts = ("settings", "model-cache", "fetch-model", "service")
    in_overlay = {f"{part}-{name}": part for part in parts} | {settings: "settings"}
    jobs = {thing["metadata"]["name"]: "fetch-model" for thing in chart if thing["kind"] == "Job"}
    in_chart = {f"one-{part}": part for part in parts} | jobs
    got = comparable(chart, in_chart | {"one": "release"})
    assert got == comparable(overlay, in_overlay | {f"qwen3-vl-embedding-{name}": "release"})


@pytest.mark.parametrize("overlay", VALUES)
def test_chart_makes_the_objects_of_the_overlay(overlay: str) -> None:
    require_same_objects(render_chart("one", VALUES[overlay]), render_overlay(overlay), overlay)


@pytest.mark.parametrize("example", range(2), ids=["own settings", "model in the image"])
def test_examples_of_overlays_make_the_objects_of_the_examples_of_values(example: int, tmp_path: Path) -> None:
    import kubernetes_validate

    overlay_block, values_block = [block for block in blocks(PAGE) if block.language == "yaml"][2 * example :][:2]
    text = overlay_block.text.replace("../deploy", os.path.relpath(DEPLOY, tmp_path))
    (tmp_path / "kustomization.yaml").write_text(text, encoding="utf-8")
    overlay = kustomize(tmp_path)
    assert {thing["metadata"].pop("namespace") for thing in overlay} == {"search"}
    chart = render_chart("one", yaml.safe_load(values_block.text))
    for thing in [*overlay, *chart]:
        kubernetes_validate.validate(thing, "1.32", strict=True)
    require_same_objects(chart, overlay, "2b")
    by_kind = {thing["kind"]: thing for thing in chart}
    assert by_kind["ConfigMap"]["data"].keys() <= SETTINGS


def kinds_and_mounts(values: Object) -> tuple[set[str], dict[str, str]]:
    """The kinds of a release's objects, and the folders that the service mounts, by the names of their volumes."""
    import kubernetes_validate

    by_kind = {thing["kind"]: thing for thing in render_chart("one", values)}
    for thing in by_kind.values():
        kubernetes_validate.validate(thing, "1.32", strict=True)
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    return set(by_kind), mounts


IN_IMAGE = {"model": {"name": "/model", "revision": "my-2b-1"}}
DOWNLOAD = {"Job", "PersistentVolumeClaim"}


@pytest.mark.parametrize(
    ("values", "is_downloaded"),
    [
        ({}, True),
        (IN_IMAGE, False),
        (IN_IMAGE | {"settings": {"EMBEDDER_RERANKER": "/models/reranker"}}, False),
        (IN_IMAGE | {"settings": {"EMBEDDER_RERANKER": "owner/reranker"}}, True),
        ({"settings": {"EMBEDDER_RERANKER": "/models/reranker"}}, True),
    ],
)
def test_models_are_downloaded_into_a_volume_only_if_one_is_a_hub_id(values: Object, is_downloaded: bool) -> None:
    kinds, mounts = kinds_and_mounts(values)
    assert kinds & DOWNLOAD == (DOWNLOAD if is_downloaded else set())
    assert ("model-cache" in mounts) == is_downloaded


def test_model_can_be_a_folder_of_a_volume() -> None:
    """As on the page."""
    values = yaml.safe_load([block for block in blocks(PAGE) if block.language == "yaml"][4].text)
    kinds, mounts = kinds_and_mounts(values)
    assert not kinds & DOWNLOAD
    assert mounts == {"tmp": "/tmp", "keys": "/keys", "models": "/models"}
    assert values["model"]["name"].startswith("/models/")


def test_name_of_a_checkpoint_is_not_read_as_a_number() -> None:
    values = {"model": {"name": "/model", "revision": "1.0"}}
    by_kind = {thing["kind"]: thing for thing in render_chart("one", values)}
    assert by_kind["Service"]["spec"]["selector"]["qwen3-vl-embedding/revision"] == "1.0"


def test_folder_with_a_revision_of_the_hub_is_refused_with_a_reason() -> None:
    """It is the default revision, which says nothing about the checkpoint in the folder."""
    import helm_python

    with pytest.raises(helm_python.HelmError, match="to a name of the checkpoint"):
        render_chart("one", {"model": {"name": "/model"}})


def test_chart_allows_no_connection_from_the_service_without_a_rule() -> None:
    policies = [thing for thing in render_chart("one", {}) if thing["kind"] == "NetworkPolicy"]
    (service,) = [policy["spec"] for policy in policies if policy["metadata"]["name"] == "one-service"]
    assert service["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in service


def test_every_overlay_has_values_of_the_chart() -> None:
    assert {path.name for path in (DEPLOY / "kubernetes" / "overlays").iterdir()} == VALUES.keys()


def test_ingress_of_the_chart_is_that_of_the_live_service() -> None:
    import kubernetes_validate

    values = {"ingress": {"enabled": True, "tlsSecret": "tls"}}
    (ingress,) = [thing for thing in render_chart("one", values) if thing["kind"] == "Ingress"]
    kubernetes_validate.validate(ingress, "1.32", strict=True)
    assert ingress["spec"].pop("tls") == [{"hosts": ["embeddings.example.com"], "secretName": "tls"}]
    live = yaml.safe_load((DEPLOY / "kubernetes" / "live" / "ingress.yaml").read_text(encoding="utf-8"))
    assert ingress["metadata"]["annotations"] == live["metadata"]["annotations"]
    assert comparable([ingress], {"one": "qwen3-vl-embedding"}).popitem()[1]["spec"] == live["spec"]


def test_ingress_allows_what_the_service_allows() -> None:
    live = yaml.safe_load((DEPLOY / "kubernetes" / "live" / "ingress.yaml").read_text(encoding="utf-8"))
    limits = {key.rpartition("/proxy-")[2]: value for key, value in live["metadata"]["annotations"].items()}
    assert int(limits["body-size"].removesuffix("m")) * 2**20 == Settings().max_body_bytes
    longest_s = 2 * Settings().request_timeout_s  # for the body, and again for its items
    assert int(limits["read-timeout"]) == int(limits["send-timeout"]) == longest_s + 10


@pytest.mark.parametrize(("timeout_s", "longest_s"), [("25", 60), ("0.2", 11), ("600", 1210)])
def test_times_of_the_chart_follow_the_timeout_of_requests(timeout_s: str, longest_s: int) -> None:
    values = {"settings": {"EMBEDDER_REQUEST_TIMEOUT_S": timeout_s}, "ingress": {"enabled": True}}
    by_kind = {thing["kind"]: thing for thing in render_chart("one", values)}
    assert by_kind["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == longest_s + 5
    annotations = by_kind["Ingress"]["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"] == str(longest_s)


@pytest.mark.parametrize(
    "values",
    [
        {"modle": {"name": "owner/name"}},
        {"model": {"name": "owner/name", "revision": "main"}},  # not pinned: replicas could differ
        {"model": {"name": "./model", "revision": "my-2b-1"}},
        {"model": {"name": "/model", "revision": "not a label"}},
        {"settings": {"EMBEDDER_MODEL": "owner/name"}},  # would not be in the selectors
        {"settings": {"MAX_PIXELS": "1000000"}},
        {"settings": {"EMBEDDER_MAX_PIXELS": 1000000}},  # Helm would write 1e+06
        {"settings": {"EMBEDDER_PREPROCESS_THREADS": "4"}},  # would have no effect: it is the limit of the CPU
        {"extraEnv": [{"name": "EMBEDDER_MODEL", "value": "owner/name"}]},  # would not be in the selectors
        {"extraEnv": [{"name": "HF_HUB_OFFLINE", "value": "0"}]},  # is there twice
        {"extraEnv": [{"name": "OTEL_TRACES_SAMPLER_ARG", "value": 0.1}]},
        {"extraEnv": {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}},
        {"fetchModel": {"extraEnv": [{"value": "token"}]}},
        {"networkPolicy": {"egress": {"ports": []}}},
        {"autoscaling": {"kind": "HPA"}},
        {"replicas": 0},
    ],
)
def test_values_that_cannot_be_meant_are_refused(values: Object) -> None:
    import helm_python

    with pytest.raises(helm_python.HelmError):
        render_chart("one", values)


def test_other_settings_reach_the_service_and_replace_its_pods() -> None:
    plain, changed = (render_chart("one", values) for values in ({}, {"settings": {"EMBEDDER_MAX_PIXELS": "1000000"}}))
    (settings,) = [thing for thing in changed if thing["kind"] == "ConfigMap"]
    assert settings["data"]["EMBEDDER_MAX_PIXELS"] == "1000000"
    checksums = [
        thing["spec"]["template"]["metadata"]["annotations"]["checksum/settings"]
        for objects in (plain, changed)
        for thing in objects
        if thing["kind"] == "Deployment"
    ]
    assert len(set(checksums)) == 2


def test_other_settings_start_another_job() -> None:
    """Kubernetes does not change a job, and Helm does not start it again: a reranker that is added must be fetched."""
    reranker = {"settings": {"EMBEDDER_RERANKER": "owner/name"}}
    jobs = [job_of(render_chart("one", values)) for values in ({}, {}, reranker, {"image": {"tag": "other"}})]
    names = [job["metadata"]["name"] for job in jobs]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    longest = job_of(render_chart("a" * 53, {}))["metadata"]["name"]
    assert len(longest) <= 63, "the name is a label of the pods"


def test_another_revision_changes_the_selectors() -> None:
    """So Kubernetes refuses it in the same release, and a Service never has pods of two models."""
    revision = "0123456789" * 4
    selectors = []
    for values in ({}, {"model": {"name": "owner/name", "revision": revision}}):
        by_kind = {thing["kind"]: thing for thing in render_chart("one", values)}
        deployment, service = by_kind["Deployment"]["spec"], by_kind["Service"]["spec"]["selector"]
        assert deployment["selector"]["matchLabels"] == service
        assert service["qwen3-vl-embedding/revision"] == by_kind["ConfigMap"]["data"]["EMBEDDER_REVISION"]
        selectors.append(service)
    assert selectors[0] != selectors[1]


def test_chart_has_no_faults_for_helm_lint() -> None:
    import helm_python

    report = helm_python.lint(CHART, strict=True, kube_version="v1.30.0")
    faults = [message for message in report["messages"] if message["severity"] > 1]
    assert (faults, report["errors"]) == ([], [])
