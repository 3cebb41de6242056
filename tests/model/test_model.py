"""The parts of the forward pass against transformers' own. The whole: test_parity.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_vl import modeling_qwen3_vl as reference
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from embedder.errors import ModelUnavailable
from embedder.inputs.items import EmbeddingItem, Image, Text, Video
from embedder.inputs.preprocess import Preprocessor
from embedder.inputs.processor_config import read_vision_config
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.model.forward import Forward
from embedder.model.language import MAX_CACHED_TOKENS
from embedder.model.packing import MAX_SHARED_TOKENS, pack, prefix_of
from embedder.model.positions import apply_rotary, interpolate_position_grid, vision_rotary
from embedder.model.products import join_layers
from embedder.model.vision import ROPE_THETA
from embedder.model.weights import load_model, visual_cost
from embedder.settings import Settings
from tests.conftest import picture, words
from tests.model.test_attention import randn

CPU = torch.device("cpu")
GRIDS = torch.tensor([[1, 2, 2], [1, 4, 62], [3, 6, 4], [1, 48, 48], [1, 80, 2]])  # time, height, width in patches


@pytest.fixture(scope="module")
def model(random_checkpoint: Path) -> Any:
    """As transformers computes it."""
    loaded = reference.Qwen3VLModel.from_pretrained(random_checkpoint, dtype=torch.float32, attn_implementation="sdpa")
    return loaded.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def arranged(random_checkpoint: Path) -> Any:
    """The same weights, for our forward pass."""
    loaded: Any = load_model(random_checkpoint, torch.float32, CPU)
    join_layers(loaded.language_model.layers)
    return loaded


# Positions


def test_vision_rotary_is_transformers(model: Any) -> None:
    coordinates = get_vision_position_ids(GRIDS, 2)
    tower = model.visual
    head_dim = tower.config.hidden_size // tower.config.num_heads
    cos, sin = vision_rotary(coordinates, head_dim, ROPE_THETA)
    expected = tower.rotary_pos_emb(torch.empty(0), coordinates)
    # rows reach 80, where one float32 rounding of the angle is 4e-6
    assert torch.allclose(cos, expected[0], rtol=0, atol=1e-5)
    assert torch.allclose(sin, expected[1], rtol=0, atol=1e-5)


def test_rotation_is_transformers_in_both_towers() -> None:
    states, cos, sin = randn(7, 3, 8), randn(7, 8, seed=1), randn(7, 8, seed=2)
    ours = apply_rotary(states, cos, sin)
    vision, _ = reference.apply_rotary_pos_emb_vision(states, states, cos, sin)
    text, _ = reference.apply_rotary_pos_emb(states[None], states[None], cos[None], sin[None], unsqueeze_dim=2)
    assert torch.allclose(ours, vision, rtol=0, atol=1e-6)
    assert torch.allclose(ours, text[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [8, 24, 48])
def test_position_grid_is_resampled_as_in_transformers(side: int) -> None:
    table = randn(side * side, 5)
    indices, weights = get_vision_interpolation_indices_and_weights(
        GRIDS, side, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    expected = (table[indices] * weights[:, :, None]).sum(1)
    sizes = torch.cat([grid[1:].expand(int(grid.prod()), 2) for grid in GRIDS])
    resampled = interpolate_position_grid(table, get_vision_position_ids(GRIDS, 2), sizes)
    assert torch.allclose(resampled, expected, rtol=0, atol=1e-4)  # a place up to 47 rounds by 4e-6, values reach 4


def test_position_grid_of_its_own_size_is_itself() -> None:
    table = randn(64, 5)
    coordinates = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    resampled = interpolate_position_grid(table, coordinates, torch.full((64, 2), 8))
    assert torch.allclose(resampled, table, rtol=0, atol=1e-5)


# The whole, step by step


@pytest.fixture(scope="module")
def preprocessor(random_checkpoint: Path) -> Preprocessor:
    settings = Settings()
    return Preprocessor(load_tokenizer(random_checkpoint), read_vision_config(random_checkpoint, settings), settings)


def test_visual_cost_is_what_the_towers_multiply(model: Any, preprocessor: Preprocessor) -> None:
    """By torch's own count, without attention; norms, which do no products, are the percents between."""
    (patches,) = preprocessor(EmbeddingItem((Image(picture(128, 128)),))).patches
    pixels = torch.zeros(len(patches.pixels), 2 * patches.pixels.shape[1])

    def products(call: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            call()
        return sum(n for name, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))

    of_vision = products(lambda: model.visual(pixels, grid_thw=torch.tensor([patches.grid_thw])))
    embedded = torch.zeros(1, 16, model.config.text_config.hidden_size)
    of_language = products(lambda: model.language_model(inputs_embeds=embedded))
    expected = (of_vision / (len(pixels) / 4)) / (of_language / 16)
    assert visual_cost(model) == pytest.approx(expected, rel=0.05)


def test_packed_vision_tower_is_transformers(model: Any, arranged: Any, preprocessor: Preprocessor) -> None:
    """Normalization folded into the patch embedding, a picture's two frames into one, clips behind pictures."""
    items = [
        EmbeddingItem((Video((picture(64, 96, 1), picture(64, 96, 2), picture(64, 96, 3))), Text("clip"))),
        EmbeddingItem((Image(picture(64, 64, 5)), Image(picture(100, 70, 4)))),
    ]
    inputs = [preprocessor(item) for item in items]
    packed = pack(inputs, 2, CPU).vision
    assert packed is not None
    assert packed.patches is not None
    forward = Forward(arranged, preprocessor.vision, "sdpa")
    with torch.inference_mode():
        tokens, deepstack = forward.vision(packed.patches)
        ordered = [*inputs[1].patches, *inputs[0].patches]  # pictures first, the small one before the large
        pixels = [one.pixels.reshape(-1, 3, one.num_frames, 256).repeat(2 // one.num_frames, 2) for one in ordered]
        normalized = (torch.from_numpy(np.concatenate(pixels)).flatten(1).float() / 255 - 0.5) / 0.5
        expected = model.visual(normalized, grid_thw=torch.tensor([one.grid_thw for one in ordered]))
    assert torch.allclose(tokens, expected.pooler_output, rtol=0, atol=1e-5 * float(tokens.abs().max()))
    assert len(deepstack) == len(expected.deepstack_features) == 2
    for one, other in zip(deepstack, expected.deepstack_features, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))


def rows_of(forward: Forward, preprocessor: Preprocessor, items: list[EmbeddingItem]) -> Tensor:
    return forward(pack([preprocessor(item) for item in items], 2, CPU))


@pytest.mark.parametrize("before", ["", "\n", "\n\n ", " "])
def test_kept_prefix_gives_the_same_states(model: Any, arranged: Any, preprocessor: Preprocessor, before: str) -> None:
    items = [EmbeddingItem((Text(before + words(5, seed)),), instruction=f"Task {seed % 3}") for seed in range(7)]
    forward = Forward(arranged, preprocessor.vision, "sdpa")
    cold, warm = rows_of(forward, preprocessor, items), rows_of(forward, preprocessor, items)
    assert len(forward.language._prefix_cache) == 3
    assert torch.equal(cold, warm)
    for item, row in zip(items, warm, strict=True):
        one = preprocessor(item)
        with torch.inference_mode():
            states = model(input_ids=torch.from_numpy(one.input_ids)[None]).last_hidden_state
        assert torch.allclose(row, states[0, -1], rtol=0, atol=1e-5 * float(row.abs().max()))


def test_kept_prefixes_are_bounded_and_the_oldest_goes_first(arranged: Any, preprocessor: Preprocessor) -> None:
    forward = Forward(arranged, preprocessor.vision, "sdpa")
    for seed in range(60):
        rows_of(forward, preprocessor, [EmbeddingItem((Text("red"),), instruction=words(60, seed))])
    kept = list(forward.language._prefix_cache)
    assert MAX_CACHED_TOKENS / 2 < sum(map(len, kept)) <= MAX_CACHED_TOKENS
    newest = preprocessor(EmbeddingItem((Text("red"),), instruction=words(60, 59)))
    assert kept[-1] == prefix_of(newest)


def test_batch_of_many_instructions_keeps_the_first_of_them(arranged: Any, preprocessor: Preprocessor) -> None:
    """And gives the same rows; keys and values of each would take memory in every layer."""
    forward = Forward(arranged, preprocessor.vision, "sdpa")
    items = [EmbeddingItem((Text(words(5, seed)),), instruction=words(60, seed)) for seed in range(20)]
    together = rows_of(forward, preprocessor, items)
    assert MAX_SHARED_TOKENS / 2 < sum(map(len, forward.language._prefix_cache)) <= MAX_SHARED_TOKENS
    for item, row in zip(items, together, strict=True):
        alone = rows_of(Forward(arranged, preprocessor.vision, "sdpa"), preprocessor, [item])[0]
        assert torch.allclose(row, alone, rtol=0, atol=1e-5 * float(row.abs().max()))


def test_very_long_instruction_is_not_kept(arranged: Any, preprocessor: Preprocessor) -> None:
    forward = Forward(arranged, preprocessor.vision, "sdpa")
    items = [EmbeddingItem((Text("red"),), instruction=words(400)), EmbeddingItem((Text("green"),))]
    together = rows_of(forward, preprocessor, items)
    assert [len(prefix) < 30 for prefix in forward.language._prefix_cache] == [True]
    for item, row in zip(items, together, strict=True):
        alone = rows_of(forward, preprocessor, [item])[0]
        assert torch.allclose(row, alone, rtol=0, atol=1e-5 * float(row.abs().max()))


def test_state_of_the_last_token_is_transformers(model: Any, arranged: Any, preprocessor: Preprocessor) -> None:
    inputs = [preprocessor(EmbeddingItem((Text(words(count, count)),))) for count in (1, 30, 7, 30)]
    with torch.inference_mode():
        rows = Forward(arranged, preprocessor.vision, "sdpa")(pack(inputs, 2, CPU))
        for row, one in zip(rows, inputs, strict=True):
            states = model(input_ids=torch.from_numpy(one.input_ids)[None]).last_hidden_state
            assert torch.allclose(row, states[0, -1], rtol=0, atol=1e-5 * float(row.abs().max()))


# Weights


@pytest.fixture
def damaged(random_checkpoint: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], Any]], Path]:
    """A copy of the checkpoint with its weights changed."""

    def damage(change: Callable[[dict[str, Tensor]], Any]) -> Path:
        for path in random_checkpoint.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        weights = load_file(tmp_path / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return damage


@pytest.mark.parametrize("name", ["visual.merger.norm.weight", "language_model.layers.0.self_attn.q_norm.weight"])
def test_missing_weight_stops_the_start_by_name(name: str, damaged: Any) -> None:
    folder = damaged(lambda weights: weights.pop(f"model.{name}"))
    with pytest.raises(ModelUnavailable, match=f"the weights lack 1 of those that config.json describes, e.g. {name}$"):
        load_model(folder, torch.float32, CPU)


def test_weight_of_another_shape_stops_the_start(damaged: Any) -> None:
    folder = damaged(lambda weights: weights.update({"model.visual.merger.norm.weight": torch.ones(3)}))
    with pytest.raises(ModelUnavailable, match=r"visual\.merger\.norm\.weight has the shape \[3\]; config\.json"):
        load_model(folder, torch.float32, CPU)


@pytest.mark.parametrize("length", [None, 0, 5000])
def test_weights_that_are_missing_or_cut_short_stop_the_start(length: int | None, damaged: Any) -> None:
    folder = damaged(lambda weights: None)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    if length is not None:
        (folder / "model.safetensors").write_bytes(data[:length])
    with pytest.raises(ModelUnavailable, match=r"^cannot (load|read) "):
        load_model(folder, torch.float32, CPU)


def test_names_in_a_config_fetch_and_import_nothing(damaged: Any, random_checkpoint: Path) -> None:
    """Each of these makes transformers look for hub code, another model, or a package."""
    folder = damaged(lambda weights: None)
    named = {
        "attn_implementation": "kernels-community/no-such-kernel",
        "_attn_implementation": "owner/kernel",
        "_attn_implementation_internal": "owner/kernel",
        "experts_implementation": "owner/kernel",
        "auto_map": {"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"},
        "trust_remote_code": True,
        "transformers_weights": "pytorch_model.bin",
        "fusion_config": {"a": True},
        "per_layer_config": {"0": {"attn_implementation": "owner/kernel"}},
        "dtype": "no_such_dtype",
        "name_or_path": "owner/model",
    }
    fields = json.loads((folder / "config.json").read_text())
    fields = {**fields, **named, **{part: {**fields[part], **named} for part in ("text_config", "vision_config")}}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}')
    (folder / "modeling.py").write_text("raise SystemExit('imported')")
    (folder / "pytorch_model.bin").write_bytes(b"not weights")
    loaded, expected = (load_model(one, torch.float32, CPU) for one in (folder, random_checkpoint))
    assert loaded.config == expected.config
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


def test_pickled_weights_are_never_read(damaged: Any) -> None:
    folder = damaged(lambda weights: None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match=r"found: no \.safetensors file\); other formats are not read"):
        load_model(folder, torch.float32, CPU)


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"text_config": "owner/config"},
        {"text_config": {"hidden_act": "owner/kernel"}},
        {"text_config": {"rope_parameters": {"rope_type": "owner/kernel", "rope_theta": 1.0}}},
        {"vision_config": []},
    ],
    ids=str,
)
def test_config_that_cannot_be_used_stops_the_start(fields: dict[str, Any], damaged: Any) -> None:
    folder = damaged(lambda weights: None)
    given = json.loads((folder / "config.json").read_text())
    merged = {**given, **{k: {**given[k], **v} if isinstance(v, dict) and k in given else v for k, v in fields.items()}}
    (folder / "config.json").write_text(json.dumps(merged))
    with pytest.raises(ModelUnavailable, match=r"^cannot (use|load) "):
        load_model(folder, torch.float32, CPU)


def test_weights_have_the_dtype_asked_for_and_learn_nothing(random_checkpoint: Path) -> None:
    model = load_model(random_checkpoint, torch.bfloat16, CPU)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model.training
