"""Recommenders on a GPU: the same items as on the CPU, and losses whose negatives are drawn there."""

import pytest
import torch

from undersong.tokenization.item_vocab import left_pad
from undersong.training.full_rank_eval import full_ranks

from .recommenders import CLASSES, recommender

pytestmark = pytest.mark.gpu
every_kind = pytest.mark.parametrize("kind", list(CLASSES))
HISTORIES = [[3, 5, 3, 8], [], [30, 29, 2, 7, 11, 13]]


@every_kind
def test_the_same_items_as_on_the_cpu(kind):
    model = recommender(kind)
    want = model.recommend(HISTORIES, k=30)
    ranks = full_ranks(model, HISTORIES, [9, 10, 11])
    model.cuda()
    for histories in (HISTORIES, left_pad(HISTORIES).cuda()):
        got = model.recommend(histories, k=30)
        assert got.item_ids.is_cuda
        assert torch.equal(got.item_ids.cpu(), want.item_ids)
        assert (got.scores.cpu() - want.scores).nan_to_num().abs().max() < 1e-4
    assert torch.equal(full_ranks(model, HISTORIES, [9, 10, 11]), ranks)
    with pytest.raises(ValueError, match="histories holds id 31"):
        model.recommend(torch.tensor([[31]], device="cuda"))


@every_kind
@pytest.mark.parametrize("loss_type", ["ce", "sampled_softmax", "bce", "gbce"])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_train_there(kind, loss_type, autocast):
    model = recommender(kind, loss_type=loss_type, num_negatives=8).cuda()
    ids = left_pad(HISTORIES).cuda()
    labels = torch.where(ids > 0, ids % 30 + 1, -100)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=labels).loss
    assert loss.is_cuda
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
