"""The model as the text side knows it, built from the card that a model worker publishes when it is ready."""

from collections.abc import Callable
from pathlib import Path

import gevent
import jinja2
import msgspec
from gevent.event import Event
from tokenizers import Tokenizer

from app.text.detokenizer import DetokenizerFactory
from app.text.errors import ContextLengthExceeded
from app.text.infill import find_infill_tokens
from app.text.offload import off_hub, off_hub_if_large
from app.text.reply.formats import ReplyFormat, reply_format
from app.text.scores import TokenNames
from app.text.template import ChatTemplate
from config import logs
from workers.messages import ModelCard, PoolStatus

log = logs.logger("tailrace.app")

# Every client of the demo knows the model under this name.
DEMO_NAME = "llama-3-chinese"


class Model:
    """Tokenizer, chat template and limits of the served model."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer) -> None:
        self.card = card
        self.tokenizer = tokenizer
        self.template = ChatTemplate(card.chat_template, card.special_tokens) if card.chat_template else None
        self.detokenizers = DetokenizerFactory(tokenizer)
        self.names = list(dict.fromkeys([card.id, *card.names, DEMO_NAME]))
        self.token_names = TokenNames(self.detokenizers)
        self.infill = find_infill_tokens(tokenizer)
        # How the model writes reasoning and calls: see `reply_format`.
        self.reply_format: ReplyFormat | None = None
        # The token before every text that is not a conversation, if the model wants one.
        self.bos = tokenizer.token_to_id(card.special_tokens.get("bos_token", "")) if card.add_bos_token else None
        # Every token stands for at most so many characters, hence a longer text cannot have few tokens.
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)

    @classmethod
    def load(cls, card_path: str) -> "Model":
        """Read the card and its tokenizer. Raises `OSError` or `ValueError` if one of them is damaged."""
        card = msgspec.json.decode(Path(card_path).read_bytes(), type=ModelCard)
        try:
            tokenizer = Tokenizer.from_file(card.tokenizer_path)
        except Exception as error:
            # The library raises bare Exception, for a missing file too.
            raise ValueError(f"{card.tokenizer_path}: {error}") from error
        # Padding and truncation are the training's business; here they would damage prompts.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        model = cls(card, tokenizer)
        # Now, and not while the first client waits.
        reply_format(model)
        return model

    def encode(self, text: str, *, add_bos: bool, param: str | None) -> list[int]:
        """Return the tokens of ``text``; special tokens written in it count as such.

        Raises `ContextLengthExceeded` if there are more than the model can read.
        """
        self.check_characters(len(text), param)
        ids = off_hub_if_large(len(text), self._encode, text, param)
        return [self.bos, *ids] if add_bos and self.bos is not None else ids

    def check_characters(self, characters: int, param: str | None) -> None:
        """Refuse what is too long however it is cut into tokens, before any work is spent on it.

        Raises `ContextLengthExceeded`.
        """
        least = characters // self._longest_token
        if least > self.card.max_model_len:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.card.max_model_len} tokens; "
                f"a prompt of {characters} characters has at least {least}.",
                param,
            )

    def _encode(self, text: str, param: str | None) -> list[int]:
        # The batch call releases the GIL, the single one does not; "fast" leaves out character offsets.
        encoding = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        # Making Python numbers of the tokens holds the GIL, hence the hub: not for a prompt that is refused anyway.
        if len(encoding) > self.card.max_model_len:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.card.max_model_len} tokens, "
                f"but the prompt has {len(encoding)} tokens.",
                param,
            )
        return encoding.ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``, special tokens included."""
        # The batch call releases the GIL, the single one does not.
        return off_hub_if_large(len(ids), lambda: self.tokenizer.decode_batch([ids], skip_special_tokens=False)[0])


class ModelHolder:
    """The current `Model`, kept in step with what the pool publishes.

    ``problem`` says why there is none although the pool has a card.
    """

    def __init__(self, load: Callable[[str], Model] = Model.load) -> None:
        self._load = load
        self._model: Model | None = None
        self._loaded: tuple[object, ...] | None = None
        self._wanted: tuple[object, ...] | None = None
        self._settled = Event()
        self._settled.set()
        self.problem: str | None = None

    def follow(self, status: PoolStatus | None) -> None:
        """Take note of the pool's state; reads a new card in the background. Never blocks."""
        if status is None:
            return
        signature = _signature(status.card_path) if status.card_path else None
        if signature is None:
            self._model, self._loaded, self._wanted = None, None, None
        elif signature not in (self._loaded, self._wanted):
            self._wanted = signature
            self._settled.clear()
            gevent.spawn(self._replace, str(status.card_path), signature)

    def current(self, patience: float = 0.0) -> Model | None:
        """Return the model, or None; while a card is being read, wait for it up to ``patience`` seconds."""
        if self._model is None and patience > 0:
            self._settled.wait(patience)
        return self._model

    def _replace(self, card_path: str, signature: tuple[object, ...]) -> None:
        model, problem = None, None
        try:
            model = off_hub(self._load, card_path)
        except (OSError, ValueError, jinja2.TemplateError) as error:
            problem = "the model's card cannot be read"
            log.error("the model card cannot be read", path=str(card_path), reason=str(error))
        if self._wanted == signature:
            self._model, self._loaded, self._wanted, self.problem = model, signature, None, problem
            self._settled.set()
            if model is not None:
                log.info("model taken", model=model.card.id, context_tokens=model.card.max_model_len)


def _signature(path: str) -> tuple[object, ...] | None:
    """What changes when the file is written anew; None if it is not there."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return path, found.st_mtime_ns, found.st_size, found.st_ino
