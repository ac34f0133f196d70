"""A run that is stopped anywhere continues to the same weights, bit for bit, as one that was never stopped."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trial
from transformers import TrainerCallback, TrainingArguments
from trial import STEPS, At, model_of, train, train_in_process, windows

from pyprune import training
from pyprune.schedules import Schedule
from pyprune.training import (
    DivergedError,
    InterruptedTraining,
    checkpoints,
    latest_checkpoint,
    load_state,
    read_metrics,
    save_state,
    step_of,
    write_atomically,
)

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pyprune.training", "pyprune.methods.lora"])  # a second, not ten, a process


def die(folder: Path, dtype: str, kill: tuple[str, int]) -> None:
    process = processes.Process(target=train_in_process, args=(str(folder), dtype, kill))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl")]


# ---- killed

# A save writes 8 files (marker, adapter, optimizer, scheduler, generators, arguments, trained tensors, marker) and a
# resumed process first rewrites the metrics, so these fall into the first save, later saves, both their markers, the
# removal of the oldest, and between them.
KILLS = {
    "float32": [
        ("step", 2),
        ("file", 1),
        ("file", 2),
        ("file", 7),
        ("step", 5),
        ("file", 10),
        ("step", 8),
        ("file", 18),
        ("step", 13),
    ],
    "bfloat16": [("file", 2), ("file", 8), ("step", 7), ("file", 5), ("step", 12)],
}


@pytest.mark.parametrize("dtype", KILLS)
def test_killed_again_and_again(tmp_path: Path, dtype: str) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        folder.mkdir()
    expected = train(unbroken, getattr(torch, dtype))
    for kill in KILLS[dtype]:
        die(broken, dtype, kill)
    assert_same(train(broken, getattr(torch, dtype)), expected)
    assert losses(broken) == losses(unbroken)
    assert [step for step, _ in losses(broken)] == list(range(1, STEPS + 1))
    assert [step_of(path) for path in checkpoints(broken / "checkpoints")] == [12, 13]
    assert_same(train(broken, getattr(torch, dtype)), expected)  # resumed behind its last step


def test_training_changes_the_weights_and_dropout_matters(tmp_path: Path) -> None:
    """What the comparisons above rest on: another seed or fewer steps give other weights."""
    results = [train(tmp_path / str(i), **options) for i, options in enumerate(({}, {"seed": 1}, {"steps": STEPS - 1}))]
    for other in results[1:]:
        assert any(not torch.equal(other[name], results[0][name]) for name in other)


# ---- asked to stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_stops(tmp_path: Path, number: int) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    expected = train(tmp_path / "unbroken")
    with pytest.raises(InterruptedTraining, match=f"stopped at step 4 of {STEPS}"):
        train(tmp_path / "broken", callbacks=[At(4, number)])
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert step_of(latest_checkpoint(tmp_path / "broken" / "checkpoints")) == 4
    assert_same(train(tmp_path / "broken"), expected)


# ---- not finite


class Poison(TrainerCallback):
    """Makes a value not finite from a step on: a weight (then the loss is) or one gradient (then its norm is)."""

    def __init__(self, step: int, what: str, value: float) -> None:
        self.step, self.what, self.value = step, what, value

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            parameter = [p for p in kwargs["model"].parameters() if p.requires_grad][-1]
            if self.what == "loss":
                parameter.data.fill_(self.value)
            else:
                parameter.register_hook(lambda gradient: torch.full_like(gradient, self.value))


@pytest.mark.parametrize(("what", "value"), [("loss", math.nan), ("grad_norm", math.inf)])
@pytest.mark.parametrize("step", [6, 8])  # 6 is a step that would be saved
def test_a_value_that_is_not_finite_stops_the_run(tmp_path: Path, what: str, value: float, step: int) -> None:
    expected = train(tmp_path / "unbroken")
    kept = {6: 3, 8: 6}[step]
    with pytest.raises(DivergedError, match=rf"{what} is (nan|inf) at step {step} of {STEPS}.*checkpoint-{kept};"):
        train(tmp_path / "broken", callbacks=[Poison(step, what, value)])
    assert_same(train(tmp_path / "broken"), expected)


# ---- a full disk


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1 << 40),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), 0),
        (RuntimeError("basic_ios::clear: iostream error"), 0),
    ],
)
def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, free: int
) -> None:
    """With the errors that torch 2.13 and the system raise on a full tmpfs."""
    expected = train(tmp_path / "unbroken")
    save, calls = torch.save, 0

    def full(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:  # inside the second checkpoint
            Path(path).write_bytes(b"half")
            raise error
        save(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
        with pytest.raises(OSError, match=r"the disk filled .*checkpoint-3 is complete, free space and") as caught:
            train(tmp_path / "broken")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert_same(train(tmp_path / "broken"), expected)


# ---- checkpoints


def test_a_checkpoint_with_a_file_cut_short_is_not_used(tmp_path: Path) -> None:
    expected = train(tmp_path)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    assert step_of(latest_checkpoint(tmp_path / "checkpoints")) == 12
    assert_same(train(tmp_path), expected)


@pytest.mark.parametrize("lost", ["optimizer.pt", "trained.safetensors"])
def test_a_checkpoint_that_lost_a_file_is_kept_and_named(
    lost: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be all that is left of hours: an older one is gone on from, and without one nothing is."""
    expected = train(tmp_path)
    older, newest = checkpoints(tmp_path / "checkpoints")
    (newest / lost).unlink()
    (newest / "mine.txt").write_text("kept")
    assert_same(train(tmp_path), expected)
    assert f"{newest} was complete, but {lost} is missing: training goes on from checkpoint-12" in caplog.text
    assert checkpoints(tmp_path / "checkpoints") == [older, newest] and (newest / "mine.txt").exists()
    for path in (older, newest):
        (path / lost).unlink()
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(
        ValueError, match=rf"checkpoint-12 was complete, but {lost} is missing, and .* put the file back"
    ):
        train(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files


def test_a_checkpoint_behind_the_newest_may_lose_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = train(tmp_path)
    older, _ = checkpoints(tmp_path / "checkpoints")
    (older / "optimizer.pt").unlink()
    assert_same(train(tmp_path), expected)
    assert (older / "trained.safetensors").exists() and "was complete" not in caplog.text


def test_a_damaged_checkpoint_is_written_anew_when_its_step_is_reached(tmp_path: Path) -> None:
    """Also its trained tensors, which the loop writes only where no method has."""
    expected = train(tmp_path)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    (newest / "optimizer.pt").unlink()
    model = model_of(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    save_state(model, newest)  # as another machine would have it: the same sizes
    train(tmp_path)
    load_state(model, newest)
    assert_same({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, expected)


def test_a_marker_that_cannot_be_read_keeps_its_checkpoint(tmp_path: Path) -> None:
    train(tmp_path)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    (newest / "complete.json").write_text("{")
    with pytest.raises(ValueError, match=r"complete.json is not what was written; move .*checkpoint-13 away"):
        train(tmp_path)
    assert (newest / "trained.safetensors").exists()


def test_a_marker_without_a_recipe_is_complete(tmp_path: Path) -> None:
    """As they were before it was kept."""
    expected = train(tmp_path)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    files = json.loads((newest / "complete.json").read_text())["files"]
    (newest / "complete.json").write_text(json.dumps(files))
    assert latest_checkpoint(tmp_path / "checkpoints") == newest
    assert_same(train(tmp_path), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 5}, r"steps is 5, but training has come to .*checkpoint-6 already; give at least 6 steps"),
        ({"batch_size": 4}, r"batch_size is 4, but .*checkpoint-6 was trained with 2; go on with the same"),
        ({"seed": 1}, r"seed is 1, but .*checkpoint-6 was trained with 0"),
        ({"learning_rate": 1e-3}, r"learning_rate is 0.001, but .*checkpoint-6 was trained with 0.01"),
    ],
)
def test_another_training_does_not_go_on(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    train(tmp_path, steps=6)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **changed)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_training_does_not_go_on_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, steps=6)
    monkeypatch.setattr(trial, "WINDOWS", 9)
    with pytest.raises(ValueError, match=r"windows is \[9, 12\], but .*checkpoint-6 was trained with \[10, 12\]"):
        train(tmp_path)


def test_a_file_that_was_added_to_a_checkpoint_does_no_harm(tmp_path: Path) -> None:
    expected = train(tmp_path)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    (newest / ".DS_Store").write_bytes(b"of a file manager")
    assert latest_checkpoint(tmp_path / "checkpoints") == newest
    assert_same(train(tmp_path), expected)
    assert (newest / ".DS_Store").exists()


def test_checkpoints_of_something_else_are_left_alone(tmp_path: Path) -> None:
    """One that would be written over is refused; a folder of another name is not touched."""
    for name in ("checkpoint-best", "checkpoint-500"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"checkpoint-500 was not written by pyprune.*choose another output_dir"):
        train(tmp_path)
    (tmp_path / "checkpoints" / "checkpoint-500").rename(tmp_path / "checkpoint-500")
    train(tmp_path)
    assert (tmp_path / "checkpoints" / "checkpoint-best" / "model.safetensors").read_bytes() == b"precious"


def test_one_process_trains_on_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "world_size", 2)
        with pytest.raises(ValueError, match="2 processes were started, and tune works in one"):
            train(tmp_path)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 4)
    with pytest.raises(ValueError, match=r"4 GPUs are visible, .*set CUDA_VISIBLE_DEVICES to one of them"):
        train(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_state_of_another_model_changes_nothing(tmp_path: Path) -> None:
    model, other = model_of(torch.float32), torch.nn.Linear(2, 2)
    save_state(other, tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"differ in .* trained tensors, the first is base_model.*; resume with the model"
    ):
        load_state(model, tmp_path)
    wider = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"weight is \[2, 2\], the model's \[3, 2\]; resume with the model"):
        load_state(wider, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_state_holds_what_is_trained_and_buffers_once(tmp_path: Path) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trained = torch.nn.Parameter(torch.arange(3.0))
            self.frozen = torch.nn.Parameter(torch.arange(3.0), requires_grad=False)
            self.register_buffer("kept", torch.arange(2))
            self.register_buffer("derived", torch.arange(2), persistent=False)
            self.alias = self.trained

    layer = Layer()
    save_state(layer, tmp_path)
    with torch.no_grad():
        layer.trained += 1
        layer.frozen += 1
        layer.get_buffer("kept").add_(1)
    load_state(layer, tmp_path)
    assert layer.trained.tolist() == [0, 1, 2]
    assert layer.get_buffer("kept").tolist() == [0, 1]
    assert layer.frozen.tolist() == [1, 2, 3]


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


# ---- metrics


class Figures(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["logs"]["soft_count"] = 100 - state.global_step


def test_metrics_hold_what_a_method_adds(tmp_path: Path) -> None:
    train(tmp_path, callbacks=[Figures()], stage="pat")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["soft_count"] for line in lines] == [100 - step for step in range(1, STEPS + 1)]
    assert {"stage", "step", "loss", "grad_norm", "learning_rate", "tokens", "seconds"} <= lines[0].keys()
    assert lines[0]["stage"] == "pat"


class Read(TrainerCallback):
    """Counts the tokens that the embedding looks up, over all interruptions; stops once behind step 7."""

    def __init__(self) -> None:
        self.now, self.steps, self.stop = 0, [], True  # type: tuple[int, list[int], bool]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].get_input_embeddings().register_forward_hook(self.count)

    def count(self, module: Any, args: tuple[torch.Tensor], output: Any) -> None:
        self.now += args[0].numel()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(self.now)
        if self.stop and state.global_step == 7:
            self.stop, control.should_save, control.should_training_stop = False, True, True


@pytest.mark.parametrize(
    ("batch", "accumulate", "more"), [(2, 2, {}), (4, 4, {}), (3, 2, {}), (3, 2, {"dataloader_drop_last": False})]
)
def test_tokens_are_those_that_were_read(batch: int, accumulate: int, more: dict[str, Any], tmp_path: Path) -> None:
    """The last step of an epoch takes the batches that are left, and a resumed run counts as an unbroken one."""
    read = Read()
    options = {"batch_size": batch, "gradient_accumulation_steps": accumulate, "callbacks": [read], **more}
    for _ in range(2):
        with contextlib.suppress(InterruptedTraining):
            tuned = training.tune(
                model_of(torch.float32), windows(), tmp_path, steps=STEPS, metrics=tmp_path / "metrics.jsonl", **options
            )
    assert [line["tokens"] for line in read_metrics(tmp_path / "metrics.jsonl")] == read.steps
    assert len(read.steps) == STEPS and tuned.tokens == read.now


def test_out_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    class Full(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    with pytest.raises(
        torch.OutOfMemoryError, match=r"\(CUDA out .* 2.00 GiB.\); begin anew with a smaller batch size"
    ):
        train(tmp_path, callbacks=[Full()])


def test_a_metrics_line_cut_short_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


# ---- schedules


def test_schedules_end_exactly() -> None:
    cubic = Schedule(576, 432, 40, begin=8)
    assert [cubic(step) for step in (0, 7, 8)] == [576, 576, 576]
    assert cubic(24) == 432 + 144 / 8  # half-way: an eighth is left
    assert all(cubic(step) > cubic(step + 1) for step in range(8, 40))
    assert {cubic(step) for step in (40, 41, 1000)} == {432}
    linear = Schedule(0.1, 0.7, 3, shape="linear")
    assert linear(1) == pytest.approx(0.3)
    assert linear(3) == 0.7
    assert [Schedule(1.0, 0.3, 5, begin=2, shape="constant")(step) for step in (1, 2, 9)] == [1.0, 0.3, 0.3]
    assert Schedule(1.0, 0.3, 0)(0) == 0.3


@pytest.mark.parametrize(
    "options", [{"milestone": -1}, {"milestone": 3, "begin": 4}, {"milestone": 3, "shape": "cosine"}]
)
def test_a_schedule_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Schedule(0.0, 1.0, **options)
