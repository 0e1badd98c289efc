"""Questions about places in the form of a model that others trained: its own words and its own text for places.

What a data set's prompts say in our form is left aside: a question is worded anew from the object that it is about.
"""

from dataclasses import replace

from locvlm.config import FamilyConfig
from locvlm.coordinates import make_location_format
from locvlm.data.instruct import Renderer
from locvlm.errors import DataError
from locvlm.evaluation.questions import Question, box_of
from locvlm.geometry import make_geometry
from locvlm.prompts import fill_turn, loc_question, rev_question
from locvlm.records import BoxXYXY, Conversation

OUT_OF_SIGHT = "the object lies outside of what this model sees of the image"
_TEMPLATE = 0  # of the paper's prompts, where rows are asked in them


class Wording:
    """How one family asks about places. `family.coordinates` must be there.

    A question whose object the family's geometry loses gets an empty prompt.
    """

    def __init__(self, family: FamilyConfig, seed: int) -> None:
        assert family.coordinates is not None
        geometry = None if family.geometry is None else make_geometry(family.geometry)
        self._family = family
        self._location = make_location_format(family.coordinates, geometry)
        self._renderer = Renderer(self._location, family.prompts, seed)

    def turns(self, conversation: Conversation) -> list[tuple[str, str]]:
        """(prompt, "") of the one structured turn of a conversation."""
        (turn,) = conversation.turns
        size = (conversation.width, conversation.height)
        if turn.objective == "rev_loc" and self._family.rev_loc and turn.box_xyxy is not None:
            return [(self._region(turn.box_xyxy, *size), "")]
        if turn.objective != "rev_loc" and self._family.loc_pred:
            return [(fill_turn(self._family.loc_pred, description=turn.description or turn.category), "")]
        unworded = replace(conversation, turns=(replace(turn, question="", answer=""),))
        try:
            return [(self._renderer.turns(unworded)[0][0], "")]
        except DataError:  # the crop loses it
            return [("", "")]

    def reworded(self, question: Question) -> Question:
        """A question of a file, which says in its reference what it is about. Raises DataError when it does not."""
        reference = question.reference
        if "objective" in reference:
            if self._family.loc_pred:
                prompt = fill_turn(self._family.loc_pred, description=reference["category"])
            else:
                clean = self._family.prompts.clean_templates
                prompt = loc_question(_TEMPLATE, reference["category"], self._location.repr_text, clean)
            return replace(question, prompt=prompt)
        if "width" not in reference or reference["box"] is None:
            raise DataError(
                f"writing the prompt of region {question.id!r} for a {self._family.family} model: its box or the size "
                "of its image is not known; rows need box, width and height"
            )
        box = box_of(reference["box"])
        return replace(question, prompt=self._region(box, reference["width"], reference["height"]))

    def _region(self, box: BoxXYXY, width: float, height: float) -> str:
        try:
            place = self._location.encode(box, width, height)
        except DataError:  # the crop loses it
            return ""
        return fill_turn(self._family.rev_loc, loc=place) if self._family.rev_loc else rev_question(_TEMPLATE, place)
