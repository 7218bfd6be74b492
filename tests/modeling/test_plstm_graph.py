"""The graph model: what layers compute, numberings, batches, directions, bounds, training; and what it refuses."""

import re

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import Trainer, TrainingArguments

from undersong.data.graph_collator import PLSTMGraphCollator
from undersong.data.synthetic_molecules import ATOMS, SyntheticMolecules
from undersong.modeling.plstm_graph.configuration_plstm_graph import PLSTMGraphConfig
from undersong.modeling.plstm_graph.modeling_plstm_graph import (
    PLSTMGraphForGraphClassification,
    PLSTMGraphMixer,
    PLSTMGraphModel,
)
from undersong.ops.line_graph import line_graph
from undersong.ops.plstm_graph import carry

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"node_feature_dim": 5, "edge_feature_dim": 3, "hidden_size": 8, "num_attention_heads": 2}


def make_model(cls=PLSTMGraphModel, **options):
    torch.manual_seed(0)
    return cls(PLSTMGraphConfig(**SIZES, initializer_range=0.5, **options)).double().eval()


def as_arguments(row):
    return {
        key: value.double() if value.is_floating_point() else value for key, value in row.items() if key != "labels"
    }


def close(got, want, atol=1e-10):
    difference = (got - want).abs().max().item() if want.numel() else 0.0
    assert got.shape == want.shape
    assert difference <= atol, f"differs by {difference:.2g}, allowed {atol:.2g}"


ROWS = [SyntheticMolecules(6, seed=1)[index] for index in range(6)]


@pytest.mark.parametrize("block_mode", ["P", "D", "PD", "DP"])
def test_a_batch_is_its_graphs_one_by_one(block_mode):
    model = make_model(block_mode=block_mode)
    single = {
        "node_features": torch.ones(1, 5),
        "edge_index": torch.zeros(2, 0).long(),
        "edge_attr": torch.zeros(0, 3),
    }
    rows = [*ROWS[:3], single | {"labels": 0}]
    batch = PLSTMGraphCollator(model.config)(rows)
    with torch.no_grad():
        got = model(**as_arguments(batch))
        for number, row in enumerate(rows):
            alone = model(**as_arguments(row))
            close(got.last_hidden_state[batch["batch"] == number], alone.last_hidden_state)
            close(got.pooler_output[[number]], alone.pooler_output)


def test_what_the_collator_prepares_is_what_the_model_finds_by_itself():
    model = make_model()
    batch = as_arguments(PLSTMGraphCollator(model.config)(ROWS))
    plain = {key: value for key, value in batch.items() if not key.startswith("line_")}
    with torch.no_grad():
        close(model(**plain).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.parametrize("block_mode", ["P", "D"])
def test_other_numbers_for_nodes_of_a_directed_graph_renumber_the_output(block_mode):
    model = make_model(block_mode=block_mode, directed=True)
    # a tree, of which a multitree is the whole: which lines D keeps does not depend on numbers
    parents = [0, 0, 1, 1, 2, 4, 4, 3]
    index = torch.tensor([parents, range(1, 9)])
    generator = torch.Generator().manual_seed(0)
    nodes, edges = torch.randn(9, 5, generator=generator).double(), torch.randn(8, 3, generator=generator).double()
    node, edge = torch.randperm(9, generator=generator), torch.randperm(8, generator=generator)
    with torch.no_grad():
        want = model(nodes, index, edges).last_hidden_state
        got = model(nodes[node], node.argsort()[index[:, edge]], edges[edge]).last_hidden_state
    close(got, want[node])


def test_an_edge_in_both_directions_is_one_edge():
    model = make_model()
    row = as_arguments(ROWS[0])
    half = row["edge_index"].shape[1] // 2
    once = row | {"edge_index": row["edge_index"][:, half:], "edge_attr": row["edge_attr"][half:]}
    with torch.no_grad():
        close(model(**once).last_hidden_state, model(**row).last_hidden_state)


def reaches(model, against):
    """[reader, source]: whether the source's features matter to the reader, on the path 0-1-2-3-4."""
    index = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    index = index.flip(0) if against else index
    nodes = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edges = torch.zeros(4, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x, index, edges).last_hidden_state.sum(1), nodes)
    return (jacobian.abs() > 1e-14).any(2)


@pytest.mark.parametrize("block_mode", ["P", "D"])
def test_one_layer_reads_as_far_as_there_are_paths_and_only_along_them(block_mode):
    model = make_model(block_mode=block_mode, num_hidden_layers=1, directed=True)
    before = torch.ones(5, 5).tril().bool()
    assert torch.equal(reaches(model, against=False), before)
    assert torch.equal(reaches(model, against=True), before.T)


def test_two_layers_that_alternate_read_everything():
    model = make_model(num_hidden_layers=2)
    assert [against for _, against in model.config.layer_plan] == [False, True]
    assert reaches(model, against=False).all()


def test_the_plan_gives_every_mode_both_directions():
    plan = PLSTMGraphConfig(num_hidden_layers=4).layer_plan
    assert sorted(plan) == [("D", False), ("D", True), ("P", False), ("P", True)]
    assert PLSTMGraphConfig(num_hidden_layers=2, alternate_direction=False).layer_plan == [("P", False), ("D", False)]


def transitions_of(mode, p_norm, graph, z):
    config = PLSTMGraphConfig(**SIZES, p_norm=p_norm)
    return PLSTMGraphMixer(config, mode).bounded(z, graph)


def test_propagation_shares_out_at_most_one_per_edge_and_diffusion_at_most_one_per_line():
    generator = np.random.default_rng(0)
    tails = generator.integers(0, 11, 40)
    index = torch.from_numpy(np.stack([tails, tails + generator.integers(1, 12 - tails)]))
    graph = line_graph(index, 12)
    z = 9 * torch.randn(graph.line_index.shape[1], 2, dtype=torch.float64)
    for p_norm, side in (("paper", 0), ("reference", 1)):
        t = transitions_of("P", p_norm, graph, z)
        for edge in range(40):
            lines = graph.line_index[side] == edge
            total = z[lines].abs().sum(0)
            close(t[lines], z[lines] / (0.5 + total), 1e-12)
            assert (t[lines].abs().sum(0) < 1).all()
    assert (transitions_of("D", "paper", graph, z).abs() <= 1).all()
    # what the bound of "paper" is for: no state is larger than all that was written
    written = torch.rand(40, 2, 1, dtype=torch.float64)
    states = carry(written, transitions_of("P", "paper", graph, z), graph)
    for head in range(2):
        assert states[:, head].abs().max() <= written[:, head].sum()


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
def test_pooling_is_over_the_nodes_of_a_graph(how):
    model = make_model(pooling=how)
    batch = PLSTMGraphCollator(model.config)(ROWS)
    with torch.no_grad():
        outputs = model(**as_arguments(batch))
    for number in range(len(ROWS)):
        nodes = outputs.last_hidden_state[batch["batch"] == number]
        want = nodes.amax(0) if how == "max" else getattr(nodes, how)(0)
        close(outputs.pooler_output[number], want)


def test_initial_gates_are_those_of_the_configuration_and_the_same_everywhere():
    torch.manual_seed(0)
    model = PLSTMGraphModel(PLSTMGraphConfig(**SIZES, gate_bias=-2.0, transition_bias_range=0.5, num_hidden_layers=20))
    mixers = [layer.mixer for layer in model.layers]
    for mixer in mixers:
        for gate in (mixer.source, mixer.mark, mixer.direct, mixer.transition):
            assert not any(project.weight.any() for project in (gate.node, *gate.edges))
        for gate in (mixer.source, mixer.mark, mixer.direct):
            assert (gate.bias == -2).all()
    biases = torch.cat([mixer.transition.bias for mixer in mixers])
    assert 0.35 < biases.std() < 0.65
    assert abs(model.layers[0].up_proj.weight.std() / (2 / (5 * 8)) ** 0.5 - 1) < 0.2


def test_trainer_learns_to_count_fluorine_and_evaluates_graph_by_graph(tmp_path):
    """An easy question, a few steps: from the collator through the Trainer, with graphs as the unit of a batch."""
    fluorine = ATOMS.index("F")
    rows = list(SyntheticMolecules(60, seed=2))
    for row in rows:
        row["labels"] = torch.tensor(int(row["node_features"][:, fluorine].sum() > 0))
    torch.manual_seed(0)
    config = PLSTMGraphConfig(**{**SIZES, "hidden_size": 16}, num_labels=2, num_hidden_layers=2, pooling="max")
    model = PLSTMGraphForGraphClassification(config)
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=30,
        per_device_train_batch_size=20,
        per_device_eval_batch_size=25,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    seen = {}

    def accuracy(prediction):
        seen["predictions"] = prediction.predictions.shape
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=PLSTMGraphCollator(config),
        compute_metrics=accuracy,
    )
    trainer.train()
    result = trainer.evaluate()
    assert seen["predictions"] == (60, 2)
    assert result["eval_accuracy"] > 0.95
    with torch.no_grad():
        batch = PLSTMGraphCollator(config)(rows)
        assert abs(result["eval_loss"] - model.eval()(**batch).loss.item()) < 1e-4


def test_gradients_reach_what_a_directed_edge_carries():
    model = make_model(PLSTMGraphForGraphClassification, num_labels=3)
    batch = PLSTMGraphCollator(model.config)(ROWS)
    model(**as_arguments(batch), labels=batch["labels"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} has no gradient"


def test_saved_and_loaded_is_equal(tmp_path):
    model = make_model(PLSTMGraphForGraphClassification, num_labels=3)
    model.save_pretrained(tmp_path)
    loaded = PLSTMGraphForGraphClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        close(loaded(**as_arguments(ROWS[0])).logits, model(**as_arguments(ROWS[0])).logits, 0.0)


def test_half_precision_stays_close_to_single():
    """Gates, transitions and states are computed in float32 either way."""
    model = make_model().float()
    batch = PLSTMGraphCollator(model.config)(ROWS)
    with torch.no_grad():
        want = model(**batch).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            automatic = model(**batch).last_hidden_state
        halved = model.to(torch.bfloat16)(**batch).last_hidden_state
    assert halved.dtype == torch.bfloat16
    for got in (automatic, halved):
        assert (got.float() - want).norm() < 0.03 * want.norm()


def test_regression_of_several_numbers():
    config = PLSTMGraphConfig(**SIZES, num_labels=2, problem_type="regression")
    model = PLSTMGraphForGraphClassification(config)
    rows = [row | {"labels": torch.tensor([0.5, 1.5])} for row in ROWS]
    batch = PLSTMGraphCollator(config)(rows)
    outputs = model(**batch)
    assert torch.allclose(outputs.loss, (outputs.logits - batch["labels"]).square().mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_hidden_layers": 3},
            "num_hidden_layers (3) must be even for block_mode='PD', whose modes take turns; use 4",
        ),
        (
            {"hidden_size": 10, "num_attention_heads": 4},
            "hidden_size (10) must be divisible by num_attention_heads (4)",
        ),
        ({"node_feature_dim": 0}, "node_feature_dim (0) must be at least 1."),
        ({"edge_feature_dim": -1}, "edge_feature_dim (-1) must be at least 0."),
        ({"mlp_ratio": 0.0}, "mlp_ratio (0.0) must give a width of at least 1"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob (1.0) must lie in [0, 1)"),
    ],
)
def test_configurations_that_make_no_model_are_refused(options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=re.escape(message)):
        PLSTMGraphConfig(**{**SIZES, **options})


def test_a_block_mode_that_there_is_not_is_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="block_mode"):
        PLSTMGraphConfig(block_mode="PP")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node_features": torch.zeros(4, 3)}, "node_features (float32 [4, 3]) must be a [nodes, node_feature_dim]"),
        ({"edge_attr": None}, "edge_attr (NoneType) must be an [edges, edge_feature_dim] = [3, 3]"),
        ({"edge_attr": torch.zeros(2, 3)}, "edge_attr (float32 [2, 3]) must be an [edges, edge_feature_dim] = [3, 3]"),
        ({"edge_index": torch.tensor([[0, 1, 2], [1, 2, 0]])}, "edge_index has a directed cycle through node"),
        ({"line_index": torch.tensor([[0, 1], [1, 2]])}, "line_index must come with line_steps and line_in_tree"),
        ({"batch": torch.tensor([0, 1, 0, 1])}, "batch must not fall"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    model = PLSTMGraphModel(PLSTMGraphConfig(**SIZES, directed=True))
    inputs = {
        "node_features": torch.zeros(4, 5),
        "edge_index": torch.tensor([[0, 1, 2], [1, 2, 3]]),
        "edge_attr": torch.zeros(3, 3),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**inputs | changes)


def test_edge_features_that_the_configuration_does_not_have_are_refused():
    model = PLSTMGraphModel(PLSTMGraphConfig(node_feature_dim=5))
    with pytest.raises(
        ValueError, match=re.escape("edge_attr (float32 [1, 3]) must be None because edge_feature_dim is 0; set")
    ):
        model(torch.zeros(2, 5), torch.tensor([[0], [1]]), torch.zeros(1, 3))
