"""The one operator library of this package: every file registers its operators here."""

import re

import torch

# The package may be loaded under several names at once; each name gets operators of its own.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])
OPERATORS = getattr(torch.ops, NAMESPACE)


def register(name, schema, run, fake, differentiate=None, save=None):
    """Makes `run` the operator `torch.ops.<package>.<name>`, once in a process, and returns it.

    schema: the arguments and results, as `torch.library` writes them. fake: shapes of the results. differentiate,
    save: `backward` and `setup_context` of `torch.library.register_autograd`.
    """
    if not hasattr(OPERATORS, "library"):  # registrations live as long as this object
        OPERATORS.library = torch.library.Library(NAMESPACE, "DEF")
        OPERATORS.names = set()
    if name not in OPERATORS.names:
        library = OPERATORS.library
        library.define(name + schema)
        for key in ("CUDA", "CPU"):  # CPU: Triton's interpreter
            library.impl(name, run, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        if differentiate is not None:
            torch.library.register_autograd(f"{NAMESPACE}::{name}", differentiate, setup_context=save, lib=library)
        OPERATORS.names.add(name)
    return getattr(OPERATORS, name)
