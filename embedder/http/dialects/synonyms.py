"""Options of `/v1/embeddings` under the names of Voyage's, Jina's and NVIDIA's clients."""

from __future__ import annotations

from typing import Any

from pydantic import Field, StrictBool, field_validator

from embedder.engine.postprocess import OutputDtype
from embedder.errors import InvalidRequest
from embedder.http.request_body import EncodingFormat, RequestBody
from embedder.inputs.items import describe_value

_FORMATS: dict[str, tuple[EncodingFormat | None, OutputDtype | None]] = {
    "float": ("float", None),
    "base64": ("base64", None),
    "int8": (None, "int8"),
    "uint8": (None, "uint8"),
    "binary": (None, "binary"),
    "ubinary": (None, "ubinary"),
}


class SynonymOptions(RequestBody):
    """Fields that mean the same as `normalize`, `truncate`, `encoding_format` and `output_dtype`."""

    normalized: StrictBool | None = Field(None, description="Jina's name of `normalize`.")
    embedding_type: Any = Field(None, description="Jina's and NVIDIA's: float, base64, int8, uint8, binary, ubinary.")
    truncation: StrictBool | None = Field(None, description="Voyage's: false: a text over the limit is an error.")
    late_chunking: StrictBool | None = Field(None, description="Jina's; only false: an item has one vector.")
    return_multivector: StrictBool | None = Field(None, description="Jina's; only false: an item has one vector.")

    @field_validator("truncate", mode="before", check_fields=False)
    @classmethod
    def _truncate_as_boolean(cls, value: Any) -> Any:
        """Jina's `truncate` is true or false."""
        return ("end" if value else "none") if isinstance(value, bool) else value

    @field_validator("output_dtype", mode="before", check_fields=False)
    @classmethod
    def _dtype_float(cls, value: Any) -> Any:
        """Voyage calls float32 `float`."""
        return "float32" if isinstance(value, str) and value.lower() == "float" else value

    def synonym_item_options(self) -> dict[str, Any]:
        """The options of items that these fields set. Raises `InvalidRequest`."""
        for name in ("late_chunking", "return_multivector"):
            if getattr(self, name):
                raise InvalidRequest(f"{name}: got true; allowed: false, because this model has one vector per item")
        options: dict[str, Any] = {}
        if self.normalized is not None:
            options["normalize"] = self.normalized
        if self.truncation is False:
            options["truncate"] = "none"
        return options

    def synonym_encoding(self) -> tuple[EncodingFormat | None, OutputDtype | None]:
        """Format and type that `embedding_type` asks for, None where it does not. Raises `InvalidRequest`."""
        if self.embedding_type is None:
            return None, None
        kinds = self.embedding_type if isinstance(self.embedding_type, list) else [self.embedding_type]
        if len(kinds) != 1 or not isinstance(kinds[0], str) or kinds[0].lower() not in _FORMATS:
            raise InvalidRequest(
                f"embedding_type: got {describe_value(self.embedding_type)}; allowed: one of {', '.join(_FORMATS)}"
            )
        return _FORMATS[kinds[0].lower()]
