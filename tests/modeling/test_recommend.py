"""What every recommender by item id promises: recommend(), the vocabulary beside the weights, growing, bad input."""

import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from transformers import AutoConfig

from undersong.modeling.auto_recommendation import AutoModelForSequentialRecommendation
from undersong.tokenization.item_vocab import ItemVocab, left_pad

from .recommenders import CLASSES, SIZES, recommender

pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", list(CLASSES))
HISTORIES = [[3, 5, 3, 8], [1], [30, 29, 2, 7, 11, 13]]


def scores_of(model, history):
    """`[num_items]`, by the forward pass of one unpadded user."""
    if "Bert" in type(model).__name__:
        history = [*history, model.config.mask_token_id]
    with torch.no_grad():
        return model(torch.tensor([history])).logits[0, -1]


@every_kind
def test_recommend_equals_brute_force_and_never_gives_what_was_seen(kind):
    model = recommender(kind)
    best = model.recommend(HISTORIES, k=6)
    for row, history in enumerate(HISTORIES):
        scores = scores_of(model, history)
        scores[torch.tensor(history) - 1] = -torch.inf
        want = scores.topk(6)
        assert torch.equal(best.item_ids[row], want.indices + 1)
        assert (best.scores[row] - want.values).abs().max() < 1e-5


@every_kind
def test_recommend_includes_seen_items_when_asked(kind):
    model = recommender(kind)
    best = model.recommend(HISTORIES, k=30, exclude_seen=False)
    assert all(sorted(row) == list(range(1, 31)) for row in best.item_ids.tolist())
    assert (best.scores[0] - scores_of(model, HISTORIES[0])[best.item_ids[0] - 1]).abs().max() < 1e-5


@every_kind
def test_more_than_is_left_ends_in_minus_one_and_minus_infinity(kind):
    best = recommender(kind).recommend(HISTORIES, k=40)
    for row, history in enumerate(HISTORIES):
        left = 30 - len(set(history))
        assert sorted(best.item_ids[row, :left].tolist()) == sorted(set(range(1, 31)) - set(history))
        assert best.item_ids[row, left:].eq(-1).all()
        assert best.scores[row, left:].eq(-torch.inf).all()


@every_kind
def test_an_empty_history_gets_items_alone_and_beside_others(kind):
    model = recommender(kind)
    alone = model.recommend([[]], k=5)
    assert torch.isfinite(alone.scores).all()
    assert alone.item_ids.ge(1).all()
    beside = model.recommend([[4, 5, 6], []], k=5)
    assert torch.equal(beside.item_ids[1], alone.item_ids[0])


@every_kind
def test_exclude_and_allow_ids(kind):
    model = recommender(kind)
    first = model.recommend(HISTORIES, k=4).item_ids
    rest = model.recommend(HISTORIES, k=4, exclude_ids=first).item_ids
    assert not any(set(a) & set(b) for a, b in zip(first.tolist(), rest.tolist(), strict=True))
    ragged = model.recommend(HISTORIES, k=4, exclude_ids=[[9], [], [1, 2, 3]]).item_ids
    assert 9 not in ragged[0]
    allowed = model.recommend(HISTORIES, k=4, allow_ids=[3, 9, 1, 10])
    assert sorted(allowed.item_ids[0].tolist()) == [-1, 1, 9, 10]  # 3 was seen
    assert torch.equal(model.recommend(HISTORIES, k=4, allow_ids=torch.tensor([3, 9, 1, 10]))[0], allowed[0])


@every_kind
@pytest.mark.parametrize("anchor", ["right", "left"])
def test_padding_anywhere_changes_nothing(kind, anchor):
    model = recommender(kind, dtype=torch.float64, position_anchor=anchor)
    padded = {
        "left": left_pad(HISTORIES, 9),
        "right": torch.tensor([history + [0] * (9 - len(history)) for history in HISTORIES]),
        "shortest": left_pad(HISTORIES),
    }
    for row, history in enumerate(HISTORIES):
        want = model.recommend([history], k=8)
        for where, ids in padded.items():
            got = model.recommend(ids, k=8)
            assert torch.equal(got.item_ids[row], want.item_ids[0]), where
            assert (got.scores[row] - want.scores[0]).abs().max() < 1e-9, where


@every_kind
def test_long_histories_are_cut_with_one_warning_and_still_exclude_everything(kind):
    model = recommender(kind)
    longest = SIZES["max_position_embeddings"] - (kind == "bert4rec")
    history = list(range(1, 26))
    with pytest.warns(UserWarning, match=f"cut to the most recent {longest} items") as caught:
        best = model.recommend([history], k=30)
    assert len(caught) == 1
    assert sorted(item for item in best.item_ids[0].tolist() if item > 0) == list(range(26, 31))
    want = model.recommend([history[-longest:]], k=30, exclude_ids=[history]).scores
    assert (best.scores[0, :5] - want[0, :5]).abs().max() < 1e-5
    with pytest.warns(UserWarning, match="cut"):
        right_padded = model.recommend(torch.tensor([history + [0] * 5]), k=30)
    assert torch.equal(right_padded.item_ids, best.item_ids)


@every_kind
def test_bad_ids_are_named_with_the_catalogue(kind):
    model = recommender(kind)
    for wrong in (31, 99, -2):
        with pytest.raises(ValueError, match=rf"histories holds id {wrong}, but with num_items \(30\)"):
            model.recommend([[1, wrong]])
    with pytest.raises(ValueError, match=r"input_ids holds id 32, .*num_items \(30\) ids are 1..30 for items, 31 for"):
        model(torch.tensor([[1, 32]]))
    with pytest.raises(ValueError, match=r"labels holds id 31, but with num_items \(30\)"):
        model(torch.tensor([[1, 2]]), labels=torch.tensor([[-100, 31]]))
    with pytest.raises(ValueError, match="input_ids has 13 columns, but max_position_embeddings is 12"):
        model(torch.ones(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match=r"histories must hold a list of item ids for each user; use \[\[1, 2\]\]"):
        model.recommend([1, 2])
    with pytest.raises(ValueError, match=r"histories \(torch.int64 \[2\]\) must be int64 \[batch, length\]"):
        model.recommend(torch.tensor([1, 2]))


@every_kind
def test_external_ids_go_in_and_come_out(kind):
    model = recommender(kind)
    rows = model.recommend(HISTORIES, k=30)
    model.item_vocab = ItemVocab([f"film {row}" for row in range(1, 31)])
    named = model.recommend([[f"film {item}" for item in history] for history in HISTORIES], k=30)
    for row, history in enumerate(HISTORIES):
        left = 30 - len(set(history))
        assert named.item_ids[row] == [f"film {item}" for item in rows.item_ids[row, :left].tolist()]
        assert len(named.scores[row]) == left
    assert torch.equal(model.recommend(left_pad(HISTORIES), k=30).item_ids, rows.item_ids), "tensors hold model ids"
    with pytest.raises(ValueError, match="item id 'film 31' is not among the 30 items"):
        model.recommend([["film 31"]])
    allowed = model.recommend([["film 1"]], k=3, allow_ids=["film 7", "film 1"], exclude_ids=[["film 9"]])
    assert allowed.item_ids == [["film 7"]]


@every_kind
def test_the_vocabulary_is_saved_beside_the_weights(kind, tmp_path):
    model = recommender(kind)
    model.save_pretrained(tmp_path / "without")
    model.item_vocab = ItemVocab(range(100, 130))
    model.save_pretrained(tmp_path / "with")
    loaded = AutoModelForSequentialRecommendation.from_pretrained(tmp_path / "with").eval()
    assert type(loaded) is type(model)
    assert loaded.item_vocab == model.item_vocab
    assert loaded.recommend([[101, 102]], k=5).item_ids == model.recommend([[101, 102]], k=5).item_ids
    assert type(model).from_pretrained(tmp_path / "without").item_vocab is None
    loaded, info = type(model).from_pretrained(tmp_path / "with", output_loading_info=True)
    assert loaded.item_vocab == model.item_vocab
    assert not info["missing_keys"]


@pytest.mark.parametrize("vocab", [None, ItemVocab(range(30))], ids=["no vocabulary", "vocabulary"])
def test_a_model_from_the_cache_of_the_hub_needs_no_network(vocab, tmp_path):
    model = recommender("gsasrec")
    model.item_vocab = vocab
    repository = tmp_path / "models--me--films"
    model.save_pretrained(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    loaded = type(model).from_pretrained("me/films", cache_dir=tmp_path, local_files_only=True)
    assert loaded.item_vocab == vocab


@every_kind
def test_an_upload_happens_after_the_vocabulary_was_written(kind, tmp_path, monkeypatch):
    model = recommender(kind)
    model.item_vocab = ItemVocab(range(30))
    uploads = []

    def push_to_hub(**arguments):
        uploads.append((arguments, (tmp_path / "films" / "item_vocab.json").is_file()))

    monkeypatch.setattr(model, "push_to_hub", push_to_hub)
    model.save_pretrained(tmp_path / "films", push_to_hub=True)
    model.save_pretrained(tmp_path / "films", push_to_hub=True, repo_id="me/films", private=True)
    assert uploads == [({"repo_id": "films"}, True), ({"repo_id": "me/films", "private": True}, True)]


@every_kind
def test_a_vocabulary_of_another_size_is_refused(kind):
    with pytest.raises(ValueError, match="item_vocab has 2 items, but num_items is 30; use resize_item_embeddings"):
        recommender(kind).item_vocab = ItemVocab(["a", "b"])


@every_kind
@pytest.mark.parametrize("tied", [True, False])
def test_a_larger_catalogue_keeps_old_items_and_starts_new_ones_at_the_mean(kind, tied, tmp_path):
    model = recommender(kind, tie_word_embeddings=tied)
    before = scores_of(model, [3, 5])
    model.resize_item_embeddings(33)
    after = scores_of(model, [3, 5])
    assert (after[:30] - before).abs().max() < 1e-5
    assert (after[30:] - before.mean()).abs().max() < 1e-5
    weight, _ = model.output_weights()
    assert (weight is model.get_input_embeddings().weight) == tied
    assert weight.shape[0] == model.get_input_embeddings().num_embeddings == model.config.vocab_size == 35
    model.save_pretrained(tmp_path)
    assert torch.equal(scores_of(type(model).from_pretrained(tmp_path), [3, 5]), after)
    loss = model(torch.tensor([[3, 33]]), labels=torch.tensor([[32, 1]])).loss
    loss.backward()
    assert model.get_input_embeddings().weight.grad.shape[0] == 35


@every_kind
def test_a_new_vocabulary_finds_items_by_their_external_ids(kind):
    model = recommender(kind)
    model.item_vocab = ItemVocab([f"film {row}" for row in range(1, 31)])
    before = scores_of(model, [3, 5])
    model.resize_item_embeddings(ItemVocab(["new", "film 5", "film 3", "film 20"]))
    after = scores_of(model, [3, 2])
    assert (after[1:] - before[[4, 2, 19]]).abs().max() < 1e-5
    assert (after[0] - before.mean()).abs() < 1e-5
    assert model.recommend([["film 3", "film 5"]], k=9).item_ids[0] in (["new", "film 20"], ["film 20", "new"])
    with pytest.raises(ValueError, match=r"new_num_tokens \(9\) would move the mask.*use resize_item_embeddings\(7\)"):
        model.resize_token_embeddings(9)


@every_kind
def test_dropout_is_off_and_the_mode_comes_back(kind):
    model = recommender(kind, hidden_dropout_prob=0.5).train()
    model.get_input_embeddings().eval()
    first = model.recommend(HISTORIES, k=5)
    assert torch.equal(first.scores, model.recommend(HISTORIES, k=5).scores)
    assert model.training
    assert not model.get_input_embeddings().training
    assert not first.scores.requires_grad


@every_kind
def test_recommend_compiles_as_one_graph(kind):
    model = recommender(kind)
    ids = left_pad(HISTORIES)
    compiled = torch.compile(model.recommend, fullgraph=True, backend="aot_eager")
    got, want = compiled(ids, k=5), model.recommend(ids, k=5)
    assert torch.equal(got.item_ids, want.item_ids)
    assert (got.scores - want.scores).abs().max() < 1e-5


@every_kind
def test_auto_class_knows_the_configuration(kind):
    config = AutoConfig.for_model(kind, **SIZES)
    model = AutoModelForSequentialRecommendation.from_config(config)
    assert type(model) is CLASSES[kind][1]
    with pytest.raises(ValueError, match="Unrecognized configuration class .*GPT2Config.* for this kind of AutoModel"):
        AutoModelForSequentialRecommendation.from_config(transformers.GPT2Config())


@every_kind
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 0}, r"num_items \(0\) must be at least 1"),
        ({"mask_token_id": 0}, r"mask_token_id \(0\) must be 31: with num_items \(30\), 0 is padding"),
        ({"pad_token_id": 31}, r"pad_token_id \(31\) must be 0"),
        ({"vocab_size": 30}, r"vocab_size \(30\) must be 32"),
        ({"gbce_t": 1.5}, r"gbce_t \(1.5\) must lie in \[0, 1\]"),
        ({"num_negatives": 0}, r"num_negatives \(0\) must be at least 1"),
        ({"label_smoothing": 1.0, "loss_type": "ce"}, r"label_smoothing \(1.0\) must lie in \[0, 1\)"),
        (
            {"label_smoothing": 0.1, "loss_type": "bce"},
            r"label_smoothing \(0.1\) .* loss_type \('bce'\)",
        ),
        (
            {"negative_sampler": "popularity", "loss_type": "gbce"},
            r"negative_sampler \('popularity'\) .* by 'gbce'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contradictions_in_a_configuration_are_named(kind, options, message):
    with pytest.raises(Exception, match=message) as caught:
        CLASSES[kind][0](**SIZES | options)
    assert isinstance(caught.value, ValueError) or isinstance(caught.value.__cause__, ValueError)


@every_kind
@pytest.mark.parametrize("loss_type", ["ce", "sampled_softmax", "bce", "gbce"])
def test_labels_give_a_loss_of_labelled_positions_and_no_logits(kind, loss_type):
    model = recommender(kind, loss_type=loss_type, num_negatives=7, dtype=torch.float64)
    ids = left_pad(HISTORIES)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = torch.tensor([[4, 5], [0, 6], [7, 8]])
    torch.manual_seed(1)
    output = model(ids, labels=labels)
    assert output.logits is None
    if loss_type == "ce":
        logits = model(ids).logits
        chosen = labels > 0
        want = torch.nn.functional.cross_entropy(logits[chosen], labels[chosen] - 1)
        assert (output.loss - want).abs() < 1e-9
    torch.manual_seed(1)
    halved = model(ids, labels=labels, num_items_in_batch=10).loss
    assert (halved - output.loss / 2).abs() < 1e-12
    output.loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@every_kind
@pytest.mark.parametrize("loss_type", ["ce", "gbce"])
def test_losses_train_under_autocast(kind, loss_type):
    model = recommender(kind, loss_type=loss_type, num_negatives=8)
    ids = left_pad(HISTORIES)
    labels = torch.where(ids > 0, ids % 30 + 1, -100)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(ids, labels=labels).loss)
    assert losses[1].dtype == torch.float32
    assert abs(losses[1] - losses[0]) < 0.03 * losses[0]  # bfloat16 has 8 bits
    losses[1].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_kind
def test_popularity_counts_are_saved_with_the_weights(kind, tmp_path):
    model = recommender(kind, loss_type="sampled_softmax", negative_sampler="popularity")
    counts = torch.arange(30).float()
    model.set_item_counts(counts)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.item_counts, counts.clamp(min=1))
    assert torch.isfinite(loaded(torch.tensor([[1, 2]]), labels=torch.tensor([[2, 3]])).loss)
    loaded.resize_item_embeddings(32)
    assert loaded.item_counts.tolist() == [1.0, *range(1, 30), 1.0, 1.0]
    with pytest.raises(ValueError, match=r"counts \(\[4\]\) must be \[num_items\] = \[30\]"):
        model.set_item_counts(torch.ones(4))
    with pytest.raises(ValueError, match=r"negative_sampler \('uniform'\) draws without counts"):
        recommender(kind).set_item_counts(counts)


def test_exported_recommenders_recommend_without_undersong(tmp_path):
    from undersong.hub import export

    wanted = {}
    for kind in CLASSES:
        model = recommender(kind)
        model.item_vocab = ItemVocab([f"film {row}" for row in range(1, 31)])
        export(model, tmp_path / kind)
        loaded = AutoModelForSequentialRecommendation.from_pretrained(tmp_path / kind).eval()
        assert type(loaded) is type(model)
        wanted[kind] = loaded.recommend([["film 3", "film 5"], []], k=4).item_ids
    code = f"""
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "undersong":
                    raise ModuleNotFoundError("undersong is not here")
        sys.meta_path.insert(0, Blocked())
        import transformers
        for kind, want in {wanted!r}.items():
            folder = {str(tmp_path)!r} + "/" + kind
            model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
            best = model.recommend([["film 3", "film 5"], []], k=4)
            assert best.item_ids == want, best
    """
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
