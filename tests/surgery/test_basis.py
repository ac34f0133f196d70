"""Statistics of the residual stream against what the readers really receive; rotations keep the function."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import FAMILY_NAMES, WIDTH, logits, relative_error, tiny, token_ids

from pyprune.architectures import describe
from pyprune.basis import covariance, level, mixable, pca, rotate
from pyprune.surgery import slice_hidden

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-4}


def orthogonal(width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_rotation_keeps_the_function(family: str, tied: bool, dtype: torch.dtype) -> None:
    model = tiny(family, tied, dtype)
    expected = logits(model)
    decoder = describe(model)
    embedding = decoder.embedding.weight.detach().double().clone()
    rotate(model, orthogonal())
    assert relative_error(logits(model), expected) < ROUNDING[dtype]
    assert not decoder.tied and not model.config.tie_word_embeddings
    assert relative_error(decoder.embedding.weight.detach().double(), embedding @ orthogonal()) < 1e-6
    assert all((decoder.gain(reads.norm) == 1).all() for reads in decoder.reads())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_covariance_is_that_of_what_the_readers_receive(family: str) -> None:
    """Readers receive the normalised row times the gain; dividing by the gain gives the row independently."""
    model = tiny(family)
    decoder = describe(model)
    expected = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    handles = []
    for reads in decoder.reads():
        gain = decoder.gain(reads.norm)

        def add(module: torch.nn.Module, args: tuple[torch.Tensor], gain: torch.Tensor = gain) -> None:
            rows = (args[0] / gain).flatten(0, -2)
            expected.add_(rows.T @ rows)

        handles.append(reads.linears[0].register_forward_pre_hook(add))
    ids = token_ids(4, 9)
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    found = covariance(model, [ids[:1], {"input_ids": ids[1:]}])
    assert relative_error(found, expected / ids.numel()) < 1e-12


def test_covariance_leaves_padding_out_and_the_model_as_it_was() -> None:
    model = tiny("llama").train()
    ids = token_ids(2, 9)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=ids.dtype)], 1)
    mask = (padded != 0).long()
    found = covariance(model, [{"input_ids": padded, "attention_mask": mask}])
    assert model.training and not any(m._forward_hooks for m in model.modules() if "RMSNorm" not in type(m).__name__)
    assert relative_error(found, covariance(model, [ids])) < 1e-12


def test_covariance_refuses_nothing_and_nan() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="no token"):
        covariance(model, [])
    for batch in (torch.tensor([[5, 61]]), torch.tensor([5, 6]), {"attention_mask": torch.ones(1, 2)}, [[5, 6]]):
        with pytest.raises(ValueError, match=r"batches: expected int64 or int32 token ids \[B, T\] from 0 to 60"):
            covariance(model, [torch.tensor([[5, 6]]), batch])
    model.lm_head.weight.data.fill_(1.0)
    model.model.embed_tokens.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        covariance(model, [torch.tensor([[5, 6]])])


def test_pca_diagonalises_with_falling_variance_and_a_fixed_sign() -> None:
    matrix = covariance(tiny("llama"), [token_ids(4, 16)])
    q = pca(matrix)
    rotated = q.T @ matrix @ q
    variances = rotated.diagonal()
    assert float((rotated - variances.diag()).abs().max()) < 1e-12 * float(variances[0])
    assert (variances[:-1] >= variances[1:] - 1e-12).all()
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()
    assert float((q.T @ q - torch.eye(WIDTH, dtype=q.dtype)).abs().max()) < 1e-12


def test_pca_refuses_what_is_no_covariance() -> None:
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        pca(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="finite"):
        pca(torch.full((3, 3), float("nan")))


def test_principal_channels_can_be_cut_without_loss_when_the_stream_has_low_rank() -> None:
    """If everything written lies in a 12-dimensional subspace, keeping the 12 leading PCA channels is exact."""
    model = tiny("llama")
    decoder = describe(model)
    subspace = orthogonal()[:, :12]
    for name, writer in decoder.writers().items():
        projector = subspace @ subspace.T
        if name == "embedding":
            writer.weight.data @= projector
        else:
            writer.weight.data, writer.bias.data = projector @ writer.weight, projector @ writer.bias
    expected = logits(model)
    rotate(model, pca(covariance(model, [token_ids(8, 16)])))
    slice_hidden(model, range(12))
    assert relative_error(logits(model), expected) < 1e-10  # the eigenbasis itself is good to about 1e-12


def test_rotate_refuses_a_wrong_matrix() -> None:
    model = tiny("llama")
    expected = logits(model)
    with pytest.raises(ValueError, match=r"q: expected shape \[24, 24\]"):
        rotate(model, torch.eye(3))
    with pytest.raises(ValueError, match="not orthogonal"):
        rotate(model, 1.01 * torch.eye(WIDTH))
    with pytest.raises(ValueError, match="not orthogonal"):
        rotate(model, torch.full((WIDTH, WIDTH), float("nan")))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_tied_head_stays_tied_when_only_channels_of_one_gain_are_mixed(family: str) -> None:
    """Two gains in three runs of channels, one negative as trained models have it: the function is the same to
    rounding, and so is a second rotation's."""
    model = tiny(family, tied=True)
    decoder = describe(model)
    gains = torch.tensor([1.5, -2.0, 1.5], dtype=torch.float64).repeat_interleave(WIDTH // 3)
    decoder.set_gain(decoder.final_norm, gains)
    expected = logits(model)
    for matrix in (covariance(model, [token_ids(8, 16)]), orthogonal() + orthogonal().T):
        q = pca(matrix, mixable(model))
        assert int((q.abs() > 1e-3).sum()) > 2 * WIDTH  # it mixes
        rotate(model, q)
        assert decoder.tied and model.config.tie_word_embeddings
        assert decoder.gain(decoder.final_norm).sort().values.tolist() == gains.sort().values.tolist()
        assert relative_error(logits(model), expected) < 1e-12


def test_a_tied_head_is_untied_rather_than_wrong() -> None:
    """One axis out of two gains is enough."""
    model = tiny("llama", tied=True)
    decoder = describe(model)
    decoder.set_gain(decoder.final_norm, torch.ones(WIDTH).index_fill(0, torch.tensor(3), 1.01))
    expected, q = logits(model), torch.eye(WIDTH, dtype=torch.float64)
    q[2:4, 2:4] = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=q.dtype)
    rotate(model, q)
    assert not decoder.tied and relative_error(logits(model), expected) < 1e-12


def test_level_makes_nearly_equal_gains_equal() -> None:
    """The largest run within 10 % of a middle first; what is left of it on either side forms runs of its own."""
    model = tiny("llama", tied=True)
    decoder = describe(model)
    gains = torch.tensor([0.85, 1.0, 1.1, 1.17, 1.4, -1.0, -1.3, 0.0, 5.0], dtype=torch.float64)
    gains = torch.cat([gains, torch.full((WIDTH - 9,), 9.0)])
    decoder.set_gain(decoder.final_norm, gains)
    assert level(model, 0) is model and torch.equal(decoder.gain(decoder.final_norm), gains)
    found = decoder.gain(level(model).get_submodule("model.norm"))[:9]
    expected = torch.tensor([0.85, 1.09, 1.09, 1.09, 1.4, -1.0, -1.3, 0.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert mixable(model)[:9].unique(return_counts=True)[1].tolist() == [1, 1, 1, 1, 3, 1, 1]
    untied = tiny("llama")
    before = describe(untied).gain(describe(untied).final_norm)
    assert torch.equal(describe(level(untied)).gain(describe(untied).final_norm), before)
    assert mixable(untied).unique().tolist() == [0]
    with pytest.raises(ValueError, match=r"tolerance is 1\.0; expected a share"):
        level(model, 1.0)


def test_axes_stay_within_their_groups() -> None:
    """They are those of each group's own covariance, all together by falling variance."""
    matrix = covariance(tiny("llama"), [token_ids(4, 16)])
    groups = torch.arange(WIDTH) % 3
    q = pca(matrix, groups)
    assert float((q.T @ q - torch.eye(WIDTH, dtype=q.dtype)).abs().max()) < 1e-12
    owner = torch.stack([(q[groups == group] != 0).any(0) for group in range(3)])
    assert (owner.sum(0) == 1).all()
    variances = (q.T @ matrix @ q).diagonal()
    assert (variances[:-1] >= variances[1:] - 1e-12).all()
    own = torch.cat([torch.linalg.eigvalsh(matrix[groups == g][:, groups == g]) for g in range(3)])
    torch.testing.assert_close(variances, own.sort(descending=True).values, rtol=1e-10, atol=1e-12)
