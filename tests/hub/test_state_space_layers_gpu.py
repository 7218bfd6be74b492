"""Stock transformers' Mamba and Mamba-2 on our kernels on a real GPU equal their own torch path."""

import pytest
import torch

from undersong.hub.kernelize import kernel_config, kernel_report, kernelize

from .test_state_space_layers import IDS, build, stock_functions

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def torch_afterwards():
    yield
    for function in stock_functions():
        vars(function).pop("forward", None)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_use_kernels_and_kernelize_equal_stock(kind, tmp_path):
    model = build(kind, hidden_act="swish").eval()  # the class of "silu" asks the Hub for a kernel of its own
    model.save_pretrained(tmp_path)
    ids = IDS.cuda()
    stock = type(model).from_pretrained(tmp_path, device_map="cuda").eval()
    want = stock(ids).logits
    tokens = stock.generate(ids, max_new_tokens=5, do_sample=False)
    fast = (
        type(model)
        .from_pretrained(tmp_path, device_map="cuda", use_kernels=True, kernel_config=kernel_config())
        .eval()
    )
    report = kernel_report(fast)
    assert len(report.accelerated) == 10, str(report)
    assert "torch-cuda" in report[report.accelerated[0]].kernel
    torch.testing.assert_close(fast(ids).logits, want, rtol=1e-3, atol=1e-3)
    assert torch.equal(fast.generate(ids, max_new_tokens=5, do_sample=False), tokens)
    assert torch.equal(stock(ids).logits, fast(ids).logits), "the functions are shared"
    assert kernelize(fast, device="cpu").accelerated == []
    assert torch.equal(stock(ids).logits, want)
    kernelize(fast.train())
    loss = fast(ids, labels=ids, use_cache=False).loss
    gradients = torch.autograd.grad(loss, list(fast.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_model_on_the_cpu_keeps_its_torch_path(kind):
    kernelize(build(kind).cuda())
    model = build(kind)
    assert model(IDS).logits.isfinite().all()
