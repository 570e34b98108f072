"""What is known of a model without reading a weight: its configuration, shapes, dtype and size, from a directory or the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bondsmith.model.blocks import find_blocks, fused_experts, matrices, shape
from bondsmith.model.skeleton import stored_names
from bondsmith.model.source import HUB_ID, ModelError, check_supported, read_config
from bondsmith.nn.experts import split_experts, token_shares

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Facts:
    """A model as its configuration describes it.

    Attributes:
        name: what the user called it.
        architecture: class name.
        shapes: matrix name -> (block, out features, in features), in depth order.
        tables: embedding, and head where it is not tied: name -> (rows, columns).
        other_parameters: stored scalars outside the matrices: tables, norms, biases.
        head: parameters of the head, tied or not.
        cache_per_token: keys and values that one token adds, scalars; None where the model does not tell.
        width: of the hidden states.
        vocabulary: tokens.
        dtype: the dtype of the checkpoint.
        stored_bytes: size of its weight files.
        known_from: where dtype and size come from, in words.
        shares: of the tokens that reach a matrix, where it is not all: experts of a mixture.
        experts: of the other parameters, those in tensors of three dimensions: experts of a mixture.
    """

    name: str
    architecture: str
    shapes: Mapping[str, tuple[int, int, int]]
    tables: Mapping[str, tuple[int, int]]
    other_parameters: int
    head: int
    cache_per_token: int | None
    width: int
    vocabulary: int
    dtype: torch.dtype
    stored_bytes: int
    known_from: str
    experts: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def matrix_parameters(self) -> int:
        """Parameters of all matrices of the blocks."""
        return sum(o * i for _, o, i in self.shapes.values())

    @property
    def multiply_adds(self) -> int:
        """Of all matrices of the blocks, a token."""
        return round(sum(o * i * self.shares.get(name, 1.0) for name, (_, o, i) in self.shapes.items()))

    @property
    def parameters(self) -> int:
        """Stored scalars, tied ones once."""
        return self.other_parameters + self.matrix_parameters

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return 1 + max(block for block, _, _ in self.shapes.values())

    def block(self, k: int) -> list[tuple[int, int]]:
        """Returns the (out, in) of the matrices of block k."""
        return [(o, i) for block, o, i in self.shapes.values() if block == k]


def read_facts(model: str | Path) -> Facts:
    """Returns the facts of a hub id, a `.gguf` file or a directory, which may hold config.json alone.

    Raises:
        ModelError: there is no such model, it is not a causal language model, or it is quantised already.
    """
    name, path = str(model), Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        config = read_config(name, path.parent, gguf_file=path.name)
        config.__dict__.pop("quantization_config", None)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is not a model: {path} has no config.json")
        config = read_config(name, path)
    elif path.exists() or not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(
            f"{name}: give a hub id of the form owner/model, a directory with a config.json or a .gguf file"
        )
    else:
        config = read_config(name, name)
    check_supported(config, name)
    return _describe(name, path, config)


def _describe(name: str, path: Path, config: Any) -> Facts:
    declared = config.dtype  # building a model overwrites it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        cache = _cache(model)
        split_experts(model)
    list_path = find_blocks(model)
    shapes = {
        f"{list_path}.{k}.{inside}": (k, *shape(matrix))
        for k, block in enumerate(model.get_submodule(list_path))
        for inside, matrix in matrices(block).items()
    }
    state = model.state_dict()
    total = sum(state[n].numel() for n in stored_names(model))
    modules = {m: n for n, m in model.named_modules()}
    ends = {
        end: modules[end] for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end in modules
    }
    stored = set(stored_names(model))
    tables = {n: tuple(end.weight.shape) for end, n in ends.items() if f"{n}.weight" in stored}
    dtype, size, known_from = _weights(name, path, declared, total)
    text = config.get_text_config()
    return Facts(
        name=name,
        architecture=type(model).__name__,
        shapes=shapes,
        tables=tables,
        other_parameters=total - sum(o * i for _, o, i in shapes.values()),
        experts=fused_experts(model, name),
        shares=token_shares(model),
        head=model.get_output_embeddings().weight.numel(),
        cache_per_token=cache,
        width=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        dtype=dtype,
        stored_bytes=size,
        known_from=known_from,
    )


def _cache(model: PreTrainedModel, tokens: int = 4) -> int | None:
    """Returns the scalars that one token adds to the cache, from a forward pass without numbers; None where that does not work."""
    try:
        with torch.no_grad():
            ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
            layers = model(input_ids=ids, use_cache=True).past_key_values.layers
        return sum(t.numel() for layer in layers for t in (layer.keys, layer.values)) // tokens
    except Exception:  # a forward that looks at values (routing of experts) or keeps another kind of cache
        return None


def _weights(name: str, path: Path, declared: Any, parameters: int) -> tuple[torch.dtype, int, str]:
    """Returns dtype and bytes of the checkpoint, and where they are known from."""
    dtype = declared if isinstance(declared, torch.dtype) else torch.float32
    if path.is_file():
        return torch.float32, path.stat().st_size, "the file"
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        index = path / "model.safetensors.index.json"
        if files and index.is_file():
            named = {path / n for n in json.loads(index.read_text())["weight_map"].values()}
            files = [f for f in files if f in named]
        if files:
            return dtype, sum(f.stat().st_size for f in files), "its weight files"
        return dtype, parameters * dtype.itemsize, "its configuration"
    found = _hub_weights(name)
    return found if found is not None else (dtype, parameters * dtype.itemsize, "its configuration")


def _hub_weights(name: str) -> tuple[torch.dtype, int, str] | None:
    """Returns what the hub says of a model's safetensors files, or None where it says nothing or is out of reach."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name, files_metadata=True, timeout=10)
    except Exception:  # no network, no such model, no rights: the configuration has to do
        return None
    sizes = [
        f.size or 0 for f in info.siblings or [] if f.rfilename.endswith(".safetensors") and "/" not in f.rfilename
    ]
    counts = dict(info.safetensors.parameters) if info.safetensors else {}
    known = {_DTYPES[k]: n for k, n in counts.items() if k in _DTYPES}
    if not sizes or not known:
        return None
    return max(known, key=lambda d: known[d]), sum(sizes), "the hub"
