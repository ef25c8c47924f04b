"""B2, B4, B10 to B13, B18, B19: values that no field takes; each is refused by name."""

import json
import socket
from typing import Any

import pytest

from tests.battery.answers import Door

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
# SmolLM2's.
VOCABULARY = 49_152
CONTEXT = 8_192

BASE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "x"}]},
    COMPLETIONS: {"prompt": "x"},
    EMBEDDINGS: {"input": "x"},
}

INTEGERS = ("max_tokens", "min_tokens", "n", "seed", "top_k", "num_beams", "best_of", "prompt_logprobs")
NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty")
NUMBERS += ("frequency_penalty", "length_penalty", "timeout")
BOOLEANS = ("stream", "ignore_eos", "do_sample")
STRINGS = ("model", "guided_regex", "guided_grammar")
LISTS = ("stop_token_ids", "guided_choice")
OBJECTS = ("logit_bias", "stream_options", "response_format")

NOT = {
    "integer": (True, 1.0, "1", "0.5", [1], {}),
    "number": (True, "0.5", [0.5], {}),
    "boolean": (0, 1, "true", [], {}),
    "string": (7, True, ["x"], {}),
    "list": (7, True, "x", {}),
    "object": (7, True, "x", ["x"]),
}
KINDS = {
    "integer": INTEGERS,
    "number": NUMBERS,
    "boolean": BOOLEANS,
    "string": STRINGS,
    "list": LISTS,
    "object": OBJECTS,
}
WRONG = [(field, kind) for kind, fields in KINDS.items() for field in fields]
OWN = {
    CHAT: [
        ("max_completion_tokens", "integer"),
        ("logprobs", "boolean"),
        ("top_logprobs", "integer"),
        ("chat_template_kwargs", "object"),
        ("metadata", "object"),
        ("tools", "list"),
        ("store", "boolean"),
    ],
    COMPLETIONS: [("logprobs", "integer"), ("echo", "boolean"), ("suffix", "string"), ("template", "string")],
}


def check_refused(door: Door, route: str, field: str, value: Any) -> None:
    error = door.refusal(route, {**BASE[route], field: value})
    param = error["param"] or ""
    assert param.replace("[", ".").split(".")[0] == field, (value, error)


@pytest.mark.parametrize(
    ("route", "field", "kind"),
    [(route, *each) for route in (CHAT, COMPLETIONS) for each in [*WRONG, *OWN[route]]]
    + [
        (EMBEDDINGS, "dimensions", "integer"),
        (EMBEDDINGS, "encoding_format", "string"),
        (EMBEDDINGS, "model", "string"),
    ],
)
def test_b2_a_value_of_another_type(door: Door, route: str, field: str, kind: str) -> None:
    for value in NOT[kind]:
        check_refused(door, route, field, value)


# The other routes: a request that is right, and fields of each kind.
OTHER: dict[str, tuple[dict[str, Any], dict[str, tuple[str, ...]]]] = {
    "/v1/responses": (
        {"input": "x", "max_output_tokens": 1},
        {
            "integer": ("max_output_tokens", "max_tool_calls", "top_logprobs", "seed", "top_k", "min_tokens"),
            "number": ("temperature", "top_p", "min_p", "repetition_penalty", "timeout"),
            "boolean": ("stream", "store", "background", "parallel_tool_calls", "ignore_eos"),
            "string": ("model", "instructions", "previous_response_id", "truncation", "guided_regex"),
            "list": ("tools", "include", "stop_token_ids", "guided_choice"),
            "object": ("text", "reasoning", "metadata", "stream_options", "chat_template_kwargs"),
        },
    ),
    "/v1/messages": (
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
        {
            "integer": ("max_tokens", "top_k", "seed"),
            "number": ("temperature", "top_p", "min_p", "repetition_penalty", "timeout"),
            "boolean": ("stream", "resumable"),
            "string": ("model",),
            "list": ("messages", "tools", "stop_sequences"),
            "object": ("tool_choice", "thinking", "output_config", "chat_template_kwargs"),
        },
    ),
    "/v1/messages/count_tokens": (
        {"messages": [{"role": "user", "content": "x"}]},
        {"string": ("model",), "list": ("messages", "tools"), "object": ("tool_choice", "thinking")},
    ),
    "/v1/score": ({"text_1": "x", "text_2": "y"}, {"number": ("timeout",), "string": ("model", "method")}),
    "/v1/rerank": (
        {"query": "x", "documents": ["y"]},
        {
            "integer": ("top_n",),
            "boolean": ("return_documents",),
            "string": ("query", "model", "method"),
            "list": ("documents",),
        },
    ),
    "/detokenize": ({"tokens": [1]}, {"string": ("model",), "list": ("tokens",)}),
}


@pytest.mark.parametrize("route", OTHER)
def test_b2_b4_a_value_of_another_type_on_the_other_routes(door: Door, route: str) -> None:
    base, kinds = OTHER[route]
    assert door.post(route, base).status_code == 200
    for kind, fields in kinds.items():
        beyond = (2**63, -(2**63) - 1, 1e308) if kind == "integer" else ()
        for field in fields:
            for value in (*NOT[kind], *beyond):
                error = door.refusal(route, {**base, field: value})
                # Anthropic's errors name the field in their text only.
                assert field in (error.get("param") or error["message"]), (field, value, error)


@pytest.mark.parametrize(("route", "field"), [(CHAT, "messages"), (COMPLETIONS, "prompt"), (EMBEDDINGS, "input")])
def test_b2_what_must_be_there(door: Door, route: str, field: str) -> None:
    for body in ({}, {field: None}, {field: 7}, {field: True}, {field: {}}, {field: []}):
        assert door.refusal(route, body)["param"] == field, body


@pytest.mark.parametrize("field", [*INTEGERS, "max_completion_tokens"])
def test_b4_numbers_beyond_all_bounds(door: Door, field: str) -> None:
    for value in (2**63, -(2**63) - 1, 1e308, 10**30):
        check_refused(door, CHAT, field, value)
    digits = json.dumps(BASE[CHAT])[:-1] + f', "{field}": ' + "9" * 5_000 + "}"
    assert door.refusal(CHAT, digits.encode())["param"] in (field, None)


OUT_OF_RANGE = [
    (CHAT, {"max_tokens": -1}, "max_tokens"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 129}, "n"),
    (CHAT, {"n": 1_000_000_000}, "n"),
    (CHAT, {"best_of": 21}, "best_of"),
    (COMPLETIONS, {"best_of": 21}, "best_of"),
    (COMPLETIONS, {"best_of": 1, "n": 2}, "best_of"),
    (CHAT, {"top_p": 1.1}, "top_p"),
    (CHAT, {"top_p": -0.1}, "top_p"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"temperature": 2.1}, "temperature"),
    (CHAT, {"presence_penalty": 2.1}, "presence_penalty"),
    (CHAT, {"frequency_penalty": -2.1}, "frequency_penalty"),
    (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (COMPLETIONS, {"logprobs": 6}, "logprobs"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"n_discard": -1, "max_tokens": -1}, "max_tokens"),
]


@pytest.mark.parametrize(("route", "fields", "param"), OUT_OF_RANGE)
def test_b10_out_of_range(door: Door, route: str, fields: dict[str, Any], param: str) -> None:
    assert door.refusal(route, {**BASE[route], **fields})["param"] == param


def test_b10_a_prompt_can_be_scored_without_an_answer(door: Door) -> None:
    answer = door.post(
        COMPLETIONS, {"prompt": "Hello", "template": "raw", "echo": True, "max_tokens": 0, "logprobs": 1}
    )
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"] == "Hello"


USER = {"role": "user", "content": "x"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ([USER] * 4_097, "messages"),
        ([USER] * 100_000, "messages"),
        (["x"], "messages[0]"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([USER, {"content": "x"}], "messages[1].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "messages[0].content"),
        ([USER, {"role": "tool", "content": "x"}], "messages[1]"),
        ([USER, {"role": "tool", "content": "x", "tool_call_id": "7"}], "messages[1]"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL] * 129}], "messages[1].tool_calls"),
        (
            [USER, {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": 7}]}],
            "messages[1].tool_calls[0]",
        ),
    ],
)
def test_b11_messages_that_are_none(door: Door, messages: Any, param: str) -> None:
    found = door.refusal(CHAT, {"messages": messages})["param"]
    assert found == param or found.startswith((param + ".", param + "[")), found


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools"),
        ({"tools": [tool("f", parameters={"description": "x" * 300_000})]}, "tools"),
        ({"tools": [tool("x" * 65)]}, "tools"),
        ({"tools": [tool("f", parameters=7)]}, "tools"),
        ({"guided_regex": "x" * 270_000}, "guided_regex"),
        ({"guided_choice": ["x"] * 1_025}, "guided_choice"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"model": "x" * 1_025}, "model"),
    ],
    ids=["tools", "tool bytes", "tool name", "parameters", "regex", "choices", "pairs", "key", "value", "model"],
)
def test_b_limits_of_the_table_are_crossed(door: Door, fields: dict[str, Any], param: str) -> None:
    found = door.refusal(CHAT, {**BASE[CHAT], **fields})["param"]
    assert found == param or found.startswith((param + ".", param + "[")), found


@pytest.mark.parametrize(
    "biases",
    [
        {"-1": 1},
        {str(VOCABULARY): 1},
        {str(2**31): 1},
        {"abc": 1},
        {"1": 100.1},
        {"1": -100.1},
        {"1": None},
        {str(i): 1 for i in range(1_025)},
        [],
    ],
)
def test_b12_biases_that_no_model_has(door: Door, biases: Any) -> None:
    check_refused(door, CHAT, "logit_bias", biases)
    check_refused(door, COMPLETIONS, "logit_bias", biases)


def test_b12_a_million_biases(door: Door) -> None:
    door.refusal(CHAT, {**BASE[CHAT], "logit_bias": {str(i): 1 for i in range(500_000)}})


def test_b12_as_many_biases_as_allowed_reach_the_model(door: Door) -> None:
    body = {**BASE[CHAT], "logit_bias": {str(i): 100 for i in range(1_000, 2_024)}, "max_tokens": 2}
    assert door.post(CHAT, body).status_code == 200
    edge = {**BASE[CHAT], "logit_bias": {str(VOCABULARY - 1): -100}, "max_tokens": 2}
    assert door.post(CHAT, edge).status_code == 200


@pytest.mark.parametrize("stop", [["a"] * 5, [""], "x" * 1_025, "x" * 1_000_000, [None], [["a"]], 7])
def test_b12_stop_strings_that_are_none(door: Door, stop: Any) -> None:
    check_refused(door, CHAT, "stop", stop)


@pytest.mark.parametrize("ids", [[-1], [VOCABULARY], [2**31], list(range(129)), ["1"]])
def test_b12_stop_tokens_that_are_none(door: Door, ids: Any) -> None:
    check_refused(door, CHAT, "stop_token_ids", ids)


@pytest.mark.parametrize(
    "prompt",
    [
        *([-1], [VOCABULARY], [1, VOCABULARY], [2**31], [2**63 - 1], [], [[]], [[1], []], [1, "a"], [[1], "a"]),
        *([1, [2]], [[1.0]], [None], [True], [[[1]]]),
    ],
)
@pytest.mark.parametrize(("route", "field"), [(COMPLETIONS, "prompt"), (EMBEDDINGS, "input")])
def test_b13_prompts_that_are_none(door: Door, route: str, field: str, prompt: Any) -> None:
    assert door.refusal(route, {field: prompt})["param"].startswith(field)


def test_b13_an_empty_prompt(door: Door) -> None:
    assert door.post(COMPLETIONS, {"prompt": "", "max_tokens": 1}).status_code in (200, 400)
    assert door.post(EMBEDDINGS, {"input": ""}).status_code in (200, 400)
    assert door.post(COMPLETIONS, {"prompt": "", "template": "raw", "max_tokens": 1}).status_code in (200, 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": ["x"] * 500_000}, "prompt"),
        ({"prompt": [[1]] * 500_000}, "prompt"),
        ({"prompt": ["x"] * 65, "n": 2}, "n"),
        ({"prompt": ["x"] * 65, "num_beams": 2}, "n"),
        ({"prompt": ["x"] * 10, "best_of": 20}, "n"),
    ],
    ids=["129 prompts", "500,000 prompts", "500,000 token lists", "n", "num_beams", "best_of"],
)
def test_b13_too_many_sequences(door: Door, fields: dict[str, Any], param: str) -> None:
    assert door.refusal(COMPLETIONS, fields)["param"] == param


def test_b13_too_many_inputs(door: Door) -> None:
    assert door.refusal(EMBEDDINGS, {"input": ["x"] * 2_049})["param"] == "input"


NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "%2e%2e",
    "..%2f..",
    "x" * 10_240,
    "a\nb",
    "a\r\nX-Evil: 1",
    "file:///x",
    ".",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:12]))
def test_b18_model_names_are_no_paths(door: Door, name: str) -> None:
    for route, base in BASE.items():
        answer = door.post(route, {**base, "model": name})
        assert answer.status_code in (400, 404), (route, answer.text[:300])
        assert answer.json()["error"]["param"] == "model"
        assert "X-Evil" not in answer.headers
        assert len(answer.content) < 1_000


@pytest.mark.parametrize("path", ["..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "a%0d%0ab", "x" * 2_000])
def test_b18_a_model_in_the_url_is_no_path(door: Door, path: str) -> None:
    assert door.send("GET", f"/v1/models/{path}").status_code in (400, 404)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template", "{{ 1 }}"),
        ("prompt_embeds", "AAAA"),
        ("logits_processors", ["os.system"]),
        ("chat_template_kwargs", {"tokenize": True}),
        ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"add_generation_prompt": False}),
        ("chat_template_kwargs", {"raise_exception": 1}),
    ],
)
def test_b18_what_would_take_over_the_template_or_the_engine(door: Door, field: str, value: Any) -> None:
    check_refused(door, CHAT, field, value)


@pytest.mark.parametrize("field", ["api_base", "base_url", "n_discard", "worker_url", "trust_remote_code"])
def test_b18_fields_of_other_servers_are_told_of_and_do_nothing(door: Door, field: str) -> None:
    answer = door.post(CHAT, {**BASE[CHAT], "max_tokens": 1, field: "http://127.0.0.1:9/"})
    assert answer.status_code == 200
    assert any(field in warning for warning in answer.json()["warnings"])


MEDIA = ["http://127.0.0.1:{port}/x.png", "http://[::1]:{port}/", "https://a\\@127.0.0.1:{port}/", "file:///etc/passwd"]
MEDIA += ["ftp://127.0.0.1:{port}/", "http://169.254.169.254/latest", "data:image/png;base64,AAAA", "http://fc00::1/"]


def parts(url: str) -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_data": url}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "input_image", "image_url": url},
    ]


@pytest.mark.parametrize("url", MEDIA)
def test_b19_media_are_refused_and_nothing_is_fetched(door: Door, url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = url.replace("{port}", str(listener.getsockname()[1]))
        for part in parts(address):
            error = door.refusal(CHAT, {"messages": [{"role": "user", "content": [part]}]})
            assert error["param"].startswith("messages[0].content")
        # A link in plain text is text.
        shown = [{"role": "user", "content": f"![x]({address})"}]
        assert door.post(CHAT, {"messages": shown, "max_tokens": 1}).status_code == 200
        with pytest.raises(BlockingIOError):
            listener.accept()
