"""Adapters on the real model, through the real server: merged at start, or chosen by each request's model name."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.e2e.reference import Reference
from tests.e2e.server import Server

QUESTIONS = ["What is the capital of France?", "如何制作个人网站?", "List three fruits."]
TOKENS = 12


@pytest.fixture(scope="module")
def adapter(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with random weights, strong enough to change what the model says; the reference is left as it was."""
    directory = tmp_path_factory.mktemp("adapter")
    adapted: Any = get_peft_model(reference.model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(directory)
    adapted.unload()
    return directory


def answers(reference: Reference) -> list[str]:
    return [reference.answer(reference.prompt(text), TOKENS) for text in QUESTIONS]


def ask(server: Server, text: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "temperature": 0}
    response = server.http.post("/v1/chat/completions", json={**body, "repetition_penalty": 1.0})
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_an_adapter_and_the_base_answer_side_by_side_as_alone(reference: Reference, adapter: Path) -> None:
    plain = answers(reference)
    adapted = PeftModel.from_pretrained(reference.model, str(adapter))
    expected = answers(reference)
    adapted.unload()
    assert expected != plain
    server = Server("--dtype", "float32", "--lora_model", f"poet={adapter}")
    try:
        server.wait_ready()
        names = [m["id"] for m in server.http.get("/v1/models").json()["data"]]
        assert "poet" in names
        with ThreadPoolExecutor(6) as threads:
            jobs = [(m, threads.submit(ask, server, t, m)) for t in QUESTIONS for m in ("poet", "llama-3-chinese")]
            found = {m: [job.result() for name, job in jobs if name == m] for m in ("poet", "llama-3-chinese")}
        assert found == {"poet": expected, "llama-3-chinese": plain}
    finally:
        server.stop()
