"""Scenes stated in words, and the paper's direct question about them; names to state them with.

A small language model that is tuned on questions about places or on captions forgets how to compare two places that it
reads: both the skill and the form of the answer. These questions keep it alive, in every compared arm alike. They are
no question about the image that is shown: its categories do not occur in them.
"""

import random
from collections.abc import Iterable, Iterator, Sequence

from locvlm import prompts
from locvlm.records import Turn

PER_AXIS = 2  # questions an image
AXIS_WORDS = (("left", "right"), ("above", "below"))  # of the smaller and the greater coordinate
OBJECTIVES = ("stated_left_right", "stated_above_below")
_NAMES_A_SCENE = (2, 5)  # both inclusive

# the 80 category names of COCO, so that real annotations cost one token a word
COCO_NAMES = (
    "person bicycle car motorcycle airplane bus train truck boat "
    "traffic light fire hydrant stop sign parking meter bench bird cat dog "
    "horse sheep cow elephant bear zebra giraffe backpack umbrella handbag "
    "tie suitcase frisbee skis snowboard sports ball kite baseball bat "
    "baseball glove skateboard surfboard tennis racket bottle wine glass cup "
    "fork knife spoon bowl banana apple sandwich orange broccoli carrot "
    "hot dog pizza donut cake chair couch potted plant bed dining table "
    "toilet tv laptop mouse remote keyboard cell phone microwave oven "
    "toaster sink refrigerator book clock vase scissors teddy bear hair drier toothbrush"
)

# made-up words to name things by: with 130 names a tiny model learns them one by one, with 600 the rule
_BEGINNINGS = "ba de fi go ku la me ni po ru sa te vi zo"
_ENDINGS = (
    "bim col dar fen gup hol jat kem lin mox nuv pag rel sot tud vek wip yar zed "
    "bolt cask drim fosk gant helm jolk kurn lisp mund nold pren quil rask sturn tilk vorn"
)
MADE_UP = tuple(first + second for first in _BEGINNINGS.split() for second in _ENDINGS.split())


def names_beside(categories: Iterable[str]) -> list[str]:
    """Single words to name things by, sorted; none is a word of these categories."""
    taken = {word for name in categories for word in name.split()}
    return sorted({*COCO_NAMES.split(), *MADE_UP} - taken)


def stated_turns(names: Sequence[str], n_bins: int, rng: random.Random) -> Iterator[Turn]:
    """PER_AXIS questions of each of OBJECTIVES: `A photo with tent 40 7; sofa 12 30;`, the column and the row of each
    (whole numbers below `n_bins`, from the left and from the top), and the paper's direct question for two of them,
    which never share the coordinate that is asked for."""
    for number in range(2 * PER_AXIS):
        axis = number % 2
        chosen = rng.sample(names, rng.randint(*_NAMES_A_SCENE))
        places = {name: [rng.randrange(n_bins), rng.randrange(n_bins)] for name in chosen}
        seen_from, located = rng.sample(chosen, 2)
        while places[seen_from][axis] == places[located][axis]:
            places[located][axis] = rng.randrange(n_bins)
        stated = " ".join(f"{name} {column} {row};" for name, (column, row) in places.items())
        word = AXIS_WORDS[axis][places[located][axis] > places[seen_from][axis]]
        question = f"A photo with {stated}\n{prompts.spatial_direct_question(seen_from, located)}"
        answer = prompts.spatial_answer(located, word, seen_from)
        yield Turn(OBJECTIVES[axis], category=located, question=question, answer=answer)
