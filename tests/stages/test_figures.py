"""Axes, maps and pages: what is drawn is what was given."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bondsmith.stages.figures import _edges, axis, loss_map, place, short_labels
from bondsmith.stages.profile import MatrixProfile, Profile
from bondsmith.stages.profile_page import Section, fast_sections, spectrum_sections, write_page

KINDS = ("self_attn.q_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    "values",
    [[0.3, 0.9], [1e-6, 3.0], [0.02, 0.5], [7.0], [1e-12, 1e-11, 40.0], [0.0, 0.0], [0.0, 2.0], [float("nan"), 3.0]],
)
@pytest.mark.parametrize("log", [True, False])
def test_axes_cover_what_is_drawn(values: list[float], log: bool) -> None:
    found = axis("y", values, log=log)
    assert 2 <= len(found.ticks) <= 12
    assert [found.low, found.high] == pytest.approx([found.ticks[0][0], found.ticks[-1][0]])
    assert len({text for _, text in found.ticks}) == len(found.ticks)
    finite = [v for v in values if v == v and v > 0]
    assert all(found.high >= v * (1 - 1e-9) for v in finite)
    assert all(0 <= found.at(v) <= 1 for v in finite)
    assert found.at(found.low) == 0
    assert found.at(found.high) == 1


@pytest.mark.parametrize("values", [[0.3, 0.9], [1e-6, 3.0], [0.02, 0.5], [7.0], [1e-12, 40.0], [0.0, 0.0], [0.0, 2.0]])
def test_steps_of_a_map_cover_its_values(values: list[float]) -> None:
    edges = _edges(values)
    assert 2 <= len(edges) <= 11
    assert all(a < b for a, b in pairwise(edges))
    assert edges[-1] >= max(values) * (1 - 1e-9)


def test_a_map_puts_values_in_their_squares() -> None:
    values = {f"model.layers.{k}.{kind}": 10.0 ** (k - 3) * (1 + i) for k in (0, 1, 3) for i, kind in enumerate(KINDS)}
    del values["model.layers.1.mlp.down_proj"]
    found = loss_map(values | {"lm_head": 5.0}, "Loss", "nats")
    assert found is not None
    assert found.heat.blocks == [0, 1, 3]
    (first, q), (second, down) = found.heat.rows
    assert (first, second) == ("q_proj", "down_proj")
    assert [c.level for c in down if c.level is None] == [None]
    levels = [c.level or 0 for c in q]
    assert levels == sorted(levels)
    assert len(set(levels)) == 3
    assert q[2].title == "block 3, q_proj: 1.00 nats"
    assert found.blank == "not measured"
    assert loss_map({"lm_head": 1.0}, "Loss", "nats") is None


def test_names_are_placed() -> None:
    assert place("transformer.h.11.mlp.c_fc") == (11, "mlp.c_fc")
    assert short_labels(["a.up", "b.up", "a.down"]) == {"a.up": "a.up", "b.up": "b.up", "a.down": "down"}


def test_the_page_of_a_fast_profile(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = tuple(
        MatrixProfile(
            f"model.layers.{k}.{kind}",
            k,
            24,
            24,
            torch.rand(24, generator=generator).sort().values.flip(0),
            1.0,
            {64: 2.0},
        )
        for k in range(3)
        for kind in KINDS
    )
    profile = Profile("tiny", 2, 0, "loss", 4096, matrices)
    sections = fast_sections(profile)
    curves = sections[1].figures[0]
    point = curves.panels[0].lines[1].points[-1]
    assert point.y == pytest.approx(float(matrices[2].cut_losses()[23]))
    assert point.x == pytest.approx((23 * 48 - 23**2) / 576)
    entropies = next(s for s in sections if s.heading == "Entropy by depth").figures[0].panels[0].lines
    assert [p.y for p in entropies[0].points] == pytest.approx([m.entropy for m in matrices[::2]])
    write_page(tmp_path / "page.html", "A <b> title", sections, {"command": "x & y"})
    page = (tmp_path / "page.html").read_text()
    assert "A &lt;b&gt; title" in page
    assert "x &amp; y" in page
    assert page.count('class="panel"') == 2 + 2 + 1
    assert not re.search(r"https?://|<script|NaN|nan[, \"]", page)
    spectrum = spectrum_sections({m.name: m.spectrum for m in matrices}, "weights")[0].figures[0]
    assert spectrum.panels[0].lines[0].points[0].y == 1.0


def test_a_page_without_figures(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "Empty", [Section("Nothing", ["to see"])])
    assert "to see" in (tmp_path / "page.html").read_text()
