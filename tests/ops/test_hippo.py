"""Initial state matrices against their formulas and each other; discretisations against matrix exponentials."""

import math

import pytest
import torch

from undersong.ops.hippo import diagonal_init, discretise, hippo_blocks, hippo_normal


def test_values_of_the_paper():
    """S4D, arXiv 2206.11893, section 4.3, for N = 8."""
    lin, inv = diagonal_init(8, "lin"), diagonal_init(8, "inv")
    assert lin.tolist() == [complex(-0.5, math.pi * n) for n in range(4)]
    want = [8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)]
    assert inv.imag.tolist() == pytest.approx(want)
    assert (inv.real == -0.5).all()


def test_hippo_n_is_legs_plus_its_low_rank_part():
    """A_LegS = HiPPO-N - p p^T with p_n = sqrt(n + 1/2)."""
    n = torch.arange(6, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    legs = -(root[:, None] * root).tril(-1) - torch.diag(n + 1)
    p = (n + 0.5).sqrt()
    torch.testing.assert_close(hippo_normal(6) - p[:, None] * p, legs)


@pytest.mark.parametrize(("size", "blocks"), [(2, 1), (16, 1), (16, 2), (24, 3), (64, 8)])
def test_eigenvectors_diagonalise_the_blocks(size, blocks):
    eigenvalues, vectors = hippo_blocks(size, blocks)
    matrix = torch.block_diag(*[hippo_normal(size // blocks)] * blocks)
    assert eigenvalues.shape == (size // 2,)
    torch.testing.assert_close(matrix.cdouble() @ vectors, vectors * eigenvalues, rtol=0, atol=1e-10)
    # with their conjugates they are a unitary basis, in which the real matrix is whole again
    basis = torch.cat([vectors, vectors.conj()], 1)
    torch.testing.assert_close(basis.mH @ basis, torch.eye(size, dtype=torch.cdouble), rtol=0, atol=1e-10)
    whole = basis @ torch.diag(torch.cat([eigenvalues, eigenvalues.conj()])) @ basis.mH
    torch.testing.assert_close(whole.real, matrix, rtol=0, atol=1e-10)
    torch.testing.assert_close(whole.imag, torch.zeros_like(matrix), rtol=0, atol=1e-10)
    assert (eigenvalues.imag > 0).all()


def test_inv_approximates_the_largest_eigenvalues_of_legs():
    legs, inv = diagonal_init(64, "legs").imag.sort().values, diagonal_init(64, "inv").imag.sort().values
    assert inv[-1].item() == pytest.approx(legs[-1].item(), rel=0.1)
    assert (diagonal_init(64, "legs").real == -0.5).all()


def test_a_default_device_does_not_matter():
    with torch.device("meta"):
        assert hippo_blocks(4)[0].device.type == "cpu"
        assert diagonal_init(4, "inv").device.type == "cpu"


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_discretisation_of_a_dense_system_agrees(method):
    matrix = hippo_normal(6)
    eigenvalues, vectors = hippo_blocks(6)
    basis = torch.cat([vectors, vectors.conj()], 1)
    B, dt, one = torch.randn(6, dtype=torch.float64), 0.3, torch.eye(6, dtype=torch.float64)
    if method == "zoh":
        step = torch.linalg.matrix_exp(dt * matrix)
        enter = torch.linalg.solve(matrix, (step - one) @ B)
    else:
        step = torch.linalg.solve(one - dt / 2 * matrix, one + dt / 2 * matrix)
        enter = torch.linalg.solve(one - dt / 2 * matrix, dt * B)
    log_a, scale = discretise(
        torch.cat([eigenvalues, eigenvalues.conj()]), torch.tensor(dt, dtype=torch.float64), method
    )
    got = basis @ torch.diag(log_a.exp()) @ basis.mH
    torch.testing.assert_close(got, step.cdouble(), rtol=0, atol=1e-10)
    torch.testing.assert_close(basis @ (scale * (basis.mH @ B.cdouble())), enter.cdouble(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("kind", ["lin", "inv", "legs"])
def test_every_transition_is_a_contraction(kind, method):
    A = diagonal_init(64, kind).to(torch.complex64)
    for dt in (1e-4, 1e-3, 1e-1, 1.0):
        log_a, scale = discretise(A, torch.tensor(dt), method)
        assert (log_a.exp().abs() < 1).all()
        assert scale.isfinite().all()


def test_small_steps_keep_their_digits():
    A, dt = torch.tensor([-0.5 + 3j]), torch.tensor([1e-5])
    _, scale = discretise(A, dt)
    _, want = discretise(A.cdouble(), dt.double())
    torch.testing.assert_close(scale.cdouble(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_discretisation_is_differentiable(method):
    A, dt = torch.tensor([-0.5 + 3j, -0.2 + 0j]).cdouble().requires_grad_(), torch.tensor([0.1, 0.3]).double()
    assert torch.autograd.gradcheck(lambda A, dt: discretise(A, dt, method), (A, dt.requires_grad_()))


def test_errors_name_the_argument_the_value_and_the_fix():
    with pytest.raises(ValueError, match=r"state_size \(7\) must be a positive even number.*use 8"):
        diagonal_init(7)
    with pytest.raises(ValueError, match=r"method \('hippo'\) must be one of 'lin', 'inv', 'legs'"):
        diagonal_init(8, "hippo")
    with pytest.raises(ValueError, match=r"blocks \(3\) must divide state_size \(16\) .*such as 18"):
        hippo_blocks(16, blocks=3)
    with pytest.raises(ValueError, match=r"method \('euler'\) must be one of 'zoh', 'bilinear'"):
        discretise(torch.tensor([-1.0]), torch.tensor([0.1]), "euler")
