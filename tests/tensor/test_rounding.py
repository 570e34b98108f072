"""Grids, packing, and rounding: against brute force and against exact cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bondsmith.tensor.gptq import fit_scales, gptq
from bondsmith.tensor.packing import pack, unpack
from bondsmith.tensor.rounding import NF4, SCALE_DTYPE, Grid, Rounded, packed_levels, round_to_nearest

GRIDS = [
    Grid(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (0, 5, 16) for symmetric in (True, False)
] + [Grid(4, 16, codebook="nf4")]


def moment(columns: int, tokens: int = 200, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ (mix * torch.logspace(0, -2, columns))
    return x.T @ x / tokens


def loss(W: torch.Tensor, rounded: Rounded, C: torch.Tensor) -> float:
    D = (W - rounded.dequantize()).double()
    return float((D @ C.double() * D).sum())


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 7), st.integers(1, 50), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_packing_is_lossless_and_as_small_as_it_says(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, columns), codes)
    assert packed.numel() == rows * -(-columns * bits // 8)
    for grid in (Grid(bits), Grid(bits, symmetric=False)):
        assert torch.equal(packed_levels(grid, packed, columns), grid.levels(codes))
    if bits == 4:
        grid = Grid(4, codebook="nf4")
        assert torch.equal(packed_levels(grid, packed, columns), grid.levels(codes))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_lies_on_the_grid_comes_back_exactly(grid: Grid) -> None:
    generator = torch.Generator().manual_seed(1)
    columns = 37  # no group divides it
    codes = torch.randint(1, 2**grid.bits, (6, columns), generator=generator).to(torch.uint8)
    least = 1 if grid.bits == 8 and grid.symmetric else 0  # 127 steps up, 128 down
    for columns_of in grid.slices(columns):  # both ends in use, so that plain rounding finds this very scale
        codes[:, columns_of.start], codes[:, columns_of.stop - 1] = least, 2**grid.bits - 1
    groups = (6, grid.groups(columns))
    scales = (0.01 * torch.randint(1, 5, groups, generator=generator)).to(SCALE_DTYPE)
    centres = None if grid.symmetric else scales * torch.randint(-8, 9, groups, generator=generator).to(SCALE_DTYPE)
    there = Rounded(grid, codes, scales, centres)
    again = round_to_nearest(there.dequantize(), grid, search=True)
    assert torch.allclose(again.dequantize(), there.dequantize(), atol=2e-4 * float(there.dequantize().abs().max()))
    assert torch.equal(again.codes, codes)
    assert there.bytes == there.pack().numel() + scales.nbytes + (0 if centres is None else centres.nbytes)
    assert torch.equal(Rounded.unpack(grid, columns, there.pack(), scales, centres).dequantize(), there.dequantize())


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.group != 5], ids=str)
def test_each_code_is_the_nearest_level(grid: Grid) -> None:
    W = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    rounded = round_to_nearest(W, grid)
    every = torch.stack(
        [
            Rounded(grid, torch.full_like(rounded.codes, c), rounded.scales, rounded.centres).dequantize()
            for c in range(2**grid.bits)
        ]
    )
    best = (every - W).abs().amin(0)
    assert torch.allclose((rounded.dequantize() - W).abs(), best, atol=1e-5)


@pytest.mark.parametrize(
    "grid", [Grid(2, 16), Grid(3, 16, symmetric=False), Grid(4, 16), Grid(4, 16, codebook="nf4")], ids=str
)
def test_scale_search_lowers_the_weighted_error(grid: Grid) -> None:
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)) ** 3
    weights = torch.logspace(0, 3, 64)

    def error(rounded: Rounded) -> float:
        return float(((rounded.dequantize() - W).square() * weights).sum())

    plain, searched = round_to_nearest(W, grid, search=False), round_to_nearest(W, grid, moment=weights)
    assert error(searched) < 0.93 * error(plain)
    assert error(searched) < 1.02 * error(round_to_nearest(W, grid))  # which looks for the unweighted optimum


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.bits < 8], ids=str)
def test_error_compensation_beats_rounding_to_nearest(grid: Grid) -> None:
    W, C = torch.randn(12, 48, generator=torch.Generator().manual_seed(4)), moment(48)
    nearest = loss(W, round_to_nearest(W, grid, moment=C.diagonal()), C)
    plain, swept = loss(W, gptq(W, grid, C, sweeps=0), C), loss(W, gptq(W, grid, C), C)
    assert plain < 0.7 * nearest
    assert swept < plain


def test_compensation_finds_the_optimum_where_it_can_be_enumerated() -> None:
    """Two columns, one row, two bits: all 16 codes at the scale that was found."""
    for seed in range(20):
        W, C = torch.randn(1, 2, generator=torch.Generator().manual_seed(seed)), torch.tensor([[1.0, 0.8], [0.8, 1.0]])
        found = gptq(W, Grid(2, 0), C, sweeps=6)
        every = [
            loss(W, Rounded(found.grid, torch.tensor([[a, b]], dtype=torch.uint8), found.scales), C)
            for a in range(4)
            for b in range(4)
        ]
        assert loss(W, found, C) <= 1.5 * min(every) + 1e-6


def test_without_correlations_it_is_rounding_to_nearest() -> None:
    W = torch.randn(5, 32, generator=torch.Generator().manual_seed(5))
    for grid in (Grid(3, 8), Grid(4, 0, symmetric=False)):
        assert torch.equal(gptq(W, grid, torch.eye(32), sweeps=0).codes, round_to_nearest(W, grid).codes)


@pytest.mark.parametrize("grid", [Grid(3, 7), Grid(2, 16, symmetric=False), Grid(4, 0)], ids=str)
def test_fitted_scales_are_a_minimum(grid: Grid) -> None:
    W, C = torch.randn(3, 40, generator=torch.Generator().manual_seed(6)), moment(40)
    fitted = fit_scales(W, round_to_nearest(W, grid), C)
    best = loss(W, fitted, C)
    assert best <= loss(W, round_to_nearest(W, grid), C)
    for group in range(grid.groups(40)):
        for factor in (0.99, 1.01):
            scales = fitted.scales.clone()
            scales[:, group] = scales[:, group] * factor
            assert loss(W, Rounded(grid, fitted.codes, scales, fitted.centres), C) > best


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(4, 8, symmetric=False), Grid(8, 0), Grid(2, 0)], ids=str)
def test_zero_and_constant_groups(grid: Grid) -> None:
    W = torch.randn(4, 16, generator=torch.Generator().manual_seed(7))
    W[0], W[1, :8] = 0.0, 0.5
    W[2] = 0.25
    for rounded in (round_to_nearest(W, grid), gptq(W, grid, moment(16))):
        Q = rounded.dequantize()
        assert torch.isfinite(Q).all()
        assert Q[0].abs().max() == 0
        if grid.bits > 2:
            assert torch.allclose(Q[2], W[2], atol=2e-3)


@pytest.mark.parametrize(
    "C", [torch.zeros(16, 16), torch.ones(16, 16), moment(16, tokens=3)], ids=["zero", "rank 1", "rank 3"]
)
def test_singular_moments(C: torch.Tensor) -> None:
    W = torch.randn(4, 16, generator=torch.Generator().manual_seed(8))
    rounded = gptq(W, Grid(4, 8), C)
    assert torch.isfinite(rounded.dequantize()).all()
    assert loss(W, rounded, C) <= loss(W, round_to_nearest(W, Grid(4, 8)), C) + 1e-9
    assert (rounded.dequantize() - W).abs().max() < 1.0


def test_bad_input_is_named() -> None:
    W = torch.randn(4, 16)
    with pytest.raises(ValueError, match="5 bits do not exist; choose one of 2, 3, 4, 8"):
        Grid(5)
    with pytest.raises(ValueError, match="nf4 has 4 bits"):
        Grid(3, codebook="nf4")
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        round_to_nearest(
            W.index_fill(1, torch.tensor([0]), 1.0).masked_fill(
                torch.eye(4, 16).bool() & (torch.arange(16) == 2), torch.inf
            ),
            Grid(4),
        )
    with pytest.raises(ValueError, match=r"an entry of .* cannot be rounded"):
        round_to_nearest(W * 1e20, Grid(4))
    with pytest.raises(ValueError, match=r"the weight needs \(16, 16\)"):
        gptq(W, Grid(4), torch.eye(8))
    with pytest.raises(ValueError, match="does not fit into 2 bits"):
        pack(torch.full((1, 2), 4, dtype=torch.uint8), 2)
    assert len(set(NF4)) == 16


def test_one_outlier_costs_only_its_own_group() -> None:
    W = torch.randn(2, 64, generator=torch.Generator().manual_seed(9))
    W[0, 3] = 2000.0
    Q = round_to_nearest(W, Grid(4, 16)).dequantize()
    assert abs(Q[0, 3] - 2000) < 150
    assert (Q[0, 16:] - W[0, 16:]).abs().max() < 0.5


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(8, 0), Grid(2, 8, symmetric=False)], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e-9, 1e9, 1e17])
def test_entries_of_any_size_are_rounded_alike(grid: Grid, size: float) -> None:
    W = torch.randn(4, 16, generator=torch.Generator().manual_seed(4))
    for rounded in (lambda W: round_to_nearest(W, grid, search=False), lambda W: gptq(W, grid, torch.eye(16))):
        Q = rounded(size * W).dequantize()
        assert torch.isfinite(Q).all()
        if size in (0.0, 1e-42):
            assert Q.abs().max() <= size * 10
        else:
            assert (Q / size - rounded(W).dequantize()).norm() < 0.2 * W.norm()
