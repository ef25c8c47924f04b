"""Log-probabilities of both APIs: each token's once, with its own text, streamed and not."""

from typing import Any

import pytest
from flask.testing import FlaskClient

from app.text.detokenizer import DetokenizerFactory
from tests.app.scripted_pool import ScriptedPool, generate_job, scored
from tests.app.test_chat import HELLO
from tests.app.tiny import IM_END, ids_of, tokenizer
from tests.sse import data_events
from workers.messages import Event, GenerateJob, Job, Output, TokenLogprobs

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TEXT = "你好，world 😀 almost ST but STOP and more"


def chat_answer(client: FlaskClient, stream: bool, **body: Any) -> tuple[str, list[dict[str, Any]] | None]:
    """Text and logprobs of the first choice."""
    response = client.post(CHAT, json={**HELLO, **body, "stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        choice = response.get_json()["choices"][0]
        return choice["message"]["content"], choice["logprobs"] and choice["logprobs"]["content"]
    text, content = "", None
    for chunk in data_events(response.text):
        for choice in chunk["choices"]:
            text += choice["delta"].get("content", "")
            if choice["logprobs"] is not None:
                content = [*(content or []), *choice["logprobs"]["content"]]
    return text, content


def completion_answer(client: FlaskClient, stream: bool, **body: Any) -> tuple[str, dict[str, list[Any]]]:
    response = client.post(COMPLETIONS, json={"template": "raw", "prompt": "Hello", **body, "stream": stream})
    assert response.status_code == 200, response.text
    text, joined = "", {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for each in data_events(response.text) if stream else [response.get_json()]:
        for choice in each["choices"]:
            text += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                joined[name] += values
    return text, joined


@pytest.mark.parametrize("per_event", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
def test_each_token_of_a_chat_answer_has_its_scores(
    client: FlaskClient, pool: ScriptedPool, stream: bool, per_event: int
) -> None:
    ids = ids_of(TEXT)
    pool.reply = scored(ids, stop=IM_END, per_event=per_event, lead=IM_END)
    text, content = chat_answer(client, stream, logprobs=True, top_logprobs=2)
    assert text == TEXT
    assert content is not None
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == TEXT
    # The token that ended the answer is no part of its text, and has no entry.
    assert [entry["logprob"] for entry in content] == [-(place + 1.0) for place in range(len(ids))]
    tops = [[(alternative["token"], alternative["logprob"]) for alternative in e["top_logprobs"]] for e in content]
    assert tops == [[("<|im_end|>", -0.1), (tokenizer().id_to_token(IM_END + 1), -0.2)]] * len(ids)
    assert content[0]["token"] == bytes(content[0]["bytes"]).decode(errors="replace") or content[0]["token"].startswith(
        "bytes:\\x"
    )
    assert generate_job(pool).logprobs == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["STOP", " ST", "😀", "almost ST b", "nowhere"])
@pytest.mark.parametrize("per_event", [1, 4])
def test_what_a_stop_string_cuts_away_has_no_scores(
    client: FlaskClient, pool: ScriptedPool, stream: bool, stop: str, per_event: int
) -> None:
    ids = ids_of(TEXT)
    pool.reply = scored(ids, reason="length", per_event=per_event)
    text, content = chat_answer(client, stream, logprobs=True, stop=stop)
    assert text == TEXT.partition(stop)[0]
    assert content is not None
    # Every token with a part in the text, and no other.
    data, kept = b"", []
    for place, token in enumerate(ids):
        if len(data.decode(errors="ignore")) >= len(text):
            break
        kept.append(-(place + 1.0))
        data += bytes(tokenizer_bytes(token))
    assert [entry["logprob"] for entry in content] == kept
    assert all(entry["top_logprobs"] == [] for entry in content)


def tokenizer_bytes(token: int) -> bytes:
    return DetokenizerFactory(tokenizer()).token_bytes(token) or b""


def test_scores_are_streamed_with_the_piece_that_holds_their_text(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = scored(ids_of(TEXT), stop=IM_END)
    body = {**HELLO, "logprobs": True, "stop": "STOX", "stream": True}
    sent, shown = b"", ""
    for chunk in data_events(client.post(CHAT, json=body).text):
        choice = chunk["choices"][0]
        shown += choice["delta"].get("content", "")
        for entry in (choice["logprobs"] or {"content": []})["content"]:
            sent += bytes(entry["bytes"])
        # No token is shown before its text, and no complete text without its tokens but for a character begun.
        assert shown.encode().startswith(sent)
    assert sent.decode() == shown == TEXT


def test_without_a_word_there_are_none(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = scored(ids_of(TEXT), stop=IM_END)
    for stream in (False, True):
        assert chat_answer(client, stream) == (TEXT, None)
        assert chat_answer(client, stream, logprobs=False) == (TEXT, None)
        assert completion_answer(client, stream)[1]["tokens"] == []
        assert generate_job(pool).logprobs is None


def test_an_impossible_token_has_a_finite_score(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = lambda job: [
        Output(id=job.id, ids=ids_of("a"), logprobs=[TokenLogprobs(float("-inf"))], finish_reason="length")
    ]
    _, content = chat_answer(client, False, logprobs=True)
    assert content is not None
    assert content[0]["logprob"] == -9999.0


@pytest.mark.parametrize("stream", [False, True])
def test_completions_have_parallel_lists(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    text = "Hello world 😀!"
    ids = ids_of(text)
    pool.reply = scored(ids, stop=IM_END, lead=50)
    shown, lists = completion_answer(client, stream, logprobs=1)
    assert shown == text
    assert {len(values) for values in lists.values()} == {len(ids)}
    assert lists["token_logprobs"] == [-(place + 1.0) for place in range(len(ids))]
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert token.startswith("bytes:\\x") or text.startswith(token, offset)
    # The token itself is there beside the alternatives.
    assert all(token in top for token, top in zip(lists["tokens"], lists["top_logprobs"], strict=True))
    assert all(len(top) <= 2 for top in lists["top_logprobs"])


@pytest.mark.parametrize("stream", [False, True])
def test_echo_shows_the_prompt_before_the_answer(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    pool.reply = scored(ids_of(" world"), stop=IM_END)
    assert completion_answer(client, stream, prompt="你好 Hello", echo=True, template=None)[0] == "你好 Hello world"
    assert tokenizer().decode(generate_job(pool).prompt) == "你好 Hello"
    assert generate_job(pool).prompt_logprobs is None
    ids = ids_of("Hello")
    assert completion_answer(client, stream, prompt=ids, echo=True)[0] == "Hello world"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [16, 0])
def test_echo_with_logprobs_has_those_of_the_prompt_first(
    client: FlaskClient, pool: ScriptedPool, stream: bool, max_tokens: int
) -> None:
    prompt, rest = "The capital 首", " of France"
    pool.reply = scored(ids_of(rest), reason="length")
    text, lists = completion_answer(client, stream, prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens)
    rest = rest if max_tokens else ""
    assert text == prompt + rest
    read, written = len(ids_of(prompt)), len(ids_of(rest))
    assert lists["token_logprobs"] == [
        None,
        *(-(place + 1.0) for place in range(1, read)),
        *(-(place + 1.0) for place in range(written)),
    ]
    assert lists["top_logprobs"][0] is None
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert token.startswith("bytes:\\x") or text.startswith(token, offset)
    job = generate_job(pool)
    assert (job.max_tokens, job.logprobs, job.prompt_logprobs) == (max_tokens, 2, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_answers_with_the_prompt(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    pool.reply = scored([])
    text, lists = completion_answer(client, stream, prompt=["Hello", "world"][:1], echo=True, max_tokens=0, n=1)
    assert (text, lists["tokens"]) == ("Hello", [])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_prompt_logprobs_are_in_each_choice(client: FlaskClient, pool: ScriptedPool, url: str, stream: bool) -> None:
    pool.reply = scored(ids_of("ok"), stop=IM_END, lead=50)
    question = HELLO if url == CHAT else {"prompt": "Hello world", "template": "raw"}
    response = client.post(url, json={**question, "prompt_logprobs": 2, "n": 2, "stream": stream})
    assert response.status_code == 200, response.text
    found: dict[int, Any] = {}
    for each in data_events(response.text) if stream else [response.get_json()]:
        for choice in each["choices"]:
            if "prompt_logprobs" in choice:
                assert choice["index"] not in found
                found[choice["index"]] = choice["prompt_logprobs"]
    job = generate_job(pool)
    assert sorted(found) == [0, 1]
    assert found[0] == found[1]
    assert found[0][0] is None
    assert len(found[0]) == len(job.prompt)
    for place, (token, entry) in enumerate(zip(job.prompt[1:], found[0][1:], strict=True), 1):
        assert set(entry) == {"50", "51", str(token)}
        assert entry["50"]["rank"] == 1
        if token not in (50, 51):
            assert entry[str(token)] == {
                "logprob": -(place + 1.0),
                "rank": None,
                "decoded_token": entry[str(token)]["decoded_token"],
            }
    assert job.logprobs is None


def test_best_of_answers_with_the_likeliest(client: FlaskClient, pool: ScriptedPool) -> None:
    means = {0: -2.0, 1: -0.5, 2: -3.0, 3: -1.0}

    def reply(job: Job) -> list[Event]:
        assert isinstance(job, GenerateJob)
        return [
            Output(
                id=job.id,
                choice=choice,
                ids=[*ids_of(f"{choice}" * (choice + 1)), IM_END],
                logprobs=[TokenLogprobs(means[choice])] * (len(ids_of(f"{choice}" * (choice + 1))) + 1),
                finish_reason="stop",
                stop_token_id=IM_END,
            )
            for choice in range(job.n)
        ]

    pool.reply = reply
    answer = client.post(COMPLETIONS, json={"prompt": ["a", "b"], "best_of": 4, "n": 2}).get_json()
    assert [(choice["index"], choice["text"], choice["logprobs"]) for choice in answer["choices"]] == [
        (0, "11", None),
        (1, "3333", None),
        (2, "11", None),
        (3, "3333", None),
    ]
    job = generate_job(pool)
    assert (job.n, job.logprobs) == (4, 0)
    # All that was generated is counted.
    drawn = sum(len(ids_of(f"{choice}" * (choice + 1))) + 1 for choice in range(4))
    assert answer["usage"]["completion_tokens"] == 2 * drawn


def test_cached_tokens_are_told(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = scored(ids_of("ok"), stop=IM_END)
    usage = client.post(CHAT, json=HELLO).get_json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
