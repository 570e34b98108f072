"""The mathematics: site shapes, matrix product operators, fits. Imports torch and nothing else."""

from bondsmith.tensor import algebra
from bondsmith.tensor.exact import ExactCut, best_count, exact_cut, exact_spectrum
from bondsmith.tensor.fit import cut_spectrum, propagated_target, sequential_svd, whitened_cut
from bondsmith.tensor.gptq import gptq
from bondsmith.tensor.metric import Root, moment_root, relative_error
from bondsmith.tensor.mpo import MPO
from bondsmith.tensor.rounding import Grid, Rounded, round_to_nearest
from bondsmith.tensor.search import candidate_sites, search_sites
from bondsmith.tensor.sites import Sites, parse_sites
from bondsmith.tensor.svd import truncated_svd
from bondsmith.tensor.weighted import Fit, fit_mpo

__all__ = [
    "MPO",
    "ExactCut",
    "Fit",
    "Grid",
    "Root",
    "Rounded",
    "Sites",
    "algebra",
    "best_count",
    "candidate_sites",
    "cut_spectrum",
    "exact_cut",
    "exact_spectrum",
    "fit_mpo",
    "gptq",
    "moment_root",
    "parse_sites",
    "propagated_target",
    "relative_error",
    "round_to_nearest",
    "search_sites",
    "sequential_svd",
    "truncated_svd",
    "whitened_cut",
]
