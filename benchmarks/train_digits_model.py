"""Trains the published digits model by the demo's recipe; writes its Hub repo, card and numbers included.

python benchmarks/train_digits_model.py    # about two minutes on 2 idle cores; writes hub_configs/aaren-digits
"""

import sys
from pathlib import Path

import harness
import torch

from undersong.demo.recipe import train
from undersong.demo.stages import card

FOLDER = Path(__file__).parents[1] / "hub_configs" / "aaren-digits"


def main():
    torch.set_num_threads(2)
    facts = harness.Benchmark("digits model", device="cpu", threads=2).as_dict()
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("python", "torch", "transformers"))
    hardware = f"{facts['hardware']['cpu']}, 2 threads ({versions})"
    run = train("aaren")
    run.model.save_pretrained(FOLDER)
    text = card(run.model, run.facts(), hardware=hardware, command=f"python benchmarks/{Path(sys.argv[0]).name}")
    (FOLDER / "README.md").write_text(str(text), encoding="utf-8")
    print(f"{FOLDER.name}: test accuracy {run.test:.4f}, validation {run.validation:.4f}, {run.seconds:.0f} s")


if __name__ == "__main__":
    main()
