"""Train a small Llama from nothing, so that methods can be compared on full-precision weights and no download is needed.

    python benchmarks/small_model.py OUT --data FILE ... [--minutes 8]

writes an ordinary directory: float32 weights, a byte-pair tokenizer of 4,096 pieces trained on the same text. Eight minutes on two cores
reach a perplexity of some dozens on the held-out windows; what a method costs such a model is what is compared, not how well it writes.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bondsmith.data import documents, read_windows

VOCABULARY = 4096


def train_tokenizer(files: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (str(document) for file in files for document in list(documents(file))[:2000])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = train_tokenizer(options.data)
    share = {"window": options.window, "seed": 0}
    ids = torch.cat([read_windows(file, tokenizer, count=4000, **share).ids for file in options.data])
    ids = ids[torch.randperm(len(ids))]
    held, ids = ids[:16], ids[16:]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=8 * options.width // 3 // 64 * 64,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.width // 32,
        num_key_value_heads=options.width // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.1)
    start, step, limit = time.perf_counter(), 0, 60 * options.minutes
    while (spent := time.perf_counter() - start) < limit:
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = options.rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * spent / limit)))
        batch = ids[torch.randint(len(ids), (options.batch,))]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"{spent:4.0f} s, step {step}, loss {loss.item():.3f}", flush=True)
        step += 1
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=held, labels=held, use_cache=False).loss.item()
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{count / 1e6:.1f} M parameters, {step} steps; perplexity on {held.numel()} held-out tokens {math.exp(loss):.1f}"
    )
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
