"""A beam search sends what all its beams share as soon as that is certain, and never takes anything back."""

import itertools
from typing import Any

import pytest

from tests.workers.engine.tiny import EOS, drain, ids_of, job, prompts, reference, tiny_engine, tiny_model
from workers.messages import BeamParams, Output, SamplingParams

# One token far more likely than the others now and then, as in real text; a random model's beams share little.
PEAKED = SamplingParams(temperature=0, logit_bias={30: 6.0, 31: 5.0, EOS: -3.0})


def outputs(reports: list[Any], choice: int = 0) -> list[Output]:
    return [r for r in reports if isinstance(r, Output) and r.choice == choice]


@pytest.mark.parametrize("n", [1, 3])
def test_a_search_streams_and_the_whole_is_what_generate_finds(n: int) -> None:
    engine = tiny_engine(tiny_model())
    model = tiny_model()
    early = 0
    for i, prompt in enumerate(prompts(8, seed=21)):
        params = BeamParams(num_beams=3)
        reports = drain(engine, [job(str(i), prompt, 20, beams=params, n=n)])
        expected = reference(model, prompt, 20, num_beams=3, num_return_sequences=n)
        for choice in range(n):
            assert ids_of(reports, str(i), choice) == expected[choice]
            ends = [o.finish_reason is not None for o in outputs(reports, choice)]
            assert ends == [False] * (len(ends) - 1) + [True]
        early += len(outputs(reports)) - 1
    assert early > 0, "nothing was sent before the end in any of the searches"


def test_a_resumed_search_sends_only_the_rest() -> None:
    engine = tiny_engine(tiny_model())
    prompt = prompts(1, seed=21)[0]
    options: dict[str, Any] = {"beams": BeamParams(num_beams=3), "n": 2, "sampling": PEAKED}
    whole = drain(engine, [job("w", prompt, 20, **options)])
    texts = [ids_of(whole, "w", c) for c in range(2)]
    sent = [list(itertools.chain(*(o.ids for o in outputs(whole, c)[:-1]))) for c in range(2)]
    assert sent[0]
    for cut in range(len(sent[0]) + 1):
        rest = drain(engine, [job("r", prompt, 20, emitted=[ids[:cut] for ids in sent], **options)])
        assert [ids_of(rest, "r", c) for c in range(2)] == [text[cut:] for text in texts]
