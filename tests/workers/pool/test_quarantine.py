"""Who is in flight at two deaths is tried alone: the job that kills is found, no other is blamed, no token is lost."""

import random

import pytest

from tests.workers.pool.harness import job
from tests.workers.pool.simulation import GOOD, HANGS, KILLS, Simulation
from workers.messages import BeamParams, Cancel, Cancelled, EmbedJob, Failed, GenerateJob, Job, Output, Started
from workers.pool.quarantine import PROBATION_TOKENS


def good(number: int = 0, max_tokens: int = 40, **more) -> GenerateJob:
    return job([GOOD, 0, number], max_tokens, **more)


def poison(at: int = 4, number: int = 0, max_tokens: int = 40) -> GenerateJob:
    return job([KILLS, at, number], max_tokens)


def until(simulation: Simulation, condition, turns: int = 500) -> None:
    for _ in range(turns):
        if condition():
            return
        simulation.turn()
    raise AssertionError("it did not happen")


def tried(simulation: Simulation) -> list[str]:
    """The jobs on trial."""
    return [ward.tried.job.id for ward in simulation.broker._wards.values() if ward.tried]


def test_the_poison_among_many_is_found_and_its_mates_lose_nothing():
    world = Simulation(max_batch=32)
    culprit, mates = poison(), [good(number) for number in range(31)]
    world.submit(*mates[:20], culprit, *mates[20:])
    world.run()
    assert all(world.complete(mate) for mate in mates)
    assert world.client.failure(culprit).cause == "poison"
    assert world.client.failure(culprit).kind == "internal"
    # Twice with all the others, once alone.
    assert world.deaths == 3
    assert world.workers[0].crowds == [32, 32, 1]
    assert (world.counts.poisoned, world.counts.refused_poison) == (1, 0)
    assert world.counts.quarantined == 32
    assert world.counts.replayed == 32 + 32


def test_a_trial_lasts_a_few_tokens_and_nobody_else_is_on_the_worker_meanwhile():
    world = Simulation(max_batch=32)
    suspects = [good(number, max_tokens=60) for number in range(6)]
    world.submit(*suspects)
    for _ in range(2):
        until(world, lambda: world.broker.running == 6)
        world.turn()
        world.kill(world.workers[0])
    stood = {each.id: len(world.client.tokens(each)) for each in suspects}
    late = good(99)
    world.submit(late)
    seen = []
    while world.broker._wards or world.broker._quarantine.suspects:
        world.turn()
        assert len(world.workers[0].running) <= 1
        on_trial = tried(world)
        if on_trial and on_trial != seen[-1:]:
            seen += on_trial
    assert seen == [each.id for each in suspects]
    for each in suspects:
        assert stood[each.id] + PROBATION_TOKENS <= len(world.client.tokens(each)) < stood[each.id] + 16
    assert not world.client.tokens(late)
    # All of them go on together, before those who came later.
    world.turn()
    world.turn()
    assert list(world.workers[0].running) == [suspects[-1].id, *(each.id for each in suspects[:-1]), late.id]
    world.run()
    assert all(world.complete(each) for each in (*suspects, late))


def test_other_workers_go_on_while_suspects_are_tried():
    world = Simulation(workers=2, max_batch=32)
    world.workers[1].takes_jobs = False
    suspects = [poison(), good(1), good(2)]
    world.submit(*suspects)
    until(world, lambda: tried(world))
    (ward,) = world.broker._wards
    bystanders = [good(number, max_tokens=100) for number in range(10, 14)]
    world.submit(*bystanders)
    world.broker.dispatch()
    assert {entry.worker for entry in world.client.jobs.values() if entry.job in bystanders} == {1 - ward}
    world.run()
    assert all(world.complete(each) for each in (*suspects[1:], *bystanders))
    assert world.client.failure(suspects[0]).cause == "poison"
    assert sum(len(worker.crowds) for worker in world.workers) == 3


def test_if_the_only_living_worker_is_busy_and_no_other_is_expected_its_jobs_wait_for_the_trials():
    world = Simulation(workers=2, max_batch=32)
    bystanders = [good(number, max_tokens=200) for number in range(4)]
    world.workers[0].takes_jobs = False
    world.submit(*bystanders)
    world.turn()
    assert len(world.workers[1].running) == 4
    # Those of the other worker have seen two deaths, and it does not come back.
    world.workers[0].takes_jobs = True
    world.workers[1].takes_jobs = False
    suspects = [good(10), poison(3)]
    world.submit(*suspects)
    for _ in range(2):
        world.workers[0].take_orders()
        world.workers[0].step()
        world.kill(world.workers[0])
        world.workers[0].takes_jobs = True
        world.broker.dispatch()
        world.workers[0].takes_jobs = len(world.broker._quarantine.suspects) == 0
    world.kill(world.workers[0])
    world.workers[0].takes_jobs, world.workers[0].given_up = False, True
    world.workers[1].takes_jobs = True
    assert len(world.broker._quarantine.suspects) == 2
    world.run()
    assert all(world.complete(each) for each in (*bystanders, suspects[0]))
    assert world.client.failure(suspects[1]).cause == "poison"
    assert world.workers[1].crowds == [1]


def test_a_job_that_is_alone_at_both_deaths_needs_no_trial():
    world = Simulation()
    culprit = poison()
    world.submit(culprit)
    world.run()
    assert world.deaths == 2
    assert world.client.failure(culprit).cause == "poison"


@pytest.mark.parametrize("confirmed", [False, True])
def test_who_is_left_beside_what_was_cancelled_is_not_alone_until_the_worker_has_let_go_of_it(confirmed):
    world = Simulation()
    mate, worker = good(), world.workers[0]
    world.submit(mate)
    for number in range(2):
        # Without a step: it stands in the same place each time.
        worker.takes_jobs = True
        world.broker.dispatch()
        given_up = poison(number=number)
        world.submit(given_up)
        world.leave(given_up)
        if confirmed:
            worker.take_orders()
        worker.running.clear()
        world.kill(worker)
    world.run()
    assert (world.counts.poisoned, world.complete(mate)) == ((1, False) if confirmed else (0, True))


def test_a_job_that_gets_on_between_the_deaths_is_not_their_cause():
    world = Simulation(max_replays=3)
    wanted = good(max_tokens=100)
    world.submit(wanted)
    for count in range(3):
        until(world, lambda count=count: len(world.client.tokens(wanted)) >= 20 * (count + 1))
        world.kill(world.workers[0])
    world.run()
    assert world.complete(wanted)
    assert world.counts.replayed == 3


def test_more_deaths_than_replays_are_a_failure_without_a_proof():
    world = Simulation(max_replays=3)
    wanted = good(max_tokens=200)
    world.submit(wanted)
    for count in range(4):
        until(world, lambda count=count: len(world.client.tokens(wanted)) >= 20 * (count + 1))
        world.kill(world.workers[0])
    failure = world.client.failure(wanted)
    assert (failure.kind, failure.cause) == ("internal", None)


@pytest.mark.parametrize("max_replays", [0, 1])
def test_without_so_many_replays_nobody_is_tried(max_replays):
    world = Simulation(max_replays=max_replays)
    mates = [good(number) for number in range(3)]
    world.submit(*mates)
    for _ in range(max_replays + 1):
        world.turn()
        world.turn()
        world.kill(world.workers[0])
    assert [world.client.failure(mate).cause for mate in mates] == [None] * 3
    assert world.counts.quarantined == 0
    assert world.counts.replayed == 3 * max_replays


def test_the_like_of_a_poison_is_refused_for_a_while_whatever_its_seed_and_only_for_its_owner():
    world = Simulation()
    culprit = poison()
    world.submit(culprit)
    world.run()
    same = job(culprit.prompt, culprit.max_tokens, seed=77)
    others = [
        job([*culprit.prompt, 1], culprit.max_tokens),
        job(culprit.prompt, culprit.max_tokens, n=2),
        job(culprit.prompt, culprit.max_tokens, salt="another owner"),
    ]
    assert world.broker.submit(world.client, same)
    assert world.client.failure(same).cause == "poison"
    assert world.client.failure(same).message == world.client.failure(culprit).message
    assert world.counts.refused_poison == 1
    for each in others:
        world.broker.submit(world.client, each)
        assert each.id in world.client.jobs
        world.broker.cancel(world.client, Cancel(id=each.id))
    world.now += 601
    later = job(culprit.prompt, culprit.max_tokens)
    world.broker.submit(world.client, later)
    assert later.id in world.client.jobs


def test_once_a_poison_is_found_its_like_that_wait_or_run_kill_nobody_any_more():
    world = Simulation(max_batch=4, max_replays=9)
    copies = [poison() for _ in range(9)]
    mate = good()
    world.submit(*copies, mate)
    world.run()
    assert world.deaths == 3
    assert [world.client.failure(copy).cause for copy in copies] == ["poison"] * 9
    assert (world.counts.poisoned, world.counts.refused_poison) == (1, 8)
    assert world.complete(mate)


def test_several_poisons_cost_a_death_each():
    world = Simulation(max_batch=32)
    culprits = [poison(number=number) for number in range(4)]
    mates = [good(number) for number in range(8)]
    world.submit(*culprits, *mates)
    world.run()
    assert world.deaths == 2 + 4
    assert [world.client.failure(each).cause for each in culprits] == ["poison"] * 4
    assert all(world.complete(mate) for mate in mates)


def test_embeddings_and_beams_are_tried_like_others():
    world = Simulation(max_batch=32)
    bad_embedding = EmbedJob(id="bad", prompt=[KILLS, 0])
    good_embedding = EmbedJob(id="good", prompt=[GOOD, 0])
    plain = good(3, max_tokens=30)
    beams = GenerateJob(id="beams", prompt=plain.prompt, max_tokens=30, beams=BeamParams(num_beams=3))
    world.submit(beams, bad_embedding, good_embedding)
    world.run()
    assert world.client.failure(bad_embedding).cause == "poison"
    assert world.complete(good_embedding)
    assert world.complete(beams)
    again = EmbedJob(id="again", prompt=[KILLS, 0])
    world.submit(again)
    assert world.client.failure(again).cause == "poison"


def suspects_on_trial(count: int = 3, workers: int = 1, **more) -> tuple[Simulation, list[GenerateJob]]:
    """Jobs that have seen two deaths; the first of them is on trial."""
    world = Simulation(workers=workers, max_batch=32, **more)
    for other in world.workers[1:]:
        other.takes_jobs, other.given_up = False, True
    suspects = [good(number, n=2) for number in range(count)]
    world.submit(*suspects)
    for _ in range(2):
        until(world, lambda: len(world.workers[0].running) == count)
        world.kill(world.workers[0])
    until(world, lambda: tried(world) == [suspects[0].id] and world.workers[0].running)
    return world, suspects


def test_a_client_that_leaves_during_a_trial_makes_room_for_the_next():
    world, suspects = suspects_on_trial()
    world.leave(suspects[0])
    until(world, lambda: tried(world) == [suspects[1].id])
    world.run()
    assert all(world.complete(each) for each in suspects[1:])
    assert world.counts.poisoned == 0


def test_who_comes_next_is_not_blamed_for_what_the_one_before_has_left_behind():
    world, suspects = suspects_on_trial()
    world.workers[0].hung = True  # with the first of them, whose client then leaves
    world.leave(suspects[0])
    for _ in range(5):
        world.broker.dispatch()
    assert tried(world) == []
    assert world.broker.awaits_word_of(world.workers[0])
    world.kill(world.workers[0])
    world.run()
    assert all(world.complete(each) for each in suspects[1:])
    assert world.counts.poisoned == 0


def test_a_cancelled_choice_leaves_the_trial_with_the_other():
    world, suspects = suspects_on_trial()
    world.broker.cancel(world.client, Cancel(id=suspects[0].id, choice=0))
    world.turn()
    world.run()
    assert world.client.tokens(suspects[0], 1) == [*world.client.tokens(suspects[0], 1)][:40]
    assert [o.choice for o in world.client.of(suspects[0], Output) if o.finish_reason] == [1]
    assert all(world.complete(each) for each in suspects[1:])
    world.broker.cancel(world.client, Cancel(id=suspects[0].id, choice=1))


def test_a_trial_with_the_last_choice_cancelled_is_over():
    world, suspects = suspects_on_trial()
    for choice in (0, 1):
        world.broker.cancel(world.client, Cancel(id=suspects[0].id, choice=choice))
    world.run()
    assert all(world.complete(each) for each in suspects[1:])


def test_if_no_worker_is_worth_waiting_for_during_a_trial_all_fail_as_unavailable():
    world, suspects = suspects_on_trial()
    world.workers[0].given_up = world.hopeless = True
    world.kill(world.workers[0])
    world.broker.dispatch()
    failures = [world.client.failure(each) for each in suspects]
    # The one on trial when the worker died is the cause, as far as anybody can tell.
    assert [(failure.kind, failure.cause) for failure in failures] == [
        ("internal", "poison"),
        ("unavailable", None),
        ("unavailable", None),
    ]
    assert world.broker.queued == world.broker.running == 0


def test_draining_refuses_newcomers_and_lets_trials_finish():
    world, suspects = suspects_on_trial()
    world.broker.draining = True
    late = good(9)
    world.submit(late)
    assert world.client.failure(late).kind == "unavailable"
    world.run()
    assert all(world.complete(each) for each in suspects)


def test_stopping_during_a_trial_answers_everybody():
    world, suspects = suspects_on_trial()
    world.broker.fail_all("over", retry_after=5.0)
    assert [world.client.failure(each).kind for each in suspects] == ["unavailable"] * 3
    assert world.broker.queued == world.broker.running == 0
    world.turn()
    world.submit(good(7))
    world.run()


@pytest.mark.parametrize("alone_again", [False, True], ids=["others wait", "the others have left"])
def test_what_a_parked_job_still_sends_is_kept_and_what_comes_after_is_of_its_next_run(alone_again):
    world, suspects = suspects_on_trial()
    worker = world.workers[0]
    until(world, lambda: any(isinstance(order, Cancel) and order.confirm for order in worker.inbox))
    if alone_again:
        for each in suspects[1:]:
            world.leave(each)
    worker.step()
    worker.step()  # two more tokens before it hears that it shall stop
    world.broker.dispatch()
    world.run()
    assert all(world.complete(each) for each in suspects if each.id not in world.gone)


def test_a_confirmation_of_something_else_means_nothing():
    world = Simulation()
    wanted = good()
    world.submit(wanted)
    world.broker.take(world.workers[0], [Cancelled(id=wanted.id), Cancelled(id=""), Cancelled(id="unknown")])
    assert world.client.events == {}
    world.run()
    assert world.complete(wanted)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("external", [False, True], ids=["only poison kills", "anything dies at any time"])
def test_whatever_dies_hangs_or_leaves_no_token_is_lost_or_doubled_and_no_innocent_convicted(workers, external):
    for seed in range(60):
        chance = random.Random(seed * 10 + workers)
        world = Simulation(workers=workers, max_batch=chance.choice([2, 8, 32]), max_replays=99)
        jobs: list[Job] = []
        for number in range(chance.randrange(3, 25)):
            behaviour = chance.choices([GOOD, KILLS, HANGS], [10, 1, 1])[0]
            prompt = [behaviour, chance.randrange(30), number]
            if chance.random() < 0.1:
                jobs.append(EmbedJob(id=f"e{number}", prompt=[behaviour, 0, number]))
            else:
                jobs.append(job(prompt, chance.randrange(1, 50), n=chance.choice([1, 1, 1, 3])))
        waiting = list(jobs)
        for _ in range(20_000):
            if waiting and chance.random() < 0.3:
                world.submit(waiting.pop())
            elif not waiting and not world.client.jobs:
                break
            if world.client.jobs and chance.random() < 0.005:
                entry = chance.choice(list(world.client.jobs.values()))
                world.leave(entry.job)
            if external and chance.random() < 0.01:
                alive = [worker for worker in world.workers if worker.takes_jobs]
                if alive:
                    world.kill(chance.choice(alive))
            world.turn(chance)
        world.check_counts()
        assert not world.client.jobs, seed
        assert (world.broker.queued, world.broker.running, world.broker.queued_tokens) == (0, 0, 0)
        assert not world.broker._quarantine._parking
        for each in jobs:
            failure = world.client.failure(each)
            if each.id in world.gone:
                continue
            if each.prompt[0] == GOOD and not external:
                assert failure is None, (seed, failure)
            if failure is None:
                assert world.complete(each), (seed, each)
                assert each.prompt[0] == GOOD or each.prompt[1] >= 1, seed
            else:
                assert failure.cause == "poison", (seed, failure)
            assert len(world.client.of(each, Started)) <= 1
            assert len(world.client.of(each, Failed)) <= 1


def test_who_has_passed_its_trial_is_not_blamed_for_a_death_before_it_has_left():
    world, suspects = suspects_on_trial()
    worker = world.workers[0]
    ward = world.broker._wards[0]
    while not ward.leaving:
        worker.take_orders()
        worker.step()
        world.deliver(worker)
    # It was told to make room for the next, and has not confirmed it: somebody else kills the worker.
    world.kill(worker)
    assert world.client.failure(suspects[0]) is None
    world.run()
    assert all(map(world.complete, suspects))
    assert world.counts.poisoned == 0


def test_who_is_alone_at_two_deaths_in_different_places_has_a_trial():
    world = Simulation()
    alone = good()
    world.submit(alone)
    for tokens in (5, 6):
        until(world, lambda tokens=tokens: len(world.client.tokens(alone)) == tokens)
        world.kill(world.workers[0])
        assert world.client.failure(alone) is None
    world.run()
    assert world.complete(alone)
    assert (world.counts.quarantined, world.counts.poisoned) == (1, 0)
