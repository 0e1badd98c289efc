"""`locvlm data pseudo-actnet|localize-activitynet`: boxes from videos, and conversations about them."""

import argparse
import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.configuration import read_config
from locvlm.cli.data.building import add_verb, build, positive, progress, tracked, writing
from locvlm.cli.data.conversations import add_format_option, text_options, write_dataset
from locvlm.errors import CheckpointError, ConfigError, DataError
from locvlm.records import Manifest, read_manifest

if TYPE_CHECKING:
    from locvlm.data.labelling import FromPanoptic, FromSegmenter
    from locvlm.data.panoptic import Segmenter

_SEEM = "seem"


def add_verbs(nested: "argparse._SubParsersAction[Any]") -> None:
    """Register the verbs."""
    labels = add_verb(
        nested,
        "pseudo-actnet",
        "boxes of a few frames a video, by panoptic segmentation",
        _pseudo_actnet,
        files=("activitynet",),
        folders=("videos", "panoptic", "checkpoint"),
    )
    labels.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the video files")
    labels.add_argument(
        "--activitynet", type=Path, metavar="FILE", help="activity_net.v1-3.min.json: only its videos, v_<id>.mp4 ..."
    )
    labels.add_argument("--subset", help="only those of a subset of --activitynet, e.g. training")
    source = labels.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--segmenter",
        metavar="FOLDER|HUB_ID|seem",
        help="Mask2Former, MaskFormer or OneFormer trained on COCO panoptic, or seem with --weights",
    )
    source.add_argument(
        "--panoptic", type=Path, metavar="DIR", help="ready labels: <video>.json and <video>/*.png, COCO panoptic"
    )
    labels.add_argument("--weights", type=Path, metavar="DIR", help="seem: the folder of its .yaml and .pt")
    # Mask2Former's and SEEM's (v1) own threshold
    labels.add_argument("--score", type=_share, default=0.8, metavar="X", help="least score of a query (0.8; not seem)")
    labels.add_argument("--n-frames", type=positive, default=8, metavar="N", help="frames a video (%(default)s)")
    labels.add_argument(
        "--frame-sampling", choices=("vcgpt", "segment_centre"), default="vcgpt", help="which frames (%(default)s)"
    )
    labels.add_argument(
        "--min-share", type=_share, default=0.001, metavar="X", help="least area of a segment, of the frame's (0.001)"
    )
    labels.add_argument("--workers", type=positive, default=1, metavar="N", help="processes, each with a segmenter (1)")

    instruct = add_verb(
        nested,
        "localize-activitynet",
        "LocPred, NegPred and RevLoc conversations about objects that stay in place",
        _localize_activitynet,
        files=(),
        folders=("pseudo_labels",),
    )
    instruct.add_argument(
        "--pseudo-labels", type=Path, required=True, metavar="DIR", help="a folder built by pseudo-actnet"
    )
    instruct.add_argument(
        "--tolerance", type=_length, default=5.0, metavar="X", help="how far a centre may move, in network pixels (5)"
    )
    for name, text in (("classes", "objects to localize"), ("absent", "categories that NegPred may name")):
        instruct.add_argument(
            f"--{name}", choices=("things", "all"), default="things", help=f"{text}: 80 things, or all 133 (things)"
        )
    add_format_option(instruct)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def _length(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a length in pixels, 0 or more")
    return value


def _pseudo_actnet(args: argparse.Namespace) -> None:
    from locvlm.data.coco import refuse_if_most_skipped
    from locvlm.data.labelling import Journal, find_videos, label_videos, read_activitynet, write_labels

    _check_options(args)
    options = {
        "segmenter": None if args.segmenter is None else _name(args.segmenter),
        "score": None if args.segmenter in (None, _SEEM) else args.score,
        "n_frames": args.n_frames,
        "frame_sampling": args.frame_sampling,
        "min_share": args.min_share,
        "subset": args.subset,
    }
    journals: list[Path] = []

    def fill(folder: Path, manifest: Manifest) -> None:
        names = None if args.activitynet is None else read_activitynet(args.activitynet, args.subset)
        videos, left_out = find_videos(args.videos, names)
        source = _source(args)
        path = _journal_path(args, manifest)
        with Journal(path) as journal, progress("labelling videos", len(videos)) as advance:
            skipped = label_videos(videos, source, journal, args.workers, advance)
            faults = {source.fault: skipped[source.fault]}
            refuse_if_most_skipped(args.videos, "videos", faults, len(videos) - skipped[source.lacking])
            manifest.counts, notes = write_labels(folder, videos, journal)
        if not manifest.counts["videos"]:
            raise DataError(f"building {args.output}: none of the {len(videos)} videos has labels ({_listed(skipped)})")
        manifest.skipped = dict(left_out + skipped)
        manifest.extra["notes"] = dict(notes)
        journals.append(path)

    with writing(args.output):
        build(args, options, fill)
    for path in journals:
        path.unlink()


def _localize_activitynet(args: argparse.Namespace) -> None:
    from locvlm.data.actnet import build_localize_activitynet, read_labels
    from locvlm.data.panoptic import CATEGORIES, THINGS
    from locvlm.geometry import make_geometry

    config = read_config(args)
    options = {
        "instruct": config.instruct.model_dump(mode="json"),
        "tolerance": args.tolerance,
        "classes": args.classes,
        "absent": args.absent,
        **text_options(args, config),
    }
    vocabulary = {"things": THINGS, "all": CATEGORIES}

    def fill(folder: Path, manifest: Manifest) -> None:
        labels = read_labels(args.pseudo_labels)
        found = read_manifest(args.pseudo_labels)
        conversations = build_localize_activitynet(
            tracked(labels, "building conversations", found["counts"]["videos"]),
            config.instruct,
            manifest.seed,
            make_geometry(config.geometry),
            args.tolerance,
            vocabulary[args.classes],
            vocabulary[args.absent],
        )
        needed = "at least one video with an object that stays in place"
        write_dataset(args, config, folder, manifest, conversations, needed)
        manifest.skipped = dict(conversations.skipped)
        manifest.extra["notes"] = dict(conversations.notes)
        manifest.extra["labels"] = found["options"]

    build(args, options, fill)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not belong together, and set `args.checkpoint`, the folder of a local segmenter."""
    faults = []
    if args.subset is not None and args.activitynet is None:
        faults.append("--subset needs --activitynet")
    if (args.segmenter == _SEEM) != (args.weights is not None):
        faults.append("--segmenter seem and --weights belong together")
    if faults:
        raise ConfigError(f"building {args.output}: {'; '.join(faults)}")
    is_folder = args.segmenter is not None and args.segmenter != _SEEM and Path(args.segmenter).is_dir()
    args.checkpoint = Path(args.segmenter) if is_folder else args.weights


def _source(args: argparse.Namespace) -> "FromSegmenter | FromPanoptic":
    from locvlm.data.labelling import FromPanoptic, FromSegmenter

    sampling = (args.n_frames, args.frame_sampling, args.min_share)
    if args.panoptic is not None:
        return FromPanoptic(args.panoptic, *sampling)
    load = _SegmenterLoader(args.segmenter, args.weights, args.score)
    return FromSegmenter(args.videos, load, args.segmenter, *sampling)


@dataclass(frozen=True)
class _SegmenterLoader:
    """Loads the segmenter of a worker process, on its own GPU where there are several."""

    segmenter: str
    weights: Path | None
    score: float

    def __call__(self, worker: int) -> "Segmenter":
        """Raises CheckpointError."""
        import torch

        from locvlm.model.segmenter import load_seem, load_universal

        gpus = torch.cuda.device_count()
        device = f"cuda:{worker % gpus}" if gpus else "cpu"
        if self.weights is None:
            return load_universal(self.segmenter, self.score, device)
        if not gpus:
            raise CheckpointError(
                "loading SEEM: its package needs a CUDA GPU and none is visible here; run it where there is one, or "
                "use a Mask2Former or OneFormer model"
            )
        return load_seem(self.weights, device)


def _name(segmenter: str) -> str:
    """What the manifest calls a segmenter: no machine path."""
    return Path(segmenter).resolve().name if Path(segmenter).is_dir() else segmenter


def _journal_path(args: argparse.Namespace, manifest: Manifest) -> Path:
    """Beside the output, and another one for whatever would make other labels of the same video."""
    checkpoint = None if args.checkpoint is None else args.checkpoint.resolve().name
    parts = [manifest.extra["options"], [source for source in manifest.sources if source["path"] == checkpoint]]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    output: Path = args.output.resolve()
    return output.parent / f".{output.name}.journal-{key}"


def _listed(skipped: Counter[str]) -> str:
    return ", ".join(f"{reason}: {n}" for reason, n in sorted(skipped.items()))
