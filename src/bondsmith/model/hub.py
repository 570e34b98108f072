"""The transformers quantizer: after `import bondsmith`, `AutoModelForCausalLM.from_pretrained(DIR)` just works.

Two traps shape this file. A transformers without bondsmith only warns of an unknown quantization type and then fills what it cannot
find with random numbers. So our own weight files carry names that it does not look for, and what a user's `save_pretrained` writes
(`model.safetensors`) holds one tensor of a wrong shape under the name of a dense weight: both make it stop with an error. And files
are resolved before the quantizer sees the model, so the right name is put into the configuration by the one hook that runs earlier.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bondsmith.model.blocks import shape
from bondsmith.model.digest import DamagedError, check_files, digest_of_json, metadata
from bondsmith.model.quantized import OURS
from bondsmith.model.skeleton import skeleton
from bondsmith.nn.experts import merge_experts, split_experts
from bondsmith.nn.hybrid import HybridLinear
from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedEmbedding, PackedHead, PackedLinear, PackedMatrix, stored_scales
from bondsmith.nn.packed import widen as widen_packed
from bondsmith.tensor.rounding import Grid
from bondsmith.tensor.sites import Sites

METHOD = OURS
# 2 brought packed modules and checksums, 3 their scales and centres in bfloat16, 4 experts with matrices of their own; what has none is
# written as 3. What has no packed module loads from all.
FORMAT, _WITHOUT_EXPERTS = 4, 3


@register_quantization_config(METHOD)
class BondsmithConfig(QuantizationConfigMixin):
    """What became of the matrices of a compressed model.

    Args:
        networks: module name -> {"sites": [[o, i], ...], "bonds": [...], "gauge": bool}, and "shape": [rows, columns] where an MLP has
            lost hidden channels ("copies" of them, where several matrices are fused); without sites the matrix is dense. "hybrid": the
            network (`NAME.network`) is added to a packed matrix (`NAME.rounded`).
        weights_file: the file (or index) that holds the weights; None means the usual names of transformers.
        packed: module name -> grid ({"bits": 4, "group": 64, ...}), for dense matrices, cores of networks (`NAME.cores.K`,
            `NAME.network.cores.K`), rounded parts of hybrids (`NAME.rounded`) and the embedding.
        split_experts: True where experts that transformers keeps in tensors of three dimensions have modules of their own.
    """

    def __init__(
        self,
        networks: Mapping[str, Mapping[str, Any]] | None = None,
        weights_file: str | None = None,
        packed: Mapping[str, Mapping[str, Any]] | None = None,
        split_experts: bool = False,
        **kwargs: Any,
    ):
        self.quant_method = METHOD
        self.split_experts = split_experts
        self.format = int(kwargs.pop("format", FORMAT if split_experts else _WITHOUT_EXPERTS))
        self.networks = {name: dict(network) for name, network in (networks or {}).items()}
        self.packed = {name: dict(grid) for name, grid in (packed or {}).items()}
        self.weights_file = weights_file
        if self.format > FORMAT:
            raise ValueError(
                f"this model was written in bondsmith format {self.format}, this bondsmith reads up to {FORMAT}: "
                "pip install --upgrade bondsmith"
            )
        if self.packed and self.format < _WITHOUT_EXPERTS:
            raise ValueError(
                f"this model was written in bondsmith format {self.format}, whose scales were float16; this bondsmith reads packed "
                f"matrices of format {_WITHOUT_EXPERTS}: compress the model again"
            )
        written = kwargs.pop("checksum", None)
        if written not in (None, self.checksum):
            raise DamagedError(
                "config.json: networks and grids in quantization_config do not have the checksum written with them "
                f"({written}, now {self.checksum}); fetch the file again"
            )

    @property
    def checksum(self) -> str:
        """Of `networks` and `packed`: with other grids the same bytes would be other weights."""
        return digest_of_json([self.networks, self.packed])

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry `quantization_config` of config.json."""
        return {
            "quant_method": METHOD,
            "format": self.format,
            "weights_file": self.weights_file,
            "networks": self.networks,
            "packed": self.packed,
            "checksum": self.checksum,
            **({"split_experts": True} if self.split_experts else {}),
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

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        replaced = {**config.networks, **config.packed}
        if config.split_experts:
            split_experts(model)
        replace_matrices(model, config.networks, config.packed)
        if checkpoint_files:
            packed = _state_names(model, config.packed)
            check_files(checkpoint_files, [*_state_names(model, config.networks), *packed], packed)
        for name in replaced:  # GPT-2 initialises `self.c_proj.weight` from the parent, even of a model that is loaded
            parent = model.get_submodule(name.rpartition(".")[0])
            if not parent._buffers:
                parent._is_hf_initialized = True
        if guard := _guard(replaced):
            ignored = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = ignored | {re.escape(guard)}
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: PreTrainedModel) -> list[Any]:
        """Returns none: files carry the names of the modules, and transformers would merge experts again."""
        return []

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Called by `save_pretrained`: from here on the files carry transformers' own names, and a guard against plain loading."""
        config = self.quantization_config
        model.config.quantization_config.weights_file = None
        replaced = {**config.networks, **config.packed}
        if getattr(model, "_hf_peft_config_loaded", False) or not replaced:
            return None, {}
        state = stored_scales(model, model.state_dict())
        packed = {name: state[name] for name in _state_names(model, config.packed)}
        guard = _guard(replaced)
        return state | ({guard: torch.empty(0)} if guard else {}), metadata(packed)

    def is_serializable(self) -> bool:
        """Returns True: `save_pretrained` works."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        plain: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        like: torch.dtype = plain or _dtype(model)
        networks = tuple(name + "." for name, m in model.named_modules() if isinstance(m, MPOLinear | HybridLinear))
        original = skeleton(model.config.__class__.from_dict(model.config.to_dict() | {"quantization_config": None}))
        reduced = {n: network for n, network in self.quantization_config.networks.items() if "shape" in network}
        for name, module in list(model.named_modules()):
            found = isinstance(module, MPOLinear | PackedLinear | HybridLinear) or name in reduced
            if found and not name.startswith(networks):
                linear = (
                    module.materialise(like) if isinstance(module, MPOLinear | PackedLinear | HybridLinear) else module
                )
                assert isinstance(linear, nn.Linear)
                if name in reduced:
                    linear = _widened(linear, shape(_module(original, name)), reduced[name].get("copies", 1))
                model.set_submodule(name, as_conv1d(linear) if isinstance(_module(original, name), Conv1D) else linear)
            elif isinstance(module, PackedEmbedding):
                unpack_embedding(model, name, like)
        merge_experts(model)
        model.config.__dict__.pop("transformers_weights", None)
        model.config.__dict__.pop("auto_map", None)
        return model if plain is None else model.to(plain)


def load(directory: str | Path, *, widen: bool = False, **options: Any) -> PreTrainedModel:
    """Returns the compressed model in a directory; options go to `AutoModelForCausalLM.from_pretrained`.

    `widen` keeps matrices of two and three bits as four in memory: the same model, decoding much faster on a CPU in bfloat16.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    if widen:
        widen_packed(model)
    return model


def replace_matrices(
    model: nn.Module, networks: Mapping[str, Mapping[str, Any]], packed: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Replaces the named matrices of `model` by `MPOLinear` and packed modules of the same device and dtype, without weights."""
    for name, network in networks.items():
        old = _module(model, name)
        like = next(old.parameters())
        has_bias = getattr(old, "bias", None) is not None
        if "sites" not in network:
            rows, columns = network["shape"]
            model.set_submodule(name, nn.Linear(columns, rows, has_bias, device=like.device, dtype=like.dtype))
            continue
        legs = network["sites"]
        sites = Sites(tuple(o for o, _ in legs), tuple(i for _, i in legs))
        hybrid = bool(network.get("hybrid", False))
        layer = MPOLinear(
            sites,
            tuple(network["bonds"]),
            bias=has_bias and not hybrid,
            gauge=bool(network.get("gauge", False)),
            device=like.device,
            dtype=like.dtype,
        )
        if hybrid:  # the matrix that the network is added to is packed below
            rounded = nn.Linear(layer.in_features, layer.out_features, has_bias, device=like.device, dtype=like.dtype)
            model.set_submodule(name, HybridLinear(rounded, layer))
            continue
        model.set_submodule(name, layer)
    for name, grid in (packed or {}).items():
        old = _module(model, name)
        if isinstance(old, nn.Embedding):
            pack_embedding(model, name, PackedEmbedding(old, Grid(**grid), old.weight.device))
        else:
            rows, columns = shape(old)
            like = next(old.parameters())
            bias = getattr(old, "bias", None) is not None
            layer_packed = PackedLinear(columns, rows, Grid(**grid), bias=bias, device=like.device, dtype=like.dtype)
            model.set_submodule(name, layer_packed)


def pack_embedding(model: nn.Module, name: str, embedding: PackedEmbedding) -> None:
    """Puts a packed embedding in the place of the one called `name`; heads that are tied to it share it from then on."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    heads = [target for target, source in tied.items() if source == f"{name}.weight"]
    model.set_submodule(name, embedding)
    for target in heads:
        head = target.removesuffix(".weight")
        model.set_submodule(head, PackedHead(embedding, getattr(model.get_submodule(head), "bias", None)))
        del tied[target]
    if heads:  # of this model only; transformers looks both tables up
        keys: dict[str, str] = dict(getattr(model, "_tied_weights_keys", None) or {})
        vars(model)["_tied_weights_keys"] = {k: v for k, v in keys.items() if k not in heads}


def unpack_embedding(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Puts the ordinary embedding back in the place of the packed one called `name`, and ordinary heads that share its weight."""
    packed = model.get_submodule(name)
    assert isinstance(packed, PackedEmbedding)
    plain = packed.materialise(dtype)
    model.set_submodule(name, plain)
    for head, module in list(model.named_modules()):
        if isinstance(module, PackedHead) and module.embedding is packed:
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            linear.weight = plain.weight
            linear.register_parameter("bias", module.bias)
            model.set_submodule(head, linear)
    if "_tied_weights_keys" in vars(model) and isinstance(model, PreTrainedModel):
        del vars(model)["_tied_weights_keys"]
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def packed_section(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns the entry `packed` of the configuration of a model whose modules are packed already."""
    return {name: dict(m.grid.to_json()) for name, m in model.named_modules() if isinstance(m, PackedMatrix)}


def _widened(linear: nn.Linear, full: tuple[int, int], copies: int) -> nn.Linear:
    """Returns the layer with zeros for the hidden channels that were dropped, in each of the `copies` matrices fused in its rows."""
    rows, columns = full
    weight = linear.weight.detach()
    wide = nn.Linear(columns, rows, linear.bias is not None, device=weight.device, dtype=weight.dtype)
    stay = linear.out_features // copies
    with torch.no_grad():
        target = wide.weight.zero_().view(copies, rows // copies, columns)
        target[:, :stay, : linear.in_features] = weight.view(copies, stay, linear.in_features)
        if wide.bias is not None:
            wide.bias.zero_().view(copies, -1)[:, :stay] = linear.bias.view(copies, stay)
    return wide


def as_conv1d(linear: nn.Linear) -> Conv1D:
    """Returns GPT-2's kind of linear layer, whose weight is the transpose."""
    conv = Conv1D(linear.out_features, 1)
    conv.nx, conv.weight, conv.bias = linear.in_features, nn.Parameter(linear.weight.T.contiguous()), linear.bias
    return conv


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{name}: the model has no such module, but its quantization_config names it") from error


def _state_names(model: nn.Module, modules: Iterable[str]) -> list[str]:
    return [f"{name}.{leaf}" for name in modules for leaf in model.get_submodule(name).state_dict()]


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def attach(model: PreTrainedModel, config: BondsmithConfig) -> PreTrainedModel:
    """Marks a model whose matrices are networks already as one of ours, so that `save_pretrained` writes a loadable one."""
    model.config.quantization_config = config
    model.hf_quantizer = BondsmithQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
    return model


def _guard(replaced: Mapping[str, Any]) -> str | None:
    """Returns a dense weight's name that our files do not use; None where matrices only lost channels, whose shapes tell enough."""
    names = (name for name, entry in replaced.items() if "sites" in entry or "bits" in entry)
    return next((f"{name}.weight" for name in names), None)
