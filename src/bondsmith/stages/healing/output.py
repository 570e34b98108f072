"""From trained parameters back to the files of a compressed directory: same names, shapes and dtypes, other numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bondsmith.model.checkpoint import INDEX, write_shard
from bondsmith.nn.free import pivoted
from bondsmith.nn.linear import MPOLinear
from bondsmith.rundir import FINGERPRINT, LOG, WORK

REPORTS = ("results.json", "report.html", "README.md")  # what a healing writes anew, from the first one


def whole(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Returns trained parameters as ordinary tensors on the CPU; every process takes part."""
    found = {}
    for name, parameter in parameters.items():
        tensor = parameter.detach()
        found[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True)
    return found


def stored(module: nn.Module, freed: list[str], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns trained tensors as they are stored: networks that were freed have their gauge again.

    Args:
        module: the student, for the shapes of its networks.
        freed: names of the networks that are in their free form.
    """
    tensors = dict(trained)
    for name in freed:
        like = module.get_submodule(name)
        assert isinstance(like, MPOLinear)
        layer = MPOLinear(like.sites, like.bonds, bias=False, device="meta")
        for k, core in enumerate(layer.cores):
            core.weight = nn.Parameter(tensors.pop(f"{name}.cores.{k}.weight"))
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in pivoted(layer).state_dict().items()}
    return tensors


def write_healed(source: Path, out: Path, tensors: Mapping[str, Tensor], without: Sequence[str] = ()) -> None:
    """Writes the compressed directory `source` to `out` with these tensors in the place of its own; config.json comes last.

    Whatever else lies in `source`, folders too, is copied, except what is named in `without` and what belongs to a run.
    """
    left = set(tensors)
    shards = sorted(set(json.loads((source / INDEX).read_text())["weight_map"].values()))
    spared = {*shards, *without, "config.json", FINGERPRINT, LOG, WORK}
    for other in sorted(source.iterdir()):
        if other.name in spared or other in (out, *out.parents):
            continue
        if other.is_dir():
            shutil.copytree(other, out / other.name, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copyfile(other, out / other.name)
    for shard in shards:
        before = load_file(source / shard)
        after = {name: _like(tensors.get(name), old) for name, old in before.items()}
        left -= set(after)
        write_shard(out / shard, after)
    assert not left, f"trained, but not in the weight files: {sorted(left)[:3]}"
    shutil.copyfile(source / "config.json", out / "config.json")


def _like(new: Tensor | None, old: Tensor) -> Tensor:
    if new is None:
        return old
    assert new.shape == old.shape, f"{tuple(new.shape)} in the place of {tuple(old.shape)}"
    return new.to(old.dtype if old.is_floating_point() else torch.int32)
