"""A decoded token of a dense model quantized by llama.cpp beside ours at the same bytes: Q8_0 and 2:4, Q4_0 and 70 %.

    python benchmarks/bench_llama_cpp.py --threads 2 --save
    python benchmarks/bench_llama_cpp.py --quality --save      # perplexity of the demo's model in those formats

Both run in this process, in turn, on one model of random weights, over a cache of the same length. llama.cpp is that of
the package llama-cpp-python, which `tests/surgery/llama_cpp.sh DIR` builds; it must be importable here. Its file is
written with the gguf package, all matrices in one format, the head too; ours keep the head dense. Before anything is
timed its logits must be those of the dense model with the weights that the format can hold. Q8_0 stores 8.5 bits a
weight and Q4_0 4.5; 2:4 stores 9, 50 % 9.1 and 70 % 5.9. What each reads for a token is printed. The perplexity is
torch's with the weights that the format can hold, by the protocol of `oneshot_quality.csv`, which has those of ours.
"""

from __future__ import annotations

import copy
import ctypes
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from bench_serving import Decoding, pruned
from harness import Case, Contender, Session, failure, options
from models import SHAPES, build
from results import Row
from torch import Tensor, nn

from pyprune import data
from pyprune.evaluation import perplexity
from pyprune.models import open_model, open_tokenizer
from pyprune.timing import error

FORMATS = ("Q8_0", "Q4_0")
OURS = ("2:4", "50%", "70%")
CHECKED = 16  # tokens
ALLOWED = 0.05
"""Of the logits, relative in the norm: llama.cpp rounds what it multiplies with to 8 bits."""


def rows_for_rope(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp turns neighbouring channels of a head where transformers turns one of each half."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def quantize(parameter: nn.Parameter, kind: gguf.GGMLQuantizationType) -> Any:
    """A matrix as a file holds it, bytes [rows, ...]; its parameter becomes what that stands for."""
    quantized = gguf.quants.quantize(parameter.detach().float().numpy(), kind)
    parameter.copy_(torch.from_numpy(gguf.quants.dequantize(quantized, kind)))
    return quantized


def write(model: Any, path: Path, format: str) -> int:
    """The model as a file of llama.cpp's; its own matrices become what the file holds. Returns the bytes of the
    matrices that a token reads."""
    config, kind = model.config, gguf.GGMLQuantizationType[format]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    read = 0
    for name, parameter in model.named_parameters():
        weight, layer = parameter.detach().float(), name.split(".")[-2]
        found = names.get_name(name, try_suffixes=(".weight",))
        if weight.dim() == 1:
            writer.add_tensor(found, weight.numpy())
            continue
        # blocks of the formats lie in a row, so that rows may be quantized before they change places
        quantized = quantize(parameter, kind)
        placed = rows_for_rope(torch.from_numpy(quantized), heads[layer]).numpy() if layer in heads else quantized
        writer.add_tensor(found, placed, raw_dtype=kind)
        read += quantized.nbytes if layer != "embed_tokens" or config.tie_word_embeddings else 0
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


class LlamaCpp:
    """A model that llama.cpp has opened, with one sequence of at most `context` tokens."""

    def __init__(self, path: Path, context: int, vocabulary: int) -> None:
        import llama_cpp

        self.library, self.vocabulary, self.context = llama_cpp, vocabulary, context
        self.log = llama_cpp.llama_log_callback(lambda *message: None)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        loading = llama_cpp.llama_model_default_params()
        loading.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
        running = llama_cpp.llama_context_default_params()
        running.n_ctx = running.n_batch = running.n_ubatch = context
        running.n_threads = running.n_threads_batch = torch.get_num_threads()
        self.state = llama_cpp.llama_init_from_model(self.model, running)
        if not self.state:
            raise RuntimeError(f"llama.cpp does not open {path.name}")

    def logits(self, tokens: list[int]) -> Tensor:
        """Of the last of these tokens [vocabulary], which follow those that the cache holds."""
        array = (self.library.llama_token * len(tokens))(*tokens)
        status = self.library.llama_decode(self.state, self.library.llama_batch_get_one(array, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(tokens)} tokens")
        found = self.library.llama_get_logits_ith(self.state, -1)
        return torch.from_numpy(numpy.ctypeslib.as_array(found, (self.vocabulary,)))

    def forget(self, position: int) -> None:
        """All from this position on."""
        self.library.llama_memory_seq_rm(self.library.llama_get_memory(self.state), 0, position, -1)

    def fill(self) -> None:
        """The cache, but for the last position."""
        self.forget(0)
        self.logits([1] * (self.context - 1))

    def step(self) -> Tensor:
        """One token in the last position, which attends to all."""
        self.forget(self.context - 1)
        return self.logits([1])


@torch.no_grad()
def opened(dense: Any, format: str, context: int, folder: Path) -> tuple[LlamaCpp, int]:
    """The dense model in llama.cpp, checked, its cache full; and the bytes of the matrices that a token reads."""
    path, model = folder / f"{format}.gguf", copy.deepcopy(dense)
    read = write(model, path, format)
    found = LlamaCpp(path, context, dense.config.vocab_size)
    ids = torch.randint(dense.config.vocab_size, (CHECKED,))
    expected = model(input_ids=ids[None], use_cache=False).logits[0, -1].float()
    off = error(found.logits(ids.tolist()), expected)
    if not off <= ALLOWED:
        raise SystemExit(f"llama.cpp {format}: the logits differ by {off:.1e}, more than {ALLOWED:.1e}")
    print(
        f"  checked: llama.cpp {format} against its weights in torch, logits within {off:.1e} (allowed {ALLOWED:.1e})"
    )
    found.fill()
    return found, read


WINDOW, HELD_OUT = 512, 16384
"""Tokens, as in `oneshot_quality.py`."""


@torch.no_grad()
def quality() -> list[Row]:
    """Perplexity of the demo's model, dense and with all of its matrices in each format."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = data.demo_model(Path(scratch, "model"))
        dense, tokenizer = open_model(folder, "bfloat16").eval(), open_tokenizer(folder)
    text = data.held_out_stream(data.demo_text().held_out, tokenizer, WINDOW, HELD_OUT)
    rows = []
    for name in ("dense", *FORMATS):
        model = copy.deepcopy(dense)
        bits = 16.0 if name == "dense" else round_to(model, name)
        found = perplexity(model, text.ids, WINDOW, labels=text.labels, bos=text.bos, progress=False).value
        who = name if name == "dense" else f"llama.cpp {name}"
        print(f"  {who:18} {bits:4.1f} bits a weight, perplexity {found:.2f}", flush=True)
        rows.append(
            Row("perplexity at equal bytes", f"{data.DEMO_MODEL.partition(',')[0]} bfloat16", who, "", *3 * [found])
        )
    return rows


def round_to(model: nn.Module, format: str) -> float:
    """Makes the matrices what the format can hold, in place; returns the bits of a weight."""
    kind = gguf.GGMLQuantizationType[format]
    size = count = 0
    for parameter in model.parameters():
        if parameter.dim() == 2:
            quantized = quantize(parameter, kind)
            size, count = size + quantized.nbytes, count + parameter.numel()
    return 8 * size / count


def main() -> None:
    """All of them in turn."""
    parser = options(__doc__, rounds=15, devices=("cpu",))
    parser.add_argument("--shape", default="llama-2048", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="blocks of it (default: all)")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--quality", action="store_true", help="perplexity of the demo's model instead of time")
    arguments = parser.parse_args()
    session = Session(arguments)
    if arguments.quality:
        session.keep(quality())
        return
    changes = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    dense: Any = build(arguments.shape, torch.bfloat16, **changes).eval()
    label = f"{arguments.shape} {dense.config.num_hidden_layers} layers batch=1 context={arguments.context}"
    case = Case("decode beside llama.cpp", label, {}, graphs=False, unit="ms")
    read: dict[str, int] = {}
    for name in ("dense", *OURS):
        decoding = Decoding(dense if name == "dense" else pruned(dense, name), 1, arguments.context)
        case.contenders[name], read[name] = Contender(decoding.step), decoding.bytes()
    with tempfile.TemporaryDirectory() as folder:
        for format in FORMATS:
            name = f"llama.cpp {format}"
            try:
                rival, read[name] = opened(dense, format, arguments.context, Path(folder))
                case.contenders[name] = Contender(rival.step)
            except ImportError as missing:
                case.skipped[name] = f"{missing}: tests/surgery/llama_cpp.sh builds it"
            except Exception as crash:
                case.skipped[name] = failure(crash)
        session.run(case)
    print("  read for a token: " + ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in read.items()))


if __name__ == "__main__":
    main()
