"""The one place that knows how versions of transformers, kernels and torch differ.

It also travels with exported models (flattened to `compat.py`), so it imports nothing of undersong.
"""

try:
    # Not from transformers.integrations: transformers 5.23 degrades that decorator to a no-op beside kernels 0.17.
    from kernels import use_kernel_forward_from_hub
except ImportError:  # an exported model runs without the `kernels` package; its layers then keep their torch forward

    def use_kernel_forward_from_hub(layer_name):
        """Stand-in for `kernels.use_kernel_forward_from_hub`: leaves the class as it is, but remembers the name."""

        def decorate(cls):
            cls.kernel_layer_name = layer_name
            return cls

        return decorate


__all__ = ["use_kernel_forward_from_hub"]
