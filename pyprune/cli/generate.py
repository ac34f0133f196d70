"""`pyprune generate MODEL --prompt TEXT`: text as it comes, then how fast it came and what memory it took."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import Any

HELP = "continue a prompt; tokens per second and memory"


def options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a checkpoint, dense or packed")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue; - reads it from stdin")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="new tokens at most (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 (default): the likeliest token")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from pyprune import evaluation, models

    if args.tokens < 1:
        raise ValueError(f"--tokens is {args.tokens}; expected at least 1")
    if args.temperature < 0:
        raise ValueError(f"--temperature is {args.temperature}; expected 0 or more")
    tokenizer = models.open_tokenizer(args.model, args.trust_remote_code)
    prompt = _encode(tokenizer, sys.stdin.read() if args.prompt == "-" else args.prompt, args.chat)
    model: Any = models.open_model(args.model, args.dtype, args.trust_remote_code)
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    stream = _Stream(tokenizer, shown=not args.json)
    with evaluation.peak_memory(model.device) as peak:
        begin = time.perf_counter()
        found = model.generate(
            **prompt.to(model.device),
            max_new_tokens=args.tokens,
            streamer=stream,
            logits_processor=[partial(_check, args.model)],
            pad_token_id=_padding(tokenizer),
            **sampling,
        )
    new = found[0, prompt["input_ids"].shape[1] :]
    seconds = stream.times[-1] - stream.times[0]
    return {
        "model": args.model,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": prompt["input_ids"].shape[1],
        "tokens": len(new),
        "first_token_seconds": stream.times[0] - begin,
        "tokens_per_second": (len(new) - 1) / seconds if len(new) > 1 else None,
        "weight_bytes": model.get_memory_footprint(),
        "peak_bytes": peak.bytes,
    }


def show(result: dict[str, Any]) -> None:
    speed = result["tokens_per_second"]
    peak = "" if result["peak_bytes"] is None else f", peak memory {result['peak_bytes'] / 1e6:,.0f} MB"
    print(
        f"prompt of {result['prompt_tokens']} tokens, the first of {result['tokens']} new ones after "
        f"{result['first_token_seconds']:.2f} s{'' if speed is None else f', then {speed:.1f} tokens/s'}, weights "
        f"{result['weight_bytes'] / 1e6:,.0f} MB{peak}",
        file=sys.stderr,
    )


def _check(model: str, ids: Any, scores: Any) -> Any:
    """A logits processor. Without it, the text of a broken model is silence."""
    from pyprune.models import ModelError

    if not scores.isfinite().all():
        raise ModelError(f"model {model}: its logits are not finite; look for NaN and infinity in its weights")
    return scores


def _encode(tokenizer: Any, text: str, chat: bool) -> Any:
    """The prompt's tokens [1, N], with their attention mask."""
    if not text.strip():
        raise ValueError("--prompt is empty; give some text to continue")
    if not chat:
        return tokenizer(text, return_tensors="pt")
    if tokenizer.chat_template is None:
        raise ValueError("--chat: the model's tokenizer has no chat template; leave --chat out")
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def _padding(tokenizer: Any) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class _Stream:
    """Prints text as it comes, and notes when each token came; transformers calls `put` and `end`."""

    def __init__(self, tokenizer: Any, shown: bool) -> None:
        from transformers import TextStreamer

        self.printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if shown else None
        self.times: list[float] = []
        self.prompt = True

    def put(self, value: Any) -> None:
        """The prompt first, then every new token."""
        if not self.prompt:
            self.times.append(time.perf_counter())
        self.prompt = False
        if self.printer:
            self.printer.put(value)

    def end(self) -> None:
        """After the last token."""
        if self.printer:
            self.printer.end()
