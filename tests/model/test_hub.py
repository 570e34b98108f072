"""A compressed directory is an ordinary Hugging Face directory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import bondsmith
from bondsmith.model.hub import BondsmithConfig, attach
from bondsmith.nn.linear import MPOLinear

IDS = torch.arange(3, 27).view(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
    )


def test_loads_with_networks_and_ties_the_head(compressed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    layers = [m for m in model.modules() if isinstance(m, MPOLinear)]
    assert len(layers) == 21
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not model.training


def test_what_was_saved_loads_bit_identical(compressed: Path, tmp_path: Path) -> None:
    model = bondsmith.load(compressed)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(model), logits(again))
    assert "transformers_weights" not in json.loads((tmp_path / "again" / "config.json").read_text())
    again.save_pretrained(tmp_path / "thrice")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "thrice")))


def test_files_hold_just_what_the_loaded_model_has(compressed: Path) -> None:
    model = bondsmith.load(compressed)
    from safetensors.torch import load_file

    stored = {k: v for f in compressed.glob("bondsmith-*.safetensors") for k, v in load_file(f).items()}
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in stored)


def test_a_model_made_in_memory_can_be_attached_and_saved(original: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(original)
    name = "model.layers.1.mlp.up_proj"
    from bondsmith.tensor.fit import sequential_svd
    from bondsmith.tensor.sites import parse_sites

    sites = parse_sites("interleaved:2", 64, 32)
    layer = MPOLinear.from_mpo(sequential_svd(model.get_submodule(name).weight.detach(), sites, 5))
    model.set_submodule(name, layer)
    legs = [list(pair) for pair in zip(sites.out_legs, sites.in_legs, strict=True)]
    attach(model, BondsmithConfig({name: {"sites": legs, "bonds": [5], "gauge": False}}))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(bondsmith.load(tmp_path)))


def test_trust_remote_code_needs_no_import(compressed: Path) -> None:
    code = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(compressed)!r}, trust_remote_code=True)
print(sum(type(m).__name__ == "MPOLinear" for m in model.modules()))
torch.set_num_threads(1)
print(model(input_ids=torch.arange(3, 27).view(2, 12)).logits.double().sum().item().hex())
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    count, total = done.stdout.split()
    assert count == "21"
    assert float.fromhex(total) == logits(bondsmith.load(compressed)).double().sum().item()


@pytest.mark.parametrize("saved_by_user", [False, True])
def test_plain_transformers_refuses_instead_of_loading_random_weights(
    compressed: Path, tmp_path: Path, saved_by_user: bool
) -> None:
    directory = compressed
    if saved_by_user:
        directory = tmp_path / "user"
        bondsmith.load(compressed).save_pretrained(directory)
    code = f"""
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(directory)!r})
"""
    done = run_python(code)
    assert done.returncode != 0
    assert ("no file named" in done.stderr) if not saved_by_user else ("mismatch" in done.stderr.lower())


def test_bfloat16_and_shards(compressed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(again))


def test_untied_head_is_kept(tmp_path: Path, text: Path) -> None:
    from conftest import save_tiny

    save_tiny(tmp_path / "model", tie_word_embeddings=False)
    done = bondsmith.compress(
        tmp_path / "model",
        tmp_path / "out",
        keep=0.7,
        uniform=True,
        calibration=[str(text)],
        tokens=512,
        window=32,
        evaluate=False,
    )
    model = done.load()
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(tmp_path / "model").lm_head.weight)


def test_generate_and_pipeline(compressed: Path) -> None:
    model, tokenizer = bondsmith.load(compressed), AutoTokenizer.from_pretrained(compressed)
    greedy = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert greedy.shape == (1, 17)
    write = pipeline("text-generation", model=str(compressed), tokenizer=tokenizer)
    text = write("w3 w4 w5", max_new_tokens=4, do_sample=False, return_full_text=True)[0]["generated_text"]
    assert text.startswith("w3 w4 w5")


def test_dequantize_gives_an_ordinary_model(compressed: Path, tmp_path: Path) -> None:
    model = bondsmith.load(compressed)
    before = logits(model)
    plain = copy.deepcopy(model).dequantize()
    assert not any(isinstance(m, MPOLinear) for m in plain.modules())
    assert torch.allclose(before, logits(plain), atol=1e-4)
    plain.save_pretrained(tmp_path)
    done = run_python(
        f"from transformers import AutoModelForCausalLM as A; print(A.from_pretrained({str(tmp_path)!r}).dtype)"
    )
    assert done.stdout.strip() == "torch.float32", done.stderr[-2000:]
    assert torch.equal(logits(plain), logits(AutoModelForCausalLM.from_pretrained(tmp_path)))


def test_lora_trains_on_the_cores(compressed: Path) -> None:
    peft = pytest.importorskip("peft")
    model = bondsmith.load(compressed)
    targets = [n for n, m in model.named_modules() if ".cores." in n and isinstance(m, torch.nn.Linear)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets[:6], init_lora_weights=False))
    before = logits(adapted)
    loss = adapted(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_" in n]
    assert len(gradients) == 12
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    with adapted.disable_adapter():
        assert not torch.allclose(before, logits(adapted))


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(ValueError, match="upgrade bondsmith"):
        BondsmithConfig({}, format=99)


def test_packed_matrices_of_an_older_format_are_refused() -> None:
    packed = {"model.layers.0.mlp.up_proj": {"bits": 4, "group": 64, "symmetric": False, "codebook": "uniform"}}
    with pytest.raises(ValueError, match=r"format 2, whose scales were float16.*compress the model again"):
        BondsmithConfig({}, packed=packed, format=2)
    assert BondsmithConfig({}, format=2).format == 2
