"""Ids that clients see."""

from itertools import islice

from app.ids import IdShape, new_id


def test_a_fresh_id_has_its_shape_and_comes_once():
    made = {new_id("resp_") for _ in range(1000)}
    assert len(made) == 1000
    assert all(each.startswith("resp_") and len(each) == 27 and each[5:].isalnum() for each in made)


def test_no_id_has_characters_that_look_alike():
    assert not {*"".join(new_id("") for _ in range(1000))} & {*"01IOl"}


def test_ids_that_follow_from_a_seed_are_the_same_each_time_and_differ_from_each_other():
    shape = IdShape("call_", 9)
    first = list(islice(shape.following("turn/0"), 3))
    assert first == list(islice(shape.following("turn/0"), 3))
    assert len({*first, *islice(shape.following("turn/1"), 3)}) == 6
    assert all(each.startswith("call_") and len(each) == 14 for each in first)
