"""Architectures, a folder each, and what they share."""

# Before any configuration here: loading it makes the registry import them all, and one that derives from a
# configuration of transformers would otherwise load it half-way through its own import.
import transformers.models.auto.configuration_auto  # noqa: F401
