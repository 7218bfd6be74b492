"""Aaren over 10,000 tokens, one at a time, against the same Transformer layers with a key-value cache.

    python benchmarks/bench_aaren_streaming.py            # about a minute on an idle core
    python benchmarks/bench_aaren_streaming.py --fast     # 400 tokens, writes nothing

Both read one embedding a token, batch 1, without gradients. Time per token is the median over blocks of a tenth of the
stream; the ratio is the last block's to the first's. Memory is what the state or the cache holds, in bytes of tensors,
and what the process itself grew by between the end of the first block and the end (resident set; it goes in pages).
"""

import argparse
import io
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import harness
import torch
from torch import nn
from torch.nn import functional as F

from undersong.modeling.aaren.configuration_aaren import AarenConfig
from undersong.modeling.aaren.modeling_aaren import AarenModel
from undersong.modeling.aaren_stream import AarenStream

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setting:
    tokens: int = 10_000
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    warmup: int = 50


FULL, FAST = Setting(), Setting(tokens=400, hidden_size=32, warmup=5)


class CachedTransformer(nn.Module):
    """Causal Transformer layers of the same size; the cache grows by one key and one value a token and layer."""

    def __init__(self, setting):
        super().__init__()
        self.heads = setting.heads
        self.layers = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(
                    setting.hidden_size, setting.heads, 4 * setting.hidden_size, batch_first=True, norm_first=True
                )
                for _ in range(setting.layers)
            ]
        )
        self.reset()

    def reset(self):
        self.cache = [None] * len(self.layers)

    @torch.no_grad()
    def update(self, x):
        for index, layer in enumerate(self.layers):
            attention = layer.self_attn
            projected = F.linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected.chunk(3, -1))
            if self.cache[index] is not None:
                k, v = (torch.cat(pair, 2) for pair in zip(self.cache[index], (k, v), strict=True))
            self.cache[index] = k, v
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + attention.out_proj(attended)
            x = x + layer.linear2(F.relu(layer.linear1(layer.norm2(x))))
        return x

    def held(self):
        return sum(x.nbytes for pair in self.cache for x in pair)


class Exported:
    """The stream's step as `torch.export` wrote it and read it back."""

    def __init__(self, stream, example):
        file = io.BytesIO()
        torch.export.save(stream.export(example), file)
        file.seek(0)
        self.step, self.state = torch.export.load(file).module(), stream.state
        self.empty = stream.state

    def reset(self):
        self.state = self.empty

    @torch.no_grad()
    def update(self, x):
        answer, self.state = self.step((x,), self.state)
        return answer

    def held(self):
        return sum(x.nbytes for x in self.state)


class Stream(AarenStream):
    def held(self):
        return sum(x.nbytes for x in self.state)


def resident():
    """Bytes of memory the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(stream, tokens, setting):
    for token in tokens[: setting.warmup]:
        stream.update(token)
    stream.reset()
    block = len(tokens) // 10
    seconds, held, grown = [], [], []
    for begin in range(0, len(tokens), block):
        times = []
        for token in tokens[begin : begin + block]:
            start = time.perf_counter()
            stream.update(token)
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times))
        held.append(stream.held())
        grown.append(resident())
    return {
        "ms_per_token_by_block": [1e3 * x for x in seconds],
        "last_to_first_time": seconds[-1] / seconds[0],
        "state_bytes_by_block": held,
        "process_growth_bytes": grown[-1] - grown[0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="400 tokens of a small model, nothing written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "aaren_streaming_cpu.json")
    arguments = parser.parse_args()
    setting = FAST if arguments.fast else FULL
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = AarenConfig(
        hidden_size=setting.hidden_size, num_hidden_layers=setting.layers, num_attention_heads=setting.heads
    )
    model = AarenModel(config, add_token_embeddings=False)
    tokens = torch.randn(setting.tokens, 1, 1, setting.hidden_size)
    streams = {
        "aaren": Stream(model),
        "aaren, exported": Exported(Stream(model), tokens[0]),
        "transformer, key-value cache": CachedTransformer(setting).eval(),
    }
    # a prefix, read at once, before anything is timed
    check = tokens[:64].transpose(0, 1).flatten(1, 2)
    with torch.no_grad():
        want = model(inputs_embeds=check).last_hidden_state[:, -1:]
    for name in ("aaren", "aaren, exported"):
        for token in tokens[:64]:
            got = streams[name].update(token)
        harness.check(name, got, want, 1e-4)
        streams[name].reset()

    record = harness.run_record("aaren_streaming", "cpu") | {"setting": asdict(setting)}
    record["streams"] = {name: run(stream, tokens, setting) for name, stream in streams.items()}
    for name, row in record["streams"].items():
        first, last = row["ms_per_token_by_block"][0], row["ms_per_token_by_block"][-1]
        growth = row["state_bytes_by_block"][-1] - row["state_bytes_by_block"][0]
        print(f"{name:<30} {first:.3f} -> {last:.3f} ms a token, state grew by {growth:,} bytes")
    ours, theirs = (record["streams"][name] for name in ("aaren", "transformer, key-value cache"))
    record["acceptance"] = {
        "time per token, last tenth / first tenth <= 1.2": ours["last_to_first_time"],
        "growth of the state in bytes = 0": ours["state_bytes_by_block"][-1] - ours["state_bytes_by_block"][0],
        "growth of the process in bytes < 1,000,000": ours["process_growth_bytes"],
        "key-value cache / state at the end, in bytes": theirs["state_bytes_by_block"][-1]
        / ours["state_bytes_by_block"][-1],
    }
    print(json.dumps(record["acceptance"], indent=1))
    if not arguments.fast:
        harness.write_json(arguments.output, record)


if __name__ == "__main__":
    main()
