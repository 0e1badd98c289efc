"""The shipped foundation knows what stage 2 builds on: its tower sees what stands where, its language model looks names
up in stated scenes and compares their places. Asked about scenes and names that it has never met."""

import json
from pathlib import Path

import pytest
import torch

from locvlm.data.coco import read_instances
from locvlm.data.scenes import CATEGORIES, draw_scenes
from locvlm.geometry import make_geometry
from locvlm.model import load
from locvlm.model.checkpoint import TINY_FOUNDATION, LoadedModel
from locvlm.model.variants import count_parameters
from locvlm.pixels import normalised, open_images
from locvlm.presets import preset
from locvlm.training import reading, tower


@pytest.fixture(scope="module")
def foundation() -> LoadedModel:
    return load(TINY_FOUNDATION)


def test_it_has_the_shape_of_the_preset(foundation: LoadedModel) -> None:
    assert foundation.config.model.vision == preset("tiny").model.vision
    assert foundation.config.model.language == preset("tiny").model.language
    assert 1_000_000 < count_parameters(foundation.model) < 3_000_000


def test_it_answers_about_stated_scenes_of_names_that_no_lesson_had(foundation: LoadedModel) -> None:
    recipe = json.loads((TINY_FOUNDATION / "recipe.json").read_text())
    found = reading.measure(foundation.model, foundation.encoder, recipe["held_out_names"], seed=99)
    assert min(found.presence, found.side, found.presence_in_full, found.side_in_full, found.told) > 0.9


def test_linear_readers_of_the_tower_tell_what_stands_where(foundation: LoadedModel, tmp_path: Path) -> None:
    """Least squares on the patches of 200 scenes, asked about those of 50 others."""
    draw_scenes(tmp_path / "scenes", seed=99, n_train=200, n_test=50)
    images, geometry = open_images(tmp_path / "scenes" / "images"), make_geometry(foundation.config.geometry)
    parts = [
        tower.make_lesson(read_instances(tmp_path / "scenes" / f"instances_{split}.json"), images, geometry, 8)
        for split in ("train", "test")
    ]
    with torch.no_grad():
        seen = [foundation.model.patch_features(torch.from_numpy(normalised(list(part.pixels)))) for part in parts]
    objects = [torch.from_numpy(part.shown > 0) for part in parts]
    features = [
        torch.cat([some[shows], torch.ones(int(shows.sum()), 1)], 1) for some, shows in zip(seen, objects, strict=True)
    ]

    def read(name: str, n: int) -> float:
        values = {"category": lambda part: part.shown, "column": lambda part: part.cells[..., 0]}
        values["row"] = lambda part: part.cells[..., 1]
        told = [torch.from_numpy(values[name](part))[shows] for part, shows in zip(parts, objects, strict=True)]
        reader = torch.linalg.lstsq(features[0], torch.nn.functional.one_hot(told[0], n).float()).solution
        return float(((features[1] @ reader).argmax(-1) == told[1]).float().mean())

    assert read("category", len(CATEGORIES) + 1) > 0.9
    assert read("column", tower.CELLS) > 0.85
    assert read("row", tower.CELLS) > 0.8
