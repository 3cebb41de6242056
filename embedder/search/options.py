"""What a caller of the command may choose. Imports nothing that takes time."""

from __future__ import annotations

DEFAULT_CANDIDATES = 24  # results by similarity that a reranker judges
