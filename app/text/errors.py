"""What can go wrong with a request below HTTP; ``app.errors`` turns each of these into an answer."""

from workers.messages import Failed


class RequestError(Exception):
    """The request cannot be served as asked: ``param`` names the field, ``code`` is OpenAI's word for the case."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ContextLengthExceeded(RequestError):
    """The prompt, or the prompt with the answer asked for, does not fit into the model's context."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message, param, "context_length_exceeded")


class JobFailed(Exception):
    """The pool ended a job without an answer; ``param`` names the field of the request that is to blame, if one is."""

    def __init__(self, failure: Failed, param: str | None = None) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.param = param


class PoolUnavailable(Exception):
    """No pool can be reached, or it takes no jobs yet: the client may try again in ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float = 2.0) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class DeadlineExceeded(Exception):
    """The request's time was over: ``started`` tells whether a model worker had begun with it."""

    def __init__(self, started: bool) -> None:
        super().__init__("deadline exceeded")
        self.started = started


class ReaderTooSlow(Exception):
    """The client did not take its tokens for so long that the buffer for them is full."""


class ClientGone(Exception):
    """The client has left: nobody waits for the answer."""


class ShuttingDown(Exception):
    """This server is stopping, and the time given to running requests is over."""
