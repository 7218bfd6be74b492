"""How often a sequence repeats itself at its end: the run-length recurrence behind the grammar repetition penalty.

m_r, the number of final items that equal the item r places before them, obeys m_r <- m_r + 1 if the new item equals
the one r places back, else 0. The sequence then ends with 1 + m_r // r copies of its last r items. One new item costs
O(max_period), where the suffix array of Dong et al. (RPG, arXiv 2505.10402) is built anew for every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_REMEMBERED = 32  # states kept for stepping back; assisted decoding drops fewer tokens than this at a time


def best_period(runs: Sequence[int], min_copies: int) -> tuple[int, int] | None:
    """The repetition that covers most of the end: (period, copies), or None if nothing is there `min_copies` times.

    Args:
        runs: m_1, m_2, ...
        min_copies: at least 2.

    Of equal cover the smallest period wins, so a multiple of a period never does.

    >>> best_period([0, 4, 0, 2], min_copies=3)  # ...ababab: m_2 = 4, m_4 = 2
    (2, 3)
    >>> best_period([0, 4, 0, 2], min_copies=4)
    """
    best, cover = None, 0
    for period, run in enumerate(runs, 1):
        copies = run // period + 1
        if copies >= min_copies and period * copies > cover:
            best, cover = (period, copies), period * copies
    return best


class TokenPeriods:
    """m_1 .. m_max_period of a growing array of token ids, all periods in one vector operation per token.

    >>> periods = TokenPeriods(max_period=4)
    >>> ids = np.array([7, 1, 2, 1, 2, 1, 2])
    >>> for length in range(1, len(ids) + 1):
    ...     periods.append(ids, length)
    >>> periods.best(min_copies=2)
    (2, 3)
    """

    def __init__(self, max_period: int = 256):
        self.max_period = max_period
        self._periods = np.arange(1, max_period + 1, dtype=np.int32)
        self._states = [(0, np.zeros(max_period, dtype=np.int32))]  # (length, runs), the latest last

    def append(self, ids: np.ndarray, length: int) -> None:
        """Takes in `ids[length - 1]`; the items before it were appended or given to `restart` earlier."""
        runs = self._states[-1][1]
        new = np.zeros_like(runs)
        reach = min(self.max_period, length - 1)
        if reach:
            past = ids[length - 1 - reach : length - 1][::-1]  # past[r - 1] is the item r places back
            np.multiply(runs[:reach] + 1, past == ids[length - 1], out=new[:reach])
        self._states.append((length, new))
        del self._states[:-_REMEMBERED]

    def restart(self, ids: np.ndarray, length: int) -> None:
        """State of `ids[:length]`, from memory if it was passed lately, else counted from the end."""
        while self._states and self._states[-1][0] > length:
            self._states.pop()
        if self._states and self._states[-1][0] == length:
            return
        runs = np.zeros(self.max_period, dtype=np.int32)
        for period in range(1, min(self.max_period, length - 1) + 1):
            differs = ids[period:length] != ids[: length - period]
            if not differs[-1]:
                last = differs[::-1].argmax()
                runs[period - 1] = last if differs[-1 - last] else length - period
        self._states = [(length, runs)]

    def best(self, min_copies: int) -> tuple[int, int] | None:
        """As `best_period`."""
        runs = self._states[-1][1]
        copies = runs // self._periods + 1
        cover = np.where(copies >= min_copies, copies * self._periods, 0)
        index = int(cover.argmax())  # the first of equals
        return (index + 1, int(copies[index])) if cover[index] else None
