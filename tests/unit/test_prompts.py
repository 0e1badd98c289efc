import pytest
from hypothesis import given
from hypothesis import strategies as st

from locvlm import prompts
from locvlm.config import SYSTEM, FamilyConfig
from locvlm.errors import DataError

BBOX = "(x1,y1,x2,y2) bbox"


def test_the_localization_prompts_are_the_papers_byte_for_byte() -> None:
    assert prompts.LOC_PROMPTS == (
        "Where is the object described {category} located in image in terms of {repr}?",
        "What is the location of object described {category} in terms of {repr}?",
        "Localize the object described {category} in terms of {repr}?",
        "Provide a {repr} for the the object described {category}?",
        "Generate a {repr} for the the object described {category}?",
    )


def test_the_other_templates_are_the_papers_byte_for_byte() -> None:
    assert prompts.LOC_ANSWER == "It is located at {loc}"
    assert prompts.NEG_ANSWER == "There is no such object in the image"
    assert prompts.REV_ANSWER == "There is a {category}."
    assert prompts.REV_PROMPTS == (
        "Describe the object located at {loc}?",
        "Provide a caption for object at {loc}?",
        "What is at location {loc} in image?",
    )
    assert (
        prompts.CAPTION_PROMPT == "Describe the {category} in this image using one short sentence, referring to its "
        "visual features and spatial position relative to other objects in image."
    )


def test_the_system_text_is_llavas() -> None:
    assert (
        SYSTEM
        == "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )


def test_localization_questions_are_filled_in() -> None:
    asked = [prompts.loc_question(i, "cow that is lying down", BBOX) for i in range(5)]
    assert asked == [
        "Where is the object described cow that is lying down located in image in terms of (x1,y1,x2,y2) bbox?",
        "What is the location of object described cow that is lying down in terms of (x1,y1,x2,y2) bbox?",
        "Localize the object described cow that is lying down in terms of (x1,y1,x2,y2) bbox?",
        "Provide a (x1,y1,x2,y2) bbox for the the object described cow that is lying down?",
        "Generate a (x1,y1,x2,y2) bbox for the the object described cow that is lying down?",
    ]
    assert (
        prompts.loc_question(2, "cat", "(cx,cy) point")
        == "Localize the object described cat in terms of (cx,cy) point?"
    )


def test_the_answers_are_filled_in() -> None:
    assert prompts.loc_answer("(4,52,13,63)") == "It is located at (4,52,13,63)"
    assert prompts.neg_answer() == "There is no such object in the image"
    assert prompts.rev_answer("dining table") == "There is a dining table."
    assert prompts.rev_answer("apple") == "There is a apple."


def test_reverse_questions_are_filled_in() -> None:
    assert [prompts.rev_question(i, "(4,52,13,63)") for i in range(3)] == [
        "Describe the object located at (4,52,13,63)?",
        "Provide a caption for object at (4,52,13,63)?",
        "What is at location (4,52,13,63) in image?",
    ]


def test_a_video_is_called_one_on_request_and_a_description_is_left_alone() -> None:
    asked = prompts.loc_question(0, "image on a wall", BBOX, medium="video")
    assert asked == f"Where is the object described image on a wall located in video in terms of {BBOX}?"
    assert prompts.neg_answer("video") == "There is no such object in the video"
    assert prompts.rev_question(2, "(1,2,3,4)", "video") == "What is at location (1,2,3,4) in video?"


def test_the_caption_request_names_the_category() -> None:
    assert prompts.caption_question("cat").startswith("Describe the cat in this image using one short sentence, ")


def test_clean_mends_the_doubled_article_and_nothing_else() -> None:
    for i in range(5):
        verbatim, clean = prompts.loc_question(i, "cat", BBOX), prompts.loc_question(i, "cat", BBOX, clean=True)
        assert clean == verbatim.replace("the the", "the")
    assert (
        prompts.loc_question(3, "cat", BBOX, clean=True) == "Provide a (x1,y1,x2,y2) bbox for the object described cat?"
    )


def test_clean_mends_the_article_of_the_answer() -> None:
    assert prompts.rev_answer("apple", clean=True) == "There is an apple."
    assert prompts.rev_answer("Umbrella that is red", clean=True) == "There is an Umbrella that is red."
    assert prompts.rev_answer("cat", clean=True) == prompts.rev_answer("cat")


def test_a_description_with_braces_is_taken_as_it_is() -> None:
    assert prompts.rev_answer("{category} {0}") == "There is a {category} {0}."
    assert "{x}" in prompts.loc_question(0, "{x}", BBOX)


def test_the_direct_spatial_question_is_the_papers() -> None:
    assert prompts.spatial_direct_question("obj_1", "obj_2") == "Which side of obj_1 is obj_2 located?"


def test_the_icl_prompt_is_the_papers_byte_for_byte() -> None:
    assert prompts.spatial_icl_question("obj_1", "obj_2", "obj_3", "left") == (
        "Q: Which side of obj_1 is obj_2 located? A: The obj_1 is located to the left of obj_2. "
        "Q: Which side of obj_2 is obj_1 located? A: The obj_2 is located to the right of obj_1. "
        "Q: Which side of obj_3 is obj_1 located?"
    )


def test_the_icl_prompt_speaks_of_above_and_below() -> None:
    assert prompts.spatial_icl_question("cat", "dog", "cup", "below") == (
        "Q: Which side of cat is dog located? A: The cat is located below dog. "
        "Q: Which side of dog is cat located? A: The dog is located above cat. "
        "Q: Which side of cup is cat located?"
    )


def test_the_icl_prompt_can_answer_its_examples_naturally() -> None:
    assert prompts.spatial_icl_question("cat", "dog", "cup", "right", "natural") == (
        "Q: Which side of cat is dog located? A: The dog is located to the left of cat. "
        "Q: Which side of dog is cat located? A: The cat is located to the right of dog. "
        "Q: Which side of cup is cat located?"
    )


@pytest.mark.parametrize("word", ["left", "right", "above", "below"])
def test_the_two_conventions_are_opposite_words(word: str) -> None:
    assert prompts.spatial_word(word) == prompts.spatial_word(word, "natural") == word
    assert prompts.spatial_word(word, "icl_example") == prompts.OPPOSITE[word] != word
    assert prompts.OPPOSITE[prompts.OPPOSITE[word]] == word


@pytest.mark.parametrize("convention", ["natural", "icl_example"])
@pytest.mark.parametrize("word", ["left", "right", "above", "below"])
def test_the_icl_word_continues_the_pattern_of_the_examples(word: str, convention: prompts.Convention) -> None:
    # with obj_3 in the place of obj_2 the query is the second example's question, so the answers must agree
    text = prompts.spatial_icl_question("cat", "dog", "dog", word, convention)
    second_answer = text.split("A: ")[2].split(". Q:")[0]
    assert prompts.spatial_word(word, convention) in second_answer.split()


def test_a_spatial_answer_is_a_sentence_of_the_icl_form() -> None:
    assert prompts.spatial_answer("cat", "left", "dog") == "The cat is located to the left of dog."
    assert prompts.spatial_answer("cat", "above", "dog") == "The cat is located above dog."
    assert prompts.spatial_answer("obj_1", "left", "obj_2") in prompts.spatial_icl_question(
        "obj_1", "obj_2", "x", "left"
    )


def test_the_hallucination_questions_are_the_papers() -> None:
    assert prompts.hallucination_question("dog") == "Is there dog in image?"
    assert prompts.hallucination_question("dog", "video") == "Is there dog in video?"


def test_the_short_answer_suffix_is_llavas() -> None:
    assert prompts.SHORT_ANSWER_SUFFIX == "\nAnswer the question using a single word or phrase."


def test_the_brief_requests_are_distinct_sentences() -> None:
    assert len(set(prompts.BRIEF_REQUESTS)) == len(prompts.BRIEF_REQUESTS) == 11
    assert all(request.endswith(".") and request == request.strip() for request in prompts.BRIEF_REQUESTS)


def test_the_chat_layout_is_exact() -> None:
    text, spans = prompts.render_chat([("q1", "a1"), ("q2", "a2")], "SYS")
    assert text == "SYS USER: <image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>"
    assert [text[start:end] for start, end in spans] == [" a1</s>", " a2</s>"]


def test_without_a_system_text_the_chat_begins_with_the_user() -> None:
    assert prompts.render_chat([("q", "a")], "")[0] == "USER: <image>\nq ASSISTANT: a</s>"
    assert prompts.render_prompt("q", "") == "USER: <image>\nq ASSISTANT:"


def test_a_text_only_chat_has_no_image() -> None:
    assert prompts.render_chat([("q", "a")], "", has_image=False)[0] == "USER: q ASSISTANT: a</s>"
    assert prompts.render_prompt("q", "SYS", has_image=False) == "SYS USER: q ASSISTANT:"


@pytest.mark.parametrize(
    "question",
    ["<image>\nq", "q\n<image>", "q <image> ", "<image><image>q", "<im<image>age>q", "<ima</s>ge>q</s>", "  q\n"],
)
def test_the_image_stands_once_and_first_wherever_it_was(question: str) -> None:
    expected = "USER: <image>\nq ASSISTANT: a</s>USER: q ASSISTANT: b</s>"
    assert prompts.render_chat([(question, "a"), (question, "b")], "")[0] == expected
    assert (
        prompts.render_prompt(question, "", [(question, "a")]) == "USER: <image>\nq ASSISTANT: a</s>USER: q ASSISTANT:"
    )


def test_inner_lines_and_blanks_of_a_question_are_kept() -> None:
    assert prompts.render_prompt("q\n\nwhat  now?", "") == "USER: <image>\nq\n\nwhat  now? ASSISTANT:"


words = st.text(max_size=30).filter(lambda s: s.strip() and "<" not in s and ">" not in s)


@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=4), system=st.sampled_from(["", SYSTEM]))
def test_spans_are_the_answers_and_prompts_are_prefixes(turns: list[tuple[str, str]], system: str) -> None:
    text, spans = prompts.render_chat(turns, system)
    assert [text[a:b] for a, b in spans] == [f" {answer.strip()}</s>" for _, answer in turns]
    assert text.count("<image>") == 1
    assert spans[-1][1] == len(text)
    for number, (start, _) in enumerate(spans):
        prompt = prompts.render_prompt(turns[number][0], system, turns[:number])
        assert prompt == text[:start]
        assert prompt.endswith(" ASSISTANT:")


@pytest.mark.parametrize("answer", ["", " ", "\n\t"])
def test_an_empty_answer_is_refused(answer: str) -> None:
    with pytest.raises(DataError, match="the answer to 'where' is empty"):
        prompts.render_chat([("ok", "fine"), ("where", answer)], SYSTEM)
    with pytest.raises(DataError, match="the caption is empty"):
        prompts.render_plain(answer)


@pytest.mark.parametrize("question", ["", " \n", "<image>", "<image>\n", "</s>"])
def test_an_empty_question_is_refused(question: str) -> None:
    with pytest.raises(DataError, match="is empty"):
        prompts.render_chat([(question, "a")], SYSTEM)
    with pytest.raises(DataError, match="is empty"):
        prompts.render_prompt(question, SYSTEM)


@pytest.mark.parametrize("marker", ["<image>", "</s>"])
def test_an_answer_with_a_mark_of_the_format_is_refused(marker: str) -> None:
    with pytest.raises(DataError, match=f"holds {marker}"):
        prompts.render_chat([("q", f"a {marker} b")], SYSTEM)
    with pytest.raises(DataError, match=f"holds {marker}"):
        prompts.render_plain(f"a {marker} b")


def test_a_conversation_without_turns_is_refused() -> None:
    with pytest.raises(DataError, match="no turns"):
        prompts.render_chat([], SYSTEM)


def test_the_plain_layout_is_exact() -> None:
    text, (start, end) = prompts.render_plain(" a cat on a mat \n")
    assert text == "<image>a cat on a mat\n"
    assert text[start:end] == "a cat on a mat\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("It is Left.", "left"),
        ("to the right of it", "right"),
        ("left or right", "both"),
        ("leftover", None),
        ("", None),
    ],
)
def test_the_side_that_an_answer_names(answer: str, said: str | None) -> None:
    assert prompts.said_side(answer, "left") == prompts.said_side(answer, "right") == said


def test_an_answer_that_says_the_object_is_absent() -> None:
    assert prompts.says_absent(prompts.neg_answer())
    assert prompts.says_absent("There's no cat here")
    assert not prompts.says_absent(prompts.loc_answer("(1,2,3,4)"))
    assert not prompts.says_absent("I see there is no doubt about it")


FAMILY = FamilyConfig(
    family="shikra",
    layout="S USER: {turn} ASSISTANT:",
    question=prompts.SHIKRA_QUESTION,
    short_question="<image> {question} Briefly.",
    loc_pred=prompts.SHIKRA_LOC,
)


def test_a_familys_question_and_its_own_turns_are_framed() -> None:
    asked = prompts.render_family("What is <image> it?", FAMILY)
    assert asked == (
        "S USER: For this image <image>, I want a simple and direct answer to my question: What is  it? ASSISTANT:"
    )
    short = prompts.render_family(f"What is it?{prompts.SHORT_ANSWER_SUFFIX}", FAMILY)
    assert short == "S USER: <image> What is it? Briefly. ASSISTANT:"
    own = prompts.fill_turn(FAMILY.loc_pred, description=" the {loc} </s>dog ")
    assert own == "In the given <image>, could you find and tell me the coordinates of the {loc} dog?"
    assert prompts.is_own_turn(own, FAMILY.loc_pred)
    assert prompts.render_family(own, FAMILY) == f"S USER: {own} ASSISTANT:"
    assert not prompts.is_own_turn(own, "")
    with pytest.raises(DataError, match="is empty"):
        prompts.render_family(" <image> ", FAMILY)
