"""Decodes as the `decoding_config.json` beside the model says."""

from undersong.generation.decoding_config import DecodingConfig
from undersong.generation.decoding_loop import run


def generate(inputs=None, *, model, tokenizer=None, prompt=None, decoding=None, **arguments):
    """`model.generate()` with all the methods of a decoding config.

    Args:
        tokenizer: the model's; needed by `prompt` and by methods that read text.
        prompt: a text, a chat, or a list of them, instead of `inputs`: methods that change the prompt need it.
        decoding: the config as a dict; by default `decoding_config.json` beside the model.
        arguments: of `model.generate()`, above the config's `generation`.
    """
    config = DecodingConfig.beside(model) if decoding is None else DecodingConfig.from_dict(decoding)
    if prompt is not None:
        side = "right" if model.config.is_encoder_decoder else "left"
        encoded = config.prepare(tokenizer, prompt, padding_side=side)
        arguments |= {name: value.to(model.device) for name, value in encoded.items()}
    elif config.read_times > 1:
        raise ValueError(
            f"read_times ({config.read_times}) repeats text; pass prompt= and tokenizer= instead of inputs."
        )

    def loop(tokenizer, **held):
        return config.loop(model, tokenizer, **held)

    return run(model, loop, inputs, tokenizer=tokenizer, **{**config.generation, **arguments})
