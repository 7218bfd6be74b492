"""The one recipe for the digits models: the demo, the benchmark and the published model all train with it.

`train("aaren")` and `train("transformer")` differ in the sequence mixer: embedding, positions, width, depth, dropout,
pooling, head, optimiser, steps and data are the same (and the initial weights' spread, but for the positions').
"""

import tempfile
import time
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ..data.digits import SeriesDataset, digits
from ..modeling.aaren.configuration_aaren import AarenConfig
from ..modeling.aaren.modeling_aaren import AarenForTimeSeriesClassification, AarenPositionEmbedding

__all__ = [
    "EPOCHS",
    "LEARNING_RATES",
    "Trained",
    "TransformerForTimeSeriesClassification",
    "config",
    "predict",
    "train",
]

EPOCHS = 60
NOISE = 0.2  # standard deviation of what is added to training series, whose values are in [0, 1]
# chosen on the validation split by benchmarks/bench_digits.py
LEARNING_RATES = {"aaren": 2e-3, "transformer": 2e-3}


def config() -> AarenConfig:
    """Size of both models: 2 layers of width 64 with 4 heads, about 105 thousand parameters.

    The initial weights have standard deviation 64 ** -0.5; with the usual 0.02 a model this narrow starts ten times
    slower.
    """
    return AarenConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.2,
        initializer_range=0.125,
        position_embedding_type="learned",
        max_position_embeddings=64,
        input_size=1,
        num_labels=10,
    )


class TransformerForTimeSeriesClassification(nn.Module):
    """The baseline: `torch.nn.TransformerEncoder` in place of the Aaren layers.

    It attends in both directions: a classifier that has the whole series has no reason to hide half of it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config  # Trainer looks here when it smooths labels
        self.value_projection = nn.Linear(config.input_size, config.hidden_size)
        self.embed_positions = AarenPositionEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=config.hidden_dropout_prob,
            activation="gelu",
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # dropout only where Aaren has it: after the embedding and on both blocks' outputs
        layer.self_attn.dropout, layer.dropout = 0.0, nn.Identity()
        self.encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, norm, enable_nested_tensor=False)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.embed_positions.embedding.weight, std=0.02)  # better than 0.125 on the validation split

    def forward(self, past_values, labels=None):
        embeds = self.value_projection(past_values)  # [batch, length, hidden]
        positions = torch.arange(embeds.shape[1], device=embeds.device)
        hidden_states = self.encoder(self.dropout(embeds + self.embed_positions(positions, embeds.dtype)))
        logits = self.score(hidden_states.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@dataclass(frozen=True)
class _Noisy(SeriesDataset):
    """Every look at a series is a little different: both models generalise better from so few."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {"past_values": item["past_values"] + NOISE * torch.randn_like(item["past_values"])}


MODELS = {"aaren": AarenForTimeSeriesClassification, "transformer": TransformerForTimeSeriesClassification}


@dataclass
class Trained:
    """A model and how it got there: accuracies in [0, 1]; `history` has one entry per epoch."""

    model: nn.Module
    learning_rate: float
    seed: int
    epochs: int
    parameters: int
    seconds: float
    validation: float
    test: float
    history: list[dict] = field(default_factory=list)

    def facts(self) -> dict:
        """Everything but the model, as plain values."""
        return {key: value for key, value in vars(self).items() if key != "model"}


class _Validate(TrainerCallback):
    """Accuracy on the validation split after every epoch, and a tick for the caller's progress bar."""

    def __init__(self, validation, history, advance):
        self.validation, self.history, self.advance = validation, history, advance

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.history.append({"epoch": round(state.epoch), "validation": accuracy(model, self.validation)})
        self.advance()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and self.history:  # the epoch's mean loss is logged after on_epoch_end
            self.history[-1]["loss"] = logs["loss"]


def train(kind, *, learning_rate=None, seed=0, epochs=EPOCHS, data=None, advance=lambda: None) -> Trained:
    """Trains one model on the digits series with transformers' `Trainer`, on the CPU.

    Args:
        kind: "aaren" or "transformer".
        learning_rate: peak of a linear warm-up and decay; the kind's entry in `LEARNING_RATES` if None.
        seed: of the initial weights, the order of the data and dropout.
        epochs: passes over the training split, 34 steps of 32 series each.
        data: what `digits()` returns, or something like it.
        advance: called after every epoch.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in MODELS:
        raise ValueError(f"kind ({kind!r}) must be one of {', '.join(MODELS)}.")
    learning_rate = learning_rate or LEARNING_RATES[kind]
    data = data or digits()
    set_seed(seed)
    model = MODELS[kind](config())
    noisy = _Noisy(data["train"].past_values, data["train"].labels)
    history = []
    steps = epochs * -(-len(data["train"]) // 32)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=steps // 10,
            weight_decay=0.1,
            label_smoothing_factor=0.1,
            max_grad_norm=1.0,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=seed,
        )
        watch = _Validate(data["validation"], history, advance)
        trainer = Trainer(model=model, args=arguments, train_dataset=noisy, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    model.eval()
    return Trained(
        model=model,
        learning_rate=learning_rate,
        seed=seed,
        epochs=epochs,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=seconds,
        validation=accuracy(model, data["validation"]),
        test=accuracy(model, data["test"]),
        history=history,
    )


@torch.no_grad()
def predict(model, past_values):
    """Logits `[series, classes]` of a model in eval mode; its mode is restored."""
    training = model.training
    model.eval()
    try:
        return model(past_values=past_values)["logits"]
    finally:
        model.train(training)


def accuracy(model, data) -> float:
    return (predict(model, data.past_values).argmax(-1) == data.labels).float().mean().item()
