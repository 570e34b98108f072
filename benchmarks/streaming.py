"""Peak memory of compressing synthetic Llamas of 8 and 16 wide blocks: it should not depend on how many blocks there are.

    python benchmarks/streaming.py [--width 2048] [--mlp 2816] [--blocks 8 16] [--metric input]

Writes random checkpoints block by block, compresses each in a process of its own and prints the peak of its resident memory.
Hidden states and the rewritten weights lie on disk. The keep is small, so that the fits, which take nearly all the time, are cheap.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from bondsmith.model.skeleton import skeleton, stored_names

WORDS = 1024
CHILD = """
import json, resource, sys
import bondsmith
out, settings = sys.argv[2], json.loads(sys.argv[3])
done = bondsmith.compress(sys.argv[1], out, evaluate=False, **settings)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "seconds": done.results["seconds"], "bytes": done.results["size"]["original"]["bytes"]}))
"""


def write_model(directory: Path, width: int, mlp: int, blocks: int) -> None:
    """Writes a random Llama in bfloat16, eight heads to a key, one file per block."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 512,
        architectures=["LlamaForCausalLM"],
    )
    directory.mkdir()
    config.save_pretrained(directory)
    model, generator, places = skeleton(config), torch.Generator().manual_seed(0), {}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in stored_names(model):
        files.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    for key, names in files.items():
        file = f"model-{key}.safetensors"
        tensors = {n: _random(shapes[n], generator) for n in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(directory)


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)


def measure(folder: Path, width: int, mlp: int, blocks: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns peak memory in bytes, seconds per stage and the checkpoint's bytes."""
    write_model(folder / "model", width, mlp, blocks)
    command = [sys.executable, "-c", CHILD, str(folder / "model"), str(folder / "out"), json.dumps(settings)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--metric", default="input")
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    table = Table("blocks", "checkpoint", "peak memory", "of the first", "seconds")
    first = 0.0
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as name:
            text = Path(name) / "text.txt"
            numbers = torch.randint(0, WORDS, (200, 100), generator=torch.Generator().manual_seed(1))
            text.write_text("\n\n".join(" ".join(f"w{n}" for n in row) for row in numbers.tolist()))
            settings = {
                "keep": 0.1,
                "tokens": options.tokens,
                "window": 128,
                "calibration": [str(text)],
                "metric": options.metric,
            }
            row = measure(Path(name), options.width, options.mlp, blocks, settings)
        first = first or row["peak"]
        seconds = sum(row["seconds"].values())
        table.add_row(
            str(blocks),
            f"{row['bytes'] / 1e9:.2f} GB",
            f"{row['peak'] / 1e9:.3f} GB",
            f"{row['peak'] / first:.3f}",
            f"{seconds:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
