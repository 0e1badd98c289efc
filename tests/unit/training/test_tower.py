"""The vision tower's lesson."""

from pathlib import Path

import numpy as np
import torch

from locvlm.config import GeometryConfig
from locvlm.data.coco import read_instances
from locvlm.data.scenes import draw_scenes
from locvlm.geometry import make_geometry
from locvlm.model import load
from locvlm.pixels import open_images
from locvlm.records import ImageRecord, ObjectRecord
from locvlm.training import tower
from tests.tiny import World, build_world

GEOMETRY = make_geometry(GeometryConfig(kind="squash", side=48))


def image(*things: ObjectRecord) -> ImageRecord:
    return ImageRecord(1, "a.png", 96, 48, things)


def test_a_patch_shows_what_covers_most_of_it_and_where_the_centre_of_that_is() -> None:
    """The picture is squashed: 96 x 48 -> 48 x 48, so x is halved. Cells are 4 pixels."""
    disc = ObjectRecord(1, "disc", (0.0, 0.0, 32.0, 16.0))  # squashed: (0, 0, 16, 16), centre (8, 8)
    cross = ObjectRecord(2, "cross", (80.0, 32.0, 96.0, 48.0))  # squashed: (40, 32, 48, 48), centre (44, 40)
    shown, cells = tower.patch_labels(image(disc, cross), ["cross", "disc"], GEOMETRY, 8)
    expected = np.zeros((6, 6), np.int64)
    expected[:2, :2] = 2
    expected[4:, 5] = 1
    assert shown.tolist() == expected.ravel().tolist()
    at = cells.reshape(6, 6, 2)
    assert at[0, 0].tolist() == at[1, 1].tolist() == [2, 2]
    assert at[4, 5].tolist() == at[5, 5].tolist() == [11, 10]
    assert at[0, 5].tolist() == [11, 1]  # ground: its own centre (44, 4)


def test_a_patch_that_is_hardly_touched_shows_the_ground() -> None:
    little = ObjectRecord(1, "disc", (0.0, 0.0, 4.0, 8.0))  # a quarter of the first patch
    shown, _ = tower.patch_labels(image(little), ["disc"], GEOMETRY, 8)
    assert not shown.any()


def test_the_lesson_moves_the_tower_alone_and_the_same_seed_gives_the_same_tower(tmp_path: Path) -> None:
    world: World = build_world(tmp_path)
    draw_scenes(tmp_path / "more", seed=6, n_train=64, n_test=16)
    parts = [read_instances(tmp_path / "more" / f"instances_{split}.json") for split in ("train", "test")]
    images = open_images(tmp_path / "more" / "images")
    drawn = [tower.make_lesson(part, images, GEOMETRY, 8) for part in parts]
    found = []
    for _ in range(2):
        model = load(world.foundation).model
        before = {name: value.clone() for name, value in model.state_dict().items()}
        figures = tower.teach(model, *drawn, 12, 30, 0)
        found.append((figures, model.state_dict()))
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved
        assert all("vision_tower" in name for name in moved)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
