"""One-shot runs: from text and a dense checkpoint to calibration batches and a pruned model.

What `pyprune prune`, `pyprune compare` and the benchmarks share.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pyprune import checkpoint, evaluation
from pyprune.blockwise import Step, check, prune, reads_text
from pyprune.calibration import Keep
from pyprune.data import DataError, Document, encode, held_out_stream
from pyprune.methods import option
from pyprune.models import open_model, open_skeleton, open_tokenizer
from pyprune.runs import Run, environment, write_json

log = logging.getLogger("pyprune")


@dataclass
class Recipe:
    """What is the same for all methods that are compared."""

    calibration_windows: int = option(128, "windows of calibration text")
    calibration_window: int = option(2048, "tokens in one of them")
    batch_size: int = option(1, "windows in one forward pass")
    keep: str = option("host", "where hidden states lie meanwhile", choices=["device", "host", "disk"])
    dtype: str = option("auto", "dtype of the model's weights", choices=["auto", "float32", "bfloat16", "float16"])
    seed: int = option(0, "seed of everything that is random")
    eval_window: int = option(2048, "tokens in a window that measures perplexity")
    eval_tokens: int | None = option(None, "held-out tokens to measure on (default: all)")
    prompt_tokens: int = option(128, "tokens of the prompt where speed is measured")
    new_tokens: int = option(32, "tokens decoded to measure speed")

    def __post_init__(self) -> None:
        evaluation.check_recipe(self, calibration_windows=1, calibration_window=2, batch_size=1)


def calibration_batches(documents: Iterable[Document], tokenizer: Any, recipe: Recipe) -> tuple[Tensor, ...]:
    """Token ids [B, T] of windows drawn by the seed. Raises DataError when the text has fewer than were asked for."""
    wanted = recipe.calibration_windows
    windows = encode(documents, tokenizer).windows(recipe.calibration_window)
    if len(windows) < wanted:
        raise DataError(
            f"the calibration text has {len(windows)} windows of {recipe.calibration_window} tokens, fewer than "
            f"calibration_windows={wanted}; give more text, or ask for fewer (calibration_windows) or shorter ones "
            "(calibration_window)"
        )
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))[:wanted]
    return windows.ids[chosen].split(recipe.batch_size)


class Pruning:
    """A one-shot method on one dense model. Building one reads and checks everything that is cheap to check and writes
    nothing; calling it works through the stages of a run and leaves `dense/`, a stock checkpoint with zeros in place,
    and `packed/`, the same packed."""

    def __init__(
        self,
        dense: str | Path,
        method: Any,
        calibration: Sequence[Document],
        held_out: Sequence[Document],
        recipe: Recipe,
        *,
        then: Sequence[Step] = (),
        trust_remote_code: bool = False,
        progress: bool = False,
    ) -> None:
        """`method`: a `blockwise.BlockMethod`. `held_out`: may be empty; then no perplexity is measured."""
        self.dense, self.recipe, self.then = dense, recipe, then
        self.trust_remote_code, self.progress = trust_remote_code, progress
        self.tokenizer = open_tokenizer(dense, trust_remote_code)
        self._batches = cache(lambda: calibration_batches(calibration, self.tokenizer, recipe))
        self._choose(method)
        measured = (self.tokenizer, recipe.eval_window, recipe.eval_tokens)
        self.held_out = held_out_stream(held_out, *measured) if held_out else None

    def another(self, method: Any) -> Pruning:
        """The same model, text and recipe with another method; the text is not encoded again."""
        other = copy.copy(self)
        other._choose(method)
        return other

    def _choose(self, method: Any) -> None:
        check(open_skeleton(self.dense, self.trust_remote_code), method)
        self.method = method
        self.calibration = self._batches() if reads_text(method) else ()

    def __call__(self, run: Run) -> dict[str, Any]:
        """Does what is not done yet, writes summary.json and returns it."""
        before = run.stage("dense", self.measure_dense) if self.held_out is not None else {}
        pruned, after = self.stages(run)
        summary = {
            "method": ", then ".join(map(repr, (self.method, *self.then))),
            "dense_model": str(self.dense),
            **{key: pruned[key] for key in ("sparsity", "zeros", "size", "bytes_dense", "bytes_packed", "seconds")},
            "ppl_dense": before["perplexity"]["value"] if before else None,
            "ppl_pruned": after["perplexity"]["value"] if after else None,
            "evaluation": protocol(after) if after else None,
            "calibration": {
                "windows": sum(len(ids) for ids in self.calibration),
                "tokens": sum(ids.numel() for ids in self.calibration),
            },
            "blocks": pruned["blocks"],
            "dtype": pruned["dtype"],
            "seed": self.recipe.seed,
            **environment(),
        }
        write_json(run.folder / "summary.json", summary)
        return summary

    def stages(self, run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
        """The records of pruning, and of the pruned model loaded again (empty without held-out text)."""
        (run.folder / "stages").mkdir(parents=True, exist_ok=True)
        pruned = run.stage("prune", lambda: self._prune(run))
        shutil.rmtree(run.folder / "blocks", ignore_errors=True)
        if self.held_out is None:
            return pruned, {}
        return pruned, run.stage("reload", lambda: self._measure(run.folder / "dense"))

    def measure_dense(self) -> dict[str, Any]:
        """The record of the dense model."""
        return self._measure(self.dense)

    def _prune(self, run: Run) -> dict[str, Any]:
        model = open_model(self.dense, self.recipe.dtype, self.trust_remote_code)
        pruned = prune(
            model,
            self.method,
            self.calibration,
            then=self.then,
            folder=run.folder,
            keep=cast(Keep, self.recipe.keep),
            progress=self.progress,
        )
        folders = run.folder / "dense", run.folder / "packed"
        for folder, save in zip(folders, (checkpoint.save_dense, checkpoint.save), strict=True):
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed behind it
            save(model, self.tokenizer, folder)
        return {
            "sparsity": pruned.sparsity,
            "zeros": pruned.zeros,
            "size": pruned.size,
            "bytes_dense": weight_bytes(folders[0]),
            "bytes_packed": weight_bytes(folders[1]),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "blocks": [asdict(block) for block in pruned.blocks],
        }

    def _measure(self, path: str | Path) -> dict[str, Any]:
        assert self.held_out is not None
        text, window = self.held_out, self.recipe.eval_window
        model = open_model(path, self.recipe.dtype, self.trust_remote_code)
        found = evaluation.perplexity(model, text.ids, window, labels=text.labels, bos=text.bos, progress=self.progress)
        return {"perplexity": asdict(found)}


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's safetensors."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def protocol(record: dict[str, Any]) -> dict[str, int]:
    """What a perplexity was measured with."""
    return {key: record["perplexity"][key] for key in ("tokens", "window", "stride")}


class Comparison:
    """Several methods on one dense model: perplexity, size and speed side by side, in one table and one picture."""

    def __init__(self, prunings: Mapping[str, Pruning]) -> None:
        """`prunings`: by name, `Pruning.another` of each other; their model and text are the first one's."""
        self.prunings = dict(prunings)
        self.first = next(iter(self.prunings.values()))

    def __call__(self, run: Run) -> dict[str, Any]:
        """Does what is not done yet, writes summary.json and comparison.png and returns the summary."""
        dense = run.stage("dense", self.first.measure_dense)
        rows = []
        for name, pruning in self.prunings.items():
            pruned, after = pruning.stages(Run(run.folder / name))
            speed = run.stage(f"{name}-speed", partial(self._speed, run.folder / name / "packed"))
            rows.append(
                {
                    "method": name,
                    "options": repr(pruning.method),
                    "sparsity": pruned["sparsity"],
                    "perplexity": after["perplexity"]["value"],
                    "bytes": pruned["bytes_packed"],
                    "tokens_per_second": speed["tokens_per_second"],
                    "decode_speedup": speed["decode_speedup"],
                    "seconds": pruned["seconds"],
                }
            )
        bytes_dense = weight_bytes(run.folder / rows[0]["method"] / "dense")
        summary = {
            "dense": {"perplexity": dense["perplexity"]["value"], "bytes": bytes_dense},
            "methods": rows,
            "evaluation": protocol(dense),
            "dense_model": str(self.first.dense),
            **environment(),
        }
        write_json(run.folder / "summary.json", summary)
        picture(summary, run.folder / "comparison.png")
        return summary

    def _speed(self, packed: Path) -> dict[str, float]:
        """Decoding of the packed model, with the dense one in turn."""
        r, trust = self.first.recipe, self.first.trust_remote_code
        models = {"dense": open_model(self.first.dense, r.dtype, trust), "packed": open_model(packed, r.dtype, trust)}
        found = evaluation.latency(models, r.prompt_tokens, r.new_tokens, progress=self.first.progress)
        return {
            "tokens_per_second": 1 / found["packed"].decode,
            "decode_speedup": found["dense"].decode / found["packed"].decode,
        }


def picture(summary: dict[str, Any], path: Path) -> None:
    """Perplexity over bytes and over decoding speed, a point for each method; left out where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        log.warning("no picture: matplotlib is not installed (pip install pyprune[report])")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = {"method": "dense", "decode_speedup": 1.0, **summary["dense"]}
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")
    for axes, key, unit, label in (
        (panels[0], "bytes", 1e6, "weights on disk (MB)"),
        (panels[1], "decode_speedup", 1, "decoding speed, batch 1 (dense = 1, measured in turn)"),
    ):
        for row in (dense, *summary["methods"]):
            point = row[key] / unit, row["perplexity"]
            axes.plot(*point, marker="o")
            axes.annotate(row["method"], point, xytext=(5, 5), textcoords="offset points", fontsize=9)
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel(f"perplexity, {summary['evaluation']['tokens']:,} held-out tokens")
    figure.savefig(path, dpi=160)
    pyplot.close(figure)
