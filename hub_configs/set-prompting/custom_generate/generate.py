"""Order-free prompts (set-based prompting, McIlroy-Young et al., arXiv 2406.06581)."""

from undersong.generation.decoding_loop import DecodingLoop, run
from undersong.generation.decoding_prompt import encode
from undersong.generation.set_generate import SetBasedGenerate


def generate(inputs=None, *, model, prompt=None, tokenizer=None, streamer=None, **arguments):
    """Continues prompts whose sets `<|start_2d|>a<|split_2d|>b<|end_2d|>` have no order.

    Args:
        prompt: a text, a chat, or a list of them, instead of `inputs`; needs `tokenizer`.
        arguments: of `model.generate()`, among them `set_segment_ids` for inputs that are encoded already.
    """
    if prompt is not None:
        arguments |= {name: value.to(model.device) for name, value in encode(tokenizer, prompt, sets=True).items()}
    decode = SetBasedGenerate(streamer=streamer)
    return run(
        model,
        lambda **held: DecodingLoop(["set_prompting"], decode=decode, **held),
        inputs,
        tokenizer=tokenizer,
        streamer=streamer,
        **arguments,
    )
