"""Sequential recommenders: a history goes in, the next item comes out."""

from ..architecture import Architecture

ROWS: list[Architecture] = []
