"""The layers that all pLSTM models share: blocks, gates, transitions, norms."""

import re

import pytest
import torch

from undersong.modeling.plstm_layers import BlockLinear, Gate, MultiHeadRMSNorm, Transition, exponential_series

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("blocks", "slices"), [(1, 1), (3, 1), (3, 3), (6, 3), (4, 2)])
def test_every_block_reads_its_own_slice(blocks, slices):
    layer = BlockLinear(12, 24, blocks, slices).double()
    x = normal(2, 5, 12)
    rows, width = 24 // blocks, 12 // slices
    want = torch.cat(
        [
            x[..., b % slices * width : (b % slices + 1) * width] @ layer.weight[b * rows : (b + 1) * rows].T
            for b in range(blocks)
        ],
        -1,
    )
    torch.testing.assert_close(layer(x), want + layer.bias)
    assert layer.weight.shape == (24, width)


def test_blocks_that_do_not_fit_are_refused():
    message = "sub_heads (3) must divide in_features (10) and num_blocks (3), which must divide out_features (6)"
    with pytest.raises(ValueError, match=re.escape(message)):
        BlockLinear(10, 6, 3, 3)


def test_gates_start_at_their_bias_and_then_follow_the_input():
    gate = Gate(8, (2, 3, 1), bias=-4.0)
    gate.init_weights()
    x = torch.randn(5, 8)
    torch.testing.assert_close(gate(x), torch.full((5, 2, 3, 1), -4.0).sigmoid())
    gate.init_weights(std=1.0)
    want = (x @ gate.proj.weight.T + gate.bias).sigmoid().view(5, 2, 3, 1)
    torch.testing.assert_close(gate(x), want)


def test_a_gate_without_weights_is_the_same_everywhere():
    gate = Gate(8, (2, 3), bias=0.5, weight=False, activation="tanh")
    gate.init_weights()
    assert gate(torch.randn(4, 7, 8)).shape == (4, 7, 2, 3)
    assert gate(torch.randn(8)).unique().tolist() == pytest.approx([0.9866143], abs=1e-6)  # tanh(2.5)
    assert [name for name, _ in gate.named_parameters()] == ["bias"]


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_transitions_start_next_to_the_identity(dim):
    transition = Transition(8, 3, dim)
    transition.init_weights()
    got = transition(torch.randn(2, 5, 8))
    assert got.shape == (2, 5, 3, dim, dim)
    torch.testing.assert_close(got, torch.tanh(torch.tensor(5.0)) * torch.eye(dim).expand_as(got))


@pytest.mark.parametrize("orthogonalization", ["matrix_exp", "series"])
def test_transitions_are_an_orthogonal_matrix_eigenvalues_and_another(orthogonalization):
    transition = Transition(8, 3, 4, orthogonalization=orthogonalization).double()
    transition.init_weights(std=0.1)
    x = normal(50, 8)
    eigenvalues = torch.tanh(5 * (x @ transition.eigenvalues.proj.weight.T + 1)).view(50, 3, 4)
    singular = torch.linalg.svdvals(transition(x))
    torch.testing.assert_close(singular, eigenvalues.abs().sort(descending=True).values, atol=2e-5, rtol=0)


def test_the_series_is_the_exponential_up_to_a_norm_of_4_and_drifts_off_beyond():
    """Largest entry of R^T R - 1 by the Frobenius norm of the skew part."""
    skew = normal(200, 4, 4)
    skew = skew - skew.mT
    skew = skew / torch.linalg.matrix_norm(skew)[:, None, None]
    for norm, low, high in ((4, 0, 1e-5), (6, 1e-5, 1e-2), (10, 0.1, 10)):
        rotation = exponential_series(norm * skew)
        defect = (rotation.mT @ rotation - torch.eye(4)).abs().max().item()
        assert low <= defect <= high
    torch.testing.assert_close(exponential_series(4 * skew), torch.linalg.matrix_exp(4 * skew), atol=1e-5, rtol=0)


def test_an_unknown_orthogonalization_is_refused():
    with pytest.raises(ValueError, match=re.escape("orthogonalization ('qr') must be one of 'matrix_exp', 'series'")):
        Transition(8, 2, 4, orthogonalization="qr")


def test_gates_stay_in_float32_under_autocast_and_in_half_precision():
    transition, gate, norm = Transition(16, 2, 4), Gate(16, (2, 1)), MultiHeadRMSNorm(2, 8)
    for module in (transition, gate):
        module.init_weights(std=0.2)
    norm.init_weights()
    x = torch.randn(4, 16)
    want = transition(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = transition(x)
        assert (got.dtype, gate(x).dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(got, want, atol=0.1, rtol=0)
    assert torch.linalg.matrix_norm(got, 2).max() <= 1 + 1e-6, "products in bfloat16 would leave the unit ball"
    assert transition.bfloat16()(x.bfloat16()).dtype == torch.float32
    assert norm(torch.randn(3, 2, 8).bfloat16()).dtype == torch.bfloat16


def test_every_head_has_a_norm_of_its_own():
    norm = MultiHeadRMSNorm(2, 4, eps=0.0).double()
    norm.init_weights()
    x = normal(3, 2, 4)
    scaled = torch.stack([x[:, 0] * 100, x[:, 1]], 1)
    torch.testing.assert_close(norm(scaled), norm(x))
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3, 2, dtype=torch.float64))
