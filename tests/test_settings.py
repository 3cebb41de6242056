"""Settings: defaults are valid, one error lists all faults, and settings cannot be changed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from embedder.model.devices import choose_device
from embedder.settings import FIRST_OF_TOPIC, PREFIX, Settings, available_cores, settings_table

FIELDS = Settings.model_fields
MINIMA = {
    name: field["minimum"]
    for name, field in Settings.model_json_schema()["properties"].items()
    if "minimum" in field and field["type"] == "integer"
}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)


def test_empty_environment_gives_the_defaults() -> None:
    settings = Settings.from_environment()
    assert settings.model_dump() == {
        name: field.get_default(call_default_factory=True) for name, field in FIELDS.items()
    }


@pytest.mark.parametrize("name", FIELDS)
def test_default_is_a_valid_value(name: str) -> None:
    default = FIELDS[name].get_default(call_default_factory=True)
    assert getattr(Settings(**{name: default}), name) == default


@pytest.mark.parametrize("name", FIELDS)
def test_field_has_a_description(name: str) -> None:
    assert str(FIELDS[name].description).endswith(".")


def test_every_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "device": "cpu",
        "dtype": "float32",
        "weights": "int8",
        "attention": "sdpa",
        "model": "m",
        "revision": "r",
        "reranker": "m",
        "reranker_revision": "r",
        "demo_folder": "f",
        "workers": "auto",
        "batch_folder": "f",
        "url_hosts": "a.com, *.b.com",
        "api_key": "k",
        "api_key_file": "f",
        "log_format": "json",
    }
    given |= {"access_log": "true", "execution": "eager", "preprocessing": "reference", "raw_orientation": "true"}
    given |= {"default_instruction": "Find.", "request_timeout_s": "1.5", "batch_days": "1.5"}
    for name in FIELDS:
        monkeypatch.setenv(f"{PREFIX}{name.upper()}", given.setdefault(name, "4096"))
    settings = Settings.from_environment().model_dump()
    typed = {"true": True, "4096": 4096, "1.5": 1.5}
    assert settings == {name: typed.get(value, value) for name, value in given.items()} | {"api_key": SecretStr("k")}


def test_unknown_variable_is_named_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDER_MAX_PIXEL", "1")
    monkeypatch.setenv("EMBEDDER_ZZZ", "1")
    with pytest.raises(ValueError, match=r"^unknown settings: EMBEDDER_MAX_PIXEL, EMBEDDER_ZZZ; known are: ") as caught:
        Settings.from_environment()
    assert all(f"{PREFIX}{name.upper()}" in str(caught.value) for name in FIELDS)


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_pixel\n"):
        Settings(max_pixel=4096)  # type: ignore[call-arg]  # the misspelling under test


def test_item_larger_than_a_batch_is_refused_with_both_values_and_both_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EMBEDDER_MAX_INPUT_TOKENS", "2000")
    monkeypatch.setenv("EMBEDDER_MAX_BATCH_TOKENS", "1999")
    with pytest.raises(ValueError, match="exceeds") as caught:
        Settings.from_environment()
    for needed in ("2000", "1999", "Raise EMBEDDER_MAX_BATCH_TOKENS", "lower EMBEDDER_MAX_INPUT_TOKENS"):
        assert needed in str(caught.value)


def test_item_as_large_as_a_batch_is_allowed() -> None:
    assert Settings(max_input_tokens=2000, max_batch_tokens=2000).max_batch_tokens == 2000


@pytest.mark.parametrize(("name", "minimum"), MINIMA.items())
def test_value_below_the_minimum_is_refused_by_name(name: str, minimum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = f"{PREFIX}{name.upper()}"
    monkeypatch.setenv(variable, str(minimum - 1))
    with pytest.raises(
        ValueError, match=f"^{variable}='{minimum - 1}'; allowed: .*number.*, at least {minimum}( and|$)"
    ):
        Settings.from_environment()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("workers", "many", "auto, or a whole number, at least 1 and at most 4096"),
        ("max_pixels", "1e6", "a whole number, at least 4096"),
        ("cache_bytes", "512MiB", "a whole number of bytes, at least 0"),
        ("url_timeout_s", "10 s", "a number of seconds, more than 0 and at most 86400"),
        ("weights", "int4", "int8, fp8"),
        ("access_log", "maybe", "true, false"),
        ("url_hosts", "a.com b.com", "values such as 'a.com, *.b.com, http://c.com:8080' and '*'"),
    ],
)
def test_message_names_the_setting_the_value_and_what_is_allowed(
    name: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", value)
    with pytest.raises(ValueError, match="allowed") as caught:
        Settings.from_environment()
    assert str(caught.value) == f"{PREFIX}{name.upper()}='{value}'; allowed: {allowed}"


def test_every_setting_with_limits_says_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    value = "no, " * 500  # neither a number, nor a choice, nor a list of hosts
    for name in FIELDS:
        monkeypatch.setenv(f"{PREFIX}{name.upper()}", value)
    with pytest.raises(ValueError, match="allowed") as caught:
        Settings.from_environment()
    faults = str(caught.value).split("; EMBEDDER_")
    free = {"model", "revision", "reranker", "reranker_revision", "default_instruction", "device", "batch_folder"}
    free |= {"api_key", "api_key_file", "demo_folder"}
    assert len(faults) == len(FIELDS) - len(free)
    assert all(re.search(r"='no, .{56}\.\.'; allowed: [a-z]", fault) for fault in faults)


@pytest.mark.parametrize("hosts", ["a.com", "*", "*.a.com:8443, http://*, https://A-1.b_c:1"])
def test_hosts_of_urls_are_names_with_or_without_a_scheme_and_port(hosts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDER_URL_HOSTS", hosts)
    assert Settings.from_environment().url_hosts == hosts


@pytest.mark.parametrize(
    "hosts", ["a.com b.com", "a.com,", "https://", "ftp://a.com", "a.com/b", "a.*", "a.com:", "**"]
)
def test_hosts_of_urls_that_would_match_nothing_stop_the_start(hosts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDER_URL_HOSTS", hosts)
    with pytest.raises(ValueError, match=r"^EMBEDDER_URL_HOSTS='"):
        Settings.from_environment()


@pytest.mark.parametrize(
    ("given", "num_gpus", "expected"),
    [
        ({}, 0, ["cpu"]),
        ({}, 1, [0]),
        ({}, 3, [0, 1, 2]),
        ({"workers": 6}, 3, [0, 1, 2, 0, 1, 2]),
        ({"workers": 4}, 3, [0, 1, 2, 0]),
        ({"workers": 2}, 0, ["cpu", "cpu"]),
        ({"workers": 2, "device": "cuda:1"}, 3, [1, 1]),
        ({"workers": 2, "device": "cpu"}, 3, ["cpu", "cpu"]),
    ],
)
def test_workers_are_assigned_to_the_gpus_round_robin(
    given: Any, num_gpus: int, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    settings = Settings(**given)
    devices = [choose_device(settings, worker) for worker in range(settings.num_workers(num_gpus))]
    assert [device.type if device.type == "cpu" else device.index for device in devices] == expected


def test_table_has_every_setting_under_its_topic() -> None:
    table = settings_table()
    assert re.findall(r"^\| `EMBEDDER_(\w+)`", table, re.MULTILINE) == [name.upper() for name in Settings.model_fields]
    sizes = dict(re.findall(r"^\| `EMBEDDER_(\w+)_BYTES` \| `\d+` \((.+?)\) \|", table, re.MULTILINE))
    assert sizes == {
        "VISION_CACHE": "1 GiB",
        "MAX_BODY": "64 MiB",
        "MAX_HELD": "1 GiB",
        "MAX_IMAGE": "20 MiB",
        "MAX_VIDEO": "48 MiB",
        "MAX_BATCH": "10 GiB",
    }
    assert re.findall(r"^## (.+)$", table, re.MULTILINE) == list(FIRST_OF_TOPIC.values())


@pytest.mark.parametrize("workers", ["0", "-1", "1.5"])
def test_workers_are_auto_or_a_count(workers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDER_WORKERS", workers)
    with pytest.raises(ValueError, match=f"^EMBEDDER_WORKERS='{workers}'; allowed: auto, or a whole number, "):
        Settings.from_environment()


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_timeout_is_a_positive_number(seconds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDER_REQUEST_TIMEOUT_S", seconds)
    with pytest.raises(ValueError, match=f"^EMBEDDER_REQUEST_TIMEOUT_S='{seconds}'; allowed: a number of seconds, "):
        Settings.from_environment()


@pytest.mark.parametrize(
    "name", [*(f"{kind}_TIMEOUT_S" for kind in ("REQUEST", "DECODE", "URL")), "STUCK_AFTER_S", "BATCH_DAYS"]
)
@pytest.mark.parametrize("value", ["inf", "1e10"])
def test_time_that_the_system_cannot_count_stops_the_start(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"EMBEDDER_{name}", value)
    with pytest.raises(ValueError, match=f"^EMBEDDER_{name}='{value}'; allowed: .* at most "):
        Settings.from_environment()


@pytest.mark.parametrize("name", ["WORKERS", "PREPROCESS_THREADS"])
def test_more_threads_than_a_machine_has_stop_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"EMBEDDER_{name}", "20000")
    with pytest.raises(ValueError, match=f"^EMBEDDER_{name}='20000'; allowed: .* at most 4096$"):
        Settings.from_environment()


def test_one_error_lists_all_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDER_DTYPE", "int8")
    monkeypatch.setenv("EMBEDDER_WORKERS", "many")
    with pytest.raises(
        ValueError, match=r"^EMBEDDER_DTYPE='int8'; allowed: .*; EMBEDDER_WORKERS='many'; allowed: "
    ) as caught:
        Settings.from_environment()
    assert "\n" not in str(caught.value)


def test_empty_variable_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    # as `EMBEDDER_MAX_PIXELS=` in a compose file; the descriptions say what empty means
    for name in set(FIELDS) - {"api_key", "api_key_file"}:
        monkeypatch.setenv(f"{PREFIX}{name.upper()}", "")
    assert Settings.from_environment() == Settings()


def test_settings_cannot_be_changed() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.workers = 2  # type: ignore[misc]  # the assignment under test


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_number_of_cores_respects_the_containers_limit(monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(Path, "read_text", lambda _: quota)
    assert available_cores() == cores
