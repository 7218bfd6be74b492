"""Training methods as parts for transformers' `Trainer`: collators, losses and mixins.

Names are imported when they are first used, because each needs torch and transformers.
"""

from .._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "ditto": ("DittoLoss", "DittoTrainer", "DittoTrainerMixin"),
        "ditto_data": ("DittoDataCollator", "sentence_end_ids"),
    },
)
