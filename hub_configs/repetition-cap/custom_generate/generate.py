"""A cap on the probability of repetitions, after DITTO (Xu et al., arXiv 2206.02369), at decoding time."""

from undersong.generation.decoding_loop import DecodingLoop, run
from undersong.generation.repetition_cap import SelfReinforcementCapLogitsProcessor


def generate(
    inputs=None,
    *,
    model,
    penalty=0.5,
    min_match=3,
    unit="any",
    sentence_end_token_ids=None,
    score_prompt=False,
    **arguments,
):
    """Makes the n-th copy of a stretch at most `penalty` times as likely as the copy before.

    Args:
        penalty: factor in [0, 1].
        min_match: tokens that must repeat before the cap acts.
        unit: "any", or "sentence" with `sentence_end_token_ids`.
        score_prompt: count the prompt's text as well, by one more forward pass.
        arguments: of `model.generate()`.
    """

    def processors(model, min_tokens_to_keep):
        return [
            SelfReinforcementCapLogitsProcessor(
                penalty,
                min_match,
                unit,
                sentence_end_token_ids,
                score_prompt=model if score_prompt else None,
                pad_token_id=model.generation_config.pad_token_id,
            )
        ]

    return run(model, lambda **held: DecodingLoop(["repetition_cap"], processors, **held), inputs, **arguments)
