"""Messages -> the text that the model was trained to continue, by its own chat template."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Template:
    """The chat template of a tokenizer's folder, in a sandbox: it came with the model.

    `text`: another one in its place; `tokens`: special tokens where the folder names none, or is None.
    """

    def __init__(self, folder: Path | None, *, text: str = "", tokens: Mapping[str, str] | None = None) -> None:
        path = folder / "tokenizer_config.json" if folder is not None else None
        settings = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
        self._tokens = {
            name: _token(settings.get(name)) or (tokens or {}).get(name, "")
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        text = text or (_text(folder, settings) if folder is not None else "")
        self._template = _environment().from_string(text) if text else None

    def __bool__(self) -> bool:
        """Whether the model has one."""
        return self._template is not None

    @property
    def begin(self) -> str:
        """The token that a text begins with, or ""."""
        return self._tokens["bos_token"]

    def render(
        self, messages: Sequence[Mapping[str, str]], extra: Mapping[str, Any] | None = None, *, prompt: bool = True
    ) -> str:
        """The text, and with `prompt` how an answer begins; ValueError where the template refuses the messages."""
        if self._template is None:
            raise ValueError("this model has no chat template: use /v1/completions")
        words = {
            "tools": None, "documents": None,  # as transformers has them: there are templates that ask for none
            **self._tokens, **(extra or {}), "messages": messages, "add_generation_prompt": prompt,
        }  # fmt: skip
        try:
            text: str = self._template.render(words)
        except Exception as failed:  # it is the model's own program, and works on what is asked
            raise ValueError(f"the model's chat template refuses this: {failed}") from failed
        return text


def _text(folder: Path, settings: Mapping[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = settings.get("chat_template") or ""
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default", "")
    return str(found)


def _token(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _environment() -> Any:
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):  # type: ignore[misc]
        """{% generation %} marks answers in some templates, for training; it writes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = time.strftime
    return environment
