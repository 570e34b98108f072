"""Training windows: nothing is lost, nothing leaks from one piece to the next, and only what should count counts."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, write_text
from tokenizers.pre_tokenizers import Metaspace

from bondsmith.data import DataError
from bondsmith.stages.healing.samples import Samples, read_samples
from bondsmith.stages.healing.shard import keeps_apart
from bondsmith.stages.healing.teacher import logits_of


def read(*files: Path, **changes: Any) -> Samples:
    settings: dict[str, Any] = {"tokens": 2048, "held_out": 2, "window": 64, "answers": False, "seed": 0}
    tokenizer = changes.pop("tokenizer", None) or tiny_tokenizer()
    return read_samples([str(f) for f in files], tokenizer, **(settings | changes))


def chats(path: Path, count: int = 400) -> Path:
    with gzip.open(path, "wt") as lines:
        for i in range(count):
            turns = [
                {"role": "user", "content": f"w{i % 100} w7"},
                {"role": "assistant", "content": f"w{i % 50} w5 w6"},
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return path


def test_short_samples_share_a_window_and_long_ones_are_split(tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    words = [f"w{i % 250}" for i in range(3000)]
    long.write_text(json.dumps({"text": " ".join(words)}) + "\n" + json.dumps({"text": " ".join(words)}) + "\n")
    found = read(long, tokens=10**6, held_out=1)
    assert found.train.split == 1
    tokens = tiny_tokenizer()(" ".join(words))["input_ids"]
    assert found.train.positions[:, :5].tolist() == [[0, 1, 2, 3, 4]] * len(found.train)
    pieces = {tuple(ids.tolist()) for ids in found.train.ids}
    for first in range(0, len(tokens) - 64, 63):  # a piece starts with the last token of the one before
        assert tuple(tokens[first : first + 64]) in pieces, "a token of a long document is missing"
    short = read(chats(tmp_path / "chat.jsonl.gz")).train
    starts = (short.positions == 0).sum(-1)
    assert starts.min() > 1
    filled = [int((ids != 0).sum()) for ids in short.ids[:-1]]
    assert min(filled) > 48, "windows are badly filled"


def test_training_text_comes_from_as_many_documents_as_there_are(tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"text": f"w{i} " * 400}) + "\n" for i in range(40)))
    found = read(long, tokens=20 * 64)
    trained, held, plain = (
        set(re.findall(r"w\d+(?= )", tiny_tokenizer().decode(ids.flatten())))
        for ids in (found.train.ids, found.held.ids, found.plain[0].ids)
    )
    assert len(found.train) == 20
    assert len(trained) >= 19, "several windows of one document"
    assert not (held | plain) & trained


def test_other_text_is_measured_on_but_neither_trained_nor_validated(tmp_path: Path) -> None:
    trained, other = chats(tmp_path / "trained.jsonl.gz"), tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"w{i} w1 w2 w3"}) + "\n" for i in range(200)))
    alone, both = read(trained), read(trained, evaluation=[str(other), str(trained)])
    assert both.train.sha256 == alone.train.sha256
    assert both.held.sha256 == alone.held.sha256
    assert [p.spec for p in both.plain] == [str(trained), str(other)]
    assert both.plain[1].ids.shape == (2, 64)


def test_only_what_the_assistant_says_counts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    windows = read(chats(tmp_path / "chat.jsonl.gz"), answers=True).train
    for ids, counts in zip(windows.ids[:3], windows.counts[:3], strict=True):
        said = tokenizer.decode(ids[counts])
        assert "user" not in said
        assert "assistant" not in said
        assert "w5 w6</s>" in said
    everything = read(chats(tmp_path / "chat.jsonl.gz")).train
    assert everything.tokens > 1.5 * windows.tokens


def test_a_template_that_writes_earlier_turns_anew_trains_on_all_or_says_why_not(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} " + tokenizer.chat_template
    file = chats(tmp_path / "chat.jsonl.gz")
    windows = read(file, tokenizer=tokenizer).train
    assert windows.tokens > 1000
    assert "w5 w6" in tokenizer.decode(windows.ids[0])
    with pytest.raises(DataError, match="answers cannot be told apart: train on all tokens with --loss-on all"):
        read(file, tokenizer=tokenizer, answers=True)


def test_a_chat_has_the_same_tokens_whatever_counts(tmp_path: Path) -> None:
    """Cut into what the user and the assistant say, some tokenizers would put a space in front of each part."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first")
    file = chats(tmp_path / "chat.jsonl.gz")
    answers, everything = (read(file, tokenizer=tokenizer, answers=which).train for which in (True, False))
    assert torch.equal(answers.ids, everything.ids)
    assert 0 < answers.tokens < everything.tokens


def test_a_chat_that_the_assistant_begins(tmp_path: Path) -> None:
    turns = [{"role": "assistant", "content": "w3 w4"}, {"role": "user", "content": "w5"}]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(300)))
    windows = read(file, answers=True).train
    said = tiny_tokenizer().decode(windows.ids[0][windows.counts[0]])
    assert "w3 w4" in said
    assert "w5" not in said


@pytest.mark.parametrize("answers", [True, False])
def test_a_template_that_refuses_a_chat(tmp_path: Path, answers: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(DataError, match=r"chat.jsonl.gz: .* refuses a chat of the roles user.* \(no users here\)"):
        read(chats(tmp_path / "chat.jsonl.gz"), tokenizer=tokenizer, answers=answers)


def test_first_tokens_and_padding_never_count(tmp_path: Path) -> None:
    windows = read(chats(tmp_path / "chat.jsonl.gz")).train
    assert not windows.counts[windows.positions == 0].any()
    assert not windows.counts[windows.ids == 0].any()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "qwen3"])
def test_pieces_of_a_window_do_not_see_each_other(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    assert keeps_apart(model)
    windows = read(chats(tmp_path / "chat.jsonl.gz")).train
    second = int((windows.positions[0] == 0).nonzero()[1])
    end = int((windows.positions[0] == 0).nonzero()[2])
    with torch.no_grad():
        packed = logits_of(model, windows.ids[:1], windows.positions[:1])[:, second:end]
        alone = logits_of(model, windows.ids[:1, second:end], None)
    assert torch.allclose(packed, alone, atol=1e-4)


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"w{i} w{i} w{i} w{i}"}) + "\n" for i in range(3, 250)))
    tokenizer = tiny_tokenizer()
    found = read(file, tokenizer=tokenizer, tokens=10**6)
    words = [
        set(tokenizer.decode(w.ids.flatten().tolist()).replace("</s>", " ").replace("<pad>", "").split())
        for w in (found.train, found.held)
    ]
    assert words[0]
    assert words[1]
    assert not words[0] & words[1]
    plain = set(tokenizer.decode(found.plain[0].ids.flatten().tolist()).replace("</s>", " ").split())
    assert len(plain & words[0]) <= 1  # a word cut in two at the window's end may look like another


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "is too short: 0 tokens in 0 documents"),
        (json.dumps({"text": "w3 w4"}) + "\n", r"too short: \d+ tokens in 1 doc"),
        (json.dumps({"text": 5}) + "\n", "line 1: the column text holds a int, not text"),
        (json.dumps({"messages": [{"from": "a"}]}) + "\n", "line 1: messages are not a list of turns with `role`"),
    ],
)
def test_an_empty_or_tiny_text(tmp_path: Path, content: str, match: str) -> None:
    file = tmp_path / "small.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=match):
        read(file)


def test_chats_without_a_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    file = chats(tmp_path / "chat.jsonl.gz")
    with pytest.raises(DataError, match=r"no chat template.*--loss-on all"):
        read(file, tokenizer=tokenizer, answers=True)
    assert read(file, tokenizer=tokenizer).train.tokens > 0


def test_the_models_own_samples_are_no_training_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="self: healing needs a text"):
        read_samples(["self"], tiny_tokenizer(), tokens=64, held_out=1, window=32, answers=False, seed=0)


def test_the_same_seed_gives_the_same_windows(tmp_path: Path) -> None:
    file = write_text(tmp_path / "text.txt")
    assert read(file).train.sha256 == read(file).train.sha256
    assert read(file).train.sha256 != read(file, seed=1).train.sha256
