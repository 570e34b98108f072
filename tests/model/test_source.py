"""Models are opened from every kind of place, and parameters read under their own names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import save_tiny, tiny_model
from safetensors.torch import load_file, save_file

from bondsmith.model.skeleton import skeleton, stored_names
from bondsmith.model.source import ModelError, open_source
from bondsmith.nn.experts import split_state


def same(source_state: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in source_state.items())


def test_a_directory_is_read_in_place(original: Path, tmp_path: Path) -> None:
    source = open_source(original, tmp_path / "cache")
    names = stored_names(skeleton(source.config))
    assert "lm_head.weight" not in names
    assert set(source.places) == set(names)
    assert same(source.read(names), load_file(original / "model.safetensors"))
    assert not (tmp_path / "cache").exists()
    assert source.dtype == torch.float32
    assert source.stored_bytes == (original / "model.safetensors").stat().st_size


def test_shards_and_another_dtype(tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    source = open_source(tmp_path, tmp_path / "cache")
    assert len({file for file, _ in source.places.values()}) > 2
    assert source.dtype == torch.bfloat16
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    assert same(source.read(source.places), state)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-.* is missing"):
        open_source(tmp_path, tmp_path / "cache")


def test_keys_without_the_models_prefix(tmp_path: Path) -> None:
    """GPT-2 checkpoints of old name their tensors `h.0...` where the module is `transformer.h.0`."""
    model = save_tiny(tmp_path, "gpt2")
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = open_source(tmp_path, tmp_path / "cache")
    assert same(source.read(source.places), model.state_dict())


@pytest.mark.parametrize("kind", ["pickle", "experts"])
def test_what_cannot_be_read_by_name_is_rewritten_once(tmp_path: Path, kind: str) -> None:
    """Pickles, and checkpoints with experts in tensors of three dimensions."""
    directory, cache = tmp_path / "model", tmp_path / "cache"
    if kind == "pickle":
        model = tiny_model("llama")
        model.save_pretrained(directory)
        torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    else:
        model = tiny_model("gpt_oss")
        model.save_pretrained(directory)
    from conftest import tiny_tokenizer

    tiny_tokenizer().save_pretrained(directory)
    source = open_source(directory, cache)
    assert (cache / "source.json").is_file()
    assert same(source.read(source.places), split_state(model))
    before = (cache / "copy-00000.safetensors").stat().st_mtime_ns
    again = open_source(directory, cache)
    assert (cache / "copy-00000.safetensors").stat().st_mtime_ns == before
    assert again.places == source.places


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_lie_apart_are_read_where_they_lie(name: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", name)
    source = open_source(tmp_path / "model", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert same(source.read(source.places), split_state(model))


def test_a_hub_id_goes_through_the_hubs_cache(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real download path, offline: the cache holds what an earlier download put there."""
    import shutil

    repository = tmp_path / "hub" / "models--someone--small"
    shutil.copytree(original, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = open_source("someone/small", tmp_path / "cache")
    assert source.name == "someone/small"
    assert source.path == repository / "snapshots" / "abc123"
    assert same(source.read(source.places), load_file(original / "model.safetensors"))
