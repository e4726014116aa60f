# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of transformers, on which attention decides what comes next."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

VOCABULARY = 97
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # the usual 0.02 gives every token the same weight
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tiny(config=None, *, attention="fastkv", seed=0):
    """A model in evaluation mode, float32, the same one for the same seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE) if config is None else config)
    model.set_attn_implementation(attention)
    return model.eval()


def prompts(lengths, seed=1):
    """Random tokens, padded on the left to the longest: `input_ids` and `attention_mask`."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def positions(mask, new):
    """Of the last `new` tokens of each request, counted without padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]


def poison(cache):
    """NaN, or the byte of it, wherever no token of a request lies."""
    storage, table = cache._storage, cache._pages.table
    page_size = cache.spec.page_size
    used = torch.zeros(cache._pages.count, page_size, dtype=torch.bool)
    at = torch.arange(cache.length)
    used[table[:, at // page_size].long(), at % page_size] = True
    for index in range(cache.spec.num_layers):
        layer = storage.layer(index, cache._pages.count)
        for name in ("k", "v", "k_scale", "v_scale"):
            tensor = getattr(layer, name)
            if tensor is not None and tensor.element_size() == 1:
                tensor.view(torch.uint8).transpose(1, 2)[~used] = 255
            elif tensor is not None:
                tensor.transpose(1, 2)[~used] = torch.nan
