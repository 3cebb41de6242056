"""The fast forward pass of the training computes the same values as plain transformers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3VLModel, Qwen3VLProcessor

from benchmarks.random_checkpoint import build_tokenizer, shape_config, write_checkpoint
from training import data as pictures
from training import forward
from training.evaluate import held_out_keywords
from training.prepare import is_held_out, release_late_keywords
from training.prompt import DEFAULT_INSTRUCTION, TAIL, prefix_ids, text_tokens, visual_tokens
from training.train import Captions, Training

PREFIX = f"<|im_start|>system\n{DEFAULT_INSTRUCTION}<|im_end|>\n<|im_start|>user\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = build_tokenizer([DEFAULT_INSTRUCTION, "system user assistant"], vocab_size=400)
    write_checkpoint(folder, shape_config("tiny", tokenizer), tokenizer)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return Qwen3VLModel.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return Qwen3VLProcessor.from_pretrained(checkpoint)


def noise(num_pictures: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_pictures, height, width, 3), dtype=np.uint8)


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def test_pictures_equal_plain_transformers(model: Any, processor: Any) -> None:
    frames = noise(3, 96, 160)
    text = PREFIX + "<|vision_start|><|image_pad|><|vision_end|>" + TAIL
    inputs = processor(text=[text] * 3, images=list(frames), return_tensors="pt")
    expected = model(**inputs).last_hidden_state[:, -1]
    ids = prefix_ids(processor.tokenizer, DEFAULT_INSTRUCTION)
    tokens = visual_tokens(processor.tokenizer, model, ids, 3, (96, 160))
    assert torch.equal(torch.cat((ids, tokens.input_ids[0])), inputs.input_ids[0])
    features = forward.see(model, to_pixels(frames))
    prefix = forward.read_prefix(model, ids)
    vectors = forward.read(
        model, prefix, tokens.input_ids, tokens.lengths, tokens.position_ids, tokens.visual_at, features
    )
    torch.testing.assert_close(vectors, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_texts_of_different_length_equal_plain_transformers(model: Any, processor: Any) -> None:
    texts = ["cat", "a much longer thing to read"]
    expected = [
        model(**processor.tokenizer(PREFIX + text + TAIL, return_tensors="pt")).last_hidden_state[0, -1]
        for text in texts
    ]
    ids = prefix_ids(processor.tokenizer, DEFAULT_INSTRUCTION)
    tokens = text_tokens(processor.tokenizer, texts, len(ids))
    prefix = forward.read_prefix(model, ids)
    vectors = forward.read(model, prefix, tokens.input_ids, tokens.lengths, tokens.position_ids)
    torch.testing.assert_close(vectors, torch.stack(expected), atol=2e-5, rtol=0)


@torch.no_grad()
def test_two_different_frames_equal_plain_transformers(model: Any) -> None:
    first, second = to_pixels(noise(2, 64, 64)).split(1)
    patches = torch.stack((forward.patchify(first), forward.patchify(second)), dim=2)  # (1, patches, 2, 768)
    rows = patches[0].view(16, 2, 3, 16, 16).transpose(1, 2).reshape(16, -1)
    expected = model.visual(rows, torch.tensor([[1, 4, 4]]))
    features = forward.see(model, first, second)
    torch.testing.assert_close(features.tokens[0], expected.pooler_output, atol=2e-5, rtol=0)
    torch.testing.assert_close(features.deepstack[1][0], expected.deepstack_features[1], atol=2e-5, rtol=0)


def test_held_out_keywords_never_change() -> None:
    chosen = [word for word in ("cat", "heart", "music", "snow", "party", "sea", "angry", "fruit") if is_held_out(word)]
    assert chosen == ["heart", "angry"]


def test_shapes_keep_their_color() -> None:
    for shape in pictures.SHAPES:
        picture = pictures.shape_picture(5, shape, (64, 96), np.random.default_rng(1))
        assert (picture == pictures.COLORS[5]).all(-1).mean() > 0.02


def captions_of(names: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Captions from names and keywords; the hash selects the held-out keywords."""
    return [
        {
            "emoji": name,
            "name": name,
            "keywords": [word for word in words if not is_held_out(word)],
            "late_keywords": [],
            "held_out_keywords": [word for word in words if is_held_out(word)],
        }
        for name, words in names.items()
    ]


def test_late_stages_use_a_held_out_keyword_for_half_of_its_drawings(tmp_path: Path) -> None:
    captions = captions_of({"one": ["heart", "cat"], "two": ["heart"], "three": ["heart", "angry"], "four": ["sea"]})
    release_late_keywords(captions)
    late = [caption["name"] for caption in captions if caption["late_keywords"] == ["heart"]]
    assert len(late) == 1
    assert sorted(word for caption in captions for word in caption["held_out_keywords"]) == ["angry", "heart", "heart"]
    (tmp_path / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    names = [caption["name"] for caption in captions]
    assert "heart" not in Captions(tmp_path).meanings
    meanings = Captions(tmp_path, late=True).meanings
    assert meanings["heart"] == {names.index(late[0])}
    assert "angry" not in meanings
    assert meanings["cat"] == {names.index("one")}
    found = held_out_keywords(captions)
    assert found["half of its drawings"] == {"heart": {0, 1, 2}}
    assert found["all drawings"] == {}  # "angry" occurs in no training text


def test_distillation_loss_is_zero_for_equal_rankings_and_trains_the_smaller_size() -> None:
    sizes: Any = SimpleNamespace(directions=[(4, None, None), (8, None, None)])
    rows, columns = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    alike, other = rows.clone(), rows.clone().requires_grad_()
    alike[:, 4:] = 0
    assert Training.imitation_loss(sizes, alike, columns * (torch.arange(8) < 4)).abs() < 1e-6
    loss = Training.imitation_loss(sizes, other, columns)
    assert loss > 0.1
    loss.backward()
    assert other.grad is not None
    assert (other.grad[:, 4:] == 0).all()  # the full size is the target and gets no gradient
