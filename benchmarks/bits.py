"""Rounding to few bits, ours against others at matched bytes, in one run: bytes, KL, perplexity, resident memory, prefill and decode.

    python benchmarks/bits.py MODEL --calibration FILE ... --evaluate FILE ... [--bits 8 4 3 2] [--shares 0.12 0.07]
        [--speed [--models DIR ...]] [--json FILE]

MODEL is a directory or a hub id of a model with full-precision weights. Every matrix of the blocks, the embedding and the head are
rounded; bytes count all of them, scales included, everything else at two bytes. The rivals: rounding to nearest as it comes, with
searched scales, HQQ and NF4 from their packages (left out, with a line, where not installed), int8 by the rule of bitsandbytes, GPTQ as
published. "ours" adds
fitted scales and moved codes; with `--depth` also inside the depth-order pass of `bondsmith compress`, where later blocks make up for
earlier ones. `--shares` compares `bondsmith compress --bytes SHARE` with the two plain quantizers next to that share of the fp32 bytes,
one that just fits and one that is just larger, each in all these ways (with `--depth` in depth order, too). A model whose weights lie on
a four-bit grid already (a GGUF file) says little about four bits. It takes hours on two cores: with `--json` (and `--profile`, `--keep`)
the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from packed_speed import show_speeds, speeds
from rich.console import Console
from rich.table import Table
from rounders import Round, methods
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import bondsmith
from bondsmith.data import read_windows
from bondsmith.model.blocks import BlockRunner, find_blocks, matrices, weight
from bondsmith.model.tracing import capture_inputs, trace_groups
from bondsmith.stages.moment import Moment, stream_weights
from bondsmith.tensor.rounding import Grid


@torch.no_grad()
def input_moments(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Returns the moment of the input of every block matrix, and of the head."""
    runner, found = BlockRunner(model), {}
    hidden = [runner.enter(row[None]) for row in ids]
    for k, block in enumerate(runner.blocks):
        groups = trace_groups(block, lambda k=k: runner.block(k, ids[:1], hidden[0]))
        moments = [Moment(g.in_features) for g in groups]
        for i, row in enumerate(ids):
            with capture_inputs(block, groups) as seen:
                out = runner.block(k, row[None], hidden[i])
            for position, rows in seen.items():
                moments[position].add(rows, stream_weights(groups[position], hidden[i], out))
            hidden[i] = out
        for group, moment in zip(groups, moments, strict=True):
            C = moment.mean(group.names[0])
            found |= {f"{runner.path}.{k}.{name}": C for name in group.names}
    head, seen_by_head = Moment(hidden[0].shape[-1]), []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen_by_head.append(args[0]))
    for i in range(len(ids)):
        runner.logits(ids[i : i + 1, :1], hidden[i][:, -64:])
        head.add(seen_by_head.pop().flatten(0, 1))
    handle.remove()
    return found | {"head": head.mean("head")}


class Judge:
    """Compares a model with the original on texts; the original's last hidden states are kept."""

    def __init__(self, model: PreTrainedModel, texts: dict[str, Tensor]):
        self.texts, self.head = texts, copy.deepcopy(model.get_output_embeddings())
        self.states = {name: [self._state(model, row) for row in ids] for name, ids in texts.items()}
        self.own = {name: self._score(model, name)["perplexity"] for name in texts}

    def __call__(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        return {name: self._score(model, name) for name in self.texts}

    @torch.no_grad()
    def _state(self, model: PreTrainedModel, row: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(input_ids=row[None], use_cache=False)
        handle.remove()
        return seen[0][0]

    @torch.no_grad()
    def _score(self, model: PreTrainedModel, name: str) -> dict[str, float]:
        divergences, losses, same = [], [], []
        for row, state in zip(self.texts[name], self.states[name], strict=True):
            p = self.head(state)[:-1].float().log_softmax(-1)
            q = model(input_ids=row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            divergences.append((p.exp() * (p - q)).sum(-1).mean().item())
            losses.append(-q.gather(1, row[1:, None]).mean().item())
            same.append((p.argmax(-1) == q.argmax(-1)).float().mean().item())
        n = len(divergences)
        error = torch.tensor(divergences).std().item() / math.sqrt(n) if n > 1 else math.nan
        return {
            "kl": sum(divergences) / n,
            "kl_stderr": error,
            "perplexity": math.exp(sum(losses) / n),
            "top1": sum(same) / n,
        }


@torch.no_grad()
def rounded_model(model: PreTrainedModel, moments: dict[str, Tensor], method: Round) -> tuple[PreTrainedModel, int]:
    """Returns a copy with all matrices, embedding and head rounded, and the bytes of the whole file."""
    other = copy.deepcopy(model)
    path, total, done = find_blocks(other), 0, set()
    for name, matrix in [(n, m) for n, m in matrices(other).items() if n.startswith(path + ".")]:
        Q, size = method(weight(matrix).clone(), moments.get(name))
        weight(matrix).copy_(Q)
        total, done = total + size, done | {id(matrix.weight)}
    for module in (other.get_input_embeddings(), other.get_output_embeddings()):
        if id(module.weight) not in done:
            Q, size = method(module.weight.clone(), moments["head"])
            module.weight.copy_(Q)
            total, done = total + size, done | {id(module.weight)}
    rest = sum(p.numel() for p in other.parameters() if id(p) not in done)
    return other, total + 2 * rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--evaluate", nargs="+", required=True)
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4, 3, 2])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    parser.add_argument("--windows", type=int, default=4, help="evaluation windows per text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--moments", type=Path, help="keep the input moments in this file, or read them from it")
    parser.add_argument("--depth", action="store_true", help="also through bondsmith compress, blocks in depth order")
    parser.add_argument("--profile", type=Path, help="of this model on the same text: made there, or taken from there")
    parser.add_argument("--shares", type=float, nargs="*", default=[], help="of the fp32 bytes, for a plan to meet")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--keep", type=Path, help="keep the planned models in this directory; --speed times them too")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="compressed directories to time beside")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every call
    if both := set(options.calibration) & set(options.evaluate):
        parser.error(
            f"{', '.join(sorted(both))}: calibrated on, so nothing can be judged on it; give other text to --evaluate"
        )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = found(options)
    if options.bits or options.shares:
        compare(model, tokenizer, options, rows)
    if options.speed:
        with tempfile.TemporaryDirectory() as folder:
            timed = speeds(model, options, Path(folder))
        show_speeds(timed)
        if options.json:
            options.json.write_text(json.dumps({"of": same(options), "rows": rows, "speeds": timed}, indent=1))


def same(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what rows of an earlier run must have been made with."""
    names = ("model", "calibration", "evaluate", "tokens", "windows", "window")
    return {name: getattr(options, name) for name in names}


def found(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the rows that an interrupted run of the same command left in its file."""
    if not options.json or not options.json.is_file():
        return []
    content = json.loads(options.json.read_text())
    rows: list[dict[str, Any]] = content["rows"] if content["of"] == same(options) else []
    return rows


def is_known(rows: list[dict[str, Any]], bits: str, method: str) -> bool:
    return any((row["bits"], row["method"]) == (bits, method) for row in rows)


def compare(model: PreTrainedModel, tokenizer: Any, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    share = {"window": options.window, "seed": 0}
    count = options.tokens // options.window // len(options.calibration)
    ids = torch.cat([read_windows(s, tokenizer, count=count, **share).ids for s in options.calibration])
    texts = {
        Path(s).name.split(".")[0]: read_windows(s, tokenizer, count=options.windows, window=options.window, seed=1).ids
        for s in options.evaluate
    }
    start = time.perf_counter()
    if options.moments and options.moments.is_file():
        moments = torch.load(options.moments)
    else:
        moments = input_moments(model, ids)
        if options.moments:
            torch.save(moments, options.moments)
    print(f"moments of {ids.numel()} tokens: {time.perf_counter() - start:.0f} s", flush=True)
    judge = Judge(model, texts)
    print("original", {name: round(value, 2) for name, value in judge.own.items()}, flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        profile = options.profile or Path(folder) / "profile"
        if (options.depth or options.shares) and not (profile / "profile.json").is_file():
            start = time.perf_counter()
            own = {"calibration": options.calibration, "tokens": options.tokens, "window": options.window}
            bondsmith.profile(options.model, profile, **own)
            print(f"profile for all compressions: {time.perf_counter() - start:.0f} s", flush=True)
        for bits in options.bits:
            plain(model, moments, judge, options, rows, bits, options.group)
            if options.depth:
                in_depth_order(rows, options, judge, profile, f"{bits}", uniform(bits, options.group))
        for share in options.shares:
            for bits, group in neighbours(model, share * 4 * parameters):
                plain(model, moments, judge, options, rows, bits, group)
                if options.depth:
                    in_depth_order(rows, options, judge, profile, f"{bits}", uniform(bits, group))
            place = options.keep / f"planned-{share:g}" if options.keep else None
            in_depth_order(rows, options, judge, profile, f"{share:g} of it", {"bytes": str(share)}, place)
            options.models += [place] if place else []
    show(rows, judge.own, parameters)


def plain(
    model: PreTrainedModel,
    moments: dict[str, Tensor],
    judge: Judge,
    options: argparse.Namespace,
    rows: list[dict[str, Any]],
    bits: int,
    group: int,
) -> None:
    """Adds the rows of all methods that round every matrix by itself."""
    width = "8, per row" if bits == 8 else f"{bits}, group {group}"
    for name, make in methods(bits, group).items():
        if (options.methods and name not in options.methods) or is_known(rows, width, name):
            continue
        try:
            method = make()
        except ImportError as error:
            print(f"{name}: left out, {error}", flush=True)
            continue
        start = time.perf_counter()
        other, size = rounded_model(model, moments, method)
        row = {"bits": width, "method": name, "bytes": size, "seconds": time.perf_counter() - start}
        keep(rows, options, row | {"texts": judge(other)})


def neighbours(model: PreTrainedModel, budget: float) -> list[tuple[int, int]]:
    """Returns (bits, group) of the largest plain quantizer within a number of bytes, and of the smallest beyond."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    inside = [tuple(weight(m).shape) for n, m in matrices(model).items() if n.startswith(find_blocks(model) + ".")]
    shapes = inside + [tuple(model.get_input_embeddings().weight.shape)] * (1 if tied else 2)
    rest = sum(p.numel() for p in model.parameters()) - sum(r * c for r, c in shapes)
    sizes = {
        (bits, group): 2 * rest + sum(Grid(bits, group, symmetric=False).packed_bytes(*s) for s in shapes)
        for bits in (2, 3, 4)
        for group in (32, 64, 128)
    }
    fits = [key for key in sizes if sizes[key] <= budget]
    over = [key for key in sizes if sizes[key] > budget]
    return [*sorted(fits, key=sizes.__getitem__)[-1:], *sorted(over, key=sizes.__getitem__)[:1]]


def uniform(bits: int, group: int) -> dict[str, Any]:
    return {"keep": 1.0, "uniform": True, "bits": bits, "group": group, "metric": "loss"}


def in_depth_order(
    rows: list[dict[str, Any]],
    options: argparse.Namespace,
    judge: Judge,
    profile: Path,
    label: str,
    settings: dict[str, Any],
    place: Path | None = None,
) -> None:
    """Adds the row of a `bondsmith compress --profile`, embedding and head rounded too; its directory stays in `place`."""
    name = "ours, planned" if "bytes" in settings else f"ours, in depth order, group {settings['group']}"
    if is_known(rows, label, name):
        return
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        out = place or Path(folder) / "out"
        unfinished = out.with_name(out.name + ".partial").is_dir()
        done = bondsmith.compress(
            options.model,
            out,
            profile=str(profile),
            evaluate=False,
            resume=unfinished,
            overwrite=not unfinished,
            dtype="bfloat16",
            **settings,
        )
        seconds = time.perf_counter() - start
        size = sum(f.stat().st_size for f in done.path.glob("bondsmith-*.safetensors"))
        scores = judge(done.load(dtype=torch.float32))
    row = {"bits": label, "method": name, "bytes": size, "seconds": seconds}
    keep(rows, options, row | {"texts": scores})


def keep(rows: list[dict[str, Any]], options: argparse.Namespace, row: dict[str, Any]) -> None:
    rows.append(row)
    kl = {name: f"{t['kl']:.4f} ± {t['kl_stderr']:.4f}" for name, t in row["texts"].items()}
    print(row["bits"], row["method"], f"{row['bytes'] / 1e6:.2f} MB", f"{row['seconds']:.0f} s", kl, flush=True)
    if options.json:
        options.json.write_text(json.dumps({"of": same(options), "rows": rows}, indent=1))


def show(rows: list[dict[str, Any]], own: dict[str, float], parameters: int) -> None:
    texts = list(own)
    table = Table(
        "bits",
        "method",
        "MB",
        "of fp32",
        *(f"{t}: KL" for t in texts),
        *(f"ppl ({own[t]:.2f})" for t in texts),
        "top-1",
        "s",
    )
    for row in rows:
        found = row["texts"]
        cells = [f"{found[t]['kl']:.4f} ± {found[t]['kl_stderr']:.4f}" for t in texts]
        cells += [f"{found[t]['perplexity']:.2f}" for t in texts]
        top = sum(t["top1"] for t in found.values()) / len(found)
        share = row["bytes"] / 4 / parameters
        table.add_row(
            row["bits"],
            row["method"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{share:.4f}",
            *cells,
            f"{top:.3f}",
            f"{row['seconds']:.0f}",
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
