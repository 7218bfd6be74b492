"""What transformers' Mamba and Mamba-2 get wrong: one test a gap, which ours must pass.

Each test measures transformers' classes, too, on the same weights, and records what it finds as the property "stock"
(a number, or the error that it raises), which is never asserted: upstream may mend it. To read them:

    pytest tests/modeling/test_mamba_gaps.py --junitxml=gaps.xml -o junit_family=xunit1
"""

import warnings

import pytest
import torch
from safetensors.torch import save_file
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from undersong.training import MambaTrainerMixin, allow_out_proj_adapters

from .mamba_pairs import KINDS, ids_of, pair

kinds = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def measure(record_property):
    """measure(gap, stock, ours): gap(ours), with gap(stock) recorded beside it."""

    def run(gap, stock, ours):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = gap(stock)
        except Exception as error:  # a crash is a finding, too
            found = f"{type(error).__name__}: {error}"[:200]
        record_property("stock", found)
        value = gap(ours)
        record_property("ours", value)
        return value

    return run


def logits_of(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def continued(model, ids, cache=None, **inputs):
    """Logits of a segment behind `cache`, and the cache after it."""
    with torch.no_grad():
        outputs = model(ids, cache_params=cache, use_cache=True, **inputs)
    return outputs.logits, outputs.cache_params


def difference(got, want):
    return (got - want).abs().max().item()


@kinds
def test_a_prompt_in_chunks_equals_the_prompt_at_once(kind, measure):
    def gap(model):
        ids, cache, parts = ids_of(2, 40), None, []
        for chunk in ids.split([10, 1, 2, 16, 11], 1):
            logits, cache = continued(model, chunk, cache)
            parts.append(logits)
        return difference(torch.cat(parts, 1), logits_of(model, ids, use_cache=False))

    assert measure(gap, *pair(kind)) < 1e-5


@kinds
def test_generate_in_prefill_chunks_gives_the_same_tokens(kind, measure):
    def gap(model):
        ids = ids_of(2, 30)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        chunked, whole = model.generate(ids, prefill_chunk_size=7, **options), model.generate(ids, **options)
        return (chunked != whole).sum().item()

    assert measure(gap, *pair(kind, torch.float64)) == 0


@kinds
def test_left_padding_may_be_followed_by_a_cached_segment(kind, measure):
    def gap(model):
        ids, mask = ids_of(2, 28), torch.ones(2, 28, dtype=torch.long)
        mask[0, :5] = 0
        _, cache = continued(model, ids[:, :14], attention_mask=mask[:, :14])
        got, _ = continued(model, ids[:, 14:], cache, attention_mask=mask)  # the mask of everything so far
        return max(
            difference(got[:1], logits_of(model, ids[:1, 5:])[:, 9:]),
            difference(got[1:], logits_of(model, ids[1:])[:, 14:]),
        )

    assert measure(gap, *pair(kind)) < 1e-5


@kinds
def test_right_padding_may_be_followed_by_decoding(kind, measure):
    def gap(model):
        ids, mask = ids_of(2, 12), torch.ones(2, 8, dtype=torch.long)
        mask[0, 2:] = 0  # fewer tokens than the convolution is wide
        _, cache = continued(model, ids[:, :8], attention_mask=mask)
        errors = []
        for t in range(8, 12):
            logits, cache = continued(model, ids[:, t : t + 1], cache)
            compacted = torch.cat([ids[:1, :2], ids[:1, 8 : t + 1]], 1)
            errors.append(difference(logits[:1, -1], logits_of(model, compacted)[:, -1]))
            errors.append(difference(logits[1:, -1], logits_of(model, ids[1:, : t + 1])[:, -1]))
        return max(errors)

    assert measure(gap, *pair(kind)) < 1e-5


@kinds
def test_left_padding_does_not_leak_through_biases(kind, measure):
    def gap(model):
        ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.long)
        mask[0, :4] = 0
        got = logits_of(model, ids, attention_mask=mask)
        return max(
            difference(got[:1, 4:], logits_of(model, ids[:1, 4:])),
            difference(got[1:], logits_of(model, ids[1:])),
        )

    assert measure(gap, *pair(kind, use_bias=True)) < 1e-5


@kinds
@pytest.mark.parametrize("name", ["seq_idx", "position_ids", "cu_seq_lens_q"])
def test_packed_sequences_do_not_see_one_another(kind, name, measure):
    """`seq_idx` and `position_ids` as transformers' own collator makes them, and flash attention's offsets."""
    rows = [ids_of(1, length, seed=length)[0].tolist() for length in (5, 3, 1, 9)]
    batch = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)(
        [{"input_ids": row} for row in rows]
    )

    def gap(model):
        want = torch.cat([logits_of(model, torch.tensor([row])) for row in rows], 1)
        return difference(logits_of(model, batch["input_ids"], **{name: batch[name]}), want)

    assert measure(gap, *pair(kind)) < 1e-5


def test_a_decoding_step_honours_the_time_step_limit(measure):
    def gap(model):
        ids = ids_of(2, 12)
        _, cache = continued(model, ids[:, :8])
        errors = []
        for t in range(8, 12):
            logits, cache = continued(model, ids[:, t : t + 1], cache)
            errors.append(difference(logits[:, -1], logits_of(model, ids[:, : t + 1])[:, -1]))
        return max(errors)

    assert measure(gap, *pair("mamba2", time_step_limit=(0.01, 0.02))) < 1e-5


@kinds
def test_the_authors_name_of_the_token_table_is_loaded(kind, measure, tmp_path):
    stock, ours = pair(kind)
    weights = {key.replace("embeddings", "embedding"): value.clone() for key, value in stock.state_dict().items()}
    stock.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})

    def gap(model):
        loaded = type(model).from_pretrained(tmp_path).eval()
        return difference(logits_of(loaded, ids_of(2, 9)), logits_of(stock, ids_of(2, 9)))

    assert measure(gap, stock, ours) < 1e-5


@kinds
def test_the_trainer_leaves_rates_and_skips_to_the_gradient(kind, measure, tmp_path):
    """Weight decay would pull the logarithms of rates towards 0, which is no smaller rate."""

    class MambaTrainer(MambaTrainerMixin, Trainer):
        pass

    spared = ("A_log", ".D", "dt_bias", "dt_proj.bias", "conv1d.bias")
    arguments = TrainingArguments(tmp_path, weight_decay=0.1, use_cpu=True, report_to=[])
    model = pair(kind)[1]

    def decayed(trainer):
        optimizer = trainer(model, arguments).create_optimizer()
        parameters = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        return sorted(name for name, parameter in model.named_parameters() if id(parameter) in parameters)

    names = measure(lambda trainer: [n for n in decayed(trainer) if n.endswith(spared)], Trainer, MambaTrainer)
    assert names == []
    assert {name.rpartition("mixer.")[2] for name in decayed(MambaTrainer)} >= {"in_proj.weight", "out_proj.weight"}


@kinds
def test_lora_on_out_proj_learns_and_merges_and_conv1d_is_refused(kind, measure):
    """Ours calls out_proj as a module, in training, prefill and decoding; the convolution's weight is read past an
    adapter, so that one stays forbidden."""
    from peft import LoraConfig, get_peft_model

    def gap(model):
        ids, stock = ids_of(2, 8), model.__class__.__module__.startswith("transformers")
        config = LoraConfig(target_modules=["out_proj"], init_lora_weights=False, r=2)
        plain = logits_of(model, ids)
        if stock:
            adapted = get_peft_model(model, config)
        else:
            with allow_out_proj_adapters():
                adapted = get_peft_model(model, config)
        outputs = adapted.train()(ids, labels=ids)
        outputs.loss.backward()
        assert difference(outputs.logits, plain) > 1e-3
        assert all(p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)
        adapted.eval()
        _, cache = continued(adapted, ids[:, :7])
        step, _ = continued(adapted, ids[:, 7:], cache)
        merged = logits_of(adapted.merge_and_unload(), ids)
        return max(difference(step, outputs.logits[:, -1:]), difference(merged, outputs.logits))

    assert measure(gap, *pair(kind)) < 1e-5
    with allow_out_proj_adapters(), pytest.raises(ValueError, match="conv1d"):
        get_peft_model(pair(kind)[1], LoraConfig(target_modules=["conv1d"]))


@kinds
def test_the_pairs_have_something_to_lose(kind):
    """The gaps above are differences of logits: they would be small for any model whose logits are."""
    stock, ours = pair(kind)
    logits = logits_of(stock, ids_of(2, 12))
    assert logits.std() > 0.3
    assert difference(logits[:, 1:], logits_of(stock, ids_of(2, 12)[:, 1:])) > 1e-2  # the first token is felt
    assert difference(logits, logits_of(ours, ids_of(2, 12))) < 1e-5
