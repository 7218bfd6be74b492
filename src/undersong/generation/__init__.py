"""Decoding: logits processors for `model.generate(logits_processor=[...])`."""

from .repetition_cap import SelfReinforcementCapLogitsProcessor
from .typical import LocallyTypicalLogitsWarper

__all__ = ["LocallyTypicalLogitsWarper", "SelfReinforcementCapLogitsProcessor"]
