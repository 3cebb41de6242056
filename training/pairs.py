"""The forward pass of a reranker's training: every query of a batch with every document, identical to transformers'.

A prompt is the system text and the instruction, then a query, then a document. Keys and values of the first part are
computed once, those of a query once for all documents. `Part` is a batch of queries or of documents; all of its items
have media of one size, or none.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3VLModel

from training.forward import VisualFeatures, rotate

SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the "
    'answer can only be "yes" or "no".'
)
INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
AFTER_QUERY = "\n<Document>:"

# Keys, values and which of them count, of one layer. Keys and values: (num_queries, num_documents, kv_heads, tokens,
# head_dim), `counts`: (num_queries, num_documents, tokens); the first two dimensions may be 1.
Block = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Part:
    """The tokens of queries or documents, padded on the right."""

    input_ids: Tensor  # (num_items, tokens)
    lengths: Tensor  # (num_items,)
    position_ids: Tensor  # (3, num_items, tokens), from the part's start
    advance: Tensor  # (num_items,): by how much the positions of what follows are later
    visual_at: Tensor | None = None  # (visual_tokens,)
    features: VisualFeatures | None = None


@dataclass(frozen=True)
class States:
    """Hidden states of a part, (num_queries, num_documents, tokens, hidden_size)."""

    before_last_layer: Tensor
    blocks: list[Block]  # per layer


def prefix_text(instruction: str = INSTRUCTION) -> str:
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}<Query>:"


def part_of(
    tokenizer: Qwen2Tokenizer,
    texts: list[str],
    end: str,
    size: tuple[int, int] | None = None,
    features: VisualFeatures | None = None,
) -> Part:
    """Texts, or images of one size (height, width in pixels) followed by texts. `end`: what follows in the prompt."""
    columns = 0 if size is None else size[1] // 32
    num_visual = 0 if size is None else size[0] // 32 * columns
    visual = "" if size is None else "<|vision_start|>" + "<|image_pad|>" * num_visual + "<|vision_end|>"
    rows = [tokenizer(visual + text + end, add_special_tokens=False).input_ids for text in texts]
    longest = max(len(row) for row in rows)
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    positions = torch.arange(longest).expand(3, -1).clone()
    saved = 0  # an image advances by its longer side, not by its number of tokens
    if size is not None:
        places = torch.arange(num_visual)
        positions[:, 1 : 1 + num_visual] = 1 + torch.stack((places * 0, places // columns, places % columns))
        saved = num_visual - max(size[0] // 32, columns)
        positions[:, 1 + num_visual :] -= saved
    visual_at = None if size is None else torch.arange(1, 1 + num_visual)
    return Part(input_ids, lengths, positions[:, None].expand(-1, len(rows), -1), lengths - saved, visual_at, features)


def read_common(model: Qwen3VLModel, input_ids: Tensor) -> tuple[States, int]:
    """The states of the (tokens,) ids that all prompts start with, and their number."""
    num_tokens = input_ids.shape[0]
    position_ids = torch.arange(num_tokens).expand(3, 1, 1, -1)
    counts = torch.ones(1, 1, num_tokens, dtype=torch.bool)
    return _run(model, model.language_model.embed_tokens(input_ids)[None, None], position_ids, counts, []), num_tokens


def read_queries(model: Qwen3VLModel, common: States, start: int, part: Part) -> States:
    """The states of queries, with num_documents 1. `start`: the number of tokens of `common`."""
    hidden_states, deepstack = _embed(model, part)
    position_ids = part.position_ids[:, :, None] + start
    deepstack = [features[:, None] for features in deepstack]
    past = [[block] for block in common.blocks]
    return _run(model, hidden_states[:, None], position_ids, _counts(part)[:, None], past, part.visual_at, deepstack)


def read_documents(
    model: Qwen3VLModel, common: States, queries: States, start: int, query_part: Part, part: Part
) -> States:
    """The states of each document after each query."""
    num_queries = len(query_part.lengths)
    hidden_states, deepstack = _embed(model, part)
    hidden_states = hidden_states.expand(num_queries, -1, -1, -1)
    begins = (start + query_part.advance)[None, :, None, None]
    position_ids = part.position_ids[:, None] + begins
    past = [list(blocks) for blocks in zip(common.blocks, queries.blocks, strict=True)]
    counts = _counts(part)[None].expand(num_queries, -1, -1)
    return _run(model, hidden_states, position_ids, counts, past, part.visual_at, deepstack)


def last_state(states: Tensor, part: Part) -> Tensor:
    """The state of each item's last token: (num_queries, num_documents, hidden_size)."""
    last = (part.lengths - 1).view(1, -1, 1, 1) if states.shape[1] > 1 else (part.lengths - 1).view(-1, 1, 1, 1)
    return states.gather(2, last.expand(*states.shape[:2], 1, states.shape[-1])).squeeze(2)


def last_layer(model: Qwen3VLModel, states: States, past: list[States], start: Tensor, part: Part) -> Tensor:
    """The last layer and the final norm at the last token of each document, (num_queries, num_documents, hidden_size).

    `start`: (num_queries,) the position at which the documents begin.
    """
    language = model.language_model
    hidden_states = last_state(states.before_last_layer, part)[:, :, None]
    at = part.position_ids.gather(2, (part.lengths - 1).view(1, -1, 1).expand(3, -1, 1))
    position_ids = at[:, None] + start[None, :, None, None]
    cos, sin = angles(model, hidden_states, position_ids)
    layer = language.layers[-1]
    blocks = [*(one.blocks[-1] for one in past), states.blocks[-1]]
    hidden_states = _finish(layer, hidden_states, layer.input_layernorm(hidden_states), cos, sin, blocks, causal=False)
    return language.norm(hidden_states)[:, :, 0].float()


def score_direction(model: Qwen3VLModel, tokenizer: Qwen2Tokenizer) -> Tensor:
    """W[yes] - W[no], (hidden_size,) float32, of the token embedding, which is also the head."""
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    rows = model.language_model.embed_tokens.weight
    return rows[yes].float() - rows[no].float()


class Scored:
    """A batch of queries with a batch of documents: the states before the last layer, and from them the log-odds."""

    def __init__(
        self, model: Qwen3VLModel, tokenizer: Qwen2Tokenizer, common_ids: Tensor, queries: Part, documents: Part
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.query_part, self.document_part = queries, documents
        self.common, self.start = read_common(model, common_ids)
        self.queries = read_queries(model, self.common, self.start, queries)
        self.documents = read_documents(model, self.common, self.queries, self.start, queries, documents)
        self.states = (self.common, self.queries, self.documents)

    def last(self) -> Tensor:
        """The state of each pair's last token after the final norm, (num_queries, num_documents, hidden_size)."""
        past = [self.common, self.queries]
        return last_layer(self.model, self.documents, past, self.start + self.query_part.advance, self.document_part)

    def log_odds(self) -> Tensor:
        """(num_queries, num_documents) float32."""
        return self.last() @ score_direction(self.model, self.tokenizer)


def _embed(model: Qwen3VLModel, part: Part) -> tuple[Tensor, list[Tensor]]:
    """Token embeddings (num_items, tokens, hidden_size) with the visual ones in place, and the deepstack features."""
    hidden_states = model.language_model.embed_tokens(part.input_ids)
    if part.features is None or part.visual_at is None:
        return hidden_states, []
    return hidden_states.index_copy(1, part.visual_at, part.features.tokens), part.features.deepstack


def _counts(part: Part) -> Tensor:
    return torch.arange(part.input_ids.shape[1]) < part.lengths[:, None]


def angles(model: Qwen3VLModel, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for (3, num_queries, num_documents, tokens) positions, with a dimension for the heads."""
    batch = position_ids.shape[1:3]
    angles = model.language_model.rotary_emb(hidden_states, position_ids.flatten(1, 2))
    cos, sin = (one.unflatten(0, batch)[:, :, None] for one in angles)
    return cos, sin


def _run(
    model: Qwen3VLModel,
    hidden_states: Tensor,
    position_ids: Tensor,
    counts: Tensor,
    past: list[list[Block]],
    visual_at: Tensor | None = None,
    deepstack: list[Tensor] | None = None,
) -> States:
    """All layers but the last, of which only keys and values are computed. `past`: blocks per layer."""
    language = model.language_model
    cos, sin = angles(model, hidden_states, position_ids)
    blocks: list[Block] = []
    for index, layer in enumerate(language.layers):
        normed = layer.input_layernorm(hidden_states)
        blocks.append((*keys_values(layer.self_attn, normed, cos, sin), counts))
        if index == len(language.layers) - 1:
            break
        seen = [*(past[index] if past else []), blocks[-1]]
        hidden_states = _finish(layer, hidden_states, normed, cos, sin, seen, causal=True)
        if deepstack and visual_at is not None and index < len(deepstack):
            hidden_states = hidden_states.index_add(
                2, visual_at, deepstack[index].expand(*hidden_states.shape[:2], -1, -1).contiguous()
            )
    return States(hidden_states, blocks)


def keys_values(attention: nn.Module, normed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    heads = (*normed.shape[:-1], -1, attention.head_dim)
    key = attention.k_norm(attention.k_proj(normed).view(heads)).transpose(2, 3)
    return rotate(key, cos, sin), attention.v_proj(normed).view(heads).transpose(2, 3)


def _finish(
    layer: nn.Module,
    hidden_states: Tensor,
    normed: Tensor,
    cos: Tensor,
    sin: Tensor,
    blocks: list[Block],
    causal: bool,
) -> Tensor:
    """Attention over all blocks, then the MLP. `causal`: the last block holds the queries' own tokens."""
    attention = layer.self_attn
    num_queries = normed.shape[2]
    query = attention.q_norm(attention.q_proj(normed).view(*normed.shape[:-1], -1, attention.head_dim))
    query = rotate(query.transpose(2, 3), cos, sin)  # (queries, documents, heads, tokens, head_dim)
    kv_heads = blocks[0][0].shape[2]
    grouped = query.unflatten(2, (kv_heads, -1)).flatten(3, 4)  # query heads grouped by kv head
    scores = []
    for index, (key, _, counts) in enumerate(blocks):
        hidden = ~counts[:, :, None, None, None]
        if causal and index == len(blocks) - 1:
            places = torch.arange(num_queries)
            hidden = hidden | (places > places[:, None])
        products = (grouped @ key.transpose(-1, -2) * attention.scaling).unflatten(3, (-1, num_queries))
        scores.append(products.masked_fill(hidden, float("-inf")).flatten(3, 4))
    weights = F.softmax(torch.cat(scores, dim=-1), dim=-1).split([key.shape[3] for key, _, _ in blocks], dim=-1)
    mixed = sum(part @ value for part, (_, value, _) in zip(weights, blocks, strict=True))
    mixed = mixed.unflatten(3, (-1, num_queries)).flatten(2, 3).transpose(2, 3).flatten(3)
    hidden_states = hidden_states + attention.o_proj(mixed)
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
