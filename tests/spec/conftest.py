"""The application with a scripted pool that answers every job at once, and what its own description says of it."""

import array
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from flask import Flask

from app import create_app
from app.api.reference.openapi import document
from config.settings import Settings
from tests.app.conftest import application, runtime_directory
from tests.app.scripted_pool import ScriptedPool, eventually, scored, vectors
from tests.app.tiny import IM_END, ids_of, write_card
from workers.messages import EmbedJob, Event, Job


def answer_at_once(job: Job) -> Iterable[Event]:
    """Answer any job as an engine would that knows one sentence."""
    if isinstance(job, EmbedJob):
        events = vectors(lambda _: array.array("f", [0.5, -0.5] * 4).tobytes())(job)
    else:
        events = scored(ids_of("Hello, world!"), stop=IM_END, per_event=2)(job)
    assert events is not None
    return events


@cache
def description() -> dict[str, Any]:
    """The OpenAPI document of the application without keys."""
    with runtime_directory() as folder:
        settings = Settings(base_model="tiny", runtime_dir=folder, state_dir=folder)
        app = create_app(settings)
        try:
            return document(app, settings)
        finally:
            app.extensions["tailrace"].pool.close()


@cache
def validator(reference: str) -> Any:
    """A validator for the schema at a JSON pointer into the document."""
    return jsonschema_rs.validator_for(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": reference, **_with_components()}
    )


def validator_of(schema: dict[str, Any]) -> Any:
    """A validator for a schema that refers to the document."""
    return jsonschema_rs.validator_for(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, **_with_components()}
    )


def _with_components() -> dict[str, Any]:
    return {"components": description()["components"]}


@pytest.fixture(scope="session")
def world() -> Iterator[Flask]:
    """The application, ready to answer."""
    with runtime_directory() as folder:
        state = folder / "state"
        pool = ScriptedPool(folder / "pool.sock", write_card(folder)).start()
        pool.reply = answer_at_once
        with application(folder, state_dir=state) as app:
            client = app.test_client()
            eventually(lambda: client.get("/readyz").status_code == 200)
            yield app
        pool.stop()
        shutil.rmtree(Path(state), ignore_errors=True)
