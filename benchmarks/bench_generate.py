"""Decoding with packed weights against the dense bf16 model itself: tokens per second, and memory.

    python benchmarks/bench_generate.py --threads 2 --save

Weights are random, which changes no time; a share of them is zero, at random places, in all linears but the head. Dense
and packed model take turns token by token, so that whatever else the machine does slows both. Time is that of the wall
and that of the processor (all threads): on a busy machine only the second compares. Before anything is timed, the
packed model's logits must be those of the dense model with the same zeros.

Two limits stand beside each gain: the bytes that a token reads (all packed and dense weights, the head too), dense over
packed. Memory is the peak resident set of a process that loads the packed checkpoint and decodes, less what it had
before, beside the bytes of the tensors in the checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from models import SHAPES, check_equal, conditions, logits, percentiles
from results import Row, append
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import pyprune
from pyprune import checkpoint, ops
from pyprune.evaluation import peak_memory
from pyprune.reference.bits import unpack_bits

GOAL = {"50%": 1.4}
VARIANTS = ("50%", "70%", "2:4")
WARM_UP = 2


def build(shape: str, layers: int) -> Any:
    """A stock bf16 Llama with small random weights, the same at every call."""
    config = LlamaConfig(**{**SHAPES[shape], "num_hidden_layers": layers})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def zero(model: nn.Module, variant: str) -> None:
    """Zeroes a share of all linears but the head: "50%" at random places, or "2:4"."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            module.weight.mul_(kept(module.weight, variant))


def kept(weight: Tensor, variant: str) -> Tensor:
    """A random mask [out, in]."""
    scores = torch.rand_like(weight, dtype=torch.float32)
    if variant.endswith("%"):
        return scores >= float(variant[:-1]) / 100
    bits, _ = ops.nm_prune(scores, *map(int, variant.split(":")))
    return unpack_bits(bits, weight.shape[1])


def read_bytes(model: nn.Module) -> int:
    """What a decoded token reads: every parameter but the embedding, which is read too where it is the head."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight  # type: ignore[operator]
    return sum(p.nbytes for p in model.parameters() if p is head or p is not embedding)


class Decoder:
    """A model in the middle of a text."""

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self.model, self.cache = model, DynamicCache()
        self.token = self._step(prompt)

    @torch.inference_mode()
    def _step(self, ids: Tensor) -> Tensor:
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)

    def step(self) -> tuple[float, float]:
        """One token: seconds of the wall and of the processor."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.token = self._step(self.token)
        return time.perf_counter() - wall, time.process_time() - cpu


def decode(models: dict[str, nn.Module], prompt: Tensor, tokens: int) -> dict[str, list[tuple[float, float]]]:
    """Times of each model's tokens, the models in turn."""
    decoders = {name: Decoder(model, prompt) for name, model in models.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for token in range(WARM_UP + tokens):
        for name, decoder in decoders.items():
            measured = decoder.step()
            if token >= WARM_UP:
                times[name].append(measured)
    return times


def run(dense: Any, variant: str, case: str, batches: list[int], tokens: int, memory: bool) -> list[Row]:
    """One kind of zeros: checks, times, prints, and returns the rows."""
    packed = copy.deepcopy(dense)
    zero(packed, variant)
    ids = torch.randint(dense.config.vocab_size, (1, 16))
    expected = logits(packed, ids)
    report = pyprune.sparsify(packed, measure=False)
    print(f"\n{case} {variant}\n{report}")
    check_equal("packed against dense with the same zeros", logits(packed, ids), expected, torch.bfloat16)
    rows = []
    limit = read_bytes(dense) / read_bytes(packed)
    for batch in batches:
        prompt = torch.randint(dense.config.vocab_size, (batch, 16))
        times = decode({"dense": dense, "pyprune": packed}, prompt, tokens)
        name = f"{case} {variant} batch={batch}"
        for place, unit in enumerate(("ms a token", "CPU ms a token")):
            found = {who: percentiles([1e3 * pair[place] for pair in pairs]) for who, pairs in times.items()}
            found["limit"] = tuple(value / limit for value in found["dense"])
            gain = found["dense"][1] / found["pyprune"][1]
            goal = f", goal {GOAL[variant]}x" if variant in GOAL and batch == 1 else ""
            before, after = (batch * 1e3 / found[who][1] for who in ("dense", "pyprune"))
            speed = f"{before:.2f} -> {after:.2f} tokens/s"
            print(f"  batch {batch}: {gain:.2f}x by {unit} (limit {limit:.2f}x{goal}), {speed}")
            rows += [Row("generate", name, who, unit, *values) for who, values in found.items()]
    return rows + (peak(packed, f"{case} {variant}") if memory else [])


def peak(packed: Any, case: str) -> list[Row]:
    """Memory of a process of its own that loads the packed checkpoint and decodes."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(packed, None, Path(folder) / "packed")
        command = [sys.executable, __file__, "--peak", str(Path(folder) / "packed")]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    computed = sum(parameter.nbytes for parameter in packed.parameters())
    print(f"  peak memory {found['peak'] / 1e6:.0f} MB above the start, tensors {computed / 1e6:.0f} MB")
    values = {"pyprune": found["peak"], "computed": computed}
    return [Row("generate memory", case, who, "MB", *[value / 1e6] * 3) for who, value in values.items()]


def measure_peak(folder: str) -> None:
    """What `peak` runs in a process of its own: JSON on stdout."""
    with peak_memory() as before:
        pass
    with peak_memory() as after:
        model = AutoModelForCausalLM.from_pretrained(folder)
        decode({"packed": model}, torch.zeros(1, 16, dtype=torch.long), 4)
    print(json.dumps({"peak": (after.bytes or 0) - (before.bytes or 0)}))


def main() -> None:
    """Runs all kinds of zeros."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2048", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=22, help="22 make a TinyLlama-1.1B")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--memory", action="store_true", help="measure the peak too (writes the checkpoint to a temporary folder)"
    )
    parser.add_argument("--save", action="store_true", help="append to results.csv")
    parser.add_argument("--peak", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return measure_peak(arguments.peak)
    torch.set_num_threads(arguments.threads)
    print(conditions(arguments.threads))
    dense = build(arguments.shape, arguments.layers)
    case = f"{arguments.shape} {arguments.layers} layers bfloat16"
    rows = []
    for variant in arguments.variants:
        rows += run(dense, variant, case, arguments.batches, arguments.tokens, arguments.memory)
    if arguments.save:
        append(rows)


if __name__ == "__main__":
    main()
