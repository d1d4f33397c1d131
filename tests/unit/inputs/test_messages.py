"""Test that messages as sent by clients render like transformers on messages normalised by vLLM."""

import base64
import copy
import dataclasses
import io
import json

import numpy as np
import pytest
from support.chat_templates import ALL, PARTS, STRING

from jaxinfer.inputs.chat import chat_images, render_chat
from jaxinfer.inputs.plain_data import plain

ARGUMENTS = {"city": "Zürich", "days": [1, 2]}


def call(arguments, **more):
    return {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}} | more


def parts(*texts, kind="text"):
    return [{"type": kind, "text": text} for text in texts]


def chat(content="ok", **more):
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content, **more}]


def result(content):
    return [
        *chat("", tool_calls=[call(ARGUMENTS)]),
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "f", "content": content},
    ]


def reference(tokenizer, messages, name, **kwargs):
    """Render messages that need no normalisation with transformers."""
    return tokenizer.apply_chat_template(
        messages, chat_template=ALL[name], tokenize=False, add_generation_prompt=True, **kwargs
    )


def render(tokenizer, messages, name, **kwargs):
    given = copy.deepcopy(messages)
    made = render_chat(tokenizer, messages, chat_template=ALL[name], **kwargs)
    assert messages == given, "what the caller passed is changed"
    return made


def textual(name):
    """Return a text in the content form that a template accepts."""
    return (lambda text: parts(text) if text else []) if name == "parts" else (lambda text: text)


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize("name", ALL)
def test_messages_of_text(byte_bpe, name):
    as_is = textual(name)
    for messages in ([SYSTEM, USER], [USER], [*chat(" é \U0001f600"), USER], [SYSTEM, *chat(""), USER]):
        expected = reference(byte_bpe, [{**one, "content": as_is(one["content"])} for one in messages], name)
        assert render(byte_bpe, messages, name) == expected
        made = [{"name": "x", **one, "content": parts(one["content"])} for one in messages]
        assert render(byte_bpe, made, name) == expected, "given as parts"


@pytest.mark.parametrize("name", ALL)
def test_parts_are_joined_by_the_template_or_else_by_line_breaks(byte_bpe, name):
    given = [{"role": "user", "content": [*parts("one"), *parts("two", kind="input_text"), "three"]}]
    plain = parts("one", "two", "three") if name in PARTS or name == "vision" else "one\ntwo\nthree"
    assert render(byte_bpe, given, name) == reference(byte_bpe, [{"role": "user", "content": plain}], name)
    if name not in PARTS:
        spoken = [{"role": "system", "content": parts("one", "two")}, USER]
        assert render(byte_bpe, spoken, name) == reference(byte_bpe, [{**SYSTEM, "content": "one\ntwo"}, USER], name)


@pytest.mark.parametrize("name", ["llama", "qwen", "mistral", "deepseek", "items"])
def test_tool_calls_in_every_form(byte_bpe, name):
    """Arguments may be a JSON string or an object; content may be text, None or missing."""
    text = json.dumps(ARGUMENTS, ensure_ascii=False)
    expected = reference(byte_bpe, chat("", tool_calls=[call(text if name == "deepseek" else ARGUMENTS)]), name)
    assert "Zürich" in expected
    for given in (text, ARGUMENTS):
        calls = [call(given, index=None)]
        for content in ("", None, []):
            assert render(byte_bpe, chat(content, tool_calls=calls, refusal=None, audio=None), name) == expected
        without = chat(tool_calls=calls)
        del without[1]["content"]
        assert render(byte_bpe, without, name) == expected
    assert "f" in render(byte_bpe, chat(None, tool_calls=[call("not JSON")]), name)
    for empty in ("", "{}", "null", {}, [], None):
        made = render(byte_bpe, chat("", tool_calls=[call(empty)]), name)
        assert made == reference(byte_bpe, chat("", tool_calls=[call("{}" if name == "deepseek" else {})]), name)
    said = Dumped(**ARGUMENTS)
    assert render_chat(byte_bpe, chat("", tool_calls=[call(said)]), chat_template=ALL[name]) == expected
    assert render(byte_bpe, chat("ok", tool_calls=[]), name) == reference(byte_bpe, chat("ok"), name)


def test_a_legacy_function_call_is_a_tool_call(byte_bpe):
    made = render(byte_bpe, chat(None, function_call={"name": "f", "arguments": '{"x": 1}'}), "qwen")
    assert '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>' in made


@pytest.mark.parametrize("name", ALL)
def test_content_that_is_none_is_empty(byte_bpe, name):
    empty = [] if name == "parts" else ""
    assert render(byte_bpe, [*chat(None), USER], name) == render(byte_bpe, [*chat(empty), USER], name)
    said = render(byte_bpe, [*chat(None, refusal="I will not."), USER], name)
    assert said == render(byte_bpe, [*chat("I will not."), USER], name)


@pytest.mark.parametrize("name", ["llama", "qwen", "mistral", "deepseek", "items", "chatml"])
def test_results_of_tools(byte_bpe, name):
    """Tool results may be text, parts or objects; objects become JSON if the template does not accept them."""
    tool = render(byte_bpe, result("21 degrees"), name)
    assert tool.count("21 degrees") == 1
    assert render(byte_bpe, result(parts("21 ", "degrees")), name) == render(byte_bpe, result("21 \ndegrees"), name)
    made = render(byte_bpe, result({"t": "Zürich"}), name)
    if name == "llama":
        assert '{"t": "Zürich"}' in made, "its template makes the JSON"
    else:
        assert made == render(byte_bpe, result('{"t": "Zürich"}'), name)
    assert render(byte_bpe, result([1, {"x": 2}]), name) == render(byte_bpe, result('[1, {"x": 2}]'), name)
    assert render(byte_bpe, result(7), name) == render(byte_bpe, result("7"), name)


def test_an_object_of_a_tool_is_text_for_a_template_that_knows_parts_alone(byte_bpe):
    assert '{"t": 21}' in render(byte_bpe, result({"t": 21}), "parts")


def test_objects_of_a_tool_with_a_type_of_their_own_are_no_parts(byte_bpe):
    for given in ([{"type": "event", "n": 1}, {"type": "file", "name": "a"}], [{"type": "text"}], [{"type": []}]):
        expected = render(byte_bpe, result(json.dumps(given)), "qwen")
        assert render(byte_bpe, result(given), "qwen") == expected
    with pytest.raises(ValueError, match="of type str 'input_audio': this model takes text only"):
        render(byte_bpe, result([{"type": "input_audio", "input_audio": {"data": ""}}]), "qwen")
    assert '{"(1, 2)": 3}' in render(byte_bpe, result({(1, 2): 3}), "qwen")


def test_parts_whose_text_is_none_are_left_out(byte_bpe):
    nothing = [{"type": "text", "text": None}, {"type": "refusal", "refusal": None}]
    for name in ("qwen", "gemma"):
        made = render(byte_bpe, [{"role": "user", "content": [*nothing, *parts("hi")]}], name)
        assert made == render(byte_bpe, [USER], name)
    assert render(byte_bpe, result([*nothing, *parts("21")]), "qwen") == render(byte_bpe, result("21"), "qwen")
    with pytest.raises(TypeError, match=r"\['content'\]\[0\]\['text'\] must be a string"):
        render(byte_bpe, [{"role": "user", "content": [{"type": "text"}]}], "qwen")


def test_parts_of_tools_stay_where_a_template_knows_nothing_else(byte_bpe):
    assert "tool:21" in render(byte_bpe, result("21"), "parts")


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_under_any_of_its_names(byte_bpe, field):
    for name in ("qwen", "items"):
        made = render(byte_bpe, chat("ok", **{field: "hm"}), name)
        assert "<think>hm</think>" in made and made == reference(byte_bpe, chat("ok", **{field: "hm"}), name)


def test_variables_of_the_template(byte_bpe):
    for value in (True, False):
        made = render(byte_bpe, [USER], "qwen", chat_template_kwargs={"enable_thinking": value})
        assert made == reference(byte_bpe, [USER], "qwen", enable_thinking=value)
    tools = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]
    assert render(byte_bpe, [USER], "llama", tools=tools) == reference(byte_bpe, [USER], "llama", tools=tools)


@dataclasses.dataclass
class Said:
    role: str
    content: object
    note: object = None


class Dumped:
    """Object with `model_dump`, like those of OpenAI's client."""

    def __init__(self, **fields):
        self.fields = fields

    def model_dump(self):
        return self.fields


def test_messages_that_are_objects(byte_bpe):
    given = [
        Said("user", "hi"),
        Dumped(role="assistant", content=None, tool_calls=[Dumped(**call('{"x": 1}'))], refusal=None),
    ]
    made = render_chat(byte_bpe, given, chat_template=ALL["qwen"])
    assert made == reference(byte_bpe, chat("", tool_calls=[call({"x": 1})]), "qwen")


def test_the_client_s_own_message(byte_bpe):
    chat_types = pytest.importorskip("openai.types.chat")
    said = chat_types.ChatCompletionMessage.model_validate(chat(None, tool_calls=[call('{"x": 1}')])[1])
    expected = reference(byte_bpe, chat("", tool_calls=[call({"x": 1})]), "qwen")
    assert render_chat(byte_bpe, [USER, said], chat_template=ALL["qwen"]) == expected
    assert render_chat(byte_bpe, [USER, said.model_dump(exclude_none=True)], chat_template=ALL["qwen"]) == expected


def test_a_template_sees_plain_data_alone(byte_bpe):
    class Text(str):
        def escape(self):
            raise AssertionError

    given = plain({"a": Text("x"), "b": np.int64(3), "c": (True, object()), "d": np.bool_(False), "e": np.zeros(2)})
    assert (
        given == {"a": "x", "b": 3, "c": (True, "<object>"), "d": False, "e": "<ndarray>"} and type(given["a"]) is str
    )
    message = {"role": "user", "content": Text("hi"), "extra": {"deep": [object()]}}
    assert render_chat(byte_bpe, [message], chat_template="{{ messages[0].extra.deep[0] }}") == "<object>"
    loop = {"role": "user", "content": "hi"}
    loop["self"] = loop
    with pytest.raises(ValueError, match="nested too deeply, or contain themselves"):
        render_chat(byte_bpe, [loop], chat_template=ALL["qwen"])


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("f", r"messages\[1\]\['tool_calls'\] must be a list of tool calls, got str"),
        ([3], r"\['tool_calls'\]\[0\] must be a dict with 'function', got int 3"),
        ([{"function": "f"}], r"\['tool_calls'\]\[0\]\['function'\] must be a dict with 'name'"),
        ([call(7)], r"\['function'\]\['arguments'\] must be an object or JSON in a string, got int 7"),
    ],
)
def test_tool_calls_that_are_none(byte_bpe, calls, message):
    with pytest.raises(TypeError, match=message):
        render_chat(byte_bpe, chat("", tool_calls=calls), chat_template=ALL["qwen"])


def test_images_of_data_urls(byte_bpe):
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("RGB", (3, 2), (255, 0, 0)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    for part in (
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
    ):
        given = [{"role": "user", "content": [part, *parts("what?")]}]
        assert render_chat(byte_bpe, given, chat_template=ALL["vision"], image_marker="<I>") == "user: <image>what?\n"
        assert render_chat(byte_bpe, given, chat_template=ALL["chatml"], image_marker="<I>").startswith(
            "<|im_start|>user\n<I>\nwhat?"
        )
        [[found]] = chat_images(given)
        assert found.size == (3, 2)
    turned, exif = io.BytesIO(), image.Exif()
    exif[0x0112] = 6  # taken with the camera upright
    image.new("RGB", (3, 2)).save(turned, "PNG", exif=exif)
    url = "data:image/png;base64," + base64.b64encode(turned.getvalue()).decode()
    [[found]] = chat_images([{"role": "user", "content": [{"type": "image_url", "image_url": url}]}])
    assert found.size == (2, 3)
    for bad in ("data:image/png;base64,AAAA", "data:image/png;base64,%%", "data:,x"):
        with pytest.raises(ValueError, match="conversation 0, image 0: the data URL cannot be read"):
            chat_images([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": bad}}]}])


def test_styles_are_told_apart():
    assert set(STRING) | set(PARTS) | {"vision"} == set(ALL)
