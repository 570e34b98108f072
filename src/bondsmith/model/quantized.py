"""Checkpoints that are quantised already: bitsandbytes ones are dequantised, others refused with what to do.

What comes out is what the quantised model computes with: its errors are part of the original from then on.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

OURS = "bondsmith"
log = logging.getLogger("bondsmith")


def method_of(config: Any) -> str | None:
    """Returns the name of the quantisation method of a configuration, or None."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    get = quantization.get if isinstance(quantization, dict) else lambda key: getattr(quantization, key, None)
    return str(getattr(get("quant_method"), "value", get("quant_method")))


def remedy(method: str) -> str:
    """Returns what to do about a checkpoint that cannot be opened."""
    if method == OURS:
        return "compress the original model with the settings you want instead"
    if method == "bitsandbytes":
        return "pip install 'bondsmith[bitsandbytes]', and it is dequantised on opening"
    return "load it with transformers, call model.dequantize() and model.save_pretrained(DIR), and compress DIR"


def can_dequantize(method: str | None) -> bool:
    """Whether `dequantized` takes such a checkpoint here."""
    if method != "bitsandbytes":
        return False
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return False
    return True


def dequantized(name: str, path: Path) -> PreTrainedModel:
    """Returns the model of a bitsandbytes checkpoint with ordinary weights: those that it computes with."""
    log.info("%s is quantised by bitsandbytes: what is compressed are its dequantised weights", name)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    return model.dequantize()
