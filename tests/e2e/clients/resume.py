"""A stream that survives a cut: each event has an id, and the last one seen is where the rest begins.

$ pip install httpx
$ OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none python resume.py

The connection is cut here on purpose, after a few events; cut by anything else, the same loop goes on in the same way.
"""

import json
import os
import time
from collections.abc import Iterator

import httpx

URL = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
HEADERS = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
TRIES = 20


def events(body: dict, cut_after: int = 0) -> Iterator[tuple[str, dict]]:
    """Yield id and data of each event, over as many connections as it takes."""
    last = ""
    tries = 0
    while tries < TRIES:
        try:
            headers = {**HEADERS, **({"Last-Event-ID": last} if last else {})}
            with httpx.stream("POST", URL, json=body, headers=headers, timeout=60) as answer:
                if answer.status_code in (429, 502, 503):
                    raise httpx.TransportError("the server is busy or on its way back")
                if answer.is_error:
                    raise SystemExit(answer.read().decode())
                number = ""
                for line in answer.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "id":
                        number = value
                    elif name == "data" and value == "[DONE]":
                        return
                    elif name == "data":
                        data = json.loads(value)
                        if "error" in data:
                            raise httpx.TransportError(data["error"]["message"])
                        last, tries = number, 0
                        yield number, data
                        cut_after -= 1
                        if cut_after == 0:
                            raise httpx.TransportError("cut on purpose")
            raise httpx.TransportError("the stream ended without [DONE]")
        except httpx.TransportError as error:
            tries += 1
            print(f"cut: {error}")
            time.sleep(min(0.1 * 2**tries, 5) if tries > 1 else 0)
    raise SystemExit("given up")


def main() -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"messages": [question], "temperature": 0, "max_tokens": 24, "stream": True, "resumable": True}
    texts, ids = [], []
    for number, chunk in events(body, cut_after=4):
        ids.append(number)
        texts += [choice["delta"].get("content") or "" for choice in chunk["choices"]]
    print("ids:", json.dumps(ids))
    print("stream:", "".join(texts))


if __name__ == "__main__":
    main()
