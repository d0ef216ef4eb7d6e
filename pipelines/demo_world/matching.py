"""Which questions are asked: groups that nothing but the picture can tell apart.

A group holds one question for each answer. In a benchmark its questions have the very same text and choices, so that
whoever sees no picture answers them all alike and gets exactly one of them right, whatever was learnt: the
complementary pairs of VQA v2 (Goyal et al. 2017, arXiv 1612.00837), for any number of answers. And a model of
two-dimensional cues gives them nearly the same score: matching on the propensity score within a caliper (Rosenbaum and
Rubin 1983), after which the cues the model knows are distributed alike under every answer.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from pipelines.demo_world.cues import scores
from pipelines.demo_world.questions import Question

Rng = np.random.Generator
Group = list[Question]

CALIPER = 0.3  # most that cue scores, in log odds, may differ within a group


def matched(asked: Iterable[Question], rng: Rng, same_text: bool) -> list[Group]:
    """Groups of one question for each answer, of one kind and with like cues, in random order; no question twice.

    Of two answers there are as many groups as can be had: sorted scores are merged.

    Args:
        asked: questions with their choices in natural order.
        rng: who is taken of several equals, and the order.
        same_text: whether a group must also have the same text and choices.
    """
    asked = [_alphabetical(q) for q in asked]
    score = scores(asked)
    cells: dict[Hashable, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rng.permutation(len(asked)).tolist():
        question = asked[row]
        cells[question.kind, question.names if same_text else ()][question.answer].append(row)
    groups = []
    for by_answer in cells.values():
        answers = len(asked[next(iter(by_answer.values()))[0]].choices)
        stacks = [sorted(by_answer[answer], key=lambda row: -score[row]) for answer in range(answers)]
        while all(stacks):
            lowest, *_, highest = sorted(stacks, key=lambda stack: score[stack[-1]])
            if score[highest[-1]] - score[lowest[-1]] > CALIPER:
                lowest.pop()
            else:
                groups.append([asked[stack.pop()] for stack in stacks])
    return [groups[i] for i in rng.permutation(len(groups))]


def evenly(groups: Iterable[Group], most: int) -> list[Group]:
    """The first groups of every task that have no more than `most` questions together, its kinds in turn."""
    rank: Counter[str] = Counter()
    by_task: dict[str, list[tuple[int, Group]]] = defaultdict(list)
    for group in groups:
        rank[group[0].kind] += 1
        by_task[group[0].task].append((rank[group[0].kind], group))
    chosen = [sorted(ranked, key=lambda pair: pair[0]) for ranked in by_task.values()]
    return [group for ranked in chosen for _, group in ranked[: most // len(ranked[0][1])]]


def deal(groups: Sequence[Group], rng: Rng) -> list[Group]:
    """Put choices, and objects that are compared, in random order, the same throughout a group.

    Every letter is right once in a group; over the groups of a kind every answer has every letter equally often.
    """
    orders: dict[str, itertools.cycle[list[int]]] = {}
    dealt = []
    for group in groups:
        kind, choices = group[0].kind, len(group[0].choices)
        if kind not in orders:
            first = rng.permutation(choices)
            orders[kind] = itertools.cycle([np.roll(first, shift).tolist() for shift in range(choices)])
        order = next(orders[kind])
        turned = [q.turned() for q in group] if group[0].views and rng.random() < 0.5 else group
        dealt.append(
            [replace(q, choices=tuple(q.choices[i] for i in order), answer=order.index(q.answer)) for q in turned]
        )
    return dealt


def _alphabetical(question: Question) -> Question:
    """The same with the two objects that are compared in the order of their names."""
    return question.turned() if question.views and question.names[-2] > question.names[-1] else question
