"""Log-perplexity lost by each way of fitting, on the same calibration and evaluation text, in one run.

    python benchmarks/methods.py MODEL --calibration FILE ... --evaluate FILE ... --keep 0.8 --tokens 65536

prints a table of nats lost per token (mean over the evaluation texts), and its ratio to the first method: the plain sequential SVD of
three sites, the method of arXiv 2401.14109 without its retraining; or whitened truncation, with `--methods 'as published' planned`.
Evaluation text is never calibrated on: it comes from other files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import bondsmith
from bondsmith.data import Windows, read_windows
from bondsmith.model.checkpoint import open_compressed
from bondsmith.model.source import Source, load_tokenizer, load_whole, open_source
from bondsmith.recipe import Recipe
from bondsmith.stages.plan import Plan
from bondsmith.stages.planning import planned
from bondsmith.stages.profile import Profile
from bondsmith.stages.quality import compare
from bondsmith.stages.scaling import parts

UNIFORM = {"uniform": True}
SECOND_ROUND = "planned, second round"
METHODS: dict[str, dict[str, Any]] = {
    "plain SVD, 3 sites": {"metric": "frobenius", "sites": "interleaved:3"},
    "plain SVD, matrix cut": UNIFORM | {"metric": "frobenius"},
    "as published": UNIFORM | {"metric": "input", "sites": "matrix", "propagate": False, "gauge": False},
    "input": UNIFORM | {"metric": "input", "propagate": False},
    "input, propagated": UNIFORM | {"metric": "input"},
    "loss": UNIFORM | {"metric": "loss", "propagate": False},
    "loss, propagated": UNIFORM | {"metric": "loss"},
    "planned by weights": {"metric": "frobenius"},
    "planned by inputs": {"metric": "input"},
    "planned, cuts alone": {"channels": False},
    "planned, not propagated": {"propagate": False},
    "planned, gradients of a sixth": {"gradient_share": 1 / 6},
    "planned, stream not corrected": {"stream_strength": 0.0},
    "planned": {},
    "planned, probes": {"probe_windows": 2},
    SECOND_ROUND: {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--evaluate", nargs="+", required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens per text")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--set", nargs="*", default=[], help="other settings, e.g. damping=0.01")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if both := set(options.calibration) & set(options.evaluate):
        parser.error(
            f"{', '.join(sorted(both))}: calibrated on, so nothing can be judged on it; give other text to --evaluate"
        )
    extra = {k: json.loads(v) for k, v in (pair.split("=") for pair in options.set)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(options.model, Path(folder) / "source")
        tokenizer = load_tokenizer(source.path)
        texts = [_windows(spec, tokenizer, options.windows) for spec in options.evaluate]
        for keep in options.keep:
            for name in options.methods:
                out, start = Path(folder) / "out", time.perf_counter()
                shared = {"keep": keep, "tokens": options.tokens, "calibration": options.calibration}
                settings = shared | METHODS[name] | extra
                if name == SECOND_ROUND:
                    settings = replanned(source, Path(folder), settings)
                run = bondsmith.compress(source.path, out, overwrite=True, evaluate=False, **settings)
                seconds = time.perf_counter() - start
                quality = compare(source, open_compressed(out), texts, torch.device("cpu"))
                size = run.results["size"]["compressed"]
                rows.append({"method": name, "keep": keep, "seconds": seconds, "quality": quality, "size": size})
                print(
                    name,
                    keep,
                    f"{seconds:.0f} s",
                    [round(q["nats_lost"], 4) for q in quality],
                    run.results["seconds"],
                    flush=True,
                )
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    show(rows, texts)


def replanned(source: Source, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Compresses once, measures on held-out calibration text what each part of the result costs, and plans anew with what was found.

    A part is the MLP of a block, or the rest of it: it costs the divergence that is gone when it is the original's again.
    """
    profiled, first = folder / "profile", folder / "first"
    own = {k: v for k, v in settings.items() if k != "keep"}
    bondsmith.profile(source.path, profiled, overwrite=True, **own)
    shared = {"keep": settings["keep"], "profile": str(profiled)}
    bondsmith.compress(source.path, first, overwrite=True, evaluate=False, **shared)
    profile, plan = Profile.load(profiled), Plan.load(first / "plan.json")
    kinds = json.loads((profiled / "work/windows.json").read_text())
    kept = load_file(profiled / "work/windows.safetensors")
    ids = torch.cat([kept[str(i)][:2] for i, row in enumerate(kinds) if row[0] == "h"])
    original, small = load_whole(source), bondsmith.load(first, dtype=torch.float32)
    predicted = {m.name: m.loss or 0.0 for m in plan.matrices}
    factors: dict[str, float] = {}
    with torch.no_grad():
        target = [original(input_ids=row[None], use_cache=False).logits.log_softmax(-1) for row in ids]
        whole = divergence(small, ids, target)
        for part in parts(profile):
            compressed = {name: small.get_submodule(name) for name in part.members}
            for name in part.members:
                small.set_submodule(name, original.get_submodule(name))
            cost, expected = whole - divergence(small, ids, target), sum(predicted[name] for name in part.members)
            for name, module in compressed.items():
                small.set_submodule(name, module)
            print(f"{part.members[0]} ...: {expected:.5f} predicted, {cost:.5f} measured", flush=True)
            factors |= dict.fromkeys(part.members, min(5.0, max(0.2, cost / expected)) if expected > 0 else 1.0)
    planned(profile.rescaled(factors), Recipe.from_settings(shared)).save(folder / "second.json")
    return {"profile": str(profiled), "plan": str(folder / "second.json")}


def divergence(model: torch.nn.Module, ids: torch.Tensor, target: list[torch.Tensor]) -> float:
    """Returns KL(original || model), nats a token."""
    found = 0.0
    for row, logp in zip(ids, target, strict=True):
        own = model(input_ids=row[None], use_cache=False).logits.log_softmax(-1)
        found += float(torch.nn.functional.kl_div(own, logp, log_target=True, reduction="sum")) / row.numel()
    return found / len(ids)


def _windows(spec: str, tokenizer: Any, count: int) -> Windows:
    return read_windows(spec, tokenizer, count=count, window=512, seed=1)


def show(rows: list[dict[str, Any]], texts: list[Windows]) -> None:
    """Prints nats lost per text, their mean, and the ratio to the first method at the same keep."""
    table = Table(
        "keep",
        "method",
        *(Path(t.spec).name.split(".")[0] for t in texts),
        "mean",
        "of the first",
        "KL",
        "top-1",
        "seconds",
    )
    for row in rows:
        lost = [q["nats_lost"] for q in row["quality"]]
        mean = sum(lost) / len(lost)
        first = next(r for r in rows if r["keep"] == row["keep"])
        base = sum(q["nats_lost"] for q in first["quality"]) / len(lost)
        kl = sum(q["kl"] for q in row["quality"]) / len(lost)
        top = sum(q["top1"] for q in row["quality"]) / len(lost)
        cells = [f"{v:.3f}" for v in (*lost, mean, mean / base, kl, top)]
        table.add_row(f"{row['keep']:g}", row["method"], *cells, f"{row['seconds']:.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
