"""The tiny foundation: the stand-in for CLIP and LLaMA that the tiny preset starts from.

A vision tower and a language model, trained together from scratch on captions and presence questions of drawn scenes.
It has never been asked for a place, nor for a side. Stage 1 begins with its tower and its language model behind a fresh
adapter, as the paper begins with CLIP and LLaMA.
"""

import json
import logging
import re
import time
from pathlib import Path

import torch

from locvlm import prompts
from locvlm.config import ClusterConfig, ExperimentConfig, MixtureEntry, StageConfig
from locvlm.coordinates import make_location_format
from locvlm.data.conversations import open_conversations
from locvlm.data.dataset import TrainingData
from locvlm.data.instruct import Renderer
from locvlm.geometry import make_geometry
from locvlm.model.checkpoint import LoadedModel, fresh, save
from locvlm.model.stages import set_trainable
from locvlm.model.tokenizer import TextEncoder, word_tokenizer
from locvlm.pixels import open_images
from locvlm.training.checkpoints import FolderCheckpoints
from locvlm.training.engine import TorchEngine
from locvlm.training.loop import Point, train

log = logging.getLogger(__name__)

# the 80 category names of COCO, so that real annotations cost one token a word
COCO_NAMES = (
    "person bicycle car motorcycle airplane bus train truck boat "
    "traffic light fire hydrant stop sign parking meter bench bird cat dog "
    "horse sheep cow elephant bear zebra giraffe backpack umbrella handbag "
    "tie suitcase frisbee skis snowboard sports ball kite baseball bat "
    "baseball glove skateboard surfboard tennis racket bottle wine glass cup "
    "fork knife spoon bowl banana apple sandwich orange broccoli carrot "
    "hot dog pizza donut cake chair couch potted plant bed dining table "
    "toilet tv laptop mouse remote keyboard cell phone microwave oven "
    "toaster sink refrigerator book clock vase scissors teddy bear hair drier toothbrush"
)


def foundation_stage(steps: int) -> StageConfig:
    """Captions and presence, half and half; everything trains."""
    return StageConfig(
        mixture=(
            MixtureEntry(source="generic", objective="caption", weight=0.4),
            MixtureEntry(source="generic", objective="presence", weight=0.6),
        ),
        learning_rate=1.5e-3,
        global_batch=32,
        steps=steps,
        warmup_ratio=min(0.5, 200 / steps),
        schedule="linear",
        betas=(0.9, 0.98),
        conversations_per_image=6,
        precision="bf16",
    )


def train_foundation(
    config: ExperimentConfig, generic: Path, images: Path, output: Path, steps: int, *, show_progress: bool = False
) -> Path:
    """Train and save the foundation under `output`; continues an interrupted run. Returns the folder."""
    file = open_conversations(generic)
    corpus = {COCO_NAMES, *_project_sentences()}
    for row in range(0, len(file), max(1, len(file) // 20_000)):
        for turn in file[row].turns:
            corpus.update((turn.question, turn.answer))
    tokenizer = word_tokenizer(corpus, whole=re.findall(r"\([a-z0-9,]+\)", " ".join(corpus)))
    encoder = TextEncoder(tokenizer, config.model.vision.n_tokens)
    if len(tokenizer) > config.model.language.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, model.language.vocab_size is too small")
    model = fresh(config, encoder, config.seed)
    with torch.no_grad():  # positions must be visible from the start: at CLIP's own scale they drown
        positions = model.model.vision_tower.embeddings.position_embedding.weight
        positions.normal_(std=0.3, generator=torch.Generator().manual_seed(config.seed))
    set_trainable(model, ("vision", "adapter", "language"))
    _freeze_unused_block(model, config)
    stage = foundation_stage(steps)
    location = make_location_format(config.coordinates)
    data = TrainingData(
        stage,
        {"generic": file},
        open_images(images),
        Renderer(location, config.prompts, config.seed),
        encoder,
        make_geometry(config.geometry),
        config.model.language.max_length,
        config.seed,
    )
    begun = time.monotonic()
    curve: list[Point] = []

    def on_point(point: Point) -> None:
        curve.append(point)
        if point.step % 100 == 0:
            log.info("step %d loss %.4f (%.0f s)", point.step, point.loss, time.monotonic() - begun)

    engine = TorchEngine(model, stage, torch.device("cpu"))
    train(
        stage,
        data,
        engine,
        FolderCheckpoints(output.parent / f"{output.name}.checkpoints"),
        encoder.pad_id,
        ClusterConfig(num_workers=0, checkpoint_every=200, log_every=20),
        on_point=on_point,
        show_progress=show_progress,
    )
    save(LoadedModel(model, encoder, config), output, torch.float16)
    recipe = {"steps": steps, "seed": config.seed, "final_loss": curve[-1].loss if curve else None}
    (output / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    return output


def _freeze_unused_block(model: torch.nn.Module, config: ExperimentConfig) -> None:
    """The blocks after the feature layer, and the final norm, never receive a gradient."""
    tower = model.model.vision_tower  # type: ignore[union-attr]
    used = config.model.vision.n_layers + 1 + config.model.vision.feature_layer
    unused: list[torch.nn.Module] = [*list(tower.encoder.layers)[used:], tower.post_layernorm]  # type: ignore[union-attr,arg-type,list-item]
    for module in unused:
        module.requires_grad_(False)


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
        "USER ASSISTANT Yes No that which with an and of in on",
    ]
