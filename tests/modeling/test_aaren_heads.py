"""Aaren's heads for forecasts and for events."""

import pytest
import torch
import torch.nn.functional as F

from undersong.modeling.aaren.configuration_aaren import AarenConfig
from undersong.modeling.aaren.modeling_aaren_events import AarenForEventForecasting, log_gap_statistics
from undersong.modeling.aaren.modeling_aaren_prediction import AarenForPrediction

DOUBLE = torch.float64


def tiny(**overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
    return AarenConfig(**{**sizes, **overrides})


def assert_same(got, want, atol=1e-10):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


class TestPrediction:
    def model(self, **overrides):
        return AarenForPrediction(tiny(input_size=3, prediction_length=5, **overrides)).double().eval()

    def test_loss_is_the_mean_squared_error_under_either_name(self):
        model, past, future = self.model(), torch.randn(2, 9, 3, dtype=DOUBLE), torch.randn(2, 5, 3, dtype=DOUBLE)
        outputs = model(past_values=past, future_values=future)
        assert outputs.prediction_outputs.shape == (2, 5, 3)
        assert_same(outputs.loss, F.mse_loss(outputs.prediction_outputs, future))
        assert_same(model(past_values=past, labels=future).loss, outputs.loss)

    @pytest.mark.parametrize(("scaling", "shift"), [("std", 7.0), ("mean", 0.0)])
    def test_forecasts_follow_the_units_of_every_series(self, scaling, shift):
        model, past = self.model(scaling=scaling), 50 * torch.randn(2, 9, 3, dtype=DOUBLE)
        factor = torch.tensor([2.0, 0.5, 30.0], dtype=DOUBLE)
        want = model(past).prediction_outputs * factor + shift
        # the epsilon under the root of the variance keeps it from being exact
        torch.testing.assert_close(model(past * factor + shift).prediction_outputs, want, rtol=1e-5, atol=1e-4)

    def test_location_and_scale_are_those_of_the_observed_values(self):
        past = torch.tensor([[[1.0], [9.0], [3.0]]], dtype=DOUBLE)
        observed = torch.tensor([[[1], [0], [1]]])
        model = AarenForPrediction(tiny(prediction_length=1)).double()
        outputs = model(past, past_observed_mask=observed)
        assert_same(outputs.loc, torch.tensor([[[2.0]]], dtype=DOUBLE))
        assert_same(outputs.scale, torch.tensor([[[1.00001**0.5]]], dtype=DOUBLE))
        model.config.scaling = "mean"
        assert_same(model(past, past_observed_mask=observed).scale, torch.tensor([[[2.0]]], dtype=DOUBLE))
        model.config.scaling = None
        assert_same(model(past, past_observed_mask=observed).scale, torch.tensor([[[1.0]]], dtype=DOUBLE))

    @pytest.mark.parametrize("side", ["left", "right", "middle"])
    def test_padding_does_not_matter_whatever_stands_there(self, side):
        model, past = self.model(), torch.randn(1, 6, 3, dtype=DOUBLE)
        cut = {"left": 0, "right": 6, "middle": 3}[side]
        rubbish = torch.full((1, 2, 3), torch.nan, dtype=DOUBLE)
        padded = torch.cat([past[:, :cut], rubbish, past[:, cut:]], 1)
        mask = torch.ones(1, 8)
        mask[:, cut : cut + 2] = 0
        assert_same(model(padded, attention_mask=mask).prediction_outputs, model(past).prediction_outputs)
        observed = mask.unsqueeze(-1).expand(-1, -1, 3)
        assert_same(model(padded, past_observed_mask=observed).prediction_outputs, model(past).prediction_outputs)

    def test_a_series_without_a_valid_step_is_forecast_by_the_bias(self):
        model = self.model()
        mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
        outputs = model(
            torch.randn(2, 3, 3, dtype=DOUBLE), attention_mask=mask, labels=torch.zeros(2, 5, 3, dtype=DOUBLE)
        )
        assert torch.equal(outputs.prediction_outputs[0].flatten(), model.head.bias)
        assert torch.isfinite(outputs.loss)

    def test_a_constant_series_stays_finite(self):
        outputs = self.model()(torch.full((1, 4, 3), 5.0, dtype=DOUBLE))
        assert (outputs.prediction_outputs - 5).abs().max() < 0.1

    def test_errors_name_what_is_wrong(self):
        with pytest.raises(ValueError, match=r"prediction_length \(None\) must be the number of steps"):
            AarenForPrediction(tiny())
        model = self.model()
        with pytest.raises(ValueError, match=r"past_values has shape \(2, 9, 1\).*input_size=3"):
            model(torch.randn(2, 9, 1, dtype=DOUBLE))
        with pytest.raises(ValueError, match=r"future_values has shape \(2, 4, 3\).*= \[2, 5, 3\]"):
            model(torch.randn(2, 9, 3, dtype=DOUBLE), future_values=torch.zeros(2, 4, 3))
        with pytest.raises(Exception, match=r"prediction_length \(0\) must be positive"):
            AarenConfig(prediction_length=0)
        with pytest.raises(Exception, match="scaling"):
            AarenConfig(scaling="max")


class TestEvents:
    times = torch.tensor([[0.5, 0.9, 2.5, 2.6, 4.0, 7.0]], dtype=DOUBLE)
    types = torch.tensor([[0, 2, 1, 1, 0, 2]])

    def model(self, **overrides):
        sizes = {"num_event_types": 3, "num_mixtures": 4, "log_gap_mean": -0.3, "log_gap_std": 1.2}
        return AarenForEventForecasting(tiny(**{**sizes, **overrides})).double().eval()

    def test_likelihood_is_the_density_of_the_gap_times_the_probability_of_the_kind(self):
        model = self.model()
        outputs = model(self.times, self.types)
        log_weights, means, log_stds = outputs.gap_parameters.chunk(3, -1)
        normal = torch.distributions.Normal(-0.3 + 1.2 * means, 1.2 * log_stds.exp())
        law = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=log_weights[:, :-1]),
            torch.distributions.LogNormal(normal.loc[:, :-1], normal.scale[:, :-1]),
        )
        kind = torch.distributions.Categorical(logits=outputs.type_logits[:, :-1])
        want = law.log_prob(self.times.diff(dim=1)) + kind.log_prob(self.types[:, 1:])
        assert_same(outputs.log_likelihood[:, 1:], want)
        assert outputs.log_likelihood[0, 0] == 0
        assert_same(outputs.loss, -want.mean())
        assert_same(outputs.next_time_mean[:, :-1], self.times[:, :-1] + law.mean, atol=1e-8)

    def test_only_differences_of_times_matter(self):
        model = self.model()
        assert_same(model(self.times + 1000, self.types).log_likelihood, model(self.times, self.types).log_likelihood)

    def test_other_units_of_time_change_only_the_measure(self):
        """In units a tenth as long, with statistics to match, every gap's density is a tenth."""
        model = self.model()
        want = model(self.times, self.types).log_likelihood[:, 1:] - torch.tensor(10.0, dtype=DOUBLE).log()
        model.config.log_gap_mean += torch.tensor(10.0, dtype=DOUBLE).log().item()
        # the positions' angles are float32, as everywhere
        assert_same(model(10 * self.times, self.types).log_likelihood[:, 1:], want, atol=1e-5)

    def test_the_future_has_no_say(self):
        model, later = self.model(), self.times.clone()
        later[0, 4:] += 1.0
        got, want = (model(times, self.types).log_likelihood for times in (later, self.times))
        assert torch.equal(got[:, :4], want[:, :4])
        assert not torch.equal(got[:, 4:], want[:, 4:])

    def test_kind_and_time_of_every_event_matter_to_what_follows(self):
        model = self.model()
        want = model(self.times, self.types)
        other = self.types.clone()
        other[0, 1] = 0
        assert not torch.allclose(model(self.times, other).gap_parameters[:, 1:], want.gap_parameters[:, 1:])
        moved = self.times.clone()
        moved[0, 1] = 1.9
        assert not torch.allclose(model(moved, self.types).type_logits[:, 1:], want.type_logits[:, 1:])

    @pytest.mark.parametrize("cut", [0, 2, 6], ids=["left", "middle", "right"])
    def test_padding_does_not_matter_whatever_stands_there(self, cut):
        model = self.model()
        times = torch.cat([self.times[:, :cut], torch.full((1, 2), torch.nan), self.times[:, cut:]], 1)
        types = torch.cat([self.types[:, :cut], torch.full((1, 2), 99), self.types[:, cut:]], 1)
        mask = torch.ones(1, 8, dtype=torch.long)
        mask[:, cut : cut + 2] = 0
        got, want = model(times, types, attention_mask=mask), model(self.times, self.types)
        valid = mask.bool()
        for key in ("log_likelihood", "next_time_mean", "type_logits"):
            assert_same(got[key][valid], want[key].flatten(0, 1))
        assert_same(got.loss, want.loss)
        assert (got.log_likelihood[~valid] == 0).all()

    def test_a_row_without_events_and_one_with_a_single_event_have_nothing_to_learn(self):
        model = self.model().train()
        mask = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]])
        outputs = model(self.times.expand(2, 6), self.types.expand(2, 6), attention_mask=mask)
        assert outputs.loss == 0
        outputs.loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())

    def test_gradients_of_the_likelihood(self):
        model = self.model(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_mixtures=2)

        def likelihood(bias, query):
            values = {"gap_head.bias": bias, "model.layers.0.self_attn.query_token": query}
            return torch.func.functional_call(model, values, (self.times, self.types)).log_likelihood

        query = model.model.layers[0].self_attn.query_token
        leaves = [x.detach().clone().requires_grad_() for x in (model.gap_head.bias, query)]
        assert torch.autograd.gradcheck(likelihood, leaves)

    def test_statistics_are_those_of_the_valid_gaps(self):
        times = torch.tensor([[1.0, 2.0, 9.0, 4.0, 8.0]])
        mask = torch.tensor([[1, 1, 0, 1, 1]])
        gaps = torch.tensor([1.0, 2.0, 4.0]).double().log()
        found = log_gap_statistics(times, mask)
        assert found["log_gap_mean"] == pytest.approx(gaps.mean().item())
        assert found["log_gap_std"] == pytest.approx(gaps.std(correction=0).item())

    def test_errors_name_what_is_wrong(self):
        model = self.model()
        backwards = self.times.clone()
        backwards[0, 3] = 2.0
        with pytest.raises(ValueError, match=r"in row 0 event 3 is at 2 and the one before it at 2.5"):
            model(backwards, self.types)
        with pytest.raises(ValueError, match=r"event_types holds 3 in row 0, but num_event_types is 3; .* 0 to 2"):
            model(self.times, self.types + 1)
        with pytest.raises(ValueError, match=r"event_types has shape \(1, 5\) but event_times has \(1, 6\)"):
            model(self.times, self.types[:, 1:])
        with pytest.raises(ValueError, match=r"event_times \(torch.int64 \[1, 6\]\) must be a float"):
            model(self.types, self.types)
        with pytest.raises(Exception, match=r"log_gap_std \(0.0\) must be positive"):
            AarenConfig(log_gap_std=0.0)
