"""Opening a model: a folder or a name on the Hugging Face hub to a dense model and its tokenizer, safetensors only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pyprune import compressed_tensors, removal
from pyprune._cpu.sparse_gemm import product_dtype

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class ModelError(ValueError):
    """A model that cannot be used; the message says why and what to do."""


def check_model(path: str | Path) -> None:
    """Raises ModelError when `path` cannot be a checkpoint in safetensors, before anything large is read."""
    folder = Path(path)
    if folder.suffix in PICKLES and folder.is_file():
        raise ModelError(f"model {path} is a pickle file, which can run code when it is read; {_CONVERT}")
    if folder.is_file():
        raise ModelError(f"model {path} is a file; give the folder with config.json and *.safetensors")
    if not folder.is_dir():
        if folder.is_absolute() or str(path).count("/") > 1 or str(path).startswith("."):
            raise ModelError(f"model folder {path} does not exist")
        return  # a name on the hub
    if (folder / "stages").is_dir():
        results = [name for name in ("model", "packed", "dense") if (folder / name / "config.json").is_file()]
        named = " or ".join(str(folder / name) for name in results) or "its result, once there is one"
        raise ModelError(f"model folder {path} is the folder of a run; give {named}")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {path} has no config.json; give the folder of a transformers checkpoint")
    if not any(folder.glob("*.safetensors")):
        if any(file.suffix in PICKLES for file in folder.iterdir()):
            raise ModelError(f"model folder {path} holds a pickle checkpoint, which can run code when read; {_CONVERT}")
        raise ModelError(f"model folder {path} has no weights: no *.safetensors in it")


_CONVERT = (
    "only safetensors are read; convert it where you trust it, with "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)


def _refusal(path: str | Path, what: str, error: Exception) -> ModelError:
    if "trust_remote_code" in str(error):
        return ModelError(
            f"model {path} brings code of its own, which is run only when asked for: read it, and if you trust it pass "
            "--trust-remote-code (trust_remote_code=True in Python)"
        )
    return ModelError(f"model {path}: {what}: {error}")


def open_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    check_model(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _refusal(path, "its tokenizer cannot be read", error) from error


def open_skeleton(path: str | Path, trust_remote_code: bool = False) -> nn.Module:
    """The model of a checkpoint without its weights (on the meta device), to check names and shapes in no time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_model(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return removal.as_config(model)
    except (OSError, ValueError) as error:
        raise _refusal(path, "its config.json cannot be used", error) from error


def fast_dtype() -> str:
    """The name of the dtype in which models run fastest here: bfloat16 on a GPU or on a CPU with instructions for it,
    float32 where torch multiplies bfloat16 in plain loops, which is several times slower."""
    fast = torch.cuda.is_available() or product_dtype(torch.bfloat16) == torch.bfloat16
    return "bfloat16" if fast else "float32"


def open_model(path: str | Path, dtype: str = "auto", trust_remote_code: bool = False) -> nn.Module:
    """The model of a checkpoint, on the GPU if there is one. dtype: "auto" (that of the checkpoint) or torch's name."""
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoModelForCausalLM

    check_model(path)
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if compressed_tensors.is_bitmask(path):
            del config.quantization_config
            model = _fill(_empty(config, kind), compressed_tensors.read(path))
        elif hasattr(config, "block_widths"):
            folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path)))
            model = _open_uneven(_empty(config, kind), sorted(folder.glob("*.safetensors")))
        else:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=kind, use_safetensors=True, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise _refusal(path, "it cannot be loaded", error) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ModelError(f"model {path}: its weights are not of the shapes in config.json: {error}") from error
    return nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")


def _empty(config: Any, dtype: torch.dtype | str) -> Any:
    """The model of a config without memory behind it, cut to the config's widths where blocks differ in heads and
    channels, which stock code cannot build."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else dtype)
    return removal.as_config(model)


def _open_uneven(model: Any, files: Sequence[Path]) -> nn.Module:
    """An empty model of uneven widths with the weights of `files`, dense or packed: what `from_pretrained` does."""
    from pyprune.quantizer import SparseConfig, SparseQuantizer

    packed = getattr(model.config, "quantization_config", None)
    if packed is not None:
        model.hf_quantizer = SparseQuantizer(SparseConfig.from_dict(packed))
        model.hf_quantizer.preprocess_model(model, checkpoint_files=files)
    _fill(model, {name: tensor for file in files for name, tensor in load_file(file).items()})
    if packed is not None:
        model.hf_quantizer.postprocess_model(model)
    return model


def _fill(model: Any, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """An empty model with these weights, in its own dtype. Raises ValueError unless they are those that it has."""
    tensors = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in state.items()}
    try:
        unexpected = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise ValueError(f"its weights are not of the config's shapes: {error}") from error
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    for names, problem in ((missing, "are missing"), (unexpected, "are in the files that the model has no place for")):
        if names:
            raise ValueError(f"{len(names)} tensors {problem}, the first is {names[0]}")
    return model.eval()
