"""A kernel source small enough to read: y = x * factor in Triton, with its backward; tests write it to tmp_path."""

BUILD = """
[general]
name = "toy-scale"
version = 3
edition = 5
license = "Apache-2.0"
backends = ["cuda", "rocm"]

[general.hub]
repo-id = "someone/toy-scale"

[torch-noarch]
pyext = ["py", "json"]
"""

INIT = """
from . import layers
from .scale import scale

__all__ = ["layers", "scale"]
"""

SCALE = """
import torch
import triton
import triton.language as tl

CALLS = []


@triton.jit
def _scale_kernel(x, y, factor, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < length) * factor, mask=at < length)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        x = x.contiguous()
        y = torch.empty_like(x)
        _scale_kernel[(triton.cdiv(x.numel(), 64),)](x, y, factor, x.numel(), BLOCK=64)
        return y

    @staticmethod
    def backward(ctx, upstream):
        return _Scale.apply(upstream, ctx.factor), None


def scale(x, factor):
    CALLS.append(tuple(x.shape))
    return _Scale.apply(x, factor)
"""

LAYERS = '''
from torch import Tensor, nn

from .scale import scale


class ToyScale(nn.Module):
    """Layer."""

    bias: Tensor
    has_backward: bool = True
    can_torch_compile = False

    def forward(self, x, factor=2.0):
        return scale(x, factor)
'''

FILES = {
    "build.toml": BUILD,
    "CARD.md": "# toy-scale\n",
    "torch-ext/toy_scale/__init__.py": INIT,
    "torch-ext/toy_scale/scale.py": SCALE,
    "torch-ext/toy_scale/layers.py": LAYERS,
    "torch-ext/toy_scale/table.json": "{}\n",
    "torch-ext/toy_scale/notes.txt": "not shipped\n",
}


def write_toy(folder, **changes):
    """Writes the source; `changes` maps a file (by its stem, or `build`) to a function of its text."""
    for path, text in FILES.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        change = changes.get(target.stem.strip("_"))
        target.write_text(change(text) if change else text)
    return folder
