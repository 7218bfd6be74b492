"""Reading a document twice before answering (Arora et al., arXiv 2407.05483)."""

from undersong.generation.decoding_loop import run
from undersong.generation.decoding_prompt import encode
from undersong.generation.repeat_tokens import ReadTwice


def generate(
    inputs=None,
    *,
    model,
    tokenizer=None,
    prompt=None,
    context_start=None,
    context_end=None,
    times=2,
    streamer=None,
    **arguments,
):
    """Repeats a document of the prompt, given as text or as a span of the inputs, before the model answers.

    Args:
        prompt: a text or chat with a `<document>...</document>`, or a list of them; needs `tokenizer`.
        context_start, context_end: instead of `prompt`, first and one-past-last token of the document, one number or
            one per row, counted without padding.
        times: copies of the document.
        arguments: of `model.generate()`.
    """
    held = {"tokenizer": tokenizer, "streamer": streamer}
    if prompt is not None:
        arguments |= {name: value.to(model.device) for name, value in encode(tokenizer, prompt, times).items()}
        times = 1  # done in the text
    else:
        arguments |= {"context_start": context_start, "context_end": context_end}
    return run(model, lambda **held: ReadTwice(times, streamer=held["streamer"]), inputs, **held, **arguments)
