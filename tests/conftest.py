"""Small random models of many families, a tokenizer made here, and where the optional data lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_inner": 64, "n_positions": 128},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """Returns the configuration of a three-block model of width 32 and 128 words."""
    common = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    settings = FAMILIES[family] if family == "gpt2" else common | FAMILIES[family]
    if family == "gpt2":
        settings = settings | {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(family, **(settings | overrides))


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Returns a random model whose weights are large enough for logits to differ between words."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
