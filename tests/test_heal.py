"""bondsmith heal: closer to the original, and clear about bad input."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny, tiny_model, tiny_tokenizer, write_text
from heal_cases import SETTINGS, heal, make_home, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bondsmith
from bondsmith.data import DataError
from bondsmith.model.checkpoint import write_index, write_shard
from bondsmith.model.source import ModelError
from bondsmith.recipe import Recipe, RecipeError, grid_of, read_settings
from bondsmith.stages.healing import loop
from bondsmith.stages.healing.losses import Sums
from bondsmith.stages.healing.settings import HealError, HealSettings
from bondsmith.stages.training import Steps
from bondsmith.tensor.rounding import Grid, round_to_nearest


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("heal"))


def test_it_comes_closer_to_the_original(home: Path, tmp_path: Path) -> None:
    before = weights(home / "small")
    other = write_text(tmp_path / "other.txt", 1000, seed=3)
    done = heal(home, tmp_path / "out", evaluation=str(other))
    curve = done.healing["curve"]
    assert [e["step"] for e in curve] == [0, 2, 4, 6, 8, 10]
    assert curve[-1]["kl"] < 0.6 * curve[0]["kl"]
    assert done.healing["best_step"] == min(curve, key=lambda e: e["kl"])["step"]
    assert weights(home / "small") == before
    old, new = (json.loads((d / "results.json").read_text()) for d in (home / "small", tmp_path / "out"))
    assert new["healing"]["curve"] == curve
    assert new["size"] == old["size"]
    assert new["quality"][0]["kl"] != old["quality"][0]["kl"]
    assert [row["text"] for row in new["quality"]] == ["text.txt", "other.txt"]
    assert "Healed" in (tmp_path / "out" / "report.html").read_text()
    assert str(done).count("\n") == len(curve)
    ids = torch.arange(3, 40)[None]
    assert torch.isfinite(done.load()(input_ids=ids).logits).all()
    assert not list(tmp_path.glob("*.partial"))
    assert not (tmp_path / "out" / "work").exists()


def test_files_keep_their_form_and_only_networks_and_norms_change(home: Path, tmp_path: Path) -> None:
    done = heal(home, tmp_path / "out", evaluate=False)
    changed = set()
    for file in (home / "small").glob("bondsmith-*.safetensors"):
        old, new = load_file(file), load_file(done.path / file.name)
        assert {n: (t.shape, t.dtype) for n, t in old.items()} == {n: (t.shape, t.dtype) for n, t in new.items()}
        changed |= {n for n in old if not torch.equal(old[n], new[n])}
    assert any("cores" in n for n in changed)
    assert all("cores" in n or "pivots" in n or "norm" in n for n in changed)
    everything = heal(home, tmp_path / "all", evaluate=False, embeddings=True)
    old, new = (load_file(d / "bondsmith-00001-of-00004.safetensors") for d in (done.path, everything.path))
    assert not torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])


def test_in_place_and_with_the_original_resident(home: Path, tmp_path: Path) -> None:
    cached = heal(home, tmp_path / "cached", cache=tmp_path / "cache", evaluate=False)
    place = Path(shutil.copytree(home / "small", tmp_path / "place"))
    resident = bondsmith.heal(place, data=str(home / "text.txt"), resident=True, **SETTINGS)
    assert resident.path == place
    assert weights(place) != weights(home / "small")
    for a, b in zip(cached.healing["curve"], resident.healing["curve"], strict=True):
        assert b["kl"] == pytest.approx(a["kl"], rel=0.01)
    written = next((tmp_path / "cache").glob("teacher-*/00000.safetensors")).stat().st_mtime_ns
    heal(home, tmp_path / "again", cache=tmp_path / "cache", evaluate=False)
    assert next((tmp_path / "cache").glob("teacher-*/00000.safetensors")).stat().st_mtime_ns == written


def test_less_memory_or_half_precision_learn_the_same(home: Path, tmp_path: Path) -> None:
    plain = heal(home, tmp_path / "plain", evaluate=False)
    again = heal(home, tmp_path / "again", evaluate=False, checkpoint_activations=True)
    for a, b in zip(plain.healing["curve"], again.healing["curve"], strict=True):
        assert b["kl"] == pytest.approx(a["kl"], rel=1e-5)
    cache = {"cache": tmp_path / "cache"}
    half = heal(home, tmp_path / "half", evaluate=False, precision="bfloat16", **cache)
    heal(home, tmp_path / "whole", evaluate=False, precision="float32", **cache)
    assert len(list((tmp_path / "cache").iterdir())) == 2, "the original is asked in the same precision"
    assert half.healing["curve"][-1]["kl"] < half.healing["curve"][0]["kl"]


def test_small_micro_batches_make_the_same_steps(home: Path, tmp_path: Path) -> None:
    whole = heal(home, tmp_path / "whole", evaluate=False, micro_batch=8)
    parts = heal(home, tmp_path / "parts", evaluate=False, micro_batch=3)
    for a, b in zip(whole.healing["curve"], parts.healing["curve"], strict=True):
        assert b["kl"] == pytest.approx(a["kl"], rel=1e-4)


def test_a_step_says_loss_speed_and_time_left() -> None:
    moment = loop.Moment(7, 20, 1.25, 812.4, 125.0)
    assert str(moment) == "step 7/20: loss 1.2500, 812 tokens/s, 2:05 left"
    checked = loop.Moment(7, 20, 1.25, 812.4, 125.0, {"kl": 0.5, "perplexity": 12.0})
    assert str(checked).endswith("; validation: KL 0.5000, perplexity 12.000")


def test_without_a_teacher_it_learns_the_text(home: Path, tmp_path: Path) -> None:
    done = heal(home, tmp_path / "out", teacher=False, tokens=10240, learning_rate=0.01, norm_rate=0.01)
    curve = done.healing["curve"]
    assert "kl" not in curve[0]
    assert done.healing["teacher"] is None
    assert curve[-1]["perplexity"] < 0.8 * curve[0]["perplexity"]
    assert "quality" not in json.loads((done.path / "results.json").read_text())


def test_it_stops_when_it_no_longer_helps_and_keeps_the_best(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.HealSettings, "rate", lambda *_: -1.0)  # uphill
    done = heal(home, tmp_path / "out", validate_every=1, patience=3, evaluate=False)
    assert done.healing["best_step"] == 0
    assert done.healing["steps"] == 3
    ids = torch.arange(3, 40)[None]
    models = [bondsmith.load(d, dtype=torch.float32) for d in (home / "small", done.path)]
    with torch.no_grad():
        first, second = (m(input_ids=ids).logits for m in models)
    assert torch.allclose(first, second, atol=1e-4)


def test_a_standstill_at_a_high_rate_ends_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.HealSettings, "rate", lambda _, step: 1.0 if step < 4 else 0.5)
    monkeypatch.setattr(
        loop.Loop, "_score", lambda _, entry: float(entry["step"])
    )  # no state is ever better than the first
    done = heal(home, tmp_path / "out", validate_every=1, patience=2, evaluate=False)
    assert (done.healing["best_step"], done.healing["steps"]) == (0, 5)


def test_matrices_that_lost_channels_are_trained_too(home: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "wide", intermediate_size=128)
    text: dict[str, Any] = {"calibration": [str(home / "text.txt")], "tokens": 4096, "window": 64}
    small = bondsmith.compress(tmp_path / "wide", tmp_path / "small", keep=0.5, evaluate=False, **text).path
    networks = json.loads((small / "config.json").read_text())["quantization_config"]["networks"]
    reduced = {f"{name}.weight" for name, network in networks.items() if not network.get("sites")}
    assert reduced, "the plan drops no channels: another model is needed here"
    gently = SETTINGS | {"learning_rate": 0.002}
    done = bondsmith.heal(small, tmp_path / "out", data=str(home / "text.txt"), evaluate=False, **gently)
    changed = set()
    for file in small.glob("bondsmith-*.safetensors"):
        old, new = load_file(file), load_file(done.path / file.name)
        changed |= {n for n in old if not torch.equal(old[n], new[n])}
    assert reduced <= changed


def test_a_model_whose_logits_are_not_what_its_head_returns_takes_the_same_steps(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_head = heal(home, tmp_path / "head", evaluate=False).healing["curve"]
    monkeypatch.setattr(loop, "fits", lambda *args: False)
    monkeypatch.delattr(loop, "head_sums")
    by_logits = heal(home, tmp_path / "logits", evaluate=False).healing["curve"]
    assert [e["kl"] for e in by_logits] == pytest.approx([e["kl"] for e in at_head], rel=1e-4)
    assert len({round(e["kl"], 4) for e in by_logits}) > 1


@pytest.mark.parametrize("rate", [None, 0.0003])
def test_where_little_was_lost_steps_are_smaller(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float | None
) -> None:
    real, scales = Steps.step, []

    def step(self: Steps) -> None:
        scales.append(self.scale)
        real(self)

    monkeypatch.setattr(Steps, "step", step)
    done = heal(home, tmp_path / "out", learning_rate=rate, evaluate=False, validate_every=20)
    before = done.healing["curve"][0]["kl"]
    assert before < 1, "another model is needed here"
    assert max(scales) == pytest.approx(math.sqrt(before) if rate is None else 1.0)


# rounded


def rounded(small: Path, place: Path, grid: Grid) -> Path:
    """A compressed model with every core packed."""
    shutil.copytree(small, place)
    config = json.loads((place / "config.json").read_text())
    packed, shards = {}, sorted(f.name for f in place.glob("bondsmith-*.safetensors"))
    for shard in shards:
        tensors = load_file(place / shard)
        for name in [n for n in tensors if ".cores." in n]:
            core = name.removesuffix(".weight")
            packed[core] = grid.to_json()
            tensors |= {f"{core}.{leaf}": t for leaf, t in round_to_nearest(tensors.pop(name), grid).tensors().items()}
        write_shard(place / shard, tensors)
    config["quantization_config"] |= {"packed": packed, "checksum": None}
    (place / "config.json").write_text(json.dumps(config))
    write_index(place, shards)
    return place


def test_scales_and_norms_of_a_rounded_model_are_healed_and_its_integers_stay(home: Path, tmp_path: Path) -> None:
    small = rounded(home / "small", tmp_path / "rounded", Grid(3, 16, symmetric=False))
    done = bondsmith.heal(small, tmp_path / "out", data=str(home / "text.txt"), **(SETTINGS | {"norm_rate": 0.01}))
    curve = done.healing["curve"]
    assert curve[-1]["kl"] < 0.9 * curve[0]["kl"]
    changed = set()
    for file in small.glob("bondsmith-*.safetensors"):
        old, new = load_file(file), load_file(done.path / file.name)
        assert {n: (t.shape, t.dtype) for n, t in old.items()} == {n: (t.shape, t.dtype) for n, t in new.items()}
        changed |= {n for n in old if not torch.equal(old[n], new[n])}
    assert any("scales" in n for n in changed)
    assert any("centres" in n for n in changed)
    assert not any("codes" in n or "pivots" in n for n in changed)


def divergence(home: Path, small: Path) -> float:
    """KL of a model on disk to the original, on the text."""
    ids = torch.tensor(tiny_tokenizer()((home / "text.txt").read_text())["input_ids"][-1024:]).view(16, 64)
    with torch.no_grad():
        first = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)(input_ids=ids).logits
        second = bondsmith.load(small, dtype=torch.float32)(input_ids=ids).logits
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_training_with_the_rounding_simulated_loses_less_when_it_comes(home: Path, tmp_path: Path) -> None:
    lost = [0.0, 0.0]
    for seed in (0, 1):
        shared = {
            "evaluate": False,
            "cache": tmp_path / "cache",
            "validate_every": 10,
            "learning_rate": 0.02,
            "seed": seed,
        }
        plain = heal(home, tmp_path / f"plain-{seed}", **shared)
        aware = heal(home, tmp_path / f"aware-{seed}", round_bits=2, round_group=16, **shared)
        for i, done in enumerate((plain, aware)):
            lost[i] += divergence(home, rounded(done.path, tmp_path / f"{done.path.name}-2", grid_of(2, 16)))
    assert lost[1] < 0.95 * lost[0]


def test_a_window_beyond_the_context_is_trained_in_full(tmp_path: Path, home: Path) -> None:
    """As many tokens as asked for, in shorter windows."""
    save_tiny(tmp_path / "model", max_position_embeddings=32)
    bondsmith.compress(
        tmp_path / "model", tmp_path / "small", keep=0.3, uniform=True, metric="frobenius", evaluate=False
    )
    done = bondsmith.heal(tmp_path / "small", data=str(home / "text.txt"), evaluate=False, **SETTINGS)
    assert done.healing["settings"]["window"] == 32
    assert done.healing["steps"] == SETTINGS["tokens"] // (SETTINGS["batch"] * 32)
    assert done.healing["curve"][-1]["tokens"] == SETTINGS["tokens"]


# bad input


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    real, calls = loop.head_sums, []

    def broken(*args: Any) -> Sums:
        sums = real(*args)
        calls.append(1)
        if not torch.is_grad_enabled() or len([c for c in calls if c]) < 20:
            return sums
        factor = math.nan if what == "loss" else 1.0
        if what == "gradient":
            sums.loss.register_hook(lambda g: g * math.nan)
        return replace(sums, loss=sums.loss * factor)

    monkeypatch.setattr(loop, "head_sums", broken)
    with pytest.raises(
        HealError, match=rf"step \d+: the {what} is nan on windows \d+, .*the state of step \d+ is kept: --finish"
    ):
        heal(home, tmp_path / "out")
    monkeypatch.undo()
    note = json.loads((tmp_path / "out.partial" / "work" / "latest.json").read_text())
    done = heal(home, tmp_path / "out", finish=True, evaluate=False)
    assert done.healing["steps"] == note["step"]
    assert all(
        torch.isfinite(t).all() for f in done.path.glob("bondsmith-*.safetensors") for t in load_file(f).values()
    )


def test_windows_that_cannot_be_dealt_out() -> None:
    with pytest.raises(HealError, match=r"batch: 5 windows .* 2 processes; give a multiple of 2, e\.g\. --batch 6"):
        HealSettings(("a",), batch=5).check_processes(2)


def refuses(home: Path, tmp_path: Path, error: type[Exception], match: str, **changes: Any) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error, match=match) as caught:
        heal(home, tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "something was left behind"


def test_a_teacher_with_another_vocabulary(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_model("llama", vocab_size=600).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    refuses(
        home, tmp_path, HealError, "vocabulary of 600 words, .* one of 512: a teacher must have the same", teacher=other
    )


def test_a_teacher_with_the_same_number_of_other_words(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(home / "model", other)
    content = json.loads((other / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    first, second = list(words)[10:12]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    refuses(
        home, tmp_path, HealError, r"has another vocabulary than .*: '.+' is word \d+ there, \d+ here", teacher=other
    )


def test_a_teacher_that_is_not_there(home: Path, tmp_path: Path) -> None:
    refuses(
        home, tmp_path, HealError, "cannot be opened .*--teacher MODEL.*--no-teacher", teacher=str(tmp_path / "gone")
    )


def test_a_directory_that_is_not_ours(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model that bondsmith wrote"):
        bondsmith.heal(home / "model", data=str(home / "text.txt"))


def test_too_little_text(home: Path, tmp_path: Path) -> None:
    text = tmp_path / "small.txt"
    text.write_text("w3 w4")
    refuses(home, tmp_path, DataError, r"too short", data=str(text))
    text.write_text("")
    refuses(home, tmp_path, DataError, r"empty", data=str(text))


def test_chats_for_a_model_without_a_template(home: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(home / "small", tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    chats = tmp_path / "chats.jsonl"
    row = {"messages": [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5 w6 w7"}]}
    chats.write_text("".join(json.dumps(row) + "\n" for _ in range(400)))
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(DataError, match=r"no chat template.*--loss-on all"):
        bondsmith.heal(plain, tmp_path / "out", data=str(chats), teacher=False, **SETTINGS)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    done = bondsmith.heal(plain, tmp_path / "out", data=str(chats), teacher=False, loss_on="all", **SETTINGS)
    assert done.healing["steps"] == 10


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokens": 100}, "100 do not fill one step of 8 windows"),
        ({"batch": 0}, "batch: 0 is less than 1"),
        ({"learning_rate": 0.0}, r"learning_rate: 0\.0 is not above 0"),
        ({"kl_weight": 0.0, "ce_weight": 0.0}, "both 0"),
        ({"loss_on": "some"}, "'some' is not one of auto, all, answers"),
        ({"warmup": 1.0}, r"warmup: 1\.0 is not in"),
        ({"lerning_rate": 1.0}, "did you mean learning_rate"),
        ({"tokens": 1.5}, r"1\.5 is not a whole number"),
    ],
)
def test_settings_that_cannot_work(home: Path, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    refuses(home, tmp_path, HealError, match, **changes)


def test_the_recipes_that_come_with_it_are_valid() -> None:
    folder = Path(__file__).parents[1] / "recipes"
    assert Recipe.read(folder / "blockwise.yaml", keep=0.6).blockwise > 0
    assert HealSettings.from_settings(read_settings(folder / "heal.yaml") | {"data": "a.txt"}).steps > 100
    with pytest.raises(RecipeError, match="no such recipe file"):
        read_settings(folder / "nothing.yaml")
