"""`pyprune report`: its numbers against what the folders hold, what it says of broken ones, and that nothing in it can
be mistaken for markup."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import run_folders
import torch
from safetensors.torch import load_file

from pyprune import cli, report
from pyprune.modules import UnifiedMask
from pyprune.report import figures, tables
from pyprune.report.reading import ReportError, comparable, read_runs

pytest.importorskip("matplotlib")


def numbers(out: Path, *folders: Path) -> dict[str, Any]:
    """What `report.make` returns and a page, without the time that pictures take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "pictures", lambda runs: [])
        return report.make(folders, out)


def rows(result: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The rows of a table by the names of its columns."""
    table = next(table for table in result["tables"] if table["key"] == key)
    names = [column["name"] for column in table["columns"]]
    return [dict(zip(names, row, strict=True)) for row in table["rows"]]


class Text(HTMLParser):
    """The tags of a page, its attributes and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        self.links += re.findall(r"url\((.*?)\)", " ".join(value or "" for _, value in attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_numbers_are_those_of_the_folder(tmp_path: Path) -> None:
    result = numbers(tmp_path / "out", run_folders.tuned(tmp_path / "run"))
    assert result["problems"] == [] and result["runs"][0]["state"] == "finished"
    dense, lora, pat = rows(result, "models")
    assert (dense["model"], dense["perplexity"], dense["MB"]) == ("dense", 20.0, 4 * 2 * 192)
    assert (lora["model"], lora["perplexity"], lora["time"]) == ("lora", 19.0, 3.0)
    assert (pat["over dense"], pat["decode"], pat["decode limit"], pat["time"]) == (1.25, 1.1, 1.4, 5.0)
    left = (6 * 6 + 6 * 16) / (8 * 8 + 8 * 16)
    assert pat["weights left in blocks"] == pytest.approx(left) and pat["of dense"] == pytest.approx(left)
    shapes = {row["linear"]: (row["shape before"], row["after"], row["removed"]) for row in rows(result, "by-kind")}
    assert shapes == {
        "self_attn.q_proj": ("8 × 8", "6 × 6", 1 - 36 / 64),
        "mlp.down_proj": ("8 × 16", "6 × 16", 1 - 96 / 128),
    }
    assert [row["removed"] for row in rows(result, "every-layer")] == [1 - 36 / 64, 1 - 96 / 128] * 2
    training = {(row["training"], row["figure"]): row for row in rows(result, "training")}
    going = training["pat", "mask of channels that go, mean"]
    assert (going["points"], going["last step"], going["first"], going["last"]) == (20, 20, 1.0, pytest.approx(0.05))
    assert training["lora", "loss, nats per token"]["at 50%"] == pytest.approx(3 - 21 / 40)
    command = rows(result, "commands")[0]
    assert command["command"] == "pyprune tune 'a model'" and command["versions"] == "torch 2.13.0"
    assert command["commit"] == "0123456789ab" and command["hardware"] == "EPYC, 1 of 2 cores"
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "31.2 %" not in text and f"{left:.1%}"[:-1] in text and "pyprune tune 'a model'" in text


def test_zeros_are_counted_by_block_and_linear(tmp_path: Path) -> None:
    result = numbers(tmp_path / "out", run_folders.pruned(tmp_path / "run"))
    assert [row["wanda"] for row in rows(result, "by-block")] == pytest.approx([128 / 192, 64 / 192])
    down = next(row for row in rows(result, "by-kind") if row["linear"] == "mlp.down_proj")
    assert (down["left"], down["least"], down["most"]) == (256 - 144, 48 / 128, 96 / 128)
    assert rows(result, "models")[1]["weights left in blocks"] == pytest.approx(0.5)


def test_runs_stand_side_by_side_only_where_they_compare(tmp_path: Path) -> None:
    folders = [
        run_folders.tuned(tmp_path / "a"),
        run_folders.pruned(tmp_path / "b"),
        run_folders.compared(tmp_path / "c"),
        run_folders.pruned(tmp_path / "other", dense=21.0),
    ]
    runs, _ = read_runs(folders)
    assert [[run.label for run in group] for group in comparable(runs)] == [["a", "b", "c"], ["other"]]
    pictures = {picture.name: picture for picture in figures.pictures(runs)}
    size = pictures["pareto-size-1"]
    assert all(
        f"{name} 0.0, {ppl}" in size.alt for name, ppl in (("a", "25.00"), ("b", "30.00"), ("c · wanda", "30.00"))
    )
    assert size.alt.count("dense") == 1 and "other" not in size.alt and "other" in pictures["pareto-size-2"].group
    assert "c · magnitude 1.50×, 90.00" in pictures["pareto-decode-1"].alt


def test_folders_of_one_name_are_told_apart_and_one_folder_counts_once(tmp_path: Path) -> None:
    first, second = (run_folders.pruned(tmp_path / name / "run") for name in ("x", "y"))
    runs, _ = read_runs([first, second, first / ".." / "run"])
    assert [run.label for run in runs] == ["x/run", "y/run"]


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 4.0), (3.0, 4.5), (4.0, 1.0)]
    assert figures._front(points, "bytes") == [(1.0, 9.0), (2.0, 4.0), (4.0, 1.0)]
    assert figures._front(points, "decode") == [(4.0, 1.0)]
    assert figures._front([(254.703, 727.0), (254.706, 262.0), (538.0, 19.0)], "bytes") == [
        (254.706, 262.0),
        (538.0, 19.0),
    ]


@pytest.mark.parametrize(("low", "high"), [(2.08, 2.16), (20, 95_000), (4.9, 5.4), (0.97, 1.03), (19.0, 420.0)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = figures.round_numbers(low, high)
    assert 2 <= len(ticks) <= 6 and all(low <= tick <= high for tick in ticks) and ticks == sorted(ticks)


def test_names_at_the_ends_of_curves_do_not_touch() -> None:
    heights = [0.5, 0.5, 0.51, 0.05, 0.0, 0.98]
    places = dict((i, place) for place, i in figures._spread(heights, 0.1))
    order = sorted(places.values())
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(order))
    assert order[0] >= 0 and order[-1] <= 1
    assert sorted(range(6), key=places.__getitem__) == sorted(range(6), key=heights.__getitem__)


def test_smoothing_is_a_mean_around_each_step() -> None:
    values = torch.rand(200, dtype=torch.float64)
    smooth = tables.smooth(values.tolist())
    for step, around in ((100, values[95:106]), (0, values[:6]), (198, values[193:])):
        assert smooth[step] == pytest.approx(float(around.mean()))


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_broken_run_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    good, folder = run_folders.tuned(tmp_path / "good"), run_folders.tuned(tmp_path / "run", ppl=26.0)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[3], lines[7] = '{"stage": "lora", "st', "[1, 2]"
    lines += [json.dumps({"stage": "lora", "loss": 1.0}), '{"stage": "pat", "step": 41, "lo']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "stages" / "speed.json").write_text('{"speedup": ')
    (folder / "stages" / "dense.json").write_text("[]")
    (folder / "stages" / "lora.json").write_text('{"foo": 1}')
    result = numbers(tmp_path / "out", good, folder, tmp_path / "nowhere")
    problems = "\n".join(result["problems"])
    assert "run: metrics.jsonl: 3 lines are not JSON objects and left out, the first is line 4" in problems
    assert "run: metrics.jsonl: 1 lines name no stage or step" in problems
    assert "run: stages/speed.json cannot be read" in problems and "stages/dense.json holds no JSON object" in problems
    assert "run: stages/lora.json is no record of a stage (it has no `seconds`) and is left out" in problems
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in problems
    models = {(row["run"], row["model"]): row for row in rows(result, "models")}
    assert models["run", "dense"]["perplexity"] == 20.0  # the summary has it
    assert models["run", "pat"]["perplexity"] == 26.0 and models["run", "pat"]["decode"] is None
    training = {(row["training"], row["figure"]): row for row in rows(result, "training")}
    assert training["run · lora", "loss, nats per token"]["points"] == 38
    page = Text((tmp_path / "out" / "report.html").read_text())
    assert all(problem in page.text for problem in result["problems"])


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    folder = run_folders.tuned(tmp_path / "run")
    for name in ("summary.json", "stages/pat.json", "stages/reload.json", "stages/speed.json"):
        (folder / name).unlink()
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 17]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = numbers(tmp_path / "out", folder)
    state = "unfinished: 2 of 5 stages done, next is pat at step 17 of 40"
    assert result["runs"][0]["state"] == state and any(state in problem for problem in result["problems"])
    assert [row["model"] for row in rows(result, "models")] == ["dense", "lora"]
    assert {row["last step"] for row in rows(result, "training")} == {17}


def test_pruning_that_was_stopped_shows_its_blocks(tmp_path: Path) -> None:
    folder = run_folders.pruned(tmp_path / "run")
    block = json.loads((folder / "stages" / "prune.json").read_text())["blocks"][0]
    run_folders.write(folder / "blocks" / "0.json", block)
    for name in ("summary.json", "stages/prune.json", "stages/reload.json"):
        (folder / name).unlink()
    result = numbers(tmp_path / "out", folder)
    assert "run: pruning was stopped behind 1 blocks; the figures of these are shown" in result["problems"]
    assert [row["wanda"] for row in rows(result, "by-block")] == pytest.approx([128 / 192])


def test_a_run_of_unknown_kind_shows_what_it_has(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_folders.write(folder / "config.json", {"command": "distil", "alpha": 1})
    run_folders.write(folder / "summary.json", {"agreement": 0.75, "nested": {}, "nothing": None})
    (folder / "metrics.jsonl").write_text('{"stage": "distil", "step": 1, "loss": 2.5}\n')
    result = numbers(tmp_path / "out", folder)
    assert "of a kind that this version does not know" in result["problems"][0] and "'distil'" in result["problems"][0]
    assert rows(result, "summaries") == [{"run": "run", "key": "agreement", "value": 0.75}]
    assert rows(result, "training")[0]["last"] == 2.5


def test_a_run_without_perplexity_says_so(tmp_path: Path) -> None:
    measured, silent = run_folders.pruned(tmp_path / "measured"), run_folders.pruned(tmp_path / "silent")
    for name in ("dense", "reload", "speed"):
        (silent / "stages" / f"{name}.json").unlink(missing_ok=True)
    (silent / "summary.json").unlink(missing_ok=True)
    result = report.make([measured, silent], tmp_path / "out")
    assert "silent measured no perplexity (--eval-data), so it is in no picture of it" in result["problems"]
    assert not any("measured no" in problem for problem in result["problems"] if not problem.startswith("silent"))
    assert (tmp_path / "out" / "pareto-size.png").exists()  # and not as the first of two


@pytest.mark.parametrize(
    ("decode", "said"), [(1.1, "decoding 1.10× of 1.40× at most"), (1.6, "1.60× (more than its bytes explain, 1.40×)")]
)
def test_a_gain_above_its_limit_is_said_to_be_one(tmp_path: Path, decode: float, said: str) -> None:
    folder = run_folders.tuned(tmp_path / "run")
    record = json.loads((folder / "stages" / "speed.json").read_text())
    record["speedup"]["decode"] = decode
    run_folders.write(folder / "stages" / "speed.json", record)
    assert said in numbers(tmp_path / "out", folder)["runs"][0]["summary"]


def test_a_resumed_stage_counts_all_of_its_steps(tmp_path: Path) -> None:
    folder = run_folders.tuned(tmp_path / "run")
    record = json.loads((folder / "stages" / "pat.json").read_text())
    run_folders.write(folder / "stages" / "pat.json", record | {"training": {"seconds": 50.0}})
    found = {row["stage"]: row["time"] for row in rows(numbers(tmp_path / "out", folder), "stages")}
    assert found["pat"] == 50.0 and found["lora"] == 4.0


def test_a_summary_alone_makes_a_report(tmp_path: Path) -> None:
    """As of a run whose other files were not copied, or of an older version."""
    folder = tmp_path / "run"
    summary = {"method": "pat", "params_dense": 100, "params_pruned": 75, "dtype": "bfloat16", "ppl_tuned_dense": 18.9}
    summary |= {"ppl_dense": 21.2, "ppl_pruned": 50.1, "decode_speedup": 1.12, "decode_speedup_limit": 1.33}
    summary |= {"block_params_dense": 80, "block_params_pruned": 60}
    run_folders.write(folder / "summary.json", {**summary, "evaluation": run_folders.EVALUATION})
    result = numbers(tmp_path / "out", folder)
    assert result["problems"] == ["run: config.json is missing, so the options of the run are not known"]
    dense, _, pat = rows(result, "models")
    assert (dense["MB"], pat["MB"], pat["weights left in blocks"], pat["decode"]) == (200, 150, 0.75, 1.12)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "x",
        [],
        {},
        True,
        math.nan,
        -math.inf,
        0,
        -1,
        pytest.param(10**400, id="huge"),
        1e300,
        [[1]],
        {"value": "x"},
    ],
)
def test_values_of_any_kind_are_survived(tmp_path: Path, value: Any) -> None:
    """Every value of every record replaced, one after the other."""
    folders = [
        run_folders.tuned(tmp_path / "a"),
        run_folders.pruned(tmp_path / "b"),
        run_folders.compared(tmp_path / "c"),
    ]
    for path in [path for folder in folders for path in folder.rglob("*.json")]:
        before = path.read_text()
        for key in json.loads(before):
            path.write_text(json.dumps(json.loads(before) | {key: value}))
            runs, _ = read_runs(folders)
            assert all(table.texts() for table in tables.all_tables(runs))
            assert figures.pictures(runs)
        path.write_text(before)


def test_figures_of_any_size_are_drawn(tmp_path: Path) -> None:
    folder = run_folders.tuned(tmp_path / "run", dense=1.0, ppl=1e30)
    speed = {"speedup": {"decode": 1e30, "prefill": -1e30}, "seconds": 1e30}
    run_folders.write(folder / "stages" / "speed.json", speed)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    extreme = [line | {"loss": 1e30 * (-1) ** line["step"], "mask_going": 1e30, "mask_count": -3} for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, extreme)))
    result = report.make([folder], tmp_path / "out")
    assert {"pareto-decode.png", "loss.png", "mask-values.png"} <= {Path(path).name for path in result["files"]}


def test_long_curves_are_thinned_to_their_last_point() -> None:
    steps, values = figures._thin(range(1, 20_002), range(20_001))
    assert len(steps) <= 1000 and steps[-1] == 20_001 and list(values) == [step - 1 for step in steps]


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folders.tuned(tmp_path / "runs" / "one")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match=r"is no run folder .*; it holds the run folders one: name those"):
        report.make([tmp_path / "runs"], tmp_path / "out")
    with pytest.raises(ReportError, match="is a file; name a run folder"):
        report.make([tmp_path / "file"], tmp_path / "out")
    (tmp_path / "runs" / "one" / "model").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "runs" / "one" / "model" / name).write_text("{}")
    with pytest.raises(ReportError, match=r"is a model, not a run; name the run folder, .*\(perhaps .*/runs/one\)"):
        report.make([tmp_path / "runs" / "one" / "model"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert cli.main(["report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "runs" / "one"), "--out", str(tmp_path / "file")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_names_are_never_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of runs, methods, stages and linears, and the problems that name files, all of them hostile."""
    bad = "<script>alert(1)</script>$x^{$[bold]\x1b[31m\x00&amp;'\""
    folder = run_folders.pruned(tmp_path / "<img src=x onerror=alert(1)>[b]")
    config = {"command": "prune", "method": bad, "eval_data": bad, "calibration_windows": 4, bad: bad}
    run_folders.write(folder / "config.json", config)
    record = json.loads((folder / "stages" / "prune.json").read_text())
    for block in record["blocks"]:
        for key in ("sizes", "zeros"):
            block[key][bad] = block[key].pop("mlp.down_proj")
    run_folders.write(folder / "stages" / "prune.json", record)
    (folder / "metrics.jsonl").write_text(json.dumps({"stage": bad, "step": 1, "loss": 1.0}) + "\n")
    line = {
        "command": ["pyprune", bad],
        "versions": {bad: bad},
        "hardware": {"cpu": bad},
        "commit": bad,
        "started": bad,
    }
    (folder / "commands.jsonl").write_text(json.dumps(line) + "\n")
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[31m" not in shown and "[bold]" in shown and "\x00" not in shown
    html = (tmp_path / "out" / "report.html").read_text()
    page = Text(html)
    assert not {"script", "img", "b", "bold"} & set(page.tags)
    assert page.text.count("<script>alert(1)</script>") >= 5 and "\x1b" not in html and "\x00" not in html
    assert all(link.startswith(("#", "data:,")) for link in page.links)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names), names


def test_a_page_names_nothing_outside_itself(tmp_path: Path) -> None:
    report.make([run_folders.tuned(tmp_path / "a"), run_folders.pruned(tmp_path / "b")], tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    page = Text(html)
    assert page.links and all(link.startswith(("#", "data:,")) for link in page.links)
    assert not {"script", "iframe", "object", "embed", "img"} & set(page.tags)
    assert "default-src 'none'" in html and "http" not in html.replace("http-equiv", "").replace(
        "http://www.w3.org", ""
    )
    assert page.tags.count("figure") == html.count('role="img" aria-label="') == page.tags.count("svg")
    ids = re.findall(r'\bid="([^"]*)"', html)
    targets = {link[1:] for link in page.links if link.startswith("#")}
    assert targets <= set(ids)
    tables_ = page.tags.count("table")
    assert html.count('<th scope="col"') >= tables_ > 5 and html.count('<th scope="row"') > tables_


def without(packages: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`pyprune report` in a process that lacks these packages, and those that no report needs; its status is that of
    the command."""
    code = f"""
import sys
sys.modules |= dict.fromkeys("torch transformers peft {packages}".split())
from pyprune.cli import main
sys.exit(main(["report", *{arguments!r}]))
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_matplotlib_the_page_has_the_tables(tmp_path: Path) -> None:
    folder, out = run_folders.tuned(tmp_path / "run"), tmp_path / "out"
    done = without("matplotlib", str(folder), "--out", str(out))
    assert done.returncode == 0, done.stderr
    missing = "matplotlib is not installed; pip install pyprune[report]"
    assert f"! no pictures: {missing}" in done.stdout and "20.00" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.txt"]
    html = (out / "report.html").read_text()
    page, drawn = Text(html), figures.pictures(read_runs([folder])[0])
    assert missing in page.text and "20.00" in page.text and "svg" not in page.tags
    assert page.tags.count("figure") == len(drawn) == page.text.count("matplotlib is not installed: pip install") > 3
    assert all(picture.title in page.text for picture in drawn) and 'role="img"' not in html


def test_without_jinja2_there_are_pictures_and_no_page(tmp_path: Path) -> None:
    done = without("jinja2", str(run_folders.pruned(tmp_path / "run")), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "! no page: jinja2 is not installed; pip install pyprune[report]" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"pareto-size.png", "report.txt"} <= names and "report.html" not in names


@pytest.mark.parametrize(
    ("run", "out", "said"),
    [("nowhere", "out", "no such folder"), ("run", "file", "name a folder"), ("run", "model", "holds a model")],
)
def test_errors_need_no_torch(tmp_path: Path, run: str, out: str, said: str) -> None:
    run_folders.pruned(tmp_path / "run")
    (tmp_path / "file").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("")
    done = without("", str(tmp_path / run), "--out", str(tmp_path / out))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ------------------------------------------------------------------------------------------------------------ real runs


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, prose: str) -> Path:
    """The folder of a run of PAT, one of AST and one of Wanda on the tiny model."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "prose.txt").write_text(prose)
    text, model = str(folder / "prose.txt"), str(tiny_llama)
    quick = "--steps 6 --window 32 --batch-size 2 --eval-window 64 --prompt-tokens 8 --new-tokens 2 --repeats 1"
    tune = ["tune", model, "--data", text, "--baselines", "none", "--eval-tokens", "640", *quick.split()]
    pat = ["--method", "pat", "--basis", "identity", "--ratio", "0.5", "--round-to", "4", "--milestone", "0.7"]
    prune = ["prune", model, "--calibration", text, "--eval-data", text, "--sparsity", "0.6", "--method", "wanda"]
    prune += ["--calibration-windows", "4", "--calibration-window", "32", "--eval-window", "64", "--eval-tokens", "640"]
    for name, command in (
        ("pat", [*tune, *pat]),
        ("ast", [*tune, "--method", "ast", "--refresh", "2"]),
        ("wanda", prune),
    ):
        assert cli.main([*command, "--out", str(folder / name)]) == 0
    return folder


def linears(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the blocks' linears of a stock checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")}


def test_real_runs_record_what_the_report_shows(real: Path, tiny_llama: Path, tmp_path: Path) -> None:
    result = numbers(tmp_path / "out", *(real / name for name in ("pat", "ast", "wanda")))
    assert result["problems"] == []
    layers = {(row["model"], row["block"], row["linear"]): row for row in rows(result, "every-layer")}
    dense = linears(tiny_llama)
    for run, checkpoint in (("pat", "model"), ("ast", "dense"), ("wanda", "dense")):
        after = linears(real / run / checkpoint)
        assert after.keys() == dense.keys()
        for name, weight in after.items():
            _, _, block, linear = name.removesuffix(".weight").split(".", 3)
            row = layers[run, int(block), linear]
            assert row["weights before"] == dense[name].numel()
            assert row["left"] == (weight.numel() if run == "pat" else int((weight != 0).sum()))
            assert run == "wanda" or row["after"] == tuple(weight.shape)
    models = {(row["run"], row["model"]): row for row in rows(result, "models")}
    stored = load_file(real / "pat" / "model" / "model.safetensors").values()
    assert models["pat", "pat"]["MB"] == sum(tensor.nbytes for tensor in stored)
    training = {(row["training"], row["figure"]) for row in rows(result, "training")}
    wanted = {("pat", "mask of channels that stay, mean"), ("pat", "channels that count")}
    assert wanted | {("ast", "mask bits that flipped, share")} <= training
    commands = {row["run"]: row for row in rows(result, "commands")}
    assert commands["pat"]["command"].startswith(f"pyprune tune {tiny_llama} --data") and commands["pat"]["versions"]
    assert "--method wanda" in commands["wanda"]["command"]


def test_the_spread_of_a_mask_is_that_of_its_values() -> None:
    mask = UnifiedMask(16, 12, learning_rate=0.02)
    for step in range(8):
        mask.begin(step, 10)
        values = sorted(mask.value.tolist())
        (mask.value * torch.linspace(-1, 1, 16)).sum().backward()
        figures = mask.learn(step, 10)
        wanted = [sum(values[:4]) / 4, values[3], values[4], sum(values[4:]) / 12]
        found = [figures[f"mask_{name}"] for name in ("going", "going_max", "staying_min", "staying")]
        assert found == pytest.approx(wanted, rel=1e-5)  # fp32
    assert wanted[1] < wanted[2] < 1


def test_every_start_of_a_run_leaves_its_command(real: Path, tiny_llama: Path) -> None:
    lines = [json.loads(line) for line in (real / "wanda" / "commands.jsonl").read_text().splitlines()]
    assert len(lines) == 1 and lines[0]["command"][:3] == ["pyprune", "prune", str(tiny_llama)]
    assert cli.main([*lines[0]["command"][1:], "--resume"]) == 0
    again = [json.loads(line) for line in (real / "wanda" / "commands.jsonl").read_text().splitlines()]
    assert len(again) == 2 and again[0] == lines[0] and again[1]["command"][-1] == "--resume"
    assert again[1]["versions"]["torch"] == torch.__version__
