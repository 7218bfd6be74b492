"""Constrained decoding: random scores over a thousand instances, every rule checked on its own, beams, refusals."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, SuppressTokensAtBeginLogitsProcessor

from undersong import PointerNetworkConfig, PointerNetworkForConditionalGeneration
from undersong.generation.pointer_generate import generate_pointers
from undersong.generation.pointer_processors import (
    TASKS,
    HullLogitsProcessor,
    PermutationLogitsProcessor,
    TriangleLogitsProcessor,
    decoding_steps,
    pointer_processors,
)
from undersong.metrics.hull.measures import is_simple, polygon_area

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(rows, n_max, seed, left=False):
    """Random points, 1 to n_max of them a row, with padding on the right or the left."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(rows, n_max, 2, generator=generator)
    counts = torch.randint(1, n_max + 1, (rows, 1), generator=generator)
    counts[: min(rows, n_max), 0] = torch.arange(1, min(rows, n_max) + 1)  # every size occurs
    place = torch.arange(n_max)
    mask = place >= n_max - counts if left else place < counts
    return points, mask.long()


def decode(processors, mask, steps, beams=1, seed=0, scale=3.0):
    """A plain loop that samples from random scores: `[batch * beams, steps]` ids without the 0 in front."""
    generator = torch.Generator().manual_seed(seed)
    rows, n = mask.shape[0] * beams, mask.shape[1]
    ids = torch.zeros(rows, 1, dtype=torch.long)
    for _ in range(steps):
        scores = scale * torch.randn(rows, n + 1, generator=generator)
        scores = processors(ids, scores)
        assert torch.isfinite(scores).any(1).all()
        ids = torch.cat([ids, torch.multinomial(scores.softmax(1), 1, generator=generator)], 1)
    assert (ids[:, -1] == 0).all()  # within the steps of the task every row has ended
    return ids[:, 1:]


def cut(row):
    """Ids up to the 0, which is there and followed by nothing but zeros."""
    row = row.tolist()
    end = row.index(0)
    assert not any(row[end:])
    return row[:end]


def items(mask):
    return [[j + 1 for j, there in enumerate(row) if there] for row in mask.tolist()]


def check_tour(ids, valid, _):
    assert sorted(ids) == valid
    assert ids[0] == valid[0]


def check_permutation(ids, valid, _):
    assert sorted(ids) == valid


def check_hull(ids, valid, _):
    assert ids[0] == ids[-1]
    assert len(set(ids[:-1])) == len(ids) - 1 >= min(3, len(valid))
    assert set(ids) <= set(valid)


def check_convex(ids, valid, points):
    check_hull(ids, valid, points)
    if len(valid) >= 3:
        corners = points[np.array(ids[:-1]) - 1]
        assert is_simple(corners)
        assert polygon_area(corners) > 0
        before, after = np.roll(corners, 1, 0), np.roll(corners, -1, 0)
        u, v = corners - before, after - corners
        assert (u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0] > 0).all()


def check_triangles(ids, valid, _):
    triples = [tuple(ids[i : i + 3]) for i in range(0, len(ids), 3)]
    assert len(ids) % 3 == 0
    assert len(set(triples)) == len(triples)
    assert all(a < b < c for a, b, c in triples)
    assert set(ids) <= set(valid)
    assert (len(valid) < 3) == (not triples)
    assert len(triples) <= max(2 * len(valid) - 5, 0)


RULES = [
    ("tour", False, check_tour),
    ("permutation", False, check_permutation),
    ("hull", False, check_hull),
    ("hull", True, check_convex),
    ("triangulation", False, check_triangles),
]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(
    ("task", "strict", "check"), RULES, ids=["tour", "permutation", "hull", "convex", "triangles"]
)
def test_a_thousand_random_answers_are_valid(task, strict, check, left):
    points, mask = batch(1000, 9, seed=int(left), left=left)
    processors = pointer_processors(task, points, mask, strict_geometry=strict)
    answers = decode(processors, mask, decoding_steps(task, 9), beams=2)
    valid = items(mask)
    for row, ids in enumerate(answers):
        check(cut(ids), valid[row // 2], points[row // 2].numpy().astype(float))


@pytest.mark.parametrize("task", TASKS)
def test_no_valid_answer_is_out_of_reach(task):
    """All answers that the processors allow for four points, against all answers that obey the rules."""
    square = torch.tensor([[[0.0, 0.0], [1.0, 0.1], [0.9, 1.0], [0.1, 0.8]]])
    processors = pointer_processors(task, square)
    reached, open_ = set(), [()]
    while open_:
        prefix = open_.pop()
        scores = processors(torch.tensor([[0, *prefix]]), torch.zeros(1, 5))
        for id_ in scores[0].isfinite().nonzero()[:, 0].tolist():
            if id_ == 0:
                reached.add(prefix)
            else:
                open_.append((*prefix, id_))
    orders = [p for k in (3, 4) for p in itertools.permutations(range(1, 5), k)]
    triples = list(itertools.combinations(range(1, 5), 3))
    expected = {
        "tour": {p for p in orders if len(p) == 4 and p[0] == 1},
        "permutation": {p for p in orders if len(p) == 4},
        "hull": {(*p, p[0]) for p in orders},
        "triangulation": {sum(p, ()) for k in (1, 2, 3) for p in itertools.permutations(triples, k)},
    }
    assert reached == expected[task]


def test_strict_hulls_are_all_convex_polygons():
    """On a square with a point inside: exactly the counter-clockwise convex polygons, from every corner."""
    points = torch.tensor([[[0.0, 0.0], [1.0, 0.1], [0.9, 1.0], [0.1, 0.8], [0.4, 0.45]]])
    processor = HullLogitsProcessor(torch.ones(1, 5), points, strict_geometry=True)
    reached, open_ = set(), [()]
    while open_:
        prefix = open_.pop()
        scores = processor(torch.tensor([[0, *prefix]]), torch.zeros(1, 6))
        for id_ in scores[0].isfinite().nonzero()[:, 0].tolist():
            (reached.add(prefix) if id_ == 0 else open_.append((*prefix, id_)))

    def convex(corners):
        c = points[0].numpy()[np.array(corners) - 1].astype(float)
        u, v = c - np.roll(c, 1, 0), np.roll(c, -1, 0) - c
        return is_simple(c) and (u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0] > 0).all()

    polygons = [p for k in (3, 4, 5) for p in itertools.permutations(range(1, 6), k)]
    assert reached == {(*p, p[0]) for p in polygons if convex(p)}


@pytest.mark.parametrize("seed", range(3))
def test_strict_hulls_never_lead_into_a_dead_end_with_points_on_lines(seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(0, 3, (300, 7, 2), generator=generator).float()  # a small grid: lines and double points
    mask = torch.ones(300, 7, dtype=torch.long)
    processor = HullLogitsProcessor(mask, points, strict_geometry=True)
    answers = decode(processor, mask, decoding_steps("hull", 7), seed=seed)
    flat = 0
    for place, row in zip(points.numpy().astype(float), answers, strict=True):
        ids = cut(row)
        if np.linalg.matrix_rank(place - place[0]) < 2:
            flat += 1
            check_hull(ids, list(range(1, 8)), place)
        else:
            check_convex(ids, list(range(1, 8)), place)
    assert flat < 300


def test_points_on_one_line_follow_the_plain_rules():
    line = torch.linspace(0, 1, 5)[None, :, None].expand(40, 5, 2)
    mask = torch.ones(40, 5, dtype=torch.long)
    answers = decode(HullLogitsProcessor(mask, line, strict_geometry=True), mask, 7)
    plain = decode(HullLogitsProcessor(mask), mask, 7)
    assert torch.equal(answers, plain)
    assert {len(cut(row)) for row in answers} == {4, 5, 6}


def test_one_and_two_items():
    expected = {
        "tour": {1: [1, 0], 2: [1, 2, 0]},
        "permutation": {1: [1, 0], 2: [2, 1, 0]},
        "hull": {1: [1, 1, 0], 2: [2, 1, 2, 0]},
        "triangulation": {1: [0], 2: [0]},
    }
    for task, answers in expected.items():
        for n, answer in answers.items():
            processors = pointer_processors(task, torch.rand(1, n, 2))
            ids = torch.zeros(1, 1, dtype=torch.long)
            for _ in answer:
                scores = processors(ids, torch.arange(n + 1.0).unsqueeze(0))  # the highest id wins
                ids = torch.cat([ids, scores.argmax(1, keepdim=True)], 1)
            assert ids[0, 1:].tolist() == answer, (task, n)
            assert len(answer) <= decoding_steps(task, n)


@pytest.mark.parametrize(("task", "strict"), [(task, strict) for task, strict, _ in RULES])
def test_rows_that_broke_the_rules_may_still_go_on(task, strict):
    """Beams of score -inf hold anything; they must not turn scores into NaN."""
    points, mask = batch(50, 5, seed=3)
    processors = pointer_processors(task, points, mask, strict_geometry=strict)
    generator = torch.Generator().manual_seed(0)
    for length in range(9):
        ids = torch.cat([torch.zeros(50, 1).long(), torch.randint(0, 6, (50, length), generator=generator)], 1)
        scores = processors(ids, torch.zeros(50, 6))
        assert scores.isfinite().any(1).all()
        ended = (ids[:, 1:] == 0).any(1)
        assert scores[ended].isfinite().nonzero()[:, 1].eq(0).all()


def test_rows_are_expanded_in_the_order_of_beams():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    scores = PermutationLogitsProcessor(mask)(torch.zeros(6, 1).long(), torch.zeros(6, 4))
    assert scores.isfinite().int().tolist() == [[0, 1, 1, 0]] * 3 + [[0, 0, 1, 1]] * 3


def test_a_mask_that_is_laid_out_for_beams_already_goes_with_points_that_are_not():
    points, mask = batch(6, 5, seed=0)
    prefix = torch.randint(1, 6, (24, 3), generator=torch.Generator().manual_seed(0))
    ids, scores = torch.nn.functional.pad(prefix, (1, 0)), torch.zeros(24, 6)
    short = HullLogitsProcessor(mask, points, strict_geometry=True)(ids, scores)
    long = HullLogitsProcessor(mask.repeat_interleave(4, 0), points, strict_geometry=True)(ids, scores)
    assert torch.equal(short, long)


def test_scores_keep_dtype_and_order():
    scores = torch.tensor([[0.0, 0.0, 2.0, 1.0, 0.0]]).bfloat16()
    out = TriangleLogitsProcessor(torch.ones(1, 4))(torch.tensor([[0, 1]]), scores)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out[0, 2:4], scores[0, 2:4].log_softmax(0))  # 2 or 3: a third id must follow
    assert out[0, [0, 1, 4]].isneginf().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pointer_processors("tsp", torch.rand(1, 3, 2)),
            r"task \('tsp'\) must be one of tour, permutation, hull",
        ),
        (lambda: decoding_steps("tsp", 3), r"task \('tsp'\) must be one of tour, permutation, hull"),
        (lambda: pointer_processors("tour"), r"input_values and attention_mask \(None\) say nothing of the batch"),
        (
            lambda: pointer_processors("tour", torch.rand(1, 3, 2), strict_geometry=True),
            r"strict_geometry \(True\) is a rule for hulls, not for task 'tour'",
        ),
        (
            lambda: HullLogitsProcessor(torch.ones(1, 3), strict_geometry=True),
            r"input_values \(None\) must be given because strict_geometry",
        ),
        (
            lambda: HullLogitsProcessor(torch.ones(1, 3), torch.rand(1, 3, 5), strict_geometry=True),
            r"input_values \(\[1, 3, 5\]\) must be \[1, 3, 2\] because attention_mask is \[1, 3\]",
        ),
        (
            lambda: HullLogitsProcessor(torch.ones(3, 3), torch.rand(2, 3, 2), strict_geometry=True),
            r"input_values \(\[2, 3, 2\]\) must be \[3, 3, 2\] because",
        ),
        (lambda: TriangleLogitsProcessor(torch.ones(3)), r"attention_mask \(\[3\]\) must be \[batch, n\]"),
        (
            lambda: PermutationLogitsProcessor(torch.tensor([[1, 0], [0, 0]])),
            r"attention_mask\[1\] must have an item; drop the empty row",
        ),
        (
            lambda: PermutationLogitsProcessor(torch.ones(2, 3))(torch.zeros(3, 1).long(), torch.zeros(3, 4)),
            r"scores \(\[3, 4\]\) must be \[2 \* beams, 4\] because attention_mask is \[2, 3\]",
        ),
        (
            lambda: PermutationLogitsProcessor(torch.ones(2, 3))(torch.zeros(2, 1).long(), torch.zeros(2, 3)),
            r"scores \(\[2, 3\]\) must be \[2 \* beams, 4\]",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # weights that tell items apart; those of the paper's start do not
    config = PointerNetworkConfig(hidden_size=8, initializer_range=2.0)
    return PointerNetworkForConditionalGeneration(config).eval()


MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "many beams": {"num_beams": 12, "num_return_sequences": 12},  # more than some rows have answers
    "beam sample": {"num_beams": 3, "do_sample": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("task", "strict", "check"), RULES, ids=["tour", "permutation", "hull", "convex", "triangles"]
)
def test_generate_gives_valid_answers(model, task, strict, check, mode):
    points, mask = batch(8, 5, seed=1, left=True)
    torch.manual_seed(0)
    out = generate_pointers(
        model,
        points,
        attention_mask=mask,
        task=task,
        strict_geometry=strict,
        return_dict_in_generate=True,
        output_scores=True,
        **MODES[mode],
    )
    each = len(out.sequences) // 8
    # Beams start from one that counts 0 and others that count -1e9; what is made of those fills up the answers when
    # there are too few. transformers leaves such rows empty.
    scores = out.sequences_scores if "sequences_scores" in out else torch.zeros(len(out.sequences))
    assert (scores[::each] > -1e6).all()
    for index in (scores > -1e6).nonzero()[:, 0].tolist():
        row = index // each
        assert out.sequences[index, 0] == 0
        check(cut(torch.cat([out.sequences[index, 1:], torch.zeros(1).long()])), items(mask)[row], points[row].numpy())


def test_enough_beams_find_the_best_tour(model):
    """The likeliest of all tours, by brute force."""
    points = torch.rand(1, 4, 2, generator=torch.Generator().manual_seed(0))
    orders = torch.tensor([[1, *rest, 0] for rest in itertools.permutations([2, 3, 4])])
    with torch.no_grad():
        logits = model(points.expand(6, -1, -1), labels=orders).logits
    used = torch.nn.functional.one_hot(orders, 5).cumsum(1).roll(1, 1).bool()
    used[:, 0] = False
    used[:, :, 0] = torch.arange(5) < 4  # back only when all are visited
    logits = logits.masked_fill(used, -torch.inf)
    totals = logits.log_softmax(-1).gather(2, orders.unsqueeze(-1)).sum((1, 2))
    assert totals.topk(2).values.diff().abs() > 1e-3
    found = generate_pointers(model, points, task="tour", num_beams=6, length_penalty=0.0)
    assert found[0, 1:].tolist() == orders[totals.argmax()].tolist()


def test_scores_come_back_as_log_probabilities_of_what_is_left():
    processor = pointer_processors("permutation", torch.zeros(1, 3, 2))[0]
    scores = torch.tensor([[5.0, 9.0, 1.0, 1.0 + math.log(3)]])
    got = processor(torch.tensor([[0, 1]]), scores)
    assert got.exp()[0].tolist() == pytest.approx([0.0, 0.0, 0.25, 0.75])
    nothing = torch.full((1, 4), -torch.inf)
    assert torch.equal(processor(torch.tensor([[0, 1]]), nothing), nothing)


def test_the_task_is_read_from_the_generation_config(model):
    points = torch.rand(2, 6, 2)
    expected = generate_pointers(model, points, task="hull", strict_geometry=True)
    config = GenerationConfig(task="hull", strict_geometry=True)
    assert torch.equal(generate_pointers(model, points, generation_config=config), expected)
    assert config.max_new_tokens is None
    own = copy.deepcopy(model)
    own.generation_config.task, own.generation_config.strict_geometry = "hull", True
    assert torch.equal(generate_pointers(own, input_values=points), expected)
    assert not torch.equal(generate_pointers(own, points, task="triangulation", strict_geometry=False), expected)


def test_rules_join_the_processors_of_the_call(model):
    points = torch.rand(1, 6, 2)
    tour = generate_pointers(model, points, task="tour")
    second = tour[0, 2].item()
    banned = LogitsProcessorList([SuppressTokensAtBeginLogitsProcessor([second], begin_index=2)])
    other = generate_pointers(model, points, task="tour", logits_processor=banned)
    assert other[0, 2] != second
    assert sorted(other[0].tolist()) == [0, 0, 1, 2, 3, 4, 5, 6]
    assert len(banned) == 1


def test_a_limit_of_the_call_is_kept(model):
    assert generate_pointers(model, torch.rand(1, 6, 2), task="tour", max_new_tokens=3).shape == (1, 4)


def test_generate_refusals(model):
    with pytest.raises(ValueError, match=r"inputs \(None\) must be the items to point at"):
        generate_pointers(model, task="tour")
    with pytest.raises(ValueError, match=r"task \(None\) must be one of tour, permutation"):
        generate_pointers(model, torch.rand(1, 3, 2))
