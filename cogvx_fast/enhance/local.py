"""A language model that runs here, by transformers: it is loaded when it is first asked, and gone when it is closed."""

from __future__ import annotations

import gc
import os
import re
from typing import Any

from .errors import RefusedError
from .prompts import Message

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MOST = 1024  # tokens of an answer; what thinks before it speaks needs more than the caption's 226


class LocalModel:
    """A causal language model with a chat template, in a folder or on the Hugging Face Hub.

    Weights are read from safetensors alone, and no code that a model brings is run. The answer is the likeliest one,
    so that the same prompt gives the same video.
    """

    sees = False

    def __init__(self, source: str, device: str = "cpu") -> None:
        """
        Args:
            source: a folder in transformers' format, or a Hub id. Nothing is read yet.
            device: where it runs, such as "cuda".

        Raises:
            RefusedError: for what is neither.
        """
        source = os.path.expanduser(source)
        if os.path.isdir(source):
            if not os.path.isfile(os.path.join(source, "config.json")):
                raise RefusedError("has no config.json; must be a model in transformers' format")
        elif os.path.exists(source):
            raise RefusedError("is a file; must be the folder of a model in transformers' format")
        elif not _HUB_ID.fullmatch(source):
            raise RefusedError("no such folder; must be a model in transformers' format or a Hub id (owner/name)")
        self.source, self.device = source, device
        self._loaded: tuple[Any, Any] | None = None

    def write(self, messages: list[Message]) -> str:
        """What the model answers to texts.

        Raises:
            RefusedError: if it cannot be loaded, has no chat template or not enough memory.
        """
        import torch

        try:
            tokenizer, model = self._load()
            asked = _templated(tokenizer, messages)
            tokens = tokenizer(asked, add_special_tokens=False, return_tensors="pt").to(model.device)
            with torch.inference_mode():
                made = model.generate(**tokens, max_new_tokens=_MOST, do_sample=False)
            return str(tokenizer.decode(made[0, tokens.input_ids.shape[1] :], skip_special_tokens=True))
        except RefusedError:
            raise
        except Exception as error:  # whatever a library dies of while it reads files, or runs what is in them
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise RefusedError(f"cannot be used ({reason})") from error

    def close(self) -> None:
        """Free what it takes; it is loaded again if it is asked again."""
        self._loaded = None
        gc.collect()  # modules hold each other

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            from cogvx_fast import machine

            tokenizer = AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)
            if not tokenizer.chat_template:
                raise RefusedError("has no chat template; must be a model that follows instructions")
            dtype: Any = getattr(torch, machine.cpu_dtype()) if self.device == "cpu" else "auto"
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.source, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
            self._loaded = tokenizer, model.to(self.device).eval()
        return self._loaded


def _templated(tokenizer: Any, messages: list[Message]) -> str:
    """A conversation as the model knows them; what the system says goes to the user where there is no such part."""
    from jinja2 import TemplateError

    # Templates that know the second argument leave out that the model thinks first; the others ignore it.
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    try:
        return str(tokenizer.apply_chat_template(messages, **options))
    except TemplateError:
        system, first, *rest = messages
        joined = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
        return str(tokenizer.apply_chat_template([joined, *rest], **options))
