"""Windows of tokens: reproducible, of every kind of file, held-out documents never calibrated on."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

from bondsmith.data import DataError, Windows, check_spec, fitted_sample, read_windows, sample_windows, split_windows

TOKENIZER = tiny_tokenizer()


def rows(path: Path, column: str = "text", count: int = 60) -> str:
    lines = [json.dumps({"id": i, column: f"w{i} " * 40}) for i in range(count)]
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    else:
        path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(("name", "column"), [("a.jsonl", "text"), ("a.jsonl.gz", "page"), ("b.jsonl.gz", "text")])
def test_files_and_columns(tmp_path: Path, name: str, column: str) -> None:
    spec = rows(tmp_path / name, column)
    windows = read_windows(spec, TOKENIZER, count=5, window=24, seed=1)
    assert windows.ids.shape == (5, 24)
    assert windows.ids.dtype == torch.int64
    assert windows.describe()["tokens"] == 120
    again = read_windows(spec, TOKENIZER, count=5, window=24, seed=1)
    assert windows.sha256 == again.sha256 != read_windows(spec, TOKENIZER, count=5, window=24, seed=2).sha256


def test_chat_goes_through_the_models_own_template(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(30)))
    ids = read_windows(str(path), TOKENIZER, count=2, window=60).ids
    text = TOKENIZER.decode(ids.flatten())
    assert text.count("<s>user w5</s><s>assistant w6</s>") >= 2
    TOKENIZER_WITHOUT = tiny_tokenizer()
    TOKENIZER_WITHOUT.chat_template = None
    plain = TOKENIZER_WITHOUT.decode(read_windows(str(path), TOKENIZER_WITHOUT, count=2, window=20).ids.flatten())
    assert "user: w5" in plain


def test_held_out_documents_are_never_calibrated_on(tmp_path: Path) -> None:
    spec = rows(tmp_path / "a.jsonl")
    (calibration,), (held_out,) = split_windows([spec], TOKENIZER, tokens=1000, held_out=3, window=50, seed=0)
    words = [set(TOKENIZER.decode(w.ids.flatten()).split()) for w in (calibration, held_out)]
    shared = {w for w in words[0] & words[1] if w.startswith("w")}
    assert len(words[0]) > 3
    assert not shared - {""}


def long_and_short(path: Path, long: int = 10, short: int = 10) -> str:
    """Documents of 400 and of 13 tokens or so, each of its own word."""
    texts = [f"w{i} " * (200 if i < long else 6) for i in range(long + short)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def words_of(ids: torch.Tensor) -> set[str]:
    return set(re.findall(r"w\d+", TOKENIZER.decode(ids)))


def test_one_piece_of_every_document_comes_before_a_second_of_any(tmp_path: Path) -> None:
    spec = long_and_short(tmp_path / "a.jsonl", short=0)
    windows = read_windows(spec, TOKENIZER, count=10, window=40)
    assert windows.documents == 10
    whole = [words_of(ids) for ids in windows.ids]
    assert [len(words) for words in whole] == [1] * 10, "a window of a long document is of it alone"
    assert len(set.union(*whole)) >= 9, "at most one document had its short end drawn"
    assert len(set.union(*(words_of(ids) for ids in read_windows(spec, TOKENIZER, count=20, window=40).ids))) == 10


def test_short_pieces_are_joined_and_all_of_a_text_is_used(tmp_path: Path) -> None:
    spec = long_and_short(tmp_path / "a.jsonl")
    everything = read_windows(spec, TOKENIZER, count=10**6, window=40)
    rows = Path(spec).read_text().splitlines()
    tokens = sum(len(TOKENIZER(json.loads(row)["text"])["input_ids"]) + 1 for row in rows)
    assert tokens - 40 - 20 <= everything.ids.numel() <= tokens
    assert words_of(everything.ids.flatten()) == {f"w{i}" for i in range(20)}
    assert max(len(words_of(ids)) for ids in everything.ids) > 1


def test_evaluation_keeps_to_a_fifth_of_the_documents_while_that_is_enough(tmp_path: Path) -> None:
    spec = long_and_short(tmp_path / "a.jsonl", long=20, short=0)
    counts = [read_windows(spec, TOKENIZER, count=n, window=40, spare=True).documents for n in (2, 4, 20, 60)]
    assert counts[:3] == [2, 4, 4]
    assert 4 < counts[3] <= 20


def test_tokens_are_shared_between_sources(tmp_path: Path) -> None:
    specs = [rows(tmp_path / "a.jsonl"), rows(tmp_path / "b.jsonl")]
    calibration, held_out = split_windows(specs, TOKENIZER, tokens=800, held_out=0, window=50, seed=0)
    assert [w.ids.numel() for w in calibration] == [400, 400]
    assert held_out == []


def test_the_models_own_samples_are_reproducible_and_half_of_them_chat() -> None:
    model = tiny_model("llama")
    runs = [sample_windows(model, TOKENIZER, count=5, window=12, seed=s, batch=2) for s in (0, 0, 1)]
    assert runs[0].shape == (5, 12)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert runs[0][:, 0].tolist() == [TOKENIZER.bos_token_id] * 5
    starts = [TOKENIZER.decode(row).startswith("<s>user ") for row in runs[0]]
    assert starts == [False, True, False, True, False]


def test_specs_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    check_spec("self")
    check_spec("hf:owner/name:config:split")
    with pytest.raises(DataError, match="no such file"):
        check_spec(str(tmp_path / "none.txt"))


def test_hub_data_sets_are_streamed(tmp_path: Path) -> None:
    """`datasets` opens a local folder by the same call as a hub id."""
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    rows(folder / "train.jsonl")
    windows = read_windows(f"hf:{folder}", TOKENIZER, count=3, window=20)
    assert windows.ids.shape == (3, 20)
    rows(folder / "train.jsonl", "story")
    with pytest.raises(DataError, match="none of the columns text, page, messages"):
        read_windows(f"hf:{folder}", TOKENIZER, count=3, window=20)


def test_fitted_windows_are_taken_from_all_texts_in_turn() -> None:
    ids = [torch.full((2, 4), 1), torch.full((3, 4), 2)]
    (sample,) = fitted_sample([Windows("a", ids[0], 2), Windows("b", ids[1], 1)], 4)
    assert sample.spec == "calibration"
    assert sample.ids[:, 0].tolist() == [1, 2, 1, 2]
    assert fitted_sample([], 4) == []
