"""The table of images: it is what the list of its records is, and filters as the records do one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locvlm.data.coco import usable_objects
from locvlm.data.columns import CrowdRule, ImageTable
from locvlm.records import ImageRecord, ObjectRecord

RULES: tuple[CrowdRule, ...] = ("counts", "ignored", "singleton_ok", "ignored_singleton_ok")
SIDE = st.integers(0, 4).map(float)
THING = st.tuples(st.sampled_from("abc"), st.tuples(SIDE, SIDE, SIDE, SIDE), st.booleans())


@st.composite
def pictures(draw: st.DrawFn) -> list[ImageRecord]:
    records = []
    for key, things in enumerate(draw(st.lists(st.lists(THING, max_size=5), max_size=6))):
        objects = tuple(ObjectRecord(10 * key + n, *thing) for n, thing in enumerate(things))
        records.append(ImageRecord(7 * key, f"{key}.jpg", 4, 5 + key, objects))
    return records


@given(pictures())
def test_a_table_holds_the_records_it_was_made_of(records: list[ImageRecord]) -> None:
    table = ImageTable.of(records)
    assert len(table) == len(records)
    assert list(table) == records
    assert table == records
    assert [table[number] for number in range(len(table))] == records
    assert ImageTable.of(table) is table
    for part in (slice(1, 3), slice(None, None, -2), slice(4, 1), slice(-2, None)):
        assert list(table[part]) == records[part]
        assert table[part] == records[part]
    if records:
        assert table[-1] == records[-1]
        assert table != [*records[:-1], ImageRecord(-1, "x.jpg", 1, 1)]
    with pytest.raises(IndexError):
        table[len(records)]


@given(pictures())
def test_the_filter_of_all_images_at_once_is_the_filter_of_each(records: list[ImageRecord]) -> None:
    table = ImageTable.of(records)
    for rule in RULES:
        expected = [thing for record in records for thing in usable_objects(record, rule)]
        chosen = table.usable(rule)
        assert table.object_ids[chosen].tolist() == [thing.id for thing in expected]
        left = table.only(chosen)
        assert [list(image.objects) for image in left] == [usable_objects(record, rule) for record in records]
        order = np.arange(len(records))[::-1]
        assert list(left.take(order)) == list(left)[::-1]


def test_parts_cover_a_large_table_and_records_hold_plain_values() -> None:
    records = [
        ImageRecord(key, f"{key}.jpg", 9, 9, (ObjectRecord(key, "a", (0.0, 1.0, 2.0, 3.0)),)) for key in range(9000)
    ]
    parts = list(ImageTable.of(records).parts())
    assert len(parts) == 3
    assert [image for part in parts for image in part] == records
    image = parts[1][5]
    assert (type(image.id), type(image.width), type(image.objects[0].id)) == (int, int, int)
    assert (type(image.objects[0].box_xyxy[0]), type(image.objects[0].is_crowd)) == (float, bool)
