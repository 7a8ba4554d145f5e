"""Chat formats as Jinja templates for a transformers processor, whose messages hold lists of parts.

Goes in: a ChatFormat. Comes out: the text of a template that renders a conversation as the format writes it, with an
image token for each image. That ids agree is checked where a template is used, not assumed here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mmit.data.chat_builtin import BUILT_IN, VICUNA_SYSTEM
from mmit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mmit.data.chat import ChatFormat

# A content, list of parts or string, as one string.
FLAT = (
    "{%- macro flat(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{{ IMAGE if part['type'] == 'image' else part['text'] }}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
# The same in two halves: the images that open a content, and the rest.
HALVES = (
    "{%- macro half(content, first) -%}{%- set at = namespace(open=true) -%}"
    "{%- for part in ([{'type': 'text', 'text': content}] if content is string else content) -%}"
    "{%- if part['type'] != 'image' -%}{%- set at.open = false -%}{%- endif -%}"
    "{%- if at.open == first -%}{{ IMAGE if part['type'] == 'image' else part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endmacro -%}"
)
# The same for llama.cpp, which gives a content as one string, its images as marks such as <__media__>. Of a text that
# begins like a mark, the second "<" tells that the mark at its end is another's.
MARKED = (
    "{%- macro half(content, first) -%}{%- set at = namespace(open=true) -%}"
    "{%- for piece in content.split('__>') -%}"
    "{%- set mark = piece.startswith('<__media') and piece.split('<') | length == 2 and not loop.last -%}"
    "{%- if not mark -%}{%- set at.open = false -%}{%- endif -%}"
    "{%- if at.open == first -%}{{ piece + ('' if loop.last else '__>') }}{%- endif -%}"
    "{%- endfor -%}{%- endmacro -%}"
)
# A template for string contents is given strings.
AS_STRINGS = (
    "{%- set given = namespace(messages=[]) -%}{%- for m in messages -%}"
    "{%- set given.messages = given.messages + [dict(m, content=flat(m['content']))] -%}{%- endfor -%}"
    "{%- set messages = given.messages -%}"
)
VICUNA = (
    "{{ BOS }}{%- if messages[0]['role'] != 'system' -%}{{ SYSTEM + ' ' }}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{{ flat(m['content']) + ' ' }}"
    "{%- elif m['role'] == 'user' -%}"
    "{%- set images = half(m['content'], true) -%}{%- set rest = half(m['content'], false) -%}"
    "{{ 'USER: ' + images + ('\\n' if images and rest and not rest.startswith('\\n') else '') + rest + ' ASSISTANT:' }}"
    "{%- else -%}{{ ' ' + flat(m['content']) + END }}{%- endif -%}{%- endfor -%}"
)
QA = (
    "{{ BOS }}{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{{ flat(m['content']) + '\\n' }}"
    "{%- elif m['role'] == 'user' -%}{%- set rest = half(m['content'], false) -%}"
    "{{ half(m['content'], true) + ('Question: ' + rest + '\\n' if rest else '') + 'Answer:' }}"
    "{%- else -%}{{ ' ' + flat(m['content']) + END }}{%- endif -%}{%- endfor -%}"
)
CHATML = (
    "{{ BOS }}{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' + flat(m['content']) + END + '\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
PLAIN = (
    "{{ BOS }}{%- for m in messages -%}{{ flat(m['content']) + ('' if m['role'] == 'user' else END) }}{%- endfor -%}"
)
TEMPLATES = {"vicuna_v1": VICUNA, "qa": QA, "chatml": CHATML, "plain": PLAIN}


def processor_template(chat: ChatFormat, *, bos: str, image_token: str, marked: bool = False) -> tuple[str, str]:
    """Return (template, image token) for a processor.

    Args:
        chat: the format to render.
        bos: text that the tokenizer puts in front of every text by itself, "" for none.
        image_token: the text for one image, where the format does not bring its own.
        marked: for llama.cpp, whose contents are strings in which its own marks stand for images.

    Raises:
        ConfigError: there is no template for this format.
    """
    told = chat.to_json()
    if "template" not in told:
        if chat.name not in TEMPLATES:
            raise ConfigError(f"no Jinja template for chat format '{chat.name}'", remedy=nearest(chat.name, BUILT_IN))
        constants = {"IMAGE": image_token, "BOS": bos, "END": chat.end, "SYSTEM": VICUNA_SYSTEM}
        return _set(constants) + FLAT + (MARKED if marked else HALVES) + TEMPLATES[chat.name], image_token
    args = _set(told.get("template_args") or {})
    if told.get("image_token"):
        return args + told["template"], told["image_token"]
    return _set({"IMAGE": image_token}) + args + FLAT + AS_STRINGS + told["template"], image_token


def _set(values: dict[str, Any]) -> str:
    """Jinja that sets variables; JSON is Jinja but for `null`."""
    return "".join(
        f"{{%- set {name} = {'none' if value is None else json.dumps(value)} -%}}" for name, value in values.items()
    )
