"""Models of `bench_rmoe.py` and their training: byte language models that differ in their routers alone.

On a GPU a training step is recorded once and then replayed, with nothing in it that waits for the host, and trainings
run side by side on streams of their own. On a CPU each is a process.
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from library_bytes import library_bytes
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import AttentionInterface, OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from undersong import RMoEConfig, RMoEForCausalLM, attach_recurrent_router, save_recurrent_router
from undersong.modeling.rmoe.modeling_rmoe import RMoERouter
from undersong.training.router_stats import RouterCounts

BALANCING = 0.01  # weight of the balancing loss, in every training
# No mask is made for an attention of one's own: looking for padding would wait for the device in every step.
AttentionInterface.register(
    "causal", lambda module, q, k, v, mask, **kw: sdpa_attention_forward(module, q, k, v, None, **kw)
)


@dataclass(frozen=True)
class Size:
    """A model and how it is trained."""

    hidden_size: int
    layers: int
    expert_size: int
    experts: int = 16
    top_k: int = 2
    router_size: int = 64
    length: int = 512
    batch: int = 16
    text: int = 20_000_000  # bytes, in all
    windows: int = 1024  # at most, of validation and of test text


@dataclass(frozen=True)
class Job:
    """`kind` is a router trained with its model ("rmoe", "detach", "linear", "mlp"), an OLMoE ("base"), or what is
    trained of one: "attached" its recurrent router, "gate" its own. `folder` has the bases and gets what is made."""

    kind: str
    seed: int
    rate: float
    steps: int
    folder: str | None = None


class MLPRouter(RMoERouter):
    """A layer's own two-layer perceptron: W2 gelu(W1 x), no state."""

    def __init__(self, config, width):
        super().__init__(config)
        self.input_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.score = nn.Linear(width, config.num_local_experts, bias=False)
        for layer in (self.input_proj, self.score):
            nn.init.normal_(layer.weight, std=config.initializer_range)

    def forward(self, hidden_states, state, cell):
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = self.score(F.gelu(self.input_proj(hidden_states.float())))
            weights, experts = logits.softmax(-1).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(hidden_states.dtype), experts, None


class InAutocastDtype(nn.Module):
    """Grouped products are not among what autocast knows; this gives them weights in its dtype."""

    def forward(self, weight):
        device = weight.device.type
        return weight.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weight


def router_parameters(model):
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".gate." in name or "rnn_router" in name or "rmoe_cell" in name
    )


def build(job, size):
    """The model, on the CPU, with the parameters that are not trained frozen."""
    torch.manual_seed(job.seed)
    options = {"vocab_size": 256, "hidden_size": size.hidden_size, "intermediate_size": size.expert_size}
    options |= {"num_hidden_layers": size.layers, "num_attention_heads": size.hidden_size // 64 or 1}
    options |= {"num_key_value_heads": size.hidden_size // 64 or 1, "num_experts_per_tok": size.top_k}
    options |= {"max_position_embeddings": size.length, "attn_implementation": "causal", "use_cache": False}
    options |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    if job.kind in ("base", "attached", "gate"):
        model = OlmoeForCausalLM(OlmoeConfig(num_experts=size.experts, **options))
        if job.kind != "base":
            model.load_state_dict(load_file(f"{job.folder}/base-{job.seed}.safetensors"))
        if job.kind == "attached":
            attach_recurrent_router(model, size.router_size, freeze_base=True)
        elif job.kind == "gate":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.endswith("mlp.gate.weight"))
        return model
    options |= {"num_local_experts": size.experts, "router_hidden_size": size.router_size}
    options |= {"router_type": "linear" if job.kind == "linear" else "gru"}
    model = RMoEForCausalLM(RMoEConfig(detach_router_state=job.kind == "detach", **options))
    if job.kind == "mlp":
        width = round(router_parameters(model) / (size.layers * (size.hidden_size + size.experts)))
        model.model.rnn_router = None
        for layer in model.model.layers:
            layer.mlp.gate = MLPRouter(model.config, width)
    return model


def balancing_loss(router_logits, top_k):
    """transformers' `load_balancing_loss_func`, which counts by an operation that waits for the device."""
    probabilities = torch.cat(router_logits).softmax(-1, dtype=torch.float32)
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, -1).indices, 1.0)
    return probabilities.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum()


def learning_rates(rate, steps):
    """A twentieth of warmup, then half a cosine to 0."""
    warmup = max(1, steps // 20)
    return [rate * min(1, (s + 1) / warmup) * (1 + math.cos(math.pi * s / steps)) / 2 for s in range(steps)]


@cache
def text_of(limit, device):
    parts, fingerprint = library_bytes(limit)
    return {name: part.to(device) for name, part in parts.items()}, fingerprint


class Training:
    """One model, a step at a time; the order of the data depends on the seed alone."""

    def __init__(self, job, size, device):
        self.job, self.size, self.device = job, size, torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.text, _ = text_of(size.text, str(device))
        self.model = build(job, size).to(self.device).train()
        if not self.on_gpu and job.kind in ("base", "attached", "gate"):
            self.model.set_experts_implementation("eager")  # the fastest of transformers' there
        for layer in self.model.model.layers if self.on_gpu else ():
            for name in ("gate_up_proj", "down_proj"):
                parametrize.register_parametrization(layer.mlp.experts, name, InAutocastDtype())
        again = job.kind in ("attached", "gate")  # other windows than the base began with
        order = torch.Generator().manual_seed((2000 if again else 1000) + job.seed)
        last = len(self.text["train"]) - size.length - 1
        self.starts = torch.randint(last, (job.steps, size.batch), generator=order).to(self.device)
        self.window = torch.arange(size.length + 1, device=self.device)
        self.rates = torch.tensor(learning_rates(job.rate, job.steps), device=self.device)
        self.losses = torch.zeros(job.steps, device=self.device)
        self.done = torch.zeros(1, dtype=torch.long, device=self.device)
        self.rate = torch.zeros((), device=self.device)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            self.rate,
            (0.9, 0.95),
            weight_decay=0.1,
            foreach=False,
            fused=self.on_gpu,
            capturable=self.on_gpu,
        )
        self.stream = torch.cuda.Stream(self.device) if self.on_gpu else None

    def forward(self, text, starts):
        """Nats a byte, of every byte but the first, and router logits."""
        rows = text[starts[:, None] + self.window].long()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            outputs = self.model.model(rows[:, :-1], output_router_logits=True)
            logits = self.model.lm_head(outputs.last_hidden_state)
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten()), outputs.router_logits

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss, router_logits = self.forward(self.text["train"], self.starts.index_select(0, self.done)[0])
        (loss + BALANCING * balancing_loss(router_logits, self.size.top_k)).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.rate.copy_(self.rates.index_select(0, self.done)[0])
        self.optimizer.step()
        self.losses.index_copy_(0, self.done, loss.detach()[None])
        self.done += 1

    def record(self, warmup=3):
        """Takes the first steps, in which kernels are compiled, and records the next; returns the steps taken."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(warmup):
                self.step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step()
        return warmup

    def replay(self):
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    @torch.no_grad()
    def evaluate(self, part):
        """Bits a byte in windows that do not overlap, spread over a part of the text, and router statistics."""
        self.model.eval()
        text, counts, total = self.text[part], RouterCounts(), 0.0
        starts = torch.arange(0, len(text) - self.size.length, self.size.length, device=self.device)
        starts = starts[:: -(-len(starts) // self.size.windows)]
        for some in starts.split(8 * self.size.batch):
            loss, router_logits = self.forward(text, some)
            total += loss.double() * len(some)
            counts.add(router_logits, self.size.top_k)
        self.model.train()
        return total.item() / len(starts) / math.log(2), counts.stats()

    def result(self):
        validation, _ = self.evaluate("validation")
        test, stats = self.evaluate("test")
        found = asdict(self.job) | {"validation": validation, "test": test, "router_stats": rounded(stats)}
        del found["folder"]
        found["parameters"] = sum(p.numel() for p in self.model.parameters())
        found["router_parameters"] = router_parameters(self.model)
        found["losses"] = [
            round(chunk.mean().item(), 4) for chunk in self.losses.tensor_split(min(40, self.job.steps))
        ]
        if self.job.folder:
            self.save(Path(self.job.folder))
        print(
            f"{self.job.kind} seed {self.job.seed} lr {self.job.rate:g}, {self.job.steps} steps: {test:.4f}",
            flush=True,
        )
        return found

    def save(self, folder):
        if self.on_gpu:
            for layer in self.model.model.layers:
                for name in ("gate_up_proj", "down_proj"):
                    parametrize.remove_parametrizations(layer.mlp.experts, name, leave_parametrized=False)
        if self.job.kind == "base":
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
            save_file(tensors, folder / f"base-{self.job.seed}.safetensors")
        elif self.job.kind == "attached":
            save_recurrent_router(self.model, folder / f"router-{self.job.seed}-{self.job.rate:g}")


def rounded(stats):
    return {name: torch.tensor(values).mul(1e4).round().div(1e4).double().tolist() for name, values in stats.items()}


def train_alone(job, size):
    torch.set_num_threads(1)
    training = Training(job, size, "cpu")
    for _ in range(job.steps):
        training.step()
    return training.result()


def train_all(jobs, size, device):
    """Results of all jobs, which have the same number of steps, in their order."""
    if torch.device(device).type == "cuda":
        trainings = [Training(job, size, device) for job in jobs]
        taken = [training.record() for training in trainings]
        for _ in range(max(taken), jobs[0].steps):
            for training in trainings:
                training.replay()
        torch.cuda.synchronize()
        return [training.result() for training in trainings]
    if len(jobs) == 1:
        return [train_alone(jobs[0], size)]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count()), mp_context=get_context("spawn")) as pool:
        return list(pool.map(train_alone, jobs, [size] * len(jobs)))
