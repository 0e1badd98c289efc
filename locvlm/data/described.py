"""Requests for a description of an object, answered from the annotations: on which side of another object it is.

The paper's captioner is a visual LLM that was taught elsewhere to describe. Where there is none, as for drawn scenes,
a model that is tuned on these conversations is one: `locvlm caption` asks in the same words (paper, section 4.1).
"""

from collections.abc import Iterator, Sequence

from locvlm import prompts
from locvlm.data.coco import Instances, usable_objects
from locvlm.data.generic import CLEARLY_APART, centre
from locvlm.data.stated import AXIS_WORDS
from locvlm.records import Conversation, ImageRecord, ObjectRecord, Turn

OBJECTIVE = "described"


def build_described(instances: Instances) -> Iterator[Conversation]:
    """One conversation for each of the `usable_objects`, with the paper's request for a pseudo-caption:

    - `The tent is located to the left of book.`: beside the object that is farthest away sideways, where the centres
      are at least CLEARLY_APART of the width apart;
    - `The tent is with the book.`: the first of the others by id, where none is so far away;
    - `The tent is the one object in this image.`: where there is no other that its name picks out.

    By image and then annotation id; called `{image id}-described-{annotation id}`. No draws.
    """
    for image in instances.images:
        things = usable_objects(image)
        for thing in things:
            answer = _description(image, thing, [other for other in things if other is not thing])
            turn = Turn(
                OBJECTIVE,
                category=thing.category,
                box_xyxy=thing.box_xyxy,
                question=prompts.caption_question(thing.category),
                answer=answer,
            )
            name = f"{image.id}-{OBJECTIVE}-{thing.id}"
            yield Conversation(name, image.file_name, image.width, image.height, OBJECTIVE, (turn,))


def _description(image: ImageRecord, thing: ObjectRecord, others: Sequence[ObjectRecord]) -> str:
    if not others:
        return f"The {thing.category} is the one object in this image."
    farthest = max(others, key=lambda other: (abs(centre(thing, 0) - centre(other, 0)), -other.id))
    shift = centre(thing, 0) - centre(farthest, 0)
    if abs(shift) < CLEARLY_APART * image.width:
        return f"The {thing.category} is with the {others[0].category}."
    return prompts.spatial_answer(thing.category, AXIS_WORDS[0][shift > 0], farthest.category)
