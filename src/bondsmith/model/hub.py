"""The transformers quantizer: after `import bondsmith`, `AutoModelForCausalLM.from_pretrained(DIR)` just works.

Two traps shape this file. A transformers without bondsmith only warns of an unknown quantization type and then fills what it cannot
find with random numbers. So our own weight files carry names that it does not look for, and what a user's `save_pretrained` writes
(`model.safetensors`) holds one tensor of a wrong shape under the name of a dense weight: both make it stop with an error. And files
are resolved before the quantizer sees the model, so the right name is put into the configuration by the one hook that runs earlier.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bondsmith.nn.linear import MPOLinear
from bondsmith.tensor.sites import Sites

METHOD = "bondsmith"
FORMAT = 1


@register_quantization_config(METHOD)
class BondsmithConfig(QuantizationConfigMixin):
    """The networks of a compressed model: module name -> {"sites": [[o, i], ...], "bonds": [...], "gauge": bool}.

    `weights_file` is the file (or index) that holds the weights; None means the usual names of transformers.
    """

    def __init__(
        self, networks: Mapping[str, Mapping[str, Any]] | None = None, weights_file: str | None = None, **kwargs: Any
    ):
        self.quant_method = METHOD
        self.format = int(kwargs.pop("format", FORMAT))
        self.networks = {name: dict(network) for name, network in (networks or {}).items()}
        self.weights_file = weights_file
        if self.format > FORMAT:
            raise ValueError(
                f"this model was written in bondsmith format {self.format}, this bondsmith reads up to {FORMAT}: "
                "pip install --upgrade bondsmith"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry `quantization_config` of config.json."""
        return {
            "quant_method": METHOD,
            "format": self.format,
            "weights_file": self.weights_file,
            "networks": self.networks,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the same as `to_dict`: nothing here is a default worth leaving out."""
        return self.to_dict()


@register_quantizer(METHOD)
class BondsmithQuantizer(HfQuantizer):
    """Puts `MPOLinear` modules in the place of dense ones before the weights are loaded."""

    requires_calibration = True
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def update_attn_implementation(self, config: Any) -> Any:
        """Names the weight file; the only hook that runs before transformers looks for files."""
        config.transformers_weights = self.quantization_config.weights_file
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        networks = self.quantization_config.networks
        replace_matrices(model, networks)
        for name in networks:  # GPT-2 initialises `self.c_proj.weight` from the parent, even of a model that is loaded
            parent = model.get_submodule(name.rpartition(".")[0])
            if not parent._buffers:
                parent._is_hf_initialized = True
        if networks:
            ignored = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = ignored | {re.escape(_guard(networks))}
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Called by `save_pretrained`: from here on the files carry transformers' own names, and a guard against plain loading."""
        model.config.quantization_config.weights_file = None
        if getattr(model, "_hf_peft_config_loaded", False) or not self.quantization_config.networks:
            return None, {}
        return model.state_dict() | {_guard(self.quantization_config.networks): torch.empty(0)}, {}

    def is_serializable(self) -> bool:
        """Returns True: `save_pretrained` works."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, MPOLinear):
                model.set_submodule(name, module.materialise())
        model.config.__dict__.pop("transformers_weights", None)
        model.config.__dict__.pop("auto_map", None)
        return model if dtype is None else model.to(dtype)


def load(directory: str | Path, **options: Any) -> PreTrainedModel:
    """Returns the compressed model in a directory; options go to `AutoModelForCausalLM.from_pretrained`."""
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def replace_matrices(model: nn.Module, networks: Mapping[str, Mapping[str, Any]]) -> None:
    """Replaces the named matrices of `model` by `MPOLinear` modules of the same device and dtype, without weights."""
    for name, network in networks.items():
        try:
            old = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"{name}: the model has no such module, but its quantization_config names it") from error
        legs = network["sites"]
        like = next(old.parameters())
        sites = Sites(tuple(o for o, _ in legs), tuple(i for _, i in legs))
        layer = MPOLinear(
            sites,
            tuple(network["bonds"]),
            bias=getattr(old, "bias", None) is not None,
            gauge=bool(network.get("gauge", False)),
            device=like.device,
            dtype=like.dtype,
        )
        model.set_submodule(name, layer)


def attach(model: PreTrainedModel, config: BondsmithConfig) -> PreTrainedModel:
    """Marks a model whose matrices are networks already as one of ours, so that `save_pretrained` writes a loadable one."""
    model.config.quantization_config = config
    model.hf_quantizer = BondsmithQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
    return model


def _guard(networks: Mapping[str, Any]) -> str:
    return next(iter(networks)) + ".weight"
