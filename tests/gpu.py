"""What the tests on a GPU share."""

import contextlib
import warnings

import torch


@contextlib.contextmanager
def no_waiting():
    """Raises wherever the host would wait for the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
