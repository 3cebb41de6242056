"""Environment -> Settings: everything an operator may choose, read once and checked at start."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

PREFIX = "EMBEDDER_"
METRICS_FOLDER, PROMETHEUS_FOLDER = "QWEN3_VL_EMBEDDING_METRICS", "PROMETHEUS_MULTIPROC_DIR"
_URL_HOST = r"(https?://)?(\*|(\*\.)?[A-Za-z0-9._-]+)(:[0-9]{1,5})?"
_URL_HOSTS = rf"^({_URL_HOST}( *, *{_URL_HOST})*)?$"


def available_cores() -> int:
    """Cores that this process may use: its affinity, and its cgroup's quota (v2), which is a container's CPU limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except OSError:  # not Linux, or an older kernel
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


class Settings(BaseModel):
    """What an operator may choose. Programs give fields; the service reads the variables `EMBEDDER_<FIELD>`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    model: str = Field(
        "",
        description="Checkpoint folder or hub id; empty: the small model shipped here, in a Bento the published 2B.",
    )
    revision: str = Field("", description="Hub revision (branch, tag or commit); empty: the newest.")
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Dtype of the weights; `auto`: bfloat16 on CUDA, float32 on CPU."
    )
    attention: Literal["auto", "flash_attn", "varlen", "sdpa"] = Field(
        "auto", description="Attention back end; `auto`: flash_attn if installed, else varlen on CUDA, sdpa on CPU."
    )
    cuda_graphs: bool = Field(False, description="Replay small batches of texts as CUDA graphs; needs a GPU.")
    torch_compile: bool = Field(
        False, description="Compile the layers at start, for minutes; needs a C++ compiler, on a GPU a C compiler."
    )
    default_instruction: str = Field(
        "Represent the user's input.", min_length=1, description="Instruction of an item that brings none."
    )
    max_pixels: int | None = Field(
        None, ge=4096, description="Pixels an image keeps after resizing; empty: as the checkpoint says."
    )
    max_input_tokens: int = Field(8192, ge=64, description="Tokens of one item; longer text is cut.")
    max_batch_tokens: int = Field(
        16384,
        ge=64,
        description="Tokens (text + visual) that run together; fewer where a GPU's memory holds no more, "
        "and not many more than a slow device computes in a second.",
    )
    max_queued_tokens: int = Field(524_288, ge=64, description="Estimated tokens that may wait; more is refused (429).")
    cache_bytes: int = Field(0, ge=0, description="Bytes of vectors kept for equal content; 0: every item is computed.")
    max_items_per_request: int = Field(512, ge=1, description="Items in one request.")
    max_body_bytes: int = Field(64 * 2**20, ge=1024, description="Bytes of one request body.")
    max_held_bytes: int = Field(
        2**30,
        ge=1024,
        description="Bytes of the bodies of all requests of a worker; more is refused (429), but for small ones.",
    )
    max_text_chars: int = Field(200_000, ge=1, description="Characters of one item's text, before it is cut to tokens.")
    max_image_bytes: int = Field(20 * 2**20, ge=64, description="Bytes of one encoded image.")
    max_image_pixels: int = Field(50_000_000, ge=4096, description="Pixels of one image, checked before decoding.")
    max_video_bytes: int = Field(48 * 2**20, ge=64, description="Bytes of one encoded video.")
    max_video_frames: int = Field(64, ge=2, description="Frames of one video; of an encoded one that many are sampled.")
    decode_timeout_s: float = Field(
        20.0, gt=0, description="Seconds that decoding one item's images and videos may take."
    )
    url_hosts: str = Field(
        "",
        pattern=_URL_HOSTS,
        description="Hosts that URLs may name: `a.com, *.b.com, http://c.com:8080`, or `*`; empty: no URL is fetched.",
    )
    url_timeout_s: float = Field(10.0, gt=0, description="Seconds that fetching one URL may take in all.")
    request_timeout_s: float = Field(
        60.0, gt=0, description="Seconds for a body to come, and again for its items (504)."
    )
    stuck_after_s: float | None = Field(
        None,
        gt=0,
        description="Seconds one batch may take before its worker ends; empty: 300 on a GPU, no limit on a CPU.",
    )
    preprocess_threads: int = Field(
        default_factory=lambda: min(16, available_cores()),
        ge=1,
        description="Threads that decode, resize and tokenize.",
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Processes, each with its own copy of the model, on the GPUs in turn; `auto`: one a GPU."
    )
    replicas_per_gpu: int = Field(1, ge=1, description="With `auto` workers: as many on each GPU, or on the CPU.")
    demo_folder: str = Field(
        "", description="Folder of images that the playground searches; empty: with the small model its drawings."
    )
    api_key: SecretStr | None = Field(
        None, description="Key that callers need, or several with commas between them; empty: none."
    )
    api_key_file: str = Field(
        "", description="File of such keys, one a line, read again when it changes; empty: no file."
    )
    access_log: bool = Field(False, description="One log line per request, without its contents.")
    log_format: Literal["text", "json"] = Field("text", description="`text`, or `json`: one JSON object a line.")

    @model_validator(mode="after")
    def _one_item_fits_a_batch(self) -> Self:
        if self.max_input_tokens > self.max_batch_tokens:
            raise ValueError(
                f"max_input_tokens ({self.max_input_tokens}) exceeds max_batch_tokens ({self.max_batch_tokens}): "
                f"an item could wait for ever. Raise {PREFIX}MAX_BATCH_TOKENS or lower {PREFIX}MAX_INPUT_TOKENS."
            )
        return self

    @model_validator(mode="after")
    def _one_body_may_be_held(self) -> Self:
        if self.max_body_bytes > self.max_held_bytes:
            raise ValueError(
                f"max_body_bytes ({self.max_body_bytes}) exceeds max_held_bytes ({self.max_held_bytes}). "
                f"Raise {PREFIX}MAX_HELD_BYTES or lower {PREFIX}MAX_BODY_BYTES."
            )
        return self

    @model_validator(mode="after")
    def _workers_are_counted_once(self) -> Self:
        if self.workers != "auto" and self.replicas_per_gpu > 1:
            raise ValueError(
                f"workers ({self.workers}) and replicas_per_gpu ({self.replicas_per_gpu}) are both given. "
                f"Unset {PREFIX}WORKERS, or give the number of all replicas there and unset {PREFIX}REPLICAS_PER_GPU."
            )
        return self

    def num_workers(self, num_gpus: int) -> int:
        """Worker processes on a machine with so many GPUs: `choose_device` puts them on these in turn."""
        num_devices = max(num_gpus, 1) if self.device == "auto" else 1
        return num_devices * self.replicas_per_gpu if self.workers == "auto" else self.workers

    @classmethod
    def from_environment(cls) -> Self:
        """Settings of this process.

        Raises `ValueError` with one line per fault: an unknown `EMBEDDER_` variable, or a value out of range.
        """
        names = {f"{PREFIX}{name.upper()}" for name in cls.model_fields}
        unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in names)
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}; known are: {', '.join(sorted(names))}")
        variables = {name: os.environ.get(f"{PREFIX}{name.upper()}") for name in cls.model_fields}
        values = {name: value for name, value in variables.items() if value}  # an empty one counts as not given
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            faults = [_fault(dict(fault)) for fault in error.errors()]
            raise ValueError("; ".join(faults)) from error


def make_metrics_folder() -> None:
    """In the arbiter, before its workers start: a folder of this service alone, taken away at its end.

    BentoML's is one for all services of a user, and is emptied whenever one of them starts (BentoML 1.4.39).
    """
    folder = tempfile.mkdtemp(prefix="qwen3-vl-embedding-metrics-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[METRICS_FOLDER] = folder


def metrics_folder() -> str | None:
    """Where prometheus_client keeps the numbers of all worker processes, from now on; None outside of such a one."""
    if PROMETHEUS_FOLDER in os.environ and METRICS_FOLDER in os.environ:
        os.environ[PROMETHEUS_FOLDER] = os.environ[METRICS_FOLDER]
    return os.environ.get(PROMETHEUS_FOLDER)


def trace_exporter_variable() -> str | None:
    """The standard variable, if any, by which an operator names where OpenTelemetry sends traces."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return next((name for name in names if os.environ.get(name)), None)


def _fault(fault: dict[str, object]) -> str:
    location = fault["loc"]
    if not isinstance(location, tuple) or not location:
        return str(fault["msg"])
    return f"{PREFIX}{str(location[0]).upper()}={fault['input']!r}: {fault['msg']}"


def settings_table() -> str:
    """The settings as a Markdown table, for the README: `python -m embedder.settings`."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "cores, at most 16" if name == "preprocess_threads" else field.default
        shown = f"`{default}`" if default not in ("", None) else "empty"
        rows.append(f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(settings_table())
