import random
import re
from collections import Counter

import pytest

from locvlm.data.stated import OBJECTIVES, names_beside, stated_turns
from locvlm.records import Turn

NAMES = names_beside(["traffic light", "dog"])


def _turns(n: int, n_bins: int = 48) -> list[Turn]:
    rng = random.Random(0)
    return [turn for _ in range(n) for turn in stated_turns(NAMES, n_bins, rng)]


def test_a_question_reads_like_this() -> None:
    turn = _turns(1)[1]
    assert (turn.objective, turn.category) == ("stated_above_below", "dehol")
    assert turn.question == "A photo with nikem 43 21; donut 30 35; dehol 6 22;\nWhich side of donut is dehol located?"
    assert turn.answer == "The dehol is located above donut."


@pytest.mark.parametrize(("axis", "words"), [(0, ("left", "right")), (1, ("above", "below"))])
def test_the_answer_is_what_the_stated_places_say(axis: int, words: tuple[str, str]) -> None:
    told: Counter[str] = Counter()
    for turn in _turns(300):
        if turn.objective != OBJECTIVES[axis]:
            continue
        stated, question = turn.question.split("\n")
        places = {name: (int(x), int(y)) for name, x, y in re.findall(r"(\w+) (\d+) (\d+);", stated)}
        asked = re.fullmatch(r"Which side of (\w+) is (\w+) located\?", question)
        assert asked
        seen_from, located = asked.groups()
        assert places[seen_from][axis] != places[located][axis]
        word = words[places[located][axis] > places[seen_from][axis]]
        told[word] += 1
        assert turn.answer == f"The {located} is located {f'to the {word} of' if axis == 0 else word} {seen_from}."
        assert 2 <= len(places) <= 5
        assert turn.category == located
    assert told.total() == 600
    assert 0.4 < told[words[0]] / told.total() < 0.6


def test_places_stay_below_the_number_of_bins() -> None:
    numbers = {int(number) for turn in _turns(200, n_bins=3) for number in re.findall(r" (\d+)", turn.question)}
    assert numbers == {0, 1, 2}


def test_no_category_that_is_shown_is_a_name() -> None:
    assert {"dog", "traffic", "light"}.isdisjoint(NAMES)
    assert {"cat", "babim", "person"} <= set(NAMES)
    assert len(NAMES) == len(set(NAMES)) > 500
