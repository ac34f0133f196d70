"""`tests/gpu/check.sh` without a GPU: what it says then, and, with tools that only pretend, how it counts."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu" / "check.sh"
BENCHMARKS = SCRIPT.parents[2] / "benchmarks"
TOOL = """#!/bin/sh
case "$*" in *"-m pytest"*) echo "$TESTS" ;; *capability*) echo 90a ;; esac
"""


def check(tools: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs it by `sh`, as somebody may who does not look at its first line, with the commands of `tools` alone."""
    variables = {"PATH": str(tools), "CUDA_VISIBLE_DEVICES": "", "HOME": os.environ.get("HOME", "")} | environment
    command = [shutil.which("sh") or "sh", str(SCRIPT), str(out)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with what every system has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "cp", "dirname", "env", "grep", "mkdir", "rm", "sh", "tail", "tee", "timeout"):
        (folder / name).symlink_to(shutil.which(name) or name)
    return folder


def test_what_is_missing_is_said_and_nothing_begun(tools: Path, tmp_path: Path) -> None:
    done = check(tools, tmp_path / "out", PYTHON=sys.executable)
    found = [line.removeprefix("tests/gpu/check.sh: ").partition(":")[0] for line in done.stderr.splitlines()]
    assert found == ["no GPU", "no nvcc", "no compute-sanitizer"], done.stderr
    assert done.returncode == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tests", "failed"),
    [("815 passed, 17 skipped in 9.00s", 0), ("790 skipped, 3 warnings in 1.00s", 5)],
    ids=["passed", "skipped"],
)
def test_tests_that_were_all_skipped_count_as_failed(tools: Path, tmp_path: Path, tests: str, failed: int) -> None:
    """The tests and four sanitizers; all else succeeds. The limits of what is not side by side hold what is said."""
    for name in ("python", "nvcc", "compute-sanitizer", "ncu"):
        (tools / name).write_text(TOOL)
        (tools / name).chmod(0o755)
    done = check(tools, tmp_path / "out", PYTHON="python", TESTS=tests)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.returncode == failed == summary.count("exit 1 (no test ran)"), summary + done.stderr
    steps = re.findall(r"^\d+ s of (\d+), exit .*?: (.*)", summary, re.MULTILINE)
    limits = [int(limit) for limit, command in steps if "-m pytest" not in command]
    together = max(int(limit) for limit, command in steps if "-m pytest" in command)
    said = re.search(r"add up to (\d+) seconds", SCRIPT.read_text())
    assert said and sum(limits) + together == int(said[1]) <= 525 and "bench_pat_step.py" in summary


def test_benchmarks_take_the_options_that_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each script up to the end of its command line: an option that is gone would cost minutes of a GPU."""

    class Taken(Exception):
        pass

    def parse(parser: argparse.ArgumentParser) -> None:
        right(parser)
        raise Taken

    right = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = SCRIPT.read_text()
    for name in ("tokens", "steps"):
        found = re.search(rf'^{name}="(.*)"$', script, re.MULTILINE)
        assert found
        script = script.replace(f"${name}", found[1])
    commands = re.findall(r"benchmarks/(\w+)\.py([^\"|\n]*)", script)
    assert len(commands) == 9
    for name, options in commands:
        monkeypatch.setattr("sys.argv", [name, *shlex.split(options.partition("||")[0])])
        with pytest.raises(Taken):
            importlib.import_module(name).main()
