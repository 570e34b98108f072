"""Checkpoints that are quantised already: dequantised where that can be done, refused with the remedy elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

import bondsmith
from bondsmith.model.source import ModelError, load_whole, open_source

IDS = torch.arange(3, 27).view(2, 12)


def mark(directory: Path, method: str) -> None:
    """Writes into a directory's config.json that its weights are quantised."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("bitsandbytes", r"already quantised \(bitsandbytes\): pip install 'bondsmith\[bitsandbytes\]'"),
        ("hqq", r"already quantised \(hqq\): load it with transformers, call model.dequantize\(\)"),
    ],
)
def test_without_the_package_the_remedy_is_named(
    method: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    save_tiny(tmp_path / "model")
    mark(tmp_path / "model", method)
    with pytest.raises(ModelError, match=words):
        open_source(tmp_path / "model", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_bitsandbytes_checkpoint_is_dequantised_to_what_it_computes_with(
    kind: str, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    save_tiny(tmp_path / "plain", hidden_size=64, intermediate_size=128)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if kind == "nf4" else {"load_in_8bit": True}
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    quantised.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model", tmp_path / "cache")
    opened = load_whole(source)
    name = "model.layers.1.mlp.up_proj.weight"
    W = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").get_parameter(name)
    lost = (opened.get_parameter(name) - W).norm() / W.norm()
    assert 1e-4 < lost < (0.12 if kind == "nf4" else 0.01)
    with torch.no_grad():
        found, expected = (m(input_ids=IDS).logits.float() for m in (opened, quantised))
    assert (found - expected).norm() < (0.03 if kind == "nf4" else 0.05) * expected.norm()  # they round activations too
    assert not hasattr(source.config, "quantization_config")
    done = bondsmith.compress(
        tmp_path / "model", tmp_path / "out", keep=0.7, calibration=[str(text)], tokens=512, window=32, evaluate=False
    )
    assert torch.isfinite(done.load()(input_ids=IDS).logits).all()
