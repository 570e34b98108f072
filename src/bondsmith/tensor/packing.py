"""Integers of 2, 3, 4 and 8 bits in bytes, row by row, and back.

Legend: `O` rows, `I` columns, `b` bits. A row is padded to whole bytes. Eight bits are stored as signed bytes (the code
with its highest bit flipped), which is what torch's int8 kernels read; fewer bits lie in a row one after another, lowest
bits first.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLIP = 0x80
# Codes that lie side by side in the low bits of a word go each into a byte of its own: halves move apart, then their halves. Words are
# little-endian, as on every machine that torch is built for but one.
_SPREADS = {
    2: (torch.int32, ((12, 0x000F_000F), (6, 0x0303_0303))),
    3: (torch.int64, ((20, 0x0000_0FFF_0000_0FFF), (10, 0x003F_003F_003F_003F), (5, 0x0707_0707_0707_0707))),
    4: (torch.int16, ((4, 0x0F0F),)),
}


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row.

    >>> [row_bytes(9, bits) for bits in (2, 3, 4, 8)]
    [3, 4, 5, 9]
    """
    return -(-columns * bits // 8)


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """The `(O, bytes)` uint8 rows of `(O, I)` uint8 codes below `2^b`; ValueError for larger ones.

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)
    tensor([[33,  3]], dtype=torch.uint8)
    """
    if codes_OI.dtype != torch.uint8 or codes_OI.dim() != 2:
        raise ValueError(
            f"codes are {codes_OI.dtype} of shape {tuple(codes_OI.shape)}; an (O, I) uint8 matrix is needed"
        )
    if codes_OI.numel() and int(codes_OI.max()) >= 2**bits:
        raise ValueError(f"a code of {int(codes_OI.max())} does not fit into {bits} bits")
    if bits == 8:
        return codes_OI ^ _FLIP
    rows, columns = codes_OI.shape
    width = row_bytes(columns, bits)
    per, into = (8, 3) if bits == 3 else (8 // bits, 1)  # `per` codes fill `into` bytes
    padded = torch.nn.functional.pad(codes_OI, (0, -columns % per)).reshape(rows, -1, per)
    if into == 1:
        packed = padded[..., 0].clone()
        for k in range(1, per):
            packed |= padded[..., k] << (k * bits)
        return packed
    word = torch.zeros(padded.shape[:-1], dtype=torch.int32, device=codes_OI.device)
    for k in range(per):
        word |= padded[..., k].to(torch.int32) << (k * bits)
    parts = [(word >> (8 * k)) & 0xFF for k in range(into)]
    return torch.stack(parts, -1).to(torch.uint8).reshape(rows, -1)[:, :width].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The `(O, I)` uint8 codes of packed rows.

    >>> codes = torch.randint(0, 8, (5, 11), dtype=torch.uint8)
    >>> torch.equal(unpack(pack(codes, 3), 3, 11), codes)
    True
    """
    if bits == 8:
        return packed ^ _FLIP
    word, steps = _SPREADS[bits]
    if bits == 3:
        padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 3))
        a, b, c = (byte.to(word) for byte in padded.view(len(packed), -1, 3).unbind(-1))
        spread = a | b << 8 | c << 16
    else:
        spread = packed.to(word, memory_format=torch.contiguous_format)
    for shift, mask in steps:
        spread = spread.bitwise_or_(spread << shift).bitwise_and_(mask)
    return spread.view(torch.uint8)[:, :columns]
