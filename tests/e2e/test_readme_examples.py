"""The README's examples, as they stand there, against the running server; sampled texts are not compared."""

import json
import subprocess
import sys

import pytest

from config.sources import ROOT
from tests.e2e.server import Server
from tests.readme import examples

EXAMPLES = examples(ROOT / "README.md")


def run(server: Server, language: str, text: str) -> str:
    text = text.replace("localhost:19327", f"127.0.0.1:{server.port}")
    # The text stays the README's, only shorter: its shape is what is looked at.
    if "/completions" in text and "max_tokens" not in text:
        text = text.replace("-d '{", '-d \'{"max_tokens": 12,')
    command = ["sh", "-c", text.replace("curl ", "curl -sS --fail-with-body ", 1)]
    done = subprocess.run(
        command if language == "sh" else [sys.executable, "-c", text],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("language", "text"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_works_as_printed(server, language, text):
    shown = run(server, language, text)
    if language == "python":
        assert "Paris" in shown
    elif '"stream": true' in text:
        events = [line.removeprefix("data: ") for line in shown.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["usage"]["completion_tokens"] > 0
    elif "/embeddings" in text:
        assert len(json.loads(shown)["data"][0]["embedding"]) == 576
    else:
        (choice,) = json.loads(shown)["choices"]
        assert choice["message"]["content"] if "/chat/" in text else choice["text"]
