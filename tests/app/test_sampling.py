"""Defaults, greedy decoding and beams: what the engine is told for what the request said."""

from typing import Any

import pytest

from app.text.card import Model
from app.text.errors import ContextLengthExceeded, RequestError
from app.text.sampling import Defaults, Plan, Wishes, max_tokens_for, plan
from tests.app.tiny import IM_END, tokenizer
from workers.messages import BeamParams, ModelCard


def model(**defaults: float | int | bool) -> Model:
    card = ModelCard(
        id="tiny",
        names=[],
        tokenizer_path="",
        add_bos_token=False,
        chat_template=None,
        special_tokens={},
        stop_token_ids=[IM_END],
        eos_token_id=IM_END,
        vocab_size=420,
        hidden_size=8,
        max_model_len=1000,
        created=0,
        dtype="float32",
        device="cpu",
        sampling_defaults=defaults,
    )
    return Model(card, tokenizer())


def planned(defaults: Defaults = "demo", of: Model | None = None, **wishes: Any) -> Plan:
    return plan(Wishes(**wishes), of or model(), defaults)


def test_the_demos_defaults_are_the_default() -> None:
    made = planned()
    sampling = made.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0.2, 0.9, 40, 1.1)
    assert made.default_max_tokens == 512
    assert made.beams is None


def test_openais_defaults_switch_everything_off() -> None:
    made = planned("openai")
    sampling = made.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (1.0, 1.0, 0, 1.0)
    assert max_tokens_for(made, model(), 100, "prompt") == 900


def test_the_models_own_defaults() -> None:
    own = model(temperature=0.6, top_p=0.95, max_new_tokens=50, repetition_penalty=1.2)
    made = planned("model", own)
    assert (made.sampling.temperature, made.sampling.top_p, made.sampling.repetition_penalty) == (0.6, 0.95, 1.2)
    assert max_tokens_for(made, own, 10, "prompt") == 50
    assert planned("model", own, temperature=1.5).sampling.temperature == 1.5


def test_a_model_that_is_greedy_by_default_samples_when_a_request_says_how() -> None:
    greedy = model(do_sample=False)
    assert planned("model", greedy).sampling.temperature == 0
    assert planned("model", greedy, do_sample=True).sampling.temperature == 1
    assert planned("model", greedy, temperature=0.7).sampling.temperature == 0.7


@pytest.mark.parametrize("wishes", [{"temperature": 0}, {"do_sample": False}, {"do_sample": False, "temperature": 1.0}])
def test_greedy_decoding_has_no_other_step_but_the_penalties(wishes: dict[str, Any]) -> None:
    sampling = planned(**wishes, repetition_penalty=1.3).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0, 0, 1, 0)
    assert sampling.repetition_penalty == 1.3


def test_several_beams_without_a_word_about_sampling_are_beam_search() -> None:
    made = planned(num_beams=4, n=2, length_penalty=0.5, early_stopping=True)
    assert made.beams == BeamParams(num_beams=4, length_penalty=0.5, early_stopping=True)
    assert made.sampling.temperature == 0
    assert planned(num_beams=1).beams is None
    assert planned(num_beams=2, do_sample=False).beams is not None


def test_beams_are_not_combined_with_sampling() -> None:
    with pytest.raises(RequestError) as caught:
        planned(num_beams=2, do_sample=True)
    assert caught.value.param == "do_sample"


def test_a_models_default_of_beams_gives_way_to_sampling() -> None:
    beams = model(num_beams=4)
    assert planned("model", beams).beams is not None
    assert planned("model", beams, do_sample=True).beams is None


def test_a_given_seed_is_kept_and_others_differ() -> None:
    assert planned(seed=-5).sampling.seed == -5
    assert planned(seed=0).sampling.seed == 0
    assert planned().sampling.seed != planned().sampling.seed


def test_what_ends_an_answer() -> None:
    assert planned(stop_token_ids=(7,)).stop_token_ids == [IM_END, 7]
    assert planned(ignore_eos=True).stop_token_ids == []
    assert planned(ignore_eos=True, stop_token_ids=(7,)).stop_token_ids == [7]


def test_room_for_the_answer() -> None:
    assert max_tokens_for(planned(), model(), 100, "prompt") == 512
    assert max_tokens_for(planned(), model(), 999, "prompt") == 1
    assert max_tokens_for(planned(max_tokens=900), model(), 100, "prompt") == 900
    for wishes, prompt in (({"max_tokens": 901}, 100), ({}, 1000), ({"max_tokens": 1}, 5000)):
        with pytest.raises(ContextLengthExceeded):
            max_tokens_for(planned(**wishes), model(), prompt, "prompt")
    with pytest.raises(RequestError, match="min_tokens"):
        max_tokens_for(planned(min_tokens=600), model(), 100, "prompt")
