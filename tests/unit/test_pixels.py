"""Where images come from: a folder, or shards; the same names, the same pixels, the same complaints."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from locvlm.data.shards import pack_images
from locvlm.errors import DataError
from locvlm.pixels import (
    INDEX_NAME,
    INDEX_SCHEMA,
    PIXEL_MEAN,
    PIXEL_STD,
    ImageSource,
    open_images,
    safe_image_path,
    to_pixels,
)

NAMES = ("a.png", "train/b.jpg", "train/long name, \u00e9.png")


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    folder = tmp_path / "loose"
    (folder / "train").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        Image.linear_gradient("L").resize((20 + number, 10)).convert("RGB").save(folder / name)
    return folder


@pytest.fixture(params=["folder", "shards"])
def source(request: pytest.FixtureRequest, tmp_path: Path, loose: Path) -> ImageSource:
    """The same images both ways."""
    if request.param == "folder":
        return open_images(loose)
    return packed(loose, tmp_path / "packed")


def packed(loose: Path, folder: Path, shard_bytes: int = 4096) -> ImageSource:
    folder.mkdir()
    images = open_images(loose)
    pack_images(images, images.names(), folder, shard_bytes)
    return open_images(folder)


def test_both_kinds_give_the_same_names_sizes_and_pixels(source: ImageSource, loose: Path) -> None:
    assert list(source.names()) == sorted(NAMES)
    for name in NAMES:
        assert source.has(name)
        assert source.stored_bytes(name) == (loose / name).stat().st_size
        assert source.stream(name).read() == (loose / name).read_bytes()
        assert np.array_equal(np.asarray(source.open(name)), np.asarray(Image.open(loose / name)))


def test_a_missing_image_and_a_folder_are_no_images(source: ImageSource) -> None:
    for name in ("b.jpg", "train/b.jpeg", "a.png.png", "0", "zzz", "x" * 300 + ".png"):
        assert not source.has(name)
        assert source.stored_bytes(name) is None
    assert not source.has("train")
    with pytest.raises(DataError, match=r"nothing\.png: there is no such file; check --images"):
        source.open("nothing.png")


def test_the_size_of_an_image_is_known_only_when_it_decodes(source: ImageSource, loose: Path) -> None:
    for name in NAMES:
        assert source.checked_size(name) == Image.open(loose / name).size
    with pytest.raises(DataError, match="there is no such file"):
        source.checked_size("nothing.png")


@pytest.mark.parametrize("name", NAMES)
def test_an_image_that_is_cut_short_has_no_size(tmp_path: Path, loose: Path, name: str) -> None:
    (loose / name).write_bytes((loose / name).read_bytes()[:-40])
    for images in (open_images(loose), packed(loose, tmp_path / "packed")):
        with pytest.raises(DataError, match="it does not decode"):
            images.checked_size(name)
        assert images.has(name)


def test_a_damaged_image_is_named(tmp_path: Path, loose: Path) -> None:
    (loose / "a.png").write_bytes((loose / "a.png").read_bytes()[:50])
    for images in (open_images(loose), packed(loose, tmp_path / "packed")):
        with pytest.raises(DataError, match=r"a\.png: it does not decode"):
            images.open("a.png")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x.jpg", "a/../../x.jpg", "a\\x.jpg", "x\0.jpg", "..", "."])
def test_no_name_leads_out(source: ImageSource, name: str) -> None:
    for ask in (source.open, source.stream, source.has, source.stored_bytes):
        with pytest.raises(DataError, match="leads out of the folder"):
            ask(name)


def test_image_paths_stay_in_their_folder() -> None:
    folder = Path("/data/images")
    assert safe_image_path(folder, "train2017/000000000009.jpg") == folder / "train2017/000000000009.jpg"
    assert safe_image_path(folder, "COCO_val2014_000000000042.jpg") == folder / "COCO_val2014_000000000042.jpg"
    with pytest.raises(DataError, match="leads out of the folder"):
        safe_image_path(folder, "../x.jpg")


def test_a_source_travels_to_a_worker_by_its_path_and_serves_many_threads(source: ImageSource, loose: Path) -> None:
    message = pickle.dumps(source)
    assert len(message) < 500
    again = pickle.loads(message)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda name: again.open(name).size, NAMES * 50))
    assert sizes == [Image.open(loose / name).size for name in NAMES] * 50


def test_links_are_followed_but_not_in_circles(tmp_path: Path, loose: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "coco").symlink_to(loose)
    (loose / "back").symlink_to(loose)
    images = open_images(root)
    assert list(images.names()) == sorted(f"coco/{name}" for name in NAMES)
    assert images.open("coco/a.png").size == (20, 10)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        open_images(tmp_path / "none")
    (tmp_path / "file.tar").write_bytes(b"")
    with pytest.raises(DataError, match="this is a file"):
        open_images(tmp_path / "file.tar")


def test_a_missing_or_short_shard_is_told_when_the_source_is_opened(tmp_path: Path, loose: Path) -> None:
    folder = tmp_path / "packed"
    packed(loose, folder, 2048)
    shards = sorted(folder.glob("*.tar"))
    assert len(shards) == 3
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 3])
    with pytest.raises(DataError, match=r"images-00001\.tar is not whole \(it has \d+ bytes of \d+ or more\)"):
        open_images(folder)
    shards[1].unlink()
    with pytest.raises(DataError, match=r"images-00001\.tar is not whole \(it is not there\)"):
        open_images(folder)


def test_a_shard_that_is_cut_while_it_is_read_fails_that_image_only(tmp_path: Path, loose: Path) -> None:
    images = packed(loose, tmp_path / "packed", 10**6)
    shard = tmp_path / "packed" / "images-00000.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(DataError, match=r"train/long name.*the shard images-00000\.tar ends inside it"):
        images.open(NAMES[2])
    assert images.has(NAMES[2])


def test_a_foreign_or_damaged_index_gives_one_error(tmp_path: Path, loose: Path) -> None:
    packed(loose, tmp_path / "packed")
    index = tmp_path / "packed" / INDEX_NAME
    whole = index.read_bytes()
    with pa.ipc.new_file(str(tmp_path / "other"), pa.schema([("x", pa.int64())])) as writer:
        writer.write_table(pa.table({"x": [1]}))
    for content in (b"", whole[:-20], b"text" * 99, (tmp_path / "other").read_bytes()):
        index.write_bytes(content)
        with pytest.raises(DataError, match="not an index of `locvlm data shard`, or cut short"):
            open_images(tmp_path / "packed")


def test_a_large_index_opens_at_once_and_is_searched_on_disk(tmp_path: Path) -> None:
    import time

    n = 120_000
    shards = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array(["x.tar"]))
    names = [f"train2017/{number:012d}.jpg" for number in range(n)]
    offsets = pa.array(np.arange(n) * 4)
    columns = [pa.array(names), shards, offsets, pa.array(np.full(n, 4))]
    with pa.ipc.new_file(str(tmp_path / INDEX_NAME), INDEX_SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=INDEX_SCHEMA))
    np.arange(n, dtype=np.int32).tofile(tmp_path / "x.tar")
    begun = time.perf_counter()
    images = open_images(tmp_path)
    data = [images.stream(names[k]).read() for k in (0, 77_777, n - 1)]
    assert time.perf_counter() - begun < 0.5
    assert [int.from_bytes(value, "little") for value in data] == [0, 77_777, n - 1]


def test_pixels_are_normalised_as_clip_does() -> None:
    image = Image.fromarray(np.arange(3 * 256, dtype=np.uint32).astype(np.uint8).reshape(16, 16, 3))
    values = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)
    mean, std = (np.array(numbers, np.float32)[:, None, None] for numbers in (PIXEL_MEAN, PIXEL_STD))
    assert np.array_equal(to_pixels(image), (values - mean) / std)
    assert to_pixels(image).flags.c_contiguous
