"""What a caller of the command may choose, apart from the model. Imports nothing that takes time."""

from __future__ import annotations

from typing import Literal

OutputFormat = Literal["parquet", "lance"]

ROWS_PER_PART = 4096
MIN_FILES_PER_PART = 16  # a page takes seconds on a CPU, and a run that is killed loses its unfinished parts
