"""The head of a reranker: one direction in the space of the hidden states, whose product with a state is the log-odds.

The probability of "yes" against "no" is sigmoid(state . (W[yes] - W[no])), where W is the language model's head.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from embedder.errors import ModelUnavailable
from embedder.model.modules import Towers
from embedder.model.weight_files import weight_files

YES, NO = "yes", "no"  # entries of the vocabulary, without a space before them


def load_score_head(folder: Path, model: Towers, tokenizer: Tokenizer) -> Tensor:
    """The direction, (hidden_size,) float32 on the model's device. `model`: the folder's weights.

    From `score.weight` if the checkpoint was saved for classification with one label; else from the head's rows of
    "yes" and "no", which are those of the token embedding if the two are tied. Raises `ModelUnavailable`.
    """
    score = _read_rows(folder, "score.weight", [0])
    if score is not None and score.shape[0] == 1:
        return score[0].float().to(model.device)
    ids = [token for word in (YES, NO) if (token := tokenizer.token_to_id(word)) is not None]
    if len(ids) < 2:
        raise ModelUnavailable(f"the tokenizer of {folder} has no tokens {YES!r} and {NO!r}; needed: a reranker's")
    if model.config.tie_word_embeddings:
        rows: Tensor | None = model.language_model.embed_tokens(torch.tensor(ids, device=model.device))
    else:
        rows = _read_rows(folder, "lm_head.weight", ids)
    if rows is None:
        raise ModelUnavailable(f"{folder} has neither score.weight nor lm_head.weight; needed: a reranker's checkpoint")
    yes, no = rows.float()
    direction: Tensor = yes - no
    return direction.to(model.device)


def _read_rows(folder: Path, name: str, rows: list[int]) -> Tensor | None:
    """Some rows of one weight of the checkpoint's files; None if it is in none of them."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - no dict
                weight = file.get_slice(name)
                return torch.cat([weight[row : row + 1] for row in rows])
    return None
