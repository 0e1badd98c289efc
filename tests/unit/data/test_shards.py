"""Tar shards: what goes in comes out, the same bytes every time, and a foreign tar file cannot do harm."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from locvlm.data.shards import (
    BAD_MEMBER,
    CUT_SHORT,
    EMPTY,
    NOT_AN_IMAGE,
    REPEATED,
    SPECIAL_MEMBER,
    UNREADABLE,
    Packed,
    index_tars,
    pack_images,
    tar_members,
)
from locvlm.errors import DataError
from locvlm.pixels import open_images


def draw_folder(folder: Path, n: int = 12) -> Path:
    (folder / "deep" / "er").mkdir(parents=True)
    for number in range(n):
        image = Image.effect_noise((40 + number, 30), 60)
        image.save(folder / ("deep/er" if number % 3 else ".") / f"{number}.{'png' if number % 2 else 'jpg'}")
    return folder


def pack(source: Path, folder: Path, shard_bytes: int = 6000) -> Packed:
    folder.mkdir()
    images = open_images(source)
    return pack_images(images, images.names(), folder, shard_bytes)


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_the_files_byte_for_byte_within_their_size(tmp_path: Path) -> None:
    loose = draw_folder(tmp_path / "loose")
    found = pack(loose, tmp_path / "out")
    names = [path.name for path in sorted((tmp_path / "out").iterdir())]
    assert names == [*(f"images-{number:05d}.tar" for number in range(found.shards)), "images.arrow"]
    assert found.shards > 2
    assert (found.images, found.skipped) == (12, Counter())
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert all(path.stat().st_size <= 6000 for path in shards)
    assert found.n_bytes == sum(path.stat().st_size for path in shards)
    images = open_images(tmp_path / "out")
    for path in (p for p in loose.rglob("*") if p.is_file()):
        assert images.stream(path.relative_to(loose).as_posix()).read() == path.read_bytes()


def test_any_tar_program_reads_the_shards(tmp_path: Path) -> None:
    loose = draw_folder(tmp_path / "loose")
    (loose / "deep" / f"{'long name ' * 12}\u00e9.png").write_bytes(b"1234")
    pack(loose, tmp_path / "out")
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            assert [(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar] == [(0, 0, 0, 0o644, "")] * len(tar.members)
            tar.extractall(tmp_path / "unpacked")
    files = {p.relative_to(loose): p.read_bytes() for p in loose.rglob("*") if p.is_file()}
    unpacked = tmp_path / "unpacked"
    assert {p.relative_to(unpacked): p.read_bytes() for p in unpacked.rglob("*") if p.is_file()} == files


def test_the_same_images_give_the_same_bytes_whatever_their_age(tmp_path: Path) -> None:
    import os
    import shutil

    loose = draw_folder(tmp_path / "loose")
    shutil.copytree(loose, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (1, 2))
        path.chmod(0o700)
    first, second = pack(loose, tmp_path / "a"), pack(tmp_path / "copy", tmp_path / "b")
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    third = pack(tmp_path / "a", tmp_path / "c", 10**6)  # shards are packed anew like a folder
    assert third.shards == 1
    assert third.images == 12
    (loose / "0.jpg").write_bytes(b"x" + (loose / "0.jpg").read_bytes()[1:])
    assert pack(loose, tmp_path / "d").fingerprint != first.fingerprint


def test_what_cannot_be_packed_is_counted(tmp_path: Path) -> None:
    loose = draw_folder(tmp_path / "loose", 3)
    (loose / "notes.txt").write_text("hello")
    (loose / "empty.png").touch()
    (loose / "gone.png").symlink_to(tmp_path / "nowhere")
    (loose / "back\\slash.png").write_bytes(b"1")
    (loose / "deep" / "big.png").write_bytes(b"1" * 20_000)
    found = pack(loose, tmp_path / "out")
    assert found.skipped == {NOT_AN_IMAGE: 1, EMPTY: 1, UNREADABLE: 1, BAD_MEMBER: 1}
    assert found.images == 4
    assert open_images(tmp_path / "out").stored_bytes("deep/big.png") == 20_000


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tar_files_are_indexed_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "cc3m").mkdir()
    tars = [
        write_tar(
            tmp_path / "cc3m" / f"{shard:05d}.tar",
            *(
                (f"{shard:05d}{row:04d}.{kind}", f"{kind} {shard} {row}".encode())
                for row in range(4)
                for kind in ("jpg", "json", "txt")
            ),
        )
        for shard in range(3)
    ]
    before = listing(tmp_path / "cc3m")
    (tmp_path / "building").mkdir()
    counts, skipped = index_tars(tars, tmp_path / "building", tmp_path / "index")
    assert counts == {"images": 12, "shards": 3}
    assert skipped == {NOT_AN_IMAGE: 24}
    (tmp_path / "building").rename(tmp_path / "index")
    images = open_images(tmp_path / "index")
    assert images.stream("000020003.jpg").read() == b"jpg 2 3"
    assert not images.has("000020003.txt")
    assert listing(tmp_path / "cc3m") == before
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["images.arrow"]
    (tmp_path / "cc3m" / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"\.\./cc3m/00001\.tar is not whole"):
        open_images(tmp_path / "index")


def test_a_name_that_occurs_again_is_counted_and_the_first_kept(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{k}.tar", ("a.jpg", bytes([k])), (f"{k}.jpg", b"x")) for k in range(3)]
    (tmp_path / "index").mkdir()
    counts, skipped = index_tars(tars, tmp_path / "index", tmp_path / "index")
    assert (counts["images"], skipped) == (4, {REPEATED: 2})
    assert open_images(tmp_path / "index").stream("a.jpg").read() == b"\0"


def test_hostile_members_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("good.jpg", "/etc/passwd.jpg", "../out.jpg", "a/../../out.jpg", "./also/good.jpg", "a\\b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("special.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("folder.jpg")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    skipped: Counter[str] = Counter()
    assert [member.name for member in tar_members(path, skipped)] == ["good.jpg", "also/good.jpg"]
    assert skipped == {BAD_MEMBER: 4, SPECIAL_MEMBER: 4}


def test_a_tar_file_cut_at_any_place_gives_its_whole_members_and_is_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", *((f"{k}.jpg", bytes([k]) * 700) for k in range(5)))
    whole = path.read_bytes()
    for length in range(512, 5 * 1536 + 1, 256):
        path.write_bytes(whole[:length])
        skipped: Counter[str] = Counter()
        found = list(tar_members(path, skipped))
        assert len(found) == (length + 1536 - 1212) // 1536
        assert skipped == {CUT_SHORT: 1}
    path.write_bytes(whole[:2000] + b"\xff" * 4000 + whole[6000:])
    skipped = Counter()
    assert [member.name for member in tar_members(path, skipped)] == ["0.jpg"]
    assert skipped == {CUT_SHORT: 1}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4607), st.integers(0, 255)), min_size=1, max_size=12))
def test_damage_never_raises_and_never_points_outside(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    write_tar(path, *((f"{k}.jpg", bytes([k]) * 700) for k in range(3)))
    data = bytearray(path.read_bytes())
    for place, value in damage:
        data[place] = value
    path.write_bytes(data)
    skipped: Counter[str] = Counter()
    try:
        found = list(tar_members(path, skipped))
    except DataError:
        return
    assert all(0 <= m.offset <= m.offset + m.size <= len(data) for m in found)
    assert len(found) <= 3


@pytest.mark.parametrize("content", [b"", b"text" * 300, b"\x1f\x8b" + bytes(600), bytes(100)])
def test_what_is_no_tar_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.tar: not a tar file"):
        list(tar_members(path, Counter()))


def test_tar_files_without_an_image_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", ("a.txt", b"text"))
    with pytest.raises(DataError, match=r"x\.tar: there is no image in it"):
        index_tars([path], tmp_path, tmp_path)
