"""`locvlm data video-features`: pooled features of videos, made once by the frozen vision tower."""

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from locvlm.cli.configuration import read_config
from locvlm.cli.data.building import add_verb, build, tracked, writing
from locvlm.errors import ConfigError, DataError
from locvlm.records import Manifest, atomic_write

_UNREADABLE = "video that cannot be read"


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verb."""
    parser = add_verb(
        nested,
        "video-features",
        "features of videos by the vision tower of a checkpoint, pooled over space and time, for the video stage",
        _video_features,
        files=(),
        folders=("videos", "model"),
    )
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the video files")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint that holds the tower")


def _video_features(args: argparse.Namespace) -> None:
    from locvlm.data.frames import FEATURES

    args.dataset = FEATURES
    config = read_config(args)
    if config.video is None:
        raise ConfigError(
            f"making video features: the configuration {config.name!r} has no section `video`, which says how many "
            "frames; use --preset locvlm-vid-b or another video preset"
        )
    options = {"video": config.video.model_dump(mode="json")}
    build(args, options, lambda folder, manifest: _fill(args, folder, manifest))


def _fill(args: argparse.Namespace, folder: Path, manifest: Manifest) -> None:
    """Finished features wait in a folder beside the output, so that a killed run goes on where it stopped."""
    import numpy as np

    from locvlm.data.frames import VideoSource
    from locvlm.data.labelling import find_videos
    from locvlm.geometry import make_geometry
    from locvlm.model import load
    from locvlm.model.variants import pool_pixels
    from locvlm.pixels import normalised

    config = read_config(args)
    assert config.video is not None
    names, skipped = find_videos(args.videos)
    loaded = load(args.model)
    if loaded.config.geometry != config.geometry:
        raise ConfigError(
            f"making video features with {args.model}: its geometry is {loaded.config.geometry}, the configuration's "
            f"is {config.geometry}; use the same"
        )
    source = VideoSource(args.videos, config.video, make_geometry(config.geometry), config.model.vision.n_tokens)
    ready = _ready_folder(args.output, {**manifest.to_dict(), "counts": {}})
    n_tokens = 0
    for name in tracked(names, "pooling", len(names)):
        part = ready / f"{name}.npy"
        if not part.is_file():
            try:
                seen = source.see(name)
            except DataError:
                skipped[_UNREADABLE] += 1
                continue
            assert seen.pixels is not None
            with writing(args.output), atomic_write(part, "wb") as file:
                np.save(file, pool_pixels(loaded.model, normalised(list(seen.pixels)), config.video))
        with writing(args.output):
            target = folder / f"{name}.npy"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(part, target)
        n_tokens += np.load(target, mmap_mode="r").shape[0]
    if skipped[_UNREADABLE] == len(names):
        raise DataError(f"making video features of {args.videos}: none of the {len(names)} videos can be read")
    manifest.counts = {"videos": len(names) - skipped[_UNREADABLE], "tokens": n_tokens}
    manifest.skipped |= skipped
    shutil.rmtree(ready)


def _ready_folder(output: Path, made_from: dict[str, Any]) -> Path:
    """Where finished features wait. What was made from something else has another name."""
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    folder = output.resolve().parent / f".{output.name}.features-{key}"
    with writing(output):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
