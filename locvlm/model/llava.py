"""Other people's models in LLaVA's own layout, run by our classes: LLaVA v1 and v1.5, Shikra, Video-ChatGPT.

Their architecture is ours, so they are batched as our checkpoints are, an image encoded once for all of its prompts.
What differs is how they are asked, which `llava_family` reads off the folder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from locvlm.config import (
    SYSTEM,
    CoordinateConfig,
    EvaluationConfig,
    FamilyConfig,
    GeometryConfig,
    PromptConfig,
    VideoConfig,
)
from locvlm.errors import CheckpointError
from locvlm.model.generate import Request, answers
from locvlm.model.sources import is_video_chatgpt, llava_shape, open_llava
from locvlm.model.tokenizer import TextEncoder
from locvlm.model.variants import LocVLM
from locvlm.prompts import (
    IMAGE,
    LLAVA_LOC,
    LLAVA_REV,
    SHIKRA_LOC,
    SHIKRA_QUESTION,
    SHIKRA_REV,
    VICUNA_LAYOUT,
)

LLAVA_PLACES = CoordinateConfig(representation="nfp", decimals=2, brackets="[]", separator=", ")
_IMAGE_MARKS = ("<im_start>", "<im_end>")
_VIDEO_MARKS = ("<vid_start>", "<vid_end>")
_VIDEO = VideoConfig(
    n_frames=100, token_order="temporal_spatial", frame_sampling="vcgpt", short_videos="repeat", pad=True
)


@dataclass(frozen=True, slots=True)
class LlavaModel:
    """A model of a folder in LLaVA's own layout. `config` says how it is asked."""

    model: LocVLM
    encoder: TextEncoder
    config: FamilyConfig

    def answers(self, requests: Sequence[Request], decoding: EvaluationConfig) -> list[str]:
        """One answer a request, in order; see `locvlm.model.generate.answers`."""
        return answers(self.model, self.encoder, self.config, requests, decoding)


def load_llava(folder: Path, config: FamilyConfig, device: torch.device, dtype: torch.dtype) -> LlavaModel:
    """Open a folder in eval mode, to be asked as `config` says. Raises CheckpointError for one that is not whole, or
    whose tokenizer lacks the marks that `config` puts around the image."""
    found, _ = open_llava(folder)
    known = found.encoder.tokenizer.get_vocab()
    absent = [
        mark for mark in (*_IMAGE_MARKS, *_VIDEO_MARKS) if mark in config.layout + config.question and mark not in known
    ]
    if absent:
        raise CheckpointError(
            f"loading the model {folder}: its tokenizer does not know {', '.join(absent)}, with which it was trained; "
            "copy the tokenizer's files (added_tokens.json too) of its publisher"
        )
    if config.video is not None:
        found.model.config.video_token_order = config.video.token_order
        found.model.config.video_pad_to = config.video.n_frames if config.video.pad else 0
    return LlavaModel(found.model.to(device, dtype), found.encoder, config)


def llava_family(folder: Path) -> FamilyConfig:
    """How the model of a folder in LLaVA's own layout is asked: Vicuna v1 layout, the pixels and the text of places
    that it was trained with. Reads no weights. Raises CheckpointError.

    LLaVA v1 never saw a place in text, so nothing is known of how it writes one. Video-ChatGPT is shown the video
    before the question, as in half of its training data.
    """
    values = json.loads((folder / "config.json").read_bytes())
    shape = llava_shape(folder)
    side = shape.vision.image_side
    layout = VICUNA_LAYOUT.replace("{system}", SYSTEM)
    prompts = PromptConfig(system=SYSTEM)
    if is_video_chatgpt(folder):
        return FamilyConfig(
            family="video-chatgpt",
            layout=layout,
            question=_marked("<image>\n{question}", _VIDEO_MARKS),
            geometry=GeometryConfig(kind="squash", side=side),
            video=_VIDEO,
            prompts=prompts,
        )
    if values.get("model_type") == "shikra":
        return FamilyConfig(
            family="shikra",
            layout=layout,
            question=_marked(SHIKRA_QUESTION, _IMAGE_MARKS),
            loc_pred=_marked(SHIKRA_LOC, _IMAGE_MARKS),
            rev_loc=_marked(SHIKRA_REV, _IMAGE_MARKS),
            coordinates=CoordinateConfig(representation="nfp", decimals=3, brackets="[]"),
            geometry=GeometryConfig(kind="letterbox_white", side=side),
            prompts=prompts,
        )
    marks = _IMAGE_MARKS if values.get("mm_use_im_start_end") else ("", "")
    is_v15 = shape.adapter == "mlp"
    pads = values.get("image_aspect_ratio", "pad" if is_v15 else "square") == "pad"
    return FamilyConfig(
        family="llava-v1.5" if is_v15 else "llava-v1",
        layout=layout,
        question=_marked("<image>\n{question}", marks),
        loc_pred=_marked(f"<image>\n{LLAVA_LOC}", marks) if is_v15 else "",
        rev_loc=_marked(f"<image>\n{LLAVA_REV}", marks) if is_v15 else "",
        coordinates=LLAVA_PLACES if is_v15 else None,
        geometry=GeometryConfig(kind="letterbox" if pads else "crop", side=side),
        prompts=prompts,
    )


def _marked(template: str, marks: tuple[str, str]) -> str:
    return template.replace(IMAGE, f"{marks[0]}{IMAGE}{marks[1]}")
