"""Every benchmark runs at toy size, keeps its rows, and refuses to measure a wrong result."""

from __future__ import annotations

import csv
import importlib
import multiprocessing
import shlex
import sys
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import pyprune
from pyprune import head_loss, ops, surgery
from pyprune.architectures import Decoder
from pyprune.data import Corpus, Document
from pyprune.runs import RunError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAT_STEP = "--shapes toy --dtypes float32 --bases learned --tokens 32 --window 16 --rounds 2 --threads 1 --no-memory"
SERVING = "--shape toy --dtype float32 --variants 2:4 '-25% hidden' --decode 3x32 --prompts 2x16 --rounds 1 --threads 1"
HSM = "--tokens 8 --hidden 32 --rank 4 --rounds 2 --threads 1 --dtypes float32"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a script with arguments and --save; returns the rows that it kept."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("results"), "RESULTS", tmp_path / "results.csv")

    def run(name: str, arguments: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *shlex.split(arguments), "--save"])
        importlib.import_module(name).main()
        with (tmp_path / "results.csv").open() as file:
            return list(csv.DictReader(file))

    return run


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes minutes; its contender is eager here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_hsm(script: Any, no_compiler: None) -> None:
    kept = script("bench_hsm", HSM)
    assert len(kept) == 2 * 2 * 5  # ops, directions, contenders and limits


def test_hsm_refuses_a_wrong_result(script: Any, no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("bench_hsm")
    right = module.eager_hsm
    monkeypatch.setattr(module, "eager_hsm", lambda *tensors: 1.001 * right(*tensors))
    with pytest.raises(SystemExit, match=r"hsm forward, .*: eager is off by"):
        script("bench_hsm", HSM)


def test_pat_step(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kept = script("bench_pat_step", PAT_STEP)
    by_provider = {row["provider"]: float(row["p50"]) for row in kept}
    assert list(by_provider) == ["lora", "before", "masked", "compact", "limit of before", "limit of compact"]
    assert all(value > 0 for value in by_provider.values())
    assert "compact against masked" in capsys.readouterr().out


def test_pat_step_refuses_a_wrong_compaction(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "set_gain", lambda *arguments: None)
    with pytest.raises(SystemExit, match="compact against masked"):
        script("bench_pat_step", PAT_STEP)


def test_pat_step_counts_what_a_step_multiplies(script: Any) -> None:
    """By hand, for each token: a frozen weight is in two products (output, gradient of the input), others in three."""
    models, module = importlib.import_module("models"), importlib.import_module("bench_pat_step")
    case = module.PatSetting("toy", "float32", 32, 16)
    lora = module.contender(case, "lora", 1)  # rank 1
    before = module.contender(case, "before", 0)  # rank 20, HSMs of rank 8
    hidden, inner, kv, blocks, vocabulary = 64, 96, 32, 2, 128
    block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    adapters = 4 * hidden + 2 * (hidden + kv) + 3 * (hidden + inner)  # of one block, for each rank
    frozen = 4 * (blocks * block + vocabulary * hidden)
    attention = blocks * (2 + 5) * 16 * hidden  # two products and five, of which the causal mask leaves half
    # LoRA has nothing to train before the first q, k and v, so these need no gradient of their input; PAT has the mask
    unneeded = 2 * hidden * (hidden + 2 * kv) + 2 * 3 * hidden
    assert models.floating_point_operations(lora.step) == 32 * (frozen + 6 * blocks * adapters + attention - unneeded)
    hsms = 2 * blocks * 6 * 2 * hidden * 8
    identity_loss = 2 * blocks * 2 * 3 * 2 * hidden * 8**2  # of l0 and l1, once a step
    per_token = frozen + 6 * blocks * adapters * 20 + attention + hsms
    assert models.floating_point_operations(before.step) == 32 * per_token + identity_loss


def test_pat_step_memory(script: Any) -> None:
    module = importlib.import_module("bench_pat_step")
    setting = module.PatSetting("toy", "float32", 2048, 64)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:  # what `peak` asks for
        found = pool.submit(module.peak, setting, "compact", 0).result()
    logits_bytes = 2048 * 128 * 4
    assert found * module.MEBIBYTE > logits_bytes


def test_loraprune_step(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kept = script(
        "bench_loraprune_step", "--shapes toy --dtypes float32 --tokens 32 --window 16 --rounds 2 --threads 1"
    )
    times = {row["provider"]: float(row["p50"]) for row in kept}
    assert list(times) == ["lora", "scoring", "masked", "cut", "limit of scoring", "limit of cut"]
    assert times["limit of scoring"] == times["lora"]  # masks multiply nothing
    assert 0.6 < times["limit of cut"] / times["lora"] < 0.9  # a quarter of all weights, more of the linears'
    assert "cut against masked" in capsys.readouterr().out


TUNE_STEP = "--shapes toy --dtypes bfloat16 --tokens 32 --window 16 --rounds 2 --threads 1"


def test_tune_step(script: Any) -> None:
    kept = script("bench_tune_step", TUNE_STEP)
    ways = ["Trainer", "Trainer, bf16=True", "HeadLoss", "tune"]
    assert [row["provider"] for row in kept if row["benchmark"] == "tune step"] == [*ways, "floor"]
    assert [row["provider"] for row in kept if row["benchmark"] == "head loss"] == [
        "whole", "head_loss", "torch", "floor",
    ]  # fmt: skip
    assert [row["provider"] for row in kept if row["benchmark"] == "tune step memory"] == ways


def test_tune_step_refuses_another_loss(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, hidden: torch.Tensor, labels: torch.Tensor, items: Any) -> torch.Tensor:
        return 1.02 * head_loss.head_loss(hidden, self.head.weight, labels, items)[0]

    monkeypatch.setattr(head_loss.HeadLoss, "loss", wrong)
    with pytest.raises(SystemExit, match=r"the loss of HeadLoss is .*, that of Trainer"):
        script("bench_tune_step", TUNE_STEP)


def test_serving(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kept = script("bench_serving", SERVING)
    cases = [(row["benchmark"], row["case"].partition("float32 ")[2]) for row in kept[::4]]
    loads = [("decode a token", "batch=3 context=32"), ("first token", "batch=2 prompt=16")]
    assert cases == [(op, f"{variant} {load}") for variant in ("2:4", "-25% hidden") for op, load in loads]
    assert [row["provider"] for row in kept] == 4 * ["dense", "pyprune", "limit", "floor"]
    assert "| -25% hidden | " in capsys.readouterr().out.splitlines()[-1]


def test_serving_limits_are_bytes_of_a_token_and_operations_of_a_prompt(script: Any) -> None:
    """By hand, with a quarter of 64 channels gone: the heads, the FFN's channels and the cache stay."""
    kept = script("bench_serving", SERVING)[8:]
    decode, first = (float(rows[0]["p50"]) / float(rows[2]["p50"]) for rows in (kept[:4], kept[4:]))
    blocks, heads, kv, inner, vocabulary = 2, 64, 32, 96, 128

    def linears(hidden: int) -> int:
        return blocks * hidden * (2 * heads + 2 * kv + 3 * inner)

    def read(hidden: int) -> int:
        return linears(hidden) + blocks * 2 * hidden + vocabulary * hidden + 3 * 32 * blocks * 2 * kv

    def operations(hidden: int) -> int:  # attention's two products, of which the causal mask leaves half
        return 2 * (2 * 16 * linears(hidden) + 2 * vocabulary * hidden + blocks * 2 * 16 * 16 * heads)

    assert decode == pytest.approx(read(64) / read(48), rel=2e-3)  # rows have four digits
    assert first == pytest.approx(operations(64) / operations(48), rel=2e-3)


def test_serving_memory(script: Any) -> None:
    """The head's logits of 16 tokens alone are small; weights of 16 MB are not."""
    module, models = importlib.import_module("bench_serving"), importlib.import_module("models")
    model = models.build("toy", torch.float32, vocab_size=65536)
    rows = {row.provider: row.p50 for row in module.memory(model, "toy", "dense")}
    assert rows["dense"] > rows["dense computed"] > 16


def test_serving_refuses_a_wrong_cut(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = surgery.slice_hidden
    monkeypatch.setattr(surgery, "slice_hidden", lambda model, keep: right(model, keep + 1))
    with pytest.raises(SystemExit, match="-25% hidden against the dense model with the same zeros, 8 tokens"):
        script("bench_serving", SERVING.replace("2:4 ", ""))


def test_serving_leaves_a_wrong_packing_out(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other variants are measured, and the exit status tells."""
    wrong = lambda model, measure: model.model.layers[1].mlp.up_proj.weight.data.mul_(0.9)  # noqa: E731
    monkeypatch.setattr(pyprune, "sparsify", wrong)
    with pytest.raises(SystemExit, match="left out: 2:4 against the dense model with the same zeros, 8 tokens"):
        script("bench_serving", SERVING)
    table = capsys.readouterr().out.splitlines()[-1]
    assert table.startswith("| -25% hidden | ") and table.count("x (") == 2


def test_serving_refuses_a_load_that_is_none(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("bench_serving", "--decode 8")
    assert "'8' is no load; expected BATCHxTOKENS, such as 8x512" in capsys.readouterr().err


def test_ast_step(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    step = "--shape toy --dtypes float32 --tokens 32 --window 16 --rounds 2 --threads 1 --parts op step"
    kept = script("bench_ast_step", step)
    found = [(row["benchmark"], row["provider"]) for row in kept]
    op = ["unfused", "pyprune", "fused AdamW", "copy"]
    whole = ["AST", "dense", "products + AdamW", "mask refresh"]
    assert found == [("nm_adamw step", name) for name in op] + [("ast step", name) for name in whole]
    assert {row["unit"] for row in kept} == {"ms"} and "goal 80%" in capsys.readouterr().out


def test_llama_cpp_is_skipped_where_it_is_not(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    kept = script("bench_llama_cpp", "--shape toy --layers 1 --context 8 --rounds 2 --threads 1")
    assert [row["provider"] for row in kept] == ["dense", "2:4", "50%", "70%"]
    assert capsys.readouterr().out.count("tests/surgery/llama_cpp.sh builds it") == 2


def test_what_llama_cpp_reads_is_the_model(script: Any, tmp_path: Path) -> None:
    module, models = importlib.import_module("bench_llama_cpp"), importlib.import_module("models")
    model = models.build("toy", torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        read = module.write(model, tmp_path / "toy.gguf", "Q8_0")
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "toy.gguf").tensors}
    assert read == sum(
        tensor.n_bytes for tensor in held.values() if len(tensor.shape) == 2
    )  # the head is the embedding
    found = {name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type)) for name, t in held.items()}
    down, key = model.model.layers[1].mlp.down_proj.weight, model.model.layers[1].self_attn.k_proj.weight
    torch.testing.assert_close(found["blk.1.ffn_down.weight"], down.detach(), rtol=0, atol=0)
    for name, weight in model.named_parameters():  # 8 bits: half a step of a block's largest value
        assert (weight - before[name]).abs().max() <= before[name].abs().max() / 127 * 0.51
    # rotary pairs: channel i of the first half and of the second half of a head become neighbours
    pairs = found["blk.1.attn_k.weight"].view(2, 8, 2, 64)
    torch.testing.assert_close(pairs[:, :, 0], key.detach().view(2, 16, 64)[:, :8], rtol=0, atol=0)
    torch.testing.assert_close(pairs[:, :, 1], key.detach().view(2, 16, 64)[:, 8:], rtol=0, atol=0)


def test_perplexity_in_llama_cpps_formats(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    prose: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Eight bits change little, four more."""
    module, models = importlib.import_module("bench_llama_cpp"), importlib.import_module("models")
    models.build("toy", torch.float32, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = Corpus([], [], [Document(prose)], "text")
    monkeypatch.setattr(module.data, "demo_model", lambda folder: tmp_path / "model")
    monkeypatch.setattr(module.data, "demo_text", lambda: text)
    monkeypatch.setattr(module, "WINDOW", 64)
    monkeypatch.setattr(module, "HELD_OUT", 640)
    kept = script("bench_llama_cpp", "--quality --threads 1")
    assert [row["provider"] for row in kept] == ["dense", "llama.cpp Q8_0", "llama.cpp Q4_0"]
    assert "Q8_0      8.5 bits a weight" in capsys.readouterr().out
    dense, eight, four = (float(row["p50"]) for row in kept)
    assert eight == pytest.approx(dense, rel=0.01) and four == pytest.approx(dense, rel=0.1)  # logits are small here
    assert four != dense


def test_host(script: Any) -> None:
    kept = script("bench_host", "--rounds 2 --threads 1")
    assert len(kept) == 2 * 3 + 2 * 2
    assert {row["unit"] for row in kept} == {"us"}


def test_host_refuses_a_wrong_result(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.hsm
    module = importlib.import_module("bench_host")
    monkeypatch.setitem(module.FUSED, "hsm", lambda *tensors: 1.001 * right(*tensors))
    with pytest.raises(SystemExit, match=r"host hsm forward, .*: pyprune is off by"):
        script("bench_host", "--rounds 2 --threads 1")


@pytest.fixture
def children(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children see no patches, so trials run in this process."""

    def run(names: list[str], result: Any, logs: Path, jobs: int = 1) -> list[str]:
        main = importlib.import_module(Path(sys.argv[0]).stem).main
        for name in [name for name in names if result(name) is None]:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [*sys.argv, "--one", name])
                main()
        return [name for name in names if result(name) is None]

    monkeypatch.setattr(importlib.import_module("trials"), "run", run)


@pytest.fixture
def quality(
    script: Any, children: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path, prose: str
) -> Any:
    """The long recipe on a tiny model; call it with a ratio to get the csv's rows."""
    module = importlib.import_module("pat_quality")
    documents = [Document(text) for text in prose.split("\n\n")]
    corpus = Corpus(documents[:-4], documents[-6:-4], documents[-4:], "prose")
    monkeypatch.setattr(module, "CSV", tmp_path / "pat_quality.csv")
    monkeypatch.setattr(module.data, "demo_text", lambda: corpus)
    monkeypatch.setattr(
        module.data, "demo_model", lambda folder: folder.parent.mkdir() or folder.symlink_to(tiny_llama)
    )
    options = (
        "--steps 4 --batch-size 2 --window 16 --warmup 0 --dtype float32 --eval-window 64 --prompt-tokens 8 "
        f"--new-tokens 1 --repeats 1 --calibration-windows 4 --threads 1 --out {tmp_path / 'runs'}"
    )

    def run(arguments: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", ["pat_quality.py", *f"{options} {arguments}".split()])
        module.main()
        return module.read_csv(module.CSV, module.COLUMNS.split())

    return run


def test_quality(quality: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = quality("--ratios 0.25 --bases learned pca")
    methods = [(cell["method"], cell["basis"], cell["hidden_size"]) for cell in cells]
    cut = [("prune-then-tune", "pca", "24"), ("pat", "learned", "24"), ("pat", "pca", "24")]
    assert methods == [("dense", "", "32"), ("lora", "", "32"), *cut]
    assert (tmp_path / "pat_quality.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()[-5:]
    assert table[0].count("|") == table[-1].count("|") == 9
    assert table[-1].startswith("| 24 (-25%) |")
    for cell in cells[2:]:
        assert f"{float(cell['perplexity']):.2f}" in table[-1]
    before = (tmp_path / "pat_quality.csv").read_text()
    quality("--ratios 0.25 --bases learned pca")  # done already, so nothing is trained again
    assert (tmp_path / "pat_quality.csv").read_text() == before


def test_quality_side_by_side(quality: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trials beside others are not timed; --collect takes what is finished, runs nothing, and says what is missing."""
    cells = quality("--ratios 0.25 --jobs 2")
    assert [cell["method"] for cell in cells] == ["dense", "lora", "prune-then-tune", "pat"]
    assert {(cell["prefill_speedup"], cell["decode_speedup"]) for cell in cells} == {("", "")}
    assert "Speed beside" not in capsys.readouterr().out
    (tmp_path / "runs" / "pat-learned-0.25" / "model" / "model.safetensors").unlink()  # the shape is enough
    timed = quality("--ratios 0.25 --jobs 2 --speed")
    assert [float(cell["decode_speedup"] or 0) > 0 for cell in timed] == [False, False, True, True]
    assert timed[2]["decode_speedup"] == timed[3]["decode_speedup"]  # of one shape
    assert "Speed beside the dense model: 1 threads of" in capsys.readouterr().out
    (tmp_path / "runs" / "pat-learned-0.25" / "summary.json").unlink()
    with pytest.raises(SystemExit, match=r"1 trials are not finished: pat-learned-0\.25"):
        quality("--ratios 0.25 --jobs 2 --collect")
    assert importlib.import_module("csvs").read_csv(tmp_path / "pat_quality.csv", timed[0]) == timed
    with pytest.raises(RunError, match="repeats was 0 and is now 1"):
        quality("--ratios 0.25")


def summary(**changes: Any) -> dict[str, Any]:
    """Of a trial at pruning a quarter, as far as rows are made of it."""
    return {
        **{"method": "pat", "basis": "learned", "ratio_requested": 0.25, "ratio_achieved": 0.25, "tied": False},
        **{"params_dense": 100, "params_pruned": 75, "block_params_dense": 60, "block_params_pruned": 45},
        **{"hidden_size_dense": 32, "hidden_size_pruned": 24, "ppl_dense": 10.0, "ppl_pruned": 12.0},
        **{"prefill_speedup": 1.2, "decode_speedup": 1.3, "steps": 4, "tokens_trained": 128, "seconds": 5.0},
        **{"evaluation": {"tokens": 9, "window": 8, "stride": 8}, "dtype": "float32", "seed": 0, "commit": None},
        "hardware": {"gpu": None, "cpu": "a processor", "threads": 1},
        "versions": dict.fromkeys(("torch", "transformers", "peft", "pyprune"), "1"),
        **changes,
    }


def test_quality_has_a_table_for_each_budget(script: Any, tmp_path: Path) -> None:
    """Another ratio joins one, another budget has its own, each beside the dense model, which is tuned by none."""
    module = importlib.import_module("pat_quality")
    half = summary(ratio_requested=0.5, ratio_achieved=0.5, hidden_size_pruned=16)
    other = summary(dtype="bfloat16", ppl_dense=11.0)
    key, file = ("method", "basis", "ratio_requested", *module.PROTOCOL), tmp_path / "quality.csv"
    for found in ([summary(), half], [summary(steps=5, tokens_trained=160)], [other], [summary(ppl_pruned=13.0)]):
        cells = module.add_rows(module.rows(found), file, key)
    assert [cell["method"] for cell in cells] == ["dense", "pat", "pat", "pat", "dense", "pat"]
    first, longer, bfloat = module.tables(cells).split("| hidden channels |")[1:]
    for table, dense, left in ((first, "10.00", 2), (longer, "10.00", 1), (bfloat, "11.00", 1)):
        assert f"| 32 (dense, untouched) | 0.0M | {dense} |" in table and table.count("(-") == left
    assert "| 13.00 |" in first and "| 12.00 |" in longer and "160 tokens" in longer


def test_the_dense_row_has_nothing_of_a_pruned_trial(script: Any) -> None:
    """LoRA may not be finished."""
    module = importlib.import_module("pat_quality")
    dense, pruned = module.rows([summary()])
    differ = {name: value for name, value in dense.items() if value != pruned[name]}
    assert differ == {
        **{"method": "dense", "basis": "", "ratio_requested": 0, "ratio": "0.0000", "perplexity": "10.0000"},
        **{"params": 100, "block_params": 60, "hidden_size": 32, "tied": "", "prefill_speedup": ""},
        **{"decode_speedup": "", "speed_on": "", "steps": 0, "tokens_trained": 0, "seconds": 0},
    }
    assert list(dense) == module.COLUMNS.split()
    assert module.rows([summary(ratio_achieved=0.0, tied=True)])[0]["tied"] is True


@pytest.fixture
def elsewhere(script: Any, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, prose: str) -> Any:
    """models.py, whose real model is on the device without memory, which stands for a GPU."""
    models = importlib.import_module("models")
    documents = [Document(text) for text in prose.split("\n\n")]
    corpus = Corpus(documents[:-4], documents[-6:-4], documents[-4:], "prose")
    monkeypatch.setattr(models.data, "demo_text", lambda: corpus)
    monkeypatch.setattr(models, "open_tokenizer", lambda folder: tokenizer)
    model = models.build("toy", torch.float32).to("meta")
    model.tie_weights()
    monkeypatch.setattr(models, "open_model", lambda *arguments: model)
    return models


def test_a_real_models_ids_are_where_it_is(elsewhere: Any) -> None:
    _, *ids = elsewhere.real_model(Path("folder"), 16)
    assert [part.device.type for part in ids] == ["meta", "meta"]


@pytest.mark.parametrize("name", ["bench_bases", "bench_criteria"])
def test_rows_of_a_real_model_say_where_it_ran(elsewhere: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module, devices = importlib.import_module(name), []
    monkeypatch.setattr(module, "append", lambda rows, device: devices.append(device))
    if name == "bench_bases":
        monkeypatch.setattr(module, "perplexity", lambda *arguments: types.SimpleNamespace(value=1.0))
        monkeypatch.setattr(module, "rotated", lambda model, *arguments: model)
        monkeypatch.setattr(module, "cut", lambda model, *arguments: model)
        monkeypatch.setattr(module.basis, "covariance", lambda *arguments: torch.eye(64))
        monkeypatch.setattr(module.basis, "mixable", lambda model: torch.zeros(64))
    else:
        monkeypatch.setattr(module, "costs", lambda *arguments: {"block": torch.ones(2)})
        monkeypatch.setattr(module.criteria, "score", lambda *arguments: {"block": torch.ones(2)})
    monkeypatch.setattr(sys, "argv", [name, "--model", "folder", "--window", "16", "--threads", "1", "--save"])
    module.main()
    assert devices == ["meta"]


def test_structured_memory_is_kept_on_request(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("structured_memory")
    peaks = {"loraprune": 2**30, "taylor streamed": 2**31}
    child = lambda command, **options: types.SimpleNamespace(stdout=str(peaks[command[-1]]))  # noqa: E731
    monkeypatch.setattr(module, "subprocess", types.SimpleNamespace(run=child, PIPE=None))
    command = ["structured_memory.py", "--variants", *peaks, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    module.main()
    assert "taylor streamed: 2.000 GiB; 50.0% less by loraprune" in capsys.readouterr().out
    assert not (tmp_path / "results.csv").exists()
    kept = script("structured_memory", "--variants 'loraprune' 'taylor streamed' --device cpu")
    assert {row["provider"]: row["p50"] for row in kept} == {"loraprune": "1024", "taylor streamed": "2048"}


def test_quality_refuses_runs_that_are_no_comparison(script: Any) -> None:
    module = importlib.import_module("pat_quality")
    same = {key: 1 for key in ("data", "tokens_trained", "steps", "seed", "dtype", "ppl_dense", "params_dense")}
    summaries = [{**same, "evaluation": {"tokens": tokens}} for tokens in (100, 101)]
    with pytest.raises(SystemExit, match="evaluation"):
        module.check(summaries)
    module.check([{**same, "evaluation": {}, "ppl_dense": value} for value in (18.26, 18.252)])
    with pytest.raises(SystemExit, match=r"ppl_dense: \[18.26, 18.3\]"):
        module.check([{**same, "evaluation": {}, "ppl_dense": value} for value in (18.26, 18.3)])


def test_criteria(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path, prose: str) -> None:
    """Heads that write nothing cost nothing; who looks at activations drops them, and "best" is never dearer."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.v_proj.weight[i * 8 : (i + 1) * 8] = 0
    model.save_pretrained(tmp_path / "tiny")
    PreTrainedTokenizerFast.from_pretrained(tiny_llama).save_pretrained(tmp_path / "tiny")
    documents = [Document(text) for text in prose.split("\n\n")]
    corpus = Corpus(documents[:-4], documents[-6:-4], documents[-4:], "prose")
    monkeypatch.setattr(importlib.import_module("models").data, "demo_text", lambda: corpus)
    options = f"--model {tmp_path / 'tiny'} --windows 4 --window 16 --threads 1 --criteria activation magnitude"
    kept = script("bench_criteria", options)
    cost = {row["provider"]: float(row["p50"]) for row in kept if row["benchmark"] == "heads dropped first"}
    assert cost.keys() == {"best", "random", "activation", "magnitude"}
    assert cost["activation"] == pytest.approx(0, abs=1e-6)
    assert cost["best"] <= min(cost.values()) and cost["random"] != pytest.approx(0, abs=1e-6)


def test_bases(script: Any, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, prose: str) -> None:
    """Before the cut all bases are the dense model but those that level gains; untied, fewer channels are left."""
    documents = [Document(text) for text in prose.split("\n\n")]
    corpus = Corpus(documents[:-4], documents[-6:-4], documents[-4:], "prose")
    monkeypatch.setattr(importlib.import_module("models").data, "demo_text", lambda: corpus)
    options = f"--model {tiny_llama} --removed 0.5 --windows 4 --window 16 --measured 8 --threads 1 --tolerances 0 0.3"
    kept = script("bench_bases", options)
    whole, left = (
        {row["provider"]: float(row["p50"]) for row in kept if row["benchmark"] == f"basis, {what}"}
        for what in ("uncut", "50% removed")
    )
    assert whole.keys() == left.keys() == {"identity", "untied", "tied 0", "tied 0.3"}
    assert whole["untied"] == pytest.approx(whole["identity"], rel=1e-4)
    assert whole["tied 0"] == pytest.approx(whole["identity"], rel=1e-4)
    assert min(abs(left[name] / whole[name] - 1) for name in left) > 1e-3
    assert len({round(value, 6) for value in left.values()}) >= 3


STRUCTURED = (
    "--steps 6 --batch-size 2 --window 16 --warmup 0 --dtype float32 --eval-window 64 --prompt-tokens 8 --new-tokens 1 "
    "--calibration-windows 4 --threads 1 --jobs 2 --removed 0.2"
)


def test_structured_quality(
    script: Any,
    children: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_llama: Path,
    prose: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Seeds and methods of another day join the table; another budget has its own."""
    module = importlib.import_module("structured_quality")
    documents = [Document(text) for text in prose.split("\n\n")]
    corpus = Corpus(documents[:-4], documents[-6:-4], documents[-4:], "prose")
    monkeypatch.setattr(module, "CSV", tmp_path / "structured_quality.csv")
    monkeypatch.setattr(importlib.import_module("pat_quality").data, "demo_text", lambda: corpus)
    options = f"{STRUCTURED} --model {tiny_llama} --out {tmp_path / 'runs'}"

    def run(arguments: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", ["structured_quality.py", *f"{options} {arguments}".split()])
        module.main()
        return module.read_csv(module.CSV, module.COLUMNS.split())

    first = run("--seeds 0 --methods lora llm-pruner")
    assert [(cell["method"], cell["removed_requested"], cell["seed"]) for cell in first] == [
        ("lora", "0", "0"),
        ("llm-pruner", "0.2", "0"),
    ]
    both = run("--seeds 1 --methods llm-pruner")
    assert both[:2] == first and [cell["seed"] for cell in both[2:]] == ["1"]
    mean = sum(float(cell["perplexity"]) for cell in both[1:]) / 2
    *_, line = (line for line in capsys.readouterr().out.splitlines() if "| LLM-Pruner" in line)
    assert f"| {mean:.2f} ± " in line
    assert all(cell["decode_speedup"] == "" for cell in both)
    capsys.readouterr()
    run("--seeds 0 --methods llm-pruner --speed")  # one of two seeds: the table has what there is
    *_, line = (line for line in capsys.readouterr().out.splitlines() if "| LLM-Pruner" in line)
    assert f"| {mean:.2f} ± " in line and line.count("x |") == 2
    timed = run("--seeds 0 1 --methods llm-pruner --speed")
    assert [cell["decode_speedup"] == "" for cell in timed] == [True, False, False]
    assert timed[1]["decode_speedup"] == timed[2]["decode_speedup"]  # of one shape
    assert run("--seeds 0 1 --methods llm-pruner --collect") == timed
    elsewhere = timed[2] | {"hardware": "another machine", "peak_training_bytes": "1"}  # memory is not its like
    lines = module.table([*timed[:2], elsewhere]).splitlines()
    (line,) = (line for line in lines if line.startswith("| 2") and "LLM-Pruner" in line)
    assert f"| {mean:.2f} ± " in line
    assert line.endswith(f"| {float(timed[1]['peak_training_bytes']) / 2**30:.2f} GiB |")
    assert "(LLM-Pruner, then LoRA at 20%, seed 1, on another machine)" in lines[-1]
    both = timed
    capsys.readouterr()
    longer = run(f"--seeds 0 --methods lora --steps 7 --out {tmp_path / 'longer'}")
    assert longer[:3] == both and longer[3]["steps"] == "7"
    assert capsys.readouterr().out.count("| removed | method |") == 2
    assert (tmp_path / "structured_quality.png").read_bytes().startswith(b"\x89PNG")


def test_blockwise(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kept = script("bench_blockwise", "--shape toy --windows 2 --window 16 --rounds 2 --threads 1")
    passes = [row["provider"] for row in kept if row["benchmark"] == "calibration pass"]
    assert passes == ["plain forward", "replay", "norms", "Gram matrices"]
    assert {row["unit"] for row in kept} <= {"tokens/CPU s", "CPU s", "GiB"}
    methods = [row["provider"] for row in kept if row["benchmark"] == "one-shot block"]
    assert methods == ["wanda", "sparsegpt", "llm-pruner"]
    assert "of the plain forward's speed (goal 0.9)" in capsys.readouterr().out


@pytest.fixture
def oneshot(
    script: Any, children: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path, prose: str
) -> Any:
    """The table of one-shot methods on a tiny model; call it with options to get the csv's rows."""
    module = importlib.import_module("oneshot_quality")
    documents = [Document(text) for text in prose.split("\n\n")]
    monkeypatch.setattr(module, "CSV", tmp_path / "oneshot_quality.csv")
    monkeypatch.setattr(module.data, "demo_text", lambda: Corpus(documents[:4], documents[4:8], documents[8:], "prose"))
    options = "--calibration-windows 4 --calibration-window 16 --eval-window 32 --eval-tokens 320 --dtype float32"
    options += f" --threads 1 --model {tiny_llama} --out {tmp_path / 'trials'}"

    def run(arguments: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", ["oneshot_quality.py", *f"{options} {arguments}".split()])
        module.main()
        return module.read_csv(module.CSV, module.COLUMNS.split())

    return run


def test_oneshot_quality(oneshot: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = "--methods wanda wanda-owl wanda-reconstructed --levels 0.5 2:4"
    cells = oneshot(chosen)
    assert {(cell["method"], cell["level"]) for cell in cells} == {
        ("dense", "0"),
        *(("wanda", level) for level in ("0.5", "2:4")),
        *(("wanda-reconstructed", level) for level in ("0.5", "2:4")),
        ("wanda-owl", "0.5"),
    }
    assert {cell["sparsity"] for cell in cells} == {"0.000000", "0.500000"}
    lines = capsys.readouterr().out.splitlines()
    assert "|  | 50% | 2:4 |" in lines
    wanda = next(cell for cell in cells if (cell["method"], cell["level"]) == ("wanda", "2:4"))
    row = next(line for line in lines if line.startswith("| Wanda |"))
    assert f"{float(wanda['perplexity']):.1f}" in row
    assert (tmp_path / "oneshot_quality.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "oneshot_quality.csv").read_text()
    assert oneshot(chosen) and (tmp_path / "oneshot_quality.csv").read_text() == before  # nothing is pruned again
    with pytest.raises(SystemExit, match="holds trials of Recipe"):
        oneshot(f"{chosen} --seed 1")
    capsys.readouterr()
    both = oneshot(f"--methods wanda --levels 0.5 --dtype bfloat16 --out {tmp_path / 'bf16'}")
    assert both[: len(cells)] == cells and [(row["method"], row["dtype"]) for row in both[len(cells) :]] == [
        ("dense", "bfloat16"),
        ("wanda", "bfloat16"),
    ]
    first, second = capsys.readouterr().out.split("|  | 50% |")[1:]  # another protocol has a table of its own
    assert "float32, seed 0" in first and "reconstruction" in first
    assert "bfloat16, seed 0" in second and "reconstruction" not in second
