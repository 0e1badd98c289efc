"""The tiny foundation: the stand-in for CLIP and LLaMA that the tiny preset starts from.

A vision tower that sees what stands in which column and row (`tower`), and a language model that looks names up in
scenes stated in words, then in soft tokens, and compares their places (`reading`). Each has its own lessons, from
scratch; they have never met, as CLIP and LLaMA have not. Stage 1 puts a fresh adapter between them.
"""

import json
import logging
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from locvlm import prompts
from locvlm.config import ExperimentConfig
from locvlm.data.coco import Instances, read_instances
from locvlm.data.stated import COCO_NAMES, MADE_UP, names_beside
from locvlm.errors import ConfigError
from locvlm.geometry import make_geometry
from locvlm.model.checkpoint import LoadedModel, fresh, save
from locvlm.model.tokenizer import TextEncoder, word_tokenizer
from locvlm.pixels import open_images
from locvlm.records import atomic_write, read_json
from locvlm.training import reading, tower

log = logging.getLogger(__name__)

TOWER_STEPS, READING_STEPS, SOFT_STEPS = 2000, 4000, 2400
VOCABULARY = 2048  # what `model.language.vocab_size` has to be at least
N_HELD_OUT_NAMES = 24
RECIPE = "recipe.json"


def train_foundation(
    config: ExperimentConfig,
    annotations: Path,
    held_out: Path,
    images: Path,
    output: Path,
    tower_steps: int = TOWER_STEPS,
    reading_steps: int = READING_STEPS,
    soft_steps: int = SOFT_STEPS,
) -> Path:
    """Train and save the foundation under `output`; returns the folder. `annotations`, `held_out`: COCO instances of
    drawn scenes under `images`, to learn from and to measure the tower on. A finished lesson is kept beside `output`
    until all are. Raises ConfigError for a lesson without steps and for a vocabulary that is too small."""
    if min(tower_steps, reading_steps, soft_steps) < 1:
        raise ConfigError(
            f"making the foundation: lessons of {tower_steps}, {reading_steps} and {soft_steps} steps; each needs at "
            "least 1"
        )
    lessons = read_instances(annotations)
    taught, others = _names(lessons, config.seed)
    tokenizer = _tokenizer(lessons)
    if len(tokenizer) > config.model.language.vocab_size:
        raise ConfigError(
            f"making the foundation: its words are {len(tokenizer)} tokens, model.language.vocab_size is "
            f"{config.model.language.vocab_size}; add --set model.language.vocab_size={VOCABULARY}"
        )
    spoken = _plain_words(tokenizer, {*taught, *others})
    encoder = TextEncoder(tokenizer, config.model.vision.n_tokens)
    model = fresh(config, encoder, config.seed)

    def see() -> dict[str, Any]:
        source, geometry = open_images(images), make_geometry(config.geometry)
        patch = config.model.vision.patch_size
        lesson, asked = (
            tower.make_lesson(part, source, geometry, patch) for part in (lessons, read_instances(held_out))
        )
        return asdict(tower.teach(model, lesson, asked, len(lessons.categories), tower_steps, config.seed))

    def read() -> dict[str, Any]:
        return asdict(reading.teach(model, encoder, taught, others, reading_steps, config.seed))

    def read_soft() -> dict[str, Any]:
        words, soft = reading.teach_soft(
            model, encoder, taught, lessons.categories, spoken, others, soft_steps, config.seed
        )
        return {"reading": asdict(words), "soft": asdict(soft)}

    parts = output.with_name(f".{output.name}.lessons")
    speech = torch.nn.ModuleList([model.model.language_model, model.lm_head])
    seen = _once(parts / f"tower-{tower_steps}-{config.seed}", model.model.vision_tower, see)
    _once(parts / f"reading-{reading_steps}-{config.seed}", speech, read)
    read_at_last = _once(parts / f"soft-{reading_steps}-{soft_steps}-{config.seed}", speech, read_soft)
    recipe = {
        "verb": "locvlm foundation",
        "steps": {"tower": tower_steps, "reading": reading_steps, "soft": soft_steps},
        "seed": config.seed,
        "held_out_names": others,
        "figures": {"tower": seen, **read_at_last},
    }
    text = json.dumps(recipe, indent=1) + "\n"
    save(
        LoadedModel(model, encoder, config),
        output,
        torch.float16,
        complete=lambda folder: _write(folder / RECIPE, text),
    )
    shutil.rmtree(parts)
    return output


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text)


def _once(stem: Path, part: torch.nn.Module, lesson: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures of a lesson of `part`, which is not given again when its weights lie there."""
    figures, weights = stem.with_suffix(".json"), stem.with_suffix(".pt")
    if figures.is_file():
        part.load_state_dict(torch.load(weights, weights_only=True))
        return dict(read_json(figures))
    found = lesson()
    stem.parent.mkdir(parents=True, exist_ok=True)
    torch.save(part.state_dict(), weights)
    _write(figures, json.dumps(found) + "\n")
    return found


def _names(instances: Instances, seed: int) -> tuple[list[str], list[str]]:
    """Single words to name things by: those of the lesson, and those held out (none is a word of a category here)."""
    drawn = {word for name in instances.categories for word in name.split()}
    words = names_beside(instances.categories)
    held_out = sorted(random.Random(f"{seed}/names").sample(words, N_HELD_OUT_NAMES))
    return sorted({*words, *drawn} - set(held_out)), held_out


def _tokenizer(instances: Instances) -> PreTrainedTokenizerFast:
    corpus = [COCO_NAMES, *instances.categories, *_project_sentences()]
    whole = re.findall(r"\([a-z0-9,]+\)", " ".join(corpus))
    return word_tokenizer(corpus, [*whole, *MADE_UP, *map(str, range(reading.COLUMNS))], n_numbers=100)


def _plain_words(tokenizer: PreTrainedTokenizerFast, names: set[str]) -> list[str]:
    """The words of the project's sentences that are one token and no name, each once."""
    words = sorted(set(re.findall(r"[A-Za-z]+", " ".join(_project_sentences()))) - names)
    return [word for word in words if len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1]


def _project_sentences() -> list[str]:
    """Every sentence that the project's templates can make, for the vocabulary."""
    sides = ("left", "right", "above", "below")
    forms = ("(x1,y1,x2,y2) bbox", "(cx,cy) point")
    return [
        *prompts.LOC_PROMPTS,
        *prompts.REV_PROMPTS,
        *prompts.BRIEF_REQUESTS,
        *forms,
        prompts.LOC_ANSWER,
        prompts.NEG_ANSWER,
        prompts.REV_ANSWER,
        prompts.CAPTION_PROMPT,
        prompts.SPATIAL_DIRECT,
        prompts.SPATIAL_ICL,
        prompts.SHORT_ANSWER_SUFFIX,
        *(prompts.spatial_answer("x", side, "y") for side in sides),
        prompts.hallucination_question("x", "image"),
        prompts.hallucination_question("x", "video"),
        "USER ASSISTANT Yes No that which with an and of in on A photo where none is yes no steps side height",
        "above below",
    ]
