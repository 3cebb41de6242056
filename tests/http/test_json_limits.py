"""Values are counted as a parser would find them: not in strings, whatever is escaped, wherever a block ends."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import orjson
import pytest

from embedder.http import json_limits as values
from embedder.http.json_limits import exceeds_value_count

JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text('a,[{"\\\n\u00e9'),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(',["\\'), inner, max_size=5),
    max_leaves=30,
)


def num_values(value: object) -> int:
    """Number of values. A bracket counts for the first value of its container, also if that is empty."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return 1 + max(len(inner) - 1, 0) + sum(num_values(one) - 1 for one in inner) + isinstance(value, list | dict)


@hypothesis.given(JSON, st.sampled_from([1, 2, 3, 7, 1000]))
def test_count_is_exact(value: object, block_bytes: int) -> None:
    body = orjson.dumps([value])
    count = num_values([value])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "BLOCK_BYTES", block_bytes)
        assert not exceeds_value_count(body, count)
        assert exceeds_value_count(body, count - 1)


@pytest.mark.parametrize("body", [b"", b"5", b'"' + b"," * 100 + b'"', b'"' + b'\\",' * 100 + b'"'])
def test_commas_in_a_string_are_not_counted(body: bytes) -> None:
    assert not exceeds_value_count(body, 1)
