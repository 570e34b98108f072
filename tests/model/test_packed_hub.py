"""Packed models on disk: they load bit-identical, stay packed in memory, and a damaged file is an error."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import bondsmith
from bondsmith.model.blocks import find_blocks, shape, weight
from bondsmith.model.checkpoint import open_compressed, write_config, write_index, write_shard
from bondsmith.model.digest import DamagedError, digest
from bondsmith.model.hub import BondsmithConfig, attach, pack_embedding, packed_section
from bondsmith.model.source import open_source
from bondsmith.nn import kernels
from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedEmbedding, PackedHead, PackedLinear, PackedMatrix, saved_state
from bondsmith.stages.quality import Streamed
from bondsmith.tensor.fit import sequential_svd
from bondsmith.tensor.rounding import Grid, round_to_nearest
from bondsmith.tensor.sites import parse_sites

IDS = torch.arange(3, 27).view(2, 12)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def pack(model: PreTrainedModel, grid: Grid, embedding_grid: Grid) -> BondsmithConfig:
    """Packs every matrix, the embedding, and as a network with packed cores the first matrix of the first block."""
    networks = {}
    path = find_blocks(model)
    matrices = [n for n, m in model.named_modules() if n.startswith(path) and isinstance(m, nn.Linear | Conv1D)]
    name = matrices[0]
    old = model.get_submodule(name)
    rows, columns = shape(old)
    sites = parse_sites("matrix", rows, columns)
    network = MPOLinear.from_mpo(
        sequential_svd(weight(old).detach(), sites, 12), bias=getattr(old, "bias", None), gauge=True
    )
    for k, core in enumerate(network.cores):
        network.cores[k] = PackedLinear.from_rounded(round_to_nearest(core.weight.detach(), grid))
    model.set_submodule(name, network)
    legs = [list(pair) for pair in zip(sites.out_legs, sites.in_legs, strict=True)]
    networks[name] = {"sites": legs, "bonds": list(network.bonds), "gauge": True}
    for name in matrices[1:]:
        old = model.get_submodule(name)
        layer = PackedLinear.from_rounded(round_to_nearest(weight(old).detach(), grid), getattr(old, "bias", None))
        model.set_submodule(name, layer)
    name = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    packed = PackedEmbedding(model.get_input_embeddings(), embedding_grid)
    packed.put(round_to_nearest(model.get_input_embeddings().weight.detach(), embedding_grid))
    pack_embedding(model, name, packed)
    return BondsmithConfig(networks, packed=packed_section(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_saves_and_loads_bit_identical(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    attach(model, pack(model, Grid(4, 16, symmetric=False), Grid(8, 0)))
    assert tied == isinstance(model.get_output_embeddings(), PackedHead)
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(model), logits(again))
    assert packed_section(again) == packed_section(model)
    again.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")))
    out = again.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 15)
    plain = copy.deepcopy(again).dequantize()
    assert not any(isinstance(m, PackedMatrix | PackedHead | MPOLinear) for m in plain.modules())
    assert torch.allclose(logits(plain), logits(model), atol=2e-4 * float(logits(model).abs().max()))
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A packed model as our own stages write it: one file a block, an index, config last."""
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "original")
    source = open_source(tmp_path / "original", tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original").eval()
    config = pack(model, Grid(3, 16), Grid(4, 32))
    state = saved_state(model, torch.float32)
    out = tmp_path / "out"
    out.mkdir()
    first = {n: t for n, t in state.items() if "layers" not in n}
    write_shard(out / "bondsmith-00001-of-00002.safetensors", first)
    write_shard(out / "bondsmith-00002-of-00002.safetensors", {n: t for n, t in state.items() if n not in first})
    write_index(out, [f"bondsmith-0000{k}-of-00002.safetensors" for k in (1, 2)])
    write_config(out, source, config.networks, torch.float32, config.packed)
    torch.save(logits(model), tmp_path / "logits.pt")
    return out


def test_our_files_load_and_stream_bit_identical(written: Path) -> None:
    expected = torch.load(written.parent / "logits.pt")
    model = bondsmith.load(written)
    assert torch.equal(logits(model), expected)
    assert json.loads((written / "config.json").read_text())["quantization_config"]["format"] == 3
    streamed = Streamed(open_compressed(written), torch.device("cpu"))
    with torch.no_grad():
        hidden = streamed.runner.enter(IDS)
        for k in range(len(streamed.runner)):
            hidden = streamed.pass_block(k, IDS, hidden)
            block = streamed.runner.blocks[k]
            assert all(b.is_meta for m in block.modules() if isinstance(m, PackedMatrix) for b in m.buffers())
        assert torch.equal(streamed.runner.logits(IDS, hidden), expected)


def test_in_bfloat16_the_packed_weights_stay_the_same(written: Path, tmp_path: Path) -> None:
    model, low = bondsmith.load(written), bondsmith.load(written, dtype=torch.bfloat16)
    for (name, one), (_, other) in zip(model.named_buffers(), low.named_buffers(), strict=True):
        if name.rpartition(".")[2] in ("codes", "scales", "centres"):
            assert torch.equal(one, other), name
            assert one.dtype == other.dtype
    assert logits(low).dtype == torch.bfloat16
    before = logits(low)
    low.save_pretrained(tmp_path / "low")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "low")), before)


def test_memory_and_file_are_as_small_as_the_grids_say(written: Path) -> None:
    model = bondsmith.load(written)
    said = sum(m.grid.packed_bytes(m.rows, m.columns) for m in model.modules() if isinstance(m, PackedMatrix))
    held = sum(b.nbytes for m in model.modules() if isinstance(m, PackedMatrix) for b in m.state_dict().values())
    stored = {n: t for f in written.glob("*.safetensors") for n, t in load_file(f).items()}
    packed = [t.nbytes for n, t in stored.items() if n.rpartition(".")[2] in ("codes", "scales", "centres")]
    assert held == sum(packed) == said
    assert sum(p.nbytes for p in model.parameters()) == sum(t.nbytes for t in stored.values()) - said - sum(
        t.nbytes for n, t in stored.items() if n.endswith("pivots")
    )


def test_an_altered_byte_is_an_error_never_garbage(written: Path) -> None:
    file = written / "bondsmith-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"bondsmith-00002-of-00002.*do not have the checksum"):
        bondsmith.load(written)
    source = open_compressed(written)
    with pytest.raises(ValueError, match="do not have the checksum"):
        source.read(list(source.places))


def test_a_file_cut_short_is_an_error(written: Path) -> None:
    file = written / "bondsmith-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedError, match="is cut short or damaged"):
        bondsmith.load(written)


def test_an_altered_grid_is_an_error(written: Path) -> None:
    file = written / "config.json"
    config = json.loads(file.read_text())
    grid = config["quantization_config"]["packed"]["model.embed_tokens"]
    assert (grid["bits"], grid["symmetric"]) == (4, True)
    grid["codebook"] = "nf4"  # other weights of the same bytes
    file.write_text(json.dumps(config))
    with pytest.raises(DamagedError, match=r"config.json: networks and grids .* do not have the checksum"):
        bondsmith.load(written)
    with pytest.raises(DamagedError, match="checksum"):
        open_compressed(written)


@pytest.mark.parametrize("what", ["tensor", "checksum"])
def test_a_lost_tensor_or_checksum_is_an_error(written: Path, what: str) -> None:
    file = written / "bondsmith-00002-of-00002.safetensors"
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + size])
    if what == "tensor":
        name = next(n for n in head if n.endswith("up_proj.codes"))
        head[name + "x"] = head.pop(name)
    else:
        head["__metadata__"].pop("bondsmith_sha256")
    text = json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(
        DamagedError, match="up_proj.codes is missing from" if what == "tensor" else "has no checksum in"
    ):
        bondsmith.load(written)


def test_what_a_user_saved_is_checked_too(written: Path, tmp_path: Path) -> None:
    bondsmith.load(written).save_pretrained(tmp_path / "user")
    file = tmp_path / "user" / "model.safetensors"
    data = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + size])
    first, _ = head["model.layers.1.mlp.up_proj.scales"]["data_offsets"]
    data[8 + size + first] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"up_proj.scales do not have the checksum"):
        bondsmith.load(tmp_path / "user")


def test_scales_that_are_being_trained_are_saved_in_the_format(written: Path, tmp_path: Path) -> None:
    model = bondsmith.load(written)
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            module.train_scales()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = [p for n, p in model.named_parameters() if n.endswith(("scales", "centres"))]
    assert len(trained) == sum(isinstance(m, PackedMatrix) for m in model.modules())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    model.save_pretrained(tmp_path / "trained")
    stored = load_file(tmp_path / "trained" / "model.safetensors")
    assert {t.dtype for n, t in stored.items() if n.endswith("scales")} == {torch.bfloat16}
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "trained")), logits(bondsmith.load(written))
    )


def test_format_1_without_checksums_still_loads(compressed: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    old = tmp_path / "old"
    shutil.copytree(compressed, old)
    for file in old.glob("*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt"})
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]["packed"]
    config["quantization_config"]["format"] = 1
    (old / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(bondsmith.load(old)), logits(bondsmith.load(compressed)))


def test_a_digest_sees_every_bit() -> None:
    codes = torch.zeros(3, 5, dtype=torch.uint8)
    other = codes.clone()
    other[2, 4] = 1
    assert digest(codes) != digest(other)
    assert digest(torch.ones(2, dtype=torch.bfloat16)) == digest(torch.ones(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("grid", [Grid(4, 32, symmetric=False), Grid(4, 64), Grid(3, 32)], ids=str)
def test_memory_stays_that_of_the_file_once_kernels_were_used(grid: Grid, tmp_path: Path) -> None:
    """Rows (gate and up: 88) and columns (down: 88) are no multiples of the int4 kernel's blocks and groups."""
    model = tiny_model("llama", tie_word_embeddings=True, intermediate_size=88).to(torch.bfloat16)
    attach(model, pack(model, grid, Grid(4, 32)))
    model.save_pretrained(tmp_path)
    again, before = bondsmith.load(tmp_path), logits(model)
    assert torch.allclose(logits(again).float(), before.float(), atol=0.02 * float(before.abs().max()))
    held = {t.data_ptr(): t.nbytes for t in (*again.parameters(), *again.buffers()) if t.numel()}
    stored = sum(t.nbytes for file in tmp_path.glob("*.safetensors") for t in load_file(file).values())
    assert sum(held.values()) <= 1.05 * stored
    again.save_pretrained(tmp_path / "again")
    for file in tmp_path.glob("*.safetensors"):
        kept, there = load_file(file), load_file(tmp_path / "again" / file.name)
        assert all(torch.equal(kept[name], there[name]) for name in kept)


def test_a_widened_model_says_the_same_and_is_saved_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True).to(torch.bfloat16)
    attach(model, pack(model, Grid(3, 32, symmetric=False), Grid(2, 32)))
    model.save_pretrained(tmp_path)
    plain, wide = bondsmith.load(tmp_path), bondsmith.load(tmp_path, widen=True)
    sizes = [sum(m.codes.nbytes for m in x.modules() if isinstance(m, PackedMatrix)) for x in (plain, wide)]
    assert (sizes[1] > sizes[0]) == (kernels.int4_block() > 0)
    expected = logits(plain).float()
    assert (logits(wide).float() - expected).norm() < 0.02 * expected.norm()
    wide.save_pretrained(tmp_path / "again")
    for file in tmp_path.glob("*.safetensors"):
        kept, there = load_file(file), load_file(tmp_path / "again" / file.name)
        assert kept.keys() == there.keys()
        assert all(torch.equal(kept[name], there[name]) for name in kept)
