"""How the layers run is chosen from the setting, the device and the compilers that are there."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from embedder import Embedder, loaded_model
from embedder.errors import ModelUnavailable
from embedder.model import execution, language
from embedder.model.execution import Execution, by_rows, choose_execution
from embedder.model.products import arrange_products
from embedder.model.weights import load_model
from tests.conftest import words

ignores_torch_warning = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all programs and headers that are found; Triton seems to be installed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec("json" if name == "triton" else name))
    return tmp_path


def add_program(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("compiler", ["gcc", "clang", "cc"])
def test_gpu_with_a_compiler_runs_graphs_of_compiled_layers(compiler: str, tools: Path) -> None:
    add_program(tools, compiler)
    assert str(choose_execution("auto", CUDA, "varlen")).startswith("graphs+compiled (the default on a GPU with")


def test_compiler_of_the_environment_counts(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_program(tools, "my-cc")
    monkeypatch.setenv("CC", "my-cc")
    assert choose_execution("auto", CUDA, "varlen").is_compiled


def test_gpu_without_a_compiler_runs_graphs_and_says_what_is_missing(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(choose_execution("auto", CUDA, "varlen")) == "graphs (not compiled: there is no C compiler)"
    add_program(tools, "gcc")
    (tools / "Python.h").unlink()
    assert str(choose_execution("auto", CUDA, "varlen")).startswith(
        f"graphs (not compiled: {tools}/Python.h is missing"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert str(choose_execution("auto", CUDA, "varlen")) == "graphs (not compiled: Triton is not installed)"


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("setting", ["eager", "compiled", "graphs", "graphs+compiled"])
def test_setting_is_obeyed_on_a_gpu_whatever_is_installed(setting: str) -> None:
    assert str(choose_execution(setting, CUDA, "flash_attn")) == f"{setting} (EMBEDDER_EXECUTION={setting})"


def test_cpu_runs_eagerly_unless_told_to_compile() -> None:
    assert str(choose_execution("auto", CPU, "sdpa")) == "eager (the default on a CPU)"
    assert choose_execution("compiled", CPU, "sdpa").is_compiled


@pytest.mark.parametrize("setting", ["graphs", "graphs+compiled"])
def test_graphs_without_a_gpu_are_refused(setting: str, random_checkpoint: Path) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        Embedder(str(random_checkpoint), device="cpu", attention="sdpa", execution=setting)
    assert str(caught.value) == (
        f"EMBEDDER_EXECUTION={setting} needs a GPU with varlen or flash_attn; the device is cpu, the "
        "attention back end sdpa"
    )


def test_gpu_without_packed_attention_runs_eagerly_and_refuses_graphs() -> None:
    assert str(choose_execution("auto", CUDA, "sdpa")) == "eager (the default on cuda:0 with sdpa)"
    with pytest.raises(ModelUnavailable, match=r"device is cuda:0, the attention back end sdpa$"):
        choose_execution("graphs", CUDA, "sdpa")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no kernel for this device\n\nand a long explanation"),
        ImportError("no kernel for this device"),  # a library of Triton's on a disk mounted without exec
        PermissionError("no kernel for this device"),
        subprocess.SubprocessError("no kernel for this device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_default_that_does_not_work_here_is_logged_and_left_out(
    error: Exception,
    random_checkpoint: Path,
    embedder: Embedder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    chosen = replace(choose_execution("compiled", CPU, "sdpa"), is_required=False)
    monkeypatch.setattr(loaded_model, "choose_execution", lambda *_: chosen)
    with caplog.at_level(logging.INFO), Embedder(str(random_checkpoint), device="cpu") as other:
        (vector,) = other.embed(["red"])
    assert abs(vector - embedder.embed(["red"])[0]).max() <= 1e-6
    assert "the layers cannot be compiled: no kernel for this device; the service works, but" in caplog.text
    assert "layers eager (the layers cannot be compiled: no kernel for this device)" in caplog.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"),
            "operation not permitted",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "no memory is left for the graphs: OutOfMemoryError: CUDA out"),
    ],
    ids=["not permitted", "no memory"],
)
def test_graphs_that_cannot_be_recorded_are_logged_and_left_out(
    error: Exception,
    reason: str,
    random_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(loaded_model, "TextGraphs", fail)
    default = Execution(is_compiled=False, has_graphs=True, is_required=False, reason="the default")
    monkeypatch.setattr(loaded_model, "choose_execution", lambda *_: default)
    with Embedder(str(random_checkpoint), device="cpu") as embedder:
        assert len(embedder.embed(["red"])) == 1
    assert reason in caplog.text
    assert "; the service works, but short texts take longer" in caplog.text
    monkeypatch.setattr(loaded_model, "choose_execution", lambda *_: replace(default, is_required=True))
    with pytest.raises(ModelUnavailable, match=reason):
        Embedder(str(random_checkpoint), device="cpu", execution="eager")


def test_required_compilation_that_does_not_work_stops_the_start(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    with pytest.raises(ModelUnavailable, match=r"^EMBEDDER_EXECUTION=compiled: the layers cannot be compiled: no k"):
        Embedder(str(random_checkpoint), device="cpu", execution="compiled")


@pytest.mark.parametrize("is_in_place", [True, False])
def test_rows_are_computed_in_parts_of_about_equal_length(is_in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "CPU_ROWS", 64)
    lengths = []

    def add(states: Tensor, attended: Tensor) -> Tensor:
        lengths.append(len(states))
        return states.add_(attended * 3) if is_in_place else states + attended * 3

    states, attended = torch.arange(300.0).view(150, 2), torch.ones(150, 2)
    output = states.clone()
    assert torch.equal(by_rows(add, output, output, attended), states + 3)
    assert lengths == [50, 50, 50]


@pytest.mark.parametrize(("weights", "is_in_parts"), [(None, True), ("int8", False)])
def test_weights_of_eight_bits_are_used_once_a_batch(
    weights: Literal["int8"] | None, is_in_parts: bool, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be converted for each product."""
    monkeypatch.setattr(execution, "CPU_ROWS", 4)
    lengths = []
    compute = language._output_and_mlp

    def counted(layer: Any, states: Tensor, attended: Tensor) -> Tensor:
        lengths.append(len(states))
        return compute(layer, states, attended)

    monkeypatch.setattr(language, "_output_and_mlp", counted)
    with Embedder(str(random_checkpoint), device="cpu", dtype="float32", weights=weights) as embedder:
        lengths.clear()
        embedder.embed([words(40)])
    assert (max(lengths) <= 4) == is_in_parts


@ignores_torch_warning
def test_compiled_layer_is_one_graph_for_all_layers_and_numbers_of_tokens(random_checkpoint: Path) -> None:
    """Its weights have fixed shapes, so that the compiler divides by constants."""
    model: Any = load_model(random_checkpoint, torch.float32, CPU)
    arrange_products(model, is_compiled=True)
    shapes: list[dict[str, torch.Size]] = []

    def record(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        values = {node.name: node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"}
        shapes.append({name: value.shape for name, value in values.items() if isinstance(value, Tensor)})
        return graph.forward

    compiled = torch.compile(language._query_key_value, dynamic=True, fullgraph=True, backend=record)
    with torch.inference_mode():
        for num_tokens in (60, 2, 17, 300):
            for layer in model.language_model.layers[:-1]:
                head_dim = layer.self_attn.head_dim
                compiled(
                    layer,
                    *(
                        torch.ones(num_tokens, size)
                        for size in (layer.input_layernorm.weight.numel(), head_dim, head_dim)
                    ),
                )
    (found,) = shapes
    weights = {name: shape for name, shape in found.items() if "weight" in name}
    assert len(weights) == 3
    assert all(type(size) is int for shape in weights.values() for size in shape)
