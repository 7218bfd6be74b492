"""State collapse of a small Mamba-2, and what each remedy gives back: figures of "Stuffed Mamba" (arXiv 2410.07145).

    python benchmarks/bench_stuffed_mamba.py --device cuda     # about eight minutes on a GPU
    python benchmarks/bench_stuffed_mamba.py                   # smaller, about 20 minutes on two cores
    python benchmarks/bench_stuffed_mamba.py --fast            # smoke test, writes nothing
    python benchmarks/bench_stuffed_mamba.py --plot FOLDER     # draws the figures of a results file; needs matplotlib

The text repeats motifs of 16 tokens, a new one every 256 (`undersong.data.motifs`): it can be predicted from its last
32 tokens anywhere, so a loss that grows with the position is a state that fails. Models are trained on T tokens from
an empty state, four of five times the beginning of a text, where nothing has to be forgotten up to T = 256. They read
texts from the middle: "within" is the loss at T/2..T, "beyond" that at 4T..8T; nothing was chosen on these texts.

(a) every state size N and training length T: beyond / within. (b) at the collapsed cell, the controls of inference,
each as it does best on validation texts. (c) there, a tenth of the steps more: with states passed on, on longer
windows, and on the same windows as before. (d) passkey recall over length and state size: a number in noise and, where
all of a text must be kept, one of many names whose values the text gives. "restored" is the share of the gap
beyond - within that is closed.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import harness
import torch
from stuffed_mamba_record import CHECKPOINT, acceptance, plot, summary, write_checkpoint
from torch.nn import functional as F
from transformers import Mamba2Config, PrinterCallback, TrainingArguments

from undersong import FastMamba2ForCausalLM
from undersong.data.key_value import KeyValueTask
from undersong.data.motifs import repeated_motifs
from undersong.data.passkey import hide_passkey
from undersong.metrics.passkey.measures import t_recall
from undersong.metrics.state_capacity import state_size
from undersong.modeling.state_control import StateControlConfig, calibrate_thresholds, state_control
from undersong.modeling.state_monitor import StateMonitor, per_token_loss
from undersong.training.state_passing import StatePassingTrainer
from undersong.training.streaming_documents import DocumentWindows, StreamingDocumentCollator

RESULTS = Path(__file__).parent / "results"
VOCAB, MOTIF, STRETCH, BEGINNINGS = 64, 16, 256, 0.8
LETTERS, DIGITS, NAMES, VALUES = 16, 5, 128, 16  # of the passkeys
VALIDATION, TEST = 1_000, 2_000  # seeds of texts that no model is trained on


@dataclass(frozen=True)
class Setting:
    state_sizes: tuple[int, ...] = (16, 64, 128)
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    cell: tuple[int, int] = (128, 64)  # N and T of (b) and (c)
    grid_seeds: int = 1
    seeds: int = 3
    hidden_size: int = 64
    layers: int = 2
    tokens: int = 2048  # of a step
    steps: int = 2500
    learning_rate: float = 4e-3
    texts: int = 256
    passkey_state_sizes: tuple[int, ...] = (16, 32, 64, 128)
    passkey_length: int = 256
    passkey_steps: int = 6000
    passkey_lengths: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


SETTINGS = {
    "cuda": Setting(),
    "cpu": Setting(
        state_sizes=(16, 128),
        lengths=(64, 128, 512),
        tokens=1024,
        texts=128,
        passkey_state_sizes=(16, 128),
        passkey_length=128,
        passkey_steps=2500,
        passkey_lengths=(16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    ),
}
FAST = Setting(
    state_sizes=(16,), lengths=(64,), cell=(16, 64), seeds=1, tokens=256, steps=20, texts=2, passkey_state_sizes=(16,),
    passkey_length=32, passkey_steps=5, passkey_lengths=(16, 32),
)  # fmt: skip


def build(setting, N, vocab_size):
    """Mamba-2 with its authors' initial rates: A uniform in [1, 16], steps log-uniform in [0.001, 0.1]."""
    heads = 2 * setting.hidden_size // 32
    config = Mamba2Config(
        vocab_size=vocab_size,
        hidden_size=setting.hidden_size,
        num_heads=heads,
        head_dim=32,
        state_size=N,
        n_groups=1,
        num_hidden_layers=setting.layers,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = FastMamba2ForCausalLM(config)
    for block in model.backbone.layers:
        mixer = block.mixer
        with torch.no_grad():
            mixer.A_log.copy_(torch.empty(heads).uniform_(1, 16).log())
            step = torch.empty(heads).uniform_(-3, -1).mul(torch.log(torch.tensor(10.0))).exp()
            mixer.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
    return model


def fit(model, draw, steps, learning_rate):
    """AdamW without weight decay on batches of `draw(step)`: input ids and labels. Returns the curve of the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    warmup, cool, losses = min(50, steps // 4 + 1), max(1, steps // 5), []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / warmup, (steps - step) / cool)
        ids, labels = draw()
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    model.eval()
    part = max(1, steps // 20)
    return [torch.stack(losses[i : i + part]).mean().item() for i in range(0, steps - part + 1, part)]


def motifs(rows, length, generator, **options):
    return repeated_motifs(rows, length, VOCAB, motif=MOTIF, stretch=STRETCH, generator=generator, **options)


def texts(setting, length, seed, rows=None, device="cpu"):
    generator = torch.Generator(device).manual_seed(seed)
    rows = setting.texts if rows is None else rows
    return motifs(rows, length, generator)


def train(setting, N, T, seed, device):
    torch.manual_seed(seed)
    model = build(setting, N, VOCAB).to(device)
    generator = torch.Generator(device).manual_seed(seed)

    def draw():
        rows = setting.tokens // T
        ids = motifs(rows, T + 1, generator, beginnings=BEGINNINGS)
        return ids, ids

    return model, fit(model, draw, setting.steps, setting.learning_rate)


def measure(model, setting, T, seed=TEST, factor=16):
    """Mean losses of text that is `factor` times as long as training's windows, over buckets of T / 2."""
    device = next(model.parameters()).device
    ids = texts(setting, factor * T + 1, seed, device=device)
    losses = per_token_loss(model, ids, chunk=min(512, 8 * T)).mean(0)
    curve = losses.unflatten(0, (-1, T // 2)).mean(1).tolist()
    return {
        "within": curve[1],
        "all within": statistics.mean(curve[:2]),
        "beyond": statistics.mean(curve[8:16]),
        "ratio": statistics.mean(curve[8:16]) / curve[1],
        "curve": curve,
    }


def controls(model, setting, T):
    """The controls of inference: each kind as it did best on validation texts, then measured on the test's."""
    small = T // 4
    candidates = {
        "window": [StateControlConfig("window", window=window, granularity=small) for window in (T // 2, T - small)],
        "normalize": [
            replace(thresholds, granularity=small)
            for multiplier in (0.5, 0.75, 1.0, 1.5, 2.0)
            for thresholds in [calibrate_thresholds(model, calibration(model, setting, T), multiplier=multiplier)]
        ],
        "rescale": [
            *(
                StateControlConfig("rescale", decay_mult=decay, layers=layers)
                for decay in (1.5, 2.0, 4.0, 8.0)
                for layers in (None, [0], [1])
            ),
            *(StateControlConfig("rescale", decay_offset=-offset) for offset in (0.5, 1.0, 2.0, 4.0, 8.0)),
        ],
    }
    found = {}
    for name, configs in candidates.items():
        tried = []
        for config in configs:
            with state_control(model, config):
                tried.append(measure(model, setting, T, seed=VALIDATION, factor=8))
        best = min(range(len(configs)), key=lambda i: tried[i]["beyond"])
        with state_control(model, configs[best]):
            found[name] = measure(model, setting, T)
        chosen = {key: value for key, value in configs[best].to_dict().items() if key != "threshold"}
        found[name] |= {"config": chosen, "validation": [one["beyond"] for one in tried]}
    return found


def calibration(model, setting, T):
    return texts(setting, T, VALIDATION + 1, device=next(model.parameters()).device)


def continued(model, setting, T, seed, device, kind):
    """A copy of the model after a tenth of the steps more."""
    copy = FastMamba2ForCausalLM(model.config).to(device)
    copy.load_state_dict(model.state_dict())
    steps, rows = max(1, setting.steps // 10), setting.tokens // T
    rate = setting.learning_rate / 4
    if kind == "longer windows":
        generator = torch.Generator(device).manual_seed(seed + 100)

        def draw():
            rows = max(1, setting.tokens // (8 * T))
            ids = motifs(rows, 8 * T + 1, generator, beginnings=BEGINNINGS)
            return ids, ids

        fit(copy, draw, steps, rate)
        return copy
    # states passed along documents, states of other documents, or the same windows with every state dropped
    length = T if kind == "other rows' states" else 16 * T
    count = -(-steps * rows * T // length)
    documents = texts(setting, length, seed + 200, rows=max(count, rows)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=rows,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=steps // 20,
            adam_beta2=0.95,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            seed=seed,
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
        )
        trainer = StatePassingTrainer(
            copy,
            arguments,
            train_dataset=DocumentWindows(documents, window=T),
            data_collator=StreamingDocumentCollator(),
            initial_states="passed" if kind == "other rows' states" else "zero",
            state_dropout=1.0 if kind == "same windows" else 0.0,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return copy.eval()


KINDS = ("state passing", "other rows' states", "longer windows", "same windows")


def collapse_job(setting, N, T, seed, device, folder):
    torch.set_num_threads(1)
    begin = time.perf_counter()
    model, losses = train(setting, N, T, seed, device)
    found = {"N": N, "T": T, "seed": seed, "state_size": state_size(model), "training_loss": losses}
    found |= measure(model, setting, T)
    if setting.cell == (N, T):
        found["norms"] = norms(model, setting, T)
        found["remedies"] = controls(model, setting, T)
        for kind in KINDS:
            found["remedies"][kind] = measure(continued(model, setting, T, seed, device, kind), setting, T)
        if folder is not None and seed == 0:
            model.save_pretrained(folder)
    found["seconds"] = time.perf_counter() - begin
    told = {name: round(one["beyond"], 3) for name, one in found.get("remedies", {}).items()}
    print(f"N {N} T {T} seed {seed}: within {found['within']:.3f} beyond {found['beyond']:.3f} {told}", flush=True)
    return found


def norms(model, setting, T):
    """Largest norm of any head's state in every layer, after every T / 2 tokens."""
    with StateMonitor(model, chunk=T // 2) as monitor:
        monitor.read(texts(setting, 16 * T, TEST, rows=min(8, setting.texts), device=next(model.parameters()).device))
    return monitor.records["norm"].mean(1).amax(-1).T.tolist()


def noise(rows, length, generator, depth=None):
    """A number among random letters and digits: only its mark says what it is."""
    text = torch.randint(LETTERS + 10, (rows, length), generator=generator, device=generator.device)
    return hide_passkey(text, LETTERS, digits=DIGITS, depth=depth, generator=generator)


def pairs(rows, length, generator, questions=16):
    """Nothing but passkeys: `length` tokens of names, each with its value, then questions for some of them."""
    task = KeyValueTask(length // 2, NAMES, VALUES)
    return task.sample("DQ", batch=rows, questions=min(questions, length // 2), generator=generator)


def passkey_job(setting, kind, N, seed, device):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    begin, make = time.perf_counter(), {"noise": noise, "pairs": pairs}[kind]
    model = build(setting, N, {"noise": LETTERS + 12, "pairs": 2 + NAMES + VALUES}[kind]).to(device)
    generator, host = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)
    lengths = [n for n in setting.passkey_lengths if kind == "noise" or n <= NAMES]  # every name is said once
    shortest, longest = lengths[0], min(setting.passkey_length, lengths[-1])

    def draw():  # all lengths that are powers of two up to the longest
        length = shortest * 2 ** int(torch.randint((longest // shortest).bit_length(), (), generator=host))
        return make(max(1, setting.tokens // longest), length, generator)

    losses = fit(model, draw, setting.passkey_steps, setting.learning_rate)
    generator.manual_seed(TEST + seed)
    accuracies = []
    for length in lengths:
        right = []
        for rows in torch.arange(setting.texts, device=device).split(16):
            if kind == "noise":
                ids, labels = noise(len(rows), length, generator, depth=(rows + 0.5) / setting.texts)
                right.append((answers(model, ids[:, :-DIGITS], DIGITS) == labels[:, -DIGITS:]).all(1))
            else:
                ids, _ = pairs(len(rows), length, generator, questions=1)
                right.append((answers(model, ids[:, :-1], 1) == ids[:, -1:]).all(1))
        accuracies.append(torch.cat(right).float().mean().item())
    found = {"kind": kind, "N": N, "seed": seed, "state_size": state_size(model), "training_loss": losses}
    found |= {"lengths": lengths, "accuracy_by_length": accuracies}
    found |= {"t_recall": t_recall(lengths, accuracies), "seconds": time.perf_counter() - begin}
    print(f"{kind} N {N} seed {seed}: {[round(x, 2) for x in accuracies]}", flush=True)
    return found


@torch.no_grad()
def answers(model, prompt, digits):
    options = {"prefill_chunk_size": 2048} if prompt.shape[1] > 2048 else {}
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=digits, do_sample=False, **options)
    return out[:, prompt.shape[1] :]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="tiny models, nothing written")
    parser.add_argument("--jobs", type=int, help="trainings at a time: 2 on a CPU, 12 on a GPU")
    parser.add_argument("--write-checkpoint", action="store_true", help=f"the collapsed model, to {CHECKPOINT.name}")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw an existing results file, train nothing")
    arguments = parser.parse_args()

    if arguments.plot is not None:
        device = torch.device(arguments.device).type
        record = json.loads((arguments.output or RESULTS / f"stuffed_mamba_{device}.json").read_text())
        return plot(record, arguments.plot)
    device = torch.device(arguments.device).type
    setting = FAST if arguments.fast else SETTINGS[device]
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch if arguments.write_checkpoint else None
        runs, passkey = run(setting, device, arguments.jobs or {"cpu": 2, "cuda": 12}[device], folder)
        found = summary(setting, runs, passkey)
        accepted = acceptance(setting, found)
        print(json.dumps(accepted, indent=1))
        if arguments.fast:
            return None
        record = harness.run_record("stuffed_mamba", arguments.device) | {
            "setting": asdict(setting)
            | {"vocabulary": VOCAB, "motif": MOTIF, "stretch": STRETCH, "beginnings": BEGINNINGS},
            "summary": found,
            "runs": runs,
            "passkey_runs": passkey,
            "acceptance": accepted,
        }
        harness.write_json(arguments.output or RESULTS / f"stuffed_mamba_{device}.json", record)
        if arguments.write_checkpoint:
            write_checkpoint(Path(scratch), record)
    return None


def run(setting, device, jobs, folder):
    """All trainings, several at a time, the longest first."""
    collapse = [
        (setting, N, T, seed, device, folder)
        for N in setting.state_sizes
        for T in setting.lengths
        for seed in range(setting.seeds if setting.cell == (N, T) else setting.grid_seeds)
    ]
    collapse.sort(key=lambda job: job[1:3] != setting.cell)
    sizes, seeds = setting.passkey_state_sizes, range(setting.seeds)
    passkey = [(setting, kind, N, seed, device) for kind in ("noise", "pairs") for N in sizes for seed in seeds]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = [
            [pool.submit(job, *given) for given in of]
            for job, of in ((collapse_job, collapse), (passkey_job, passkey))
        ]
        return [[future.result() for future in of] for of in futures]


if __name__ == "__main__":
    main()
