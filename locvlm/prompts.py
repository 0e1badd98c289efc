"""Every sentence that the model reads or is trained to say, and the chat format around them.

The templates are those of the paper's appendices B and E byte for byte, slips included. `clean=True` mends the doubled
article ("the the object") and the article of an answer ("There is a apple."), nothing else.

Chat (the Vicuna v1.1 form of LLaVA v1 and v1.5), one image a conversation, always first:

    {system} USER: <image>\\n{q1} ASSISTANT: {a1}</s>USER: {q2} ASSISTANT: {a2}</s>

Plain (stage 1): `<image>{caption}\\n`.

The supervised span of an answer begins at the space before it, because that space belongs to the answer's first token,
and ends with its `</s>`. The span of a plain caption begins right after `<image>` and includes the final newline.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from locvlm.errors import DataError

if TYPE_CHECKING:
    from locvlm.config import FamilyConfig

IMAGE = "<image>"
VIDEO = "<video>"
STOP = "</s>"
USER = "USER:"
ASSISTANT = "ASSISTANT:"

Span = tuple[int, int]
Convention = Literal["natural", "icl_example"]

# Appendix B. LocPred and NegPred share the five prompts, so that a prompt never tells the kind of answer.
LOC_PROMPTS = (
    "Where is the object described {category} located in image in terms of {repr}?",
    "What is the location of object described {category} in terms of {repr}?",
    "Localize the object described {category} in terms of {repr}?",
    "Provide a {repr} for the the object described {category}?",
    "Generate a {repr} for the the object described {category}?",
)
LOC_PROMPTS_CLEAN = tuple(prompt.replace("the the", "the") for prompt in LOC_PROMPTS)
LOC_ANSWER = "It is located at {loc}"
NEG_ANSWER = "There is no such object in the image"
REV_PROMPTS = (
    "Describe the object located at {loc}?",
    "Provide a caption for object at {loc}?",
    "What is at location {loc} in image?",
)
REV_ANSWER = "There is a {category}."
REV_ANSWER_CLEAN = "There is {article} {category}."

# The request for pseudo-captions.
CAPTION_PROMPT = (
    "Describe the {category} in this image using one short sentence, referring to its visual features and spatial "
    "position relative to other objects in image."
)

# Appendix E. obj_1 is on one side, obj_2 and obj_3 on the other. The answers of the paper's examples say where the
# FIRST named object is, the opposite of what the question asks when read naturally.
SPATIAL_DIRECT = "Which side of {obj_1} is {obj_2} located?"
SPATIAL_ANSWER = "The {subject} is located {side} {other}."
SPATIAL_ICL = (
    "Q: Which side of {obj_1} is {obj_2} located? A: The {obj_1} is located {side_1} {obj_2}. "
    "Q: Which side of {obj_2} is {obj_1} located? A: The {obj_2} is located {side_2} {obj_1}. "
    "Q: Which side of {obj_3} is {obj_1} located?"
)
SPATIAL_ICL_NATURAL = (
    "Q: Which side of {obj_1} is {obj_2} located? A: The {obj_2} is located {side_2} {obj_1}. "
    "Q: Which side of {obj_2} is {obj_1} located? A: The {obj_1} is located {side_1} {obj_2}. "
    "Q: Which side of {obj_3} is {obj_1} located?"
)
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
# The paper prints the left/right form only; "above" and "below" take no "to the ... of".
SIDE_PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}

_SIDE = {word: re.compile(rf"\b{word}\b", re.IGNORECASE) for word in OPPOSITE}
_ABSENT = re.compile(r"\bno such\b|^\W*there(?: is|'s| are) no\b", re.IGNORECASE)

HALLUCINATION_PROMPT = "Is there {obj} in {medium}?"

# LLaVA-1.5's suffix for tasks with short reference answers (VQAv2, GQA).
SHORT_ANSWER_SUFFIX = "\nAnswer the question using a single word or phrase."

# LLaVA's requests for a short caption, for caption turns in chat form.
BRIEF_REQUESTS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)


# How the families of other people's models are asked, in their publishers' words. Shikra: the templates of its demo
# (VQA, REG) and of its paper (REC). LLaVA-1.5: its instruction data. BLIP-2 and InstructBLIP: LAVIS. Kosmos-2: its
# model card; the region description grounds what it says, so that the tags are taken out of its answer.
VICUNA_LAYOUT = "{system} USER: {turn} ASSISTANT:"
SHIKRA_QUESTION = "For this image <image>, I want a simple and direct answer to my question: {question}"
SHIKRA_LOC = "In the given <image>, could you find and tell me the coordinates of {description}?"
SHIKRA_REV = "For the given image <image>, can you provide a unique description of the area {loc}?"
LLAVA_LOC = "Please provide the bounding box coordinate of the region this sentence describes: {description}."
LLAVA_REV = "Please provide a short description for this region: {loc}."
BLIP_QUESTION = "Question: {question} Answer:"
BLIP_SHORT_QUESTION = "Question: {question} Short answer:"
KOSMOS_QUESTION = "Question: {question} Answer:"
KOSMOS_LOC = "<grounding><phrase> {description}</phrase>"
KOSMOS_REV = "<grounding><phrase> It</phrase><object>{loc}</object> is"


def loc_question(index: int, description: str, repr_text: str, clean: bool = False, medium: str = "image") -> str:
    """LocPred / NegPred prompt `index` (0-4) about an object, asking for `repr_text` ("(x1,y1,x2,y2) bbox").

    `medium`, image or video, is the word for what is shown; the paper's templates say image.
    """
    prompts = LOC_PROMPTS_CLEAN if clean else LOC_PROMPTS
    return _about(prompts[index], medium).format(category=description, repr=repr_text)


def loc_answer(location: str) -> str:
    """The LocPred target for an encoded location."""
    return LOC_ANSWER.format(loc=location)


def neg_answer(medium: str = "image") -> str:
    """The NegPred target."""
    return _about(NEG_ANSWER, medium)


def rev_question(index: int, location: str, medium: str = "image") -> str:
    """RevLoc prompt `index` (0-2) about an encoded location."""
    return _about(REV_PROMPTS[index], medium).format(loc=location)


def rev_answer(description: str, clean: bool = False) -> str:
    """The RevLoc target: a category name, or a pseudo-caption "cow that is lying down" in its place."""
    if not clean:
        return REV_ANSWER.format(category=description)
    article = "an" if description[:1].lower() in ("a", "e", "i", "o", "u") else "a"
    return REV_ANSWER_CLEAN.format(article=article, category=description)


def caption_question(category: str) -> str:
    """The request for a pseudo-caption of the only object of `category` in an image."""
    return CAPTION_PROMPT.format(category=category)


def spatial_direct_question(obj_1: str, obj_2: str) -> str:
    """The direct question of COCO-Spatial, for left/right and above/below alike."""
    return SPATIAL_DIRECT.format(obj_1=obj_1, obj_2=obj_2)


def spatial_word(side_of_obj_2: str, convention: Convention = "natural") -> str:
    """The right word for "Which side of obj_1 is obj_2 located?".

    `side_of_obj_2` (left, right, above or below) is where obj_2 lies as seen from obj_1: the natural reading. With
    `icl_example`, the direction of the answers in the paper's examples, it is the opposite word. The query of
    `spatial_icl_question` has this form too: there the side of the asked object is `word_1`.
    """
    return side_of_obj_2 if convention == "natural" else OPPOSITE[side_of_obj_2]


def spatial_answer(subject: str, side: str, other: str) -> str:
    """A whole answer: "The cat is located to the left of dog." `side` is left, right, above or below."""
    return SPATIAL_ANSWER.format(subject=subject, side=SIDE_PHRASES[side], other=other)


def spatial_icl_question(
    obj_1: str, obj_2: str, obj_3: str, word_1: str, convention: Convention = "icl_example"
) -> str:
    """Two solved examples about obj_1 and obj_2, then the question where obj_1 is with respect to obj_3 (appendix E).

    `word_1` (left, right, above or below) is the side on which obj_1 lies; obj_2 and obj_3 lie on the other.
    `icl_example` is the paper's text; `natural` turns the examples' answers to what their questions ask.
    """
    template = SPATIAL_ICL if convention == "icl_example" else SPATIAL_ICL_NATURAL
    sides = {"side_1": SIDE_PHRASES[word_1], "side_2": SIDE_PHRASES[OPPOSITE[word_1]]}
    return template.format(obj_1=obj_1, obj_2=obj_2, obj_3=obj_3, **sides)


def said_side(answer: str, word: str) -> str | None:
    """Which of `word` (left, right, above or below) and its opposite occurs in an answer; "both"; None: neither."""
    found = [side for side in (word, OPPOSITE[word]) if _SIDE[side].search(answer)]
    return "both" if len(found) == 2 else (found[0] if found else None)


def says_absent(answer: str) -> bool:
    """Whether an answer says that the object asked for is not there, as the NegPred target does."""
    return _ABSENT.search(answer) is not None


def hallucination_question(obj: str, medium: str = "image") -> str:
    """The presence question of the Hal sets; `medium` is image or video."""
    return HALLUCINATION_PROMPT.format(obj=obj, medium=medium)


def render_chat(turns: Sequence[tuple[str, str]], system: str, has_image: bool = True) -> tuple[str, list[Span]]:
    """The training text of (question, answer) turns and the supervised character span (start, end) of every answer.

    `text[start:end]` is a space, the answer and `</s>`. The image stands at the start of the first question, once:
    `<image>` and `</s>` inside a question are taken out. Without a system text the result begins with "USER: ".
    `has_image=False` leaves the image out, for text-only conversations.
    Raises DataError for no turns, an empty question, an empty answer, or an answer that holds `<image>` or `</s>`.
    """
    if not turns:
        raise DataError("rendering a conversation: it has no turns; at least one question and answer is needed")
    text = f"{system} " if system else ""
    spans = []
    for number, (question, answer) in enumerate(turns):
        text += _ask(question, has_image and number == 0)
        start = len(text)
        text += f" {_checked_answer(answer, f'the answer to {question!r}')}{STOP}"
        spans.append((start, len(text)))
    return text, spans


def render_prompt(question: str, system: str, history: Sequence[tuple[str, str]] = (), has_image: bool = True) -> str:
    """The text from which the model goes on; it ends exactly at "ASSISTANT:" and equals the beginning of the training
    text of the same conversation.

    `history`: the (question, answer) turns before. Raises DataError as `render_chat`.
    """
    if history:
        return render_chat(history, system, has_image)[0] + _ask(question, False)
    return (f"{system} " if system else "") + _ask(question, has_image)


def fill_turn(template: str, **parts: str) -> str:
    """A family's own template with its {parts}, which lose the marks of the format."""
    for name, text in parts.items():
        template = template.replace(f"{{{name}}}", _without_marks(text))
    return template


def is_own_turn(prompt: str, template: str) -> bool:
    """Whether a prompt was made of a family's own `template` and so is a whole turn already."""
    return bool(template) and prompt.startswith(template[: template.index("{")])


def render_family(prompt: str, family: "FamilyConfig") -> str:
    """The text from which a model of a family goes on, `<image>` where its image goes. Raises DataError for an empty
    question."""
    if not any(is_own_turn(prompt, template) for template in (family.loc_pred, family.rev_loc)):
        template = family.question
        if family.short_question and prompt.endswith(SHORT_ANSWER_SUFFIX):
            prompt, template = prompt.removesuffix(SHORT_ANSWER_SUFFIX), family.short_question
        prompt = template.replace("{question}", _without_marks(prompt))
    return family.layout.replace("{turn}", prompt)


def render_plain(caption: str) -> tuple[str, Span]:
    """The stage-1 text `<image>{caption}\\n` and its supervised span. Raises DataError as `render_chat`."""
    text = f"{IMAGE}{_checked_answer(caption, 'the caption')}\n"
    return text, (len(IMAGE), len(text))


def _about(template: str, medium: str) -> str:
    return template if medium == "image" else template.replace("image", medium)


def _ask(question: str, with_image: bool) -> str:
    image = f"{IMAGE}\n" if with_image else ""
    return f"{USER} {image}{_without_marks(question)} {ASSISTANT}"


def _without_marks(question: str) -> str:
    cleaned = question
    while IMAGE in cleaned or STOP in cleaned:  # a loop, since taking one marker out may join the halves of another
        cleaned = cleaned.replace(IMAGE, "").replace(STOP, "")
    cleaned = cleaned.strip()
    if not cleaned:
        raise DataError(f"rendering a conversation: the question {question!r} is empty; leave the turn out or mend it")
    return cleaned


def _checked_answer(answer: str, name: str) -> str:
    stripped = answer.strip()
    if not stripped:
        raise DataError(
            f"rendering a conversation: {name} is empty, so there is nothing to learn; leave the turn out or mend it"
        )
    for marker in (IMAGE, STOP):
        if marker in stripped:
            raise DataError(
                f"rendering a conversation: {name} holds {marker}, which is not text but a mark of the format; "
                "take it out of the record"
            )
    return stripped
