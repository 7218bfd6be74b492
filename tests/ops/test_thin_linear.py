"""A linear layer in parts is the linear layer."""

import pytest
import torch
from torch.nn.functional import linear

from undersong.ops import _thin_linear
from undersong.ops._thin_linear import thin_linear


@pytest.fixture
def batches(monkeypatch):
    """How many parts every product was cut into, with three threads and weights of any size."""
    monkeypatch.setattr(_thin_linear, "SMALL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y: found.append(len(x)) or bmm(x, y))
    return found


@pytest.mark.parametrize("bias", [None, torch.randn(12)], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5), (2, 1, 5), (2, 4, 5)])
def test_few_rows_are_split_and_equal(batches, shape, bias):
    x, weight = torch.randn(shape), torch.randn(12, 5)
    with torch.no_grad():
        got = thin_linear(x, weight, bias)
    torch.testing.assert_close(got, linear(x, weight, bias), rtol=0, atol=1e-6)
    assert batches == [3]


@pytest.mark.parametrize("case", ["many rows", "odd size", "double", "half", "gradient", "autocast", "no rows"])
def test_everything_else_is_left_to_torch(batches, case):
    x, weight = torch.randn(9 if case == "many rows" else 1, 5), torch.randn(13 if case == "odd size" else 12, 5)
    if case == "no rows":
        x = x[:0]
    dtype = {"double": torch.float64, "half": torch.bfloat16}.get(case, torch.float32)
    x, weight = x.to(dtype), weight.to(dtype)
    with torch.set_grad_enabled(case == "gradient"), torch.autocast("cpu", enabled=case == "autocast"):
        assert torch.equal(thin_linear(x, weight), linear(x, weight))
    assert batches == []
