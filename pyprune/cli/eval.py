"""`pyprune eval MODEL --text FILE`: perplexity."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

HELP = "perplexity of a model on a text"


def options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a transformers checkpoint in safetensors")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text, jsonl or parquet")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens a window reads (default: 512)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: the window)")
    parser.add_argument("--tokens", type=int, metavar="N", help="measure on the first N tokens (default: all)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pyprune import data, evaluation, models

    if args.tokens is not None and args.tokens < args.window:
        raise ValueError(f"--tokens {args.tokens} is smaller than a window of {args.window}")
    tokenizer = models.open_tokenizer(args.model, args.trust_remote_code)
    stream = data.encode(data.read_documents(args.text, tokenizer), tokenizer)
    ids, labels = stream.ids[: args.tokens], stream.labels[: args.tokens]
    if len(ids) < args.window:
        raise data.DataError(f"{args.text} has {len(ids)} tokens, fewer than one window of {args.window}")
    model = models.open_model(args.model, args.dtype, args.trust_remote_code)
    found = evaluation.perplexity(model, ids, args.window, args.stride, labels=labels, bos=stream.bos, progress=True)
    return {"model": args.model, "text": str(args.text), "perplexity": found.value, **dataclasses.asdict(found)}


def show(result: dict[str, Any]) -> None:
    print(
        f"perplexity {result['perplexity']:.4f} (nll {result['nll']:.6f} nats) on {result['tokens']:,} tokens of "
        f"{result['text']}, window {result['window']}, stride {result['stride']}"
    )
