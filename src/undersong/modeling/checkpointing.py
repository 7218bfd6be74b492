"""What models whose routers remember ask of gradient checkpointing."""


def refuse_reentrant(layer):
    """Raises where a layer is checkpointed with `use_reentrant=True`: its forward pass then leaves no graph behind, so
    that router logits, whose losses are computed outside, and states that leave a layer beside its output get none."""
    if not (layer.training and layer.gradient_checkpointing):
        return
    function = layer._gradient_checkpointing_func
    if getattr(function, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            "use_reentrant (True) loses gradients of the router; pass"
            " gradient_checkpointing_kwargs={'use_reentrant': False}."
        )


__all__ = ["refuse_reentrant"]
