"""Row F8 from the client's side, with the real engine: all kinds of requests beside one that kills every worker."""

import openai
import pytest

from tests.faults.poison_engine import POISON
from tests.faults.rig import CHAT, KINDS, Ask, Rig, mixed, tally
from tests.faults.rig_engine import hits

MESSAGES = [{"role": "user", "content": "Tell me of the poison."}]


def test_f8_mates_of_every_kind_get_their_exact_answers_and_the_client_of_the_poison_is_told_not_to_retry(row):
    with Rig(engine="tests.faults.poison_engine:run") as rig:
        asks = mixed(len(KINDS), max_tokens=40)
        references = rig.alone(asks)
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 60, "seed": POISON, "ignore_eos": True}
        poison = Ask("poison", CHAT, body)
        records = rig.start([*asks[:6], poison, *asks[6:]]).finish()
        status = rig.pool_status()
        (failed,) = tally(row, records, references)
        assert failed.ask is poison
        assert (failed.status, failed.headers["x-should-retry"]) == (500, "false")
        deaths = hits(rig.runtime_dir, POISON)
        assert deaths == status.counters.worker_deaths == 3
        assert status.counters.poisoned == 1

        # The same once more, as the client with retries of its own would send it.
        client = openai.OpenAI(base_url=f"{rig.url}/v1", api_key="x", max_retries=2)
        with pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(
                model="tiny",
                messages=MESSAGES,
                max_tokens=60,
                seed=POISON,
                extra_body={"ignore_eos": True},  # type: ignore[arg-type]
            )
        counters = rig.pool_status().counters
        assert (counters.refused_poison, counters.worker_deaths) == (1, 3)
        assert refused.value.response.headers["x-should-retry"] == "false"
        row.requests += 1
        row.errors += 1
        row.replayed = counters.replayed
    row.fault = f"the same over HTTP with the real engine and {len(asks)} kinds of requests; again by the openai client"
    row.hit = f"{deaths} workers killed by it, twice among the others; the openai client sent it once"
