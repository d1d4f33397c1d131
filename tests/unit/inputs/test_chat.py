import sys

import pytest

from jaxinfer.errors import ChatTemplateError
from jaxinfer.inputs import templates
from jaxinfer.inputs.chat import chat_images, render_chat

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant', 'system') %}"
    "{{ raise_exception('unknown role ' ~ message.role) }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if quiet %} /q{% endif %}{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


def render(tokenizer, messages=HELLO, chat_template=TEMPLATE, **options):
    return render_chat(tokenizer, messages, chat_template=chat_template, **options)


def test_a_conversation(byte_bpe):
    assert render(byte_bpe) == "<s>[user] hello\n[assistant]"
    assert render(byte_bpe, add_generation_prompt=False) == "<s>[user] hello\n"
    assert render(byte_bpe, chat_template_kwargs={"quiet": True}).endswith("[assistant] /q")


def test_several_conversations(byte_bpe):
    other = [{"role": "user", "content": "bye"}]
    assert render(byte_bpe, [HELLO, other]) == ["<s>[user] hello\n[assistant]", "<s>[user] bye\n[assistant]"]


def test_the_tokenizers_own_template(byte_bpe, monkeypatch):
    monkeypatch.setattr(byte_bpe, "chat_template", TEMPLATE)
    assert render(byte_bpe, chat_template=None) == "<s>[user] hello\n[assistant]"


def test_parts_of_text_are_joined(byte_bpe):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]
    assert "[user] a\nb\nc\n" in render(byte_bpe, [{"role": "user", "content": parts}])


IMAGE = object()
PICTURE = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "what?"}]
PARTS = (
    "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content "
    "%}"
    "{% if p.type == 'image' %}<{{ p.keys() | list }}>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}"
)


def test_a_template_that_knows_of_images_gets_the_parts_without_them(byte_bpe):
    chat = [*HELLO, {"role": "user", "content": [*PICTURE, "now"]}]
    made = render(byte_bpe, chat, PARTS, image_marker="<I>")
    assert made == "[user] hello[user] <['type']>what?now"


def test_another_gets_the_marker(byte_bpe):
    assert "[user] <I>\nwhat?\n" in render(byte_bpe, [{"role": "user", "content": PICTURE}], image_marker="<I>")


def test_the_images_of_conversations_in_order(byte_bpe):
    others = [
        {"role": "user", "content": [{"type": "image", "image": at} for at in (1, 2)]},
        {"role": "user", "content": "x"},
    ]
    assert chat_images([{"role": "user", "content": PICTURE}, *others]) == [[IMAGE, 1, 2]]
    assert chat_images([HELLO, others]) == [[], [1, 2]]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image"}, r"messages\[0\]\['content'\]\[0\] has no 'image': pass a PIL image"),
        ({"type": "image", "url": "http://x"}, "nothing is read from paths or URLs"),
        ({"type": "image_url", "image_url": {}}, "of type str 'image_url': this model takes text and images"),
        (
            {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
            "data URLs alone .* got str 'https://x/y.png'",
        ),
    ],
)
def test_parts_that_are_no_image(byte_bpe, part, message):
    with pytest.raises(ValueError, match=message):
        render(byte_bpe, [{"role": "user", "content": [part]}], image_marker="<I>")


def test_an_assistant_may_call_tools_without_content(byte_bpe):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert "[assistant] \n" in render(byte_bpe, [*HELLO, call])


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        (None, TypeError, "messages must be a list of dicts"),
        ("hello", TypeError, "messages must be a list of dicts .* got str 'hello'"),
        ([], ValueError, "messages cannot be empty"),
        ([HELLO, []], ValueError, r"messages\[1\] cannot be empty"),
        ([HELLO[0], "x"], TypeError, r"messages\[1\] must be a dict"),
        ([HELLO, ["x"]], TypeError, r"messages\[1\]\[0\] must be a dict"),
        ([{"content": "x"}], TypeError, r"messages\[0\]\['role'\] must be a string, got None"),
        ([{"role": "user"}], TypeError, r"messages\[0\]\['content'\] must be a string .* got None"),
        ([{"role": "user", "content": 3}], TypeError, r"\['content'\] must be a string .* got int 3"),
        ([{"role": "user", "content": [{"type": "image"}]}], ValueError, r"\['content'\]\[0\].*takes text only"),
        ([{"role": "user", "content": [{"type": "text"}]}], TypeError, r"\[0\]\['text'\] must be a string"),
        ([{"role": "user", "content": [3]}], TypeError, r"\['content'\]\[0\] must be a dict"),
    ],
)
def test_messages_are_checked(byte_bpe, messages, error, message):
    with pytest.raises(error, match=message):
        render(byte_bpe, messages)


@pytest.mark.parametrize(
    "key",
    [
        "tokenize",
        "chat_template",
        "messages",
        "conversation",
        "conversations",
        "add_generation_prompt",
        "return_tensors",
        "return_dict",
        "self",
        "_x",
        "padding",
        "truncation",
        "max_length",
        "tokenizer_kwargs",
        "return_assistant_tokens_mask",
        "sanitize_control_tokens",
    ],
)
def test_reserved_template_variables_are_refused(byte_bpe, key):
    with pytest.raises(ValueError, match=f"chat_template_kwargs cannot set '{key}'"):
        render(byte_bpe, chat_template_kwargs={key: True})


def test_arguments_are_checked(byte_bpe):
    with pytest.raises(TypeError, match="chat_template_kwargs must be a dict"):
        render(byte_bpe, chat_template_kwargs=[1])
    with pytest.raises(TypeError, match="every key of chat_template_kwargs must be a string"):
        render(byte_bpe, chat_template_kwargs={1: 2})
    with pytest.raises(TypeError, match="chat_template must be a string"):
        render(byte_bpe, chat_template=3)
    with pytest.raises(TypeError, match="add_generation_prompt must be True or False"):
        render(byte_bpe, add_generation_prompt="yes")


def test_no_template(byte_bpe):
    with pytest.raises(ChatTemplateError, match="no chat template: pass chat_template="):
        render(byte_bpe, chat_template=None)


def test_named_templates_without_a_default(byte_bpe, monkeypatch):
    monkeypatch.setattr(byte_bpe, "chat_template", {"a": TEMPLATE, "b": TEMPLATE})
    with pytest.raises(ChatTemplateError, match="no chat template could be chosen"):
        render(byte_bpe, chat_template=None)
    assert render(byte_bpe, chat_template="a") == "<s>[user] hello\n[assistant]"


def test_an_answer_that_continues_the_last_message(byte_bpe):
    chat = [*HELLO, {"role": "assistant", "content": "Sure: red, "}]
    how = dict(add_generation_prompt=False, continue_final_message=True)
    assert render(byte_bpe, chat, **how) == "<s>[user] hello\n[assistant] Sure: red, "
    assert render(byte_bpe, chat, TEMPLATE.replace("message.content", "message.content | trim"), **how).endswith("red,")
    thought = [*HELLO, {"role": "assistant", "content": "", "reasoning": "hm"}]
    for field in ("reasoning_content", "reasoning", "thinking"):
        how["continue_final_message"] = field
        assert render(byte_bpe, thought, "{{ messages[1].reasoning_content }}</think>", **how) == "hm"
    with pytest.raises(ValueError, match="continue_final_message needs add_generation_prompt=False"):
        render(byte_bpe, chat, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="leaves out or changes the end"):
        render(byte_bpe, chat, "content", add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(ValueError, match="continue_final_message is given twice"):
        render(byte_bpe, chat, **how, chat_template_kwargs={"continue_final_message": True})


def weather(city: str) -> str:
    """Look at the weather.

    Args:
        city: where
    """
    return city


def test_tools_are_schemas_or_functions(byte_bpe):
    template = "{% for tool in tools %}{{ tool.function.name }}:{{ tool | tojson }};{% endfor %}"
    schema = {"type": "function", "function": {"name": "f", "parameters": {}}}
    made = render(byte_bpe, HELLO, template, tools=[schema, weather])
    assert made.startswith('f:{"type": "function"') and ';weather:{"type": "function"' in made and '"where"' in made
    assert made == render(byte_bpe, HELLO, template, chat_template_kwargs={"tools": (schema, weather)})
    with pytest.raises(TypeError, match=r"tools\[0\] must be a dict or a function, got int 3"):
        render(byte_bpe, HELLO, template, tools=[3])
    with pytest.raises(ValueError, match=r"tools\[0\] cannot be made into a JSON schema"):
        render(byte_bpe, HELLO, template, tools=[lambda x: x])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{% if %}", "the chat template"),
        ("{{ 'x }}", "the chat template"),
        ("{{ messages[0].a.b }}", "no attribute 'a'"),
        ("{{ messages.append(1) }}", "the chat template failed"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "the chat template failed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template failed"),
    ],
)
def test_templates_that_fail(byte_bpe, template, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(byte_bpe, chat_template=template)


def test_an_unknown_role_is_the_templates_error(byte_bpe):
    with pytest.raises(ChatTemplateError, match="unknown role robot"):
        render(byte_bpe, [{"role": "robot", "content": "x"}])


def test_harmless_stars_are_allowed(byte_bpe):
    template = "{{ '-' * 3 }}{{ 2 * messages|length }}{# a ** b #}**{{ 'a*b' }}{{ dict(**{'k': 1}).k }}"
    assert render(byte_bpe, chat_template=template) == "---2**a*b1"


def test_without_jinja_the_error_says_what_to_install(byte_bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(templates, "_idle", [])
    with pytest.raises(ChatTemplateError, match="pip install 'jinja2"):
        render(byte_bpe, chat_template="{{ messages }} of this test alone")
