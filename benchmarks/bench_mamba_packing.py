"""What packing gains over padding in training on real text, at the same loss.

    python benchmarks/bench_mamba_packing.py --device cpu     # under a minute on 2 idle cores
    python benchmarks/bench_mamba_packing.py --device cuda
    python benchmarks/bench_mamba_packing.py --fast           # a smoke run on a CPU, writes nothing

The text is prose from Python's documentation, one paragraph a row, one byte a token: most paragraphs are short and a
few are long. Both candidates take forward and backward of the same batches of paragraphs in random order: "padded" to
the longest of each batch, with an attention mask, and "packed" by DataCollatorWithFlattening. Tokens are those of the
text; the losses are compared with paragraphs run one by one.
"""

import argparse
import json
import random
from pathlib import Path

import harness
import torch
from transformers import DataCollatorWithFlattening, Mamba2Config, MambaConfig

from undersong import FastMamba2ForCausalLM, FastMambaForCausalLM
from undersong.data.human_text import fingerprint, human_text

RESULTS = Path(__file__).parent / "results"
VOCAB = 257  # bytes and padding, 256
SIZES = {  # (hidden size, layers, rows of a batch, batches)
    "fast": (32, 1, 8, 1),
    "cpu": (64, 2, 16, 2),
    "cuda": (768, 4, 64, 2),
}


def build(kind, hidden_size, layers, device):
    torch.manual_seed(0)
    options = {"vocab_size": VOCAB, "hidden_size": hidden_size, "num_hidden_layers": layers, "use_cache": False}
    options |= {"pad_token_id": 256, "bos_token_id": None, "eos_token_id": None}
    if kind == "mamba":
        return FastMambaForCausalLM(MambaConfig(**options)).to(device).train()
    heads = {"head_dim": 32, "num_heads": 2 * hidden_size // 32, "n_groups": 1, "state_size": 64}
    return FastMamba2ForCausalLM(Mamba2Config(**options, **heads)).to(device).train()


def texts(rows, batches):
    """Batches of paragraphs as bytes, drawn in random order."""
    paragraphs = human_text()
    drawn = random.Random(0).sample(paragraphs, rows * batches)
    ids = [{"input_ids": list(paragraph.encode())} for paragraph in drawn]
    return [ids[i : i + rows] for i in range(0, len(ids), rows)], fingerprint(paragraphs)


def pad(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [256] * (longest - len(row["input_ids"])) for row in rows])
    mask = (ids != 256).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def to(device, batch):
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def step_over(model, batches):
    """A callable that takes forward and backward of every batch and gives the losses."""

    def call():
        losses = []
        for batch in batches:
            model.zero_grad(set_to_none=True)
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    return call


@torch.no_grad()
def one_by_one(model, batches, device):
    """Mean loss over the tokens of each batch, without padding or packing."""
    losses = []
    for rows in batches:
        total, count = 0.0, 0
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=device)
            total += model(input_ids=ids, labels=ids).loss.double() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        losses.append(total / count)
    return torch.stack(losses)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    hidden_size, layers, rows, count = SIZES["fast" if arguments.fast else device.type]
    batches, source = texts(rows, count)
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    padded = [to(device, pad(part)) for part in batches]
    packed = [to(device, collate(part)) for part in batches]
    tokens = sum(batch["input_ids"].shape[1] for batch in packed)
    slots = sum(batch["input_ids"].numel() for batch in padded)

    bench = harness.Benchmark("mamba_packing", device=arguments.device, rounds=harness.MIN_ROUNDS)
    acceptance = {}
    for kind in ("mamba", "mamba2"):
        model = build(kind, hidden_size, layers, device)
        want = one_by_one(model, batches, device)
        calls = {"padded": step_over(model, padded), "packed": step_over(model, packed)}
        difference = max((call() - want).abs().max().item() for call in calls.values())
        case = f"{kind}, hidden {hidden_size}, {layers} layers, {count} x {rows} paragraphs"
        found = bench.add(
            f"{case}: forward and backward", calls, reference=want, tolerance=1e-5, baseline="padded", tokens=tokens
        )
        for row in found.values():
            row["tokens_per_s"] = tokens / row["ms"] * 1e3
        acceptance[f"{kind}: packed over padded tokens/s >= 1.8"] = found["packed"]["speedup"]
        acceptance[f"{kind}: loss differs from one by one by <= 1e-5"] = difference
        print(f"{kind}: {json.dumps(found)}", flush=True)
    print(f"{tokens:,} tokens in {slots:,} padded places ({slots / tokens:.2f})")
    print(json.dumps(acceptance, indent=1))
    if not arguments.fast:
        text = {"fingerprint": source, "tokens": tokens, "padded_places": slots}
        record = bench.as_dict() | {"text": text, "acceptance": acceptance}
        harness.write_json(arguments.output or RESULTS / f"mamba_packing_{device.type}.json", record)


if __name__ == "__main__":
    main()
