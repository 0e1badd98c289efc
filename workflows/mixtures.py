"""What stage 2 is made of in the project's own comparisons: the shares of its questions, the same for every pipeline.

Mostly where things are, as in the paper, whose stage 2 is little else. No arm is asked about sides in an image, as
in the paper; all have the same share of questions about sides in scenes stated in words, so that the tiny language
model does not forget what it is asked in the end. The share of an objective that an arm lacks goes to captions and
presence questions alike.
"""

from collections.abc import Sequence

LOCATION_SHARES = {"loc_pred": 0.30, "neg_pred": 0.10, "rev_loc": 0.30}  # with the next two: the tiny preset's
GENERIC_SHARES = {"caption": 0.05, "presence": 0.05}
STATED_SHARE = 0.20  # about sides in words
OBJECTIVES = tuple(LOCATION_SHARES)


def arm_mixture(objectives: Sequence[str], stated: str = "stated_left_right", stage: str = "instruct") -> str:
    """The override for a stage of an arm with these location objectives; shares add up to 1."""
    own = {objective: LOCATION_SHARES[objective] for objective in objectives}
    free = (sum(LOCATION_SHARES.values()) - sum(own.values())) / 2
    shares = [("generic", name, round(share + free, 4)) for name, share in GENERIC_SHARES.items()]
    shares.append(("generic", stated, STATED_SHARE))
    shares += [("localize", *share) for share in own.items()]
    return f"stages.{stage}.mixture={mixture(shares)}"


def mixture(shares: Sequence[tuple[str, str, float]]) -> str:
    """(source, objective, weight) as the value of a stage's `mixture`."""
    entries = (f"{{source: {source}, objective: '{what}', weight: {share}}}" for source, what, share in shares)
    return f"[{', '.join(entries)}]"
