"""Tours, hulls, triangulations and orders that are valid by construction, from a pointer network."""

from undersong.generation.pointer_generate import generate_pointers


def generate(inputs=None, *, model, task=None, strict_geometry=None, **arguments):
    """`model.generate()` under the rules of a task.

    Args:
        task: "tour", "permutation", "hull" or "triangulation"; by default `generation_config.task`.
        strict_geometry: hulls must be convex as well; by default as `generation_config` says.
        arguments: of `model.generate()`.
    """
    return generate_pointers(model, inputs, task=task, strict_geometry=strict_geometry, **arguments)
