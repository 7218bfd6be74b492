"""The rows, by family; adding an architecture is a folder under `modeling/` and a row in one of these files."""

from ..architecture import Architecture
from . import additive, plstm, pointers, recommendation, recurrent_router, state_space

_FAMILIES = (additive, state_space, pointers, recurrent_router, recommendation, plstm)
ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for family in _FAMILIES for row in family.ROWS}
