"""Peak memory of scoring groups: LoRAPrune's training step, Taylor with stored gradients (LLM-Pruner), and streamed.

    python benchmarks/structured_memory.py --save                8 of the 22 blocks of a Llama of 1.1 B parameters
    python benchmarks/structured_memory.py --blocks 22           all of them: needs 8 GB for the gradients of "mixed"
    python benchmarks/structured_memory.py --blocks 22 --jobs 6  all variants at a time, on a GPU

Beside LoRAPrune on a base in bf16 stand bases in 8 and 4 bits (bitsandbytes), whose weights have no gradients. Each
variant runs in a process of its own and reports its peak resident set above that of an empty process with torch, so the
weights count and the libraries do not. On a GPU it is the allocator's peak.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate import init_empty_weights
from models import SHAPES
from results import Row, append
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyprune import criteria
from pyprune.architectures import describe, weight_of
from pyprune.evaluation import peak_memory
from pyprune.methods.lora import LoRA

VARIANTS = (
    "loraprune",
    "loraprune, 8-bit base",
    "loraprune, 4-bit base",
    "taylor streamed",
    "taylor stored",
    "taylor-mixed stored",
)


def build(blocks: int, device: str, bits: int = 16) -> LlamaForCausalLM:
    """A Llama of hidden size 2048 in bf16 whose every weight is written, quickly and to no purpose; with fewer `bits`,
    the linears of its blocks are quantised one by one."""
    config = LlamaConfig(**SHAPES["llama-2048"] | {"num_hidden_layers": blocks})
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            filled = torch.full(parameter.shape, 0.01, dtype=torch.bfloat16, device=device)
            setattr(module, name, nn.Parameter(filled))
        for name, linear in module.named_children():
            if bits < 16 and isinstance(linear, nn.Linear) and linear is not model.lm_head:
                filled = torch.full(linear.weight.shape, 0.01, dtype=torch.bfloat16)
                setattr(module, name, quantised(filled, bits).to(device))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = bits == 8, bits == 4  # what PEFT looks at
    return model.to(device)


def quantised(weight: Tensor, bits: int) -> nn.Linear:
    """A linear of bitsandbytes, whose weight is quantised when it is moved to its device."""
    import bitsandbytes

    if bits == 8:
        linear = bitsandbytes.nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False, device="meta")
        linear.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False)
        return linear
    options = {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}
    linear = bitsandbytes.nn.Linear4bit(*weight.shape[::-1], bias=False, device="meta", **options)
    linear.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=linear)
    return linear


def loraprune(model: LlamaForCausalLM, ids: Tensor) -> None:
    """One step of LoRA at rank 8 with the scores of all groups."""
    adapted = LoRA(lora_rank=8, lora_alpha=16.0, lora_dropout=0.0).prepare(model)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    criteria.lora_scores(describe(adapted).groups())
    optimizer.step()


def taylor_stored(model: LlamaForCausalLM, ids: Tensor, mixed: bool) -> None:
    """LLM-Pruner's way: gradients of all weights are kept, and for `mixed` the mean of their squares too."""
    squares: dict[nn.Parameter, Tensor] = {}
    for row in ids if mixed else ():
        model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        for parameter in model.parameters():
            share = parameter.grad * parameter.grad / len(ids)
            squares[parameter] = squares[parameter].add_(share) if parameter in squares else share
        model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for groups in describe(model).groups():
        for part in groups.parts:
            w = weight_of(part.linear)
            importance = w * w.grad - (0.5 * w * squares[w] * w if mixed else 0)
            importance.abs().sum(1 - part.dim)


def measure(variant: str, blocks: int, samples: int, tokens: int, device: str) -> float:
    """Peak bytes of one variant in this process, above what was there before."""
    ids = torch.randint(100, (samples, tokens), device=device)
    with peak_memory(device) as before:
        pass
    with peak_memory(device) as peak:
        model = build(blocks, device, 8 if "8-bit" in variant else 4 if "4-bit" in variant else 16)
        if variant.startswith("loraprune"):
            loraprune(model, ids)
        elif variant == "taylor streamed":
            criteria.taylor(model, [ids])
        else:
            taylor_stored(model, ids, mixed="mixed" in variant)
    if peak.bytes is None or before.bytes is None:
        raise SystemExit("this system does not tell a process's memory")
    return peak.bytes - before.bytes


def less(found: dict[str, float], variant: str) -> str:
    """By how much LoRAPrune's variants stay below one of Taylor's."""
    if not variant.startswith("taylor"):
        return ""
    shares = {name: 1 - value / found[variant] for name, value in found.items() if name.startswith("loraprune")}
    return "".join(f"; {share:.1%} less by {name}" for name, share in shares.items())


def main() -> None:
    """Runs every variant, prints the shares, and keeps the rows with --save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    possible = [name for name in VARIANTS if "-bit" not in name or importlib.util.find_spec("bitsandbytes")]
    parser.add_argument("--variants", nargs="+", default=possible, choices=VARIANTS)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="variants at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(measure(a.one, a.blocks, a.samples, a.tokens, a.device))
        return
    case = f"hidden 2048, {a.blocks} blocks, bfloat16, {a.samples} x {a.tokens} tokens, {a.device}"

    def in_child(variant: str) -> float:
        child = [sys.executable, __file__, *sys.argv[1:], "--one", variant]
        return float(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout)

    found: dict[str, float] = {}
    for variant, nbytes in zip(a.variants, ThreadPoolExecutor(a.jobs).map(in_child, a.variants), strict=True):
        found[variant] = nbytes
        print(f"{variant}: {found[variant] / 2**30:.3f} GiB{less(found, variant)}", flush=True)
    rows = [Row("peak memory of scoring", case, name, "MiB", *[value / 2**20] * 3) for name, value in found.items()]
    if a.save:
        append(rows, a.device)


if __name__ == "__main__":
    main()
