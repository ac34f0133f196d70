"""Downstream tasks through lm-eval (EleutherAI's evaluation harness; `pip install "pyprune[eval]"`).

lm-eval brings the tasks, the prompts and the scores, this module the model: anything that `models.open_model` opens,
dense, cut or packed, where it lies. Two kinds of task need no network: `continuation`, made of any text, and a file of
multiple-choice questions.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pyprune.data import DataError, Document, jsonl_rows
from pyprune.info import version_of

PAT14 = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "copa",
    "hellaswag",
    "mmlu",
    "multirc",
    "openbookqa",
    "piqa",
    "rte",
    "social_iqa",
    "wic",
    "winogrande",
    "wsc",
)
"""lm-eval's names of the 14 tasks of PAT's Table 1 (arXiv 2408.14721). The paper scores the first capital word of a
generated answer; lm-eval compares likelihoods. So compare models by the one or by the other."""
GROUPS = {"pat14": PAT14}
"""Groups of ours, beside those of lm-eval; the mean of their accuracies is reported too."""
CONTINUATION = "continuation"
CONTEXT_WORDS, ENDING_WORDS, ENDINGS = 48, 12, 4
PACKAGES = ("pyprune", "lm_eval", "torch", "transformers", "datasets")


class TaskError(ValueError):
    """A task that cannot be run; the message names it, says why, and what to do."""


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: lm-eval's name, of a task or of a group of tasks that it aggregates.
        metric, filter: lm-eval's names, such as "acc" and "none".
        stderr: standard error of the value; None where lm-eval gives none.
        version: of the task; None for a group without one.
        fewshot: examples before each question; None for a group whose tasks differ.
        samples, available: how many questions were asked, and how many there are; None for a group.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    version: str | float | None
    fewshot: int | None
    samples: int | None
    available: int | None


@dataclass(frozen=True)
class Scores:
    """What `evaluate` measured.

    Attributes:
        scores: of everything that was asked for, and of all tasks inside of groups.
        asked: the names among them that were asked for, ours of groups replaced by their tasks.
        means: the mean accuracy of each of `GROUPS` that was asked for.
        limit, batch_size, seed: as they were given.
        versions: of the packages.
    """

    scores: list[Score]
    asked: list[str]
    means: dict[str, float]
    limit: int | None
    batch_size: int
    seed: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Tasks:
    """Tasks that are ready to be run, with their data.

    Attributes:
        names: as they were asked for.
        loaded: lm-eval's tasks and groups, by name; `GROUPS` replaced by their tasks.
        manager: lm-eval's index of tasks.
        seed: of everything random.
    """

    names: tuple[str, ...]
    loaded: dict[str, list[Any]]
    manager: Any
    seed: int


def load(names: Sequence[str], documents: Sequence[Document] | None = None, seed: int = 0) -> Tasks:
    """Finds tasks and their data.

    Args:
        names: tasks and groups of lm-eval, `pat14`, `continuation`, or paths: a .jsonl of questions (`questions`), or
            a .yaml as lm-eval documents it, with data files relative to the working directory.
        documents: the text that `continuation` is made of.
        seed: of the questions of `continuation`, and of few-shot examples.

    Raises:
        TaskError: lm-eval is missing, a task is unknown or named twice, its data cannot be had, or its file is wrong.
        DataError: a file or a text without questions.
    """
    expanded = [task for name in names for task in GROUPS.get(name, (name,))]
    _check(expanded, documents)
    with _quiet():
        manager = _manager(expanded)
        loaded = {name: _load(manager, name, documents, seed) for name in expanded}
    return Tasks(tuple(names), loaded, manager, seed)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> Scores:
    """Runs tasks on a transformers model, on the device it is on.

    Args:
        tasks: what `load` returned, for one call.
        fewshot: examples before each question (None: what each task says, mostly none; a task that insists on none
            gets none).
        limit: the first so many questions of each task (None: all).
        batch_size: sequences in a forward pass.

    Raises ValueError for an option that is out of range.
    """
    for option, value, least in (("fewshot", fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{option} is {value}; expected at least {least}")
    chosen, seed = [task for group in tasks.loaded.values() for task in group], tasks.seed
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        found: Any = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=chosen,
            task_manager=tasks.manager,
            num_fewshot=fewshot,
            limit=limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    scores = list(_scores(found))
    means = {name: _mean(scores, GROUPS[name]) for name in tasks.names if name in GROUPS}
    versions = {name: version_of(name) for name in PACKAGES}
    return Scores(scores, [_name(task) for task in chosen], means, limit, batch_size, seed, versions)


def _check(names: list[str], documents: Sequence[Document] | None) -> None:
    """What can be said before anything is read."""
    if importlib.util.find_spec("lm_eval") is None:
        raise TaskError('tasks need lm-eval, which is not installed: pip install "pyprune[eval]"')
    if not names:
        raise TaskError("no task is named; give some, such as continuation or arc_easy")
    if twice := [name for name in names if names.count(name) > 1]:
        raise TaskError(f"task {twice[0]} is named more than once; a result has each task once")
    for name in names:
        if _is_file(name) and not Path(name).is_file():
            raise TaskError(f"task file {name} does not exist; give a .jsonl of questions or a .yaml of lm-eval")
    if CONTINUATION in names and documents is None:
        raise TaskError(f"task {CONTINUATION} is made of a text; give one (--text FILE)")


# -------------------------------------------------------------------------------------------------------- local tasks


def questions(path: str | Path) -> list[dict[str, Any]]:
    """The questions of a .jsonl file: rows of `context` (a text), `choices` (at least two texts, one of which continues
    it after a space) and `answer` (the place of that one, from 0).

    Raises DataError, which names the line, for a row that is none.
    """
    found = []
    for where, row in jsonl_rows(Path(path)):
        choices = row.get("choices") if isinstance(row, dict) else None
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise DataError(f'{where}: expected "choices", a list of at least two texts that are not empty')
        if not isinstance(row.get("context"), str):
            raise DataError(f'{where}: expected "context", a text')
        answer = row.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise DataError(f'{where}: expected "answer", the place of the right choice, 0 to {len(choices) - 1}')
        found.append({"context": row["context"], "choices": choices, "answer": answer})
    if not found:
        raise DataError(f"task file {path} is empty: it holds no question")
    return found


def continuation(documents: Sequence[Document], seed: int = 0) -> list[dict[str, Any]]:
    """Which of four endings continues a passage of a text? Passages of 48 words with the 12 words that follow stand one
    after the other in every document; the wrong endings are those of other passages. In random order."""
    generator, length = random.Random(seed), CONTEXT_WORDS + ENDING_WORDS
    passages = []
    for document in documents:
        words = document.text.split()
        starts = range(0, len(words) - length + 1, length)
        passages += [
            (" ".join(words[s : s + CONTEXT_WORDS]), " ".join(words[s + CONTEXT_WORDS : s + length])) for s in starts
        ]
    endings = sorted({ending for _, ending in passages})
    if len(endings) < ENDINGS:
        raise DataError(
            f"the text has {len(endings)} passages of {length} words that end differently; {CONTINUATION} needs at "
            f"least {ENDINGS}: give more text"
        )
    generator.shuffle(passages)
    found = []
    for context, ending in passages:
        wrong = [other for other in generator.sample(endings, ENDINGS) if other != ending][: ENDINGS - 1]
        answer = generator.randrange(ENDINGS)
        found.append({"context": context, "choices": [*wrong[:answer], ending, *wrong[answer:]], "answer": answer})
    return found


def _multiple_choice(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's description of a task of these questions; the names of the fields stand for their values."""
    from datasets import Dataset, DatasetDict

    return {
        "task": name,
        "custom_dataset": lambda **_: DatasetDict({"test": Dataset.from_list(rows)}),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
        "metadata": {"version": 1.0},
    }


# ------------------------------------------------------------------------------------------------------ lm-eval's part


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's remarks on every task are not for our users; its errors are."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".jsonl", ".yaml", ".yml")


def _is_local(name: str) -> bool:
    return name == CONTINUATION or _is_file(name)


def _manager(names: list[str]) -> Any:
    """lm-eval's index of tasks. For its own ones it reads 15,000 files, in half a minute: only if one is needed."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=not all(map(_is_local, names)))
    for name in names:
        if not _is_local(name) and name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise TaskError(f"task {name} is unknown to lm-eval {version_of('lm_eval')}{hint}")
    return manager


def _load(manager: Any, name: str, documents: Sequence[Document] | None, seed: int) -> list[Any]:
    """lm-eval's task or group of this name, or the tasks that a tag of its stands for."""
    spec: str | dict[str, Any] = name
    if name == CONTINUATION:
        spec = _multiple_choice(name, continuation(documents or (), seed))
    elif Path(name).suffix == ".jsonl":
        spec = _multiple_choice(Path(name).stem, questions(name))
    try:
        found = manager.load([spec])
    except ImportError as error:
        raise TaskError(f'task {name} needs a package: {error}; pip install "pyprune[eval]" or that package') from error
    except OSError as error:
        raise TaskError(
            f"task {name}: its data cannot be had: {error}. lm-eval fetches it from the Hugging Face hub, unless "
            f"it is in the cache already; without a network, run {CONTINUATION} --text FILE or a task file"
        ) from error
    except Exception as error:
        if not _is_file(name):
            raise
        raise TaskError(f"task file {name} is no task that lm-eval can read: {error}") from error
    inner = {child for children in found.get("group_map", {}).values() for child in children}
    groups = [group for group_name, group in found.get("groups", {}).items() if group_name not in inner]
    return groups or list(found["tasks"].values())


def _name(task: Any) -> str:
    return getattr(task, "task_name", None) or task.name


def _scores(found: Any) -> Iterator[Score]:
    """lm-eval's results, a `Score` for each "metric,filter"."""
    for task, values in found["results"].items():
        counts = found["n-samples"].get(task, {})
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            yield Score(
                task=task,
                metric=metric,
                filter=kind,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                version=found["versions"].get(task),
                fewshot=found["n-shot"].get(task),
                samples=counts.get("effective"),
                available=counts.get("original"),
            )


def _mean(scores: list[Score], group: Sequence[str]) -> float:
    accuracy = {score.task: score.value for score in scores if score.metric == "acc"}
    return sum(accuracy[task] for task in group) / len(group)
