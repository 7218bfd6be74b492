"""The operators of this package, and the shortest way to each. Every package has the same file."""

import re

import torch
from torch.autograd.function import once_differentiable

# The package may be loaded under several names at once; each name gets operators of its own.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])
OPERATORS = getattr(torch.ops, NAMESPACE)


class Operator:
    """A function that is also `torch.ops.<package>.<name>`, called the shortest way on which nobody overlooks it.

    torch.compile, functorch and tensor subclasses have to see the operator. Autograd is as well served by a Function,
    through which the host comes in a third of the time; and where no gradient is recorded, nobody has to see anything.
    """

    def __init__(self, name, run, differentiate, save):
        self.operator, self.run, self.function = getattr(OPERATORS, name), run, None
        if differentiate is not None:

            def forward(ctx, *args):
                output = run(*args)
                save(ctx, args, output)
                return output

            methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(differentiate))}
            self.function = type(name, (torch.autograd.Function,), methods)

    def __call__(self, *args):
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.operator(*args)
        recorded = False
        for x in args:
            if isinstance(x, torch.Tensor):
                if type(x) is not torch.Tensor and type(x) is not torch.nn.Parameter:
                    return self.operator(*args)
                recorded |= x.requires_grad
        if not (recorded and torch.is_grad_enabled()):
            return self.run(*args)
        return self.operator(*args) if self.function is None else self.function.apply(*args)


def register(name, schema, run, fake, differentiate=None, save=None):
    """Makes `run` the operator `torch.ops.<package>.<name>`, once in a process, and returns an `Operator`.

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
    return Operator(name, run, differentiate, save)


def records_gradients(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
