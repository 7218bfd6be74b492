"""Pseudo-repetitive rows: what they look like, when a row stays plain, and that draws depend on nothing else."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from undersong.training import DittoDataCollator, sentence_end_ids

END = 99
TOKENIZER, NO_PADDING = SimpleNamespace(pad_token_id=0), SimpleNamespace(pad_token_id=None)


def text(seed=0, sentences=8, length=6):
    tokens = torch.randint(1, 90, (sentences, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, -1] = END
    return tokens.flatten().tolist()


def collator(**options):
    return DittoDataCollator(TOKENIZER, [END], **options)


def rows(batch):
    names = ("input_ids", "labels", "ditto_prefix_len", "ditto_unit_len")
    return list(zip(*(batch[name].tolist() for name in names), strict=True))


def test_pseudo_rows_repeat_one_sentence_after_the_one_before():
    seen = set()
    for seed in range(60):
        original = text(0)
        ((ids, labels, prefix, unit),) = rows(collator(rate=1.0, seed=seed)([{"input_ids": original}]))
        assert len(ids) == len(original)
        assert labels == [-100] * len(ids)
        ends = [i for i, token in enumerate(original) if token == END]
        (i,) = [i for i in range(1, len(ends) - 1) if original[ends[i] : ends[i + 1]] == ids[prefix : prefix + unit]]
        assert ids[prefix] == END  # starts with the full stop before, lacks its own
        assert ids[:prefix] == original[ends[i - 1] + 1 : ends[i]]
        assert all(ids[t] == ids[t - unit] for t in range(prefix + unit, len(ids)))
        seen.add(i)
    assert seen == set(range(1, 7))  # every i of 1 .. #ends - 2


def test_rate_is_the_share_of_pseudo_rows():
    batch = collator(rate=0.3)([{"input_ids": text(seed)} for seed in range(400)])
    assert batch["ditto_unit_len"].gt(0).float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert collator(rate=0.0)([{"input_ids": text()}])["ditto_unit_len"].item() == 0


def test_per_batch_decides_for_all_rows_and_leaves_out_the_impossible():
    def batches(seed):
        features = [{"input_ids": text(10 * seed + i)} for i in range(3)] + [{"input_ids": [5 + seed] * 48}]
        return rows(collator(rate=0.5, per_batch=True)(features))

    kinds = []
    for seed in range(40):
        *possible, impossible = batches(seed)
        units = {row[3] > 0 for row in possible}
        assert len(units) == 1
        kinds += units
        assert impossible[3] == 0
        assert (impossible[1] == [-100] * 48) == kinds[-1]
    assert 8 < sum(kinds) < 32
    # no row can repeat: the whole batch stays plain
    alone = collator(rate=1.0, per_batch=True)([{"input_ids": [5] * 12}])
    assert alone["labels"].tolist() == [[5] * 12]


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 3, 4, 5, 6],  # no sentence
        [1, END, 2, 2, 2, END, 3, 3],  # two ends enclose a sentence, but none is before it
    ],
)
def test_rows_without_enough_sentences_stay_plain(ids):
    ((tokens, labels, prefix, unit),) = rows(collator(rate=1.0)([{"input_ids": ids}]))
    assert (tokens, labels, prefix, unit) == (ids, ids, 0, 0)


def test_units_that_leave_no_room_for_a_repeated_prediction_are_not_taken():
    # the prefix is the whole row before the unit; one more token, and the second token of the second copy counts
    ids = [1, 2, 3, END, 4, END, 5, 6, END]
    feature = {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}
    assert collator(rate=1.0)([feature])["ditto_unit_len"].item() == 0
    feature = {name: [*values, 7] for name, values in feature.items()}
    assert rows(collator(rate=1.0)([feature]))[0][2:] == (5, 3)


def test_neighbouring_end_tokens_are_one_end():
    newline = 98
    ids = [1, 1, END, newline, 2, 2, END, newline, 3, 3, END, newline, 4, 4, 4, 4]
    batch = DittoDataCollator(TOKENIZER, [END, newline], rate=1.0)([{"input_ids": ids}])
    ((tokens, _, prefix, unit),) = rows(batch)
    assert (prefix, unit) == (3, 4)
    assert tokens[:7] == [newline, 2, 2, END, newline, 3, 3]


def test_short_rows_are_padded_and_pseudo_rows_fill_the_batch():
    short, long = text(0, sentences=5), text(1, sentences=9)
    batch = collator(rate=1.0)([{"input_ids": short}, {"input_ids": long}, {"input_ids": [7] * 4}])
    assert batch["attention_mask"].tolist() == [[1] * 54, [1] * 54, [1] * 4 + [0] * 50]
    assert batch["labels"][2].tolist() == [7] * 4 + [-100] * 50
    assert batch["input_ids"][2].tolist() == [7] * 4 + [0] * 50
    prefix, unit = batch["ditto_prefix_len"][0], batch["ditto_unit_len"][0]
    assert torch.equal(batch["input_ids"][0, prefix + unit :], batch["input_ids"][0, prefix:-unit])


def test_padding_of_features_is_cut_off():
    ids = text()
    padded = {"input_ids": [0, 0, *ids], "attention_mask": [0, 0] + [1] * len(ids)}
    got, want = (collator(rate=1.0)([feature]) for feature in (padded, {"input_ids": torch.tensor(ids)}))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("as_labels", [True, False])
def test_chat_models_repeat_inside_their_own_turn(as_labels):
    user, turn = text(1, sentences=5), text(2, sentences=5)
    ids = user + turn + user
    mask = [0] * 30 + [1] * 30 + [0] * 30
    labels = [token if m else -100 for token, m in zip(ids, mask, strict=True)]
    feature = {"input_ids": ids} | ({"labels": labels} if as_labels else {"assistant_masks": mask})
    for seed in range(30):
        ((tokens, _, prefix, unit),) = rows(collator(rate=1.0, seed=seed)([feature]))
        assert tokens[:prefix] == ids[:prefix]
        assert prefix > 30
        assert prefix + unit < 60
        assert tokens[prefix : prefix + unit] == ids[prefix : prefix + unit]
    (plain,) = rows(collator(rate=0.0)([feature]))
    assert plain[1] == labels


def batches(dataset, workers=0, epochs=1, collate=None, skip=0):
    collate = collate or collator()
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0)
    out = []
    for epoch in range(epochs):
        collate.set_epoch(epoch)
        out += [{k: v.clone() for k, v in batch.items()} for batch in loader]
    return out[skip:]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def test_draws_do_not_depend_on_workers_or_on_resuming():
    dataset = [{"input_ids": text(seed)} for seed in range(24)]
    once = batches(dataset, epochs=2)
    assert same(once, batches(dataset, epochs=2))
    assert same(once, batches(dataset, epochs=2, workers=2))
    assert not same(once[:6], once[6:])  # another epoch
    assert not same(once, batches(dataset, epochs=2, collate=collator(seed=1)))
    # resumed in the second epoch: a new collator that is told the epoch
    resumed = collator()
    resumed.set_epoch(1)
    assert same(once[8:], [resumed(dataset[i : i + 4]) for i in range(8, 24, 4)])


def test_rows_are_drawn_alone():
    features = [{"input_ids": text(seed)} for seed in range(6)]
    together = rows(collator()(features))
    assert together == [rows(collator()([feature]))[0] for feature in features]
    assert together[::-1] == rows(collator()(features[::-1]))


class Words:
    """A tokenizer whose tokens are given."""

    all_special_ids = (0,)

    def __init__(self, words):
        self.words = words

    def __len__(self):
        return len(self.words)

    def batch_decode(self, rows):
        return ["".join(self.words[i] for i in row) for row in rows]


def test_all_forms_of_sentence_ends_are_found():
    ends = [".", " .", "?!", '."', ".\n", "。", "！”", "\n", "\n\n", "…", " etc.)"]
    words = ["<s>.", *ends, " the", ",", ".5", " \t", "a\n"]
    assert sentence_end_ids(Words(words)) == list(range(1, 1 + len(ends)))
    assert DittoDataCollator(Words(words)).sentence_end_token_ids == set(range(1, 1 + len(ends)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: collator(rate=1.2), r"rate \(1.2\) must lie in \[0, 1\]"),
        (lambda: DittoDataCollator(Words(["a"])), r"sentence_end_token_ids \('auto'\) found no token .*; pass ids"),
        (lambda: DittoDataCollator(TOKENIZER, []), r"sentence_end_token_ids \(\[\]\) found no token"),
        (lambda: DittoDataCollator(TOKENIZER, "."), r"sentence_end_token_ids \('.'\) must be 'auto' or a list of ids"),
        (
            lambda: DittoDataCollator(NO_PADDING, [END])([{"input_ids": [1] * n} for n in (2, 5)]),
            r"tokenizer.pad_token_id \(None\) must be set because rows have 2 to 5 tokens",
        ),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
