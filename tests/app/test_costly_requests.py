"""What a few bytes of a request could make the server do is bounded before it is begun."""

from typing import Any

import pytest
from flask.testing import FlaskClient

from app.api.schemas.messages import MAX_PARTS
from app.text import offload
from tests.app.test_request_checks import check_error
from tests.app.tool_models import CHAT

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def conversation(messages: int, calls: int = 0, parts: int = 0) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": "x"}] * parts or "x"
    own = {"tool_calls": [CALL] * calls} if calls else {}
    return [{"role": "user", "content": "x"}, *[{"role": "assistant", "content": content, **own}] * messages]


@pytest.mark.parametrize("kind", ["calls", "parts"])
def test_parts_and_calls_of_all_messages_together_have_a_limit(client: FlaskClient, kind: str) -> None:
    just_so = client.post(CHAT, json={"messages": conversation(MAX_PARTS // 128, **{kind: 128})})
    assert "together" not in check_error(just_so)["message"]  # it is too long for the model
    error = check_error(client.post(CHAT, json={"messages": conversation(MAX_PARTS // 128 + 1, **{kind: 128})}))
    assert (error["param"], "together" in error["message"]) == ("messages", True)


def test_arguments_of_many_calls_are_not_read_on_the_hub(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    original = offload.off_hub

    def noted(function: Any, *args: Any) -> Any:
        moved.append(function.__name__)
        return original(function, *args)

    monkeypatch.setattr(offload, "off_hub", noted)
    client.post("/tokenize", json={"messages": conversation(1, calls=64)})
    assert "_conversation" in moved
    moved.clear()
    assert client.post("/tokenize", json={"messages": conversation(1)}).status_code == 200
    assert "_conversation" not in moved
