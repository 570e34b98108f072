"""Random networks for property tests."""

import torch
from hypothesis import strategies as st

from bondsmith.tensor import MPO


@st.composite
def mpos(draw, most_sites=4):
    """A network of 1 to 4 sites with legs up to 4 and bonds up to 5, float64."""
    n = draw(st.integers(1, most_sites))
    bonds = [1, *(draw(st.integers(1, 5)) for _ in range(n - 1)), 1]
    leg = st.integers(1, 4)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = [(bonds[k], draw(leg), draw(leg), bonds[k + 1]) for k in range(n)]
    return MPO(tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes))
