"""Chat completions through the application in this process, with a scripted pool behind it."""

from flask.testing import FlaskClient

from tests.app.scripted_pool import ScriptedPool, tokens
from tests.app.tiny import IM_END, ids_of

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def test_answers_in_the_shape_of_openai(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens(ids_of("你好，world 😀!"), stop=IM_END)

    response = client.post("/v1/chat/completions", json=HELLO)

    assert response.status_code == 200, response.text
    answer = response.get_json()
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "你好，world 😀!"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
