"""Synthetic questions with four options: a context states facts, one question asks for one of them."""

import random
from dataclasses import dataclass

NAMES = "Alice|Bruno|Carmen|Dmitri|Elena|Felix|Greta|Hassan|Ines|Jonas|Kofi|Lucia|Marta|Nadia|Oscar|Priya|Rosa"

# (sentence of a context, question, possible values)
FACTS = (
    (
        "{name} keeps the spare key {value}.",
        "Where does {name} keep the spare key?",
        "under the doormat|in the blue vase|behind the clock|in the toolbox|on the top shelf|inside the piano|"
        "in the coat pocket|below the flower pot",
    ),
    (
        "{name} works as {value}.",
        "What does {name} do for a living?",
        "a baker|a surgeon|a bus driver|a tax lawyer|a beekeeper|a piano tuner|a geologist|a night guard",
    ),
    (
        "{name} travels to work by {value}.",
        "How does {name} travel to work?",
        "bicycle|ferry|tram|motorcycle|taxi|helicopter|horse|train",
    ),
    (
        "{name} grew up in {value}.",
        "Where did {name} grow up?",
        "Lisbon|Nairobi|Oslo|Lima|Toronto|Hanoi|Cairo|Prague",
    ),
    (
        "For breakfast {name} always eats {value}.",
        "What does {name} eat for breakfast?",
        "porridge|rice and eggs|cold pizza|dry toast|fruit salad|pancakes|cheese and olives|noodle soup",
    ),
    (
        "{name} plays the {value} in the town band.",
        "Which instrument does {name} play?",
        "trumpet|violin|cello|clarinet|tuba|harp|drum|flute",
    ),
    (
        "{name}'s appointment is on {value}.",
        "When is {name}'s appointment?",
        "Monday morning|Tuesday at noon|Wednesday evening|Thursday afternoon|Friday night|Saturday at dawn|"
        "Sunday at ten|the first of May",
    ),
    (
        "{name} painted the door {value}.",
        "Which colour did {name} paint the door?",
        "red|dark green|yellow|black|light blue|white|orange|purple",
    ),
)


@dataclass(frozen=True)
class Question:
    context: str
    question: str
    options: tuple[str, ...]
    answer: int


def questions(count, seed, facts=2, options=4):
    """`count` questions: of `facts` statements about different persons and things, one is asked for.

    The other options are of the same kind as the answer and not in the context.
    """
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        kinds = rng.sample(FACTS, facts)
        names = rng.sample(NAMES.split("|"), facts)
        values = [rng.sample(kind[2].split("|"), options) for kind in kinds]
        stated = [kind[0].format(name=n, value=v[0]) for kind, n, v in zip(kinds, names, values, strict=True)]
        order = rng.sample(range(options), options)
        made.append(
            Question(
                context=" ".join(rng.sample(stated, facts)),
                question=kinds[0][1].format(name=names[0]),
                options=tuple(values[0][i] for i in order),
                answer=order.index(0),
            )
        )
    return made
