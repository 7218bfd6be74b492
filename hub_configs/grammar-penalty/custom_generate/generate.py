"""A penalty on structural repetitions in code, by its grammar (RPG, Dong et al., arXiv 2505.10402)."""

from undersong.generation.decoding_loop import DecodingLoop, run
from undersong.generation.grammar_penalty import GrammarRepetitionPenalty


def generate(
    inputs=None,
    *,
    model,
    tokenizer,
    language="python",
    beta=0.9,
    eos_gamma=0.8,
    min_repeats=3,
    max_period=8,
    **arguments,
):
    """Makes the token that would open one more repetition of the same statements less likely.

    Args:
        tokenizer: the model's.
        language: python, javascript, java, c, cpp, go or rust.
        beta: factor on the probability of that token, per repetition.
        eos_gamma: divides the probability of ending the text, per repetition.
        min_repeats: copies from which on the penalty acts.
        max_period: statements that a repeated pattern may have.
        arguments: of `model.generate()`.
    """

    def processors(model, min_tokens_to_keep):
        return [GrammarRepetitionPenalty(tokenizer, language, beta, eos_gamma, min_repeats, max_period)]

    return run(
        model,
        lambda **held: DecodingLoop(["grammar_penalty"], processors, **held),
        inputs,
        tokenizer=tokenizer,
        **arguments,
    )
