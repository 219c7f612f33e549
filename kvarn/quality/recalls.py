"""Scores of what an agent's conversation recalls, against those of the unquantized cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from kvarn.quality.conversations import CONVERSATIONS, Recall
from kvarn.quality.divergence import Estimate, Floats, estimate

DISTANCES = (256, 512, 1024, 2048, max(CONVERSATIONS))  # tokens; upper ends are excluded


class RecallScore(NamedTuple):
    """Whether every token was the most likely one, and -log p of all of them."""

    right: bool
    nats: float

    @classmethod
    def of(cls, tokens: list[RecallScore]) -> RecallScore:
        """The score of several tokens together."""
        return cls(all(token.right for token in tokens), sum(token.nats for token in tokens))


def summarize_recalls(
    recalls: Sequence[tuple[int, Recall]],
    ours: Sequence[RecallScore],
    reference: Sequence[RecallScore],
    seed: int,
) -> dict[str, Any]:
    """The metrics of a row.

    Args:
        recalls: length of the conversation, and what it recalls.
        ours: scores of `recalls`.
        reference: the same of the unquantized cache.
        seed: seed of the bootstrap, which draws single recalls.
    """
    scores = np.array(
        [
            [mine.right, theirs.right, mine.nats, theirs.nats]
            for mine, theirs in zip(ours, reference, strict=True)
        ],
        float,
    )
    distances = np.array([recall.distance for _, recall in recalls])

    def parts(label: str, of: Callable[[int, Recall], Any]) -> list[dict[str, Any]]:
        """The metrics of the recalls that have the same `of`."""
        found = [of(length, recall) for length, recall in recalls]
        return [
            {label: value, **_metrics(scores[[other == value for other in found]], seed)}
            for value in sorted(set(found))
        ]

    by_distance = [
        {"from": first, "to": last, **_metrics(scores[inside], seed)}
        for first, last in pairwise(DISTANCES)
        if (inside := (first <= distances) & (distances < last)).any()
    ]
    return {
        **_metrics(scores, seed),
        "by_kind": parts("kind", lambda _, recall: recall.kind),
        "by_length": parts("length", lambda length, _: length),
        "by_distance": by_distance,
    }


def _metrics(scores: Floats, seed: int) -> dict[str, Any]:
    """Means over scores [N, 4] as in `summarize_recalls`, and paired differences."""
    right, reference_right, nats, reference_nats = scores.T

    def mean(samples: Floats) -> Estimate:
        return estimate(samples[None], seed, blocks=1)

    accuracy, lost = mean(right), mean(reference_right - right)
    nats_lost = mean(nats - reference_nats)
    return {
        "recalls": len(scores),
        "accuracy": accuracy.value,
        "accuracy_ci": [accuracy.low, accuracy.high],
        "lost": lost.value,
        "lost_ci": [lost.low, lost.high],
        "smallest_effect": lost.smallest_effect,
        "nats": float(nats.mean()),
        "nats_lost": nats_lost.value,
        "nats_lost_ci": [nats_lost.low, nats_lost.high],
        "nats_smallest_effect": nats_lost.smallest_effect,
    }
