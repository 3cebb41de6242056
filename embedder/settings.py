"""Everything an operator may choose, read from the environment once and checked at the start."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

PREFIX = "EMBEDDER_"
METRICS_FOLDER, PROMETHEUS_FOLDER = "QWEN3_VL_EMBEDDING_METRICS", "PROMETHEUS_MULTIPROC_DIR"
WeightFormat = Literal["int8", "fp8"]
MAX_SECONDS = 86_400.0  # much longer times overflow the timers of the system
MAX_THREADS = 4096
MAX_SHOWN_CHARS = 60  # of a value that is not allowed
_UNITS = {"bytes": " of bytes", "s": " of seconds"}  # by the end of a setting's name
_URL_HOST = r"(https?://)?(\*|(\*\.)?[A-Za-z0-9._-]+)(:[0-9]{1,5})?"
_URL_HOSTS = rf"^({_URL_HOST}( *, *{_URL_HOST})*)?$"


def available_cores() -> int:
    """CPU cores that this process may use: its affinity, and the CPU limit of its container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except OSError:  # not Linux, or an older kernel
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


class Settings(BaseModel):
    """What an operator may choose, as fields, or as environment variables `EMBEDDER_<FIELD>`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # Model
    model: str = Field(
        "",
        description="Checkpoint folder, hub id, or `bundled`; empty: the bundled model (in a Bento, the published 2B).",
    )
    revision: str = Field("", description="Hub revision (branch, tag or commit); empty: the newest.")
    reranker: str = Field(
        "",
        description="Checkpoint folder or hub id of a reranker, or `bundled`; served in addition to `EMBEDDER_MODEL`, "
        "or by itself if that is empty.",
    )
    reranker_revision: str = Field("", description="Hub revision of the reranker; empty: the newest.")
    default_instruction: str = Field(
        "Represent the user's input.", min_length=1, description="Instruction for items that have none."
    )
    max_input_tokens: int = Field(8192, ge=64, description="Maximum number of tokens of an item; longer text is cut.")
    preprocessing: Literal["checkpoint", "reference"] = Field(
        "checkpoint",
        description="How images are resized and frames of videos are chosen: `checkpoint`, as transformers does with "
        "the checkpoint's processor files; `reference`, as the authors' script does.",
    )
    max_pixels: int | None = Field(
        None,
        ge=4096,
        description="Maximum number of pixels of an image, and of each frame of a video, after resizing; empty: the "
        "limits of `EMBEDDER_PREPROCESSING`.",
    )
    raw_orientation: bool = Field(
        False,
        description="Ignore EXIF orientation and the rotation of videos, to compare with vectors made without them.",
    )
    # Device
    device: str = Field(
        "auto",
        description="`auto`, `cpu`, `cuda`, `cuda:N`, `xpu`, `xpu:N` or `mps`; `auto`: the accelerator, or else `cpu`.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Data type of the weights; `auto`: bfloat16 on accelerators and on CPUs with AVX512-BF16 or AMX, "
        "float16 on GPUs before Ampere, else float32. On a CPU, the bundled model is always in float32.",
    )
    weights: WeightFormat | None = Field(
        None,
        description="Format of the layers' weights; empty: that of `EMBEDDER_DTYPE`; `int8`: 8-bit integers, on every "
        "device; `fp8`: 8-bit floating-point numbers, with matrix products in fp8, on NVIDIA GPUs of the Ada and "
        "Hopper generations or newer. `int8` and `fp8` change the vectors.",
    )
    attention: Literal["auto", "flash_attn", "varlen", "onednn", "sdpa"] = Field(
        "auto",
        description="Attention back end; `auto`: on NVIDIA GPUs of Ampere or newer, flash_attn if installed, else "
        "varlen; on a CPU in float32, onednn if it is faster there; else sdpa.",
    )
    execution: Literal["auto", "eager", "compiled", "graphs", "graphs+compiled"] = Field(
        "auto",
        description="How the layers run: `eager`, one kernel at a time; `compiled`, with torch.compile; `graphs`, with "
        "CUDA graphs for small batches of texts; `auto`: `graphs+compiled` on CUDA (`graphs` without a compiler), "
        "`eager` on a CPU.",
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_THREADS)] = Field(
        "auto",
        description="Number of worker processes, each with its own copy of the model; `auto`: one for each GPU if "
        "`EMBEDDER_DEVICE` is `auto`, else one. With `EMBEDDER_DEVICE=auto`, workers are assigned to the GPUs in turn.",
    )
    stuck_after_s: float | None = Field(
        None,
        gt=0,
        le=MAX_SECONDS,
        description="Seconds after which a worker exits if a batch is not done; empty: 300 on a GPU, never on a CPU.",
    )
    # Batching and queue
    max_batch_tokens: int = Field(
        16384,
        ge=64,
        description="Maximum number of tokens (text and visual) in a batch; the service uses fewer if the GPU's memory "
        "holds no more, or if a GPU would take longer than 25 ms or a CPU longer than a second.",
    )
    max_queued_tokens: int = Field(
        524_288, ge=64, description="Estimated tokens in the queue; more is refused with 429."
    )
    cache_bytes: int = Field(
        0, ge=0, description="Maximum bytes of cached vectors, which are reused for equal content; 0: no cache."
    )
    vision_cache_bytes: int = Field(
        2**30,
        ge=0,
        description="Maximum bytes of the reranker's cached vision features, in the device's memory, which are reused "
        "for images and clips that occur again; 0: no cache. Without a reranker there is no such cache.",
    )
    preprocess_threads: int = Field(
        default_factory=lambda: min(16, available_cores()),
        ge=1,
        le=MAX_THREADS,
        description="Number of threads that decode, resize and tokenize.",
    )
    # Requests
    max_items_per_request: int = Field(2048, ge=1, description="Maximum number of items in a request.")
    max_body_bytes: int = Field(64 * 2**20, ge=1024, description="Maximum bytes of a request body.")
    max_held_bytes: int = Field(
        2**30,
        ge=1024,
        description="Maximum bytes of all request bodies in a worker; above it, bodies over 64 KiB get 429.",
    )
    max_text_chars: int = Field(
        200_000, ge=1, description="Maximum number of characters of an item's text; more is refused."
    )
    request_timeout_s: float = Field(
        60.0,
        gt=0,
        le=MAX_SECONDS,
        description="Maximum number of seconds until a body has arrived, and the same time again until its items are "
        "embedded; a request that takes longer gets 504.",
    )
    # Images and videos
    max_image_bytes: int = Field(20 * 2**20, ge=64, description="Maximum bytes of an image file.")
    max_image_pixels: int = Field(
        50_000_000, ge=4096, description="Maximum number of pixels of an image before resizing."
    )
    max_video_bytes: int = Field(48 * 2**20, ge=64, description="Maximum bytes of a video file.")
    max_video_frames: int | None = Field(
        None,
        ge=2,
        description="Maximum number of frames of a video; empty: the number of `EMBEDDER_PREPROCESSING` "
        "(`reference`: 64, published checkpoints: 768).",
    )
    max_document_pages: int = Field(
        0,
        ge=0,
        le=20_000,
        description="Maximum number of pages in a request with a document; 0: documents are refused.",
    )
    decode_timeout_s: float = Field(
        20.0,
        gt=0,
        le=MAX_SECONDS,
        description="Seconds in which an item's images and videos must be decoded; otherwise 413.",
    )
    url_hosts: str = Field(
        "",
        pattern=_URL_HOSTS,
        examples=["a.com, *.b.com, http://c.com:8080", "*"],
        description="Hosts of allowed URLs, such as `a.com, *.b.com, http://c.com:8080`, or `*`; empty: none.",
    )
    url_timeout_s: float = Field(
        10.0,
        gt=0,
        le=MAX_SECONDS,
        description="Seconds in which a URL, with its redirects, must be fetched; otherwise 424.",
    )
    # Batches
    batch_folder: str = Field(
        "", description="Folder for the files of OpenAI's batch API, shared by all workers; empty: the API is off."
    )
    max_batch_bytes: int = Field(
        10 * 2**30,
        ge=1024,
        description="Maximum bytes of all files in `EMBEDDER_BATCH_FOLDER`; more is refused with 413.",
    )
    batch_days: float = Field(
        30.0, gt=0, le=36_500, description="Days after which files and finished batches are removed from the folder."
    )
    # Access
    api_key: SecretStr | None = Field(
        None,
        description="API key that callers must send, or several keys separated by commas; if neither this variable nor "
        "`EMBEDDER_API_KEY_FILE` is set, no key is needed.",
    )
    api_key_file: str = Field(
        "", description="File with one API key per line and `#` comments; the service reads it again when it changes."
    )
    # Log and playground
    access_log: bool = Field(False, description="Log one line for each request, without its content.")
    log_format: Literal["text", "json"] = Field("text", description="`text`, or `json`: one JSON object per line.")
    demo_folder: str = Field(
        "",
        description="Folder of images that the playground searches; empty: the bundled model's drawings, if any.",
    )

    @model_validator(mode="after")
    def _one_item_fits_a_batch(self) -> Self:
        if self.max_input_tokens > self.max_batch_tokens:
            raise ValueError(
                f"max_input_tokens ({self.max_input_tokens}) exceeds max_batch_tokens ({self.max_batch_tokens}): "
                f"an item could wait forever. Raise {PREFIX}MAX_BATCH_TOKENS or lower {PREFIX}MAX_INPUT_TOKENS."
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

    @property
    def has_embedder(self) -> bool:
        """Whether an embedding model is served."""
        return bool(self.model) or not self.reranker

    def num_workers(self, num_gpus: int) -> int:
        """Worker processes on a machine with `num_gpus` GPUs, which `choose_device` assigns to them in turn."""
        if self.workers != "auto":
            return self.workers
        return max(num_gpus, 1) if self.device == "auto" else 1

    @classmethod
    def from_environment(cls) -> Self:
        """Read the settings of this process.

        Raises `ValueError` that lists, in one line, the unknown `EMBEDDER_` variables or the values out of range.
        """
        names = {f"{PREFIX}{name.upper()}" for name in cls.model_fields}
        unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in names)
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}; known are: {', '.join(sorted(names))}")
        variables = {name: os.environ.get(f"{PREFIX}{name.upper()}") for name in cls.model_fields}
        if empty := [f"{PREFIX}{name.upper()}" for name in ("api_key", "api_key_file") if variables[name] == ""]:
            raise ValueError(  # a secret that is missing must not open the service to everyone
                f"{' and '.join(empty)} is set and empty; allowed: a value, or no such variable if no key is needed"
            )
        values = {name: value for name, value in variables.items() if value}  # an empty variable counts as not set
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            faults = [_fault(dict(fault)) for fault in error.errors()]
            raise ValueError("; ".join(dict.fromkeys(faults))) from error  # each kind that a value may have is a fault


def make_metrics_folder() -> None:
    """Create the folder of this service's metrics, and remove it at exit. For the arbiter, before workers start.

    BentoML's folder is shared by all services of a user, and emptied whenever one of them starts (BentoML 1.4.40).
    """
    folder = tempfile.mkdtemp(prefix="qwen3-vl-embedding-metrics-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[METRICS_FOLDER] = folder


def metrics_folder() -> str | None:
    """The folder where prometheus_client keeps the values of all workers; None outside of a worker.

    Created again if temporary files were deleted since the service started.
    """
    if PROMETHEUS_FOLDER in os.environ and METRICS_FOLDER in os.environ:
        os.environ[PROMETHEUS_FOLDER] = os.environ[METRICS_FOLDER]
        with contextlib.suppress(OSError):  # a full disk; creating the files fails too
            os.makedirs(os.environ[METRICS_FOLDER], mode=0o700, exist_ok=True)
    return os.environ.get(PROMETHEUS_FOLDER)


def heartbeat_file(pid: int) -> Path | None:
    """The file that a worker touches every second; None outside of a service."""
    return Path(os.environ[METRICS_FOLDER], f"alive_{pid}") if METRICS_FOLDER in os.environ else None


def decoder_environment() -> dict[str, str]:
    """The environment of a decoding process: nothing that could be a secret."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    # Without thresholds, glibc returns most memory after each item, and the next one pays 600 page faults for it.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(2**25), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    return {"OPENBLAS_NUM_THREADS": "1", **malloc, **kept}


def is_log_json() -> bool:
    """Whether the operator wants lines of JSON, also where other settings cannot be read."""
    return os.environ.get(f"{PREFIX}LOG_FORMAT") == "json"


def vertex_routes() -> dict[str, str]:
    """Paths that Vertex AI, where a container runs there, asks it for -> the service's own paths."""
    own = {"AIP_HEALTH_ROUTE": "/health", "AIP_PREDICT_ROUTE": "/predict"}
    return {os.environ[name]: path for name, path in own.items() if os.environ.get(name)}


def trace_exporter_variable() -> str | None:
    """The standard variable that names where OpenTelemetry sends traces; None if none is set."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return next((name for name in names if os.environ.get(name)), None)


def _fault(fault: dict[str, object]) -> str:
    location = fault["loc"]
    if not isinstance(location, tuple) or not location:  # of a check of several settings, whose message is all
        return str(fault["msg"]).removeprefix("Value error, ")
    name, value = str(location[0]), str(fault["input"])
    shown = repr(value if len(value) <= MAX_SHOWN_CHARS else f"{value[:MAX_SHOWN_CHARS]}..")
    schema = Settings.model_json_schema()["properties"][name]
    allowed = [_allowed(kind, _UNITS.get(name.rpartition("_")[2], "")) for kind in schema.get("anyOf", [schema])]
    return f"{PREFIX}{name.upper()}={shown}; allowed: {', or '.join(filter(None, allowed))}"


def _allowed(schema: dict[str, Any], unit: str) -> str:
    """The values that a JSON schema allows, in words. Empty for null, which has no text."""
    match schema:
        case {"const": value}:
            return str(value)
        case {"enum": [*values]}:
            return ", ".join(values)
        case {"type": "boolean"}:
            return "true, false"
        case {"type": "integer" | "number" as kind}:
            words = (("minimum", "at least"), ("exclusiveMinimum", "more than"), ("maximum", "at most"))
            bounds = [
                f"{word} {schema[key]:g}" if kind == "number" else f"{word} {schema[key]}"
                for key, word in words
                if key in schema
            ]
            return f"a {'whole ' * (kind == 'integer')}number{unit}, {' and '.join(bounds)}"
        case {"examples": [*values]}:
            return f"values such as {' and '.join(repr(value) for value in values)}"
    return ""


FIRST_OF_TOPIC = {  # settings are declared by topic
    "model": "Model",
    "device": "Device",
    "max_batch_tokens": "Batching and queue",
    "max_items_per_request": "Requests",
    "max_image_bytes": "Images and videos",
    "batch_folder": "Batches",
    "api_key": "Access",
    "access_log": "Log and playground",
}


def settings_table() -> str:
    """The settings as Markdown, a table for each topic, for docs/reference/settings.md."""
    rows = []
    for name, field in Settings.model_fields.items():
        if name in FIRST_OF_TOPIC:
            rows += ["", f"## {FIRST_OF_TOPIC[name]}", "", "| variable | default | meaning |", "|---|---|---|"]
        default = "cores, at most 16" if name == "preprocess_threads" else field.default
        shown = f"`{default}`" if default not in ("", None) else "empty"
        if name.endswith("_bytes") and default:
            shown += f" ({_in_binary_units(field.default)})"
        rows.append(f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows).strip()


def _in_binary_units(num_bytes: int) -> str:
    return f"{num_bytes // 2**30} GiB" if num_bytes % 2**30 == 0 else f"{num_bytes / 2**20:g} MiB"
