"""The command line: what it prints, what it refuses, and runs that end the same however often they are killed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from pyprune import methods
from pyprune.cli import demo, fields, main
from pyprune.cli.log import log_to_stderr
from pyprune.models import open_model
from pyprune.runs import Experiment, Recipe, open_run

SUMMARY = {
    *("method", "ratio_requested", "ratio_achieved", "params_dense", "params_pruned", "block_params_dense"),
    *("block_params_pruned", "hidden_size_dense", "hidden_size_pruned", "tied", "basis", "ppl_dense"),
    *("ppl_tuned_dense", "ppl_prune_then_tune", "ppl_pruned", "tokens_trained", "seconds", "prefill_speedup"),
    *("decode_speedup", "evaluation", "data", "versions", "hardware", "commit"),
}
QUICK = (
    "--steps 6 --window 32 --batch-size 2 --save-every 2 --eval-window 64 --prompt-tokens 8 --new-tokens 2 --repeats 1"
)
QUICK += " --learning-rate 0.01 --warmup 0 --lora-rank 4 --lora-alpha 8"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, prose: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose)
    return path


def tune(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    arguments = ["tune", str(model), "--method", "lora", "--data", str(text), "--out", str(out), "--baselines", "none"]
    return [*arguments, *QUICK.split(), *more]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    errors = [line for line in streams.err.splitlines() if line.startswith("pyprune ")]
    assert len(errors) == 1
    assert "Traceback" not in streams.err
    return errors[0]


# ---- help


def test_help_needs_no_torch() -> None:
    program = (
        "import sys\nfrom pyprune.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "tune", "eval", "info"):
        assert command in done.stdout


@pytest.mark.parametrize("options", ["", " --json"])
def test_a_reader_that_closes_its_pipe_is_no_error(options: str) -> None:
    # `true` has ended long before anything is printed
    pipeline = f"( {sys.executable} -m pyprune info{options}; echo code $? >&2 ) | true"
    done = subprocess.run(["sh", "-c", pipeline], capture_output=True, text=True, check=True)
    assert done.stderr.split("\n")[-2] == "code 0" and "BrokenPipe" not in done.stderr


def test_every_option_of_a_method_is_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass
    class Sample:
        rate: float = methods.option(0.5, "a rate")
        width: int | None = methods.option(None, "a width")
        basis: str = methods.option("pca", "a basis", choices=["pca", "identity"])
        compact: bool = methods.option(True, "a switch of 100 %")
        internal: int = 3

    parser = argparse.ArgumentParser()
    fields.add_fields(parser, Sample, {"rate": 0.25})
    assert fields.from_fields(Sample, parser.parse_args([])) == Sample(rate=0.25)
    given = ["--rate", "0.1", "--width", "7", "--basis", "identity", "--no-compact"]
    assert fields.from_fields(Sample, parser.parse_args(given)) == Sample(0.1, 7, "identity", False)
    with pytest.raises(SystemExit):
        parser.parse_args(["--basis", "fourier"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--internal", "4"])
    assert "a switch of 100 %" in parser.format_help()


# ---- refused


def test_bad_data_is_refused_and_nothing_written(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    files = {
        "empty.txt": ("", "is empty"),
        "short.txt": ("too short", "cannot be split"),
        "bad.jsonl": ('{"text": "a"}\n{', "line 2: not JSON"),
        "keys.jsonl": ('{"tekst": "a"}\n', "line 1: expected"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_text(content)
        error = refused(capsys, *tune(tiny_llama, tmp_path / name, tmp_path / "out"))
        assert name in error
        assert message in error
    assert "none.txt cannot be read" in refused(capsys, *tune(tiny_llama, tmp_path / "none.txt", tmp_path / "out"))
    few = refused(
        capsys,
        *tune(tiny_llama, text, tmp_path / "out", "--eval-data", str(tmp_path / "short.txt"), "--window", "20000"),
    )
    assert "fewer than one window of 20000" in few
    held_out = refused(capsys, *tune(tiny_llama, text, tmp_path / "out", "--eval-data", str(tmp_path / "short.txt")))
    assert "the held-out text has 10 tokens, fewer than one eval_window of 64" in held_out
    assert not (tmp_path / "out").exists()


def test_bad_models_are_refused_and_nothing_written(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    def model(name: str, *weights: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        for file in weights:
            (folder / file).write_bytes(b"\x80\x04.")
        return folder

    out = tmp_path / "out"
    assert "has no weights" in refused(capsys, *tune(model("empty"), text, out))
    for name in ("pytorch_model.bin", "model.pt"):
        folder = model(name.replace(".", "_"), name)
        error = refused(capsys, *tune(folder, text, out))
        assert "pickle checkpoint" in error
        assert "only safetensors are read; convert it" in error
        assert "is a pickle file" in refused(capsys, "eval", str(folder / name), "--text", str(text))
    assert "does not exist" in refused(capsys, *tune(tmp_path / "nowhere", text, out))
    gpt2 = model("gpt2", "model.safetensors")
    (gpt2 / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}))
    assert "LayerNorm" in refused(capsys, *tune(gpt2, text, out))
    edited = tmp_path / "edited"
    shutil.copytree(tiny_llama, edited)
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    assert "not of the shapes in config.json" in refused(capsys, "eval", str(edited), "--text", str(text))
    (gpt2 / "config.json").write_text(json.dumps({"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}))
    assert "brings code of its own" in refused(capsys, *tune(gpt2, text, out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lora-rank 0", "lora_rank is 0; expected at least 1"),
        ("--lora-dropout 1", "lora_dropout is 1.0; expected"),
        ("--steps 0", "steps is 0; expected at least 1"),
        ("--window 1", "window is 1; expected at least 2"),
        ("--method pat --round-to 8 --steps 1", "milestone 0.333333 of steps=1 is step 1, which leaves none behind it"),
        (
            "--method loraprune --target params=0.8 --round-to 4 --steps 1",
            "1 steps leave none to prune in behind 1 of warm-up",
        ),
        ("--learning-rate -1", "learning_rate is -1.0; expected a positive"),
        ("--batch-size 9999", "fewer than batch_size=9999"),
        ("--baselines lora,wanda", "'wanda' is unknown; expected lora"),
        (
            "--method loraprune --target params=0.8 --baselines prune-then-tune",
            "prune-then-tune prunes a ratio of the hidden channels, and LoRAPrune has no ratio",
        ),
    ],
)
def test_bad_options_are_refused_and_nothing_written(
    tmp_path: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert message in refused(capsys, *tune(tiny_llama, text, tmp_path / "out", *options.split()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--target params=0.7", "--target params=0.7; --target is an option of --method loraprune, llm-pruner, "),
        ("--method loraprune --ratio=0.2", "--ratio=0.2; --ratio is an option of --method pat, prune-then-tune"),
        ("--metod lora", "--metod lora; `pyprune tune --method lora --help` lists what it takes"),
    ],
)
def test_an_option_of_another_method_is_told_so(
    tmp_path: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(list(tune(tiny_llama, text, tmp_path / "out", *options.split())))
    assert f"unrecognized arguments: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "expected"), [("pat", "lora,prune-then-tune"), ("slimgpt", "lora")])
def test_the_demo_compares_with_what_it_can(method: str, expected: str) -> None:
    parser = argparse.ArgumentParser()
    demo.options(parser, ["--method", method])
    assert parser.parse_args([]).baselines == expected


def test_folders_that_are_not_this_run_are_refused_untouched(
    tmp_path: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("one")
    assert "is not empty; continue it with --resume" in refused(capsys, *tune(tiny_llama, text, tmp_path / "thesis"))
    assert "is not a run folder" in refused(capsys, *tune(tiny_llama, text, tmp_path / "thesis", "--resume"))
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    assert "is a file; name a folder" in refused(capsys, *tune(tiny_llama, text, tmp_path / "thesis" / "chapter.txt"))


def test_a_run_that_failed_before_its_first_result_does_not_block_its_folder(
    tmp_path: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def fail(experiment: Experiment) -> None:
        raise ValueError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "_measure_dense", fail)
        assert "no luck" in refused(capsys, *tune(tiny_llama, text, out))
    assert main(tune(tiny_llama, text, out, "--steps", "2", "--warmup", "1")) == 0
    assert json.loads((out / "config.json").read_text())["steps"] == 2
    log = (out / "log.txt").read_text()
    assert "no luck" in log and "lora: done" in log
    assert "is not empty; continue it with --resume" in refused(capsys, *tune(tiny_llama, text, out))
    for result in ("summary.json", "metrics.jsonl", "stages/dense.json", "checkpoints/lora/x", "blocks", "my.txt"):
        begun = tmp_path / result.replace("/", "-")
        (begun / result).parent.mkdir(parents=True)
        for name in ("config.json", "commands.jsonl", result):
            (begun / name).write_text("{}")
        assert "is not empty; continue it with --resume" in refused(capsys, *tune(tiny_llama, text, begun)), result
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")  # of a model, perhaps
    assert "is not empty" in refused(capsys, *tune(tiny_llama, text, tmp_path / "foreign"))


# ---- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, text: Path) -> Path:
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    assert main([*tune(tiny_llama, text, out), "--json"]) == 0
    return out


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run: times, memory, and the commit of the checkout."""
    measured = {"seconds", "seconds_total", "prefill_speedup", "decode_speedup", "peak_bytes", "commit"}
    return {key: value for key, value in summary.items() if key not in measured}


def test_a_run_leaves_all_that_it_promises(finished: Path, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert summary["ppl_tuned_dense"] is None  # not asked for
    assert summary["ppl_pruned"] < summary["ppl_dense"]
    assert summary["tokens_trained"] == 6 * 2 * 32
    weights = load_file(tiny_llama / "model.safetensors")
    assert summary["params_dense"] == summary["params_pruned"] == sum(w.numel() for w in weights.values())
    assert summary["ratio_achieved"] == 0
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["lora"]
    _, info = AutoModelForCausalLM.from_pretrained(finished / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = json.loads((finished / "config.json").read_text())
    assert config["learning_rate"] == 0.01
    assert {field.name for field in dataclasses.fields(Recipe)} <= config.keys()
    assert "lora: done" in (finished / "log.txt").read_text()
    assert [json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_eval_agrees_with_the_summary(
    finished: Path, text: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from pyprune.data import file_corpus

    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in file_corpus(text, None, tokenizer).held_out))
    assert main(["eval", str(finished / "model"), "--text", str(held), "--window", "64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    summary = json.loads((finished / "summary.json").read_text())
    assert result["perplexity"] == pytest.approx(summary["ppl_pruned"], rel=1e-12)
    assert result["perplexity"] == pytest.approx(math.exp(result["nll"]))
    assert {key: result[key] for key in ("window", "stride", "tokens")} == summary["evaluation"]
    assert main(["eval", str(finished / "model"), "--text", str(held), "--window", "64"]) == 0
    shown = capsys.readouterr().out
    for figure in (f"{result['perplexity']:.4f}", "window 64", "stride 64", f"{result['tokens']:,} tokens"):
        assert figure in shown


def test_json_is_all_that_stdout_gets(
    finished: Path, tiny_llama: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A finished run that is resumed does nothing again and prints its summary."""
    before = {path: path.stat().st_mtime_ns for path in (finished / "stages").iterdir()}
    assert main([*tune(tiny_llama, text, finished, "--resume"), "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads((finished / "summary.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in (finished / "stages").iterdir()} == before


def test_the_table_shows_the_figures(
    finished: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tune(tiny_llama, text, finished, "--resume")) == 0
    shown, summary = capsys.readouterr().out, json.loads((finished / "summary.json").read_text())
    for figure in (
        f"{summary['params_pruned']:,}",
        f"{summary['ppl_pruned']:.2f}",
        f"{summary['prefill_speedup']:.2f}x",
    ):
        assert figure in shown


def test_loading_weights_leaves_stderr_to_us(tiny_llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils.logging import enable_progress_bar

    enable_progress_bar()
    open_model(tiny_llama)
    assert "Loading weights" in capfd.readouterr().err
    log_to_stderr()
    open_model(tiny_llama)
    assert capfd.readouterr().err == ""
    assert not are_progress_bars_disabled()  # downloads still show theirs


def test_a_stage_is_logged_in_numbers_that_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = {"params": 100886256, "tied": True, "perplexity": {"value": 49.75871}, "linears": {}}
    logger = logging.getLogger("pyprune")
    logger.addHandler(caplog.handler)  # commands keep it from going further
    with caplog.at_level(logging.INFO, "pyprune"), open_run(tmp_path / "run", {}, resume=True) as run:
        run.stage("dense", lambda: record)
    logger.removeHandler(caplog.handler)
    assert f"there is no run in {tmp_path / 'run'}, so a new one begins" in caplog.messages[0]
    assert re.search(r" s: params 100,886,256, tied 1, seconds \S+, perplexity 49\.7587$", caplog.messages[-1])


def test_another_configuration_is_refused(
    finished: Path, tiny_llama: Path, text: Path, tmp_path: Path, prose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, *tune(tiny_llama, text, finished, "--resume", "--seed", "1"))
    assert "--resume: seed was 0 and is now 1" in error
    error = refused(capsys, *tune(tiny_llama, text, finished, "--resume", "--method", "pat"))
    assert "--resume: method was 'lora' and is now 'pat'" in error  # and not an option that only one of them has
    changed = text.with_name("changed.txt")
    changed.write_text(prose + " more")
    assert "--resume: data was" in refused(capsys, *tune(tiny_llama, changed, finished, "--resume"))


# ---- killed

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pyprune.runs", "pyprune.methods.lora"])


def run_and_die(arguments: list[str], place: str) -> None:
    """One process that kills itself: before or behind the record of a stage, or at a step of the training."""
    from pyprune import runs, training

    torch.set_num_threads(1)
    kind, _, what = place.partition(":")

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write = runs.write_json

    def dying_write(path: Path, value: Any) -> None:
        if kind == "before" and path.name == f"{what}.json":
            die()
        write(path, value)
        if kind == "behind" and path.name == f"{what}.json":
            die()

    runs.write_json = dying_write
    if kind == "step":
        log = training.Metrics.on_log

        def dying_log(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            log(self, args, state, control, **kwargs)
            if state.global_step == int(what):
                die()

        training.Metrics.on_log = dying_log  # type: ignore[method-assign]
    main(arguments)


def test_a_run_killed_anywhere_ends_as_one_that_was_not(
    finished: Path, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    """Without and with the configuration written, in and behind the training, between the export and its record."""
    out, unbroken = tmp_path / "run", finished
    for place in (
        "before:config",
        "behind:config",
        "behind:dense",
        "step:3",
        "step:5",
        "before:lora",
        "before:summary",
    ):
        arguments = tune(tiny_llama, text, out, "--resume")
        process = processes.Process(target=run_and_die, args=(arguments, place))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, place
    assert main(tune(tiny_llama, text, out, "--resume")) == 0
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (out, unbroken)]
    assert without_times(summaries[0]) == without_times(summaries[1])
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (out, unbroken)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_two_processes_cannot_share_a_run(
    finished: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    with (finished / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another pyprune process" in refused(capsys, *tune(tiny_llama, text, finished, "--resume"))


def test_too_little_memory_is_told_in_a_line(
    tmp_path: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Trainer, *args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "training_step", full)
    error = refused(capsys, *tune(tiny_llama, text, tmp_path / "out"))
    assert "out of memory in training (CUDA out of memory. Tried to allocate 2.00 GiB.); begin anew with a" in error


def test_a_loss_that_is_not_finite_is_a_failure(
    tmp_path: Path, tiny_llama: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tune(tiny_llama, text, tmp_path / "out", "--learning-rate", "1e38")) == 1
    assert "training stopped" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model").exists()
