"""Graphs of small text batches: what they lay out is exact on any device; that they replay it right needs CUDA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from embedder import Embedder
from embedder.inputs.items import EmbeddingItem, Image, Text
from embedder.inputs.preprocess import ModelInput
from embedder.model.cuda_graphs import MAX_ITEMS, SIZES, TextGraphs, graph_size, pad_to_size, static_batch, static_bytes
from embedder.model.packing import pack
from tests.conftest import picture

CPU = torch.device("cpu")
TEXTS = ("red", "a much longer query about a green square", "a", "blue")


def texts(embedder: Embedder, *contents: str) -> list[ModelInput]:
    return [embedder.preprocessor(EmbeddingItem((Text(content),))) for content in contents]


def test_filled_batch_gives_the_same_rows(embedder: Embedder) -> None:
    inputs = texts(embedder, *TEXTS)
    plain = embedder.forward(pack(inputs, 1, CPU))
    rows = embedder.forward(pack(pad_to_size(inputs, 256), 1, CPU))[: len(inputs)]
    assert torch.allclose(rows, plain, rtol=0, atol=1e-5)  # before unit length, where values reach 10


def test_batch_that_fills_its_graph_gets_no_filler(embedder: Embedder) -> None:
    inputs = texts(embedder, "red")
    assert len(pad_to_size(inputs, inputs[0].num_tokens)) == 1


def test_graph_reads_the_batch_and_nothing_of_the_one_before(embedder: Embedder) -> None:
    buffer, batch = static_batch(256, CPU)
    for contents in (TEXTS, TEXTS[:1], ("red",) * 8):
        inputs = texts(embedder, *contents)
        buffer.copy_(static_bytes(inputs, 256))
        expected = pack(pad_to_size(inputs, 256), 1, CPU)
        num_items = len(expected.pooled_index)
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.equal(batch.position_ids, expected.position_ids)
        assert torch.equal(batch.pooled_index[:num_items], expected.pooled_index)
        assert torch.equal(batch.sequences.cu_seqlens[: num_items + 1], expected.sequences.cu_seqlens)
        assert batch.sequences.cu_seqlens[num_items + 1 :].eq(256).all()  # empty items


def test_graph_is_the_smallest_that_holds_the_batch(embedder: Embedder) -> None:
    query = texts(embedder, "red")
    assert graph_size(query) == next(size for size in SIZES if size >= query[0].num_tokens)
    assert graph_size(texts(embedder, "red " * max(SIZES))) is None
    assert graph_size(query * (MAX_ITEMS + 1)) is None
    assert graph_size([embedder.preprocessor(EmbeddingItem((Image(picture(64, 64)),)))]) is None


@pytest.mark.gpu
def test_replayed_graph_equals_the_plain_forward(random_checkpoint: Path) -> None:
    with Embedder(str(random_checkpoint), device="cuda", attention="varlen") as embedder:
        graphs = TextGraphs(embedder.forward.language, embedder.device)
        for contents in (TEXTS[:1], TEXTS, TEXTS[::-1], TEXTS[:1]):  # a graph keeps nothing of the batch before
            inputs = texts(embedder, *contents)
            plain = embedder.forward(pack(inputs, 1, embedder.device)).float().cpu().numpy()
            rows = graphs(inputs, graph_size(inputs) or 0).float().cpu().numpy()
            cosine = (plain * rows).sum(1) / np.linalg.norm(plain, axis=1) / np.linalg.norm(rows, axis=1)
            assert cosine.min() >= 0.9999
