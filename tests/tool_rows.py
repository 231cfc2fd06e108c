"""Rows with tools, and templates that render them, written for these tests."""

from __future__ import annotations

from typing import Any

OWN = """\
{%- if tools %}<|im_start|>tools{% for t in tools %} {{ t.function.name }}:{{ t.function.parameters | tojson }}\
{% endfor %}<|im_end|>
{% endif -%}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}@{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}\
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""

# In the manner of Hermes 2 Pro and Qwen 2.5: tools in the system message, calls as tagged JSON, outputs of tools one
# after the other in one turn of the user.
HERMES = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'You may call these functions:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\nWrite a call as <tool_call>{"name": …, "arguments": …}</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# In the manner of Llama 3.1: what a tool says is written as a JSON string.
AS_JSON = OWN.replace(
    "{{ m.content }}", "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Rain or no rain.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK = {"role": "user", "content": "Does it rain in Oslo and Rome?"}


def call(city: Any, name: str = "weather") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {"city": city}}}


ROW: dict[str, Any] = {
    "tools": [WEATHER],
    "messages": [
        {"role": "system", "content": "Be brief."},
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call("Oslo"), call("Rome")]},
        {"role": "tool", "name": "weather", "content": "rain"},
        {"role": "tool", "name": "weather", "content": "no rain"},
        {"role": "assistant", "content": "In Oslo alone. I look again.", "tool_calls": [call("Oslo")]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "At your service."},
    ],
}
