"""Token embeddings in 12 bits are those of the checkpoint, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from embedder.model.compact_table import CompactTable, compact_bytes, stores_compactly
from embedder.model.weights import load_model
from tests.model.test_eight_bit import randn

CPU = torch.device("cpu")


def table_of(weight: Tensor) -> CompactTable:
    table = CompactTable(*weight.shape)
    table.compress(weight)
    return table


def hostile_weight() -> Tensor:
    """Rows of all sizes, and values far smaller than the largest of their row, in one row without an end."""
    weight = (randn(3000, 64) * torch.logspace(-30, 30, 3000)[:, None]).bfloat16()
    weight[3] = 0
    weight[5, 7], weight[6, 1], weight[6, 2] = torch.nan, torch.inf, -0.0
    weight[8] *= 1e-30
    weight[9, :40] *= 1e-20
    weight[10] = torch.logspace(-38, 38, 64)
    weight[2999, :] = torch.tensor(1e-45).bfloat16()
    return weight


def test_rows_are_equal_bit_for_bit() -> None:
    weight = hostile_weight()
    ids = torch.cat([torch.arange(3000), torch.tensor([9, 10, 9, 2999, 0])])
    rows = table_of(weight)(ids)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows.view(torch.int16), weight[ids].view(torch.int16))


@pytest.mark.parametrize("ids", [[], [10], [3, 3]])
def test_few_rows_are_read(ids: list[int]) -> None:
    weight = hostile_weight()
    index = torch.tensor(ids, dtype=torch.int64)
    assert torch.equal(table_of(weight)(index).view(torch.int16), weight[index].view(torch.int16))


def test_values_take_12_bits() -> None:
    table = table_of(randn(500, 256).bfloat16())
    assert sum(one.nbytes for one in table.state_dict().values()) == compact_bytes(500, 256)
    assert compact_bytes(500, 256) == 500 * (256 * 12 // 8 + 1)
    assert len(table._values) < 500 * 256 / 1000


def test_only_int8_on_a_cpu_in_bfloat16_has_it(random_checkpoint: Path) -> None:
    assert stores_compactly("int8", torch.bfloat16, CPU)
    assert not stores_compactly(None, torch.bfloat16, CPU)
    assert not stores_compactly("fp8", torch.bfloat16, CPU)
    assert not stores_compactly("int8", torch.float32, CPU)
    assert not stores_compactly("int8", torch.bfloat16, torch.device("cuda"))
    for weight_format, is_compact in (("int8", True), (None, False)):
        model = load_model(random_checkpoint, torch.bfloat16, CPU, weight_format)  # type: ignore[arg-type]
        assert isinstance(model.language_model.embed_tokens, CompactTable) == is_compact
