"""Open a model (a hub id, a local directory or a GGUF file) and read its weights tensor by tensor.

Nothing here holds more than the tensors it is asked for: a `Source` is a table from parameter names to places in safetensors
files. Checkpoints whose tensors cannot be found by name (GGUF files, pickles, models whose modules merge or split tensors on
loading) are first rewritten once, by transformers itself, into safetensors files with the parameters' own names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bondsmith.model import digest, quantized
from bondsmith.model.memory import return_free_memory
from bondsmith.model.skeleton import fill, skeleton, stored_names
from bondsmith.nn.experts import split_state

log = logging.getLogger("bondsmith")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SHARD_BYTES = 2 * 1024**3


class ModelError(ValueError):
    """The model given cannot be opened or compressed; the message says which model, why, and what to do."""


@dataclass(frozen=True)
class Source:
    """A pretrained model on disk, opened but not loaded.

    Attributes:
        name: what the user called it.
        path: directory with the configuration and the tokenizer (for a GGUF file: of the rewritten copy).
        config: its transformers configuration.
        places: parameter name -> (safetensors file, key in it).
        dtype: the dtype most of its parameters are stored in.
        files: the files the user's model consists of, for fingerprints.
        stored_bytes: size of those weight files.
    """

    name: str
    path: Path
    config: Any
    places: Mapping[str, tuple[Path, str]]
    dtype: torch.dtype
    files: tuple[Path, ...]
    stored_bytes: int

    def read(self, names: Iterable[str], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Returns the named parameters as fresh tensors of `dtype` (integers keep theirs); refuses NaN, infinities, wrong checksums."""
        return_free_memory()
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in names:
            file, key = self.places[name]
            by_file.setdefault(file, []).append((name, key))
        tensors = {}
        for file, keys in by_file.items():
            with safe_open(file, framework="pt") as handle:
                for name, key in keys:
                    stored = handle.get_tensor(key)
                    digest.check(key, stored, handle.metadata(), file)
                    tensor = stored.to(dtype, copy=True) if stored.is_floating_point() else stored.clone()
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        bad = int((~torch.isfinite(tensor)).sum())
                        raise ModelError(
                            f"{name}: {bad} of {tensor.numel()} weights are NaN or infinite; the checkpoint is damaged, "
                            "download or export it again"
                        )
                    tensors[name] = tensor
        return tensors


def load_whole(source: Source, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Returns the original model with all weights in memory, in float32."""
    model = skeleton(source.config, device)
    fill(model, source.read(stored_names(model)), device)
    model.tie_weights()
    return model


def open_source(model: str | Path | PreTrainedModel, cache: Path) -> Source:
    """Returns the `Source` of a hub id, a directory, a `.gguf` file or a model in memory.

    Args:
        model: where the model is.
        cache: directory for a rewritten copy, where one is needed (about 4 bytes a parameter); used again if it is complete.

    Raises:
        ModelError: there is no such model, it is not a causal language model, or it is quantised already.
    """
    if isinstance(model, PreTrainedModel):
        check_supported(model.config, str(model.name_or_path or type(model).__name__))
        return _rewrite(str(model.name_or_path or type(model).__name__), lambda: model, cache, ())
    name = str(model)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return _open_gguf(name, path, cache)
    if path.is_file():
        raise ModelError(
            f"{name} is a file, not a model: give a hub id, a directory with a config.json or a .gguf file"
        )
    if not path.is_dir():
        path = _download(name)
    return _open_directory(name, path, cache)


def check_supported(config: Any, name: str) -> None:
    """Raises ModelError unless `config` belongs to a decoder-only language model with plain weights."""
    method = quantized.method_of(config)
    if method is not None:
        raise ModelError(f"{name} is already quantised ({method}): {quantized.remedy(method)}")
    architectures = getattr(config, "architectures", None) or []
    kind = getattr(config, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model ({kind}); bondsmith compresses decoder-only language models"
        )
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        raise ModelError(f"{name} has a vision or audio part ({kind}); bondsmith compresses text-only language models")
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    headless = [a for a in architectures if not a.endswith(("ForCausalLM", "LMHeadModel"))]
    if not causal or (architectures and len(headless) == len(architectures)):
        what = architectures[0] if architectures else f"model type {kind!r}"
        raise ModelError(
            f"{name} is not a causal language model ({what}): an encoder, vision or task model has no next token"
        )


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _download(name: str) -> Path:
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(f"{name}: no such directory, and not a hub id of the form owner/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    small = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"]
    try:
        path = Path(snapshot_download(name, allow_patterns=[*small, "*.safetensors"]))
        if not list(path.glob("*.safetensors")):
            path = Path(snapshot_download(name, allow_patterns=[*small, "*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name}: no such directory, and the hub did not give it ({type(error).__name__}: {reason[:200]})"
        ) from error
    return path


def read_config(name: str, path: Path | str, **kwargs: Any) -> Any:
    """Returns the configuration in a directory or of a hub id; ModelError where transformers cannot read one."""
    try:
        return AutoConfig.from_pretrained(path, **kwargs)
    except Exception as error:  # transformers raises many types here; each means that this is no model it knows
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name} is not a model that transformers can open: {reason[:300]}") from error


def _open_directory(name: str, path: Path, cache: Path) -> Source:
    if not (path / "config.json").is_file():
        raise ModelError(f"{name} is not a model: {path} has no config.json")
    config = read_config(name, path)
    undo = quantized.can_dequantize(quantized.method_of(config))
    if undo:
        del config.quantization_config
    check_supported(config, name)
    weights = sorted(path.glob("*.safetensors"))
    pickles = sorted(path.glob("*.bin"))
    if not weights and not pickles:
        raise ModelError(f"{name} is not a complete model: {path} has no *.safetensors (or *.bin) file")
    files = (path / "config.json", *(weights or pickles))
    if undo:
        return _rewrite(name, lambda: quantized.dequantized(name, path), cache, files, tokenizer=path)
    places = _places(name, weights, skeleton(config)) if weights else None
    if places is None:

        def load() -> PreTrainedModel:
            return AutoModelForCausalLM.from_pretrained(path, dtype="auto", config=config)

        return _rewrite(name, load, cache, files, tokenizer=path)
    return _source(name, path, config, places, files, sum(f.stat().st_size for f in weights))


def _places(name: str, weights: list[Path], model: PreTrainedModel) -> dict[str, tuple[Path, str]] | None:
    """Returns where each parameter lies, or None when the keys do not name the parameters one to one."""
    keys: dict[str, Path] = {}
    for file in _indexed(weights):
        try:
            with safe_open(file, framework="pt") as handle:
                keys.update(dict.fromkeys(handle.keys(), file))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{name}: {file.name} is not a readable safetensors file ({error})") from error
    prefix = model.base_model_prefix + "."
    places = {}
    for parameter in stored_names(model):
        spellings = (parameter, parameter.removeprefix(prefix), prefix + parameter, _as_mixtral(parameter))
        key = next((s for s in spellings if s in keys), None)
        if key is None:
            return None
        places[parameter] = (keys[key], key)
    return places


def _as_mixtral(name: str) -> str:
    """Returns the name that Mixtral and those after it gave to a parameter of a mixture in their checkpoints."""
    for ours, theirs in (
        (".mlp.", ".block_sparse_moe."),
        ("gate_proj.", "w1."),
        ("down_proj.", "w2."),
        ("up_proj.", "w3."),
    ):
        name = name.replace(ours, theirs)
    return name


def _indexed(weights: list[Path]) -> list[Path]:
    """Returns the files an index names, or all of them: directories may hold a second copy (consolidated, adapters)."""
    index = weights[0].parent / "model.safetensors.index.json"
    if (weights[0].parent / "model.safetensors").is_file():
        return [weights[0].parent / "model.safetensors"]
    if index.is_file():
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [n for n in named if not (index.parent / n).is_file()]
        if missing:
            raise ModelError(
                f"{index.parent} is not a complete model: {missing[0]} is missing ({len(missing)} of {len(named)})"
            )
        return [index.parent / n for n in named]
    return weights


def _open_gguf(name: str, path: Path, cache: Path) -> Source:
    if not path.is_file():
        raise ModelError(f"{name}: no such file")
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"{name} is not a GGUF file (its first four bytes are not 'GGUF')")
    log.info("%s: what is compressed are the dequantised weights of a GGUF file, in float32", path.name)
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    if _rewritten(cache, (path,)) is None:
        config = read_config(name, path.parent, gguf_file=path.name)
        config.__dict__.pop("quantization_config", None)
        check_supported(config, name)
        options["config"] = config  # to read it takes seconds

    def load() -> PreTrainedModel:
        try:
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
        except ImportError:  # transformers before GgufConfig always dequantises
            options.pop("quantization_config", None)
        return AutoModelForCausalLM.from_pretrained(path.parent, **options)

    return _rewrite(name, load, cache, (path,), tokenizer=path)


def _rewritten(cache: Path, files: tuple[Path, ...]) -> dict[str, Any] | None:
    """Returns the note of a complete rewritten copy of exactly these files, or None."""
    note = cache / "source.json"
    if not files or not note.is_file():
        return None
    content: dict[str, Any] = json.loads(note.read_text())
    return content if content["files"] == {str(f): file_digest(f) for f in files} else None


def _rewrite(name: str, load: Any, cache: Path, files: tuple[Path, ...], tokenizer: Path | None = None) -> Source:
    note = _rewritten(cache, files)
    if note is None:
        note = _write_copy(load(), cache, files, tokenizer)
    places = {key: (cache / file, key) for key, file in note["places"].items()}
    config = AutoConfig.from_pretrained(cache)
    stored = sum(f.stat().st_size for f in files if f.suffix != ".json") or sum(
        f.stat().st_size for f in cache.glob("*.safetensors")
    )
    return _source(name, cache, config, places, files or tuple(sorted(cache.glob("*.safetensors"))), stored)


def _write_copy(model: PreTrainedModel, cache: Path, files: tuple[Path, ...], tokenizer: Path | None) -> dict[str, Any]:
    """Writes config, tokenizer and weights under the parameters' own names; the note that makes it count comes last."""
    cache.mkdir(parents=True, exist_ok=True)
    model.config.__dict__.pop("quantization_config", None)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(cache)
    if model.can_generate():
        model.generation_config.save_pretrained(cache)
    if tokenizer is not None:
        load_tokenizer(tokenizer).save_pretrained(cache)
    state = split_state(model)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    names = stored_names(model, state)
    for i, key in enumerate(names):
        shard[key] = state[key].detach().cpu().clone(memory_format=torch.contiguous_format)
        full = sum(t.numel() * t.element_size() for t in shard.values()) >= _SHARD_BYTES
        if full or i == len(names) - 1:
            file = f"copy-{len(set(places.values())):05d}.safetensors"
            save_file(shard, cache / file)
            places |= dict.fromkeys(shard, file)
            shard = {}
    note = {"files": {str(f): file_digest(f) for f in files}, "places": places}
    (cache / "source.json").write_text(json.dumps(note))
    return note


def load_tokenizer(path: Path) -> Any:
    """Returns the tokenizer of a directory or a GGUF file; ModelError where there is none."""
    from transformers import AutoTokenizer

    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizer classes raise many types; each means that there is none to use
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} has no tokenizer that transformers can open: {reason[:200]}") from error


def tokenizer_of(model: str | Path | PreTrainedModel, source: Source) -> Any:
    """Returns the tokenizer of what was opened as `source`: a model in memory names the place of its own."""
    return load_tokenizer(Path(str(model.name_or_path)) if isinstance(model, PreTrainedModel) else source.path)


def _source(
    name: str, path: Path, config: Any, places: dict[str, tuple[Path, str]], files: tuple[Path, ...], stored: int
) -> Source:
    sizes: dict[torch.dtype, int] = {}
    for file, keys in _by_file(places).items():
        with safe_open(file, framework="pt") as handle:
            for key in keys:
                piece = handle.get_slice(key)
                dtype = _DTYPES.get(piece.get_dtype(), torch.float32)
                sizes[dtype] = sizes.get(dtype, 0) + math.prod(piece.get_shape())
    floats = {d: n for d, n in sizes.items() if d.is_floating_point}
    return Source(name, path, config, places, max(floats, key=lambda d: floats[d]), files, stored)


def _by_file(places: Mapping[str, tuple[Path, str]]) -> dict[Path, list[str]]:
    by_file: dict[Path, list[str]] = {}
    for file, key in places.values():
        by_file.setdefault(file, []).append(key)
    return by_file


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool, "U8": torch.uint8}
