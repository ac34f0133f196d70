"""Run folders as the commands leave them, written by hand, so that every figure is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LINEARS = {"self_attn.q_proj": (8, 8), "mlp.down_proj": (8, 16)}
EVALUATION = {"tokens": 640, "window": 64, "stride": 64}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def shape(hidden: int, blocks: int = 2) -> dict[str, Any]:
    """What `runs.shape_of` says of a model whose hidden size was 8."""
    linears = {
        f"model.layers.{i}.{name}": [rows, columns] for i in range(blocks) for name, (rows, columns) in LINEARS.items()
    }
    smaller = {name: [hidden if size == 8 else size for size in sizes] for name, sizes in linears.items()}
    params = sum(rows * columns for rows, columns in smaller.values())
    return {"params": params, "block_params": params, "bytes": 4 * params, "dtype": "float32", "linears": smaller}


def perplexity(value: float) -> dict[str, Any]:
    return {"perplexity": {"value": value, "nll": 0.0, **EVALUATION}}


def tuned(folder: Path, method: str = "pat", *, dense: float = 20.0, ppl: float = 25.0, hidden: int = 6) -> Path:
    """A finished run of `pyprune tune` with LoRA beside it."""
    write(folder / "config.json", {"command": "tune", "method": method, "baselines": ["lora"], "steps": 40})
    stages = {
        "dense": {**shape(8), "hidden_size": 8, **perplexity(dense), "seconds": 1.0},
        "lora": {**shape(8), **perplexity(dense - 1), "training": {"seconds": 3.0}, "seconds": 4.0},
        method: {**shape(hidden), "training": {"seconds": 5.0}, "seconds": 6.0},
        "reload": {**shape(hidden), **perplexity(ppl), "seconds": 1.0},
        "speed": {
            "speedup": {"prefill": 1.2, "prefill_limit": 1.5, "decode": 1.1, "decode_limit": 1.4},
            "seconds": 1.0,
        },
    }
    for name, record in stages.items():
        write(folder / "stages" / f"{name}.json", record)
    masks = [{"mask_going": 1 - i / 20, "mask_going_max": 1 - i / 40, "mask_count": 8 - i // 10} for i in range(20)]
    masks = [{**mask, "mask_staying": 1.0, "mask_staying_min": 0.5 + i / 40} for i, mask in enumerate(masks)]
    lines = [
        {"stage": stage, "step": step, "loss": 3 - step / 40, "tokens": 100 * step, **figures}
        for stage in ("lora", method)
        for step in range(1, 41)
        for figures in [masks[step - 1] if stage == method and step <= 20 else {}]
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = {"started": "2026-01-02T03:04:05+00:00", "command": ["pyprune", "tune", "a model"]}
    versions = {"versions": {"torch": "2.13.0"}, "hardware": {"cpu": "EPYC", "cores": 2, "threads": 1, "gpu": None}}
    (folder / "commands.jsonl").write_text(json.dumps({**command, **versions, "commit": "0123456789abcdef"}) + "\n")
    write(folder / "summary.json", {"method": method, "ppl_dense": dense, "ppl_pruned": ppl, "evaluation": EVALUATION})
    return folder


def pruned(folder: Path, *, dense: float = 20.0, ppl: float = 30.0, zeros: tuple[int, int] = (32, 96)) -> Path:
    """A finished run of `pyprune prune`; `zeros`: of each linear of the first block; the second has half of them."""
    write(folder / "config.json", {"command": "prune", "method": "wanda", "eval_data": "x", "calibration_windows": 4})
    sizes = {name: rows * columns for name, (rows, columns) in LINEARS.items()}
    blocks = [
        {
            "name": f"model.layers.{i}",
            "sizes": sizes,
            "zeros": dict(zip(sizes, (n // (i + 1) for n in zeros), strict=True)),
            "seconds": 1.0,
        }
        for i in range(2)
    ]
    gone = sum(sum(block["zeros"].values()) for block in blocks)  # type: ignore[attr-defined]
    record = {"sparsity": gone / (2 * sum(sizes.values())), "bytes_dense": 1536, "bytes_packed": 900, "blocks": blocks}
    write(folder / "stages" / "dense.json", {**perplexity(dense), "seconds": 1.0})
    write(folder / "stages" / "prune.json", {**record, "seconds": 7.0})
    write(folder / "stages" / "reload.json", {**perplexity(ppl), "seconds": 1.0})
    write(
        folder / "summary.json", {"method": "Wanda()", **record, "ppl_dense": dense, "ppl_pruned": ppl, "zeros": gone}
    )
    return folder


def compared(folder: Path) -> Path:
    """A finished run of `pyprune compare` of two methods."""
    methods = {"wanda": 30.0, "magnitude": 90.0}
    write(folder / "config.json", {"command": "compare", "methods": dict.fromkeys(methods, "")})
    write(folder / "stages" / "dense.json", {**perplexity(20.0), "seconds": 1.0})
    for name, value in methods.items():
        pruned(folder / name, ppl=value)
        for extra in ("config.json", "summary.json", "stages/dense.json"):
            (folder / name / extra).unlink()
        write(
            folder / "stages" / f"{name}-speed.json", {"tokens_per_second": 9.0, "decode_speedup": 1.5, "seconds": 1.0}
        )
    rows = [{"method": name, "perplexity": value, "bytes": 900} for name, value in methods.items()]
    write(
        folder / "summary.json",
        {"dense": {"perplexity": 20.0, "bytes": 1536}, "methods": rows, "evaluation": EVALUATION},
    )
    return folder
