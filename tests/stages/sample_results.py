"""Results as a run of SmolLM2-135M leaves them, for tests of what shows them."""

import math
from typing import Any

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def network(
    name: str, block: int | None, shape: tuple[int, int], error: float | None, bond: int = 96
) -> dict[str, Any]:
    rows, columns = shape
    kept = rows * columns if error is None else bond * (rows + columns - bond)
    return {
        "name": name,
        "block": block,
        "shape": [rows, columns],
        "sites": None if error is None else f"({rows},1)(1,{columns})",
        "bonds": [] if error is None else [bond],
        "gauge": error is not None,
        "parameters": kept,
        "bytes": 2 * kept,
        "multiply_adds": kept,
        "dense_parameters": rows * columns,
        "error": error,
    }


def smollm2_networks() -> list[dict[str, Any]]:
    """210 matrices: errors of the size that are measured, with block 0 easy, deep down_proj hard, a few kept dense."""
    hardness = dict(zip(SHAPES, (0.12, 0.14, 0.3, 0.2, 0.22, 0.26, 0.19), strict=True))
    networks = []
    for block in range(30):
        for place, (kind, shape) in enumerate(SHAPES.items()):
            wave = 1 + 0.25 * math.sin(1.7 * block + place) + 0.5 * (block / 29) ** 3 * (kind == "mlp.down_proj")
            dense = (kind == "self_attn.v_proj" and block % 3 == 0) or (kind == "mlp.down_proj" and block in (1, 11))
            error = None if dense else hardness[kind] * wave * (0.4 if block == 0 else 1)
            bond = max(16, round(0.5 * min(shape) / 16) * 16)
            networks.append(network(f"model.layers.{block}.{kind}", block, shape, error, bond))
    return networks


def smollm2_results() -> dict[str, Any]:
    networks = smollm2_networks()
    kept, dense = (sum(n[field] for n in networks) for field in ("parameters", "dense_parameters"))
    whole = 134_515_008
    left = whole - dense + kept
    return {
        "format": 1,
        "bondsmith": "0.1.0",
        "created": "2025-11-02T14:31:07+00:00",
        "command": "bondsmith compress HuggingFaceTB/SmolLM2-135M-Instruct --out smol-small --keep 0.8 --metric input "
        "--calibration wiki.jsonl.gz --calibration chat.jsonl.gz --tokens 65536 --seed 7",
        "seed": 7,
        "versions": {
            "bondsmith": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "safetensors": "0.6.2",
        },
        "machine": {
            "processor": "AMD EPYC 7B13",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 25_000_000_000,
            "platform": "Linux-6.1-x86_64",
        },
        "model": {
            "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "architecture": "LlamaForCausalLM",
            "blocks": 30,
            "license": "apache-2.0",
            "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        },
        "settings": {
            "keep": 0.8,
            "metric": "input",
            "sites": "auto",
            "calibration": ["wiki", "chat"],
            "propagate": True,
        },
        "calibration": {
            "tokens": 65536,
            "window": 512,
            "sources": [
                {"spec": "wiki.jsonl.gz", "documents": 412, "tokens": 32768, "sha256": "9f2c" * 16},
                {"spec": "chat.jsonl.gz", "documents": 230, "tokens": 32768, "sha256": "07ab" * 16},
            ],
        },
        "size": {
            "original": {
                "parameters": whole,
                "matrix_parameters": dense,
                "bytes_fp32": 4 * whole,
                "bytes": 2 * whole,
                "dtype": "bfloat16",
                "multiply_adds": whole,
            },
            "compressed": {
                "parameters": left,
                "matrix_parameters": kept,
                "bytes_fp32": 4 * left,
                "bytes": 2 * left + 61_440,
                "dtype": "bfloat16",
                "multiply_adds": left,
            },
        },
        "quality": [
            {
                "text": name,
                "windows": 40,
                "tokens": 20480,
                "perplexity": {"original": before, "compressed": after},
                "kl": 0.2314,
                "kl_stderr": 0.0041,
                "top1": 0.7923,
                "top1_stderr": 0.0028,
            }
            for name, before, after in (("WikiText", 29.41, 35.02), ("C4", 37.13, 43.9))
        ],
        "tasks": [
            {
                "task": task,
                "metric": "acc_norm",
                "rows": rows,
                "original": before,
                "original_stderr": 0.0245,
                "compressed": after,
                "compressed_stderr": 0.0248,
            }
            for task, rows, before, after in (("arc_easy", 400, 0.5425, 0.5125), ("hellaswag", 400, 0.41, 0.395))
        ],
        "speed": {
            "prefill": {"batch": 8, "tokens": 128, "original": 1432.0, "compressed": 1689.0, "ratio": 1.179},
            "decode": {"batch": 1, "tokens": 64, "original": 21.4, "compressed": 25.1, "ratio": 1.173},
        },
        "networks": networks,
        "seconds": {"calibrate": 61.2, "decompose": 48.9, "save": 1.4, "evaluate": 155.0, "bench": 31.0},
        "chat": {
            "prompt": "Why is the sky blue?",
            "original": "The sky appears blue because of a phenomenon called Rayleigh scattering.",
            "compressed": "The sky is blue because the air scatters short waves of light more than long ones.",
        },
    }
