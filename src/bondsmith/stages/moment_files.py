"""Read the moments that a pass over the model left on disk, block by block: of matrices, of embedding and head."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bondsmith.model.tracing import HiddenBond

_SHRINKAGE = 0.3  # of output moments, as a share of the mean eigenvalue


@dataclass(frozen=True, eq=False)
class TableMoments:
    """What the embedding and the head see; `V` vocabulary, `width` of the hidden states.

    Attributes:
        head_input: second moment of the head's input, (width, width).
        head_weight: mean probability `E[p (1 - p)]` of every token, (V,): how much an error of its logit counts.
        embedding_gradient: second moment of the loss gradient at the embedding's output, (width, width).
        embedding_weight: share of the positions that hold each token, (V,).
    """

    head_input: Tensor
    head_weight: Tensor
    embedding_gradient: Tensor
    embedding_weight: Tensor


def load_table_moments(folder: Path, ids: Tensor) -> TableMoments:
    """Returns what embedding and head see, over the windows `ids` that gave the gradients."""
    head, embedding = load_file(folder / "head.safetensors"), load_file(folder / "embedding.safetensors")
    shares = torch.bincount(ids.flatten().cpu(), minlength=len(head["weight"])).float() / ids.numel()
    return TableMoments(head["input"], head["weight"], embedding["gradient"], shares)


def table_moment(folder: Path, embeds: bool, predicts: bool) -> Tensor | None:
    """Returns the metric in which errors of a row of embedding or head count, (width, width), or None where none was measured.

    For a head that is the moment of what it reads, for an embedding that of the loss gradient at its output, each times the mean weight
    of a row; for a matrix that is both, their sum.
    """
    head, embedding = folder / "head.safetensors", folder / "embedding.safetensors"
    if not (head.is_file() and embedding.is_file()):
        return None
    seen = load_file(head)
    as_head = seen["input"] * seen["weight"].mean()
    as_embedding = load_file(embedding)["gradient"] / len(seen["weight"])
    return predicts * as_head + embeds * as_embedding


def load_output_moments(folder: Path, block: int) -> dict[str, Tensor]:
    """Returns `B` by matrix name inside the block, shrunk towards the identity as the estimate from few tokens that it is."""
    found = _load(folder, block, "output.")
    for B in found.values():
        B.diagonal().add_(_SHRINKAGE * B.diagonal().mean())
    return found


def load_token_weights(folder: Path, block: int, name: str, windows: int) -> Tensor | None:
    """Returns the weights of all tokens in the input moment of a matrix, (windows, tokens); None where some have none."""
    with safe_open(folder / f"block-{block}.safetensors", framework="pt") as handle:
        key = f"weights.{name}"
        weights = handle.get_tensor(key) if key in handle.keys() else None  # noqa: SIM118
    return weights if weights is not None and len(weights) == windows else None


def load_shares_left(folder: Path, block: int) -> dict[str, Tensor]:
    """Returns, by matrix name inside the block, what a cut of bond 0, 1, ... beside a rounded matrix leaves of the loss of rounding."""
    return _load(folder, block, "left.")


def load_input_moments(folder: Path, block: int) -> dict[str, Tensor]:
    """Returns `C` by matrix name inside the block; matrices with one input share it, those that no token reached have none."""
    found = _load(folder, block, "input.")
    groups: dict[str, str] = json.loads((folder / f"structure-{block}.json").read_text())["inputs"]
    return {name: found[first] for name, first in groups.items() if first in found}


def load_hidden_bonds(folder: Path, block: int) -> list[HiddenBond]:
    """Returns the hidden bonds of a block, with names inside it."""
    rows = json.loads((folder / f"structure-{block}.json").read_text())["bonds"]
    return [HiddenBond(tuple(row["writers"]), row["reader"], row["channels"]) for row in rows]


def _load(folder: Path, block: int, kind: str) -> dict[str, Tensor]:
    tensors = load_file(folder / f"block-{block}.safetensors")
    return {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
