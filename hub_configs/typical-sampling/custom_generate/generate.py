"""Locally typical sampling (Meister et al., arXiv 2202.00666) for `model.generate(custom_generate=...)`."""

from undersong.generation.decoding_loop import DecodingLoop, run
from undersong.generation.typical import LocallyTypicalLogitsWarper


def generate(inputs=None, *, model, mass=0.9, reference="processed", **arguments):
    """Samples among the tokens that are about as surprising as the model expects.

    Args:
        mass: probability to keep, in (0, 1].
        reference: "processed" (behind temperature, top-k, top-p) or "model" (before them).
        arguments: of `model.generate()`; sampling is switched on.
    """

    def processors(model, min_tokens_to_keep):
        return [LocallyTypicalLogitsWarper(mass, min_tokens_to_keep=min_tokens_to_keep, reference=reference)]

    return run(model, lambda **held: DecodingLoop(["typical_mass"], processors, **held), inputs, **arguments)
