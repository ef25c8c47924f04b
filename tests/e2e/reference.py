"""The same weights run by transformers alone: what the server's answers are compared with."""

from pathlib import Path
from typing import Any

import torch
import transformers

from config.settings import embedded_model


class Reference:
    """The embedded model in float32, asked one prompt at a time."""

    def __init__(self) -> None:
        path = Path(embedded_model())
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        self.model.eval()

    def prompt(self, text: str) -> list[int]:
        """The tokens of a conversation of one question."""
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        return list(ids)

    def answer(self, ids: list[int], max_tokens: int, **options: Any) -> str:
        """The text that ``generate`` continues the prompt with, without sampling."""
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            output = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_tokens,
                pad_token_id=0, **options,
            )  # fmt: skip
        return str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

    def embedding(self, text: str) -> torch.Tensor:
        """Mean of the last hidden states, normalised: ``[hidden]``."""
        ids = torch.tensor([self.tokenizer(text).input_ids])
        with torch.inference_mode():
            hidden = self.model(ids, output_hidden_states=True).hidden_states[-1]
        return torch.nn.functional.normalize(hidden[0].mean(dim=0), dim=0)
