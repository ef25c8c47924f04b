"""A slice of a prompt is as long as the machine's measured speed lets it be."""

import pytest

from workers.engine.pace import MOST_PER_STEP, SHORTEST_SLICE_S, SMALLEST_CHUNK, SMALLEST_EXTRA, Pace

TOKEN_S = 0.0005


def known(**steps: float) -> Pace:
    """With steps measured as ``rows_N=seconds``, and TOKEN_S for a token of a prompt."""
    pace = Pace(512)
    pace.expect(TOKEN_S)
    for rows, seconds in steps.items():
        pace.note(int(rows.removeprefix("rows_")), 0, seconds)
    return pace


def test_alone_a_prompt_is_read_in_long_slices_of_half_a_second_at_most() -> None:
    assert Pace(512).budget(1, 0) == 2048
    assert known().budget(1, 0) == 1000
    slow = Pace(512)
    slow.expect(1.0)
    assert slow.budget(1, 0) == SMALLEST_CHUNK


@pytest.mark.parametrize(("reading", "rows"), [(1, 4), (4, 1), (31, 1), (1, 1), (1, 32)])
def test_no_token_waits_for_more_than_a_slice_of_a_little_over_one_step(reading: int, rows: int) -> None:
    step = 0.02
    pace = known(**{f"rows_{rows}": step})
    seconds = pace.budget(reading, rows) * TOKEN_S
    assert 0.5 * step <= seconds <= MOST_PER_STEP * step


def test_the_more_wait_for_their_first_token_the_longer_the_slice() -> None:
    pace = known(rows_4=0.02)
    assert pace.budget(1, 4) < pace.budget(2, 4) < pace.budget(4, 4) == pace.budget(8, 4)


def test_a_fast_step_still_leaves_a_slice_that_is_worth_it() -> None:
    assert known(rows_1=0.001).budget(1, 1) == int(SHORTEST_SLICE_S / TOKEN_S)
    slow = known(rows_1=0.001)
    slow.expect(1.0)
    assert slow.budget(1, 1) == SMALLEST_EXTRA


def test_what_few_rows_take_is_not_what_many_have_taken() -> None:
    pace = known(rows_4=0.008, rows_5=0.02)
    assert pace.budget(1, 4) * TOKEN_S <= MOST_PER_STEP * 0.008
    # And a pass with a slice does not change what is known of the step.
    for _ in range(50):
        pace.note(4, 16, 0.016)
    assert pace.budget(1, 4) * TOKEN_S == pytest.approx(0.75 * 0.008, rel=0.3)


def test_a_number_of_rows_like_none_before_gets_a_pass_of_its_own_to_be_measured() -> None:
    pace = Pace(512)
    assert pace.budget(3, 1) == 0
    pace.note(1, 0, 0.01)
    assert pace.budget(3, 1) > 0
    assert pace.budget(3, 2) > 0
    assert pace.budget(3, 3) == 0
    pace.note(16, 0, 0.02)
    assert pace.budget(3, 8) > 0
    assert pace.budget(3, 7) == 0
    assert pace.budget(3, 32) > 0


def test_the_speed_of_reading_is_learned_without_the_step_beside_it() -> None:
    pace = known(rows_4=0.01)
    for _ in range(50):
        pace.note(4, 100, 0.01 + 100 * 0.002)
    assert pace.budget(1, 0) == pytest.approx(0.5 / 0.002, rel=0.05)


def test_steps_that_somebody_else_held_up_make_no_longer_slices() -> None:
    pace = known(rows_4=0.01)
    for _ in range(3):
        pace.note(4, 0, 0.03)
    assert pace.budget(1, 4) * TOKEN_S <= 0.75 * 0.0115
    # But a step that has become slower for good is believed in the end.
    for _ in range(300):
        pace.note(4, 0, 0.03)
    assert pace.budget(1, 4) * TOKEN_S == pytest.approx(0.75 * 0.03, rel=0.1)
