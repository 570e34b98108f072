"""Write a compressed checkpoint shard by shard: every file appears complete or not at all, the index and configuration last."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from bondsmith.model import digest
from bondsmith.model.hub import BondsmithConfig
from bondsmith.model.skeleton import skeleton
from bondsmith.model.source import ModelError, Source, open_source
from bondsmith.nn.experts import routed

INDEX = "bondsmith.safetensors.index.json"
SHIM = "modeling_bondsmith.py"


class DiskFullError(OSError):
    """No room is left; what was finished is kept, and the message says how much more is needed and how to go on."""


def shard_name(index: int, count: int) -> str:
    """Returns the name of weight file `index` (0: all that is outside the blocks, then one per block) of `count`."""
    return f"bondsmith-{index + 1:05d}-of-{count:05d}.safetensors"


@contextmanager
def atomic(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what was written there is flushed to disk and renamed when the body ends well.

    Args:
        durable: False leaves out the flush, for files that no later run looks for.

    Raises:
        DiskFullError: no room is left on the device; `path` is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        if durable:
            with partial.open("rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
            partial.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
            raise DiskFullError(
                f"the disk of {path.parent} is full ({free / 1e6:.1f} MB left) while writing {path.name}; what was there is "
                "untouched: make room and run the same command with --resume"
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one weight file atomically, with a checksum of every tensor; the same tensors give the same bytes."""
    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with atomic(path) as partial:
        save_file(ready, partial, metadata={"format": "pt"} | digest.metadata(ready))
        _sort_metadata(partial)


def _sort_metadata(path: Path) -> None:
    """Puts the metadata of a safetensors file in order: the library writes several entries in a random one."""
    with path.open("rb+") as handle:
        size = int.from_bytes(handle.read(8), "little")
        head = json.loads(handle.read(size))
        head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
        text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, f"{path.name}: the head grew from {size} to {len(text)} bytes"
        handle.seek(8)
        handle.write(text.ljust(size))


def write_index(directory: Path, shards: list[str]) -> int:
    """Writes the index over finished shards; returns the bytes of all weight files."""
    places: dict[str, str] = {}
    for shard in shards:
        with safe_open(directory / shard, framework="pt") as handle:
            places.update(dict.fromkeys(handle.keys(), shard))
    size = sum((directory / shard).stat().st_size for shard in shards)
    write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})
    return size


def write_config(
    directory: Path,
    source: Source,
    networks: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype,
    packed: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes config.json (last: it makes the directory a model), generation settings, tokenizer and the loading shim."""
    config = source.config.__class__.from_dict(source.config.to_dict())
    architecture = _architecture(source)
    config.architectures = [architecture]
    config.dtype = dtype
    config.quantization_config = BondsmithConfig(
        networks, INDEX, packed, split_experts=bool(routed(skeleton(source.config)))
    ).to_dict()
    config.auto_map = {"AutoModelForCausalLM": f"{SHIM.removesuffix('.py')}.Bondsmith{architecture}"}
    write_text(directory / SHIM, _SHIM_CODE.format(architecture=architecture))
    if (source.path / "generation_config.json").is_file():
        shutil.copyfile(source.path / "generation_config.json", directory / "generation_config.json")
    staging = directory / "config.partial"
    config.save_pretrained(staging)
    os.replace(staging / "config.json", directory / "config.json")
    shutil.rmtree(staging)


def _architecture(source: Source) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[source.config.model_type]
    return str(known[0] if isinstance(known, tuple | list) else known)


_SHIM_CODE = '''"""Loads this model with trust_remote_code=True; `import bondsmith` does the same without it."""

import bondsmith  # noqa: F401  registers the loader with transformers
from transformers import {architecture}


class Bondsmith{architecture}({architecture}):
    """The architecture of the original model; some of its matrices are networks."""
'''


def open_model(model: str | Path | PreTrainedModel, cache: Path) -> Source:
    """Returns the `Source` of an original, as `open_source`, or of a directory that bondsmith wrote and that is not rounded yet.

    Raises:
        ModelError: there is no such model, or it is rounded already.
    """
    if not is_compressed(model):
        return open_source(model, cache)
    source = open_compressed(Path(str(model)).expanduser().absolute())
    quantization = source.config.quantization_config
    if quantization.get("packed"):
        raise ModelError(f"{model} is rounded already: give the directory as it was before, or the original")
    for name, network in quantization["networks"].items():
        if len(network.get("sites", ())) > 2 and network.get("gauge"):
            raise ModelError(f"{name}: a gauged network of {len(network['sites'])} sites cannot be rounded afterwards")
    return source


def is_compressed(model: object) -> bool:
    """Whether a model is a directory that bondsmith wrote."""
    return isinstance(model, str | Path) and (Path(model).expanduser() / INDEX).is_file()


def open_compressed(directory: Path) -> Source:
    """Returns the `Source` of a directory that bondsmith wrote; ModelError if it is none, DamagedError if its config.json was altered."""
    index = directory / INDEX
    if not index.is_file() or not (directory / "config.json").is_file():
        raise ModelError(f"{directory} is not a model that bondsmith wrote: it has no {INDEX}")
    config = AutoConfig.from_pretrained(directory)
    BondsmithConfig.from_dict(config.quantization_config)  # compares its checksum
    places = {name: (directory / file, name) for name, file in json.loads(index.read_text())["weight_map"].items()}
    files = tuple(sorted({file for file, _ in places.values()}))
    return Source(str(directory), directory, config, places, config.dtype, files, sum(f.stat().st_size for f in files))
