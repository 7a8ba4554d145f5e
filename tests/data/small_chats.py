"""Conversations to encode, and short rewrites of how the chat templates of well-known models behave."""

from __future__ import annotations

from typing import Any

from mmit.records import Image, Text, Turn

IMG = None


def turns(*talk: tuple[str, Any]) -> list[Turn]:
    """turns(("user", [IMG, "What?"]), ("assistant", "A cat."))"""
    out = []
    for role, parts in talk:
        parts = parts if isinstance(parts, list) else [parts]
        out.append(Turn(role, tuple(Image("a.png") if p is IMG else Text(p) for p in parts)))
    return out


ONE = turns(("user", "What is it?"), ("assistant", "A cat."))
TALK = turns(
    ("system", "Be short."),
    ("user", [IMG, "What is it?"]),
    ("assistant", "A cat."),
    ("user", ["Grüße 😀 and", IMG, " here", IMG]),
    ("assistant", "Two 你好 cats"),
)
NO_SYSTEM = TALK[1:]

CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Smol.<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set sys = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set talk = messages[1:] %}{% else %}{% set sys = '' %}{% set talk = messages %}{% endif %}"
    "{% for m in talk %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (sys if loop.first else '') }}"
    "{{ m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '\n<|assistant|>' }}{% endif %}{% endfor %}"
)
PHI3 = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}{{ eos_token }}"
# Qwen 3: an empty block of thought before the last answer only; earlier thoughts are cut out of the content.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ (m['content'].split('</think>')[-1]).lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# SmolVLM: every content is a list of parts; no space before an image; one end of turn for all roles.
VLM_LIST = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# LLaVA on the Hub: the images of a turn first, a space after the answer, and no end token.
VLM_NO_END = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] | upper + ': ' }}{% endif %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Qwen-VL: takes a string or a list, and writes three control tokens for an image.
VLM_WRAPPED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}[INST]<image>[/INST]"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
