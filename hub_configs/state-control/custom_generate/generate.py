"""Generation with bounded states, after "Stuffed Mamba" (arXiv 2410.07145), for Mamba-2 beyond its training length."""

from undersong.modeling.state_control import state_control as controlled


def generate(inputs=None, *, model, state_control=None, **arguments):
    """`model.generate()` under a state control.

    Args:
        state_control: a dictionary of `StateControlConfig`'s fields; None for the one that the model carries, in
            `generation_config.state_control`.
        arguments: of `model.generate()`.
    """
    with controlled(model, state_control):
        return type(model).generate(model, inputs, **arguments)
