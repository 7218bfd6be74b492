"""pLSTM: linear recurrences on sequences, grids and graphs."""

from ..architecture import Architecture

ROWS: list[Architecture] = []
