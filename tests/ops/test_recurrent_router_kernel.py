"""The recurrent router's Triton kernels under Triton's interpreter, against the float64 definition.

Memory handed to the kernels is filled with NaN.
"""

import importlib.util
import inspect
import sys

import pytest
import torch

from undersong.hub.kernelize import kernelize
from undersong.modeling.recurrent_router_layer import RecurrentRouter
from undersong.ops import _dispatch, explain
from undersong.ops.recurrent_router import recurrent_router

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="runs Triton's interpreter"
    ),
]
SIZE, EXPERTS = 24, 6
NAMES = ("u", "h", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "W2", "base")
OUTPUTS = ("new", "scores", "weights", "experts")
every_cell = pytest.mark.parametrize("kind", ["gru", "rnn"])


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def package():
    """The kernel's package, as the op loads it."""
    recurrent_router(*arguments(make_case("rnn", 1)), top_k=1, backend="triton")
    return _dispatch._KERNELS["recurrent_router"]


@pytest.fixture
def many_tokens(package, monkeypatch):
    """The cut of the work for many tokens, at numbers the interpreter can afford."""
    monkeypatch.setattr(sys.modules[f"{package.__name__}.function"], "FEW", 0)


def make_case(kind, tokens, size=SIZE, experts=EXPERTS, first=False, based=True, dtype=torch.float32, seed=0):
    """The op's tensors by name; the cell stays in float32, as in the models."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    rows = size * {"gru": 3, "rnn": 1}[kind]
    return {
        "u": normal(tokens, size).to(dtype),
        "h": None if first else normal(tokens, size).tanh(),
        "weight_ih": normal(rows, size, scale=size**-0.5),
        "weight_hh": normal(rows, size, scale=size**-0.5),
        "bias_ih": normal(rows),
        "bias_hh": normal(rows),
        "W2": normal(experts, size, scale=size**-0.5).to(dtype),
        "base": normal(tokens, experts).to(dtype) if based else None,
    }


def arguments(case):
    return case["u"], case["h"], tuple(case[name] for name in NAMES[2:6]), case["W2"]


def evaluate(case, backend, top_k=2, norm=True, double=False, grads=OUTPUTS[:3], frozen=()):
    """Results and gradients by name, under random upstream gradients of the outputs in `grads`."""
    leaves = {
        name: x.detach().to(torch.float64 if double else x.dtype).clone().requires_grad_(name not in frozen)
        for name, x in case.items()
        if x is not None
    }
    case = dict.fromkeys(NAMES) | leaves
    outputs = recurrent_router(*arguments(case), top_k=top_k, base=case["base"], norm_topk_prob=norm, backend=backend)
    outputs = dict(zip(OUTPUTS, outputs, strict=True))
    generator = torch.Generator().manual_seed(1)
    upstream = {name: torch.randn(outputs[name].shape, generator=generator).to(outputs[name]) for name in OUTPUTS[:3]}
    sum((outputs[name] * upstream[name]).sum() for name in grads).backward()
    return {name: x.detach() for name, x in outputs.items()} | {f"d{name}": x.grad for name, x in leaves.items()}


def assert_equal(got, want, tolerance):
    """Every tensor, up to `tolerance` of its largest entry; no gradient is one of zeros."""
    assert got.keys() == want.keys()
    for name, x in got.items():
        y = want[name]
        if name == "experts":
            assert torch.equal(x, y)
            assert x.dtype == torch.int64
        elif x is None or y is None:
            assert all(t is None or not t.any() for t in (x, y)), name
        else:
            scale = y.abs().amax().item() if y.numel() else 1.0
            torch.testing.assert_close(
                x.double(), y.double(), rtol=0, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
            )


@every_cell
@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize(("first", "based", "norm"), [(0, 0, 1), (1, 0, 0), (0, 1, 0), (1, 1, 1)])
def test_equals_the_definition_with_gradients(kind, tokens, first, based, norm):
    case = make_case(kind, tokens, first=bool(first), based=bool(based))
    got = evaluate(case, "triton", norm=bool(norm))
    assert explain()["recurrent_router"].backend == "triton"
    assert all(got[name].dtype == torch.float32 for name in OUTPUTS[:3])
    assert_equal(got, evaluate(case, "reference", norm=bool(norm), double=True), 5e-6)


@every_cell
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("size", "experts", "top_k"), [(5, 2, 1), (33, 20, 7), (72, 17, 17), (1, 1, 1)])
def test_other_sizes(kind, norm, size, experts, top_k):
    case = make_case(kind, 19, size, experts)
    got = evaluate(case, "triton", top_k, norm)
    assert_equal(got, evaluate(case, "reference", top_k, norm, double=True), 5e-6)


@pytest.mark.usefixtures("many_tokens")
@every_cell
@pytest.mark.parametrize("first", [True, False])
def test_many_tokens_are_cut_otherwise(kind, first):
    case = make_case(kind, 70, 40, first=first)
    assert_equal(evaluate(case, "triton"), evaluate(case, "reference", double=True), 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [True, False])
def test_half_inputs_are_computed_in_float32(dtype, norm):
    case = make_case("gru", 7, dtype=dtype)
    got, want = evaluate(case, "triton", norm=norm), evaluate(case, "reference", norm=norm, double=True)
    assert_equal({name: got[name] for name in OUTPUTS}, {name: want[name] for name in OUTPUTS}, 5e-6)
    assert all(got[f"d{name}"].dtype == x.dtype for name, x in case.items())
    assert_equal(got, want, torch.finfo(dtype).eps)


@every_cell
@pytest.mark.parametrize("grads", [("new",), ("scores",), ("weights",), ("new", "weights"), ("scores", "weights")])
def test_any_of_the_outputs_may_be_used_alone(kind, grads):
    case = make_case(kind, 5)
    got, want = evaluate(case, "triton", grads=grads), evaluate(case, "reference", grads=grads, double=True)
    assert_equal(got, want, 5e-6)


@every_cell
def test_frozen_inputs_get_no_gradient(kind):
    case = make_case(kind, 5)
    want = evaluate(case, "triton")
    for frozen in (("u", "h"), ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), ("W2", "base"), NAMES[1:]):
        got = evaluate(case, "triton", frozen=frozen)
        for name in NAMES:
            assert got[f"d{name}"] is None if name in frozen else torch.equal(got[f"d{name}"], want[f"d{name}"])


def test_state_of_a_first_layer_is_that_of_zeros():
    case = make_case("gru", 5)
    zeros, none = evaluate(case | {"h": case["h"] * 0}, "triton"), evaluate(case | {"h": None}, "triton")
    assert none.pop("dweight_hh") is None
    for name, x in none.items():
        torch.testing.assert_close(x, zeros[name], rtol=0, atol=1e-6)


def test_equal_probabilities_go_to_the_lower_expert():
    case = make_case("gru", 3, based=True)
    case["W2"] = case["W2"] * 0
    case["base"] = torch.tensor([[1.0, 1, 1, 1, 1, 1], [0, 2, 0, 2, 0, 2], [-300, -200, -200, 0, -300, -200]])
    _, _, weights, experts = recurrent_router(*arguments(case), top_k=3, base=case["base"], backend="triton")
    assert experts.tolist() == [[0, 1, 2], [1, 3, 5], [3, 0, 1]]  # far behind the best, probabilities are 0
    torch.testing.assert_close(weights, torch.tensor([[1 / 3] * 3, [1 / 3] * 3, [1.0, 0, 0]]))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's, of inf - inf
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("experts", [6, 16, 17])
def test_a_broken_token_has_nan_weights_and_real_experts(bad, experts):
    case = make_case("gru", 3, experts=experts)
    want = recurrent_router(*arguments(case), top_k=experts, base=case["base"], backend="triton")
    case["base"][1, :3] = bad
    _, _, weights, chosen = recurrent_router(*arguments(case), top_k=experts, base=case["base"], backend="triton")
    assert weights[1].isnan().all()
    assert chosen[1].sort().values.tolist() == list(range(experts))
    assert torch.equal(weights[::2], want[2][::2])
    assert torch.equal(chosen[::2], want[3][::2])


def test_experts_ruled_out_by_the_base_come_last():
    case = make_case("gru", 4)
    case["base"][:, :4] = -torch.inf
    _, scores, weights, experts = recurrent_router(*arguments(case), top_k=3, base=case["base"], backend="triton")
    assert scores[:, :4].eq(-torch.inf).all()
    assert experts[:, :2].ge(4).all()
    assert weights[:, 2].eq(0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(4))


def test_saturated_gates_are_finite():
    case = make_case("gru", 4)
    case["u"] = case["u"] * 1e4
    got, want = evaluate(case, "triton"), evaluate(case, "reference", double=True)
    for name in OUTPUTS[:3]:
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-5)
    for name in ("du", "dh", "dweight_ih", "dbias_hh"):  # next to nothing is left of them
        torch.testing.assert_close(got[name].double(), want[name].double(), rtol=0, atol=1e-6)


def test_strides_do_not_matter():
    case = make_case("gru", 5)
    want = evaluate(case, "triton")
    apart = {name: torch.stack([x, x * torch.nan], -1)[..., 0] for name, x in case.items()}
    got = recurrent_router(*arguments(apart), top_k=2, base=apart["base"], backend="triton")
    assert all(torch.equal(x, want[name]) for x, name in zip(got, OUTPUTS, strict=True))


def test_a_gradient_that_is_one_number_for_all():
    case = make_case("gru", 3)
    case = {name: x.requires_grad_() for name, x in case.items()}
    for backend in ("triton", "torch"):
        new, scores, *_ = recurrent_router(*arguments(case), top_k=2, base=case["base"], backend=backend)
        gradients = torch.autograd.grad((new.sum(), scores.sum()), list(case.values()))
        if backend == "triton":
            got = gradients
    for x, y in zip(got, gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_without_gradients_the_numbers_are_the_same():
    case = make_case("gru", 5)
    want = evaluate(case, "triton")
    got = recurrent_router(*arguments(case), top_k=2, base=case["base"], backend="triton")
    assert all(torch.equal(x, want[name]) for x, name in zip(got, OUTPUTS, strict=True))
    assert not any(x.requires_grad for x in got)


def test_constants_are_passed_in_the_order_of_the_kernels_own(package, monkeypatch):
    """A repeated launch hands them over by position."""
    function = sys.modules[f"{package.__name__}.function"]
    launch, seen = function._launch, set()

    def checked(kernel, programs, inputs, outputs, tokens, constants, cut):
        names = [*constants, *(name for name in cut if name.startswith("BLOCK"))]
        assert list(inspect.signature(kernel.fn).parameters)[len(inputs) + len(outputs) :] == ["tokens", *names]
        seen.add(kernel.fn.__name__)
        launch(kernel, programs, inputs, outputs, tokens, constants, cut)

    monkeypatch.setattr(function, "_launch", checked)
    evaluate(make_case("gru", 1), "triton")
    assert seen == {"step", "choose", "choose_backward", "step_backward"}


def test_no_tokens():
    case = make_case("gru", 0)
    got = evaluate(case, "triton")
    assert [tuple(got[name].shape) for name in OUTPUTS] == [(0, SIZE), (0, EXPERTS), (0, 2), (0, 2)]
    assert got["dweight_ih"].eq(0).all()
    assert got["du"].shape == (0, SIZE)


@every_cell
@pytest.mark.parametrize("first", [True, False])
def test_torch_compile_sees_one_operator(kind, first):
    torch._dynamo.reset()
    case = make_case(kind, 4, first=first)
    graphs = []

    def backend(graph, example):
        graphs.append([n for n in graph.graph.nodes if n.op == "call_function" and "recurrent" in str(n.target)])
        return graph

    def route(u, h, base, *rest):
        return recurrent_router(u, h, rest[:4], rest[4], top_k=2, base=base, backend="triton")

    inputs = case["u"], case["h"], case["base"], *(case[name] for name in NAMES[2:7])
    want = route(*inputs)
    got = torch.compile(route, fullgraph=True, backend=backend)(*inputs)
    assert [len(nodes) for nodes in graphs] == [1]
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_compiled_gradients():
    torch._dynamo.reset()
    case = make_case("gru", 4)
    leaves = [x.requires_grad_() for x in case.values()]

    def loss(u, h, *rest):
        new, scores, weights, _ = recurrent_router(u, h, rest[:4], rest[4], top_k=2, base=rest[5], backend="triton")
        return new.sum() + scores.square().sum() + weights[:, 0].sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_a_kernelized_layer_runs_the_kernel_and_torch_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSONG_CACHE", str(tmp_path))
    layer, case = RecurrentRouter(), make_case("gru", 5)
    want = layer(*arguments(case), 2, case["base"])
    counts = explain()["recurrent_router"].counts
    assert kernelize(layer).accelerated == [""]
    got = layer(*arguments(case), 2, case["base"])
    assert explain()["recurrent_router"].counts == counts
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for change in ({"size": 257}, {"experts": 257}, {"dtype": torch.float64}):
        case = make_case("rnn", 2, **change)
        got = layer(*arguments(case), 2, case["base"], False)
        want = recurrent_router(*arguments(case), top_k=2, base=case["base"], norm_topk_prob=False)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 257}, r"the router size \(257\) is above the kernel's 256; use backend='torch'"),
        ({"experts": 257}, r"the number of experts \(257\) is above the kernel's 256; use backend='torch'"),
        ({"dtype": torch.float64}, "float64 inputs are computed in float64, which the kernel does not do"),
    ],
)
def test_what_the_op_does_not_give_to_the_kernel(change, message):
    case = make_case("rnn", 1, **change)
    with pytest.raises(RuntimeError, match=message):
        recurrent_router(*arguments(case), top_k=1, backend="triton")


def test_what_the_kernel_refuses(package):
    case = make_case("rnn", 1)
    inputs = [case[name] for name in NAMES[:7]]
    with pytest.raises(ValueError, match="the kernel computes in float32, got float64 inputs; use the torch path"):
        package.recurrent_router(*inputs[:6], inputs[6].double(), 1)
    with pytest.raises(ValueError, match=r"experts \(300\) and router size \(24\) must be at most 256"):
        package.recurrent_router(*inputs[:6], torch.ones(300, SIZE), 1)
