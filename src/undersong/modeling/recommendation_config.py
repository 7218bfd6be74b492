"""What the configurations of recommenders by item id share: special ids that follow from the catalogue, the loss."""

from typing import Literal

LossType = Literal["ce", "sampled_softmax", "bce", "gbce"]
NegativeSampler = Literal["uniform", "popularity"]


def set_special_ids(config):
    """Fills `vocab_size` and `mask_token_id` where they are None: padding, `num_items` items, mask."""
    config.vocab_size = config.num_items + 2 if config.vocab_size is None else config.vocab_size
    config.mask_token_id = config.num_items + 1 if config.mask_token_id is None else config.mask_token_id


def check_recommendation(config):
    """Raises a ValueError that names the field, its value and the fix."""
    if config.num_items < 1:
        raise ValueError(f"num_items ({config.num_items}) must be at least 1; use the size of the catalogue.")
    ids = {"pad_token_id": 0, "mask_token_id": config.num_items + 1, "vocab_size": config.num_items + 2}
    for name, want in ids.items():
        if getattr(config, name) != want:
            raise ValueError(
                f"{name} ({getattr(config, name)}) must be {want}: with num_items ({config.num_items}), 0 is padding,"
                f" 1..{config.num_items} are the items and {config.num_items + 1} is the mask; leave it out."
            )
    if not 0 <= config.gbce_t <= 1:
        raise ValueError(f"gbce_t ({config.gbce_t}) must lie in [0, 1]; use 0.75, or 0 for plain BCE.")
    if config.num_negatives < 1:
        raise ValueError(f"num_negatives ({config.num_negatives}) must be at least 1; use 256.")
    if not 0 <= config.label_smoothing < 1:
        raise ValueError(f"label_smoothing ({config.label_smoothing}) must lie in [0, 1); use 0.1, or 0 for none.")
    if config.label_smoothing and config.loss_type != "ce":
        raise ValueError(
            f"label_smoothing ({config.label_smoothing}) needs the scores of all items, which loss_type"
            f" ({config.loss_type!r}) does not make; use loss_type='ce' or label_smoothing=0."
        )
    if config.negative_sampler != "uniform" and config.loss_type != "sampled_softmax":
        raise ValueError(
            f"negative_sampler ({config.negative_sampler!r}) is corrected for by loss_type='sampled_softmax' only, not"
            f" by {config.loss_type!r}; use negative_sampler='uniform'."
        )


__all__ = ["LossType", "NegativeSampler", "check_recommendation", "set_special_ids"]
