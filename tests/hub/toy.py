"""A package written to disk by a test: a small model whose imports take every form that export follows."""

import importlib
import shutil
import sys
import textwrap
import uuid

FILES = {
    "__init__.py": "from .parts.scale import SCALE, scaled\n",
    "_helpers.py": '''
        """Helpers; a line of prose that says from .nowhere you may import nothing."""


        def shift(x):
            return x + 0.25
        ''',
    "parts/__init__.py": "",
    "parts/scale.py": """
        import math

        SCALE = math.sqrt(2.0)


        def scaled(x):
            from .._helpers import shift  # inside a function

            return shift(x) * SCALE
        """,
    "parts/table.py": "OFFSETS = (1.0, 2.0)\n",
    "modeling/__init__.py": "",
    "modeling/toy/__init__.py": "from .modeling_toy import ToyForCausalLM\n",
    "modeling/toy/configuration_toy.py": """
        from transformers import PreTrainedConfig


        class ToyConfig(PreTrainedConfig):
            model_type = "toy-{name}"
            vocab_size: int = 11
            hidden_size: int = 8
            tie_word_embeddings: bool = True
        """,
    "modeling/toy/modeling_toy.py": '''
        # a comment that stays
        import torch
        from torch import nn
        from transformers import GenerationMixin, PreTrainedModel
        from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

        try:
            import a_package_that_nobody_has
        except ImportError:
            a_package_that_nobody_has = None

        from {name} import scaled, SCALE as THE_SCALE  # re-exported: two names, one home
        from ...parts.table import (
            OFFSETS,  # in brackets, with a comment
        )
        from .configuration_toy import ToyConfig
        from {name}._helpers import shift as moved


        class ToyPreTrainedModel(PreTrainedModel):
            config: ToyConfig
            config_class = ToyConfig
            base_model_prefix = "model"


        class ToyModel(ToyPreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
                self.mix = nn.Linear(config.hidden_size, config.hidden_size)
                self.post_init()

            def forward(self, input_ids=None, **kwargs):
                x = self.mix(scaled(self.embed_tokens(input_ids)) * THE_SCALE)
                return BaseModelOutput(last_hidden_state=moved(x) + OFFSETS[0])


        class ToyForCausalLM(ToyPreTrainedModel, GenerationMixin):
            _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

            def __init__(self, config):
                super().__init__(config)
                self.model = ToyModel(config)
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
                self.post_init()

            def get_output_embeddings(self):
                return self.lm_head

            def forward(self, input_ids=None, **kwargs):
                return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))


        class ToyForSeriesTagging(ToyForCausalLM):
            """A head that no Auto class fits."""
        ''',
}


class Toy:
    """`Toy(tmp_path, monkeypatch, {path: edit})` writes the package, texts passed through their edits."""

    def __init__(self, folder, monkeypatch, edits=None):
        self.name = f"toy_{uuid.uuid4().hex[:8]}"
        self.folder = folder / self.name
        for path, text in (dict.fromkeys(edits or (), "") | FILES).items():
            text = textwrap.dedent(text).lstrip("\n").replace("{name}", self.name)
            text = edits[path](text) if edits and path in edits else text
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text(text)
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()

    def load(self, path, attribute):
        return getattr(importlib.import_module(f"{self.name}.{path}"), attribute)

    def __getattr__(self, attribute):
        if attribute == "ToyConfig":
            return self.load("modeling.toy.configuration_toy", attribute)
        return self.load("modeling.toy.modeling_toy", attribute)

    def model(self, cls="ToyForCausalLM", **config):
        import torch

        torch.manual_seed(0)
        return getattr(self, cls)(self.ToyConfig(**config)).eval()

    def remove(self):
        """Nothing of it is left for the next test."""
        for module in [module for module in sys.modules if module.partition(".")[0] == self.name]:
            del sys.modules[module]
        shutil.rmtree(self.folder)
