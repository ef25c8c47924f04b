"""The loop around the engine: the order in which it answers."""

import queue
from typing import Any

import pytest

from tests.workers.engine.test_grammar import JSON, compiler, engine, job
from workers.engine.engine import Engine
from workers.engine.grammar import GrammarCompiler
from workers.engine.worker import ServingLoop
from workers.messages import Cancel, Cancelled, Output

__all__ = ["compiler", "engine"]


@pytest.mark.parametrize("grammar", [None, JSON], ids=["running", "with its grammar being compiled"])
def test_a_confirmed_cancel_is_the_last_word_about_its_job(
    engine: Engine, compiler: GrammarCompiler, grammar: Any
) -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    reports: list[Any] = []

    def emit(batch: list[Any]) -> None:
        reports.extend(batch)
        of_other = [r for r in reports if isinstance(r, Output) and r.id == "other"]
        if len(of_other) == 3 and of_other[-1] in batch:
            inbox.put(Cancel(id="gone", confirm=True))
        if any(isinstance(r, Output) and r.finish_reason for r in batch):
            inbox.put(None)

    inbox.put(job("gone", [30, 31], 60, grammar=grammar))
    inbox.put(job("other", [40, 41], 20))
    inbox.put(Cancel(id="unknown", confirm=True))
    ServingLoop(engine, compiler, inbox, emit).run()
    places = [place for place, r in enumerate(reports) if getattr(r, "id", "") == "gone"]
    assert [isinstance(reports[place], Cancelled) for place in places].count(True) == 1
    assert isinstance(reports[places[-1]], Cancelled)
    assert not any(isinstance(reports[place], Output) and reports[place].finish_reason for place in places)
    assert Cancelled(id="unknown") in reports


def test_a_choice_that_is_cancelled_while_the_grammar_is_compiled_is_never_generated(
    engine: Engine, compiler: GrammarCompiler
) -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    reports: list[Any] = []

    def emit(batch: list[Any]) -> None:
        reports.extend(batch)
        if {r.choice for r in reports if isinstance(r, Output) and r.finish_reason} >= {0, 2}:
            inbox.put(None)

    # As the pool sends it after a death: the job, and what its client has enough of.
    inbox.put(job("some", [30, 31], 60, n=3, grammar=JSON))
    inbox.put(Cancel(id="some", choice=1))
    ServingLoop(engine, compiler, inbox, emit).run()
    assert {r.choice for r in reports if isinstance(r, Output)} == {0, 2}
