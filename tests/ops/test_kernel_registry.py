"""How a kernel package shows its functions to autograd, torch.compile and tensor subclasses."""

import importlib.util
import itertools
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import undersong

FILES = sorted((Path(undersong.__file__).parent / "kernels").glob("*/torch-ext/*/registry.py"))
numbers = itertools.count()


@pytest.fixture
def registry(monkeypatch):
    """The file as a module of a package of its own: operators stay for good, so no two tests share a name."""
    package = f"toy{next(numbers)}"
    spec = importlib.util.spec_from_file_location(f"{package}.registry", FILES[0])
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


class Scale:
    """y = a x and, beside it, x's sum, with a count of who was called."""

    def __init__(self, registry):
        self.calls = []
        self.operator = registry.register(
            "scale", "(Tensor x, float a) -> (Tensor, Tensor)", self.run, self.fake, self.differentiate, self.save
        )
        self.backward = registry.register("scale_backward", "(Tensor g, float a) -> Tensor", self.grad, self.grad_fake)

    def run(self, x, a):
        self.calls.append("run")
        return x * a, x.sum()

    def fake(self, x, a):
        self.calls.append("fake")
        return torch.empty_like(x), x.new_empty(())

    def grad(self, g, a):
        return g * a

    def grad_fake(self, g, a):
        return torch.empty_like(g)

    @staticmethod
    def save(ctx, inputs, output):
        ctx.a = inputs[1]
        ctx.save_for_backward(inputs[0], output[0])
        ctx.mark_non_differentiable(output[1])

    def differentiate(self, ctx, g, _):
        x, y = ctx.saved_tensors
        assert torch.equal(y, x * ctx.a)
        return self.backward(g, ctx.a), None


def test_every_package_has_the_same_file():
    assert len(FILES) > 3
    assert len({file.read_bytes() for file in FILES}) == 1


def test_gradients_are_those_of_the_operator(registry):
    scale = Scale(registry)
    gradients = []
    for call in (scale.operator, scale.operator.operator):
        x = torch.arange(3.0, requires_grad=True)
        y, total = call(x, 2.5)
        assert not total.requires_grad
        gradients += torch.autograd.grad(y, x, torch.tensor([1.0, 2.0, 3.0]))
    assert gradients[0].tolist() == gradients[1].tolist() == [2.5, 5.0, 7.5]


def test_a_second_derivative_is_refused(registry):
    x = torch.arange(3.0, requires_grad=True)
    y, _ = Scale(registry).operator(x, 2.0)
    (first,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_nobody_is_in_between_without_gradients(registry, monkeypatch):
    scale = Scale(registry)
    monkeypatch.setattr(scale.operator, "operator", None)
    x = torch.arange(3.0, requires_grad=True)
    with torch.no_grad():
        assert scale.operator(x, 2.0)[0].tolist() == [0.0, 2.0, 4.0]
    assert scale.operator(torch.nn.Parameter(x.detach(), requires_grad=False), 2.0)[1] == 3
    assert scale.calls == ["run", "run"]


def test_subclasses_see_the_operator(registry):
    scale = Scale(registry)
    with FakeTensorMode():
        assert scale.operator(torch.empty(3), 2.0)[0].shape == (3,)
    assert "run" not in scale.calls


def test_functorch_is_refused_as_by_any_operator_with_a_derivative(registry):
    scale = Scale(registry)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: scale.operator(x, 2.0)[0].sum())(torch.ones(3))
    assert scale.calls == []


def test_compiled_it_is_one_operator(registry):
    torch._dynamo.reset()
    scale, graphs = Scale(registry), []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    function = torch.compile(lambda x: scale.operator(x, 2.0)[0] + 1, backend=keep, fullgraph=True)
    assert function(torch.ones(2)).tolist() == [3.0, 3.0]
    assert [node.target.__name__ for node in graphs[0].graph.nodes if "scale" in str(node.target)] == ["scale"]


def test_without_a_derivative_autograd_sees_the_operator(registry):
    operator = registry.register("plain", "(Tensor x) -> Tensor", torch.clone, torch.empty_like)
    y = operator(torch.ones(2, requires_grad=True))
    with pytest.raises(UserWarning, match="an autograd kernel was not registered"):
        y.sum().backward()
