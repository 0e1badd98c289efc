"""Which token positions carry loss: exactly the answers and their closing tokens, in every form of a sample.

Read from the gradient: the hidden states that receive one are those that predict a supervised token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from locvlm.config import ExperimentConfig, resolve
from locvlm.coordinates import make_location_format
from locvlm.data.collate import Batch, collate
from locvlm.data.conversations import open_conversations, write_conversations
from locvlm.data.dataset import TrainingData
from locvlm.data.instruct import Renderer
from locvlm.geometry import make_geometry
from locvlm.model import load
from locvlm.model.checkpoint import LoadedModel
from locvlm.pixels import open_images
from locvlm.records import Conversation, Turn
from tests.tiny import World, build_world

BOX = (10.0, 12.0, 30.0, 40.0)
PLACE = "(10,12,30,40)"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


def conversation(key: str, *turns: Turn) -> Conversation:
    return Conversation(key, "train/000001.png", 48, 48, turns[0].objective, turns)


def talk(question: str, answer: str) -> Turn:
    return Turn("talk", question=question, answer=answer)


def batch_of(
    world: World, folder: Path, conversations: Sequence[Conversation], *overrides: str
) -> tuple[LoadedModel, Batch]:
    """One sample a conversation, or one packed sample of all where `conversations_per_image` says so."""
    values = world.config.model_dump(mode="json")
    config: ExperimentConfig = resolve(values, ["stages.instruct.mixture=[]", *overrides])
    loaded = load(world.foundation)
    write_conversations(folder, conversations)
    geometry = make_geometry(config.geometry)
    data = TrainingData(
        config.stages.instruct,
        {"own": open_conversations(folder)},
        open_images(world.images),
        Renderer(make_location_format(config.coordinates, geometry), config.prompts, config.seed),
        loaded.encoder,
        geometry,
        config.model.language.max_length,
        config.seed,
    )
    return loaded, collate([data.sample(index) for index in range(len(data))], loaded.encoder.pad_id)


def learned(loaded: LoadedModel, batch: Batch) -> list[list[int]]:
    """Columns, row by row, of the hidden states that the loss pulls at."""
    kept: list[Any] = []

    def keep(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = loaded.model.model.language_model.norm.register_forward_hook(keep)
    loaded.model.sum_loss(**batch.inputs(torch.device("cpu"))).backward()
    handle.remove()
    pulled = kept[0].grad.abs().sum(-1) > 0
    return [row.nonzero().flatten().tolist() for row in pulled]


def read(loaded: LoadedModel, ids: Sequence[int]) -> str:
    return str(loaded.encoder.tokenizer.decode(list(ids), skip_special_tokens=False))


def check(loaded: LoadedModel, batch: Batch, answers: list[list[str]]) -> None:
    """Row by row: the tokens after the positions that learn are the answers, and they are the targets."""
    columns = learned(loaded, batch)
    length = batch.input_ids.shape[1]
    assert sorted(batch.sources.tolist()) == [row * length + c for row, found in enumerate(columns) for c in found]
    for row, expected in enumerate(answers):
        here = (batch.sources // length) == row
        assert read(loaded, batch.targets[here].tolist()) == "".join(expected)
        at = batch.sources[here] % length
        if batch.owners is None:  # a plain row: each target stands right behind its position
            assert batch.input_ids[row, at + 1].tolist() == batch.targets[here].tolist()
    assert loaded.encoder.image_id not in batch.targets.tolist()
    assert loaded.encoder.pad_id not in batch.targets.tolist()


def test_in_a_chat_exactly_the_answer_and_its_stop_carry_loss(world: World, tmp_path: Path) -> None:
    """The system text, the image, the question and the roles do not."""
    system = "prompts.system=A chat about an image."
    own = [conversation("a", talk("Is there apple in image?", "Yes, a red apple."))]
    loaded, batch = batch_of(world, tmp_path, own, system, "stages.instruct.conversations_per_image=0")
    check(loaded, batch, [[" Yes, a red apple.</s>"]])
    text = read(loaded, batch.input_ids[0].tolist()).replace("<image>", "")
    assert text == ("<s>A chat about an image. USER: \nIs there apple in image? ASSISTANT: Yes, a red apple.</s>")


def test_every_answer_of_several_turns_carries_loss(world: World, tmp_path: Path) -> None:
    own = [conversation("a", talk("What?", "A dog."), talk("And?", "Yes"), talk("Where?", "No"))]
    loaded, batch = batch_of(world, tmp_path, own, "stages.instruct.conversations_per_image=0")
    check(loaded, batch, [[" A dog.</s>", " Yes</s>", " No</s>"]])


def test_padding_carries_no_loss(world: World, tmp_path: Path) -> None:
    own = [conversation("a", talk("What?", "A dog.")), conversation("b", talk("What is it there?", "Yes yes yes yes"))]
    loaded, batch = batch_of(world, tmp_path, own, "stages.instruct.conversations_per_image=0")
    found = {read(loaded, batch.targets[(batch.sources // batch.input_ids.shape[1]) == row].tolist()) for row in (0, 1)}
    assert found == {" A dog.</s>", " Yes yes yes yes</s>"}
    learned_columns = learned(loaded, batch)
    assert sorted(map(len, learned_columns)) == sorted(len(loaded.encoder.encode([text])[0].ids) - 1 for text in found)


def test_of_a_plain_caption_all_of_it_and_its_newline_carry_loss(world: World, tmp_path: Path) -> None:
    own = [conversation("a", talk("Describe.", "a cat on a mat"))]
    loaded, batch = batch_of(
        world, tmp_path, own, "stages.instruct.format=plain", "stages.instruct.conversations_per_image=0"
    )
    check(loaded, batch, [["a cat on a mat\n"]])
    # the first word is learned at the last token of the image
    first = int(batch.sources.min())
    assert batch.input_ids[0, first] == loaded.encoder.image_id
    assert first == loaded.encoder.n_image_tokens


def test_packed_behind_one_image_each_answer_carries_loss_at_its_own_place(world: World, tmp_path: Path) -> None:
    own = [
        conversation("a", talk("What?", "A dog."), talk("And?", "Yes")),
        conversation("b", Turn("loc_pred", category="apple", box_xyxy=BOX)),
        conversation("c", Turn("neg_pred", category="apple")),
        conversation("d", Turn("rev_loc", category="apple", box_xyxy=BOX)),
    ]
    loaded, batch = batch_of(world, tmp_path, own, "stages.instruct.conversations_per_image=4")
    assert batch.owners is not None
    assert len(batch.input_ids) == 1
    owner = batch.owners[0, batch.sources]
    texts = {read(loaded, batch.targets[owner == number].tolist()) for number in range(1, 5)}
    assert texts == {
        " A dog.</s> Yes</s>",
        f" It is located at {PLACE}</s>",
        " There is no such object in the image</s>",
        " There is a apple.</s>",
    }
    assert learned(loaded, batch) == [sorted(batch.sources.tolist())]
    # a target is the token that follows its position in the same conversation
    assert batch.input_ids[0, batch.sources + 1].tolist() == batch.targets.tolist()
    assert torch.equal(batch.owners[0, batch.sources + 1], owner)


def test_what_carries_no_loss_has_no_target_to_change(world: World, tmp_path: Path) -> None:
    """The loss does not move when the tokens after the last answer of a row change, which are padding."""
    own = [conversation("a", talk("What?", "A dog.")), conversation("b", talk("What is it?", "Yes yes yes yes"))]
    loaded, batch = batch_of(world, tmp_path, own, "stages.instruct.conversations_per_image=0")
    inputs = batch.inputs(torch.device("cpu"))
    with torch.no_grad():
        loss = float(loaded.model.sum_loss(**inputs))
        padding = inputs["input_ids"] == loaded.encoder.pad_id
        assert padding.any()
        inputs["input_ids"] = torch.where(padding, loaded.encoder.stop_id, inputs["input_ids"])
        assert float(loaded.model.sum_loss(**inputs)) == loss
