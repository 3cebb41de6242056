"""The forward pass of the reranker's training computes the scores of plain transformers; its last layer multiplies."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3VLModel

from benchmarks.random_checkpoint import build_reranker_tokenizer, shape_config, write_checkpoint
from tests.rerank_oracle import RerankOracle
from training import forward, pairs
from training.data import mixed
from training.last_layer import ANSWER, END, LENGTH, MARK, MARKED, OTHERS, THRESHOLD, VECTOR, mark_loss, with_last_layer
from training.prompt import TAIL
from training.train import to_pixels
from training.train_reranker import nearest_of, stored_dtype

SIZE = (64, 96)
TEXTS = ["red heart", "a smiling cat with three hats", "7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reranker")
    tokenizer = build_reranker_tokenizer([pairs.prefix_text(), *TEXTS], 1000)
    config = shape_config("tiny", tokenizer)
    write_checkpoint(folder, config, tokenizer, seed=3, is_reranker=True)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return Qwen3VLModel.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def reranker(folder: Path, tokenizer: Qwen2Tokenizer) -> Any:
    return with_last_layer(Qwen3VLModel.from_pretrained(folder, dtype=torch.bfloat16), tokenizer)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> RerankOracle:
    return RerankOracle(folder)


def pictures(seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for _ in range(2)]


@pytest.mark.parametrize("query_kind", ["text", "image", "both"])
@pytest.mark.parametrize("document_kind", ["text", "image", "both"])
def test_scores_equal_those_of_transformers(
    tokenizer: Qwen2Tokenizer, model: Any, oracle: RerankOracle, query_kind: str, document_kind: str
) -> None:
    parts, items = [], []
    for kind, end, seed in ((query_kind, pairs.AFTER_QUERY, 1), (document_kind, TAIL, 2)):
        images = pictures(seed)
        texts = ["", ""] if kind == "image" else TEXTS[seed - 1 : seed + 1]
        with torch.no_grad():
            features = None if kind == "text" else forward.see(model, to_pixels(images))
        parts.append(pairs.part_of(tokenizer, texts, end, None if kind == "text" else SIZE, features))
        fields = [{"text": text, "image": Image.fromarray(image)} for text, image in zip(texts, images, strict=True)]
        kept = {"text": ("text",), "image": ("image",), "both": ("text", "image")}[kind]
        items.append([{name: one[name] for name in kept} for one in fields])
    ids = torch.tensor(tokenizer(pairs.prefix_text()).input_ids)
    with torch.no_grad():
        scores = torch.sigmoid(pairs.Scored(model, tokenizer, ids, *parts).log_odds())
    expected = [[oracle.score(query, document) for document in items[1]] for query in items[0]]
    assert len({round(score, 4) for row in expected for score in row}) == 4
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_last_layer_multiplies_the_query_with_the_document(reranker: Any) -> None:
    """Its answer is the cosine of the vectors, however long they are and however far apart."""
    model = copy.deepcopy(reranker).float()
    torch.manual_seed(0)
    asked, found = (F.normalize(torch.randn(num, VECTOR.stop), dim=-1) for num in (3, 4))
    common = states_of(model, noise(1, 1, 20), 0)
    query_states = noise(3, 1, 9)
    query_states[:, 0, -1, VECTOR] = asked * LENGTH
    query_states[:, 0, -1, OTHERS] = 0
    query_states[..., -1, MARK] = MARKED
    document_states = noise(3, 4, 300)
    lengths = torch.tensor([0.8, 1.0, 1.2, 1.4])[:, None] * LENGTH
    document_states[:, :, -1, VECTOR] = found * lengths
    document_states[:, :, -1, OTHERS] = 0
    document_states[:, :, -1, END] = MARKED
    past = [common, states_of(model, query_states, 20)]
    documents = states_of(model, document_states, 29)
    part = part_with(num_items=4, num_tokens=300)
    answers = pairs.last_layer(model, documents, past, torch.full((3,), 29), part)[..., ANSWER]
    wanted = asked @ found.T - THRESHOLD
    factor = float((answers * wanted).sum() / wanted.square().sum())
    assert factor > 0.5
    torch.testing.assert_close(answers / factor, wanted, atol=0.05, rtol=0)


def noise(*shape: int) -> Tensor:
    """Unmarked hidden states of a usual length."""
    states = torch.randn(*shape, 192)
    states[..., [MARK, END]] = -MARKED
    return states


def states_of(model: Any, hidden_states: Tensor, start: int) -> pairs.States:
    layer = model.language_model.layers[-1]
    batch, num_tokens = hidden_states.shape[:2], hidden_states.shape[2]
    position_ids = torch.arange(start, start + num_tokens).expand(3, *batch, -1)
    cos, sin = pairs.angles(model, hidden_states, position_ids)
    counts = torch.ones(*batch, num_tokens, dtype=torch.bool)
    block = (*pairs.keys_values(layer.self_attn, layer.input_layernorm(hidden_states), cos, sin), counts)
    return pairs.States(hidden_states, [block])


def part_with(num_items: int, num_tokens: int) -> pairs.Part:
    lengths = torch.full((num_items,), num_tokens)
    position_ids = torch.arange(num_tokens).expand(3, num_items, -1)
    return pairs.Part(torch.zeros(num_items, num_tokens, dtype=torch.long), lengths, position_ids, lengths)


def test_only_the_last_tokens_are_marked(model: Any) -> None:
    queries, documents = part_with(2, 5), part_with(3, 6)
    marked = [noise(1, 1, 4), noise(2, 1, 5), noise(2, 3, 6)]
    marked[1][:, 0, -1, MARK] = MARKED
    marked[2][:, :, -1, END] = MARKED
    right = [states_of(model, states, 0) for states in marked]
    assert float(mark_loss(right, queries, documents)) == 0
    marked[2][0, 0, 2, MARK] = MARKED
    assert float(mark_loss(right, queries, documents)) > 0


def test_mixed_drawings_are_between_two_styles() -> None:
    one, other = (Image.new("RGBa", (112, 112), color) for color in ((200, 0, 0, 255), (0, 0, 200, 255)))
    random = np.random.default_rng(0)
    drawings = [np.asarray(mixed(one, other, random)) for _ in range(20)]
    assert all(drawing.shape == (112, 112, 4) for drawing in drawings)
    inner = np.stack(drawings)[:, 20:-20, 20:-20].astype(int)
    assert (abs(inner[..., 0] + inner[..., 2] - 200) < 30).all()
    assert len({tuple(drawing.mean((0, 1)).round(1)) for drawing in inner}) > 15


def test_confused_drawings_are_the_nearest_others() -> None:
    nearest = nearest_of(F.normalize(torch.randn(40, 8), dim=-1))
    assert nearest.shape == (40, 16)
    assert all(row not in nearest[row] for row in range(40))


def test_stored_weights_fit_ten_megabytes(reranker: Any) -> None:
    num_bytes = sum(weight.numel() * stored_dtype(name).itemsize for name, weight in reranker.named_parameters())
    missing_tokens = (6144 - reranker.config.text_config.vocab_size) * reranker.config.text_config.hidden_size
    assert num_bytes + missing_tokens < 9.5e6
