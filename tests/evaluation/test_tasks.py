"""Downstream tasks: lm-eval's accuracies of our models against log-likelihoods counted by hand in fp64."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pyprune import checkpoint, tasks
from pyprune.cli import main
from pyprune.data import DataError, Document, read_documents

needs_lm_eval = pytest.mark.skipif(tasks.importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture(autouse=True)
def no_report_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip and the shell about the machine at every call, for seconds, and we do not use the answer."""
    if tasks.importlib.util.find_spec("lm_eval") is not None:
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LlamaForCausalLM:
    """A random model in fp64, wide enough that its likelihoods differ, half of its weights zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    found = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in found.model.layers.parameters():
            if parameter.dim() == 2:
                parameter[parameter.abs() <= parameter.abs().median()] = 0
    return found.eval()


@pytest.fixture(scope="module")
def rows(prose: str) -> list[dict[str, Any]]:
    """40 questions with 2 to 4 choices of different lengths."""
    generator, words = torch.Generator().manual_seed(3), prose.split()

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    found = []
    for _ in range(40):
        start, count = number(1000), 2 + number(3)
        choices = [" ".join(words[s : s + 1 + number(3)]) for s in range(1000, 1000 + 100 * count, 100)]
        answer = number(count)
        found.append({"context": " ".join(words[start : start + 6]), "choices": choices, "answer": answer})
    return found


@pytest.fixture
def file(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def by_hand(model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, list[bool]]:
    """For each question whether the likeliest choice, and the likeliest per character, is the answer."""
    exact, right = copy.deepcopy(model).double(), {"acc": [], "acc_norm": []}
    for row in rows:
        context, likelihoods = tokenizer(row["context"])["input_ids"], []
        for choice in row["choices"]:
            ids = tokenizer(f"{row['context']} {choice}")["input_ids"]
            assert ids[: len(context)] == context  # every byte is a token
            log_p = exact(torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihoods.append(sum(log_p[t - 1, ids[t]].item() for t in range(len(context), len(ids))))
        per_character = [value / len(choice) for value, choice in zip(likelihoods, row["choices"], strict=True)]
        for metric, values in (("acc", likelihoods), ("acc_norm", per_character)):
            first, second = sorted(values, reverse=True)[:2]
            assert first - second > 1e-4  # no tie that fp32 could turn round
            right[metric].append(values.index(first) == row["answer"])
    return right


def scores(found: list[Any]) -> dict[str, Any]:
    return {score["metric"] if isinstance(score, dict) else score.metric: score for score in found}


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 7])
def test_accuracies_are_those_counted_by_hand(
    model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]], file: Path, batch_size: int
) -> None:
    expected = by_hand(model, tokenizer, rows)
    found = tasks.evaluate(model, tokenizer, tasks.load([str(file)]), batch_size=batch_size)
    assert found.asked == ["quiz"] and set(scores(found.scores)) == set(expected)
    for metric, score in scores(found.scores).items():
        share = sum(expected[metric]) / len(rows)
        assert 0.2 < share < 0.8 and score.value == pytest.approx(share, rel=1e-12)
        # of a mean: the sample's deviation over the root of the number
        assert score.stderr == pytest.approx(math.sqrt(share * (1 - share) / (len(rows) - 1)), rel=1e-9)
        assert (score.task, score.version, score.fewshot, score.samples, score.available) == ("quiz", 1.0, 0, 40, 40)
    assert expected["acc"] != expected["acc_norm"]


@needs_lm_eval
def test_limit_asks_the_first_and_few_shots_stand_before_each_question(
    model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]], file: Path
) -> None:
    expected, prompts = by_hand(model, tokenizer, rows[:10]), set[str]()
    limited = scores(tasks.evaluate(model, tokenizer, tasks.load([str(file)]), limit=10).scores)["acc"]
    assert (limited.value, limited.samples, limited.available) == (pytest.approx(sum(expected["acc"]) / 10), 10, 40)

    def note(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        prompts.update(tokenizer.batch_decode(arguments[0]))

    handle = model.register_forward_pre_hook(note)
    found = tasks.evaluate(model, tokenizer, tasks.load([str(file)]), limit=2, fewshot=3)
    handle.remove()
    assert scores(found.scores)["acc"].fewshot == 3
    solved = [f"{row['context']} {row['choices'][row['answer']]}" for row in rows]
    for prompt in prompts:
        *examples, question = prompt.split("\n\n")
        assert len(examples) == 3 and all(example in solved for example in examples)
        assert any(question.startswith(row["context"]) for row in rows[:2])


@needs_lm_eval
def test_a_packed_checkpoint_scores_as_its_dense_one(
    model: nn.Module,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "packed"
    assert checkpoint.save(model, tokenizer, folder).packed
    expected = by_hand(model, tokenizer, rows)
    command = ["eval", str(folder), "--tasks", str(file)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    for metric, score in scores(found["scores"]).items():
        assert score["value"] == pytest.approx(sum(expected[metric]) / len(rows), rel=1e-12)
    assert found["versions"]["lm_eval"] and found["limit"] is None and found["model"] == str(folder)
    assert main([*command, "--limit", "10", "--seed", "7"]) == 0
    shown = capfd.readouterr().out
    assert "10 of 40" in shown and "seed 7" in shown and "acc_norm" in shown


# ---- continuation


def test_one_ending_continues_the_passage_and_the_others_do_not(prose: str) -> None:
    texts = [f"{index} " + " ".join(prose.split()[200 * index : 200 * index + 150]) for index in range(6)]
    found = tasks.continuation([Document(text) for text in texts], seed=1)
    assert len(found) == 6 * 2  # of 151 words, two passages of 60
    joined, answers = [" ".join(text.split()) for text in texts], set()
    for row in found:
        follows = [any(f"{row['context']} {choice}" in text for text in joined) for choice in row["choices"]]
        assert len(set(row["choices"])) == 4 and sum(follows) == 1 and follows[row["answer"]]
        assert len(row["context"].split()) == 48 and all(len(choice.split()) == 12 for choice in row["choices"])
        answers.add(row["answer"])
    assert answers == {0, 1, 2, 3}
    assert tasks.continuation([Document(text) for text in texts], seed=1) == found
    assert tasks.continuation([Document(text) for text in texts], seed=2) != found
    with pytest.raises(DataError, match="the text has 2 passages of 60 words"):
        tasks.continuation([Document(texts[0])])


@needs_lm_eval
def test_continuation_from_the_command_line(
    tiny_llama: Path, tokenizer: Any, prose: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "prose.txt"
    text.write_text(prose)
    assert main(["eval", str(tiny_llama), "--tasks", "continuation", "--text", str(text), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    expected = by_hand(model, tokenizer, tasks.continuation(read_documents(text)))
    assert scores(found["scores"])["acc"]["value"] == pytest.approx(sum(expected["acc"]) / len(expected["acc"]))
    assert found["text"] == str(text) and scores(found["scores"])["acc"]["samples"] == len(expected["acc"])


# ---- names


@needs_lm_eval
def test_the_tasks_of_pats_paper_are_known_to_lm_eval() -> None:
    import lm_eval.tasks

    where = Path(lm_eval.tasks.__file__).parent
    folders = ("arc", "super_glue", "hellaswag", "mmlu/default", "openbookqa", "piqa", "glue", "siqa", "winogrande")
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[where / name for name in folders])
    assert len(set(tasks.PAT14)) == 14 and set(tasks.PAT14) <= set(manager.all_tasks)


def test_the_mean_is_over_accuracies_of_tasks() -> None:
    def score(task: str, metric: str, value: float) -> tasks.Score:
        return tasks.Score(task, metric, "none", value, None, None, None, None, None)

    found = [score("a", "acc", 0.2), score("a", "acc_norm", 0.9), score("b", "acc", 0.6), score("a_part", "acc", 0.1)]
    assert tasks._mean(found, ("a", "b")) == pytest.approx(0.4)


# ---- bad input


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    capfd.readouterr()
    assert main(arguments) == 2
    streams = capfd.readouterr()
    assert streams.out == ""
    (error,) = [line for line in streams.err.splitlines() if line.startswith("pyprune ")]
    return error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", 'line 2: expected "choices"'),
        ('{"context": "a", "choices": ["b"], "answer": 0}', 'expected "choices", a list of at least two'),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', "texts that are not empty"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 0}', 'expected "context", a text'),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', 'expected "answer", the place of the right choice'),
        ('{"context": "a", "choices": ["b", "c"], "answer": "b"}', 'expected "answer"'),
    ],
)
def test_a_row_that_is_no_question_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "quiz.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n' + row + "\n")
    with pytest.raises(DataError, match=message):
        tasks.questions(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        tasks.questions(path)


@needs_lm_eval
def test_options_that_do_not_fit_are_refused(
    tiny_llama: Path, file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, text = ("eval", str(tiny_llama)), str(tmp_path / "text.txt")
    Path(text).write_text("a few words")
    assert "give a text for perplexity (--text FILE), or tasks" in refused(capfd, *run)
    assert "--fewshot belongs to --tasks" in refused(capfd, *run, "--text", text, "--fewshot", "2")
    assert "--window belongs to perplexity" in refused(capfd, *run, "--tasks", str(file), "--window", "64")
    assert "of the tasks only continuation reads it" in refused(capfd, *run, "--tasks", str(file), "--text", text)
    assert "is made of a text; give one" in refused(capfd, *run, "--tasks", "continuation")
    assert "the text has 0 passages" in refused(capfd, *run, "--tasks", "continuation", "--text", text)
    assert "nowhere.jsonl does not exist" in refused(capfd, *run, "--tasks", "nowhere.jsonl")
    assert "named more than once" in refused(capfd, *run, "--tasks", "pat14,boolq")
    assert "no task is named" in refused(capfd, *run, "--tasks", ",")
    assert "limit is 0; expected at least 1" in refused(capfd, *run, "--tasks", str(file), "--limit", "0")


def test_without_lm_eval_one_line_says_how_to_get_it(
    tiny_llama: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "pyprune[eval]"' in refused(capfd, "eval", str(tiny_llama), "--tasks", str(file))


@needs_lm_eval
def test_unknown_names_and_data_that_cannot_be_fetched(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With one task in place of lm-eval's thousands, which take half a minute to list."""
    import datasets
    import lm_eval.tasks

    (tmp_path / "task.yaml").write_text("task: arc_easy\ndataset_path: allenai/ai2_arc\ntest_split: test\n")
    known = lm_eval.tasks.TaskManager(include_defaults=False, include_path=tmp_path)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: known)

    def unreachable(**options: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{options['path']}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    run = ("eval", str(tiny_llama), "--tasks")
    assert "task arc_easi is unknown to lm-eval" in (error := refused(capfd, *run, "arc_easi"))
    assert error.endswith("; did you mean arc_easy?")
    assert "task arc_easy: its data cannot be had: Couldn't reach 'allenai/ai2_arc'" in refused(capfd, *run, "arc_easy")
    broken = tmp_path / "broken.yaml"
    broken.write_text("nothing: 1\n")
    assert "broken.yaml is no task that lm-eval can read" in refused(capfd, *run, str(broken))
