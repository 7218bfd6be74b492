"""Set prompting's two ways to save time: block-sparse attention over the set, and members remembered from before.

    python benchmarks/bench_set_prompting.py --device cuda
    python benchmarks/bench_set_prompting.py                # CPU: several minutes on 2 idle cores
    python benchmarks/bench_set_prompting.py --fast         # a smoke run, writes nothing

attention: one layer's attention as transformers calls it, 16 members x 512 tokens (CPU: 128) between 64 tokens of
text; flex_attention with the set's BlockMask against sdpa with the same mask as a dense tensor. prefill: the same for
whole models, mask building included. first token: `generate(max_new_tokens=1)`, wall clock, 16 passages x 256 tokens;
"plain" is the stock prompt of the same tokens, "set, warm" has every passage in a `SetCache` but not the question.
bfloat16 on a GPU, float32 on a CPU. "1B" is a Llama of random weights in the shape of Llama-3.2-1B.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import harness
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from undersong.data import smollm2
from undersong.generation.masks import to_model_mask
from undersong.generation.set_cache import SetCache
from undersong.generation.set_encoding import SetPromptEncoding, set_attention
from undersong.generation.set_generate import SetBasedGenerate, set_prefill

HERE = Path(__file__).parent
MEMBERS, TEXT = 16, 64
SHAPES = {"SmolLM2": (9, 3, 64), "1B": (32, 8, 64)}  # heads, key heads, head size


def encoding(member_tokens, vocabulary, device, members=MEMBERS):
    """Text, a set of members of random tokens, text."""
    generator = torch.Generator().manual_seed(0)
    length = 2 * TEXT + members * member_tokens
    member = torch.full((length,), -1)
    member[TEXT:-TEXT] = torch.arange(members).repeat_interleave(member_tokens)
    position = torch.arange(length)
    position[TEXT:-TEXT] = TEXT + torch.arange(member_tokens).repeat(members)
    position[-TEXT:] = TEXT + member_tokens + torch.arange(TEXT)
    return SetPromptEncoding(
        input_ids=torch.randint(10, vocabulary, (1, length), generator=generator),
        attention_mask=torch.ones(1, length, dtype=torch.long),
        position_ids=position[None],
        segment_ids=torch.stack([member.clamp(max=0), member], -1)[None].to(torch.int16),
        permutation=[[tuple(range(members))]],
    ).to(device)


def models(device, fast):
    """name -> function of the attention implementation."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def smollm2_with(attention):
        model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=dtype, attn_implementation=attention)
        return model.to(device).eval()

    def one_billion(attention):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=16384,
            tie_word_embeddings=True,
            pad_token_id=0,
        )
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()

    return {"SmolLM2": smollm2_with} | ({"1B": one_billion} if device == "cuda" and not fast else {})


class Layer(torch.nn.Module):
    """What transformers' attention functions read from the module that calls them."""

    def __init__(self, heads, key_heads):
        super().__init__()
        self.num_key_value_groups, self.is_causal = heads // key_heads, True
        self.eval()


def attention(bench, member_tokens, name):
    heads, key_heads, size = SHAPES[name]
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    tokens = encoding(member_tokens, 100, bench.device)
    allowed = set_attention(tokens.segment_ids, tokens.attention_mask)
    q, k, v = (
        torch.randn(1, n, allowed.shape[1], size, device=bench.device, dtype=dtype)
        for n in (heads, key_heads, key_heads)
    )
    layer, candidates = Layer(heads, key_heads), {}
    for kind in ("sdpa", "flex_attention"):
        config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        mask = to_model_mask(allowed, AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind))
        call = partial(ALL_ATTENTION_FUNCTIONS[kind], layer, q, k, v, mask, scaling=size**-0.5)
        candidates[kind] = partial(lambda call: call()[0], call)
    wide = (q.float(), *(x.float().repeat_interleave(heads // key_heads, 1) for x in (k, v)))
    want = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=allowed[:, None]).transpose(1, 2)
    bench.add(
        f"attention {name}, {MEMBERS} x {member_tokens}",
        candidates,
        reference=want,
        tolerance=2e-2 if bench.on_gpu else 1e-5,
        flops=4 * heads * size * int(allowed.sum()),
        baseline="sdpa",
        share_of_pairs=allowed.float().mean().item(),
    )


@torch.no_grad()
def prefill(bench, member_tokens, name, make):
    tokens = encoding(member_tokens, 10000, bench.device)
    candidates = {kind: partial(set_prefill, make(kind), tokens) for kind in ("sdpa", "flex_attention")}
    candidates = {kind: partial(lambda call: call()[1], call) for kind, call in candidates.items()}
    bench.add(
        f"prefill {name}, {MEMBERS} x {member_tokens}",
        candidates,
        reference=candidates["sdpa"],
        tolerance=0.1,  # bfloat16 through all layers, relative to the largest logit
        baseline="sdpa",
    )


def first_token(device, member_tokens, rounds, name, make):
    """Medians per way of prompting of the time to the first token, and of its ratio to plain."""
    model = make("sdpa")
    tokens = encoding(member_tokens, 10000, device)
    memory = SetCache()
    once = partial(model.generate, max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
    in_sets = partial(once, **tokens.generate_kwargs())
    ways = {
        "plain": partial(once, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask),
        "set": partial(in_sets, custom_generate=SetBasedGenerate()),
        "set, warm": partial(in_sets, custom_generate=SetBasedGenerate(set_cache=memory)),
    }
    joint, apart = (set_prefill(model, tokens, set_cache=m)[1] for m in (None, memory))
    error = harness.check(f"{name}: members apart", apart, joint, 0.1 if device == "cuda" else 1e-4)
    seconds = {way: [] for way in ways}
    for turn in range(rounds + 1):  # the first one warms up
        for way, call in ways.items():
            start = clock(device)
            call()
            seconds[way] += [clock(device) - start] * (turn > 0)
    row = {
        way: {
            "ms": 1e3 * statistics.median(times),
            "ratio_to_plain": statistics.median(t / p for t, p in zip(times, seconds["plain"], strict=True)),
        }
        for way, times in seconds.items()
    } | {"rounds": rounds, "members": MEMBERS, "tokens_per_member": member_tokens, "error": error}
    print(name, json.dumps(row), flush=True)
    return row


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="short members, few rounds, nothing written")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    device, fast = arguments.device, arguments.fast
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    bench = harness.Benchmark("set_prompting", device=device, rounds=20, threads=arguments.threads)
    long = 512 if device == "cuda" else 128
    rounds = 1 if fast else 20 if device == "cuda" else 3
    makers = models(device, fast)
    with torch.no_grad():
        ttft = {name: first_token(device, 16 if fast else 256, rounds, name, make) for name, make in makers.items()}
        if not fast:
            for name in SHAPES:
                torch.compiler.reset()  # or the second shape gets kernels for changing shapes
                attention(bench, long, name)
        if device == "cuda" and not fast:
            for name, make in makers.items():
                torch.compiler.reset()
                prefill(bench, long, name, make)
    print(bench.table())
    record = bench.as_dict() | {"first_token": ttft}
    record["acceptance"] = {
        **{
            f"{case['case']}: flex_attention / sdpa >= 2": case["candidates"]["flex_attention"]["speedup"]
            for case in bench.cases
        },
        **{
            f"first token {name}, {MEMBERS} x {row['tokens_per_member']}: set, warm / plain <= 0.4": row["set, warm"][
                "ratio_to_plain"
            ]
            for name, row in ttft.items()
        },
    }
    print(json.dumps(record["acceptance"], indent=1))
    if not fast:
        harness.write_json(HERE / "results" / f"set_prompting_{device}.json", record)


if __name__ == "__main__":
    main()
