"""The student as the machines want it: sharded over processes, its activations computed again, the pieces of a window apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bondsmith.stages.healing.ranks import Ranks
from bondsmith.stages.healing.teacher import logits_of


def shard(model: PreTrainedModel, blocks: nn.ModuleList, ranks: Ranks) -> None:
    """Spreads the parameters over all processes (FSDP2): a block at a time is whole in memory, while it is needed."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def compute_again(blocks: nn.ModuleList) -> None:
    """Makes every block keep its input only and compute the rest again in backward."""
    for block in blocks:
        forward = block.forward

        def again(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        block.forward = again


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Returns whether positions that start anew keep the pieces of a window apart: tried on six tokens, as families differ."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]], device=model.device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=model.device)
    try:
        packed = logits_of(model, ids, positions)[:, 3:]
    except TypeError:  # the model takes no positions
        return False
    alone = logits_of(model, ids[:, 3:], positions[:, 3:])
    return bool((packed - alone).abs().max() <= 1e-3 * alone.abs().max())
