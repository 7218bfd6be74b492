"""A checkpoint of flash-linear-attention gives the same logits here and there, where that library is installed."""

import pytest
import torch

from undersong.modeling.lightnet.modeling_lightnet import LightNetForCausalLM

pytestmark = pytest.mark.gpu


def test_logits_of_a_folder_that_flash_linear_attention_wrote(tmp_path):
    theirs = pytest.importorskip("fla.models.lightnet", reason="flash-linear-attention is not installed")
    torch.manual_seed(0)
    config = theirs.LightNetConfig(
        hidden_size=256, num_hidden_layers=2, num_heads=2, expand_ratio=128, vocab_size=100, fuse_cross_entropy=False
    )
    model = theirs.LightNetForCausalLM(config).to("cuda", torch.bfloat16).eval()
    model.save_pretrained(tmp_path)
    ours = LightNetForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).cuda().eval()
    ids = torch.randint(0, 100, (2, 200), device="cuda")
    with torch.no_grad():
        want, got = model(ids).logits.float(), ours(ids).logits.float()
    # bfloat16 rounds each activation at 4e-3 of its size; logits of an untrained model are of size 0.3
    assert (got - want).abs().max() < 1e-3 + 4e-3 * want.abs().max()
