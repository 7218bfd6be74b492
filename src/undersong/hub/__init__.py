"""Everything between a model and the Hub: export, cards, publishing, kernel builds, and a Hub server for tests.

The modules named like their function (`export`, `publish`, `build_kernel`) are imported here, so that
`undersong.hub.export` is always the function. None of them loads torch or transformers before it is called.
"""

from .build_kernel import build_kernel
from .cards import model_card
from .custom_generate import export_custom_generate
from .export import export
from .publish import Published, publish

__all__ = ["LocalHub", "Published", "build_kernel", "export", "export_custom_generate", "model_card", "publish"]


def __getattr__(name):
    if name != "LocalHub":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .local_hub import LocalHub

    return LocalHub
