"""The report, the model card and the terminal's table, from results as a run of SmolLM2-135M leaves them."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from sample_results import SHAPES, network, smollm2_results

from bondsmith.stages.charts import bars, heat_map
from bondsmith.stages.report import comparison, headline, summary_table, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Balanced(HTMLParser):
    """Fails on a closing tag that does not match, and gathers the visible text and the tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def printed(results: dict[str, Any], width: int = 110) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(results))
    return console.export_text()


def written(folder: Path, results: dict[str, Any]) -> tuple[str, str]:
    write_report(folder, results)
    return (folder / "report.html").read_text(encoding="utf-8"), (folder / "README.md").read_text(encoding="utf-8")


def test_every_page_shows_every_row(tmp_path: Path) -> None:
    results = smollm2_results()
    page, card = written(tmp_path, results)
    text, table = Balanced(page).text, printed(results)
    rows = comparison(results)
    assert len(rows) == 5 + 2 * 3 + 2 + 2
    for row in rows:
        for cell in filter(None, (row.label, row.original, row.compressed, row.change)):
            assert cell in text
            assert cell in table
            assert cell.replace("_", "\\_") in card
    assert headline(results) in text
    for shown in (text, card):
        assert "bondsmith 0.1.0, python 3.11.2" in shown.replace("\\.", "."), "every package once"
        assert "bondsmith 0.1.0, bondsmith" not in shown


def test_ratios_and_errors_are_those_of_the_figures() -> None:
    rows = {row.label: row for row in comparison(smollm2_results())}
    sizes = smollm2_results()["size"]
    before, after = sizes["original"], sizes["compressed"]
    assert rows["Bytes, original at 4 per parameter"].change == f"× {after['bytes'] / before['bytes_fp32']:.3f}"
    assert rows["Bytes, original in bfloat16"].change == f"× {after['bytes'] / before['bytes']:.3f}"
    assert rows["Perplexity"].change == f"× {43.9 / 37.13:.2f}"
    assert rows["KL to the original, nats/token"].compressed == "0.2314 ± 0.0041"
    assert rows["Top-1 agreement"].compressed == "79.23 ± 0.28 %"
    assert rows["arc_easy, acc_norm, 400 rows"].original == "0.542 ± 0.025"
    assert rows["arc_easy, acc_norm, 400 rows"].change == "−0.030"
    assert rows["Prefill, 8 × 128 tokens"].compressed == "1,689"


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    results = smollm2_results()
    for name in ("quality", "tasks", "speed", "chat", "calibration", "seconds"):
        del results[name]
    results["speed_skipped"] = "asked not to"
    page, card = written(tmp_path, results)
    for text in (Balanced(page).text, card, printed(results)):
        for word in ("Perplexity", "KL", "Tasks", "Prefill", "reply", "Calibration", "None", "nan"):
            assert word not in text
    assert "Speed was not measured: asked not to." in Balanced(page).text
    assert "Speed was not measured: asked not to." in card


def test_report_is_one_self_contained_file(tmp_path: Path) -> None:
    page, _ = written(tmp_path, smollm2_results())
    tags = Balanced(page).tags
    assert not {"script", "link", "img", "iframe"} & set(tags)
    assert not re.search(r"(?:src=|href=|@import|https?:)", page)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert len(page.encode()) < 200_000


def test_heat_map_has_a_square_and_the_value_for_every_matrix(tmp_path: Path) -> None:
    results = smollm2_results()
    page, _ = written(tmp_path, results)
    heat = heat_map(results["networks"])
    assert heat is not None
    assert [label for label, _ in heat.rows] == [kind.split(".")[1] for kind in SHAPES]
    assert sum(len(cells) for _, cells in heat.rows) == 210
    for entry in results["networks"]:
        said = "kept dense" if entry["error"] is None else f"error {entry['error']:#.3g}"
        assert f"<title>{entry['name']}: {said}" in page


@pytest.mark.parametrize("largest", [1e-7, 0.0031, 0.05, 0.36, 0.5, 1.0, 3.2])
def test_scale_covers_the_largest_error_in_few_steps(largest: float) -> None:
    heat = heat_map([network("m.0.q", 0, (64, 64), largest, 8), network("m.1.q", 1, (64, 64), largest / 7, 8)])
    assert heat is not None
    assert 4 <= heat.levels <= 10
    edges = [float(edge) for edge in heat.edges]
    for cell, error in zip(heat.rows[0][1], (largest, largest / 7), strict=True):
        assert cell.level is not None
        assert edges[cell.level] <= error * (1 + 1e-6)
        assert error <= edges[cell.level + 1] * (1 + 1e-6)
    assert (heat.shade(0), heat.shade(heat.levels - 1)) == (0, 9)


def test_experts_share_a_square_and_what_lies_outside_of_blocks_has_none() -> None:
    networks = [
        network(f"m.layers.{b}.experts.{e}.up", b, (64, 32), 0.1 * (e + 1), 8) for b in (0, 2) for e in range(3)
    ]
    networks.append(network("lm_head", None, (64, 32), 0.5, 8))
    heat = heat_map(networks)
    assert heat is not None
    assert heat.blocks == [0, 2]
    (label, cells), *others = heat.rows
    assert (label, others) == ("up", [])
    assert [cell.column for cell in cells] == [0, 1]
    assert (
        cells[1].title
        == "block 2, experts.*.up, 3 matrices: error 0.200 (mean; 0.100 to 0.300), 34 % of the parameters"
    )
    assert [(bar.label, bar.dense) for bar in bars(networks)] == [("up", 6 * 64 * 32), ("lm_head", 64 * 32)]


def test_everything_kept_dense_is_a_report_too(tmp_path: Path) -> None:
    results = smollm2_results()
    results["networks"] = [network(n["name"], n["block"], tuple(n["shape"]), None) for n in results["networks"]]
    page, _ = written(tmp_path, results)
    assert page.count("kept dense</title>") == 210
    assert "Largest" not in Balanced(page).text
    results["networks"] = []
    page, _ = written(tmp_path, results)
    assert "<rect" not in page


def test_same_last_name_in_attention_and_mlp_stays_apart() -> None:
    networks = [network(f"h.{b}.{kind}.c_proj", b, (8, 8), 0.1, 2) for b in range(2) for kind in ("attn", "mlp")]
    assert [bar.label for bar in bars(networks)] == ["attn.c_proj", "mlp.c_proj"]


def test_text_of_others_stays_text(tmp_path: Path) -> None:
    results = smollm2_results()
    evil = "</style><script>alert(1)</script> | `x` [bold]y[/bold]\n# z"
    results["model"] |= {"name": evil, "architecture": evil, "license": "apache-2.0\ntags: [evil]"}
    results["quality"][0]["text"] = evil
    results["tasks"][0]["task"] = evil
    results["command"] = f"bondsmith compress '{evil}'\n```\n# heading"
    results["chat"] = {"prompt": evil, "original": evil, "compressed": "```\n<script>"}
    results["calibration"]["sources"][0]["spec"] = evil
    results["networks"][0]["name"] = evil
    results["settings"]["sites"] = evil
    page, card = written(tmp_path, results)
    assert "script" not in Balanced(page).tags
    assert "<script>alert(1)</script>" in Balanced(page).text
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["tags"] == ["bondsmith", "tensor-network"]
    outside = re.sub(r"^(`{3,})[a-z]*\n.*?\n\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in outside
    assert not re.search(r"^# (z|heading)", outside, flags=re.MULTILINE)
    for line in outside.splitlines():
        assert not line.startswith("|") or len(re.findall(r"(?<!\\)\|", line)) == 5
    assert "[bold]y[/bold]" in printed(results, width=300)


def test_card_head_carries_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    results = smollm2_results()
    front = yaml.safe_load(written(tmp_path, results)[1].split("---\n")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bondsmith", "tensor-network"],
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
    }
    results["model"] |= {"license": None, "base_model": None}
    front = yaml.safe_load(written(tmp_path, results)[1].split("---\n")[1])
    assert set(front) == {"library_name", "pipeline_tag", "tags"}


def test_card_says_how_to_load_and_repeat(tmp_path: Path) -> None:
    results = smollm2_results()
    _, card = written(tmp_path / "small", results)
    assert "import bondsmith\n" in card
    assert 'AutoModelForCausalLM.from_pretrained("small")' in card
    assert 'from_pretrained("small", trust_remote_code=True)' in card
    for said in (results["command"], "Seed: 7", "torch 2.13.0", "AMD EPYC 7B13", "9f2c" * 16):
        assert said in card
    assert "\n\n\n" not in card


def test_results_survive_json_unchanged(tmp_path: Path) -> None:
    results = smollm2_results()
    first = written(tmp_path, results)
    assert written(tmp_path, json.loads(json.dumps(results))) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 2}, "format 2, this version of bondsmith reads format 1"), ({"size": ...}, "lacks size")],
)
def test_unreadable_results_are_named_before_anything_is_written(tmp_path: Path, change: Any, message: str) -> None:
    results = {name: value for name, value in (smollm2_results() | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "out", results)
    with pytest.raises(ValueError, match=message):
        summary_table(results)
    assert not (tmp_path / "out").exists()


def test_failed_write_keeps_the_old_page_and_leaves_no_scrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = written(tmp_path, smollm2_results())

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, smollm2_results() | {"seed": 8})
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old[0]


def test_smallest_file_of_the_documentation_is_enough(tmp_path: Path) -> None:
    documentation = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    results = json.loads(re.findall(r"```json\n(.*?)```", documentation, flags=re.DOTALL)[-1])
    page, card = written(tmp_path, results)
    assert "60 of 100 parameters" in Balanced(page).text.replace("\u00a0", " ")
    assert "× 0.300" in card


def test_documentation_lists_every_field() -> None:
    documentation = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    results = smollm2_results()
    named = set(re.findall(r"`([a-z_0-9]+)`", documentation))
    parts = [results, *(results[name] for name in ("machine", "model", "chat")), results["size"]["original"]]
    parts += [results["quality"][0], results["tasks"][0], results["speed"]["prefill"], results["networks"][0]]
    missing = {field for part in parts for field in part} - named - {"perplexity"}
    assert missing == set()


def test_a_model_much_closer_on_fitted_text_is_told_to_calibrate_on_more() -> None:
    results = smollm2_results()
    results["quality_fitted"] = results["quality"][0] | {"text": "calibration", "kl": 0.1}
    assert "more calibration tokens" in headline(results)
    assert any(row.section.startswith("Text that was calibrated on (40") for row in comparison(results))
    results["quality_fitted"]["kl"] = 0.2
    assert "more calibration tokens" not in headline(results)
