"""N:M sparsity: masks that keep n of every m consecutive weights of a row, and weights packed by such masks.

The packed format is the canonical one, on disk and in memory, on every device: docs/architecture.md, "Packed weights".
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune._ops.dispatch import define, expect_float, expect_like, expect_shape, run
from pyprune.reference.nm import index_bits, unpack_indices

# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _check_pattern(op: str, n: int, m: int) -> None:
    if not 1 <= n <= m <= 256:
        raise ValueError(f"{op}: the pattern is {n}:{m}, expected 1 <= n <= m <= 256")


def _check_dense(op: str, name: str, tensor: Tensor, n: int, m: int) -> None:
    """A float matrix whose rows are whole groups of m."""
    _check_pattern(op, n, m)
    expect_float(op, name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected two dimensions")
    if tensor.shape[1] % m:
        raise ValueError(f"{op}: {name} has {tensor.shape[1]} columns, expected a multiple of m = {m}")


def metadata_bytes(kept: int, m: int) -> int:
    """Bytes of metadata for a row with `kept` values."""
    return -(-kept * index_bits(m) // 8)


def check_packed(op: str, values: Tensor, metadata: Tensor, n: int, m: int) -> None:
    """Raises TypeError or ValueError unless dtypes, devices and shapes are those of a packed N:M weight.

    Reads no element: whether the indices are valid is `check_nm`'s business.
    """
    _check_pattern(op, n, m)
    expect_float(op, "values", values)
    expect_like(op, values, torch.uint8, metadata=metadata)
    if values.dim() != 2:
        raise ValueError(f"{op}: values has shape {list(values.shape)}, expected two dimensions")
    rows, kept = values.shape
    if kept % n:
        raise ValueError(f"{op}: values has {kept} columns, expected a multiple of n = {n}")
    expect_shape(op, "metadata", metadata, rows, metadata_bytes(kept, m))


def _check_prune(scores: Tensor, n: int, m: int, previous_bits: Tensor | None) -> None:
    op = "nm_prune"
    _check_dense(op, "scores", scores, n, m)
    if previous_bits is not None:
        expect_like(op, scores, torch.uint8, previous_bits=previous_bits)
        expect_shape(op, "previous_bits", previous_bits, scores.shape[0], -(-scores.shape[1] // 8))


def _refuse(op: str, tensor: Tensor, offender: Tensor, m: int, problem: str) -> None:
    """Raises ValueError naming the group with the flat index `offender`, unless that is -1."""
    if (index := int(offender)) >= 0:
        row, group = divmod(index, tensor.shape[1] // m)
        first = group * m
        found = ", ".join(f"{value:.5g}" for value in tensor[row, first : first + m].tolist())
        where = f"row {row}, group {group} (columns {first} to {first + m - 1})"
        raise ValueError(f"{op}: {where} {problem}: [{found}]")


# ---------------------------------------------------------------------------------------------------------------------
# The ops and their fake kernels


def _nm_prune(scores: Tensor, n: int, m: int, previous_bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check_prune(scores, n, m, previous_bits)
    previous = None if previous_bits is None else previous_bits.contiguous()
    bits, flips, offender = run("nm_prune", scores, (scores,), n, m, previous)
    _refuse("nm_prune", scores, offender, m, "has a score that is NaN")
    return bits, flips


def _nm_prune_fake(scores: Tensor, n: int, m: int, previous_bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check_prune(scores, n, m, previous_bits)
    rows, columns = scores.shape
    return scores.new_empty(rows, -(-columns // 8), dtype=torch.uint8), scores.new_empty((), dtype=torch.int64)


def _nm_compress(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    _check_dense("nm_compress", "weight", weight, n, m)
    values, metadata, offender = run("nm_compress", weight, (weight,), n, m)
    _refuse("nm_compress", weight, offender, m, f"has more than {n} nonzeros and is not {n}:{m}; prune it first")
    return values, metadata


def _nm_compress_fake(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    _check_dense("nm_compress", "weight", weight, n, m)
    rows, kept = weight.shape[0], weight.shape[1] // m * n
    return weight.new_empty(rows, kept), weight.new_empty(rows, metadata_bytes(kept, m), dtype=torch.uint8)


def _nm_decompress(values: Tensor, metadata: Tensor, n: int, m: int) -> Tensor:
    check_packed("nm_decompress", values, metadata, n, m)
    return run("nm_decompress", values, (values, metadata), n, m)


def _nm_decompress_fake(values: Tensor, metadata: Tensor, n: int, m: int) -> Tensor:
    check_packed("nm_decompress", values, metadata, n, m)
    return values.new_empty(values.shape[0], values.shape[1] // n * m)


define(
    "nm_prune(Tensor scores, int n, int m, Tensor? previous_bits=None) -> (Tensor bits, Tensor flips)",
    _nm_prune,
    _nm_prune_fake,
)
define("nm_compress(Tensor weight, int n, int m) -> (Tensor values, Tensor metadata)", _nm_compress, _nm_compress_fake)
define("nm_decompress(Tensor values, Tensor metadata, int n, int m) -> Tensor", _nm_decompress, _nm_decompress_fake)


# ---------------------------------------------------------------------------------------------------------------------
# The functional API


def nm_prune(scores: Tensor, n: int, m: int, previous_bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mask that keeps the n largest of every m consecutive scores of a row; of equal ones, those of lower index.

    Args:
        scores: [out, in], in a multiple of m; bf16, fp16, fp32 or fp64. Scores are compared with their signs.
        n, m: 1 <= n <= m <= 256.
        previous_bits: an earlier mask to count changes against, as below.

    Returns:
        The mask as one bit per weight: uint8 [out, ceil(in / 8)], bit j % 8 of byte j // 8 is column j, 1 = kept.
        And how many of its bits differ from `previous_bits` (0 without them): int64, a scalar tensor.

    Raises:
        ValueError: a score is NaN (the first such group is named), or a shape does not fit.
        TypeError: a dtype does not fit.
    """
    return torch.ops.pyprune.nm_prune(scores, n, m, previous_bits)


def nm_compress(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Packs a weight with at most n nonzeros in every m consecutive columns, bit for bit; -0 becomes +0.

    Args:
        weight: [out, in], in a multiple of m; bf16, fp16, fp32 or fp64.
        n, m: 1 <= n <= m <= 256.

    Returns:
        values [out, in n/m] in weight's dtype and metadata uint8 [out, ceil(in n/m b/8)], b = 2, 4 or 8 bits an index.
        Indices rise within a group; one with fewer nonzeros takes its zeros of lowest index along. No gradient reaches
        weight through them.

    Raises:
        ValueError: a group has more than n nonzeros (the first one is named), or a shape does not fit.
        TypeError: a dtype does not fit.
    """
    return torch.ops.pyprune.nm_compress(weight.detach(), n, m)


def nm_decompress(values: Tensor, metadata: Tensor, n: int, m: int) -> Tensor:
    """The dense weight [out, in] of a packed one, with +0 where nothing was kept; the inverse of `nm_compress`.

    Indices are trusted: wrong ones give wrong results. See `check_nm` for tensors that come from elsewhere.

    Raises:
        TypeError, ValueError: an argument's dtype, device or shape does not fit.
    """
    return torch.ops.pyprune.nm_decompress(values, metadata, n, m)


def check_nm(values: Tensor, metadata: Tensor, n: int, m: int, shape: tuple[int, int] | None = None) -> None:
    """Raises unless these tensors are a packed N:M weight.

    Every packed weight from outside must pass here before any op sees it: kernels look at no more than where to read.

    Args:
        values, metadata, n, m: as of `nm_compress`.
        shape: (out_features, in_features) that the weight must have, if known.

    Raises:
        TypeError, ValueError: dtype, device or shape; or the first group whose indices do not rise or reach m, or a row
            with bits set past its last index.
    """
    op = "check_nm"
    check_packed(op, values, metadata, n, m)
    rows, kept = values.shape
    if shape is not None and (rows, kept // n * m) != tuple(shape):
        raise ValueError(f"{op}: the packed weight is [{rows}, {kept // n * m}], expected {list(shape)}")
    if values.numel() == 0:
        return
    indices = unpack_indices(metadata, kept, m).view(rows, kept // n, n)
    bad = (indices[..., -1] >= m) | (indices.diff(dim=-1) <= 0).any(-1)
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: metadata of row {row}, group {group} is {indices[row, group].tolist()}, "
            f"expected {n} rising indices below {m}; the file is damaged or of another format"
        )
    used = kept * index_bits(m) % 8
    if used and (past := (metadata[:, -1] >> used) != 0).any():
        row = int(past.nonzero()[0])
        raise ValueError(f"{op}: metadata of row {row} has bits set past its last index; the file is damaged")
