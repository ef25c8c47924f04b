"""The queue: how much may wait and for how long, what those who wait are told, and those who may not."""

import random

import pytest

from tests.workers.pool.harness import job
from tests.workers.pool.simulation import GOOD, Simulation
from workers.messages import BeamParams, Cancel, EmbedJob, GenerateJob, Started
from workers.pool.deadlines import Deadlines
from workers.pool.drain_rate import DrainRate
from workers.pool.poison import MOST, REFUSED_S, Poisons


def wanted(max_tokens: int = 40, owner: str = "", **more) -> GenerateJob:
    return job([GOOD, 0], max_tokens, salt=owner, **more)


def full_world(**options) -> Simulation:
    """A world whose only worker has all it can hold: the next job waits."""
    world = Simulation(**{"max_batch": 1, **options})
    world.submit(*(wanted() for _ in range(3)))
    assert world.broker.queued == 0
    return world


def started_late(within_s: float, max_tokens: int = 5) -> GenerateJob:
    plain = wanted(max_tokens)
    return GenerateJob(id=plain.id, prompt=plain.prompt, max_tokens=max_tokens, start_within_s=within_s)


# --- how much ---------------------------------------------------------------------------------------------------------


def test_as_many_jobs_wait_as_may_take_the_tokens_and_the_next_is_told_when_to_ask_again():
    world = full_world(max_queue_tokens=100)
    waiting = [wanted(max_tokens=10, n=4), wanted(max_tokens=56)]
    world.submit(*waiting)
    assert world.broker.queued_tokens == (2 + 4 * 10) + (2 + 56)
    refused = wanted(max_tokens=1)
    world.submit(refused)
    assert world.client.failure(refused).kind == "overloaded"
    assert 1 <= world.client.failure(refused).retry_after <= 60
    assert world.counts.refused_full == 1
    world.leave(waiting[0])
    world.submit(wanted(max_tokens=40))
    assert world.broker.queued_tokens == 100
    world.run()
    assert world.broker.queued_tokens == 0


def test_one_job_of_each_owner_may_wait_however_long_it_is():
    world = full_world(max_queue_tokens=100)
    long = [wanted(max_tokens=5000, owner=owner) for owner in ("a", "b")]
    world.submit(*long)
    assert all(each.id in world.client.jobs for each in long)
    refused = wanted(owner="a", max_tokens=1)
    world.submit(refused)
    assert world.client.failure(refused).kind == "overloaded"


def test_beams_and_embeddings_cost_what_they_may_take():
    world = full_world()
    plain = wanted(10)
    beams = GenerateJob(id=plain.id, prompt=plain.prompt, max_tokens=10, beams=BeamParams(num_beams=4))
    world.submit(beams, EmbedJob(id="e", prompt=[GOOD, 0, 0]))
    assert world.broker.queued_tokens == 2 + 4 * 10 + 3


def test_what_a_death_puts_back_counts_again():
    world = full_world()
    tokens = sum(2 + 40 for _ in range(3))
    world.kill(world.workers[0])
    assert (world.broker.queued, world.broker.queued_tokens) == (3, tokens)
    world.run()
    assert world.broker.queued_tokens == 0


# --- for how long -----------------------------------------------------------------------------------------------------


def test_a_job_that_is_not_started_in_its_time_is_told_so_and_never_started():
    world = full_world(queue_timeout_s=60.0)
    hurried, patient = started_late(0.5), wanted(3)
    world.submit(hurried, patient)
    assert world.broker.seconds_to_next() == pytest.approx(0.5)
    world.now += 0.49
    world.broker.dispatch()
    assert world.client.failure(hurried) is None
    world.now += 0.02
    world.broker.dispatch()
    failure = world.client.failure(hurried)
    assert (failure.kind, failure.cause) == ("overloaded", "queue_time")
    assert failure.retry_after >= 1
    world.run()
    assert world.client.of(hurried, Started) == []
    assert world.complete(patient)
    assert (world.counts.queue_timeouts, world.counts.failed) == (1, 1)


def test_without_a_time_of_its_own_a_job_waits_as_long_as_the_operator_allows_and_zero_is_for_ever():
    for timeout, fails in ((7.0, True), (0.0, False)):
        world = full_world(queue_timeout_s=timeout)
        late = wanted()
        world.submit(late)
        world.now += 6.9
        world.broker.dispatch()
        assert world.client.failure(late) is None
        world.now += 3600
        world.broker.dispatch()
        assert (world.client.failure(late) is not None) == fails


def test_a_job_that_lies_unstarted_with_a_worker_has_not_been_started():
    world = Simulation(max_batch=4)
    waiting, running = started_late(1.0), started_late(1.0)
    world.submit(waiting, running)
    world.broker.take(world.workers[0], [Started(id=running.id)])
    world.now += 1.1
    world.broker.dispatch()
    assert world.client.failure(waiting).cause == "queue_time"
    assert world.client.failure(running) is None
    assert Cancel(id=waiting.id, confirm=True) in world.workers[0].inbox


def test_jobs_taken_up_again_after_a_death_do_not_run_out_of_time():
    world = Simulation(queue_timeout_s=2.0)
    each = wanted()
    world.submit(each)
    world.kill(world.workers[0])
    world.now += 100
    world.run()
    assert world.complete(each)


def test_deadlines_of_jobs_that_have_gone_do_not_pile_up():
    alive: set[str] = set()
    deadlines = Deadlines(alive.__contains__)
    for number in range(10_000):
        alive.add(str(number))
        deadlines.add(1000.0 + number, str(number))
        alive.discard(str(number - 3))
    assert len(deadlines._heap) <= 64
    assert list(deadlines.due(1000.0 + 9998)) == ["9997", "9998"]
    assert deadlines.next == 1000.0 + 9999


# --- what is told -----------------------------------------------------------------------------------------------------


def test_who_waits_is_told_its_place_and_once_a_second_what_has_changed():
    world = full_world(max_queue=99)
    waiting = [wanted(5) for _ in range(4)]
    world.submit(*waiting)
    assert [world.client.positions(each) for each in waiting] == [[0], [1], [2], [3]]
    world.leave(waiting[0])
    world.leave(waiting[2])
    world.broker.dispatch()
    assert [world.client.positions(each) for each in waiting] == [[0], [1], [2], [3]]
    world.now += 1.1
    world.broker.dispatch()
    assert [world.client.positions(each) for each in waiting] == [[0], [1, 0], [2], [3, 1]]
    for _ in range(3):
        world.now += 1.1
        world.broker.dispatch()
    assert [world.client.positions(each) for each in waiting] == [[0], [1, 0], [2], [3, 1]]


def test_nobody_is_told_a_place_twice_within_a_second():
    world = full_world(max_queue=99)
    chance = random.Random(4)
    told: dict[str, float] = {}
    post = world.client.post

    def note(event) -> None:
        if hasattr(event, "position"):
            assert world.now - told.get(event.id, -9.0) >= 1.0
            told[event.id] = world.now
        post(event)

    world.client.post = note  # type: ignore[method-assign]
    for number in range(300):
        world.now += chance.random() * 0.3
        if chance.random() < 0.5:
            world.submit(wanted(5, owner=str(number % 3)))
        elif world.broker.queued:
            entry = next(iter(world.broker._queue))
            world.leave(entry.job)
        world.broker.dispatch()
    assert len(told) > 50


def test_places_are_those_in_which_jobs_are_started_whoever_owns_them():
    chance = random.Random(7)
    for _ in range(50):
        world = full_world(max_queue=999)
        for number in range(30):
            newest = job([GOOD, 0, number], 3, salt=str(chance.choice([1, 1, 1, 2, 3, 4])))
            world.submit(newest)
            order = [entry.job.id for entry in world.broker._queue]
            assert world.client.positions(newest) == [order.index(newest.id)]
            if chance.random() < 0.3:
                world.leave(world.client.jobs[chance.choice(order)].job)
            if world.broker.queued and chance.random() < 0.2:
                world.broker._queue.put_back([world.broker._queue.pop()])
        order = [entry.job.id for entry in world.broker._queue]
        assert [world.broker._queue.pop().job.id for _ in order] == order


def test_a_place_counts_the_suspects_and_the_replayed_but_they_are_told_none():
    world = Simulation(max_batch=32, max_queue=99)
    old = [wanted() for _ in range(3)]
    world.submit(*old)
    for _ in range(2):
        world.turn()
        world.turn()
        world.kill(world.workers[0])
    late = wanted(owner="late")
    world.submit(late)
    assert world.client.positions(late) == [3]
    world.now += 5
    world.broker.dispatch()
    assert [world.client.positions(each) for each in old] == [[]] * 3


# --- how fast it drains -----------------------------------------------------------------------------------------------


def test_the_rate_is_what_was_finished_in_each_second_of_work():
    rate = DrainRate()
    assert rate.per_second(0.0) == 0.0
    rate.begin(0.0)
    for second in range(1, 11):
        rate.note(500, float(second))
    assert rate.per_second(10.0) == pytest.approx(500, rel=0.25)
    rate.pause(10.0)
    quiet = rate.per_second(10.0)
    assert rate.per_second(10_000.0) == quiet
    rate.begin(10_000.0)
    for second in range(1, 200):
        rate.note(100, 10_000.0 + second)
    assert rate.per_second(10_199.0) == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(("tokens", "seconds"), [(0, 1), (90, 1), (1050, 11), (5_950, 60), (10**9, 60)])
def test_a_refused_client_is_told_how_long_the_queue_takes(tokens, seconds):
    rate = DrainRate()
    rate.begin(0.0)
    for tenth in range(1, 20_001):
        rate.note(10, tenth / 10)
    assert rate.seconds_for(tokens, 2000.0) == seconds


def test_before_anything_is_finished_the_guess_is_that_it_takes_as_long_again():
    rate = DrainRate()
    rate.begin(0.0)
    assert rate.seconds_for(1000, 0.1) == 1
    assert rate.seconds_for(1000, 10.0) == pytest.approx(10, abs=2)


def test_retry_after_follows_from_what_waits_and_what_was_finished():
    world = Simulation(max_batch=1, max_queue_tokens=4200)
    world.submit(*(wanted(98) for _ in range(40)))
    world.run()
    rate = world.broker.tokens_per_second
    # One token in each of three turns of 10 ms for each job: some 300 tokens a second, prompts included.
    assert 200 < rate < 400
    world.submit(*(wanted(98) for _ in range(60)))
    refused = next(failure for each in world.jobs if (failure := world.client.failure(each)))
    assert refused.retry_after == pytest.approx(4200 / rate, abs=1.5)


def test_all_that_was_admitted_is_counted_where_it_went():
    world = Simulation(max_batch=1, max_queue=5)
    jobs = [wanted(3) for _ in range(9)]
    world.submit(*jobs)
    world.leave(jobs[0])
    world.run()
    counts = world.counts
    assert (counts.admitted, counts.refused_full) == (8, 1)
    assert (counts.finished, counts.cancelled, counts.failed) == (7, 1, 0)


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprints_are_forgotten_after_their_time_and_when_there_are_too_many():
    now = [0.0]
    poisons = Poisons(lambda: now[0])
    first = wanted()
    poisons.add(first)
    assert first in poisons
    now[0] = REFUSED_S / 2
    for number in range(MOST):
        poisons.add(job([number], 1))
    assert first not in poisons
    assert job([MOST - 1], 1) in poisons
    now[0] += REFUSED_S
    assert job([MOST - 1], 1) not in poisons
    assert not poisons._until


def test_a_rehearsed_answer_changes_nothing_of_a_fingerprint():
    poisons = Poisons(lambda: 0.0)
    poisons.add(wanted(seed=3))
    plain = wanted()
    again = GenerateJob(id="x", prompt=plain.prompt, max_tokens=40, emitted=[[1, 2]], start_within_s=3.0, kept="k")
    assert again in poisons
    assert EmbedJob(id="x", prompt=plain.prompt) not in poisons
