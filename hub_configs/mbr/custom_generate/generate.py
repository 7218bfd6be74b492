"""Minimum-Bayes-risk decoding: of several samples, the one that the others agree with most (arXiv 2005.10283)."""

from undersong.generation.decoding_loop import DecodingLoop, run
from undersong.generation.mbr import MBR


def generate(inputs=None, *, model, tokenizer=None, num_samples=8, utility="chrf", streamer=None, **arguments):
    """Draws samples and returns the one of largest expected utility.

    Args:
        tokenizer: turns samples into texts; needed for the named utilities.
        num_samples: candidates per prompt.
        utility: "chrf", "bleu", or a callable `(hypotheses, references) -> scores`.
        arguments: of `model.generate()`; sampling is switched on.
    """
    choose = MBR(num_samples, utility, tokenizer, streamer=streamer)
    return run(
        model,
        lambda **held: DecodingLoop(["mbr"], decode=choose, **held),
        inputs,
        tokenizer=tokenizer,
        streamer=streamer,
        **arguments,
    )
