"""Small random models of many families, a tokenizer made here, and where the optional data lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 512
IDS = torch.arange(3, 35).view(2, 16)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_inner": 64, "n_positions": 128},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    },
    "gpt_oss": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
_MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRIDS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "bamba": {"num_key_value_heads": 2, "attn_layer_indices": [1], **_MAMBA},
    "falcon_h1": {"num_key_value_heads": 2, "head_dim": 8, "mamba_d_ssm": 64, **_MAMBA},
    "lfm2": {
        "num_key_value_heads": 2,
        "full_attn_idxs": [1],
        "block_ff_dim": 64,
        "block_auto_adjust_ff_dim": False,
    },
    "qwen3_next": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        **_DELTA,
    },
    "doge": {"num_key_value_heads": 2},
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """Returns the configuration of a three-block model of width 32."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    settings = FAMILIES[family] if family == "gpt2" else common | (FAMILIES | MIXTURES | HYBRIDS).get(family, {})
    if family == "gpt2":
        settings = settings | {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(family, **(settings | overrides))


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Returns a random model whose weights are large enough for logits to differ between words."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif parameter.dim() == 3:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_tokenizer() -> Any:
    """Returns a byte-pair tokenizer of at most 512 pieces, trained here, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(f"w{n}" for n in range(250))], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}"
    )
    return fast


def save_tiny(directory: Path, family: str = "llama", **overrides: Any) -> PreTrainedModel:
    """Writes a tiny model with its tokenizer as a Hugging Face directory; returns the model."""
    model = tiny_model(family, **overrides)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return model


def write_text(path: Path, words: int = 6000, seed: int = 0) -> Path:
    """Writes a text of random numbers, w3 ... w127, in paragraphs; returns its path."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(3, 128, (words,), generator=generator).tolist()
    lines = [" ".join(f"w{n}" for n in numbers[i : i + 100]) for i in range(0, words, 100)]
    path.write_text("\n\n".join(lines))
    return path


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Returns what a model says to `IDS`."""
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A tiny model of every family, and where it lies."""
    path = tmp_path_factory.mktemp(request.param) / "model"
    return save_tiny(path, request.param), path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: other processes take the rest meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny matrices are slower on several threads, most of all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file for calibration."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings on disk."""
    path = tmp_path_factory.mktemp("original") / "llama"
    save_tiny(path, tie_word_embeddings=True)
    return path


@pytest.fixture(scope="session")
def compressed(original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, compressed with evaluation."""
    import bondsmith

    out = tmp_path_factory.mktemp("compressed") / "out"
    settings = {"keep": 0.6, "uniform": True, "tokens": 1024, "window": 32, "evaluation_windows": 2}
    return bondsmith.compress(original, out, calibration=[str(text)], **settings).path
