"""First-token latency and decoding of whole models: dense, hidden size cut, 2:4, bitmap; on a GPU at full 7B shapes.

    python benchmarks/bench_serving.py --device cuda --save
    python benchmarks/bench_serving.py --shape llama-2048 --layers 22 --batches 1 --prompts 128 --threads 2 --save

Weights are random, which changes no time. Every variant takes turns with the dense model. A decoded token is one
forward pass of one position per sequence over a cache of fixed size, on a GPU one CUDA graph, as a server runs it; the
floor is the bytes of the weights that it reads. A prompt's floor is its products' operations, or those bytes. Before a
packed model is timed, its logits must be those of the dense model with the same zeros.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import torch
from bench_generate import read_bytes, zero
from harness import Case, Contender, run
from models import SHAPES, check_equal, conditions, logits
from results import append
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import pyprune

SPARSE = ("2:4", "50%", "70%")
HIDDEN = {"-20% hidden": 0.20, "-25% hidden": 0.25, "-30% hidden": 0.30, "-50% hidden": 0.50}


def build(shape: str, layers: int | None, device: torch.device, removed: float = 0.0) -> nn.Module:
    """A stock bf16 Llama with small random weights whose hidden size lost a share, to a multiple of 64: what PAT and
    SliceGPT export. Heads and FFN channels stay."""
    fields = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    head = fields["hidden_size"] // fields["num_attention_heads"]
    hidden = round(fields["hidden_size"] * (1 - removed) / 64) * 64
    config = LlamaConfig(**{**fields, "hidden_size": hidden, "head_dim": head, "max_position_embeddings": 8192})
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def prompt_step(model: nn.Module, ids: Tensor) -> Tensor:
    """The first token of prompts [batch, tokens]."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


class Decoding:
    """Prompts in a cache of `context` positions; each step writes the same one and attends to all."""

    def __init__(self, model: Any, batch: int, context: int, device: torch.device) -> None:
        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=context)
        self.token = torch.ones(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.full((batch, 1), context - 1, device=device)
        self.mask = torch.ones(batch, 1, 1, context, dtype=torch.bool, device=device)

    @torch.inference_mode()
    def step(self) -> Tensor:
        for layer in self.cache.layers:
            layer.cumulative_length.zero_()  # not `reset`, which would also write the whole cache
        return self.model(
            input_ids=self.token,
            position_ids=self.positions,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        ).logits


def operations(model: nn.Module, tokens: int) -> int:
    """Of the linears: two a weight and token; what is packed counts as dense."""
    size = sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and "lm_head" not in name
    )
    return 2 * size * tokens


def variants(
    names: list[str], dense: nn.Module, shape: str, layers: int | None, device: torch.device
) -> Iterator[tuple[str, nn.Module]]:
    """The models to compare with the dense one, one at a time; what is packed is checked."""
    ids = torch.randint(dense.config.vocab_size, (1, 16), device=device)
    for name in names:
        if name in HIDDEN:
            yield name, build(shape, layers, device, HIDDEN[name])
            continue
        packed = copy.deepcopy(dense)
        zero(packed, name)
        expected = logits(packed, ids)
        pyprune.sparsify(packed, measure=False)
        check_equal(f"{name} packed against dense with the same zeros", logits(packed, ids), expected, torch.bfloat16)
        yield name, packed


def main() -> None:
    """Runs all variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="llama-7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="of the shape's blocks (default: all)")
    parser.add_argument("--variants", nargs="+", default=[*SPARSE, *HIDDEN], choices=[*SPARSE, *HIDDEN])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32], help="sequences that are decoded at once")
    parser.add_argument("--context", type=int, default=512, help="positions of the cache")
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 2048], help="tokens of one prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(conditions(arguments.threads))
    dense = build(arguments.shape, arguments.layers, device)
    label = f"{arguments.shape} {dense.config.num_hidden_layers} layers bfloat16"
    for name, model in variants(arguments.variants, dense, arguments.shape, arguments.layers, device):
        sides = {"dense": dense, name: model}
        for batch in arguments.batches:
            decoding = {side: Decoding(m, batch, arguments.context, device) for side, m in sides.items()}
            contenders = {side: Contender(d.step, lambda: ()) for side, d in decoding.items()}
            title = f"{label} batch={batch} context={arguments.context}"
            case = Case("decode a token", title, contenders, read_bytes(model), batch * read_bytes(model))
            save(run(case, device, arguments.rounds), arguments)
        for tokens in arguments.prompts:
            ids = torch.randint(dense.config.vocab_size, (1, tokens), device=device)
            contenders = {
                side: Contender(lambda m=m, ids=ids: prompt_step(m, ids), lambda: ()) for side, m in sides.items()
            }
            title = f"{label} prompt={tokens}"
            case = Case("first token", title, contenders, read_bytes(model), operations(model, tokens))
            save(run(case, device, arguments.rounds), arguments)
        del model, sides, contenders


def save(rows: list[Any], arguments: argparse.Namespace) -> None:
    """Keeps rows at once, so that what was measured stays when a later variant fails."""
    if arguments.save:
        append(rows, arguments.device)


if __name__ == "__main__":
    main()
