"""Checksums of tensors in the head of a weight file: a file cut short or altered is an error, never garbage weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

KEY = "bondsmith_sha256"  # in the metadata of a safetensors file: {tensor name: first 16 hexadecimal digits}


class DamagedError(ValueError):
    """A weight file is not what was written: cut short, altered, or a part of it missing."""


def digest(tensor: Tensor) -> str:
    """Returns the checksum of a tensor's bytes.

    >>> digest(torch.zeros(2))
    'af5570f5a1810b7a'
    """
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()[:16]


def digest_of_json(content: Any) -> str:
    """Returns the checksum of what JSON can hold; the order of keys does not matter.

    >>> digest_of_json({"a": (1, 2), "b": None}) == digest_of_json({"b": None, "a": [1, 2]})
    True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the metadata entry of a file with these tensors."""
    return {KEY: json.dumps({name: digest(tensor) for name, tensor in sorted(tensors.items())})}


def check(name: str, tensor: Tensor, found: Mapping[str, str] | None, file: Path) -> None:
    """Raises DamagedError unless the tensor has the checksum that the metadata of its file (None: no metadata) names, if any."""
    digests = json.loads((found or {}).get(KEY, "{}"))
    if name in digests and digest(tensor) != digests[name]:
        raise DamagedError(
            f"{file}: the bytes of {name} do not have the checksum written with them; fetch the file again"
        )


def check_files(files: Iterable[str | Path], needed: Sequence[str], summed: Sequence[str]) -> None:
    """Raises DamagedError if a tensor in `files` has another checksum than was written, or one is missing.

    Args:
        files: safetensors files.
        needed: names of tensors that must be there.
        summed: names among them that must have a checksum.
    """
    there: set[str] = set()
    known: set[str] = set()
    for path in map(Path, files):
        try:
            with safe_open(path, framework="pt") as handle:
                keys = set(handle.keys())
                digests = json.loads((handle.metadata() or {}).get(KEY, "{}"))
                for name in sorted(keys & digests.keys()):
                    check(name, handle.get_tensor(name), handle.metadata(), path)
        except SafetensorError as error:
            raise DamagedError(f"{path} is cut short or damaged ({error}); fetch the file again") from error
        there |= keys
        known |= keys & digests.keys()
    for names, have, what in ((needed, there, "is missing from"), (summed, known, "has no checksum in")):
        lost = [name for name in names if name not in have]
        if lost:
            raise DamagedError(f"{lost[0]} {what} the weight files ({len(lost)} such tensors); fetch them again")
