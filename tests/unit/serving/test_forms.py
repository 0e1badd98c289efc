"""The three forms in the words of a checkpoint, and the places that an answer names."""

import pytest
from pydantic import ValidationError

from locvlm.errors import DataError
from locvlm.presets import preset
from locvlm.serving.forms import Forms, Query


def forms(*overrides: str) -> Forms:
    return Forms(preset("tiny", overrides), 60)


def test_a_question_is_asked_as_it_is_but_for_blanks() -> None:
    assert forms().prompt(Query(image="", question="  Is there\n a cat? "), 100, 100) == "Is there a cat?"


def test_where_is_it_is_asked_in_the_paper_s_words_and_the_checkpoint_s_representation() -> None:
    query = Query(image="", locate="red {circle}")
    assert forms().prompt(query, 100, 100) == (
        "Where is the object described red {circle} located in image in terms of (x1,y1,x2,y2) bbox?"
    )
    assert "(cx,cy) point?" in forms("coordinates.location=point").prompt(query, 100, 100)


def test_a_box_is_written_in_the_checkpoint_s_coordinates_and_held_inside_the_image() -> None:
    query = Query(image="", box=[25, 10, 900, 50])
    assert forms().prompt(query, 100, 100) == "Describe the object located at (12,5,48,24)?"
    assert forms("coordinates.representation=nfp").prompt(query, 100, 100) == (
        "Describe the object located at (0.2500,0.1000,1.0000,0.5000)?"
    )


@pytest.mark.parametrize("box", [[], [1, 2, 3], [5, 5, 5, 9], [9, 1, 2, 3], [1, 2, 3, float("nan")], [200, 1, 300, 9]])
def test_a_box_that_is_none_is_refused(box: list[float]) -> None:
    with pytest.raises(DataError, match=r"x1, y1, x2, y2 in pixels of the 100 x 90 image"):
        forms().prompt(Query(image="", box=box), 100, 90)


@pytest.mark.parametrize("text", ["", "   ", "x" * 61, "<image></s>"])
def test_a_question_that_is_none_or_too_long_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        forms().prompt(Query(image="", question=text), 100, 100)
    with pytest.raises(DataError):
        forms().prompt(Query(image="", locate=text), 100, 100)


@pytest.mark.parametrize("values", [{}, {"question": "a", "locate": "b"}, {"question": "a", "box": [1, 2, 3, 4]}])
def test_a_query_has_exactly_one_form(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        Query.model_validate({"image": "", **values})


def test_every_place_of_an_answer_is_found_where_it_stands() -> None:
    answer = "A cat at (0,0,24,24) and a dog at [24, 0, 48, 48] (both asleep)."
    found = forms().places(answer, 200, 100)
    assert [place.box for place in found] == [[0, 0, 100, 50], [100, 0, 200, 100]]
    assert [answer[place.start : place.end] for place in found] == ["(0,0,24,24)", "[24, 0, 48, 48]"]


def test_a_place_without_brackets_is_found_as_the_codec_reads_it() -> None:
    (place,) = forms().places("0,0,24,48", 96, 96)
    assert place.box == [0, 0, 48, 96]


def test_points_and_deviations_are_read_too() -> None:
    (point,) = forms("coordinates.location=point").places("It is located at (24,12)", 96, 96)
    assert (point.point, point.box) == ([48, 24], None)
    (deviating,) = forms("coordinates.representation=diga").places("It is located at (0,0,-4,-4,4,4)", 96, 96)
    assert deviating.box == [0, 0, 16, 16]


@pytest.mark.parametrize("answer", ["", "There is no such object in the image", "(1,2)", "The 3 cats (all 4) run."])
def test_an_answer_without_a_place_has_none(answer: str) -> None:
    assert forms().places(answer, 96, 96) == []
