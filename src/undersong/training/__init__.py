"""Training methods as parts for transformers' `Trainer`: collators, losses and mixins.

Names are imported when they are first used, because each needs torch and transformers.
"""

from .._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "ditto": ("DittoLoss", "DittoTrainer", "DittoTrainerMixin"),
        "ditto_data": ("DittoDataCollator", "sentence_end_ids"),
        "mamba": (
            "MambaTrainer",
            "MambaTrainerMixin",
            "add_state_tuning",
            "allow_out_proj_adapters",
            "load_state_tuning",
            "save_state_tuning",
        ),
        "state_spaces": ("StateSpaceTrainer", "StateSpaceTrainerMixin", "state_space_groups"),
    },
)
