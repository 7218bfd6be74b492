"""Recformer's heads: the two losses of pretraining, the catalogue as part of the model, and recommendations."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch.nn import functional as F

from undersong.hub import export
from undersong.modeling.recformer.configuration_recformer import RecformerConfig
from undersong.modeling.recformer.modeling_recformer_heads import (
    RecformerForPreTraining,
    RecformerForSequentialRecommendation,
)
from undersong.tokenization.recformer_tokenizer import RecformerTokenizer
from undersong.training.recformer_data import DataCollatorForRecformerPretraining

from .recformer_catalogue import ITEMS, words

IDS, TEXTS = list(ITEMS), list(ITEMS.values())
pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    limits = {"attention_window": 8, "max_attr_length": 4, "max_token_num": 60, "max_position_embeddings": 64}
    return RecformerConfig(vocab_size=len(words()), **{**sizes, **quiet, **limits, **changes})


def build(head=RecformerForSequentialRecommendation, **changes):
    torch.manual_seed(0)
    return head(config(**changes)).eval()


def tokenizer(**changes):
    return RecformerTokenizer.from_config(words(), config(**changes))


def with_items(items=ITEMS, **changes):
    return build(**changes).set_items(tokenizer(), items, batch_size=7)


# pretraining


def pairs():
    torch.manual_seed(1)
    return DataCollatorForRecformerPretraining(tokenizer())([TEXTS[:9], TEXTS[5:12], TEXTS[3:5]])


def split(batch, prefix=""):
    names = ("input_ids", "attention_mask", "token_type_ids", "item_position_ids", "masked_input_ids", "labels")
    return {name: batch[prefix + name] for name in names}


def test_the_loss_is_contrast_plus_lambda_times_both_masked_lms():
    model, batch = build(RecformerForPreTraining, mlm_weight=0.3), pairs()
    outputs = model(**batch)
    z, mlm = [], []
    for prefix in ("", "target_"):
        part = split(batch, prefix)
        ids, masked, labels = (part.pop(name) for name in ("input_ids", "masked_input_ids", "labels"))
        z.append(model.longformer(ids, **part).last_hidden_state[:, 0])
        logits = model.lm_head(model.longformer(masked, **part).last_hidden_state)
        mlm.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    cosine = F.cosine_similarity(z[0][:, None], z[1][None], dim=-1) / 0.05
    torch.testing.assert_close(outputs.contrastive_logits, cosine)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(cosine, torch.arange(3)) + 0.3 * (mlm[0] + mlm[1]))


def test_one_pair_has_nothing_to_tell_apart():
    model = build(RecformerForPreTraining)
    batch = {name: x[:1] for name, x in pairs().items()}
    part, target = split(batch), split(batch, "target_")
    mlm = [model(**{**p, "input_ids": None, "masked_input_ids": p["masked_input_ids"]}).loss for p in (part, target)]
    torch.testing.assert_close(model(**batch).loss, 0.1 * (mlm[0] + mlm[1]))


def test_without_masks_only_the_contrast_counts_and_the_temperature_applies_once():
    models = [build(RecformerForPreTraining, temperature=t) for t in (0.05, 0.5)]
    batch = {name: x for name, x in pairs().items() if "labels" not in name and "masked" not in name}
    outputs = [model(**batch) for model in models]
    torch.testing.assert_close(outputs[0].contrastive_logits, outputs[1].contrastive_logits * 10)
    assert outputs[0].contrastive_logits.abs().max() <= 20.0001
    torch.testing.assert_close(outputs[0].loss, F.cross_entropy(outputs[0].contrastive_logits, torch.arange(3)))


def test_pretraining_learns_and_leaves_frozen_words_alone():
    model, batch = build(RecformerForPreTraining), pairs()
    model.get_input_embeddings().requires_grad_(False)
    before = model.get_input_embeddings().weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("encoder_type", ["bert", "modernbert"])
def test_the_language_head_is_tied_to_whatever_encoder(encoder_type, tmp_path):
    model = build(RecformerForPreTraining, encoder_type=encoder_type)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = RecformerForPreTraining.from_pretrained(tmp_path).eval()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    torch.testing.assert_close(again(**pairs()).loss, model(**pairs()).loss)


def test_the_pretrained_encoder_goes_under_the_recommender(tmp_path):
    pretrained = build(RecformerForPreTraining)
    pretrained.save_pretrained(tmp_path)
    model = RecformerForSequentialRecommendation.from_pretrained(tmp_path).eval()
    for name, weight in pretrained.longformer.state_dict().items():
        assert torch.equal(model.longformer.state_dict()[name], weight), name
    assert model.config.num_items == 0


# recommendation


def test_item_vectors_are_those_of_histories_of_one_item():
    model = with_items()
    z = model.longformer(**tokenizer()([[item] for item in TEXTS])).pooler_output
    torch.testing.assert_close(model.item_embedding, F.normalize(z, dim=-1), atol=1e-6, rtol=0)
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(model.encode_items(rows), model.item_embedding[rows - 1])


def test_scores_are_cosines_over_tau_and_the_loss_is_their_softmax():
    model = with_items()
    inputs = tokenizer()([TEXTS[:3], TEXTS[4:9]])
    z = model.longformer(**inputs).pooler_output
    want = F.cosine_similarity(z[:, None], model.item_embedding[None], dim=-1) / 0.05
    torch.testing.assert_close(model(**inputs).logits, want)
    labels = torch.tensor([7, 24])
    torch.testing.assert_close(model(**inputs, labels=labels).loss, F.cross_entropy(want, labels - 1))
    torch.testing.assert_close(model(**inputs, labels=labels[:, None]).loss, F.cross_entropy(want, labels - 1))
    left_out = model(**inputs, labels=torch.tensor([7, 0])).loss
    torch.testing.assert_close(left_out, F.cross_entropy(want[:1], labels[:1] - 1))


def test_sampled_softmax_has_the_label_first():
    model = with_items(num_negatives=5)
    inputs, labels = tokenizer()([TEXTS[:3], TEXTS[4:9]]), torch.tensor([7, 24])
    torch.manual_seed(3)
    got = model(**inputs, labels=labels).loss
    torch.manual_seed(3)
    drawn = torch.randint(24, (2, 5))
    logits = model(**inputs).logits
    candidates = logits.gather(1, torch.cat([labels[:, None] - 1, drawn], 1))
    torch.testing.assert_close(got, F.cross_entropy(candidates, torch.zeros(2, dtype=torch.long)))


def test_histories_by_id_are_histories_by_text():
    model = with_items()
    by_id = model.encode_histories(torch.tensor([[0, 0, 3, 8], [1, 2, 3, 4], [0, 0, 0, 0]]))
    by_text = model.encode_histories(tokenizer()([[TEXTS[2], TEXTS[7]], TEXTS[:4], []]))
    torch.testing.assert_close(by_id, by_text)


def test_recommend_ranks_as_the_logits_do():
    model = with_items()
    best = model.recommend([[IDS[0], IDS[5]], []], k=24, exclude_seen=False)
    logits = model(**tokenizer()([[TEXTS[0], TEXTS[5]], []])).logits
    for row in range(2):
        assert best.item_ids[row] == [IDS[n] for n in logits[row].argsort(descending=True).tolist()]
        torch.testing.assert_close(torch.tensor(best.scores[row]), logits[row].sort(descending=True).values)


def test_recommend_never_returns_seen_items():
    model = with_items()
    seen = IDS[3:9]
    for histories in ([seen], tokenizer()([[ITEMS[name] for name in seen]])):
        best = model.recommend(histories, k=24)
        assert set(best.item_ids[0]) == set(IDS) - set(seen)
        assert seen[0] in model.recommend(histories, k=24, exclude_seen=False).item_ids[0]
    by_number = model.recommend(torch.tensor([[4, 5, 6, 7, 8, 9]]), k=24)
    assert set(by_number.item_ids[0].tolist()) == set(range(1, 25)) - set(range(4, 10)) | {-1}


def test_recommend_takes_exclusions_and_a_list_to_choose_from():
    model = with_items()
    for histories in ([[IDS[0]]], tokenizer()([[TEXTS[0]]])):
        best = model.recommend(histories, k=5, exclude_ids=[[IDS[1]]], allow_ids=IDS[:4])
        assert set(best.item_ids[0]) == set(IDS[2:4])


def test_a_text_that_nobody_has_seen_is_a_history_too():
    best = with_items().recommend(tokenizer()([[{"color": "mauve", "kind": "chair"}]]), k=3)
    assert len(best.item_ids[0]) == 3


def test_the_catalogue_is_saved_with_the_model(tmp_path):
    model = with_items()
    model.save_pretrained(tmp_path)
    again = RecformerForSequentialRecommendation.from_pretrained(tmp_path).eval()
    assert torch.equal(again.item_embedding, model.item_embedding)
    assert torch.equal(again.item_tokens, model.item_tokens)
    assert again.item_vocab == model.item_vocab
    assert again.recommend([IDS[:2]], k=4).item_ids == model.recommend([IDS[:2]], k=4).item_ids


def test_another_catalogue_takes_the_place_of_the_old_one():
    model, fresh = with_items(), {"a": {"color": "red"}, "b": {"kind": "lamp"}}
    model.set_items(tokenizer(), fresh)
    assert model.config.num_items == 2
    assert model(**tokenizer()([[]])).logits.shape == (1, 2)
    assert model.recommend([["a"]], k=5).item_ids == [["b"]]
    model.set_items(tokenizer(), list(fresh.values()))
    assert model.recommend([[1]], k=1).item_ids.tolist() == [[2]]


def test_training_leaves_the_table_until_it_is_refreshed():
    model = with_items()
    before = model.item_embedding.clone()
    model(**tokenizer()([TEXTS[:3]]), labels=torch.tensor([5])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model.item_embedding, before)
    assert (model.refresh_items().item_embedding - before).abs().max() > 1e-3


def test_half_precision_keeps_scores_in_float32():
    model = with_items().to(torch.bfloat16)
    outputs = model(**tokenizer()([TEXTS[:3]]))
    assert outputs.logits.dtype == torch.float32
    assert model.refresh_items().item_embedding.dtype == torch.float32


@pytest.mark.slow
def test_an_export_recommends_without_undersong(tmp_path):
    """The exported folder has the catalogue's tokens, so that ids of items are all it takes."""
    model = with_items()
    export(model, tmp_path / "export")
    code = f"""
        import sys
        sys.modules["undersong"] = None  # importing it fails
        from transformers import AutoModel
        model = AutoModel.from_pretrained({str(tmp_path / "export")!r}, trust_remote_code=True)
        print(model.recommend([{IDS[:3]!r}], k=5).item_ids)
    """
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith(str(model.recommend([IDS[:3]], k=5).item_ids))


@pytest.mark.slow
def test_targets_of_all_processes_are_negatives_with_their_gradients(tmp_path):
    """Two processes with a pair each, gradients averaged, are one process with two pairs."""
    batch = {name: x[:2] for name, x in pairs().items() if "labels" not in name and "masked" not in name}
    model = build(RecformerForPreTraining)
    model(**batch).loss.backward()
    torch.save(batch, tmp_path / "batch.pt")
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"gradients-{rank}.pt", weights_only=True) for rank in range(2)]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            averaged = sum(part[name] for part in parts) / 2
            torch.testing.assert_close(averaged, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    batch = torch.load(f"{folder}/batch.pt", weights_only=True)
    model = build(RecformerForPreTraining)
    outputs = model(**{name: x[rank : rank + 1] for name, x in batch.items()})
    assert outputs.contrastive_logits.shape == (1, 2)
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save(gradients, f"{folder}/gradients-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_errors_say_what_to_do():
    model = build()
    with pytest.raises(ValueError, match="num_items is 0: the model has no catalogue yet; call model.set_items"):
        model(**tokenizer()([TEXTS[:2]]))
    with pytest.raises(ValueError, match=r"items have up to 6 tokens, but .* max_attr_num x max_attr_length = 2"):
        build(max_attr_num=2, max_attr_length=1).set_items(tokenizer(), ITEMS)
    model = with_items()
    with pytest.raises(ValueError, match="labels holds id 25"):
        model(**tokenizer()([TEXTS[:2]]), labels=torch.tensor([25]))
    with pytest.raises(ValueError, match="'pink-kettle' is not among the 24 items"):
        model.recommend([["pink-kettle"]])
    with pytest.raises(ValueError, match="made from their texts; use set_items"):
        model.resize_item_embeddings(30)


def test_words_can_still_be_added():
    model = with_items()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(len(words()) + 3)
    assert model.get_input_embeddings().num_embeddings == len(words()) + 3
