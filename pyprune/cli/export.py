"""`pyprune export MODEL --out FOLDER`: a packed checkpoint of a model with zeros, or a dense one of a packed model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "pack a model with zeros, or unpack it (--dense)"


def options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a checkpoint, dense or packed")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write; new or empty")
    parser.add_argument("--dense", action="store_true", help="write a stock checkpoint, zeros and all")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: 5GB)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pyprune import checkpoint, models

    tokenizer = models.open_tokenizer(args.model, args.trust_remote_code)
    model = models.open_model(args.model, args.dtype, args.trust_remote_code)
    result: dict[str, Any] = {"model": args.model, "out": str(args.out), "format": "dense" if args.dense else "packed"}
    if args.dense:
        checkpoint.save_dense(model, tokenizer, args.out, max_shard_size=args.max_shard_size)
    else:
        report = checkpoint.save(model, tokenizer, args.out, max_shard_size=args.max_shard_size)
        result |= {"packed": report.packed, "linears": len(report.layers), "report": str(report)}
        result |= {"dense_bytes": report.dense_bytes, "bytes": report.bytes}
    return result


def show(result: dict[str, Any]) -> None:
    if "report" in result:
        print(result["report"])
        if result["packed"] == 0:
            print("nothing was packed, for there are too few zeros: `pyprune prune` makes some")
    print(f"written to {result['out']}")
