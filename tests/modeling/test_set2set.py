"""Set2Set equals a ragged computation set by set, does not see order, padding or neighbours, and knows empty sets."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn

from undersong.modeling.set2set.configuration_set2set import Set2SetConfig
from undersong.modeling.set2set.modeling_set2set import Set2SetForSequenceClassification, Set2SetModel
from undersong.modeling.set_encoder import ReadProcess, Set2SetPooling

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (5, 1, 0, 7, 3)


def ragged_set2set(lstm, elements, index, sets, steps):
    """Set2Set over rows [elements, d] that name their set, in the parameters of an `nn.LSTM`, gate by gate."""
    d = elements.shape[1]
    q_star, h, c = elements.new_zeros(sets, 2 * d), elements.new_zeros(sets, d), elements.new_zeros(sets, d)
    for _ in range(steps):
        gates = q_star @ lstm["weight_ih_l0"].T + lstm["bias_ih_l0"] + h @ lstm["weight_hh_l0"].T + lstm["bias_hh_l0"]
        i, f, g, o = gates.split(d, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        weight = (elements * h[index]).sum(1).exp()
        total = elements.new_zeros(sets).index_add(0, index, weight)
        read = elements.new_zeros(sets, d).index_add(0, index, weight[:, None] * elements)
        q_star = torch.cat([h, read / total.clamp(min=1e-300)[:, None]], 1)
    return q_star


def padded_sets(sizes=SIZES, d=6, dtype=torch.float64, seed=0):
    """Sets with NaN at the padding, which stands in front of some rows and behind others."""
    generator = torch.Generator().manual_seed(seed)
    n = max(sizes)
    mask = torch.zeros(len(sizes), n, dtype=torch.bool)
    for row, size in enumerate(sizes):
        mask[row, n - size if row % 2 else 0 : n if row % 2 else size] = True
    memory = torch.randn(len(sizes), n, d, generator=generator, dtype=torch.float64)
    return memory.masked_fill(~mask.unsqueeze(-1), float("nan")).to(dtype), mask


def process(d=6, steps=4, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    block = ReadProcess(d, steps).to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.7)
    return block


def close(got, want, atol):
    assert got.shape == want.shape
    assert (difference := (got - want).abs().max().item()) <= atol, f"differs by {difference:.3g}"


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_padded_equals_ragged(steps, dtype, atol):
    memory, mask = padded_sets()
    block = process(steps=steps)
    want = ragged_set2set(block.lstm.state_dict(), memory[mask], mask.nonzero()[:, 0], len(SIZES), steps)
    close(block.to(dtype)(memory.to(dtype), mask)[0].double(), want, atol)


def test_parameters_are_those_of_an_lstm_that_reads_query_and_readout():
    shapes = {name: tuple(value.shape) for name, value in ReadProcess(6).state_dict().items()}
    assert shapes == {
        "lstm.weight_ih_l0": (24, 12),
        "lstm.weight_hh_l0": (24, 6),
        "lstm.bias_ih_l0": (24,),
        "lstm.bias_hh_l0": (24,),
    }


def test_order_of_elements_does_not_matter():
    memory, mask = padded_sets((7, 7, 7))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    block = process()
    q_star, attentions = block(memory, mask)
    permuted, moved = block(memory[:, order], mask)
    close(permuted, q_star, 1e-12)
    for attention, other in zip(attentions, moved, strict=True):
        close(other, attention[:, order], 1e-12)


def test_a_set_does_not_see_its_batch():
    memory, mask = padded_sets()
    block = process()
    q_star = block(memory, mask)[0]
    order = torch.tensor([3, 0, 4, 2, 1])
    close(block(memory[order], mask[order])[0], q_star[order], 1e-12)
    for row, valid in enumerate(mask):
        close(block(memory[row : row + 1, valid])[0], q_star[row : row + 1], 1e-12)


def test_attention_sums_to_one_on_what_is_there():
    memory, mask = padded_sets(dtype=torch.float32)
    _, attentions = process(dtype=torch.float32)(memory, mask)
    assert len(attentions) == 4
    for attention in attentions:
        assert attention.dtype == torch.float32
        assert (attention[~mask] == 0).all()
        close(attention.sum(1), mask.any(1).float(), 1e-6)


def test_no_steps_give_zeros():
    q_star, attentions = process(steps=0)(*padded_sets())
    assert q_star.shape == (len(SIZES), 12)
    assert not q_star.any()
    assert attentions == ()


def test_one_element_is_read_whole():
    memory, _ = padded_sets((1, 1))
    q_star, attentions = process()(memory)
    close(q_star[:, 6:], memory[:, 0], 1e-12)
    assert all((attention == 1).all() for attention in attentions)


def test_empty_set_reads_zeros_and_gives_no_gradient():
    memory, mask = padded_sets()
    memory.requires_grad_()
    q_star, _ = process()(memory, mask)
    assert not q_star[2, 6:].any()
    assert q_star.isfinite().all()
    q_star.sum().backward()
    assert not memory.grad[~mask].any()
    assert memory.grad.isfinite().all()
    assert process()(memory[:, :0])[0].shape == (len(SIZES), 12)  # no place for elements at all
    close(process()(memory[:, :0])[0], q_star[2:3].expand(len(SIZES), -1), 1e-12)


def test_gradcheck():
    memory, mask = padded_sets((3, 1, 0), d=2)
    memory = memory.nan_to_num(0.0).requires_grad_()
    block = process(d=2, steps=3)
    names = [name for name, _ in block.named_parameters()]

    def call(memory, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (memory, mask))[0]

    assert torch.autograd.gradcheck(call, (memory, *block.parameters()))


def test_softmax_is_not_computed_in_half_precision():
    memory, mask = padded_sets(dtype=torch.bfloat16)
    block = process(dtype=torch.bfloat16)
    q_star, attentions = block(memory, mask)
    assert q_star.dtype == torch.bfloat16
    assert attentions[0].dtype == torch.float32
    close(q_star.double(), block.double()(memory.double(), mask)[0], 0.05)  # queries carry 8 bits


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReadProcess(0), r"hidden_size \(0\) must be at least 1"),
        (lambda: ReadProcess(4, -1), r"num_steps \(-1\) must be 0 or more"),
        (lambda: ReadProcess(4)(torch.zeros(2, 3, 5)), r"memory \(5 wide\) must be 4 wide; .* hidden_size=5"),
        (lambda: ReadProcess(4)(torch.zeros(2, 4)), r"memory \(float32 \[2, 4\]\) must be a float \[batch, n, hidden"),
        (
            lambda: ReadProcess(4)(torch.zeros(2, 3, 4), torch.ones(2, 2, dtype=torch.bool)),
            r"mask \(bool \[2, 2\]\) must be a bool \[batch, n\] = \[2, 3\]",
        ),
        (lambda: vectors()(), r"inputs \(none\) must be exactly one of input_values because input_size is 3"),
        (
            lambda: vectors()(input_ids=torch.ones(1, 2, dtype=torch.long)),
            r"inputs \(input_ids\) must be exactly one of input_values",
        ),
        (lambda: vectors()(input_values=torch.ones(1, 2)), r"input_values has shape \(1, 2\) .* \[batch, n, 3\]"),
        (lambda: tokens()(inputs_embeds=torch.ones(1, 2, 3)), r"inputs_embeds has shape \(1, 2, 3\) .* n, 8\]"),
        (
            lambda: tokens()(input_values=torch.ones(1, 2, 3)),
            r"inputs \(input_values\) must be exactly one of input_ids or inputs_embeds because input_size is None",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_process_steps": -2}, r"num_process_steps \(-2\) must be 0 or more"),
        ({"read_hidden_sizes": [0]}, r"read_hidden_sizes \(\[0\]\) must be at least 1"),
        ({"input_size": 0}, r"input_size \(0\), hidden_size \(128\)"),
    ],
)
def test_configuration_refusals(options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        Set2SetConfig(**options)


def vectors(head=Set2SetModel, **options):
    torch.manual_seed(0)
    options = {"input_size": 3, "hidden_size": 8, "read_hidden_sizes": [5], "initializer_range": 0.5} | options
    return head(Set2SetConfig(**options)).eval()


def tokens(head=Set2SetModel, **options):
    return vectors(head, input_size=None, vocab_size=11, **options)


def test_model_reads_the_memory_it_returns():
    model = vectors()
    values = torch.randn(2, 4, 3)
    outputs = model(input_values=values, output_attentions=True)
    close(outputs.last_hidden_state[1, 2], model(input_values=values[1:, 2:3]).last_hidden_state[0, 0], 1e-6)
    q_star, attentions = model.process(outputs.last_hidden_state)
    assert torch.equal(outputs.pooler_output, q_star)
    assert all(torch.equal(a, b) for a, b in zip(outputs.attentions, attentions, strict=True))
    assert model(input_values=values).attentions is None


def test_embeddings_without_layers_are_the_memory():
    model = tokens(read_hidden_sizes=[])
    ids = torch.tensor([[1, 4, 4]])
    assert torch.equal(model(input_ids=ids).last_hidden_state, model.embed_tokens(ids))
    assert model.config.num_hidden_layers == 0
    assert vectors(read_hidden_sizes=[]).config.num_hidden_layers == 1


def test_padding_may_hold_anything_and_poisons_no_gradient():
    model = vectors(Set2SetForSequenceClassification, num_labels=2)
    values = torch.randn(3, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    want = model(input_values=values, attention_mask=mask).logits
    values[mask == 0] = float("nan")
    outputs = model(input_values=values, attention_mask=mask, labels=torch.tensor([0, 1, 1]))
    assert torch.equal(outputs.logits, want)
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_save_and_load_and_old_weights(tmp_path):
    model = vectors(num_process_steps=2)
    model.save_pretrained(tmp_path)
    loaded = Set2SetModel.from_pretrained(tmp_path)
    values = torch.randn(2, 4, 3)
    close(loaded(input_values=values).pooler_output, model(input_values=values).pooler_output, 1e-6)
    foreign = {name: torch.randn_like(value) for name, value in model.process.state_dict().items()}
    model.process.load_state_dict(foreign)  # `lstm.*` as Set2Set layers elsewhere save it
    want = ragged_set2set(
        {name.removeprefix("lstm."): value for name, value in foreign.items()},
        model(input_values=values).last_hidden_state.flatten(0, 1),
        torch.arange(2).repeat_interleave(4),
        sets=2,
        steps=2,
    )
    close(model(input_values=values).pooler_output, want, 1e-5)


def test_pooling_over_hidden_states():
    torch.manual_seed(0)
    pool = Set2SetPooling(6, num_steps=2, output_size=3)
    states, mask = padded_sets(dtype=torch.float32)
    pooled = pool(states, mask.long())
    close(pooled, pool.out_proj(pool.process(states, mask)[0]), 0)
    assert Set2SetPooling(6)(states, mask).shape == (len(SIZES), 12)
    assert Set2SetPooling(6, num_steps=0)(states).shape == (len(SIZES), 12)


def test_learns_whether_any_element_is_large():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(256, 4, 1, generator=generator)
    labels = (values.max(1).values > 0.8).squeeze(1).long()
    model = vectors(Set2SetForSequenceClassification, input_size=1, hidden_size=16, num_labels=2).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        outputs = model(input_values=values, labels=labels)
        outputs.loss.backward()
        optimizer.step()
    assert (outputs.logits.argmax(1) == labels).float().mean() > 0.95
