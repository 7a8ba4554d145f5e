"""Chat templates in the shape of public families, each written anew and as short as what it stands for allows.

What they have between them: strings and lists of parts, trimmed contents, system turns folded into users' or refused,
alternating roles, defaults, ends for every turn or for the last, role tokens, thoughts in fields, in parts and in the
text (kept, cut from earlier answers, cut from all), tools as JSON in the system turn or apart, calls as JSON, with ids
or as text, tool results as turns of their own or inside users' turns, dates, macros, namespaces, slices, {% generation %}.
"""
# ruff: noqa: E501

from __future__ import annotations

LOOP, END = "{% for m in messages %}", "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}"


def chatml(
    body: str = "{{ m['content'] }}", *, head: str = "", start: str = "<|im_start|>", end: str = "<|im_end|>"
) -> str:
    """ChatML, with what a turn says and what goes before the first turn."""
    return (
        f"{head}{LOOP}{{{{ '{start}' + m['role'] + '\\n' }}}}{body}{{{{ '{end}\\n' }}}}{END}"
        f"{PROMPT}{{{{ '{start}assistant\\n' }}}}{{% endif %}}"
    )


def headed(
    open_: str, close: str, end: str, *, content: str = "m['content'] | trim", bos: str = "{{ bos_token }}"
) -> str:
    """Llama 3 and relatives: the role between two marks, an end after each turn."""
    return (
        f"{bos}{LOOP}{{{{ '{open_}' + m['role'] + '{close}' + ({content}) + '{end}' }}}}{END}"
        f"{PROMPT}{{{{ '{open_}assistant{close}' }}}}{{% endif %}}"
    )


def named(system: str, user: str, assistant: str, *, end: str = "", tail: str = "", bos: str = "") -> str:
    """One line of text for each role: Vicuna, Alpaca, Falcon, Phi 2 and the like."""
    return (
        f"{bos}{LOOP}{{% if m['role'] == 'system' %}}{{{{ {system} }}}}{{% elif m['role'] == 'user' %}}{{{{ {user} }}}}"
        f"{{% else %}}{{{{ {assistant} + {end or chr(39) * 2} }}}}{{% endif %}}{END}{tail}"
    )


# The last question that no tool's result is, as Qwen3 finds it: from the end.
LAST_QUERY = (
    "{% set ns = namespace(last=messages | length - 1, open=true) %}{% for message in messages[::-1] %}"
    "{% set index = (messages | length - 1) - loop.index0 %}"
    "{% if ns.open and message.role == 'user' %}{% set ns.open = false %}{% set ns.last = index %}{% endif %}{% endfor %}"
)
SPLIT_THOUGHT = (
    "{% set said = m.content if m.content is string else '' %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in said %}{% set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)
CALLS = (
    "{% if m.tool_calls %}{% for call in m.tool_calls %}{% if (loop.first and said) or not loop.first %}{{ '\\n' }}{% endif %}"
    "{% if call.function %}{% set call = call.function %}{% endif %}"
    '{{ \'<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{{ call.arguments if call.arguments is string else call.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{% endif %}"
)
TOOLS_IN_SYSTEM = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}"
    "{% endif %}{{ '# Tools\\n<tools>' }}{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '\\n</tools><|im_end|>\\n' }}{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}"
)
TOOL_AS_USER = (
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}"
    "{% endif %}{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
)


def qwen3(block: str, *, tools: bool = True, prompt: str = "", before: str = LAST_QUERY) -> str:
    """Qwen3: `block` writes thought and answer."""
    return (
        f"{TOOLS_IN_SYSTEM if tools else ''}{before}{LOOP}"
        "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{% elif m.role == 'assistant' %}"
        + SPLIT_THOUGHT
        + "{{ '<|im_start|>assistant\\n' }}"
        + block
        + (CALLS if tools else "")
        + "{{ '<|im_end|>\\n' }}"
        + (TOOL_AS_USER if tools else "")
        + "{% endif %}{% endfor %}"
        + f"{PROMPT}{{{{ '<|im_start|>assistant\\n' }}}}{prompt}{{% endif %}}"
    )


NO_THINKING = (
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
THOUGHT = "{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}"
PARTS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
ALTERNATE = (
    "{% for m in messages %}{% if m['role'] != 'system' and (m['role'] == 'user') != ((loop.index0 - (1 if messages[0]['role'] "
    "== 'system' else 0)) % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)
SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}{% set talk = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set talk = messages %}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
MISTRAL_TOOLS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{% if tools and loop.index0 == (messages | length) - 1 or tools and loop.index0 == 0 %}"
    "{{ '[AVAILABLE_TOOLS]' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{% if m.tool_calls %}{{ m.content + '[TOOL_CALLS][' }}{% for call in m.tool_calls %}"
    "{{ call.function | tojson }}{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' }}{% else %}{{ m.content }}"
    "{% endif %}{{ eos_token }}{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}"
    + SYSTEM_FIRST
    + "{{ first }}{% for m in talk %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{% set said = m.content %}{% if '</think>' in said %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|Assistant|>' + said + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
GLM = (
    "{{ '[gMASK]<sop>' }}{% if tools %}{{ '<|system|>\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}"
    + SPLIT_THOUGHT
    + "{{ '<|assistant|>\\n' }}"
    "{% if thought %}{{ '<think>' + thought.strip() + '</think>\\n' }}{% endif %}{{ said.strip() }}"
    "{% for call in m.tool_calls or [] %}{{ '\\n<tool_call>' + call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}{{ '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' }}"
    "{{ value if value is string else value | tojson }}{{ '</arg_value>' }}{% endfor %}{{ '\\n</tool_call>' }}{% endfor %}"
    "{% elif m.role == 'tool' %}{{ '<|observation|>\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% else %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GPT_OSS = (
    "{{ '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{% if tools %}{{ '<|start|>developer<|message|># Tools\\n' }}{% for tool in tools %}{{ 'type ' + tool.function.name + ' = ' }}"
    "{{ tool.function.parameters | tojson }}{{ '\\n' }}{% endfor %}{{ '<|end|>' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% if m.tool_calls %}{% if m.content and m.thinking %}"
    "{{ raise_exception('content and thinking beside tool calls') }}{% endif %}{% if m.thinking %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}{% set call = m.tool_calls[0].function %}"
    "{{ '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}{{ call.arguments | tojson }}{{ '<|call|>' }}"
    "{% else %}{% if m.thinking and loop.last %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}{% endif %}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions<|channel|>commentary<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + ('developer' if m.role == 'system' else m.role) + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MAGISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'thinking' %}{{ '[THINK]' + part.thinking + '[/THINK]' }}{% elif part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ eos_token }}{% elif m.role == 'user' %}{{ '[INST]' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ '[IMG]' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}{{ '[/INST]' }}{% else %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% endif %}{% endfor %}"
)
LLAMA31 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "{% endif %}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{{ 'Today Date: ' + date_string + '\n\n' }}"
    "{% if tools %}{{ tools | tojson(indent=4) }}{{ '\n\n' }}{% endif %}"
    "{{ first }}{{ '<|eot_id|>' }}{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}{% set call = m.tool_calls[0].function %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{{ m.content if m.content is string else m.content | tojson }}{{ '<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LISTS = LOOP + "{{ '<|im_start|>' + m.role + '\n' }}" + PARTS + "{{ '<|im_end|>\n' }}" + END

FAMILIES: dict[str, str] = {
    "chatml": chatml(),
    "chatml, default system": chatml(
        head="{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    ),
    "chatml, trimmed": chatml("{{ m['content'] | trim }}"),
    "chatml, generation": chatml(
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    ),
    "chatml, bos": chatml(head="{{ bos_token }}"),
    "chatml, eos last": chatml() + "{{ eos_token }}",
    "chatml, no end": LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}" + END,
    "chatml, no end, space": LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + ' ' }}" + END,
    "chatml, eos as end": chatml(end="<|eos|>"),
    "chatml, macro": "{% macro turn(role, text) %}{{ '<|im_start|>' + role + '\n' + text + '<|im_end|>\n' }}{% endmacro %}"
    + LOOP
    + "{{ turn(m.role, m.content) }}"
    + END,
    "chatml, tools": TOOLS_IN_SYSTEM
    + LOOP
    + "{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}{% set said = m.content %}{{ '<|im_start|>assistant\n' + said }}"
    + CALLS
    + "{{ '<|im_end|>\n' }}"
    + TOOL_AS_USER
    + "{% endif %}{% endfor %}"
    + PROMPT
    + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml, lists or strings": LISTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    "chatml, one image token": LISTS.replace("IMAGE", "<image>"),
    "qwen3": qwen3(
        "{% if loop.index0 > ns.last %}{% if loop.last or thought %}"
        + THOUGHT
        + "{% else %}{{ said }}{% endif %}{% else %}{{ said }}{% endif %}",
        prompt=NO_THINKING,
    ),
    "qwen3, without tools": qwen3(
        "{% if loop.index0 > ns.last and (loop.last or thought) %}" + THOUGHT + "{% else %}{{ said }}{% endif %}",
        tools=False,
        prompt=NO_THINKING,
    ),
    "qwen3, no empty block": qwen3(
        "{% if loop.index0 > ns.last and thought %}" + THOUGHT + "{% else %}{{ said }}{% endif %}"
    ),
    "qwen3, all kept": qwen3("{% if thought %}" + THOUGHT + "{% else %}{{ said }}{% endif %}"),
    "qwen3, thinking prompt": qwen3(
        "{% if loop.index0 > ns.last %}" + THOUGHT + "{% else %}{{ said }}{% endif %}", prompt="{{ '<think>\\n' }}"
    ),
    "thoughts in text, kept last": qwen3(
        "{% if loop.last %}" + THOUGHT + "{% else %}{{ said }}{% endif %}", tools=False, before=""
    ),
    "thoughts cut everywhere": chatml(
        "{% if m['role'] == 'assistant' and '</think>' in m['content'] %}{{ m['content'].split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m['content'] }}{% endif %}"
    ),
    "thinking field": chatml(
        "{% if m.thinking %}{{ '<think>' + m.thinking + '</think>' }}{% endif %}{{ m['content'] }}"
    ),
    "reasoning field": chatml(
        "{% if m.reasoning %}{{ '<think>' + m.reasoning + '</think>' }}{% endif %}{{ m['content'] }}"
    ),
    "deepseek r1": DEEPSEEK,
    "deepseek v3": DEEPSEEK.replace("<think>\\n", ""),
    "glm 4.5": GLM,
    "glm 4": "{{ '[gMASK]<sop>' }}"
    + LOOP
    + "{{ '<|' + m.role + '|>\n' + m.content }}"
    + END
    + PROMPT
    + "{{ '<|assistant|>' }}{% endif %}",
    "gpt-oss": GPT_OSS,
    "magistral": MAGISTRAL,
    "mistral tools": MISTRAL_TOOLS,
    "mistral": "{{ bos_token }}"
    + SYSTEM_FIRST
    + "{% for m in talk %}{% if m.role == 'user' %}{{ '[INST] ' + (first + '\n\n' if first and loop.first else '') + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "mistral v3": "{{ bos_token }}"
    + SYSTEM_FIRST
    + "{% for m in talk %}{% if m.role == 'user' %}{{ '[INST] ' + (first + '\n\n' if first and loop.last else '') + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "llama 2": ALTERNATE
    + SYSTEM_FIRST
    + "{% for m in talk %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + ('<<SYS>>\n' + first + '\n<</SYS>>\n\n' if first and loop.first else '') + m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama 3": headed("<|start_header_id|>", "<|end_header_id|>\\n\\n", "<|eot_id|>"),
    "llama 3.2": LLAMA31,
    "llama 3.1": LLAMA31.replace(
        "strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024'", "'26 Jul 2024'"
    ),
    "granite": "{% if messages[0].role != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>Today is ' + strftime_now('%B %d, %Y') + '.<|end_of_text|>\n' }}{% endif %}"
    + headed("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>\\n", content="m['content']", bos=""),
    "gemma": "{{ bos_token }}"
    + NO_SYSTEM
    + LOOP
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    + END
    + PROMPT
    + "{{ '<start_of_turn>model\n' }}{% endif %}",
    "gemma 3": "{{ bos_token }}"
    + SYSTEM_FIRST
    + "{% for m in talk %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first + '\n\n' if loop.first and first else '') }}{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text | trim }}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}",
    "zephyr": LOOP
    + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    + END
    + PROMPT
    + "{{ '\n<|assistant|>' }}{% endif %}",
    "phi 2": named("m['content'] + '\n'", "'Instruct: ' + m['content'] + '\nOutput:'", "' ' + m['content'] + '\n'"),
    "phi 3": LOOP + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}" + END + "{{ eos_token }}",
    "phi 4": LOOP
    + "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}"
    + END
    + PROMPT
    + "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    "vicuna": named(
        "m['content'] + ' '",
        "'USER: ' + m['content'] + ' '",
        "'ASSISTANT: ' + m['content']",
        end="eos_token",
        bos="{{ bos_token }}",
    ),
    "vicuna, no end": named(
        "m['content'] + ' '", "'USER: ' + m['content'] + ' '", "'ASSISTANT: ' + m['content'] + ' '"
    ),
    "alpaca": named(
        "m['content'] + '\n\n'",
        "'### Instruction:\n' + m['content'] + '\n\n'",
        "'### Response:\n' + m['content'] + '\n\n'",
        tail="{{ eos_token }}",
    ),
    "falcon": named(
        "'System: ' + m['content'] + '\n'", "'User: ' + m['content'] + '\n'", "'Falcon: ' + m['content'] + '\n'"
    ),
    "openchat": named(
        "'GPT4 Correct System: ' + m['content'] + '<|end|>'",
        "'GPT4 Correct User: ' + m['content'] + '<|end|>'",
        "'GPT4 Correct Assistant: ' + m['content']",
        end="'<|end|>'",
    ),
    "yi": chatml(
        head="{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    ),
    "internlm": "{{ bos_token }}" + chatml(),
    "baichuan": named("m['content']", "'<|User|>' + m['content']", "'<|Assistant|>' + m['content']"),
    "command r": headed(
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        content="m['content'] if m['role'] == 'user' else m['content'].strip()",
    ),
    "olmo": "{{ bos_token }}"
    + named(
        "'<|system|>\n' + m['content'] + '\n'",
        "'<|user|>\n' + m['content'] + '\n'",
        "'<|assistant|>\n' + m['content']",
        end="(eos_token if loop.last else eos_token + '\n')",
    ),
    "tulu": named(
        "'<|system|>\n' + m['content'] + '\n'",
        "'<|user|>\n' + m['content'] + '\n'",
        "'<|assistant|>\n' + m['content'] + eos_token",
        end="('' if loop.last else '\n')",
    ),
    "solar": named(
        "'### System:\n' + m['content'] + '\n\n'",
        "'### User:\n' + m['content'] + '\n\n'",
        "'### Assistant:\n' + m['content'] + '\n\n'",
    ),
    "starchat": named(
        "'<|system|>\n' + m['content'] + '<|end|>\n'",
        "'<|user|>\n' + m['content'] + '<|end|>\n'",
        "'<|assistant|>\n' + m['content']",
        end="'<|end|>\n'",
    ),
    "minicpm": named(
        "m['content']", "'<user>' + m['content'].strip() + '<AI>'", "m['content'].strip()", end="eos_token"
    ),
    "smolvlm": "{{ '<|im_start|>' }}"
    + LOOP
    + "{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for part in m['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    + END
    + PROMPT
    + "{{ 'Assistant:' }}{% endif %}",
    "llava": LOOP
    + "{% if m['role'] != 'system' %}{{ m['role'] | upper + ': ' }}{% endif %}{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    + END,
    "idefics": "{{ bos_token }}"
    + LOOP
    + "{{ m['role'] | capitalize + ':' }}{% for part in m['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{{ '<|end|>\n' }}"
    + END,
    "qwen2-vl": LISTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace(
        "{{ '<|im_end|>\n' }}", "{{ '<|im_end|>\n' }}"
    )
    + PROMPT
    + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "paligemma": "{{ bos_token }}"
    + NO_SYSTEM
    + LOOP
    + "{% if m.role == 'user' %}"
    + PARTS.replace("IMAGE", "<image>")
    + "{{ '\n' }}{% else %}"
    + PARTS.replace("IMAGE", "<image>")
    + "{{ eos_token }}{% endif %}"
    + END,
    "lfm": "{{ bos_token }}"
    + chatml(
        "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}"
    ),
    "nemotron": headed(
        "<|im_start|>",
        "\\n",
        "<|im_end|>\\n",
        content="m['content'].split('</think>')[-1].lstrip() if m['role'] == 'assistant' and not loop.last else m['content']",
        bos="",
    ),
    "hermes": "{{ bos_token }}"
    + chatml(
        "{% if m.role == 'tool' %}{{ '<tool_response>\n' + m.content + '\n</tool_response>' }}{% else %}{% set said = m.content %}{{ said }}"
        + CALLS
        + "{% endif %}",
        head="{% if tools %}{{ '<|im_start|>system\n' }}{{ tools | tojson }}{{ '<|im_end|>\n' }}{% endif %}",
    ),
    "calls as joined text": chatml(
        "{% set said = m.content %}{{ said }}{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name + '(' + call.function.arguments + ')' }}{% endfor %}",
        head="{{ tools | tojson if tools else '' }}",
    ),
    "tool pictures": LOOP
    + "{{ '<|im_start|>' + m.role + '\n' }}"
    + PARTS.replace("IMAGE", "<image>").replace("m['content'] is string", "m.content is string")
    + "{% set said = m.content if m.content is string else '' %}"
    + CALLS
    + "{{ '<|im_end|>\n' }}"
    + END,
}
