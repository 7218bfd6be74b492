"""One table, a row per architecture, and what makes the ecosystem know it.

Auto registration, PEFT's target modules, cards, the command line and the common tests all read `ARCHITECTURES`.
"""

from .architecture import Architecture
from .hooks import Override, is_stock_head, register, register_models
from .rows import ARCHITECTURES

__all__ = ["ARCHITECTURES", "Architecture", "Override", "is_stock_head", "register", "register_models"]
