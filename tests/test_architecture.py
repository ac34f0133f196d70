"""The arrows of docs/architecture.md, read from the sources."""

from __future__ import annotations

import ast
import fnmatch
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the ground up: a module imports only from rows above its own. A name may hold "*"; the first fitting row counts.
ROWS = [
    ["_native", "_registration", "console", "timing", "architectures", "methods", "schedules", "allocation"],
    ["reference.bits", "reference.selection", "calibration", "_cpu.common"],
    ["reference.nm", "reference.bitmap"],
    ["reference.*", "_cuda.common", "_cuda.plans", "_cpu.nm", "_cpu.bitmap"],
    ["reference", "_cpu.*", "_cuda.nm", "_cuda.bitmap", "surgery"],
    ["_cuda.nm_adamw"],
    ["_cuda.*"],
    ["_cpu", "_cuda", "basis", "data", "evaluation", "removal"],
    ["_ops", "_ops.dispatch", "plan"],
    ["_ops.nm", "_ops.bitmap", "_ops.nm_adamw"],
    ["_ops.*"],
    ["ops", "head_loss"],
    ["training"],
    ["modules", "info", "criteria", "patterns"],
    ["formats", "masked", "methods.oneshot"],
    ["quantizer", "compressed_tensors"],
    ["packing", "models", "tasks"],
    ["checkpoint", "vllm_plugin", "speed"],
    ["blockwise", "distillation"],
    ["optim", "reconstruction"],
    ["methods.ast", "methods.lora", "methods.magnitude", "methods.wanda", "methods.sparsegpt", "methods.admm"],
    ["methods.pat", "methods.loraprune", "methods.besa"],
    ["methods.planned", "methods.prune_then_tune"],
    ["methods.llm_pruner", "methods.slicegpt", "methods.slimgpt"],
    ["runs"],
    ["oneshot"],
    ["report.reading"],
    ["report.tables"],
    ["report.figures"],
    ["report.page"],
    ["report"],
    ["cli.fields", "cli.log"],
    ["cli.experiment", "cli.structured"],
    ["cli.prune"],
    ["cli.*"],
    ["cli"],
    ["__main__"],
]


def modules() -> dict[str, Path]:
    """Every module below pyprune, by its name there; the package itself, which imports lazily by name, is left out."""
    found = {}
    for path in (ROOT / "pyprune").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / "pyprune").with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    del found["__init__"]
    return found


def imported(path: Path) -> set[str]:
    """Names of modules below pyprune that a file imports, anywhere in it, and of other top-level packages."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in inner if name.removeprefix("pyprune.") in modules()}
            names |= submodules | ({node.module} if inner - submodules else set())
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("pyprune.") if name.startswith("pyprune.") else name.split(".")[0] for name in names}


def row_of(name: str) -> int:
    """The row of a module's name; one that is written out goes before a pattern that fits."""
    exact = [row for row, patterns in enumerate(ROWS) if name in patterns]
    fitting = [row for row, patterns in enumerate(ROWS) if any(fnmatch.fnmatch(name, p) for p in patterns)]
    assert fitting, f"{name} is in no row"
    return (exact or fitting)[0]


def test_arrows_run_one_way() -> None:
    height = {name: row_of(name) for name in modules()}
    unused = [pattern for patterns in ROWS for pattern in patterns if not fnmatch.filter(height, pattern)]
    assert unused == []
    wrong = [
        f"{name} -> {other}"
        for name, path in modules().items()
        for other in imported(path) & height.keys()
        if height[other] >= height[name]
    ]
    assert wrong == []


def test_ops_know_no_model_and_commands_start_quickly() -> None:
    found = {name: imported(path) for name, path in modules().items()}
    for name in found:
        if re.match(r"(_native|_cpu|_cuda|reference|_ops|ops|modules|info)\b", name):
            assert not found[name] & {"transformers", "peft", "accelerate", "datasets", "rich"}, name
    for name, path in modules().items():
        if name.split(".")[0] == "cli":
            head = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
            assert not any("torch" in ast.unparse(node) for node in head), name


def test_csrc_includes_no_torch() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    includes = {name for path in sources for name in re.findall(r'#include [<"](.*?)[>"]', path.read_text())}
    assert includes and not [name for name in includes if re.match("torch|ATen|c10", name)]


def test_only_architectures_knows_families() -> None:
    """No other file names an attribute of a decoder's blocks, or a class of transformers' models."""
    parts = r"\.(self_attn|mlp|q_proj|o_proj|down_proj|embed_tokens|lm_head|input_layernorm)\b"
    classes = r"\b(Llama|Qwen|Gemma|Mistral|Phi)\w*For"
    for name, path in modules().items():
        code = ast.unparse(ast.parse(path.read_text(encoding="utf-8")))
        code = re.sub(r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'', "", code)
        assert name == "architectures" or not re.search(f"{parts}|{classes}", code), name
