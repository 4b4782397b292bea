"""A language model behind an address that speaks OpenAI's chat completions: OpenAI, Ollama, vLLM, llama.cpp, …

By the `openai` client, an extra: it tries again with growing pauses, does as `Retry-After` says, and knows proxies and
which statuses can pass. Of our own that would be more code than all that is here.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .errors import RefusedError, UnansweredError
from .prompts import Message

if TYPE_CHECKING:
    import openai

ADDRESS, KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"  # of the environment: the client's own names
OPENAI = "https://api.openai.com/v1"
DEFAULT_MODEL = "gpt-4o-mini"  # of OpenAI itself: small, and sees pictures
INSTALL = "pip install 'cogvx_fast[enhance]'"
RETRIES = 2  # after the first try
_ANSWER, _CONNECT = 120.0, 10.0  # seconds: a model on a CPU is slow to answer, an address that is there is not
_NO_KEY = "-"  # for servers that want none; the client does not go without
_SECRET = 4  # characters from which on something can be one
_LINE = 300  # characters of what a server says


class Endpoint:
    """A model of a server. Making one connects to nothing."""

    sees = True  # it tells when it is asked

    def __init__(
        self, model: str | None = None, base_url: str | None = None, api_key: str | None = None, retries: int = RETRIES
    ) -> None:
        """
        Args:
            model: its name there; None: the only one that the server has, of OpenAI itself `DEFAULT_MODEL`.
            base_url: such as "http://localhost:11434/v1"; None: OPENAI_BASE_URL, else OpenAI's.
            api_key: None: OPENAI_API_KEY. Only OpenAI's address needs one.
            retries: tries after the first, on errors that can pass.

        Raises:
            RefusedError: for what cannot work: no key, no address, no client.
        """
        key = (os.environ.get(KEY, "") if api_key is None else api_key).strip()
        address = (os.environ.get(ADDRESS, "") if base_url is None else base_url).strip().rstrip("/") or OPENAI
        self._secrets = [key]
        self.address = self._checked(address)
        if not key and address == OPENAI:
            raise RefusedError(f"needs {KEY}, or {ADDRESS} with the address of another server")
        if not (key.isascii() and key.isprintable()):
            raise RefusedError(f"{KEY} holds a character that no key has")
        if importlib.util.find_spec("openai") is None:
            raise RefusedError(f"needs the openai client: {INSTALL}")
        self._url, self._key, self._retries = address, key or _NO_KEY, retries
        self._model = model or (DEFAULT_MODEL if address == OPENAI else None)
        self._client: openai.OpenAI | None = None

    def _checked(self, address: str) -> str:
        """An address without name and password, which are secrets, too."""
        try:
            parts = urlsplit(address)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or parts.scheme not in ("http", "https"):
            raise RefusedError(f"{ADDRESS} is no address; must be one such as http://localhost:11434/v1")
        self._secrets += [parts.username or "", parts.password or "", parts.query]
        return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{parts.path}"

    @property
    def model(self) -> str:
        """The model's name, which the server is asked for if none was given.

        Raises:
            RefusedError, UnansweredError: as `write`, and if the server has several.
        """
        if self._model is None:
            found = self._asked(lambda client: [model.id for model in client.models.list().data or []])
            if len(found) != 1:
                there = ", ".join(found[:8]) + (", …" if len(found) > 8 else "")
                raise RefusedError(f"{self.address} has {len(found)} models, name one{': ' + there if there else ''}")
            self._model = found[0]
        return self._model

    def write(self, messages: list[Message]) -> str:
        """What the model answers.

        Nothing but the messages is sent: limits of length and temperatures have other names, or are refused, from one
        server and model to the next.

        Raises:
            UnansweredError: after all tries: no connection, no answer in time, too many requests, a server's fault.
            RefusedError: for any other status, and for what is no chat completion.
        """
        model = self.model
        text = self._asked(
            lambda client: client.chat.completions.create(model=model, messages=messages).choices[0].message.content
        )
        return text if isinstance(text, str) else ""

    def _asked(self, question: Any) -> Any:
        import openai

        if self._client is None:
            self._client = openai.OpenAI(
                api_key=self._key,
                base_url=self._url,
                timeout=openai.Timeout(_ANSWER, connect=_CONNECT),
                max_retries=self._retries,
            )
        try:
            return question(self._client)
        except openai.APITimeoutError:
            raise UnansweredError(f"{self.address} does not answer in time") from None
        except openai.APIConnectionError as error:
            raise UnansweredError(self._without_secrets(f"{self.address} cannot be reached", error.__cause__)) from None
        except openai.APIStatusError as error:
            status = error.status_code
            can_pass = status in (408, 409, 429) or status >= 500
            says = self._without_secrets(f"{self.address} answers with status {status}", _said(error))
            raise (UnansweredError if can_pass else RefusedError)(says, status) from None
        except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError):
            raise RefusedError(f"{self.address} answers with something else than OpenAI's API") from None

    def _without_secrets(self, text: str, reason: object) -> str:
        """One line that can be shown: servers and libraries repeat what they were sent."""
        said = " ".join(str(reason or "").split())
        for secret in self._secrets:
            if len(secret) >= _SECRET:
                said = said.replace(secret, "***")
        return f"{text}: {said[:_LINE]}" if said else text


def _said(error: openai.APIStatusError) -> str:
    """What the server says of an error, without the JSON around it."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("error") or body.get("detail") or ""
        return body if isinstance(body, str) else str(body)
    return "" if body is None else str(body)
