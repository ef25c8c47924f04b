"""The battery's row L9: everything at once, for a while; the long form is ``make soak``."""

import pytest

from benchmarks import soak
from tests.faults.table import Row


@pytest.mark.nightly
def test_l9_everything_at_once_leaves_nothing_behind(row: Row) -> None:
    done = soak.soak_for(minutes=3.0, clients=12, every_s=2.0)
    outcomes = done.tally.outcomes
    assert done.unexplained == []
    # Of a few minutes memory says little; what stays open says all.
    left = [each for each in done.growth if "without clients" in each]
    assert left == []
    assert len(done.kills) == 5
    failed = sum(done.explained.values())
    row.fault = "3 minutes of valid, wrong, impatient and vanishing clients; the model worker killed 5 times"
    row.requests = sum(outcomes.values())
    row.errors = failed + sum(count for (kind, _), count in outcomes.items() if kind == "gone")
    row.refused = sum(count for (_, outcome), count in outcomes.items() if outcome.startswith("4"))
    row.complete = row.requests - row.errors - row.refused
    row.hit = f"killed after {', '.join(f'{at:.0f}' for at in done.kills)} s; {failed} failures right behind"
    row.notes.append(
        "wrong requests count as refused, who vanished as errors; half an hour: benchmarks/results/soak.md"
    )
