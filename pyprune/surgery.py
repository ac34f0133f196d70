"""Exact removal of hidden channels: fold adapters, merge HSMs, slice the residual stream, export a stock checkpoint.

Everything here keeps the function of the *masked* model, whose dropped channels of the residual stream are zero. With
K the kept channels, d the old width and n = |K| the new one (PAT, arXiv 2408.14721):

    readers    W <- W[:, K]                      q, k, v, gate, up, head
    writers    W <- W[K, :], b <- b[K]           attention output, MLP down
    embedding  E <- E[:, K]
    norms      g <- g[K] sqrt(d/n), eps <- eps d/n,   because mean_d(x^2) + eps = (n/d) (mean_n(x^2) + eps d/n)

Two ways use the same code. `slice_hidden` cuts a stock model everywhere and is done. `compact` cuts a model that goes
on training (PEFT or not), where HSMs still read all d outputs of their writers: those writers are *permuted*, kept
channels first. Later `fold_adapters`, `merge_hsm` with the HSMs' [n, d] matrices, and `settle_config` make it a stock
model.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import nn

from pyprune.architectures import Decoder, base, describe, unwrap, weight_of

ROWS_AT_ONCE = 16384  # rows of a vocabulary matrix that are in fp64 at one time


@dataclass(frozen=True)
class Selection:
    """What happened to a parameter: entries `index` of dimension `dim` were kept, in this order.

    Call it on anything of the parameter's old shape, such as an optimizer's moments, to cut that alike.
    """

    dim: int
    index: torch.Tensor

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_select(self.dim, self.index.to(tensor.device))

    squared = __call__


# ---------------------------------------------------------------- which dimension of which parameter is the hidden size


# Layers are `Any` here: nn.Linear, nn.Embedding, or PEFT's LoRA layer around one, whose attributes PEFT adds at run
# time.


def input_axes(module: Any) -> Iterator[tuple[nn.Parameter, int]]:
    """Parameters of a linear that reads the residual stream, with the dimension that is the hidden size."""
    yield weight_of(module), 1
    for adapter in _adapters(module):
        yield module.lora_A[adapter].weight, 1


def output_axes(module: Any) -> Iterator[tuple[nn.Parameter, int]]:
    """Parameters of an embedding or of a linear that writes to the residual stream, with the hidden dimension."""
    if isinstance(base(module), nn.Embedding):
        yield weight_of(module), 1
        return
    layers = [base(module), *(module.lora_B[adapter] for adapter in _adapters(module))]
    for layer in layers:
        yield layer.weight, 0
        if layer.bias is not None:
            yield layer.bias, 0
    for adapter in _dora_adapters(module):
        yield module.lora_magnitude_vector[adapter].weight, 0


def _adapters(module: Any) -> list[str]:
    return list(getattr(module, "lora_A", {}))


def _dora_adapters(module: Any) -> list[str]:
    return list(getattr(module, "lora_magnitude_vector", {}))


def _state_widths(module: Any) -> None:
    """Make the width attributes of a layer and its adapters agree with the weights."""
    layer: Any = base(module)
    if isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
        return
    for linear in (layer, *(part[name] for name in _adapters(module) for part in (module.lora_A, module.lora_B))):
        linear.out_features, linear.in_features = linear.weight.shape
    if module is not layer:
        module.in_features, module.out_features = layer.in_features, layer.out_features


# ---------------------------------------------------------------- folding matrices into weights, in fp64


@torch.no_grad()
def fold_right(module: nn.Module, matrix: torch.Tensor) -> None:
    """W <- W M for a linear that reads, or E <- E M for an embedding: W [rows, d], `matrix` [d, n]."""
    weight = weight_of(module)
    m = matrix.to(weight.device, torch.float64)
    weight.data = torch.cat([(rows.double() @ m).to(weight.dtype) for rows in weight.data.split(ROWS_AT_ONCE)])
    _state_widths(module)


@torch.no_grad()
def fold_left(module: nn.Module, matrix: torch.Tensor) -> None:
    """W <- M W, b <- M b for a linear that writes: W [d, in], b [d], `matrix` [n, d]."""
    for parameter, _ in output_axes(base(module)):
        m = matrix.to(parameter.device, torch.float64)
        parameter.data = (m @ parameter.data.double()).to(parameter.dtype)
    _state_widths(module)


def untie(decoder: Decoder) -> None:
    """Give the head its own copy of the embedding's weight, and see that transformers does not tie them again."""
    if decoder.tied:
        shared = weight_of(decoder.head)
        base(decoder.head).weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    decoder.config.tie_word_embeddings = False
    decoder.model.all_tied_weights_keys = {}  # type: ignore[assignment]


# ---------------------------------------------------------------- adapters


def residual_layers(decoder: Decoder) -> list[nn.Module]:
    """The layers that write to the residual stream, and the linears that read it."""
    return [*decoder.writers().values(), *(linear for reads in decoder.reads() for linear in reads.linears)]


def refuse_adapters(decoder: Decoder, what: str) -> None:
    """Raise ValueError when a layer still has an adapter or is quantised, which `what` cannot handle exactly."""
    layers = residual_layers(decoder)
    if any(base(layer) is not layer for layer in layers):
        raise ValueError(f"{what}: the model has adapters; fold them first with pyprune.surgery.fold_adapters(model)")
    _refuse_quantised(layers, what)


def _refuse_quantised(layers: Collection[nn.Module], what: str) -> None:
    for layer in map(base, layers):
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, nn.Linear | nn.Embedding) or weight is None or not weight.is_floating_point():
            raise ValueError(
                f"{what}: expected plain nn.Linear and nn.Embedding layers with floating-point weights, found "
                f"{type(layer).__name__}; load the model unquantised, or call model.dequantize() first"
            )


def fold_adapters(model: nn.Module) -> nn.Module:
    """Merge LoRA and DoRA adapters into the weights (PEFT's merge) and return the stock model inside.

    A tied head that has an adapter of its own is untied first, or the adapter would leak into the embedding. A
    quantised base is dequantised first: merged in 4 bits, the adapters would be rounded away. A packed base is
    unpacked, and its zeros are gone.

    Raises:
        ValueError: merged weights that are not finite (PEFT's message names the adapter), DoRA on a quantised base,
            adapters that PEFT put into a model without a PeftModel around it.
    """
    if not callable(getattr(model, "merge_and_unload", None)):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "model: its adapters were added by model.add_adapter, which leaves no PeftModel that could merge them; "
                "add them by peft.get_peft_model instead"
            )
        return unwrap(model)
    inner: Any = unwrap(model)
    if any(isinstance(layer, nn.Linear) and layer.weight is None for layer in inner.modules()):  # packed
        inner.dequantize()
        strip_quantization(inner)
    decoder = describe(model)
    _fold_quantised(model)
    if base(decoder.head) is not decoder.head:
        untie(decoder)
    return model.merge_and_unload(safe_merge=True)  # type: ignore[operator]


def quantised(linear: nn.Module) -> bool:
    """Whether a linear's weight is stored in fewer bits than it computes with."""
    return not weight_of(linear).is_floating_point()


def dense_weight(linear: nn.Module) -> torch.Tensor:
    """A linear's weight [out, in] as numbers; a quantised one through its quantiser's own dequantisation."""
    if not quantised(linear):
        return weight_of(linear).detach()
    layer: Any = base(linear)
    if get_bnb_param_type(layer.weight):
        # not PEFT's function for modules: on a CPU it puts an 8-bit weight back without its scales
        return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).detach()
    return dequantize_module_weight(layer).detach()


@torch.no_grad()
def _fold_quantised(model: nn.Module) -> None:
    """Replace every LoRA layer on a quantised linear by a plain linear of its dequantised weight plus the update."""
    kind = weight_of(describe(model).final_norm).dtype  # of what is not quantised
    found: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if _adapters(m) and quantised(m)]
    for name, layer in found:
        if _dora_adapters(layer):
            raise ValueError(f"fold_adapters: {name} has DoRA on a quantised weight; train with LoRA instead")
        weight = dense_weight(layer)
        update = sum(
            layer.scaling[a] * (layer.lora_B[a].weight.float() @ layer.lora_A[a].weight.float())
            for a in _adapters(layer)
        )
        bias: torch.Tensor | None = getattr(base(layer), "bias", None)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter((weight.float() + update).to(kind))
        if bias is not None:
            plain.bias = nn.Parameter(bias.to(kind))
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, plain)


class CompactDora(DoraLinearLayer):
    """DoRA's magnitude for a reader whose dropped input columns P are gone: their part of the row norms is kept.

    DoRA scales row i by m_i / ||W_i + s B_i A||, a norm over *all* columns, the dropped ones too, and B is trained on:

        ||W_i + s B_i A||^2 = ||kept columns||^2 + ||W_iP||^2 + 2 s (W_iP A_P^T) B_i^T + s^2 B_i (A_P A_P^T) B_i^T

    W_P is frozen and A_P gets no gradient (its inputs are zero), so three constants, [out], [out, r] and [r, r], keep
    the function and its gradients exact.
    """

    def __init__(self, layer: Any, adapter: str, dropped: torch.Tensor) -> None:
        """`layer` is PEFT's LoRA layer before its columns `dropped` [d - n] are removed."""
        dora = layer.lora_magnitude_vector[adapter]
        super().__init__(dora.fan_in_fan_out)
        self.weight = dora.weight
        self._owner = (layer, adapter)  # in a tuple, so that the layer does not become our submodule
        a = layer.lora_A[adapter].weight.detach()
        wide = torch.promote_types(a.dtype, torch.float32)
        a = a[:, dropped].to(wide)
        w = weight_of(layer).detach()[:, dropped].to(wide)
        constants = {"dropped_square": w.square().sum(1), "dropped_cross": w @ a.T, "dropped_gram": a @ a.T}
        before = dict(dora.named_buffers())  # of an earlier cut
        for name, value in constants.items():
            self.register_buffer(name, value + before.get(name, 0))

    def get_weight_norm(self, weight: Any, lora_weight: Any, scaling: Any, adapter_name: str | None = None) -> Any:
        """Row norms [out] as if the dropped columns were still there (PEFT's signature)."""
        layer, adapter = self._owner
        kept = super().get_weight_norm(weight, lora_weight, scaling, adapter_name=adapter_name)
        square = self.get_buffer("dropped_square")
        b = layer.lora_B[adapter].weight.to(square) * layer.scaling[adapter]
        cross, gram = self.get_buffer("dropped_cross"), self.get_buffer("dropped_gram")
        dropped = square + 2 * (cross * b).sum(1) + ((b @ gram) * b).sum(1)
        return (kept.to(square).square() + dropped).sqrt().to(kept.dtype)


def keep_dora_norms(layer: Any, dropped: torch.Tensor) -> None:
    """See that columns which are about to go still count in the row norms of DoRA, if the layer has it."""
    for adapter in _dora_adapters(layer):
        layer.lora_magnitude_vector[adapter] = CompactDora(layer, adapter, dropped)


def refuse_what_cannot_be_cut(layers: Collection[nn.Module], what: str) -> None:
    """Raise ValueError for quantised weights and for adapters other than LoRA and DoRA."""
    _refuse_quantised(layers, what)
    for layer in layers:
        variants = {type(v).__name__ for v in getattr(layer, "lora_variant", {}).values()} - {"DoraLinearVariant"}
        if variants or (base(layer) is not layer and not _adapters(layer)):
            found = ", ".join(variants) or type(layer).__name__
            raise ValueError(f"{what}: found an adapter of kind {found}; only LoRA and DoRA on linears can be cut live")


# ---------------------------------------------------------------- HSMs


@torch.no_grad()
def merge_hsm(decoder: Decoder, hsms: Mapping[str, torch.Tensor]) -> None:
    """Fold each HSM's matrix D = L1 diag(v) L0 + I into the writer before it: W <- D W, b <- D b, E <- E D^T.

    Args:
        decoder: of a model without adapters.
        hsms: D by the names of `decoder.writers()`; [d, d], or [n, d] after `compact` (then rows of kept channels only,
            and columns in the permuted order). An HSM on a tied embedding unties it.

    Raises:
        ValueError: adapters present, an unknown name, or a D of a wrong shape.
    """
    refuse_adapters(decoder, "merge_hsm")
    writers = decoder.writers()
    for name, matrix in hsms.items():
        if name not in writers:
            raise ValueError(f"hsms: no writer is called {name!r}; expected names like {', '.join(list(writers)[:3])}")
        width = next((p.shape[dim] for p, dim in output_axes(writers[name])))
        if matrix.shape != (decoder.hidden_size, width):
            raise ValueError(
                f"hsms[{name!r}]: expected shape {[decoder.hidden_size, width]} (hidden size, the writer's outputs), "
                f"found {list(matrix.shape)}"
            )
    for name, matrix in hsms.items():
        if name == "embedding":
            untie(decoder)
            fold_right(writers[name], matrix.T)
        else:
            fold_left(writers[name], matrix)


# ---------------------------------------------------------------- slicing


@torch.no_grad()
def compact(
    model: nn.Module, keep: Sequence[int] | torch.Tensor, wide: Collection[str] = ()
) -> dict[nn.Parameter, Selection]:
    """Cut the residual stream down to the channels `keep` in a model that goes on training, in place.

    Parameter objects stay the same (their `.data` is replaced, gradients are dropped), so optimizers stay valid once
    their moments are cut with the returned selections. The config is left to `settle_config`. Gains of norms are
    multiplied by sqrt(d/n); the exact training trajectory is kept only if they are frozen, as PAT has them.

    Args:
        model: a causal language model, plain or with LoRA or DoRA.
        keep: indices of the channels kept, in their new order.
        wide: names of `decoder.writers()` that keep all d outputs, permuted: kept channels first, then the others in
            rising order. An HSM after them reads d and writes n. A wide tied embedding is untied.

    Returns:
        For each parameter that changed in a hidden dimension, how; norms included.

    Raises:
        ValueError: bad indices, a width that stock code refuses, quantised weights, other adapters than LoRA and DoRA,
            or a tied embedding in training that would have to be untied.
    """
    decoder = describe(model)
    readers = [linear for reads in decoder.reads() for linear in reads.linears]
    writers = decoder.writers()
    if unknown := set(wide) - set(writers):
        raise ValueError(f"wide: unknown writers {sorted(unknown)}; expected names like {', '.join(list(writers)[:3])}")
    refuse_what_cannot_be_cut(residual_layers(decoder), "compact")
    old = decoder.hidden_size
    kept = check_keep(decoder, keep)
    dropped = complement(kept, old)
    if "embedding" in wide:
        _untie_frozen(decoder)
    for linear in readers:
        keep_dora_norms(linear, dropped)

    selections: dict[nn.Parameter, Selection] = {}
    for name, writer in writers.items():
        index = torch.cat([kept, dropped]) if name in wide else kept
        selections |= {parameter: Selection(dim, index) for parameter, dim in output_axes(writer)}
    for linear in readers:
        selections |= {parameter: Selection(dim, kept) for parameter, dim in input_axes(linear)}
    for reads in decoder.reads():
        selections[weight_of(reads.norm)] = Selection(0, kept)

    select(selections, [*readers, *writers.values()])
    for reads in decoder.reads():
        decoder.set_gain(reads.norm, decoder.gain(reads.norm) * (old / len(kept)) ** 0.5)
        decoder.set_epsilon(reads.norm, decoder.epsilon(reads.norm) * old / len(kept))
    return selections


def select(selections: Mapping[nn.Parameter, Selection], layers: Collection[nn.Module]) -> None:
    """Cut parameters, whose objects stay (gradients are dropped), and state the new widths of their layers."""
    for parameter, selection in selections.items():
        parameter.data = selection(parameter.data).contiguous()
        parameter.grad = None
    for layer in layers:
        _state_widths(layer)


def slice_hidden(model: nn.Module, keep: Sequence[int] | torch.Tensor) -> nn.Module:
    """Cut a stock model down to the channels `keep` of its residual stream, in place: weights, norms and config.

    Tied embeddings stay tied when they are tied. Gives the stock model of the smaller hidden size whose logits equal
    those of the model with all other channels of the residual stream masked.

    Raises:
        ValueError: adapters present, and what `compact` refuses.
    """
    refuse_adapters(describe(model), "slice_hidden")
    compact(model, keep)
    return settle_config(model)


def complement(kept: torch.Tensor, width: int) -> torch.Tensor:
    """The indices below `width` that are not in `kept`, rising."""
    others = torch.ones(width, dtype=torch.bool)
    others[kept] = False
    return others.nonzero().flatten()


def _untie_frozen(decoder: Decoder) -> None:
    if decoder.tied and weight_of(decoder.embedding).requires_grad:
        raise ValueError(
            "compact: the tied embedding is being trained and would have to be untied now, which its optimizer cannot "
            "follow; freeze it, or untie it before training with pyprune.surgery.untie"
        )
    untie(decoder)


def check_keep(decoder: Decoder, keep: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The kept channels as an index tensor on the CPU.

    Raises:
        ValueError: not indices, none, out of range, repeated, or a count that the stock config refuses as hidden_size.
    """
    index = torch.as_tensor(keep).cpu()
    width = decoder.hidden_size
    if index.ndim != 1 or index.numel() == 0 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"keep: expected a list of at least one channel index, found {index.dtype} of shape {list(index.shape)}"
        )
    if int(index.min()) < 0 or int(index.max()) >= width or len(index.unique()) != len(index):
        raise ValueError(f"keep: expected different indices from 0 to {width - 1}, found repeated ones or others")
    if len(index) % decoder.width_multiple:
        raise ValueError(
            f"keep: {len(index)} channels, but {type(decoder.config).__name__} wants hidden_size to be a multiple of "
            f"{decoder.family.width_multiple} = {decoder.width_multiple}; keep a multiple of that many"
        )
    if reason := stock_refusal(decoder, hidden_size=len(index)):
        raise ValueError(f"keep: {reason}")
    return index.long()


def stock_refusal(decoder: Decoder, **fields: int) -> str | None:
    """Why the stock config class does not take other sizes, such as hidden_size; None when it does."""
    config = decoder.config
    try:
        type(config).from_dict(config.to_dict() | {"head_dim": decoder.head_dim} | fields)
    except Exception as error:  # huggingface_hub's strict dataclasses have exception types of their own
        sizes = " and ".join(f"{name} {value}" for name, value in (fields | {"head_dim": decoder.head_dim}).items())
        reason = " ".join(str(error).split()).rstrip(".")
        return f"{type(config).__name__} does not accept {sizes}, so no stock checkpoint of this shape exists: {reason}"
    return None


@torch.no_grad()
def settle_config(model: nn.Module) -> nn.Module:
    """Make a stock model's config say what its modules are, so that `from_pretrained` builds the same; idempotent.

    Writes hidden_size, an explicit head_dim, rms_norm_eps and tie_word_embeddings. Where stock code derives something
    else from these, the weights make up for it: Qwen3's query and key norms share rms_norm_eps, so their projections
    are scaled by sqrt(eps_new/eps_old); Gemma's embedding factor sqrt(hidden_size) falls, so E rises (when tied, the
    final norm's gain falls by as much, since the head rises too).

    Raises:
        ValueError: adapters present, or norms that differ in epsilon.
    """
    decoder = describe(model)
    refuse_adapters(decoder, "settle_config")
    epsilons = {decoder.epsilon(reads.norm) for reads in decoder.reads()}
    if len(epsilons) != 1:
        raise ValueError(
            f"settle_config: residual norms differ in epsilon, {sorted(epsilons)}; a config has one for all"
        )
    epsilon, config = epsilons.pop(), decoder.config
    _settle_head_norms(decoder, epsilon)
    _settle_embedding_scale(decoder)
    config.head_dim = decoder.head_dim
    config.hidden_size = decoder.hidden_size
    config.rms_norm_eps = epsilon
    config.tie_word_embeddings = decoder.tied
    strip_quantization(decoder.model)
    return decoder.model


def _settle_head_norms(decoder: Decoder, epsilon: float) -> None:
    """c q / sqrt(mean(c^2 q^2) + c^2 eps) = q / sqrt(mean(q^2) + eps): scale what feeds the norm by c."""
    for block in decoder.blocks:
        for norm, linear in block.head_norms:
            scale = (epsilon / decoder.epsilon(norm)) ** 0.5
            decoder.set_epsilon(norm, epsilon)
            for parameter, _ in output_axes(linear) if scale != 1.0 else ():
                parameter.data = (parameter.data.double() * scale).to(parameter.dtype)


def _settle_embedding_scale(decoder: Decoder) -> None:
    old = decoder.embedding_scale()
    decoder.set_embedding_scale(decoder.hidden_size)
    scale = old / decoder.embedding_scale()
    if scale == 1.0:
        return
    weight = weight_of(decoder.embedding)
    for rows in weight.data.split(ROWS_AT_ONCE):
        rows.copy_(rows.double() * scale)
    if decoder.tied:
        decoder.set_gain(decoder.final_norm, decoder.gain(decoder.final_norm) / scale)


def strip_quantization(model: nn.Module) -> None:
    """Remove what loading from a quantised file (e.g. GGUF) left on a model and its config; the weights are plain."""
    for holder, names in (
        (model, ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit")),
        (model.config, ("quantization_config", "_is_quantized", "_pre_quantization_dtype")),
    ):
        for name in names:
            if name in vars(holder):
                delattr(holder, name)


# ---------------------------------------------------------------- on disk


def export(model: nn.Module, tokenizer: Any, folder: str | os.PathLike[str]) -> Path:
    """Write a stock checkpoint (safetensors, config, tokenizer) so that `folder` is either complete or untouched.

    It is written to a hidden folder beside `folder` and renamed at the end; a failure, such as a full disk, removes
    that again and leaves the model in memory as it was. What an interrupted export left there is overwritten.

    Args:
        model: without adapters.
        tokenizer: anything with `save_pretrained`, or None.
        folder: must not exist, or be empty.

    Raises:
        ValueError: adapters present, or quantised weights.
        FileExistsError: `folder` is a file or not empty.
        OSError: it could not be written.
    """
    refuse_adapters(describe(model), "export")
    strip_quantization(model)
    with new_folder(folder) as partial:
        model.save_pretrained(partial)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return Path(folder).absolute()


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder beside `folder` to write to, renamed to it at the end and removed again after any failure.

    Raises:
        FileExistsError: `folder` is a file or not empty.
        OSError: it could not be written; a full disk is named so.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder: {folder} exists and is not an empty folder; name a new one or empty it")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_full(error):
            raise OSError(
                errno.ENOSPC,
                f"the disk filled while writing {folder}; nothing was left there, free space and export again",
            ) from error
        raise


def _is_disk_full(error: BaseException) -> bool:
    """safetensors reports a full disk in its own exception type, with the system's message inside."""
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters, shared ones counted once; of packed weights the values alone, not where they stand.

    Returns:
        `total`, and `blocks`: all but embeddings (those of positions too) and the head.
    """
    model = unwrap(model)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside = {id(weight_of(module)) for module in (*embeddings, model.get_output_embeddings())}  # type: ignore[operator]
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    return {
        "total": sum(p.numel() for p in parameters),
        "blocks": sum(p.numel() for p in parameters if id(p) not in outside),
    }
