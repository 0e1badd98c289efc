"""Make sure that the data a run names is there, whole, and the version it names. The `dvc` command does DVC's work."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from locvlm.data.coco import read_instances
from locvlm.errors import DataError
from locvlm.pixels import ImageSource, open_images
from locvlm.records import atomic_write, fingerprint

_OURS = "# made by `locvlm fetch`\n"
# hard links instead of copies where the file system has them: one copy of the data, not two
_SETTINGS = '[core]\n    no_scm = true\n    remote = source\n[cache]\n    type = "reflink,hardlink,copy"\n'


def fetch_dvc(dvc_file: Path, remote: str = "") -> dict[str, Any]:
    """Bring the folder or file that a .dvc file pins up to date with it, from a DVC remote (default: the default one).

    Returns {"path", "md5", "pulled"}. Raises DataError when the .dvc file or the remote cannot be used, or when local
    files hold changes that DVC has not got: they are never overwritten.
    """
    pinned, folder = _pinned(dvc_file), dvc_file.absolute().parent
    target = folder / pinned["path"]
    compare = (["status", "--json", dvc_file.name], folder, f"comparing {target} with {dvc_file}")
    pulled = not target.exists() or json.loads(_dvc(*compare) or "{}") != {}
    if pulled:
        source = f" from {remote}" if remote else ""
        _dvc(["pull", dvc_file.name], folder, f"pulling {pinned['md5']}, which {dvc_file} pins,{source} into {target}")
        if json.loads(_dvc(*compare) or "{}"):
            raise DataError(
                f"comparing {target} with {dvc_file}: it differs even after `dvc pull`; look at `dvc status`"
            )
    return {"path": str(target), "md5": pinned["md5"], "pulled": pulled}


def fetch_remote(md5: str, remote: str, target: Path) -> dict[str, Any]:
    """Pull the data version `md5` (`<32 hex>.dir`) from a DVC remote (a folder, s3://bucket/prefix) into `target`.

    Needs no Git and no checkout: the folder around `target` becomes a DVC workspace of its own, so an interrupted pull
    goes on where it stopped. Credentials come from the environment. Returns {"path", "md5", "pulled"}. Raises
    DataError, also when that folder is somebody's DVC workspace already.
    """
    folder = target.absolute().parent
    settings = folder / ".dvc" / "config"
    if settings.is_file() and not settings.read_text(encoding="utf-8").startswith(_OURS):
        raise DataError(
            f"pulling {md5} into {target}: {folder} is a DVC workspace with settings of its own; use --dvc with its "
            ".dvc file, or another folder"
        )
    settings.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(settings) as file:
        file.write(f"{_OURS}{_SETTINGS}['remote \"source\"']\n    url = {remote}\n")
    pin = folder / f"{target.name}.dvc"
    with atomic_write(pin) as file:
        yaml.safe_dump({"outs": [{"md5": md5.removeprefix("md5:"), "hash": "md5", "path": target.name}]}, file)
    return fetch_dvc(pin, remote)


def newest_version(dvc_file: str, repository: str = "", revision: str = "") -> str:
    """The md5 of the newest data version: what a .dvc file pins now.

    `dvc_file`: a path; with `repository` (the address or folder of a Git repository) a path in it, as it is at
    `revision` (a branch, a tag; "": the default branch). Raises DataError when it cannot be had.
    """
    if not repository:
        return _pinned(Path(dvc_file))["md5"]
    # the command `dvc get` gives the data that a .dvc file names, not the file
    from dvc.api import read  # type: ignore[import-untyped]
    from dvc.exceptions import DvcException  # type: ignore[import-untyped]
    from scmrepo.exceptions import SCMError

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "newest.dvc"
        try:
            copy.write_text(read(dvc_file, repo=repository, rev=revision or None), encoding="utf-8")
        except (DvcException, SCMError, OSError, ValueError) as fault:
            raise DataError(
                f"reading {dvc_file} of the Git repository {repository}{f' at {revision}' if revision else ''}: "
                f"{' '.join(str(fault).split())[:500]}; look at the address, the revision and the path"
            ) from None
        return _pinned(copy)["md5"]


def fetch_coco(annotations: Sequence[Path], images: Path) -> dict[str, Any]:
    """Read COCO instances files, find every image they name below `images`, and give all of it one fingerprint.

    Annotations count by their bytes, images by name and size (reading 20 GB to start a run would be worse than a
    changed pixel that keeps the file's size). Returns {"path", "md5", "images"}. Raises DataError for a file that is
    not COCO's or images that are missing.
    """
    digest = hashlib.md5(usedforsecurity=False)
    n_images = 0
    source = open_images(images)
    for file in annotations:
        digest.update(fingerprint(file).encode())
        names = sorted(image.file_name for image in read_instances(file).images)
        for name, size in _sizes(file, source, names):
            digest.update(f"{name}\0{size}\0".encode())
        n_images += len(names)
    return {"path": str(images), "md5": digest.hexdigest(), "images": n_images}


def _sizes(file: Path, images: ImageSource, names: Iterable[str]) -> Iterable[tuple[str, int]]:
    found, missing = [], []
    for name in names:
        size = images.stored_bytes(name)
        if size is None:
            missing.append(name)
        else:
            found.append((name, size))
    if missing:
        raise DataError(
            f"looking for the images of {file} in {images.path}: {len(missing)} of {len(found) + len(missing)} are not "
            f"there, for example {missing[0]}; give the folder that the file_name entries start from"
        )
    return found


def _pinned(dvc_file: Path) -> dict[str, str]:
    needed = "a file as `dvc add` writes it was needed, with one entry under outs"
    try:
        entry = yaml.safe_load(dvc_file.read_text(encoding="utf-8"))["outs"][0]
        return {"path": str(entry["path"]), "md5": str(entry["md5"])}
    except FileNotFoundError:
        raise DataError(f"reading {dvc_file}: there is no such file; {needed}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, IndexError) as fault:
        told = " ".join(f"{type(fault).__name__} {fault}".split())
        raise DataError(f"reading {dvc_file}: {told}; {needed}") from None


def _dvc(arguments: Sequence[str], folder: Path, doing: str) -> str:
    program = shutil.which("dvc") or str(Path(sys.executable).with_name("dvc"))
    # two layers below DVC try again, five times each: a dead storage would be told after minutes
    environment = {"AWS_MAX_ATTEMPTS": "2", **os.environ, "DVC_NO_ANALYTICS": "1"}
    try:
        done = subprocess.run(
            [program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as fault:
        raise DataError(f"{doing}: the command `dvc` cannot be run ({fault}); pip install 'dvc[s3]'") from None
    if done.returncode:
        said = " ".join(done.stderr[max(done.stderr.find("ERROR: "), 0) :].removeprefix("ERROR: ").split())
        raise DataError(
            f"{doing}: dvc {arguments[0]} failed: {said[:500]}; look at `dvc remote list`, the credentials in "
            "the environment (AWS_ACCESS_KEY_ID ...) and AWS_ENDPOINT_URL"
        )
    return done.stdout
