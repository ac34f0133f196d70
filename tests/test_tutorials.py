"""The tutorials run as they stand: every block in order, in an empty folder with the names that docs/tutorials/index.md
gives a user, and what they show as output is what came out, but for the digits.

Python runs in one namespace a page. Of a shell block each line is one command of pyprune. A block with a title is the
file of that name.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer
from transformers import LlamaConfig, LlamaForCausalLM

from pyprune import cli, methods

PAGES = sorted((Path(__file__).parent.parent / "docs/tutorials").glob("*.md"))


@pytest.fixture(scope="session")
def starting_point(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, prose: str) -> Path:
    """A folder with what a tutorial begins with. The model is wide enough for the default multiple of 64 channels."""
    folder = tmp_path_factory.mktemp("tutorial")
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    )
    LlamaForCausalLM(config).save_pretrained(folder / "MODEL")
    tokenizer.save_pretrained(folder / "MODEL")
    paragraphs = prose.split("\n\n")
    for name, texts in {"train": paragraphs[:14], "held_out": paragraphs[14:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def form(text: str) -> list[str]:
    """The words of an output. Digits are those of the user's model, and so is where a table's lines stand."""
    return re.sub(r"\d[\d,.]*", "0", re.sub(r"[^\x00-\x7f]", " ", text)).split()


def shell(example: Example) -> None:
    for line in example.parsed.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "pyprune", f"{example.path}: {line!r} is no command of pyprune"
        assert cli.main(arguments) == 0, line


def write(example: Example) -> None:
    name = example.region.lexemes["language"].split('"')[1]
    Path(name).write_text(example.parsed)


def files(document: Document) -> Iterator[Region]:
    """Blocks with a title."""
    for region in FencedCodeBlockLexer(r'\w+ title="[^"]+"')(document):
        region.parsed, region.evaluator = region.lexemes["source"], write
        yield region


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "index"], ids=lambda page: page.stem)
def test_a_tutorial_does_what_it_shows(
    page: Path,
    starting_point: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(starting_point, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def shown(example: Example) -> None:
        assert form(example.parsed) == form(printed[-1]), f"{page}, line {example.line}"

    shown_output = CodeBlockParser("text", shown)
    parsers = [CodeBlockParser("python", PythonEvaluator()), CodeBlockParser("bash", shell), files, shown_output]
    printed: list[str] = []
    with patch.dict(methods.ONE_SHOT):  # where a page adds its own
        for example in Sybil(parsers).parse(page):
            example.evaluate()
            printed.append(capsys.readouterr().out)
