"""The control of the whole chain from text to loss to answer: a model that cannot learn a few samples by heart, or
cannot say them again, has a fault that no benchmark figure would name."""

import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from locvlm.config import EvaluationConfig
from locvlm.coordinates import make_location_format
from locvlm.data.conversations import open_conversations, write_conversations
from locvlm.data.instruct import Renderer, frozen
from locvlm.geometry import box_iou, make_geometry
from locvlm.model import load
from locvlm.pixels import open_images
from locvlm.presets import preset
from locvlm.records import Conversation
from locvlm.training import stage
from locvlm.training.checkpoints import FolderCheckpoints
from tests.tiny import World, build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


def some(world: World, shares: dict[str, int]) -> list[Conversation]:
    """`shares`: objective -> number of conversations, each about an image of its own as far as there are so many."""
    found: list[Conversation] = []
    for objective, n in shares.items():
        source = "localize" if objective in ("loc_pred", "neg_pred", "rev_loc") else "generic"
        of_image: dict[str, Conversation] = {}
        for conversation in open_conversations(world.data[source]):
            if conversation.turns[0].objective == objective and len(conversation.turns) == 1:
                of_image.setdefault(conversation.image, conversation)
        found += list(of_image.values())[:n]
        assert len(of_image) >= n
    return found


def learn(
    world: World, folder: Path, conversations: Sequence[Conversation], steps: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """Train the tiny preset from its foundation on them, always in the same words; its greedy answers, and (question,
    answer) as they were."""
    config = preset(
        "tiny",
        [
            "stages.instruct.mixture=[]",
            "stages.instruct.conversations_per_image=0",
            "stages.instruct.global_batch=8",
            f"stages.instruct.steps={steps}",
            "stages.instruct.learning_rate=2e-3",
            "stages.instruct.precision=fp32",
            "cluster.num_workers=0",
            "cluster.checkpoint_every=1000",
        ],
    )
    location = make_location_format(config.coordinates, make_geometry(config.geometry))
    renderer = Renderer(location, config.prompts, config.seed)
    worded = list(frozen(conversations, renderer))
    (folder / "own").mkdir()
    write_conversations(folder / "own", worded)
    job = stage.Job("instruct", config, {"own": folder / "own"}, world.images, folder / "out")
    stage.check(job, 0)
    stage.begin(job)
    stage.run(job, FolderCheckpoints(job.folder), torch.device("cpu"))
    asked = [(conversation.turns[0].question, conversation.turns[0].answer) for conversation in worded]
    images = open_images(world.images)
    requests = [
        SimpleNamespace(
            id=conversation.id,
            image=Path(conversation.image),
            prompt=question,
            open=functools.partial(images.open, conversation.image),
        )
        for conversation, (question, _) in zip(conversations, asked, strict=True)
    ]
    answers = load(job.output).answers(requests, EvaluationConfig(temperature=0, max_new_tokens=60))
    return answers, asked


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_places_are_learned_to_an_overlap_of_one(world: World, tmp_path: Path) -> None:
    conversations = some(world, {"loc_pred": 8})
    answers, asked = learn(world, tmp_path, conversations, steps=130)
    config = preset("tiny")
    location = make_location_format(config.coordinates, make_geometry(config.geometry))
    overlaps = []
    for conversation, answer, (_, target) in zip(conversations, answers, asked, strict=True):
        said = location.decode(answer, conversation.width, conversation.height)
        truth = location.decode(target, conversation.width, conversation.height)  # the box to the nearest bin
        assert truth is not None
        assert len(truth) == 4
        overlaps.append(0.0 if said is None or len(said) != 4 else box_iou(said, truth))
    assert overlaps == [1.0] * 8


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_mixed_questions_are_answered_word_for_word(world: World, tmp_path: Path) -> None:
    shares = {"loc_pred": 10, "neg_pred": 5, "rev_loc": 10, "caption": 10, "presence": 8, "left_right": 7}
    conversations = some(world, shares)
    assert len(conversations) == 50
    answers, asked = learn(world, tmp_path, conversations, steps=320)
    assert answers == [answer for _, answer in asked]
