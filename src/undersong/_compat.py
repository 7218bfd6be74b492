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


def register_recorded_outputs(model):
    """Tells transformers what a model can return beside its output (router logits, hidden states), after its class was
    exchanged: it notes that when a model is built, by the class's name in 5.22 and by the model since 5.23."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    key = str(type(model)) if type(_CAN_RECORD_REGISTRY) is dict else model
    _CAN_RECORD_REGISTRY[key] = model._can_record_outputs


__all__ = ["register_recorded_outputs", "use_kernel_forward_from_hub"]
