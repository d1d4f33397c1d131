"""Chat templates in the styles of published models, reduced to their handling of content and tool calls."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' + system + '<|eot_id|>' }}"
    "{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}"
    "{%- for message in messages %}{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in "
    "message) %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' "
    "}}"
    "{%- elif 'tool_calls' in message %}{%- if not message.tool_calls | length == 1 %}"
    "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}"
    "{%- set tool_call = message.tool_calls[0].function %}"
    '{{- \'{"name": "\' + tool_call.name + \'", "parameters": \' }}{{- tool_call.arguments | tojson }}{{- '
    "'}<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}"
    "{%- else %}{{- message.content }}{%- endif %}{{- '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
"""In the style of Llama 3.1, with tools; the original also applies `tojson` to the text of a tool."""
QWEN = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- "
    "endif %}"
    "{%- for message in messages %}{%- if message.content is string %}{%- set content = message.content %}"
    "{%- else %}{%- set content = '' %}{%- endif %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set reasoning = '' %}{%- if message.reasoning_content is string %}"
    "{%- set reasoning = message.reasoning_content %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}{%- if reasoning and enable_thinking is not false %}{{- '<think>' + reasoning + "
    "'</think>' }}"
    "{%- endif %}{{- content }}{%- if message.tool_calls %}{%- for tool_call in message.tool_calls %}"
    "{%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}"
    '{{- \'<tool_call>{"name": "\' + tool_call.name + \'", "arguments": \' }}'
    "{%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson "
    "}}{%- endif %}"
    "{{- '}</tool_call>' }}{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}{{- '<tool_response>\n' + content + '\n</tool_response>' }}{%- endif %}{%- "
    "endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and "
    "enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
"""In the style of Qwen 3: content that is not a string counts as empty."""
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}{%- else -%}{%- set first = messages[0]['content'][0]['text'] "
    "+ '\n\n' -%}"
    "{%- endif -%}{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- "
    "endif -%}"
    "{%- for message in rest -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- elif message['content'] is iterable -%}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}"
    "{%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
MISTRAL = (
    "{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}{{- '[INST] ' + "
    "message['content'] + '[/INST]' }}"
    "{%- elif message['role'] == 'system' %}{{- '[SYS] ' + message['content'] }}"
    "{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- '[TOOL_CALLS] [' }}"
    "{%- for tool_call in message.tool_calls %}{%- set out = tool_call.function | tojson %}{{- out[:-1] }}"
    "{%- if not tool_call.id is defined or tool_call.id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}"
    "{{- ', \"id\": \"' + tool_call.id + '\"}' }}{%- endfor %}{{- ']' + eos_token }}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] | trim + eos_token }}"
    "{%- elif message['role'] == 'tool' %}{%- if message.content is defined and message.content.content is defined %}"
    "{%- set content = message.content.content %}{%- else %}{%- set content = message.content %}{%- endif %}"
    "{{- '[TOOL_RESULTS] {\"content\": ' + content | string + ', \"call_id\": \"' + message.tool_call_id + '\"}' }}{%- "
    "endif %}"
    "{%- endfor %}"
)
PHI = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "{% set ns = namespace(system='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system = ns.system + message['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<User>' + message['content']}}"
    "{%- elif message['role'] == 'assistant' and 'tool_calls' in message %}{%- for tool in message['tool_calls'] %}"
    "{{'<call>' + tool['type'] + '<sep>' + tool['function']['name'] + '\n```json\n' + tool['function']['arguments'] + "
    "'\n```'}}"
    "{%- endfor %}{%- elif message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in "
    "content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{'<Assistant>' + content}}"
    "{%- elif message['role'] == 'tool' %}{{'<output>' + message['content']}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<Assistant><think>\n'}}{% endif %}"
)
"""Concatenates the arguments of tool calls to a string, so they must be a JSON string."""
ITEMS = (
    "{% macro text(content) %}{% if content is string %}{{- content }}{% elif content is iterable and content is not "
    "mapping %}"
    "{% for item in content %}{% if item is mapping and item.type == 'text' %}{{- item.text }}{% elif item is string "
    "%}{{- item }}"
    "{% endif %}{% endfor %}{% else %}{{- content }}{% endif %}{% endmacro %}"
    "[gMASK]{% for m in messages %}<|{{ m.role }}|>{{ text(m.content) }}{% if m.reasoning_content %}<think>{{ "
    "m.reasoning_content }}"
    "</think>{% endif %}{% if m.tool_calls %}{% for tc in m.tool_calls %}{% if tc.function %}{% set tc = tc.function "
    "%}{% endif %}"
    "<tool_call>{{ tc.name }}{% for k, v in tc.arguments.items() %}<k>{{ k }}</k><v>{{ v if v is string else v | "
    "tojson }}</v>"
    "{% endfor %}</tool_call>{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""In the style of GLM 4.5 and Qwen 3 Coder: iterates over the items of the arguments; a macro renders content."""
PARTS_ONLY = (
    "{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% "
    "endif %}"
    "{% endfor %}\n{% endfor %}"
)
VISION = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ 'SYS ' + m.content + '\n' }}{% else %}{{ m.role }}: "
    "{% for p in m.content if m.content is not string %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
    "{{ m.content if m.content is string }}\n{% endif %}{% endfor %}"
)
"""Accepts parts from users, and concatenates the content of a system message to a string."""

STRING = dict(chatml=CHATML, llama=LLAMA, qwen=QWEN, mistral=MISTRAL, phi=PHI, deepseek=DEEPSEEK)
"""Templates that accept only text."""
PARTS = dict(gemma=GEMMA, items=ITEMS, parts=PARTS_ONLY)
"""Templates that accept parts from every role."""
ALL = STRING | PARTS | dict(vision=VISION)
