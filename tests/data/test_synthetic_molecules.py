"""What the molecules are: valid, balanced, and different only in what lies between donor and acceptor."""

import re

import pytest
import torch

from undersong.data.synthetic_molecules import ATOMS, BONDS, SyntheticMolecules

VALENCE = {"C": 4, "N": 3, "O": 2, "S": 2, "F": 1}
ORDER = {"single": 1, "double": 2, "aromatic": 1.5}


def read(row):
    """(symbols, {(a, b): bond}) of a row, each bond once."""
    atoms = [ATOMS[kind] for kind in row["node_features"].argmax(1).tolist()]
    half = row["edge_index"].shape[1] // 2
    kinds = row["edge_attr"][:half].argmax(1).tolist()
    pairs = row["edge_index"][:, :half].T.tolist()
    return atoms, {tuple(pair): BONDS[kind] for pair, kind in zip(pairs, kinds, strict=True)}


def path(bonds, start, goal):
    """Bonds along the path that comes first in a walk in breadth."""
    near = {}
    for (a, b), kind in bonds.items():
        near.setdefault(a, []).append((b, kind))
        near.setdefault(b, []).append((a, kind))
    seen, queue = {start}, [(start, [])]
    for atom, kinds in queue:
        if atom == goal:
            return kinds
        for other, kind in near[atom]:
            if other not in seen:
                seen.add(other)
                queue.append((other, [*kinds, kind]))
    raise AssertionError("the molecule falls apart")


ROWS = [SyntheticMolecules(40, seed=3, distance=(4, 12))[index] for index in range(40)]


@pytest.mark.parametrize("row", ROWS, ids=range(40))
def test_the_label_is_what_lies_between_donor_and_acceptor(row):
    atoms, bonds = read(row)
    assert atoms.count("N") == atoms.count("O") == 1
    between = path(bonds, atoms.index("N"), atoms.index("O"))
    assert 4 <= len(between) <= 12
    assert between[::2] == ["single"] * (len(between) // 2)
    assert between[1::2].count("single") == 1 - int(row["labels"])
    assert between[-1] == "double"


@pytest.mark.parametrize("row", ROWS, ids=range(40))
def test_molecules_are_connected_and_keep_to_valences(row):
    atoms, bonds = read(row)
    used = [0.0] * len(atoms)
    for (a, b), kind in bonds.items():
        used[a] += ORDER[kind]
        used[b] += ORDER[kind]
    assert all(used[atom] <= VALENCE[symbol] + (symbol == "S") for atom, symbol in enumerate(atoms))
    for atom in range(1, len(atoms)):
        path(bonds, 0, atom)


@pytest.mark.parametrize("row", ROWS[:10], ids=range(10))
def test_every_atom_but_the_first_has_a_neighbour_before_it(row):
    """The numbering of a walk in depth."""
    atoms, bonds = read(row)
    assert {max(pair) for pair in bonds} == set(range(1, len(atoms)))


def test_both_classes_have_the_same_bonds_and_atoms_on_average():
    rows = list(SyntheticMolecules(2000, seed=5))
    labels = torch.stack([row["labels"] for row in rows])
    counts = torch.stack([torch.cat([row["node_features"].sum(0), row["edge_attr"].sum(0) / 2]) for row in rows])
    assert labels.float().mean() == 0.5
    first, second = counts[labels == 0], counts[labels == 1]
    error = (first.var(0) / 1000 + second.var(0) / 1000).sqrt().clamp(min=1e-9)
    assert ((first.mean(0) - second.mean(0)).abs() <= 4 * error).all()


def test_rows_depend_on_seed_and_index_alone():
    one, other = SyntheticMolecules(5, seed=1), SyntheticMolecules(9, seed=1)
    for name, value in one[3].items():
        assert torch.equal(other[3][name], value)
    shapes = {SyntheticMolecules(5, seed=seed)[3]["edge_attr"].shape for seed in range(8)}
    assert len(shapes) > 1


@pytest.mark.parametrize(
    ("distance", "message"),
    [((2, 6), "distance (2, 6)"), ((4, 7), "distance (4, 7)"), ((8, 6), "distance (8, 6) must be two even numbers")],
)
def test_a_distance_without_molecules_is_refused(distance, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SyntheticMolecules(1, distance=distance)


def test_an_index_beyond_the_end_ends_iteration():
    with pytest.raises(IndexError, match=re.escape("index (3) must lie in [0, 3)")):
        SyntheticMolecules(3)[3]
