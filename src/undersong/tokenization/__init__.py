"""From the outside world to model ids and back: vocabularies of items and what reads the text of items.

Names are imported when they are first used.
"""

from .._lazy import lazy_names

__all__, __getattr__ = lazy_names(__name__, {"item_vocab": ("ItemVocab",)})
