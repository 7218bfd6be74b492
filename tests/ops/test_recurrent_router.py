"""The recurrent router's op: the cell of torch, the scores, the choice."""

import pytest
import torch

from undersong.ops.recurrent_router import recurrent_router

TOKENS, SIZE, EXPERTS = 7, 5, 6
CELLS = {"gru": torch.nn.GRUCell, "rnn": torch.nn.RNNCell}
every_cell = pytest.mark.parametrize("kind", CELLS)
both_backends = pytest.mark.parametrize("backend", ["reference", "torch"])


def parameters(cell):
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


def make(kind="gru", dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    cell = CELLS[kind](SIZE, SIZE, dtype=dtype)
    u, h = torch.randn(2, TOKENS, SIZE, dtype=dtype)
    return u, h, cell, torch.randn(EXPERTS, SIZE, dtype=dtype), torch.randn(TOKENS, EXPERTS, dtype=dtype)


@every_cell
@both_backends
@pytest.mark.parametrize("first", [True, False])
def test_state_is_that_of_torchs_cell(kind, backend, first):
    u, h, cell, W2, _ = make(kind)
    h = None if first else h
    new, scores, _, _ = recurrent_router(u, h, parameters(cell), W2, top_k=2, backend=backend)
    want = cell(u, h)
    torch.testing.assert_close(new, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores, want @ W2.T, rtol=0, atol=1e-12)


@both_backends
@pytest.mark.parametrize("norm", [True, False])
def test_experts_are_the_most_likely_and_weights_their_probabilities(backend, norm):
    u, h, cell, W2, base = make()
    _, scores, weights, experts = recurrent_router(
        u, h, parameters(cell), W2, top_k=3, base=base, norm_topk_prob=norm, backend=backend
    )
    for token in range(TOKENS):
        probabilities = (scores[token] - scores[token].logsumexp(0)).exp().tolist()
        order = sorted(range(EXPERTS), key=lambda e: -probabilities[e])[:3]
        want = [probabilities[e] for e in order]
        want = [p / sum(want) for p in want] if norm else want
        assert experts[token].tolist() == order
        assert weights[token].tolist() == pytest.approx(want, abs=1e-12)


@every_cell
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_torch_equals_the_reference_with_gradients(kind, first, based, norm):
    u, h, cell, W2, base = make(kind)
    leaves = [t.detach().clone().requires_grad_() for t in (u, h, *parameters(cell), W2, base)]
    results = {}
    for backend in ("reference", "torch"):
        u, h, *cell, W2, base = leaves
        outputs = recurrent_router(
            u,
            None if first else h,
            cell,
            W2,
            top_k=2,
            base=base if based else None,
            norm_topk_prob=norm,
            backend=backend,
        )
        torch.manual_seed(1)
        sum((t * torch.randn_like(t)).sum() for t in outputs[:3]).backward()
        results[backend] = [*outputs, *(t.grad for t in leaves)]
        for t in leaves:
            t.grad = None
    for got, want in zip(results["torch"], results["reference"], strict=True):
        if got is None or want is None:  # weights of a state that is not there: no gradient, or one of zeros
            assert first or not based
            assert all(t is None or not t.any() for t in (got, want))
        else:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@every_cell
def test_gradcheck_with_every_expert_chosen(kind):
    """With top_k the number of experts nothing jumps."""
    u, h, cell, W2, base = make(kind)
    leaves = [t.detach().requires_grad_() for t in (u[:2], h[:2], *parameters(cell), W2, base[:2])]

    def function(u, h, weight_ih, weight_hh, bias_ih, bias_hh, W2, base):
        cell = weight_ih, weight_hh, bias_ih, bias_hh
        h, s, w, e = recurrent_router(u, h, cell, W2, top_k=EXPERTS, base=base, norm_topk_prob=False, backend="torch")
        return h, s, torch.zeros_like(s).scatter(1, e, w)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(dtype):
    u, h, cell, W2, _ = make(dtype=torch.float32)
    u, W2 = u.to(dtype), W2.to(dtype)
    got = recurrent_router(u, h, parameters(cell), W2, top_k=2)
    want = recurrent_router(u.float(), h, parameters(cell), W2.float(), top_k=2)
    assert [t.dtype for t in got] == [torch.float32] * 3 + [torch.int64]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_autocast_does_not_round():
    u, h, cell, W2, _ = make(dtype=torch.float32)
    want = recurrent_router(u, h, parameters(cell), W2, top_k=2)
    with torch.autocast("cpu", torch.bfloat16):
        got = recurrent_router(u, h, parameters(cell), W2, top_k=2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_tokens():
    _, _, cell, W2, _ = make()
    h, s, w, e = recurrent_router(torch.ones(0, SIZE).double(), None, parameters(cell), W2, top_k=2)
    assert [tuple(t.shape) for t in (h, s, w, e)] == [(0, SIZE), (0, EXPERTS), (0, 2), (0, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.ones(3)}, r"u \(float32 \[3\]\) must be a float \[tokens, router_size\]"),
        ({"h": torch.ones(2, SIZE)}, r"h \(float32 \[2, 5\]\) must be .* = \[7, 5\] because u is float64 \[7, 5\]"),
        ({"cell": torch.ones(3)}, r"cell \(float32 \[3\]\) must be \(weight_ih, weight_hh, bias_ih, bias_hh\)"),
        (
            {"cell": parameters(torch.nn.LSTMCell(SIZE, SIZE))},
            r"weight_ih \(float32 \[20, 5\]\) must be \[15, 5\] \(GRU\) or \[5, 5\] \(Elman\)",
        ),
        ({"W2": torch.ones(6, 4)}, r"W2 \(float32 \[6, 4\]\) must be a float .* = \[6, 5\]"),
        ({"base": torch.ones(7, 5)}, r"base \(float32 \[7, 5\]\) must be a float .* = \[7, 6\]"),
        ({"top_k": 7}, r"top_k \(7\) must lie between 1 and the number of experts \(6\)"),
        ({"top_k": 0}, r"top_k \(0\) must lie between 1"),
        ({"backend": "cuda"}, "cuda"),
    ],
)
def test_errors(change, message):
    u, h, cell, W2, base = make()
    arguments = {"u": u, "h": h, "cell": parameters(cell), "W2": W2, "top_k": 2, "base": base} | change
    with pytest.raises(ValueError, match=message):
        recurrent_router(
            arguments.pop("u"), arguments.pop("h"), arguments.pop("cell"), arguments.pop("W2"), **arguments
        )
