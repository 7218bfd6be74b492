"""Documents as streams of windows: every row reads its documents from the first token to the last, in order."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from undersong.training.streaming_documents import (
    DocumentStreamSampler,
    DocumentWindows,
    StreamingDocumentCollator,
)

LENGTHS = [11, 3, 8, 20, 5, 9, 4]


def documents(lengths=LENGTHS):
    """Tokens are unique over all documents, so that a token says where it came from."""
    ids = iter(range(1, 10_000))
    return [[next(ids) for _ in range(length)] for length in lengths]


def test_windows_of_a_document_put_together_are_the_document():
    windows = DocumentWindows(documents(), window=4)
    items = [windows[index] for index in range(len(windows))]
    read = [document[: 4 if len(document) == 5 else 8 if len(document) == 9 else None] for document in documents()]
    assert sum((item["input_ids"] for item in items), []) == sum(read, []), "but for last tokens that would be alone"
    assert [item["doc_start"] for item in items].count(True) == len(LENGTHS)
    assert {len(item["input_ids"]) for item in items} == {3, 4}
    assert all(set(item["shift_labels"]) != {-100} for item in items), "no window without a prediction"


def test_every_token_but_the_first_of_a_document_is_predicted_once():
    windows = DocumentWindows(documents(), window=4)
    following = [label for index in range(len(windows)) for label in windows[index]["shift_labels"]]
    wanted = [token for document in documents() for token in document[1:]]
    assert [label for label in following if label != -100] == wanted


def test_short_documents_are_left_out():
    assert DocumentWindows(documents(), window=4, min_length=9).kept == [0, 3, 5]
    assert DocumentWindows([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}], window=4).kept == [0]


@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12),
    window=st.integers(1, 7),
    rows=st.integers(1, 12),
    epoch=st.integers(0, 2),
)
def test_every_reader_reads_its_documents_from_their_first_token(lengths, window, rows, epoch):
    windows = DocumentWindows(documents(lengths), window=window)
    rows = min(rows, len(lengths))
    sampler = DocumentStreamSampler(windows, rows=rows, seed=3)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(order) == len(sampler) == len(windows) // rows * rows, "epochs are equally long"
    for reader in range(rows):
        previous = None
        for index in order[reader::rows]:
            item = windows[index]
            continues = previous is not None and previous["shift_labels"][-1] == item["input_ids"][0]
            assert item["doc_start"] != continues
            if item["doc_start"] and previous is not None:  # the document before was read to its end
                last = next(document for document in windows.documents if previous["input_ids"][0] in document)[-1]
                assert last in previous["input_ids"] + previous["shift_labels"]
            previous = item


def test_orders_depend_on_seed_and_epoch_alone():
    windows = DocumentWindows(documents(), window=4)

    def order(seed, epoch):
        sampler = DocumentStreamSampler(windows, rows=2, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(5, 1)


def test_equal_documents_are_each_read_once_an_epoch():
    windows = DocumentWindows(documents([8] * 6), window=4)
    assert sorted(DocumentStreamSampler(windows, rows=3)) == list(range(6 * 2))


@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_continues_its_own_rows(processes):
    windows, batch = DocumentWindows(documents([40, 33, 28, 35, 44, 30, 21, 38]), window=4), 2
    sampler = DocumentStreamSampler(windows, rows=batch * processes)
    for process in range(processes):
        shard = BatchSamplerShard(BatchSampler(sampler, batch, drop_last=False), processes, process)
        batches = list(shard)
        assert len(batches) == len(windows) // (batch * processes)
        for row in range(batch):
            items = [windows[indices[row]] for indices in batches]
            assert items[0]["doc_start"]
            for before, after in zip(items, items[1:], strict=False):
                assert after["doc_start"] or before["shift_labels"][-1] == after["input_ids"][0]


def test_batches_are_padded_on_the_right():
    windows = DocumentWindows([[1, 2, 3, 4, 5], [6, 7, 8, 9]], window=3)
    batch = StreamingDocumentCollator(pad_token_id=99, window=4)([windows[1], windows[2]])
    assert batch["input_ids"].tolist() == [[4, 5, 99, 99], [6, 7, 8, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[4, 5, -100, -100], [6, 7, 8, -100]]
    assert batch["shift_labels"].tolist() == [[5, -100, -100, -100], [7, 8, 9, -100]]
    assert batch["doc_start"].tolist() == [False, True]


def test_a_loader_with_workers_reads_the_same_batches():
    windows = DocumentWindows(documents(), window=4)

    def batches(**options):
        sampler = DocumentStreamSampler(windows, rows=2)
        return list(DataLoader(windows, 2, sampler=sampler, collate_fn=StreamingDocumentCollator(), **options))

    for one, two in zip(batches(), batches(num_workers=2), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(ValueError, match=r"window \(0\) must be at least 1 token"):
        DocumentWindows(documents(), window=0)
    with pytest.raises(ValueError, match=r"min_length \(1\) must be at least 2, because one token predicts nothing"):
        DocumentWindows(documents(), window=4, min_length=1)
    with pytest.raises(ValueError, match=r"at least min_length \(50\) tokens, but the longest of 7 has 20"):
        DocumentWindows(documents(), window=4, min_length=50)
    windows = DocumentWindows(documents(), window=4)
    with pytest.raises(IndexError, match=rf"index \({len(windows)}\) must lie in 0..{len(windows) - 1}"):
        windows[len(windows)]
    with pytest.raises(ValueError, match=r"rows \(8\) must lie in 1..7, the documents there are"):
        DocumentStreamSampler(windows, rows=8)
    with pytest.raises(ValueError, match=r"window \(3\) must be at least 4, the tokens of the longest item"):
        StreamingDocumentCollator(window=3)([windows[0]])
