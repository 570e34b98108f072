"""Rounded networks and hybrids: against the contraction itself and against what they replace."""

from __future__ import annotations

import pytest
import torch

from bondsmith.tensor.contract import core_to_weight, sweep, weight_to_core
from bondsmith.tensor.fit import whitened_cut
from bondsmith.tensor.gauge import left_factor
from bondsmith.tensor.gptq import gptq
from bondsmith.tensor.hybrid import UnseenShares, fit_hybrid, shares_left
from bondsmith.tensor.metric import relative_error
from bondsmith.tensor.mpo import fold
from bondsmith.tensor.rounded import RoundedNetwork, core_moment, round_network, spread
from bondsmith.tensor.rounding import Grid, round_to_nearest
from bondsmith.tensor.sites import Sites, parse_sites
from bondsmith.tensor.weighted import fit_cores, fit_mpo


def moment(size: int, tokens: int = 300, seed: int = 0, decay: float = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.logspace(0, -decay, size)
    x = torch.randn(tokens, size, generator=generator) @ mix
    return x.T @ x / tokens


def matrix_of(network: RoundedNetwork, sites: Sites, bonds: tuple[int, ...]) -> torch.Tensor:
    if network.pivots is not None:
        rest, last = network.weights
        assert last is not None
        R = last.dequantize()
        return left_factor(R.new_empty(0, len(R)) if rest is None else rest.dequantize(), network.pivots) @ R
    from_right = sites.sweeps_from_right(bonds)
    cores = [w.dequantize() for w in network.weights if w is not None]
    shapes = sites.core_shapes(bonds)
    return fold([weight_to_core(w, s, from_right) for w, s in zip(cores, shapes, strict=True)])


@pytest.mark.parametrize("spec", ["matrix", "interleaved:2", "interleaved:3", "thin:4"])
def test_the_moment_of_a_core_is_that_of_what_its_layer_reads(spec: str) -> None:
    torch.manual_seed(0)
    sites, x = parse_sites(spec, 24, 36), torch.randn(50, 36)
    mpo = fit_mpo(torch.randn(24, 36), sites, 5, input_moment=torch.eye(36)).mpo
    from_right = sites.sweeps_from_right(mpo.bonds)
    seen: dict[int, torch.Tensor] = {}

    def layer(k: int):  # type: ignore[no-untyped-def]
        def run(state: torch.Tensor) -> torch.Tensor:
            rows = state.reshape(-1, state.shape[-1])
            seen[k] = rows.T @ rows / len(x)
            return state @ core_to_weight(mpo.cores[k], from_right).T

        return run

    sweep(sites, mpo.bonds, [layer(k) for k in range(sites.n)], x, from_right)
    for k in range(sites.n):
        found = core_moment(list(mpo.cores), k, x.T @ x / len(x), from_right)
        assert torch.allclose(found, seen[k], rtol=1e-3, atol=1e-4 * float(seen[k].abs().max()))


@pytest.mark.parametrize(
    ("spec", "bond", "gauge"),
    [("matrix", 10, True), ("matrix", 10, False), ("interleaved:3", 8, False), ("thin:4", 8, False)],
)
def test_rounding_in_turn_beats_rounding_each_core_to_nearest(spec: str, bond: int, gauge: bool) -> None:
    torch.manual_seed(1)
    W, C, B = torch.randn(24, 36), moment(36), moment(24, seed=1)
    sites, grid = parse_sites(spec, 24, 36), Grid(3, 12)
    mpo = fit_mpo(W, sites, bond, input_moment=C, output_moment=B).mpo
    from_right = sites.sweeps_from_right(mpo.bonds)
    network = round_network(W, mpo, grid, input_moment=C, output_moment=B, gauge=gauge)
    plain = fold(
        [
            weight_to_core(
                round_to_nearest(core_to_weight(c, from_right), grid).dequantize(), tuple(c.shape), from_right
            )
            for c in mpo.cores
        ]
    )
    error = relative_error(W, matrix_of(network, sites, mpo.bonds), C, B)
    assert error < 0.9 * relative_error(W, plain, C, B)
    stored = [None if w is None else w.shape for w in network.weights]
    if gauge:
        assert stored == [(24 - 10, 10), (10, 36)]


def test_a_gauged_cut_of_full_bond_has_no_rest() -> None:
    W, C = torch.randn(6, 9), moment(9)
    mpo = whitened_cut(W, 6, input_moment=C)
    network = round_network(W, mpo, Grid(8, 0), input_moment=C, gauge=True)
    assert network.weights[0] is None
    assert relative_error(W, matrix_of(network, mpo.sites, mpo.bonds), C) < 0.02


def test_a_gauge_on_another_shape_is_refused() -> None:
    sites = parse_sites("interleaved:2", 24, 36)
    with pytest.raises(ValueError, match="with a gauge cannot be rounded"):
        round_network(torch.randn(24, 36), fit_mpo(torch.randn(24, 36), sites, 4).mpo, Grid(4), gauge=True)


@pytest.mark.parametrize("gauge", [True, False])
def test_inputs_that_nothing_was_seen_of(gauge: bool) -> None:
    """A moment of zeros, or of rank one, is singular: what comes out is finite, or an error says why not."""
    W = torch.randn(12, 16)
    mpo = whitened_cut(W, 5)
    one = torch.randn(16)
    for C in (torch.zeros(16, 16), torch.outer(one, one)):
        network = round_network(W, mpo, Grid(4, 8), input_moment=C, gauge=gauge)
        assert torch.isfinite(matrix_of(network, mpo.sites, mpo.bonds)).all()


def test_spreading_keeps_the_span_and_levels_the_rows() -> None:
    R, C = torch.randn(8, 30) * torch.logspace(0, -3, 8)[:, None], moment(30)
    turned = spread(R, C)
    projected = turned @ torch.linalg.pinv(R.double()) @ R.double()
    assert torch.allclose(projected, turned, atol=1e-6 * float(turned.abs().max()))
    energy = ((turned @ C.double()) * turned).sum(1)
    before = ((R @ C) * R).sum(1)
    assert energy.max() / energy.min() < 0.01 * before.max() / before.min()


def test_cores_fitted_anew_lower_the_error_and_leave_the_others() -> None:
    torch.manual_seed(2)
    W, C = torch.randn(24, 36), moment(36)
    mpo = fit_mpo(W, parse_sites("interleaved:3", 24, 36), 8, input_moment=C).mpo
    spoiled = [core + 0.3 * core.std() * torch.randn_like(core) for core in mpo.cores]
    fitted = fit_cores(W, spoiled, [0, 2], input_moment=C)
    assert torch.equal(fitted[1], spoiled[1])
    assert relative_error(W, fold(fitted), C) < 0.8 * relative_error(W, fold(spoiled), C)


def test_a_hybrid_takes_out_most_of_the_loss_where_few_outputs_carry_the_loss() -> None:
    torch.manual_seed(3)
    W, C, B = torch.randn(64, 96), moment(96, decay=1), moment(64, seed=1, decay=3)
    plain = gptq(W, Grid(3, 32), C)
    hybrid = fit_hybrid(W, Grid(3, 32), 4, Grid(8, 0), input_moment=C, output_moment=B)
    error = relative_error(W, hybrid.to_matrix(), C, B)
    assert error < 0.65 * relative_error(W, plain.dequantize(), C, B)
    assert relative_error(W, hybrid.to_matrix(), C) < relative_error(W, plain.dequantize(), C)
    predicted = float(shares_left(B)[4]) ** 0.5 * relative_error(W, plain.dequantize(), C, B)
    assert error < 1.3 * predicted


def test_what_a_hybrid_leaves_is_judged_on_rows_that_did_not_choose() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 48, 32, generator=generator, dtype=torch.float64)  # no direction is better than another
    chosen = rows[0].T @ rows[0]
    assert float(shares_left(chosen)[8]) < 0.5
    shares = UnseenShares(chosen, torch.ones(32))
    shares.see(rows[1])
    assert float(shares.left()[8]) == pytest.approx(1 - 8 / 32, abs=0.1)
    loud = torch.full((32,), 1e-3)
    loud[:8] = 1.0
    shares = UnseenShares(chosen, loud)
    shares.see(rows[1, :20])
    shares.see(rows[1, 20:])
    assert float(shares.left()[8]) < 1e-4  # the steps count


def test_an_unrounded_network_in_a_hybrid() -> None:
    W, C = torch.randn(12, 16), moment(16)
    hybrid = fit_hybrid(W, Grid(2, 8), 3, None, input_moment=C)
    assert hybrid.network is None
    assert relative_error(W, hybrid.to_matrix(), C) < relative_error(W, hybrid.rounded.dequantize(), C)
