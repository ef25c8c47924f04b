"""What can go wrong in the engine, as one small family."""


class EngineError(Exception):
    """Base of the engine's own errors."""


class LoadError(EngineError):
    """The model cannot be loaded or served as configured; the message is one line for the operator."""


class StickyDeviceError(EngineError):
    """The device's context is lost (a CUDA assert, an illegal access): only a new process can go on."""


class OutOfMemory(EngineError):
    """The device, or the machine, has not enough memory for what was tried."""


class UnsupportedAttention(EngineError):
    """The model asks for something of its attention that this engine does not compute."""


class GrammarError(EngineError):
    """A grammar cannot be used; the message is for the client. ``line`` (from 1) of its source, where that is known."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


class OutOfBlocks(EngineError):
    """No free block of the KV cache is left; somebody must be preempted."""


class NoNativeStep(Exception):
    """The C step cannot be used for this model or on this machine; the text says why."""
