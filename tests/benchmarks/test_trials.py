"""Trials as child processes: one that fails loses nothing but itself, and what is killed leaves what was finished."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Trials "a1", "b2", ...: each writes its name; "fail" raises, "slow" never ends; "gpu" hands out shares as on a GPU.
SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
out, jobs, gpu, *rest = sys.argv[1:]
names, _, mine = " ".join(rest).partition(" --one ")
if mine:
    for name in mine.split():
        if name == "fail":
            raise SystemExit("the reason of the failure")
        if name == "slow":
            Path(out, "slow.pid").write_text(str(os.getpid()))
            time.sleep(60)
        Path(out, name).write_text(str(os.getpid()))
    sys.exit()
import torch, trials
torch.cuda.is_available = lambda: gpu == "gpu"
result = lambda name: (Path(out, name).read_text() or None) if Path(out, name).exists() else None
missing = trials.run(names.split(), result, Path(out, "logs"), int(jobs))
print("missing:", *missing)
trials.finish(missing, Path(out))
"""


def test_rows_join_only_a_csv_of_the_same_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    trials, file = importlib.import_module("trials"), tmp_path / "quality.csv"
    trials.add_rows([{"method": "a", "value": 1}, {"method": "b", "value": 2}], file, ("method",))
    joined = trials.add_rows([{"method": "b", "value": 3}], file, ("method",))
    assert [tuple(row.values()) for row in joined] == [("a", "1"), ("b", "3")]
    before = file.read_text()
    with pytest.raises(SystemExit, match=r"quality\.csv has .* \(missing: dtype; unexpected: value\)"):
        trials.add_rows([{"method": "b", "dtype": "bfloat16"}], file, ("method",))
    assert file.read_text() == before


@pytest.mark.parametrize("name", ["pat", "ast", "oneshot", "structured"])
def test_tables_are_made_of_the_csv_in_git_and_of_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module(f"{name}_quality")
    monkeypatch.setattr(sys, "argv", [f"{name}_quality.py", "--table"])
    module.main()
    table = capsys.readouterr().out
    assert table.startswith("| ") and (name != "pat" or table in (BENCHMARKS.parent / "README.md").read_text())
    monkeypatch.setattr(module, "CSV", tmp_path / "foreign.csv")
    module.CSV.write_text("method,basis\nwanda,pca\n")
    with pytest.raises(SystemExit, match=r"foreign\.csv has other columns .*dtype"):
        module.main()


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Of a script with these trials, up to the number of jobs."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)))
    return [sys.executable, str(script), str(tmp_path)]


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_a_failed_trial_loses_nothing_else(command: list[str], tmp_path: Path, machine: str) -> None:
    names = ["a", "fail", "b", "c", "d", "e"]
    done = subprocess.run([*command, "2", machine, *names], capture_output=True, text=True)
    assert done.returncode == 1
    assert "fail: failed with status 1" in done.stderr and "the reason of the failure" in done.stderr
    assert done.stdout.splitlines()[-1] == "missing: fail"
    processes = {name: (tmp_path / name).read_text() for name in "abcde"}
    if machine == "cpu":
        assert len(set(processes.values())) == 5
    else:  # shares a, b, d and fail, c, e: what is left behind the failure has one new process
        assert processes["a"] == processes["b"] == processes["d"] != processes["c"] == processes["e"]


def test_sigterm_stops_the_children_and_keeps_what_is_finished(command: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen([*command, "2", "cpu", "a", "slow", "b"], stdout=subprocess.PIPE, text=True)
    slow = tmp_path / "slow.pid"
    end = time.monotonic() + 60
    while not (slow.exists() and slow.read_text() and (tmp_path / "b").exists()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said.splitlines()[-1] == "missing: slow"
    with pytest.raises(ProcessLookupError):
        os.kill(int(slow.read_text()), 0)


def test_finished_trials_are_not_run_again(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    subprocess.run([*command, "1", "cpu", "a", "b"], check=True)
    assert (tmp_path / "a").read_text() == "before" and (tmp_path / "b").read_text() != "before"
