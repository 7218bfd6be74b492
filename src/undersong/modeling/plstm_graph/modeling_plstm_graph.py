"""pLSTM on graphs: a linear recurrence whose states live on the edges (arXiv 2506.11997).

An undirected graph is made acyclic by turning its edges from the lower to the higher node; layers run along the edges
or against them. Gates see the edges' features: what goes on from an edge to the next depends on both edges and on the
node between them. A state is a matrix per head and edge; it is complete after as many steps as the longest path has
nodes, for all graphs of a batch at once.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ...ops._validate import describe
from ...ops.line_graph import line_graph, prepare_edges
from ...ops.plstm_graph import plstm_graph
from ..plstm_layers import MultiHeadRMSNorm, small_init_
from ..precision import wide
from .configuration_plstm_graph import PLSTMGraphConfig


class PLSTMGraphGate(nn.Module):
    """b + W x + sum_i W_i e_i for a node x and no, one or two edges e_i: a gate before its activation, in float32.

    Every node and edge is projected once, however many gates it has a part in.
    """

    def __init__(self, config, num_edges, bias=0.0, bias_range=0.0):
        super().__init__()
        self.bias_start = bias, bias_range  # mean and deviation
        heads, num_edges = config.num_attention_heads, num_edges if config.edge_feature_dim else 0
        self.node = nn.Linear(config.hidden_size, heads, bias=False)
        self.edges = nn.ModuleList([nn.Linear(config.edge_feature_dim, heads, bias=False) for _ in range(num_edges)])
        self.bias = nn.Parameter(torch.empty(heads))

    def init_weights(self, std):
        mean, deviation = self.bias_start
        init.normal_(self.bias, mean, deviation)
        for project in (self.node, *self.edges):
            init.normal_(project.weight, std=std)

    def forward(self, x, edge_attr, node_index, *edge_indices):
        z = wide(self.bias) + wide(self.node(x))[node_index]
        for project, index in zip(self.edges, edge_indices, strict=bool(self.edges)):
            z = z + wide(project(edge_attr))[index]
        return z


class PLSTMGraphMixer(nn.Module):
    """The recurrence with its projections and gates; all nodes of a batch of graphs, `[nodes, hidden_size]`."""

    def __init__(self, config, mode):
        super().__init__()
        self.mode, self.p_norm, self.num_heads = mode, config.p_norm, config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.source = PLSTMGraphGate(config, 1, bias=config.gate_bias)
        self.mark = PLSTMGraphGate(config, 1, bias=config.gate_bias)
        self.direct = PLSTMGraphGate(config, 0, bias=config.gate_bias)
        self.transition = PLSTMGraphGate(config, 2, bias_range=config.transition_bias_range)
        self.norm = MultiHeadRMSNorm(self.num_heads, width // self.num_heads, config.rms_norm_eps)

    def forward(self, x, edge_attr, graph):
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        (tails, ends), (before, after) = graph.edge_index, graph.line_index
        source = self.source(x, edge_attr, tails, slice(None)).sigmoid()
        mark = self.mark(x, edge_attr, ends, slice(None)).sigmoid()
        direct = self.direct(x, edge_attr, slice(None)).sigmoid()
        transition = self.bounded(self.transition(x, edge_attr, tails[after], before, after), graph)
        y = plstm_graph(q, k, v, source, transition, mark, direct, graph)
        return self.out_proj(self.norm(y).flatten(-2))

    def bounded(self, z, graph):
        """Mode P: t / (1/2 + sum |t|) over the lines of the same edge. Mode D: tanh t."""
        if self.mode == "D":
            return z.tanh()
        shared = graph.line_index[0 if self.p_norm == "paper" else 1]
        total = z.new_zeros(graph.edge_index.shape[1], self.num_heads).index_add(0, shared, z.abs())
        return z / (0.5 + total[shared])


class PLSTMGraphLayer(GradientCheckpointingLayer):
    def __init__(self, config, mode):
        super().__init__()
        width, inner = config.hidden_size, int(config.mlp_ratio * config.hidden_size)
        self.input_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.mixer = PLSTMGraphMixer(config, mode)
        self.output_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.up_proj, self.down_proj = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, edge_attr, graph):
        hidden_states = hidden_states + self.dropout(self.mixer(self.input_norm(hidden_states), edge_attr, graph))
        inner = self.act(self.up_proj(self.output_norm(hidden_states)))
        return hidden_states + self.dropout(self.down_proj(inner))


class PLSTMGraphPreTrainedModel(PreTrainedModel):
    config: PLSTMGraphConfig
    config_class = PLSTMGraphConfig
    base_model_prefix = "model"
    main_input_name = "node_features"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PLSTMGraphLayer"]
    _supports_context_parallel = False
    _can_record_outputs = {"hidden_states": PLSTMGraphLayer}

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, PLSTMGraphGate):
            module.init_weights(std or 0.0)
        elif isinstance(module, MultiHeadRMSNorm):
            module.init_weights()
        elif isinstance(module, nn.Linear):
            small_init_(module, std)
        else:
            super()._init_weights(module)


class PLSTMGraphModel(PLSTMGraphPreTrainedModel):
    """Reads a batch of graphs that lie behind each other: one vector for every node, and one for every graph.

    Forward arguments:
        node_features: `[nodes, node_feature_dim]` float, the nodes of all graphs.
        edge_index: `[2, edges]` int64, tail and head of every edge, counted over all graphs. With `directed=False` an
            edge may come in one direction or in both; it is one edge.
        edge_attr: `[edges, edge_feature_dim]` float, if `config.edge_feature_dim` is not 0. Of an edge that is given
            twice, the first counts.
        batch: `[nodes]` int64 that rises, the graph of every node; one graph if left out.
        line_index, line_steps, line_in_tree: what `PLSTMGraphCollator` prepares, with an `edge_index` that goes with
            it; computed on the CPU if left out.

    Returns:
        `last_hidden_state` `[nodes, hidden_size]`; `pooler_output` `[graphs, hidden_size]`.

    >>> model = PLSTMGraphModel(PLSTMGraphConfig(node_feature_dim=3, hidden_size=8))
    >>> ring, two = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 0, 4, 5]]), torch.tensor([0, 0, 0, 1, 1, 1])
    >>> outputs = model(torch.randn(6, 3), ring, batch=two)
    >>> outputs.last_hidden_state.shape, outputs.pooler_output.shape
    (torch.Size([6, 8]), torch.Size([2, 8]))
    """

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Linear(config.node_feature_dim, config.hidden_size)
        self.layers = nn.ModuleList([PLSTMGraphLayer(config, mode) for mode, _ in config.layer_plan])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        node_features: torch.FloatTensor,
        edge_index: torch.LongTensor,
        edge_attr: torch.FloatTensor | None = None,
        batch: torch.LongTensor | None = None,
        line_index: torch.LongTensor | None = None,
        line_steps: torch.LongTensor | None = None,
        line_in_tree: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        self.check(node_features, edge_index, edge_attr)
        device, dtype = node_features.device, self.embed.weight.dtype
        lines = line_index, line_steps, line_in_tree
        if line_index is None:
            edge_index, kept, *lines = (
                x.to(device) for x in prepare_edges(edge_index, len(node_features), directed=self.config.directed)
            )
            edge_attr = None if edge_attr is None else edge_attr[kept]
        graphs = self.line_graphs(edge_index, len(node_features), *lines, batch)
        edge_attr = None if edge_attr is None else edge_attr.to(dtype)
        hidden_states = self.embed(node_features.to(dtype)).to(dtype)  # the residual stream stays wide under autocast
        for layer, plan in zip(self.layers, self.config.layer_plan, strict=True):
            hidden_states = layer(hidden_states, edge_attr, graphs[plan])
        hidden_states = self.norm(hidden_states)
        if batch is None:
            batch = torch.zeros(len(node_features), dtype=torch.int64, device=device)
        pooled = pool(hidden_states, batch, next(iter(graphs.values())).num_graphs, self.config.pooling)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def check(self, node_features, edge_index, edge_attr):
        config = self.config
        if node_features.shape != (len(node_features), config.node_feature_dim) or not len(node_features):
            raise ValueError(
                f"node_features ({describe(node_features)}) must be a [nodes, node_feature_dim] ="
                f" [1 or more, {config.node_feature_dim}]; use torch.nn.functional.one_hot for kinds of nodes."
            )
        edges = edge_index.shape[-1]
        if config.edge_feature_dim == 0 and edge_attr is not None:
            raise ValueError(
                f"edge_attr ({describe(edge_attr)}) must be None because edge_feature_dim is 0; set edge_feature_dim"
                f"={edge_attr.shape[-1]} in the configuration."
            )
        if config.edge_feature_dim and (edge_attr is None or edge_attr.shape != (edges, config.edge_feature_dim)):
            raise ValueError(
                f"edge_attr ({describe(edge_attr)}) must be an [edges, edge_feature_dim] ="
                f" [{edges}, {config.edge_feature_dim}]; use torch.nn.functional.one_hot for kinds of edges."
            )

    def line_graphs(self, edge_index, num_nodes, line_index, line_steps, line_in_tree, batch):
        """{(mode, against the edges): graph} for all layers there are."""
        if line_steps is None or line_in_tree is None:
            raise ValueError(
                "line_index must come with line_steps and line_in_tree; PLSTMGraphCollator makes all three."
            )
        graphs = {}
        for mode in sorted(set(self.config.block_mode)):
            index, steps = line_index, line_steps
            if mode == "D":
                index, steps = line_index[:, line_in_tree], line_steps[line_in_tree]
            graph = line_graph(edge_index, num_nodes, line_index=index, line_steps=steps, batch=batch)
            graphs[mode, False], graphs[mode, True] = graph, graph.reversed()
        return graphs


def pool(x, batch, num_graphs, how):
    """`[nodes, width]` -> `[graphs, width]`, summed in float32; zeros for a graph without nodes."""
    if how == "max":
        zeros = x.new_zeros(num_graphs, x.shape[1])
        return zeros.scatter_reduce(0, batch.unsqueeze(1).expand_as(x), x, "amax", include_self=False)
    total = wide(x).new_zeros(num_graphs, x.shape[1]).index_add(0, batch, wide(x))
    if how == "mean":
        total = total / torch.bincount(batch, minlength=num_graphs).clamp(min=1).unsqueeze(1)
    return total.to(x.dtype)


class PLSTMGraphForGraphClassification(PLSTMGraphPreTrainedModel):
    """Classifies whole graphs, or predicts `num_labels` numbers with `problem_type="regression"`.

    >>> model = PLSTMGraphForGraphClassification(PLSTMGraphConfig(node_feature_dim=3, hidden_size=8, num_labels=2))
    >>> model(torch.randn(3, 3), torch.tensor([[0, 1], [1, 2]]), labels=torch.tensor([1])).logits.shape
    torch.Size([1, 2])
    """

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = PLSTMGraphModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.loss_type = "ForSequenceClassification"  # transformers infers it from class names it knows
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        node_features: torch.FloatTensor,
        edge_index: torch.LongTensor,
        edge_attr: torch.FloatTensor | None = None,
        batch: torch.LongTensor | None = None,
        line_index: torch.LongTensor | None = None,
        line_steps: torch.LongTensor | None = None,
        line_in_tree: torch.BoolTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        outputs = self.model(
            node_features, edge_index, edge_attr, batch, line_index, line_steps, line_in_tree, **kwargs
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = ["PLSTMGraphForGraphClassification", "PLSTMGraphModel", "PLSTMGraphPreTrainedModel"]
