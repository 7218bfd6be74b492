"""Recformer's batches: which item is the target, and which words are masked."""

import pytest
import torch

from undersong.training.recformer_data import (
    DataCollatorForRecformerFinetuning,
    DataCollatorForRecformerPretraining,
    choose_words,
)

from ..modeling.recformer_catalogue import ITEMS, recformer_tokenizer, words

ITEM_LIST = list(ITEMS.values())


def sequence(*numbers):
    return [ITEM_LIST[n] for n in numbers]


def test_the_target_comes_from_the_second_half_and_the_history_is_what_precedes_it():
    torch.manual_seed(0)
    tokenizer = recformer_tokenizer()
    collate = DataCollatorForRecformerPretraining(tokenizer)
    items = sequence(*range(7))
    targets = set()
    for _ in range(60):
        batch = collate([items])
        t = next(n for n in range(7) if torch.equal(batch["target_input_ids"], tokenizer([[items[n]]])["input_ids"]))
        assert torch.equal(batch["input_ids"], tokenizer([items[:t]])["input_ids"])
        targets.add(t)
    assert targets == {3, 4, 5, 6}


def test_two_items_are_a_history_of_one():
    batch = DataCollatorForRecformerPretraining(recformer_tokenizer())([{"items": sequence(0, 1)}])
    assert torch.equal(batch["input_ids"], recformer_tokenizer()([sequence(0)])["input_ids"])


def test_masks_hide_the_share_that_is_asked_for_and_labels_name_what_they_hide():
    torch.manual_seed(0)
    collate = DataCollatorForRecformerPretraining(recformer_tokenizer(), mlm_probability=0.3)
    mask_id, hidden, masked, other, same = words().mask_token_id, 0, 0, 0, 0
    for _ in range(30):
        batch = collate([sequence(*range(24))])
        ids, shown, labels = batch["input_ids"], batch["masked_input_ids"], batch["labels"]
        chosen = labels != -100
        assert torch.equal(labels[chosen], ids[chosen])
        assert torch.equal(shown[~chosen], ids[~chosen])
        assert not chosen[:, 0].any()  # <s>
        assert int(chosen.sum()) == round(0.3 * int(batch["attention_mask"].sum()))
        hidden += int(chosen.sum())
        masked += int((shown == mask_id).sum())
        same += int((shown == ids)[chosen].sum())
        other += int(((shown != mask_id) & (shown != ids)).sum())
    assert abs(masked / hidden - 0.8) < 0.04
    assert abs(same / hidden - 0.1) < 0.04  # a random word may be the word itself
    assert abs(other / hidden - 0.1) < 0.04


def test_padding_and_first_token_are_never_masked():
    torch.manual_seed(0)
    collate = DataCollatorForRecformerPretraining(recformer_tokenizer(), mlm_probability=0.9)
    for _ in range(10):
        batch = collate([sequence(*range(12)), sequence(0, 1)])
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
        assert (batch["masked_input_ids"][:, 0] == words().bos_token_id).all()


def test_words_are_masked_whole():
    torch.manual_seed(0)
    collate = DataCollatorForRecformerPretraining(recformer_tokenizer(), mlm_probability=0.5)
    items = [{"kind": "abcd efg hi", "size": "jklmn"}] * 2  # letters: words of 4, 3, 2 and 5 tokens
    for _ in range(20):
        batch = collate([items])
        chosen = batch["labels"] != -100
        for begin, end in ((2, 6), (6, 9), (9, 11), (12, 17)):
            assert len(set(chosen[0, begin:end].tolist())) == 1


def test_choose_words_keeps_to_its_budget():
    torch.manual_seed(0)
    numbers = torch.tensor([[-1, 0, 0, 0, 1, 1, 2, 3, -1], [-1, 0, 0, 0, 0, -1, -1, -1, -1]])
    mask = torch.tensor([[1] * 8 + [0], [1] * 5 + [0] * 4])
    for _ in range(20):
        chosen = choose_words(numbers, mask, 0.25, 512)
        assert int(chosen[0].sum()) == 2  # of 8 tokens
        assert chosen[1].tolist() == [False] + [True] * 4 + [False] * 4  # one word, which is longer than allowed
        assert int(choose_words(numbers, mask, 0.9, 1)[0].sum()) == 1


def test_finetuning_takes_any_item_but_the_first_and_labels_are_ids():
    torch.manual_seed(0)
    tokenizer = recformer_tokenizer()
    collate = DataCollatorForRecformerFinetuning(tokenizer, ITEM_LIST)
    seen = set()
    for _ in range(40):
        batch = collate([[5, 9, 2, 7]])
        label = int(batch["labels"])
        place = [5, 9, 2, 7].index(label)
        history = [ITEM_LIST[n - 1] for n in [5, 9, 2, 7][:place]]
        assert torch.equal(batch["input_ids"], tokenizer([history])["input_ids"])
        seen.add(place)
    assert seen == {1, 2, 3}


def test_finetuning_for_evaluation_takes_the_last_item_or_the_target():
    collate = DataCollatorForRecformerFinetuning(recformer_tokenizer(), ITEM_LIST, random_target=False)
    batch = collate([[5, 9], {"input_ids": [3], "target": 4}, {"input_ids": [], "target": [6]}])
    assert batch["labels"].tolist() == [9, 4, 6]
    assert batch["labels"].shape == (3,)
    assert batch["attention_mask"].sum(1).tolist() == [7, 7, 1]
    assert collate([[5, 9]])["labels"].shape == (1,)


@pytest.mark.parametrize(
    ("collator", "options", "examples", "message"),
    [
        (DataCollatorForRecformerPretraining, {}, [sequence(0)], "a sequence of 1 items has no history"),
        (DataCollatorForRecformerPretraining, {"mlm_probability": 1.0}, [], r"mlm_probability \(1.0\) must lie in"),
        (DataCollatorForRecformerPretraining, {"max_predictions": 0}, [], r"max_predictions \(0\) must be at least 1"),
        (DataCollatorForRecformerFinetuning, {}, [[4]], "a sequence of 1 items has no item behind a history of 1"),
        (
            DataCollatorForRecformerFinetuning,
            {"min_history": 0},
            [[25, 25]],
            "holds id 25, but with num_items",
        ),
        (DataCollatorForRecformerFinetuning, {"min_history": -1}, [], r"min_history \(-1\) must not be negative"),
    ],
)
def test_errors_say_what_to_do(collator, options, examples, message):
    items = (ITEM_LIST,) if collator is DataCollatorForRecformerFinetuning else ()
    with pytest.raises(ValueError, match=message):
        collator(recformer_tokenizer(), *items, **options)(examples)


def test_a_tokenizer_without_a_mask_cannot_pretrain():
    tokenizer = recformer_tokenizer()
    tokenizer.tokenizer.mask_token = None
    with pytest.raises(ValueError, match="tokenizer has no mask token; set"):
        DataCollatorForRecformerPretraining(tokenizer)
