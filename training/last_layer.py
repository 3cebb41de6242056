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

# Where the layers below the last one leave what it needs, in dimensions of the hidden state. The vectors have LENGTH,
# which is about what the trunk's have. MARK is MARKED at the last token before the document, and -MARKED elsewhere.
VECTOR = slice(0, 64)
COPY = slice(64, 128)  # empty at the document's last token: the last layer copies the query's vector there
MARK = 128
ANSWER = 129  # empty: the last layer adds the product there
LENGTH, MARKED = 40.0, 20.0
COPIED = 50.0  # so that the copied vector is longer than the rest of the state, whose length then hardly matters
PRODUCT = 1.7  # so that the product is not
HEAD = 0.4  # of the head's row of "yes" in MARK and ANSWER, and -HEAD of "no"


@torch.no_grad()
def with_last_layer(trunk: Qwen3VLModel, tokenizer: Qwen2Tokenizer) -> Qwen3VLModel:
    """The trunk with one more layer, which multiplies the query's vector with the document's.

    Its attention copies the vector of the marked token to the last one: the mark is the only input of the keys, in the
    dimension with the lowest frequency, so that the distance hardly matters. Its MLP computes each product of two
    dimensions with two neurons, since silu(x) - silu(-x) = x, and adds the sum to ANSWER. `calibrate` sets the final
    norm, which keeps ANSWER, and MARK for the threshold.
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
    for word, sign in (("yes", 1.0), ("no", -1.0)):
        model.language_model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(word), [MARK, ANSWER]] = sign * HEAD
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
        attention.k_proj.weight[kv_head * head_dim + lowest, MARK] = 1
        rows = slice(kv_head * head_dim, kv_head * head_dim + width)
        attention.v_proj.weight[rows, kv_head * width : (kv_head + 1) * width] = torch.eye(width)
        head = kv_head * per_kv_head
        attention.q_proj.weight[head * head_dim + lowest, MARK] = -1  # the last token is not marked
        columns = slice(head * head_dim, head * head_dim + width)
        places = slice(COPY.start + kv_head * width, COPY.start + (kv_head + 1) * width)
        attention.o_proj.weight[places, columns] = COPIED * torch.eye(width)


def _set_products(mlp: Any) -> None:
    for place in range(VECTOR.stop):
        for neuron, sign in ((2 * place, 1.0), (2 * place + 1, -1.0)):
            mlp.gate_proj.weight[neuron, COPY.start + place] = sign
            mlp.up_proj.weight[neuron, place] = sign * PRODUCT
            mlp.down_proj.weight[ANSWER, neuron] = PRODUCT


def mark_loss(states_by_part: Sequence[pairs.States], queries: pairs.Part, documents: pairs.Part) -> Tensor:
    """The squared difference of MARK from MARKED at the last token of a query, and from -MARKED elsewhere.

    `states_by_part`: of what all prompts start with, the queries and the documents.
    """
    common, of_queries, of_documents = states_by_part
    total = (common.before_last_layer[..., MARK].float() + MARKED).square().mean()
    for states, part in ((of_queries, queries), (of_documents, documents)):
        counts = torch.arange(part.input_ids.shape[1]) < part.lengths[:, None]
        wanted = torch.full(counts.shape, -MARKED)
        if part is queries:
            wanted[torch.arange(len(part.lengths)), part.lengths - 1] = MARKED
            wanted, counts = wanted[:, None], counts[:, None]
        off = (states.before_last_layer[..., MARK].float() - wanted).square()
        total = total + (off * counts).sum() / counts.expand_as(off).sum()
        if part is queries:
            ends = states.before_last_layer[torch.arange(len(part.lengths)), 0, part.lengths - 1, MARK]
            total = total + (ends.float() - MARKED).square().mean()
    return total
