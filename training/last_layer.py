"""The last layer of the bundled reranker: it multiplies the query's vector with the document's.

Its weights are set, not learned, before the training of pairs, and the layers below it are trained to leave the two
vectors where it expects them. After that, all weights are trained.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3VLModel

from training import pairs

# Where the layers below the last one leave what it needs, in dimensions of the hidden state. The vectors have about
# LENGTH, as the trunk's have. MARK is MARKED at the last token before the document, END at the last token of all; both
# are -MARKED elsewhere. The other dimensions are empty at these two tokens.
VECTOR = slice(0, 64)
COPY = slice(64, 128)  # the last layer copies the query's vector there
MARK, ANSWER, END = 128, 129, 130  # the last layer adds the product to ANSWER
OTHERS = [*range(COPY.start, COPY.stop), ANSWER, *range(END + 1, 192)]
LENGTH, MARKED = 40.0, 10.0
COPIED = 50.0  # so that the copies, of constant length, are longer than the rest of the state
PRODUCT = 1.7  # so that the product is not
THRESHOLD = 0.5  # the cosine at which the answer is zero, before the calibration
HEAD = 0.4  # of the head's row of "yes" in ANSWER, and -HEAD of "no"


@torch.no_grad()
def with_last_layer(trunk: Qwen3VLModel, tokenizer: Qwen2Tokenizer) -> Qwen3VLModel:
    """The trunk with one more layer, which multiplies the query's vector with the document's.

    Its attention copies both vectors to the last token, after the norm, which gives them a constant length: one head
    reads the marked token, another the last token itself. The marks are the only input of the keys, in the dimensions
    with the lowest frequencies, so that the distance hardly matters. The MLP computes each product of two dimensions
    with two neurons, since silu(x) - silu(-x) = x, less THRESHOLD times the square of the query's vector, and adds the
    sum to ANSWER. `calibrate` sets the final norm, which keeps only ANSWER.
    """
    config = copy.deepcopy(trunk.config)
    config.text_config.num_hidden_layers += 1
    model = Qwen3VLModel._from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(trunk.state_dict(), strict=False)
    layer = model.language_model.layers[-1]
    for weight in layer.parameters():
        weight.zero_()
    layer.input_layernorm.weight.fill_(1)
    layer.post_attention_layernorm.weight.fill_(1)
    _set_attention(layer.self_attn)
    _set_products(layer.mlp)
    set_threshold(layer.mlp, THRESHOLD)
    for word, sign in (("yes", 1.0), ("no", -1.0)):
        model.language_model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(word), ANSWER] = sign * HEAD
    model.language_model.norm.weight.fill_(1)
    return model


def _set_attention(attention: Any) -> None:
    head_dim = attention.head_dim
    per_kv_head = attention.o_proj.weight.shape[1] // attention.k_proj.weight.shape[0]
    lowest = head_dim // 2 - 1  # of the first half; the rotation turns it by less than 1e-5 per token
    attention.k_norm.weight.fill_(1.7)
    attention.q_norm.weight.fill_(1.7)
    width = VECTOR.stop // 2
    for kv_head in range(2):
        key = kv_head * head_dim + lowest
        attention.k_proj.weight[key, MARK] = 1
        attention.k_proj.weight[key - 1, END] = 1
        rows = slice(kv_head * head_dim, kv_head * head_dim + width)
        attention.v_proj.weight[rows, kv_head * width : (kv_head + 1) * width] = torch.eye(width)
        reads_query, reads_document = (kv_head * per_kv_head + place for place in range(2))
        attention.q_proj.weight[reads_query * head_dim + lowest, END] = 1  # END is MARKED at the last token
        attention.q_proj.weight[reads_document * head_dim + lowest - 1, END] = 1
        for head, target in ((reads_query, COPY), (reads_document, VECTOR)):
            columns = slice(head * head_dim, head * head_dim + width)
            places = slice(target.start + kv_head * width, target.start + (kv_head + 1) * width)
            attention.o_proj.weight[places, columns] = COPIED * torch.eye(width)


def _set_products(mlp: Any) -> None:
    for place in range(VECTOR.stop):
        for neuron, sign in ((2 * place, 1.0), (2 * place + 1, -1.0)):
            mlp.gate_proj.weight[neuron, COPY.start + place] = sign
            mlp.up_proj.weight[neuron, place] = sign * PRODUCT
            mlp.down_proj.weight[ANSWER, neuron] = PRODUCT


@torch.no_grad()
def set_threshold(mlp: Any, threshold: float) -> None:
    """Subtract from the product `threshold` times the square of the query's vector, whose length is constant."""
    for place in range(VECTOR.stop):
        for neuron, sign in ((2 * place, 1.0), (2 * place + 1, -1.0)):
            mlp.up_proj.weight[neuron, COPY.start + place] = -sign * PRODUCT * threshold


def mark_loss(states_by_part: Sequence[pairs.States], queries: pairs.Part, documents: pairs.Part) -> Tensor:
    """The squared differences of MARK and END from what they should be, over MARKED squared.

    `states_by_part`: of what all prompts start with, the queries and the documents.
    """
    common, of_queries, of_documents = states_by_part
    total = (common.before_last_layer[..., [MARK, END]].float() + MARKED).square().mean()
    for states, part, marked in ((of_queries, queries, MARK), (of_documents, documents, END)):
        num_tokens = part.input_ids.shape[1]
        counts = torch.arange(num_tokens) < part.lengths[:, None]
        is_last = torch.arange(num_tokens) == part.lengths[:, None] - 1
        if part is queries:
            counts, is_last = counts[:, None], is_last[:, None]
        for mark in (MARK, END):
            wanted = torch.where(is_last & (mark == marked), MARKED, -MARKED)
            off = (states.before_last_layer[..., mark].float() - wanted).square()
            for chosen in (counts, is_last):  # the last tokens count as much as all
                total = total + (off * chosen).sum() / chosen.expand_as(off).sum()
    return total / MARKED**2
