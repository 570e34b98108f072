"""A model without weights, and weights put into it and taken out again, module by module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bondsmith.model import quantized
from bondsmith.nn.experts import split_experts


def skeleton(config: Any, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Returns the model of a configuration in eval mode with parameters on the meta device and real buffers (rotary tables).

    Experts of mixtures have matrices of their own. Of what bondsmith compressed, with its networks.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ours = quantized.method_of(config) == quantized.OURS
    if not ours or config.quantization_config.get("split_experts"):
        split_experts(model)
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            module._buffers[leaf] = None if buffer is None else buffer.to(device)
    if ours:
        from bondsmith.model.hub import replace_matrices  # which imports this module

        replace_matrices(model, config.quantization_config["networks"])
    return model.eval()


def stored_names(model: nn.Module, state: Mapping[str, torch.Tensor] | None = None) -> list[str]:
    """Returns the names a checkpoint of `model` must hold: parameters and persistent buffers, tied ones once.

    `state` is its state dictionary, where that has other names.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return [name for name in (model.state_dict() if state is None else state) if name not in tied]


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], device: torch.device | str = "cpu") -> None:
    """Puts tensors, by their names inside `module`, in the place of its (meta) parameters and buffers; no gradients."""
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor.to(device), requires_grad=False)
        else:
            old = getattr(owner, leaf, None)
            setattr(owner, leaf, tensor.to(device, tensor.dtype if old is None else old.dtype))


def empty(module: nn.Module) -> None:
    """Sends the parameters and saved buffers of `module` back to the meta device; their memory is free again. Tables stay."""
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                owner._buffers[leaf] = buffer.to("meta")
