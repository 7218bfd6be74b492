"""Trains RecBole's own BERT4Rec or SASRec and writes its scores, for an evaluator that is not its own.

Runs in an environment of its own (Python 3.11, `recbole==1.2.1`, `numpy==1.26.*`, `setuptools<81`, `pandas<3`, torch)
with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1; it imports neither undersong nor transformers.

    python benchmarks/recbole_scores.py --data FOLDER --model BERT4Rec --out scores/BERT4Rec.npz
    python benchmarks/bench_movielens.py --recbole scores/BERT4Rec.npz scores/SASRec.npz

FOLDER holds `ml-100k/ml-100k.inter` as `bench_movielens.py --write-recbole FOLDER` writes it: the same interactions
with a counter for the time, since many ratings have one time and the order would be RecBole's to choose. Scores are
`[users, items]` for the test items, without any item left out; RecBole's defaults are kept but for what is printed.
"""

import argparse

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with ml-100k/ml-100k.inter")
    parser.add_argument("--model", required=True, choices=["BERT4Rec", "SASRec"])
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=2020)
    parser.add_argument("--epochs", type=int, default=300)
    options = parser.parse_args()
    settings = {
        "data_path": options.data, "epochs": options.epochs, "stopping_step": 10, "seed": options.seed,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "metrics": ["NDCG", "Hit", "MRR"], "topk": [10], "valid_metric": "NDCG@10", "loss_type": "CE",
        "train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 50, "eval_batch_size": 256, "state": "WARNING",
        "show_progress": False, "checkpoint_dir": options.data,
    }  # fmt: skip
    config = Config(model=options.model, dataset="ml-100k", config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    model = get_model(config["model"])(config, train.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    epochs = []
    best, _ = trainer.fit(train, valid, saved=True, callback_fn=lambda epoch, score: epochs.append((epoch, score)))
    last = epochs[-1][0] + 1
    stopped = "validation had not improved" if last < options.epochs else "the epochs were used up"
    print(f"{options.model}: {last} epochs, {stopped}; best validation NDCG@10 {best:.4f}")
    model.load_state_dict(torch.load(trainer.saved_model_file, map_location=config["device"])["state_dict"])
    model.eval()
    users, scores, targets = [], [], []
    with torch.no_grad():
        for batch in test:
            interaction = batch[0].to(config["device"])
            scores.append(model.full_sort_predict(interaction).view(len(interaction), -1)[:, : dataset.item_num].cpu())
            users += dataset.id2token("user_id", interaction["user_id"].cpu()).tolist()
            targets += dataset.id2token("item_id", interaction["item_id"].cpu()).tolist()
    items = dataset.id2token("item_id", np.arange(1, dataset.item_num)).astype(str)
    np.savez_compressed(
        options.out, users=np.array(users, dtype=str), targets=np.array(targets, dtype=str), items=items,
        scores=torch.cat(scores)[:, 1:].float().numpy(), model=options.model, epochs=last, stopped=stopped,
        seed=options.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
