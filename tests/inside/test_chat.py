"""The model's own chat template, in a sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc.inside.chat import Template

pytestmark = pytest.mark.train
ASKED = [{"role": "user", "content": "안녕 <b>"}]


def test_the_file_the_settings_and_named_ones(tmp_path: Path) -> None:
    settings = {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "D{{ bos_token }}"}]}
    path = tmp_path / "tokenizer_config.json"
    assert not Template(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        Template(tmp_path).render(ASKED)
    path.write_text(json.dumps(settings))
    assert Template(tmp_path).render(ASKED) == "D<s>"
    path.write_text(json.dumps({**settings, "chat_template": "{% for m in messages %}\n{{ m.content }}\n{% endfor %}"}))
    assert Template(tmp_path).render(ASKED) == "안녕 <b>\n"
    (tmp_path / "chat_template.jinja").write_text("{{ messages | tojson }}{% if thinking %}T{% endif %}")
    assert Template(tmp_path).render(ASKED, {"thinking": True}) == '[{"role": "user", "content": "안녕 <b>"}]T'


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ nothing.at.all }}",
        "{{ 1 + messages[0].content }}",
    ],
)
def test_a_template_cannot_do_harm(tmp_path: Path, text: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(text)
    with pytest.raises(ValueError, match="chat template refuses"):
        Template(tmp_path).render(ASKED)


def test_who_asks_whether_there_are_tools_hears_none(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_text("{% if tools is not none %}{{ tools | tojson }}{% endif %}{{ documents is none }}")
    assert Template(tmp_path).render(ASKED) == "True"
    assert Template(tmp_path).render(ASKED, {"tools": ["x"]}) == '["x"]True'


def test_what_is_asked_for_beside_cannot_replace_the_messages(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }} {{ add_generation_prompt }} {{ self }}")
    extra = {"messages": [], "add_generation_prompt": False, "self": 1}
    assert Template(tmp_path).render(ASKED, extra).startswith("안녕 <b> True ")
