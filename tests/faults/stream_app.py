"""A WSGI application without text: it streams token ids, so that a test sees exactly what came from the pool."""

import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs

from app.pool_client import PoolClient
from app.text.errors import JobFailed, PoolUnavailable
from config.settings import load
from workers.messages import Failed, GenerateJob, Output

_client = PoolClient(load().pool_socket)
_open: set["_Body"] = set()


class _Body:
    def __init__(self, job: GenerateJob) -> None:
        self.stream = _client.open_stream()
        self.stream.submit(job)
        _open.add(self)

    def __iter__(self) -> Iterator[bytes]:
        yield b"start\n"
        while True:
            try:
                events = self.stream.get()
            except JobFailed as error:
                yield f"error {error}\n".encode()
                return
            for event in events:
                if isinstance(event, Failed):
                    yield f"error {event.kind} {event.message}\n".encode()
                    return
                if isinstance(event, Output):
                    yield b"".join(b"%d\n" % token for token in event.ids)
                    if event.finish_reason:
                        yield b"end\n"
                        return

    def close(self) -> None:
        self.stream.close()
        _open.discard(self)


class Application:
    """GET /?prompt=0,1&max_tokens=9 streams; GET /pid tells the HTTP worker's pid."""

    stopping = False

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        _client.start()
        headers = [("Content-Type", "text/plain")]
        if environ["PATH_INFO"] == "/pid":
            pid = str(os.getpid()).encode()
            start_response("200 OK", [*headers, ("Content-Length", str(len(pid)))])
            return [pid]
        if self.stopping:
            start_response("503 Service Unavailable", [*headers, ("Content-Length", "8")])
            return [b"stopping"]
        query = parse_qs(environ["QUERY_STRING"])
        prompt = [int(each) for each in query["prompt"][0].split(",")]
        job = GenerateJob(id=uuid.uuid4().hex, prompt=prompt, max_tokens=int(query["max_tokens"][0]))
        status = _client.wait_status(5)
        try:
            if status is None or not status.ready:
                raise PoolUnavailable("not ready")
            body = _Body(job)
        except PoolUnavailable:
            start_response("503 Service Unavailable", [*headers, ("Content-Length", "0")])
            return [b""]
        start_response("200 OK", headers)
        return body

    def refuse_requests(self) -> None:
        """As the real application's."""
        self.stopping = True

    def end_streams(self) -> None:
        """As the real application's."""
        failure = Failed(id="", kind="unavailable", message="shutting down")
        for body in list(_open):
            body.stream.abort(JobFailed(failure))


application = Application()
