"""The monitor reports what the states are, the losses are those of one pass, and a collapse is found where it is."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Mamba2ForCausalLM

from undersong import FastMamba2ForCausalLM
from undersong.modeling.state_control import (
    StateControlConfig,
    apply_state_control,
    remove_state_control,
    state_control,
)
from undersong.modeling.state_monitor import StateMonitor, find_collapse, monitor_prompts, per_token_loss

from ..generation.tiny_code_model import byte_tokenizer
from .mamba_pairs import ids_of, pair
from .test_state_control import same, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS, HEADS = 2, 4


@pytest.fixture
def model():
    return pair("mamba2", torch.float64, initializer_range=0.6)[1]


def close(got, want, atol=1e-6):
    torch.testing.assert_close(got, want, atol=atol, rtol=0, check_dtype=False)


def test_it_reports_what_the_states_are(model):
    ids = ids_of(2, 22)
    with StateMonitor(model, chunk=8) as monitor:
        monitor.read(ids)
    records = monitor.records
    assert records["position"].tolist() == [[8, 8], [16, 16]]  # 6 tokens are no chunk
    assert records["norm"].shape == (2, 2, LAYERS, HEADS)
    for boundary, length in enumerate((8, 16)):
        with torch.no_grad():
            cache = model(ids[:, :length], use_cache=True).past_key_values
        for index, layer in enumerate(cache.layers):
            h = layer.read("ssm")
            record = {name: values[boundary] for name, values in records.items() if name != "position"}
            record = {name: values[:, index] for name, values in record.items()}
            close(record["norm"], h.norm(dim=(-2, -1)))
            close(record["mean"], h.mean((-2, -1)))
            close(record["variance"], h.var((-2, -1), correction=0))
            close(record["rms"], record["norm"] / math.sqrt(h[0, 0].numel()))
            assert torch.equal(record["peak_channel"], h.square().sum(-1).argmax(-1))


def test_retention_and_inputs_are_those_of_the_mixer(model):
    """delta, B and A of the first layer by hand; with padding, which counts for nothing."""
    ids, mask = ids_of(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, :5] = 0
    with StateMonitor(model, chunk=8) as monitor:
        monitor.read(ids, mask)
    records, block = monitor.records, model.backbone.layers[0]
    assert records["position"].tolist() == [[3, 8], [11, 16]]
    for row, begin in ((0, 5), (1, 0)):
        with torch.no_grad():
            _, xBC, dt = block.mixer.project(block.norm(model.backbone.embeddings(ids[row : row + 1, begin:])))
            _, B, _ = block.mixer.heads_and_groups(block.mixer.convolve(xBC)[0])
        delta = F.softplus(dt + block.mixer.dt_bias)[0]
        forgets = delta * block.mixer.decay
        first, B_norm = 8 - begin, B[0, :, 0].norm(dim=-1)
        for boundary, chunk in enumerate((slice(0, first), slice(first, None))):
            record = {name: values[boundary, row] for name, values in records.items()}
            close(record["delta"][0], delta[chunk].mean(0))
            close(record["B_norm"][0], B_norm[chunk].mean().expand(HEADS))
            close(record["log_retention_chunk"][0], forgets[chunk].sum(0))
            close(record["log_retention"][0], forgets[: 8 if boundary == 0 else None][: 8 * boundary + first].sum(0))


def test_generation_is_recorded_every_chunk(model):
    with StateMonitor(model, chunk=4) as monitor:
        model.generate(ids_of(1, 9), max_new_tokens=10, do_sample=False)
        model(ids_of(1, 7), use_cache=False)  # no cache, no state
        model(ids_of(1, 7), use_cache=True)  # another text begins
    assert monitor.records["position"].flatten().tolist() == [9, 13, 17, 7]
    retained = monitor.records["log_retention"][:, 0, 0, 0]
    assert retained[0] > retained[1] > retained[2] < retained[3]


def test_the_split_does_not_matter(model):
    ids = ids_of(1, 16)
    with StateMonitor(model, chunk=8) as want:
        want.read(ids)
    with StateMonitor(model, chunk=8) as got, torch.no_grad():
        cache = DynamicCache()
        for part in ids.split([3, 5, 1, 1, 6], 1):
            model(part, past_key_values=cache, use_cache=True)
    for name, values in want.records.items():
        close(got.records[name], values)


def test_a_stock_model_is_given_back(model):
    stock, ours = pair("mamba2")
    before = snapshot(stock)
    with StateMonitor(stock, chunk=4) as got:
        assert isinstance(stock, FastMamba2ForCausalLM)
        got.read(ids_of(1, 8))
    same(before, snapshot(stock))
    with StateMonitor(ours, chunk=4) as want:
        want.read(ids_of(1, 8))
    close(got.records["norm"], want.records["norm"])
    before = snapshot(ours)
    with pytest.raises(IndexError), StateMonitor(ours) as monitor:
        monitor.read(ids_of(1, 8) + 100)
    same(before, snapshot(ours))


def test_a_control_is_seen_whenever_it_is_applied():
    control, ids = StateControlConfig("normalize", threshold=0.1, granularity=4), ids_of(1, 16)
    norms = []
    for order in ("outside", "inside", "left on"):
        stock = pair("mamba2", initializer_range=0.6)[0]
        before = snapshot(stock)
        if order == "outside":
            with state_control(stock, control), StateMonitor(stock, chunk=4) as monitor:
                monitor.read(ids)
        elif order == "inside":
            with StateMonitor(stock, chunk=4) as monitor, state_control(stock, control):
                monitor.read(ids)
        else:
            with StateMonitor(stock, chunk=4) as monitor:
                apply_state_control(stock, control)
                monitor.read(ids)
            remove_state_control(stock)
        same(before, snapshot(stock))
        norms.append(monitor.records["norm"])
    assert (norms[0] <= 0.2 * (1 + 1e-5)).all()
    assert (norms[0] > 0.2 * (1 - 1e-5)).any()
    assert torch.equal(norms[0], norms[1])
    assert torch.equal(norms[0], norms[2])


def test_records_go_to_json(model, tmp_path):
    with StateMonitor(model, chunk=4) as monitor:
        monitor.read(ids_of(1, 8))
    text = monitor.to_json(tmp_path / "states.json")
    values = json.loads((tmp_path / "states.json").read_text())
    assert values == json.loads(text)
    assert values.pop("chunk") == 4
    assert values.keys() == monitor.records.keys()
    close(torch.tensor(values["variance"]), monitor.records["variance"])


def test_the_first_collapsing_head_is_named(model):
    """One head of the second layer is made to forget nothing, all others to forget at once: only its norm grows."""
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.A_log.fill_(8.0)
        block.mixer.A_log[2] = -20.0
    with StateMonitor(model, chunk=8) as monitor:
        monitor.read(torch.full((1, 64), 3))
    found = monitor.first_collapsing(train_length=16)
    norm = monitor.records["norm"][:, 0]
    assert (found["layer"], found["head"]) == (1, 2)
    assert found["position"] == 8 * (1 + int((norm[:, 1, 2] > 2 * norm[:2, 1, 2].max()).nonzero()[0]))
    assert found["norm"] > 2 * found["normal"]
    assert found["channel"] == monitor.records["peak_channel"][found["position"] // 8 - 1, 0, 1, 2]
    assert monitor.first_collapsing(train_length=16, factor=1e9) is None
    for length in (4, 64):
        with pytest.raises(ValueError, match=rf"train_length \({length}\) must lie inside what was recorded, 8 to 64"):
            monitor.first_collapsing(length)


def test_the_plot_shows_every_layer(model, tmp_path):
    pytest.importorskip("matplotlib")
    with StateMonitor(model, chunk=4) as monitor:
        monitor.read(ids_of(1, 12))
    figure = monitor.plot(tmp_path / "states.png", train_length=8)
    assert (tmp_path / "states.png").stat().st_size > 0
    norms, retention, _ = figure.axes
    assert len(norms.lines) == LAYERS + 1
    close(torch.tensor(norms.lines[1].get_ydata()), monitor.records["norm"][:, 0, 1].amax(-1))
    close(torch.tensor(retention.lines[0].get_ydata()), monitor.records["log_retention"][:, 0, 0].amax(-1).exp())
    assert norms.get_yscale() == "log"


def test_misuse_of_a_monitor_is_named(model):
    with pytest.raises(ValueError, match=r"chunk \(0\) must be an integer of at least 1, in tokens"):
        StateMonitor(model, chunk=0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match=r"model \(LlamaForCausalLM, .* has no layers with a matrix state"):
        StateMonitor(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1)))
    monitor = StateMonitor(model, chunk=4)
    with pytest.raises(RuntimeError, match=r"read\(\) needs the monitor's block"):
        monitor.read(ids_of(1, 8))
    with pytest.raises(RuntimeError, match="nothing is recorded; read at least 4 tokens with a cache in the block"):
        monitor.to_json()
    with monitor:
        monitor.read(ids_of(1, 8))
        with pytest.raises(RuntimeError, match="is in use already; make one for each block"):
            monitor.__enter__()
        with pytest.raises(ValueError, match="the batch has 2 rows, but the records of this monitor have 1; use one"):
            monitor.read(ids_of(2, 8))


def test_prompts_have_the_length_asked_for():
    tokenizer = byte_tokenizer()
    prompts = monitor_prompts(tokenizer, 120, text="natural text " * 20)
    assert {name: list(ids.shape) for name, ids in prompts.items()} == dict.fromkeys(prompts, [1, 120])
    assert set(tokenizer.decode(prompts["newlines"][0])) == {"\n"}
    assert tokenizer.decode(prompts["sentence"][0]).startswith(
        "The river runs past the old mill and on to the sea. The"
    )
    assert tokenizer.decode(prompts["text"][0]).startswith("natural text natural")
    assert monitor_prompts(tokenizer, 5).keys() == {"newlines", "sentence"}
    with pytest.raises(ValueError, match=r"text has \d+ tokens, but length is 100; give a longer text"):
        monitor_prompts(tokenizer, 100, text="short")


def test_losses_do_not_depend_on_the_chunk(model):
    ids = ids_of(2, 19)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    want = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 18)
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    for chunk in (1, 4, 18, 19, 100):
        losses = per_token_loss(model, ids, chunk)
        assert losses.dtype == torch.float32
        close(losses, want)
    hook.remove()
    assert seen == [1] * 18 + [4] * 4 + [3] + [18] + [19] + [19]


def test_losses_of_other_models():
    stock, ours = pair("mamba2")
    close(per_token_loss(stock, ids_of(1, 12), 5), per_token_loss(ours, ids_of(1, 12), 5), 1e-5)
    assert type(stock) is Mamba2ForCausalLM
    sizes = {"vocab_size": 37, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1)).eval()
    close(per_token_loss(llama, ids_of(1, 12), 5), per_token_loss(llama, ids_of(1, 12), 50), 1e-5)
    with pytest.raises(ValueError, match=r"chunk \(0\) must be an integer of at least 1"):
        per_token_loss(ours, ids_of(1, 12), 0)
    with pytest.raises(
        ValueError, match=r"input_ids \(\[1, 1\]\) must be \[batch, length\] with a length of at least 2"
    ):
        per_token_loss(ours, ids_of(1, 1))


def test_a_collapse_is_where_a_bucket_exceeds_all_within():
    losses = torch.full((80,), 2.0)
    losses[:10] = 9.0  # the first bucket: no context yet
    losses[23:27] = 3.0  # the worst one within: 2.4
    losses[75:] = 99.0  # the last bucket
    assert vars(find_collapse(losses, 40, bucket=10)) == {
        "collapsed": False,
        "position": None,
        "within": pytest.approx(2.4),
        "beyond": 2.0,
    }
    losses[50:60] = 2.89
    assert not find_collapse(losses, 40, bucket=10).collapsed
    losses[60:70] = 2.91
    found = find_collapse(torch.stack([losses - 0.5, losses + 0.5]), 40, bucket=10)
    assert (found.collapsed, found.position) == (True, 60)
    assert found.beyond == pytest.approx(2.91)
    assert find_collapse(losses, 40, bucket=10, margin=math.log(2)).collapsed is False
    assert find_collapse(losses, 35, bucket=10, margin=0.6).within == pytest.approx(2.4)  # 30 to 39 is neither
    losses[50] = float("nan")
    assert find_collapse(losses, 40, bucket=10).position == 50


def test_too_few_buckets_are_named():
    losses = torch.zeros(100)
    with pytest.raises(
        ValueError, match=r"bucket \(8192\) leaves none but the first within train_length \(50\); use at"
    ):
        find_collapse(losses, 50)
    with pytest.raises(ValueError, match=r"losses cover 100 tokens, .* no bucket of 20 but the last beyond .* \(80\)"):
        find_collapse(losses, 80, bucket=20)
    with pytest.raises(ValueError, match=r"bucket \(0\) must be an integer of at least 1"):
        find_collapse(losses, 80, bucket=0)
