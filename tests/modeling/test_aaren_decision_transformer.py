"""The Decision Transformer with Aaren layers: transformers' interface, causal, and O(1) to act."""

import pytest
import torch
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from undersong.modeling.aaren_decision_transformer.configuration_aaren_decision_transformer import (
    AarenDecisionTransformerConfig,
)
from undersong.modeling.aaren_decision_transformer.modeling_aaren_decision_transformer import (
    AarenDecisionTransformerModel,
)
from undersong.modeling.aaren_stream import AarenStream
from undersong.registry import ARCHITECTURES

from ..common.cases import build, make_inputs

ROW = ARCHITECTURES["aaren_decision_transformer"]


def model_and_episode(steps=6, batch=2):
    model = build(ROW, dtype=torch.float64)
    return model, make_inputs(model, batch, steps)


def test_takes_and_gives_what_transformers_decision_transformer_does():
    sizes = {"state_dim": 5, "act_dim": 2, "hidden_size": 32, "n_layer": 1, "n_head": 2, "max_ep_len": 64}
    ours = AarenDecisionTransformerModel(AarenDecisionTransformerConfig(**sizes)).eval()
    theirs = DecisionTransformerModel(DecisionTransformerConfig(**sizes)).eval()
    episode = make_inputs(ours, 2, 4)
    episode |= {"rewards": torch.zeros(2, 4, 1), "attention_mask": torch.ones(2, 4)}
    with torch.no_grad():
        got, want = ours(**episode), theirs(**episode)
    assert isinstance(got, type(want))
    assert {key: value.shape for key, value in got.items()} == {key: value.shape for key, value in want.items()}
    with torch.no_grad():
        triple = ours(**episode, return_dict=False)
    assert [x.shape for x in triple[:3]] == [x.shape for x in theirs(**episode, return_dict=False)]


def test_an_action_depends_on_its_state_and_the_past_alone():
    model, episode = model_and_episode()
    want = model(**episode).action_preds

    def changed(key, step):
        other = episode[key].clone()
        other[:, step] += 1
        return model(**{**episode, key: other}).action_preds

    for key in ("states", "returns_to_go"):
        got = changed(key, 3)
        assert torch.equal(got[:, :3], want[:, :3])
        assert (got[:, 3:] != want[:, 3:]).any(-1).all()
    got = changed("actions", 3)  # the action that is to be predicted is not seen
    assert torch.equal(got[:, :4], want[:, :4])
    assert (got[:, 4:] != want[:, 4:]).any(-1).all()


@pytest.mark.parametrize("cut", [0, 2, 6], ids=["left", "middle", "right"])
def test_padding_does_not_matter(cut):
    model, episode = model_and_episode()
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[:, cut : cut + 2] = 0
    padded = {}
    for key, value in episode.items():
        rubbish = torch.full_like(value[:, :2], 7)
        padded[key] = torch.cat([value[:, :cut], rubbish, value[:, cut:]], 1)
    got = model(**padded, attention_mask=mask, labels=padded["actions"])
    want = model(**episode, labels=episode["actions"])
    for key in ("action_preds", "state_preds", "return_preds"):
        torch.testing.assert_close(got[key][mask.bool()], want[key].flatten(0, 1), rtol=0, atol=1e-10)
    torch.testing.assert_close(got.loss, want.loss)


def test_loss_is_the_mean_squared_error_of_the_valid_actions():
    model, episode = model_and_episode()
    outputs = model(**episode, labels=episode["actions"])
    torch.testing.assert_close(outputs.loss, (outputs.action_preds - episode["actions"]).square().mean())
    nothing = model(**episode, labels=episode["actions"], attention_mask=torch.zeros(2, 6))
    assert nothing.loss == 0
    assert torch.isfinite(nothing.action_preds).all()


def acting(stream, episode):
    """Step by step, each time told the action that was taken before."""
    actions = []
    for step in range(episode["timesteps"].shape[1]):
        before = episode["actions"][:, step - 1] if step else torch.full_like(episode["actions"][:, 0], 9.0)
        inputs = (episode[key][:, step] for key in ("returns_to_go", "states"))
        actions.append(stream.update(*inputs, before, episode["timesteps"][:, step]))
    return torch.stack(actions, 1)


def test_acting_step_by_step_equals_the_whole_episode():
    model, episode = model_and_episode()
    stream = AarenStream(model, batch_size=2)
    with torch.no_grad():
        want = model(**episode).action_preds
    torch.testing.assert_close(acting(stream, episode), want, rtol=0, atol=1e-10)
    stream.reset()
    torch.testing.assert_close(acting(stream, episode), want, rtol=0, atol=1e-10)


def test_the_exported_step_acts_the_same():
    model, episode = model_and_episode(steps=3)
    stream = AarenStream(model, batch_size=2)
    inputs = [
        episode["returns_to_go"][:, 0],
        episode["states"][:, 0],
        episode["actions"][:, 0] * 0,
        episode["timesteps"][:, 0],
    ]
    step = stream.export(*inputs).module()
    answer, state = step(tuple(inputs), stream.state)
    torch.testing.assert_close(answer, stream.update(*inputs), rtol=0, atol=1e-12)
    assert state[3].tolist() == [2, 2]  # no action before the first step


def test_errors_name_what_is_wrong():
    model, episode = model_and_episode()
    with pytest.raises(ValueError, match=r"actions has shape \[2, 6, 1\] but the model takes .* = \[2, 6, 2\]"):
        model(**{**episode, "actions": episode["actions"][..., :1]})
    with pytest.raises(ValueError, match="returns_to_go is missing but the model takes"):
        model(**{**episode, "returns_to_go": None})
    with pytest.raises(ValueError, match="timesteps is missing but must be"):
        model(**{**episode, "timesteps": None})
    with pytest.raises(ValueError, match=r"timesteps reach 69 but max_ep_len is 64; .* max_ep_len=70"):
        model(**{**episode, "timesteps": episode["timesteps"] + 64})
    with pytest.raises(Exception, match=r"hidden_size \(100\) must be divisible by num_attention_heads \(12\).*108"):
        AarenDecisionTransformerConfig(hidden_size=100, num_attention_heads=12)
