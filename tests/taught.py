"""A tiny checkpoint that knows a few drawn scenes by heart: it finds an object in each, describes it, and answers one
question, in the words in which `locvlm.serving` asks."""

from dataclasses import dataclass
from pathlib import Path

import torch

from locvlm.coordinates import make_location_format
from locvlm.data.conversations import open_conversations, write_conversations
from locvlm.geometry import make_geometry
from locvlm.presets import preset
from locvlm.prompts import loc_answer, rev_answer
from locvlm.records import BoxXYXY, Conversation, Turn
from locvlm.serving.forms import Forms, Query
from locvlm.training import stage
from locvlm.training.checkpoints import FolderCheckpoints
from tests.tiny import World

N_SCENES = 4


@dataclass(frozen=True)
class Scene:
    """An image and what the model was taught of it. `box` is the object's, to the nearest bin."""

    image: Path
    width: int
    height: int
    category: str
    box: BoxXYXY
    located: str
    described: str
    question: str
    answer: str


@dataclass(frozen=True)
class Taught:
    """A checkpoint and the scenes that it knows."""

    model: Path
    scenes: tuple[Scene, ...]


def teach(world: World, folder: Path) -> Taught:
    """Train the shipped foundation for some seconds."""
    config = preset(
        "tiny",
        [
            "stages.instruct.mixture=[]",
            "stages.instruct.conversations_per_image=0",
            "stages.instruct.global_batch=12",
            "stages.instruct.steps=90",
            "stages.instruct.learning_rate=2e-3",
            "stages.instruct.precision=fp32",
            "cluster.num_workers=0",
            "cluster.checkpoint_every=1000",
        ],
    )
    location = make_location_format(config.coordinates, make_geometry(config.geometry))
    forms = Forms(config, 500)
    questions = {c.image: c.turns[0] for c in open_conversations(world.data["generic"]) if c.objective == "left_right"}
    scenes: dict[str, Scene] = {}
    taught = []
    for conversation in open_conversations(world.data["localize"]):
        turn, size = conversation.turns[0], (conversation.width, conversation.height)
        if turn.objective != "loc_pred" or conversation.image in scenes or conversation.image not in questions:
            continue
        assert turn.box_xyxy is not None
        located = loc_answer(location.encode(turn.box_xyxy, *size))
        box = location.decode(located, *size)
        assert box is not None
        assert len(box) == 4
        asked = questions[conversation.image]
        scene = Scene(
            world.images / conversation.image,
            *size,
            turn.category,
            box,
            located,
            rev_answer(turn.category),
            asked.question,
            asked.answer,
        )
        scenes[conversation.image] = scene
        for number, (query, answer) in enumerate(
            (
                (Query(image="", locate=turn.category), located),
                (Query(image="", box=list(box)), scene.described),
                (Query(image="", question=asked.question), asked.answer),
            )
        ):
            worded = (Turn("literal", question=forms.prompt(query, *size), answer=answer),)
            key = f"{conversation.id}-{number}"
            taught.append(Conversation(key, conversation.image, *size, "literal", worded))
        if len(scenes) == N_SCENES:
            break
    data = folder / "taught"
    data.mkdir()
    write_conversations(data, taught)
    job = stage.Job("instruct", config, {"taught": data}, world.images, folder / "run")
    stage.check(job, 0)
    stage.begin(job)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other in so small a model
    try:
        stage.run(job, FolderCheckpoints(job.folder), torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    return Taught(job.output, tuple(scenes.values()))
