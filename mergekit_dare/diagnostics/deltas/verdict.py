"""The verdict on a model's deltas: whether DARE suits them, and at which density.

The paper (arXiv 2311.03099, section 4.5) finds that DARE works where deltas are small: those of
supervised fine-tuning (SFT) are mostly within 0.005, and drop rates of 0.9 and above do no harm;
after continued pre-training, they reach 0.03, and DARE becomes impractical.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mergekit_dare.diagnostics.deltas.statistics import DeltaStatistics

SMALL, LARGE = 0.005, 0.03
LARGE_SHARE = 0.001  # of deltas above LARGE, beyond which DARE is impractical
# The delta of an unrelated model removes the base's weights and puts its own in their place, so
# half of it cancels the base. That of a model trained from the base hardly does so.
UNRELATED_NORM, UNRELATED_UNDOING = 0.1, (0.5, 1.5)
# The share of changed elements below which a change is called sparse. Reinforcement learning
# changes 5 to 30 % of the weights, supervised fine-tuning most of them (arXiv 2505.11711).
SPARSE_SHARE = 0.4
# A model is the odd one out if its relative norm exceeds this multiple of the others' median.
OUTLIER_FACTOR = 10.0


@dataclass(frozen=True)
class Verdict:
    """What the deltas of a model say about DARE.

    Attributes:
        kind: ``small``, ``medium``, ``large``, ``wrong base``, ``no change``, ``not finite`` or
            ``not compared``.
        sentence: The verdict in words, with its figures.
        density: A density to start from.
        reason: Why that density.
        sparse: Whether most elements equal the base model's, of a model that can be merged.

    """

    kind: str
    sentence: str
    density: float
    reason: str
    sparse: bool = False


def judge(
    statistics: DeltaStatistics,
    others: Iterable[DeltaStatistics] = (),
    changed_share: float = 1.0,
) -> Verdict:
    """Judge a model's deltas in the terms of the paper (section 4.5).

    Args:
        statistics: All deltas of the model.
        others: Those of the other fine-tuned models of the merge.
        changed_share: Fraction of the elements that the model changes.

    """
    typical = statistics.quantile(0.99)
    norm = statistics.relative_norm
    figures = f"99% of |delta| within {typical:.2g}, relative norm {norm:.2g}"
    sparse = changed_share < SPARSE_SHARE
    if sparse:
        figures += (
            f"; most elements equal the base model's, as after reinforcement learning: only "
            f"{changed_share:.1%} are changed"
        )
    if not statistics.count and not statistics.non_finite:
        return Verdict(
            "not compared",
            "none of its tensors could be compared with the base model",
            1.0,
            "see the reasons below; it may have a different architecture or base model",
        )
    if statistics.non_finite:
        return Verdict(
            "not finite",
            f"{statistics.non_finite} deltas are NaN or infinite: the merge will stop there",
            1.0,
            "fix the model first",
        )
    if statistics.square_sum == 0:
        return Verdict(
            "no change", "the model equals the base model", 1.0, "there is nothing to drop"
        )
    norms = sorted(other.relative_norm for other in others)
    median = norms[len(norms) // 2] if norms else math.nan
    odd = median > 0 and norm > OUTLIER_FACTOR * median and statistics.share_above(SMALL) > 0.01
    compared = f", {norm / median:.0f} times that of the other models" if odd else ""
    low, high = UNRELATED_UNDOING
    unrelated = norm > UNRELATED_NORM and low < statistics.undoing < high
    large_share = statistics.share_above(LARGE)
    if unrelated or (odd and large_share <= LARGE_SHARE):
        why = ", and the deltas cancel the base model's weights" if unrelated else ""
        return Verdict(
            "wrong base",
            f"suspected wrong base model: {figures}{compared}{why}",
            1.0,
            "check which model it was fine-tuned from before dropping anything",
        )
    if large_share > LARGE_SHARE:
        return Verdict(
            "large",
            f"large deltas, as after continued pre-training: {figures}{compared}, "
            f"{large_share:.1%} above {LARGE}",
            1.0,
            "the paper finds DARE impractical here",
            sparse=sparse,
        )
    if typical <= SMALL and sparse:
        # examples/paper/README.md, "Models of reinforcement learning"
        return Verdict(
            "small",
            f"small deltas: {figures}",
            0.5,
            "on small models of this kind, densities of 0.1 to 1 scored the same, but two seeds "
            "differed by half a point at 0.1 and by a tenth at 0.5",
            sparse=True,
        )
    if typical <= SMALL:
        return Verdict(
            "small",
            f"small deltas, as after supervised fine-tuning: {figures}",
            0.1,
            "the paper drops 90 to 99% of such deltas without harm",
        )
    return Verdict(
        "medium",
        f"deltas between the paper's small and large ones: {figures}",
        0.5,
        "drop half, evaluate, and only then drop more",
        sparse=sparse,
    )
