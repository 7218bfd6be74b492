"""Molecules made by rules, with a question that no atom and no bond answers alone.

Every molecule has one donor (a nitrogen) and one acceptor (a carbonyl oxygen) at the ends of a chain of carbons, side
chains and rings. In a conjugated chain single and double bonds alternate. Somewhere every molecule has one double bond
less than that: either on the chain between donor and acceptor, which are then not conjugated with each other, or on a
side chain. So both classes have the same atoms, bonds and neighbourhoods, and what counts is what lies between two
places.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

__all__ = ["ATOMS", "BONDS", "SyntheticMolecules"]

ATOMS = ("C", "N", "O", "S", "F")
BONDS = ("single", "double", "aromatic")
_SINGLE, _DOUBLE, _AROMATIC = range(3)


class SyntheticMolecules(Dataset):
    """Conjugated or not? Rows for `PLSTMGraphCollator`; row i depends on `seed` and i alone.

    Atoms are numbered as a line notation does: from an atom at an end, along the bonds, branch after branch.

    Args:
        size: number of molecules.
        distance: fewest and most bonds between donor and acceptor, both even, from 4.
        seed: of all rows.

    Rows:
        `node_features` `[atoms, 5]`, one of `ATOMS`; `edge_index` `[2, 2 * bonds]`, every bond in both directions;
        `edge_attr` `[2 * bonds, 3]`, one of `BONDS`; `labels`, 1 if donor and acceptor are conjugated, else 0.

    Raises:
        ValueError: a distance for which there is no molecule.

    >>> molecules = SyntheticMolecules(100, seed=0)
    >>> sorted(molecules[0]), sum(int(row["labels"]) for row in molecules)
    (['edge_attr', 'edge_index', 'labels', 'node_features'], 50)
    """

    def __init__(self, size: int, *, distance: tuple[int, int] = (4, 10), seed: int = 0):
        low, high = distance
        if not 4 <= low <= high or low % 2 or high % 2:
            raise ValueError(
                f"distance ({low}, {high}) must be two even numbers from 4 that do not fall, because a chain from a"
                " nitrogen to a carbonyl oxygen has as many single as double bonds; use (4, 10)."
            )
        self.size, self.distance, self.seed = size, (low, high), seed

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(f"index ({index}) must lie in [0, {self.size}).")
        conjugated = index % 2
        molecule = _Molecule(np.random.default_rng([self.seed, index]), self.distance, conjugated)
        atoms, bonds = molecule.numbered()
        ends = torch.tensor([(a, b) for a, b, _ in bonds]).T
        kinds = torch.tensor([kind for _, _, kind in bonds])
        return {
            "node_features": torch.eye(len(ATOMS))[atoms],
            "edge_index": torch.cat([ends, ends.flip(0)], 1),
            "edge_attr": torch.eye(len(BONDS))[torch.cat([kinds, kinds])],
            "labels": torch.tensor(conjugated),
        }


class _Molecule:
    def __init__(self, rng, distance, conjugated):
        self.rng, self.atoms, self.bonds = rng, [], []
        length = 2 * rng.integers(distance[0] // 2, distance[1] // 2 + 1)
        donor = self.atom("N")
        chain = self.chain(donor, int(length) - 1)
        self.bond(chain[-1], self.atom("O"), _DOUBLE)
        main = range(len(self.bonds))
        # side chains leave from different atoms of the main chain, one of them at least
        starts = rng.permutation(chain[1:-1] if len(chain) > 2 else chain[:1])[: rng.integers(1, 3)]
        for start in starts:
            length = 2 * rng.integers(distance[0] // 2, distance[1] // 2 + 1)
            self.end(self.chain(int(start), int(length))[-1])
        side = range(len(main), len(self.bonds))
        doubles = [bond for bond in (main if not conjugated else side) if self.bonds[bond][2] == _DOUBLE]
        # the carbonyl bond makes the acceptor; it stays
        doubles = [bond for bond in doubles if self.atoms[self.bonds[bond][1]] == ATOMS.index("C")]
        chosen = doubles[rng.integers(len(doubles))]
        self.bonds[chosen] = (*self.bonds[chosen][:2], _SINGLE)

    def atom(self, symbol):
        self.atoms.append(ATOMS.index(symbol))
        return len(self.atoms) - 1

    def bond(self, a, b, kind):
        self.bonds.append((a, b, kind))

    def chain(self, start, length):
        """Carbons behind `start`, bonds single and double in turn; returns them."""
        carbons = []
        for step in range(length):
            carbons.append(self.atom("C"))
            self.bond(start, carbons[-1], _DOUBLE if step % 2 else _SINGLE)
            start = carbons[-1]
        return carbons

    def end(self, atom):
        """A ring, a fluorine or nothing at the end of a side chain."""
        kind = self.rng.integers(4)
        if kind == 0:
            self.bond(atom, self.atom("F"), _SINGLE)
        elif kind < 3:  # benzene or thiophene
            ring = [self.atom("C") for _ in range(6)] if kind == 1 else [self.atom(x) for x in "CSCCC"]
            self.bond(atom, ring[0], _SINGLE)
            for a, b in zip(ring, ring[1:] + ring[:1], strict=True):
                self.bond(a, b, _AROMATIC)

    def numbered(self):
        """Atoms and bonds, atoms in the order of a walk into depth from an end."""
        neighbours = [[] for _ in self.atoms]
        for a, b, _ in self.bonds:
            neighbours[a].append(b)
            neighbours[b].append(a)
        ends = [atom for atom, near in enumerate(neighbours) if len(near) == 1]
        waiting, number = [ends[self.rng.integers(len(ends))]], {}
        while waiting:
            atom = waiting.pop()
            if atom not in number:
                number[atom] = len(number)
                waiting.extend(self.rng.permutation(neighbours[atom]).tolist())
        order = sorted(number, key=number.get)
        return [self.atoms[atom] for atom in order], [(number[a], number[b], kind) for a, b, kind in self.bonds]
