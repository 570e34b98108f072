"""A conversation with a model, through its own chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import TextStreamer

from bondsmith.model.source import ModelError, load_tokenizer
from bondsmith.nn.packed import is_packed, widen


class Conversation:
    """Turns said so far, and the model that answers.

    Raises:
        ModelError: the directory or hub id holds no model or no tokenizer.
    """

    def __init__(self, name: str, *, max_new_tokens: int = 256, temperature: float = 0.0):
        gpu = torch.cuda.is_available()
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if gpu else torch.float32)
        except (OSError, ValueError) as error:
            raise ModelError(f"{name}: {str(error).strip().splitlines()[0]}") from error
        if not gpu and is_packed(model):  # float32 is fastest on a CPU, but for the kernels of packed weights
            model = model.to(torch.bfloat16)
            widen(model)
        self.model: PreTrainedModel = model.to("cuda") if gpu else model
        self.tokenizer = load_tokenizer(Path(name))
        self.turns: list[dict[str, str]] = []
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.options["temperature"] = temperature

    def say(self, text: str, out: Callable[[str], None]) -> str:
        """Returns the reply to `text`; `out` gets its pieces as they come, and a line end."""
        self.turns.append({"role": "user", "content": text})
        answer = reply(self.model, self.tokenizer, self.turns, out=out, **self.options)
        out("\n")
        self.turns.append({"role": "assistant", "content": answer})
        return answer


def reply(
    model: PreTrainedModel,
    tokenizer: Any,
    turns: list[dict[str, str]],
    out: Callable[[str], None] | None = None,
    **options: Any,
) -> str:
    """Returns what the model answers to `turns`; a model without a chat template continues the last one."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        inputs = tokenizer(turns[-1]["content"], return_tensors="pt")
    ids = inputs["input_ids"].to(model.device)
    settings = {"pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id or 0} | options
    with torch.no_grad():
        done = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=_Pieces(tokenizer, out) if out else None,
            **settings,
        )
    return str(tokenizer.decode(done[0, ids.shape[1] :], skip_special_tokens=True)).strip()


class _Pieces(TextStreamer):
    """Hands finished words on as they are generated."""

    def __init__(self, tokenizer: Any, out: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._out(text)
