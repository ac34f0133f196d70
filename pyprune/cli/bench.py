"""`pyprune bench`: every op on this machine, beside eager torch; `pyprune bench MODEL [--against MODEL]`: a model."""

from __future__ import annotations

import argparse
import dataclasses
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HELP = "speed on this machine: of the ops, or of a model beside another"
PACKAGES = ("pyprune", "torch", "transformers")


def options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="folder or hub name of a checkpoint, dense, cut or packed (default: the ops are measured)",
    )
    parser.add_argument("--against", metavar="MODEL", help="another checkpoint, measured in turn with the first")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: seconds instead of minutes")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="of the ops (default: cuda if there is one)")
    models = parser.add_argument_group("of a model")
    models.add_argument("--batches", metavar="LIST", help="sequences decoded together (default: 1,4,16; --quick: 1)")
    models.add_argument("--prompt-tokens", type=int, metavar="N", help="of each prompt (default: 128; --quick: 32)")
    models.add_argument("--new-tokens", type=int, metavar="N", help="decoded in a row (default: 32; --quick: 8)")
    models.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    models.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    if args.model is None and args.against is not None:
        raise ValueError(f"--against {args.against}: there is no MODEL to measure against it")
    wanted = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; leave --device out")
    if args.model is not None and args.device is not None:
        raise ValueError("--device is for the ops; a model runs on the GPU if there is one")
    device = torch.device(wanted)
    machine = _machine(device)
    _rates(device)  # measured before the run, and again at its end: others may be at work during one of them
    found = _ops(device, args.quick) if args.model is None else _models(args)
    return machine | _rates(device) | found


def _machine(device: Any) -> dict[str, Any]:
    """What is measured where and when; a warning on a CPU that others use."""
    import torch

    from pyprune import info, timing
    from pyprune.console import console

    threads, load = torch.get_num_threads(), timing.load()
    if device.type == "cpu" and timing.busy(threads):
        console.print(
            f"load {load:.1f} beside {threads} threads: others are at work here, so neither times nor limits are to be "
            "trusted; run this on an idle machine",
            style="yellow",
        )
    return {
        "device": info.processor() if device.type == "cpu" else torch.cuda.get_device_name(),
        "threads": threads,
        "load": load,
        "versions": {name: info.version_of(name) for name in PACKAGES},
        "commit": info.commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _rates(device: Any) -> dict[str, Any]:
    """The limits of the device, as far as they are known now (`timing.measure_again`)."""
    import torch

    from pyprune import timing

    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float32)}
    return {
        "copy_bandwidth": timing.copy_bandwidth(device),
        "matmul_rates": {name: timing.matmul_rate(device, dtype) for name, dtype in dtypes.items()},
    }


def _ops(device: Any, quick: bool) -> dict[str, Any]:
    from pyprune import speed, timing
    from pyprune.console import progress_bar

    found: list[tuple[str, speed.OpSpeed]] = []
    with progress_bar("{task.fields[case]}") as bar:
        task = bar.add_task("ops", total=None, case="")
        for size in ("SmolLM2-135M",) if quick else speed.SIZES:
            for case in speed.cases(size, device, (1, 64) if quick else (1, 16, 256)):
                bar.update(task, advance=1, case=f"{size}: {case.op} {case.label}")
                found.append((size, speed.measure(case, device, *((5, 0.2) if quick else ()))))
    timing.measure_again()
    return {
        "ops": [{"model": size, **dataclasses.asdict(speed.with_floor(one, device))} for size, one in found],
    }


def _models(args: argparse.Namespace) -> dict[str, Any]:
    from pyprune import models, speed

    load = _load(args)
    paths = {name: path for name, path in (("model", args.model), ("against", args.against)) if path is not None}
    for path in paths.values():
        models.check_model(path)
    memory = {name: speed.memory(path, load, args.dtype, args.trust_remote_code) for name, path in paths.items()}
    opened = {name: models.open_model(path, args.dtype, args.trust_remote_code) for name, path in paths.items()}
    speeds = speed.compare(opened, load, progress=True)
    found = {
        name: {
            "path": path,
            "weight_bytes": memory[name].weights,
            "peak_bytes": memory[name].peak,
            "speed": [_speed(one) for one in speeds[name]],
        }
        for name, path in paths.items()
    }
    return {"models": found, **dataclasses.asdict(load)}


def _speed(one: Any) -> dict[str, Any]:
    """A `speed.ModelSpeed`, its repeats as percentiles."""
    found = {**dataclasses.asdict(one), "tokens_per_second": one.tokens_per_second}
    for name, samples in (("first_token", one.first_tokens), ("token", one.tokens)):
        del found[f"{name}s"]
        found |= {f"{name}_p20": samples.p20, f"{name}_p80": samples.p80}
    return found


def _load(args: argparse.Namespace) -> Any:
    from pyprune.speed import Load

    quick: dict[str, Any] = {"batches": (1,), "prompt_tokens": 32, "new_tokens": 8, "repeats": 3}
    chosen = quick if args.quick else {}
    if args.batches is not None:
        try:
            chosen["batches"] = tuple(int(batch) for batch in args.batches.split(","))
        except ValueError:
            raise ValueError(f"--batches {args.batches}: expected numbers separated by commas") from None
    for name in ("prompt_tokens", "new_tokens"):
        if getattr(args, name) is not None:
            chosen[name] = getattr(args, name)
    return Load(**chosen)


# -------------------------------------------------------------------------------------------------------------- shown


def show(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    console.print(_op_table(result["ops"]) if "ops" in result else _model_table(result["models"]))
    if any(share.startswith("doubtful") for share in _shares(result)):
        console.print("doubtful: faster than a limit, which was measured too low beside others' work, or read a cache")
    if any(_launched(row, result["ops"]) for row in result.get("ops", ())):
        console.print("* with the time to launch it, which reads a result back and cannot be a CUDA graph")
    for found in result.get("models", {}).values():
        peak = "" if found["peak_bytes"] is None else f", {found['peak_bytes'] / 1e6:,.0f} MB at the peak"
        console.print(f"{found['path']}: {found['weight_bytes'] / 1e6:,.0f} MB of weights{peak}", highlight=False)
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {name}" for name, rate in result["matmul_rates"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    console.print(
        f"{result['device']}, {result['threads']} threads. Limits by what it reaches now: copies "
        f"{result['copy_bandwidth'] / 1e9:,.1f} GB/s read and written, products {rates}. {versions}.",
        highlight=False,
    )


def _shares(result: dict[str, Any]) -> list[str]:
    """Of the limits' speed, as the tables show them."""
    from pyprune import timing

    pairs = [(row["floor"], row["p50"]) for row in result.get("ops", ())]
    for one in (one for found in result.get("models", {}).values() for one in found["speed"]):
        pairs += [(one[f"{name}_floor"], one[name]) for name in ("first_token", "token")]
    return [timing.share(*pair) for pair in pairs]


def _launched(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether launches count for this one but not for others."""
    return not row["graph"] and any(other["graph"] for other in rows)


def _op_table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    from pyprune import timing

    table = Table(title="ops on cold data, nm at 2:4: medians in ms", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("op", "pyprune", "torch", "gain", "limit", "reached"):
        table.add_column(column, justify="left" if column == "op" else "right", no_wrap=column != "op")
    for index, row in enumerate(rows):
        plain = " (plain torch)" if row["runs"] == "reference" else ""
        table.add_row(
            f"{row['op']}{'*' if _launched(row, rows) else ''} {row['label']}{plain}",
            *(f"{1e3 * row[side]:.3g}" for side in ("p50", "eager")),
            f"{row['eager'] / row['p50']:.2f}x",
            f"{1e3 * row['floor']:.3g}",
            timing.share(row["floor"], row["p50"]),
            end_section=index + 1 < len(rows) and rows[index + 1]["model"] != row["model"],
        )
    return table


def _model_table(models: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    from pyprune import timing

    table = Table(title="models in turn: medians", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("model", "batch", "first token, ms", "reached", "tokens/s", "reached"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=column != "model")
    for name, found in models.items():
        for place, one in enumerate(found["speed"]):
            first = rate = ""
            if name == "model" and "against" in models:
                base = models["against"]["speed"][place]
                first = f" ({base['first_token'] / one['first_token']:.2f}x)"
                rate = f" ({one['tokens_per_second'] / base['tokens_per_second']:.2f}x)"
            table.add_row(
                "" if place else Path(found["path"]).name,
                str(one["batch"]),
                f"{1e3 * one['first_token']:,.1f}{first}",
                timing.share(one["first_token_floor"], one["first_token"]),
                f"{one['tokens_per_second']:,.1f}{rate}",
                timing.share(one["token_floor"], one["token"]),
                end_section=place + 1 == len(found["speed"]),
            )
    return table
