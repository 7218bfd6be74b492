"""Recformer: cold items, a catalogue never seen, two stages against one, and speed against transformers' Longformer.

    python benchmarks/bench_recformer.py --device cuda        # everything, on one GPU
    python benchmarks/bench_recformer.py --only speed         # the CPU figures
    python benchmarks/bench_recformer.py --fast               # a smoke run, writes nothing

Synthetic: a made-up shop (`undersong.data.attribute_catalogue`) whose users follow attributes; half of its items occur
in no training history. MovieLens-100k: titles, years and genres; a tenth of the films is held out of training in the
same way. Recformer trains on the warm items alone and encodes all of them for the test; gSASRec has a vector for each.
Validation decides when to stop, and the test figures are read once.
"""

import argparse
import json
import time
from pathlib import Path

import harness
import numpy as np
import recformer_speed
import torch
from recformer_training import (
    figures,
    finetune,
    mean_and_sd,
    ndcg,
    pretrain,
    recall,
    recommender,
    tokenizer_and_config,
    train_by_id,
)

from undersong.data.attribute_catalogue import attribute_catalogue
from undersong.data.movielens import movielens_100k

RESULTS = Path(__file__).parent / "results"


def warm_catalogue(items, cold):
    """Rows of the warm items alone: (their items, old row -> new row)."""
    warm = [row for row in range(1, len(items) + 1) if row not in cold]
    return [items[row - 1] for row in warm], {row: new for new, row in enumerate(warm, start=1)}


def experiment(items, cold, train, valid, test, *, options, seed, other=None):
    """One seed: pretraining, one and two stages on warm items, the model by id, and all figures on the test users.

    `test`: (histories, targets); `other`: (items, histories, targets) of a shop that is never trained on.
    """
    device, begin = options.device, time.perf_counter()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2} if options.fast else {}
    tokenizer, config = tokenizer_and_config(items, **sizes)
    warm_items, new = warm_catalogue(items, cold)
    histories = [[new[row] for row in history] for history in train]
    warm_valid = [
        ([new[row] for row in history], new[target])
        for history, target in zip(*valid, strict=True)
        if target in new and all(row in new for row in history)
    ]
    warm_valid = tuple(map(list, zip(*warm_valid, strict=True)))
    pretrained = pretrain(
        tokenizer, config, warm_items, histories, epochs=options.pretrain_epochs, device=device, seed=seed
    )
    result = {"zero_shot": figures(recommender(pretrained, tokenizer, items), *test)}
    if other is not None:
        result["other_shop"] = figures(recommender(pretrained, tokenizer, other[0]), *other[1:])
    is_cold = [n for n, target in enumerate(test[1]) if target in cold]
    for name, stage2 in (("one_stage", False), ("two_stage", True)):
        model = recommender(pretrained, tokenizer, warm_items)
        facts = finetune(
            model, tokenizer, warm_items, histories, warm_valid,
            epochs=options.epochs, stage2=stage2, device=device, seed=seed,
        )  # fmt: skip
        # where every target is warm, the catalogue trained on is the one that is ranked, with the vectors of training
        warm_test = [
            ([new[row] for row in history if row in new], new[target])
            for history, target in zip(*test, strict=True)
            if target in new
        ]
        result[name] = facts | {"warm_items": figures(model, *map(list, zip(*warm_test, strict=True)))}
    model.set_items(tokenizer, items)
    result["two_stage"] |= {"all": figures(model, *test), "cold_items": figures(model, *test, is_cold)}
    by_id = train_by_id(len(items), train, epochs=options.id_epochs, device=device, seed=seed)
    result["gsasrec"] = {"all": figures(by_id, *test), "cold_items": figures(by_id, *test, is_cold)}
    result |= {"cold_test_users": len(is_cold), "seconds": time.perf_counter() - begin}
    print(f"seed {seed}: {json.dumps(result)}", flush=True)
    return result


def synthetic(options, seed):
    sizes = {"num_items": 60, "num_users": 60, "num_test_users": 20} if options.fast else {
        "num_items": 2000, "num_users": 8000, "num_test_users": 2000}  # fmt: skip
    shop = attribute_catalogue(**sizes, seed=seed)
    other = attribute_catalogue(**sizes, seed=seed, part=1)
    kept = len(shop.train) * 9 // 10
    valid = [h[:-1] for h in shop.train[kept:]], [h[-1] for h in shop.train[kept:]]
    return experiment(
        shop.items, set(shop.cold), shop.train[:kept], valid, (shop.test, shop.test_targets), options=options,
        seed=seed, other=(other.items, other.test, other.test_targets),
    )  # fmt: skip


def movielens(options, seed):
    data = movielens_100k()
    rows = range(1, data.num_items + 1)
    items = [{"title": data.titles.get(row, ""), **data.attributes.get(row, {})} for row in rows]
    cold = set((np.random.default_rng(seed).permutation(data.num_items)[: data.num_items // 10] + 1).tolist())
    split = data.leave_one_out()

    def without(histories):
        return [[row for row in history if row not in cold] for history in histories]

    train = [history[start : start + 20] for history in without(split.train) for start in range(0, len(history), 20)]
    if options.fast:
        train = train[:60]
    users = slice(0, 20 if options.fast else None)
    valid = without(split.valid.histories)[users], split.valid.targets[users]
    test = without(split.test.histories)[users], split.test.targets[users]
    return experiment(items, cold, train, valid, test, options=options, seed=seed)


def quality(options):
    """Both data sets over the seeds, and what must hold."""
    record, acceptance = {}, {}
    for name, run in (("synthetic", synthetic), ("movielens", movielens)):
        if options.only not in (None, name):
            continue
        runs = [run(options, seed) for seed in options.seeds]
        record[name] = {"runs": runs}
        cold = [recall(r["two_stage"]["cold_items"]) for r in runs], [recall(r["gsasrec"]["cold_items"]) for r in runs]
        stages = [[ndcg(r[s]["warm_items"]) for r in runs] for s in ("one_stage", "two_stage")]
        record[name] |= {
            "recall@10 of cold items": {"recformer": mean_and_sd(cold[0]), "gsasrec": mean_and_sd(cold[1])},
            "ndcg@10 of warm items": {"one_stage": mean_and_sd(stages[0]), "two_stage": mean_and_sd(stages[1])},
        }
        acceptance[f"{name}: recall@10 of cold items, Recformer / gSASRec >= 3"] = sum(cold[0]) / max(
            sum(cold[1]), 1e-9
        )
        acceptance[f"{name}: ndcg@10, two stages / one >= 1.02"] = sum(stages[1]) / max(sum(stages[0]), 1e-9)
        if name == "synthetic":
            chance = 10 / (60 if options.fast else 2000)
            other = mean_and_sd([recall(r["other_shop"]) for r in runs])
            record[name]["recall@10 of a shop never seen"] = other | {"chance": chance}
            acceptance["recall@10 of a shop never seen / chance >= 5"] = other["mean"] / chance
    return record, acceptance


def speed(options):
    cuda = options.device == "cuda"
    bench = harness.Benchmark("recformer", device=options.device, rounds=20, threads=None if cuda else options.threads)
    dtype, tolerance = (torch.bfloat16, 3e-2) if cuda else (torch.float32, 2e-4)
    layers, batch = (2 if options.fast else options.layers), (16 if cuda else 1)
    length = 128 if options.fast else 1024
    names = ["sdpa_band", "flex_band"] if cuda else ["sdpa_band"]
    recformer_speed.add_attention_cases(bench, options.device, dtype, batch, length, tolerance, names)
    recformer_speed.add_encoder_cases(bench, layers, options.device, dtype, batch, length, tolerance, names)
    print(bench.table())
    record = bench.as_dict()
    acceptance = {
        f"{case['case']}: histories/s over Longformer >= 3": max(
            row["speedup"] for name, row in case["candidates"].items() if name != "longformer"
        )
        for case in bench.cases
    }
    return record, acceptance


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="tiny sizes, one seed, nothing written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=("synthetic", "movielens", "speed"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=60, help="most epochs of finetuning")
    parser.add_argument("--id-epochs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12, help="of the encoder that is timed; published: 12")
    options = parser.parse_args()
    if options.fast:
        options.seeds, options.pretrain_epochs, options.epochs, options.id_epochs = [0], 1, 2, 1
    parts = {}
    if options.only in (None, "speed"):
        parts["speed"] = speed(options)
    if options.only != "speed":
        parts["quality"] = quality(options)
    for name, (record, acceptance) in parts.items():
        print(json.dumps(acceptance, indent=1))
        if not options.fast:
            record = {**harness.run_record(f"recformer_{name}", options.device), **record, "acceptance": acceptance}
            part = name if options.only in (None, "speed") else options.only
            harness.write_json(RESULTS / f"recformer_{part}_{options.device}.json", record)


if __name__ == "__main__":
    main()
