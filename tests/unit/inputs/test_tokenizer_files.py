"""Test broken, unusual and tool-written tokenizer files: an error names file and field, or the result is that of
transformers."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
from transformers.tokenization_mistral_common import MistralCommonBackend

from jaxinfer.errors import ChatTemplateError, CheckpointError
from jaxinfer.inputs import vocabulary_files
from jaxinfer.inputs.chat import render_chat
from jaxinfer.inputs.tokenizer import encode, encode_batch, load_tokenizer
from jaxinfer.results.detokenizer import Detokenizer

CHAT = [{"role": "user", "content": "hi"}]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
SPM = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15\x00\x00\x00\x00\x18\x03"
MERGE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]


@pytest.fixture
def folder(byte_bpe, tmp_path) -> Path:
    """Return a Llama checkpoint folder with valid tokenizer files."""
    byte_bpe.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def change(folder: Path, name: str, **values: object) -> None:
    """Override values of a JSON file of the folder; Ellipsis removes a key."""
    path = folder / name
    said = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in {**said, **values}.items() if value is not ...}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        (POINTER, "git-lfs"),
        ("[1]", "must hold a JSON object"),
        ('{"model": ', "not usable JSON"),
    ],
)
def test_a_tokenizer_json_that_is_no_json_object(folder, text, message):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json.*{message}.*Fetch the file again"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": ...}, "model is None; it must be an object"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "model is .*refuses"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "model is .*refuses"),
        ({"model": {**MERGE, "continuing_subword_prefix": "xxxx"}}, "model is .*PanicException"),
        ({"decoder": {"type": "none"}}, "decoder is {'type': 'none'}, which the tokenizers library refuses"),
        ({"normalizer": 3}, "normalizer is 3"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}}, "pre_tokenizer is"),
        ({"added_tokens": None}, "added_tokens is None; it must be a list"),
        ({"added_tokens": [{"id": 0}]}, r"added_tokens\[0\] is"),
    ],
)
def test_the_field_of_tokenizer_json_is_named(folder, values, message):
    change(folder, "tokenizer.json", **values)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: {message}"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("tokenizer_config.json", {"eos_token": 3}, "eos_token is 3; it must be a string"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template is 3; it must be"),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, "chat_template is .*name and template"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length is 'x'; it must be a number"),
        ("tokenizer_config.json", {"tokenizer_class": 3}, "tokenizer_class is 3"),
        ("tokenizer_config.json", {"padding_side": "up"}, "padding_side is 'up'"),
        ("tokenizer_config.json", {"extra_special_tokens": [None]}, "extra_special_tokens is"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder has 'x'"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": []},
            r"added_tokens_decoder is \[\]; it must be an object of ids",
        ),
        ("special_tokens_map.json", {"bos_token": [1]}, r"bos_token is \[1\]"),
        ("added_tokens.json", {"x": "y"}, "'x' has the id 'y'"),
        ("chat_template.json", {"chat_template": 3}, "chat_template is 3; it must be a string of Jinja source"),
    ],
)
def test_the_field_of_a_small_file_is_named(folder, name, values, message):
    change(folder, name, **values)
    with pytest.raises(CheckpointError, match=rf"{name}: {message}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_a_template_that_is_no_text(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=f"{name} must be text in UTF-8"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer: none of tokenizer.json, tokenizer.model"),
        ({"vocab.json": '{"a": 0}'}, "vocab.json without merges.txt"),
        ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, "vocab.json: 'a' has the id 'b'"),
        ({"vocab.json": '{"a": 0', "merges.txt": ""}, "vocab.json is not usable JSON"),
        ({"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": "#version\na b c"}, "merges.txt, line 2 is 'a b c'"),
        ({"tokenizer.model": "YQ== 0\nYg== 1\n"}, "holds tiktoken's ranks.*tokenizer.json"),
        ({"tokenizer.model": POINTER}, "neither a SentencePiece model nor.*git-lfs"),
        ({"tokenizer.model": ""}, "neither a SentencePiece model nor.*it is empty"),
    ],
)
def test_a_folder_without_tokenizer_json(folder, files, message):
    (folder / "tokenizer.json").unlink()
    change(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", chat_template=...)
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


def test_a_sentencepiece_model_alone_says_what_converts_it(folder, monkeypatch):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(SPM)
    assert vocabulary_files.model_kind(folder / "tokenizer.model") == "sentencepiece"
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match="pip install sentencepiece") as caught:
        load_tokenizer(folder)
    assert "tiktoken" not in str(caught.value)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_alone_gives_its_tokens(tmp_path, kind, name):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in Path(__file__).read_text().splitlines() if line]),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=500,
        model_type=kind,
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "add_bos_token": True}))
    tokenizer = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("Hello world, it is 12.", "def  test(a):\n    return a", "é ﬁ 🐱 你"):
        ids = encode(tokenizer, text, special=True)
        assert ids == [reference.bos_id(), *reference.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == reference.decode(ids[1:])


def test_a_vocabulary_without_a_token(folder):
    change(
        folder, "tokenizer.json", added_tokens=[], post_processor=None, model={"type": "BPE", "vocab": {}, "merges": []}
    )
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no tokens"):
        load_tokenizer(folder)


def test_a_tokenizer_of_the_tokenizers_library_is_refused(byte_bpe):
    with pytest.raises(TypeError, match="wrap it as PreTrainedTokenizerFast"):
        load_tokenizer(byte_bpe.backend_tokenizer)
    assert load_tokenizer(byte_bpe) is byte_bpe


def test_a_text_that_cannot_be_encoded():
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert encode(tokenizer, "a", special=True) == [0]
    for call in (
        lambda: encode(tokenizer, "b", special=True),
        lambda: encode_batch(tokenizer, ["a", "b"], special=True),
    ):
        with pytest.raises(CheckpointError, match=r"cannot encode .*pass tokenizer="):
            call()


def test_a_panic_of_the_library_is_a_public_error():
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.decoder = decoders.Strip("a", 1, 1)
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(CheckpointError, match=r"cannot decode the token ids \[0\] \(PanicException"):
        detokenizer.push([0])


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TUNED = {
    "padding": {"padding_side": "left", "pad_token": None, "truncation_side": "left", "max_length": 2},
    "pad beyond": {"pad_token": "[PAD]", "added_tokens_decoder": {"300": {"content": "[PAD]", "special": True}}},
    "unknown class": {"tokenizer_class": "FooTokenizerFast"},
    "llama": {"tokenizer_class": "LlamaTokenizerFast"},
    "generic": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "gpt2": {"tokenizer_class": "GPT2Tokenizer"},
    "extra list": {"extra_special_tokens": ["<extra>", "<tool>"]},
    "extra dict": {"extra_special_tokens": {"image_token": "<extra>"}},
    "additional": {"additional_special_tokens": ["<extra>", {"content": "<tool>", "__type": "AddedToken"}]},
    "remote code": {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}},
    "templates": {
        "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "T" + TEMPLATE}]
    },
    "template": {"chat_template": "OLD", "chat_template.jinja": TEMPLATE},
    "more templates": {"chat_template.jinja": TEMPLATE, "additional_chat_templates/tool_use.jinja": "T" + TEMPLATE},
    "special map": {
        "special_tokens_map.json": '{"eos_token": {"content": "</s>"}, "additional_special_tokens": ["<extra>"]}'
    },
    "added tokens": {"added_tokens.json": '{"<extra>": 300, "<tool>": 301}'},
    "baked": {
        "tokenizer.json": {
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "padding": {
                "strategy": {"Fixed": 9},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<s>",
            },
        }
    },
}
"""Values that tools leave in tokenizer_config.json or, keyed by file name, in other files."""


@pytest.mark.parametrize("name", TUNED)
def test_what_tools_leave_reads_as_in_transformers(folder, name):
    for key, value in TUNED[name].items():
        if isinstance(value, dict) and key.endswith(".json"):
            change(folder, key, **value)
        elif "." in key:
            (folder / key).parent.mkdir(exist_ok=True)
            (folder / key).write_text(value)
        else:
            change(folder, "tokenizer_config.json", **{key: ... if value is None else value})
    ours = load_tokenizer(folder)
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
    except ValueError:  # transformers would run checkpoint code
        assert name == "remote code"
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("hello  wörld <extra><tool>[PAD]</s> 你", " a , b ."):
        ids = theirs.encode(text)
        assert encode(ours, text, special=True) == ids == encode_batch(ours, [text, text], special=True)[1]
        for skip in (True, False):
            detokenizer = Detokenizer(ours, skip_special_tokens=skip)
            assert detokenizer.push(ids) + detokenizer.finish() == theirs.decode(ids, skip_special_tokens=skip)
    if theirs.chat_template is not None:
        for tools in (None, TOOLS):
            expected = theirs.apply_chat_template(CHAT, tools=tools, tokenize=False, add_generation_prompt=True)
            assert render_chat(ours, CHAT, tools=tools) == expected


def test_the_template_of_a_processor_is_taken_where_the_tokenizer_has_none(folder):
    change(folder, "chat_template.json", chat_template="P" + TEMPLATE)
    assert render_chat(load_tokenizer(folder), CHAT) == "P[user]hi[assistant]"
    change(folder, "tokenizer_config.json", chat_template=TEMPLATE)
    assert render_chat(load_tokenizer(folder), CHAT) == "[user]hi[assistant]"


def test_a_template_that_is_no_source_is_refused():
    tokenizer = SimpleNamespace(chat_template=3, special_tokens_map={})
    with pytest.raises(ChatTemplateError, match="3, no Jinja source"):
        render_chat(tokenizer, CHAT)


@pytest.mark.slow
def test_every_tokenizer_class_has_what_is_called():
    names = {name for name in TOKENIZER_MAPPING_NAMES.values() if name} | {"TokenizersBackend", "PythonBackend"}
    classes = [tokenizer_class_from_name(name) for name in sorted(names)]
    whole = [one for one in classes if issubclass(one, PreTrainedTokenizerBase)]  # the others need a missing package
    assert len(whole) > 60
    for one in [*whole, MistralCommonBackend]:
        for name in ("get_vocab", "special_tokens_map", "all_special_ids", "convert_ids_to_tokens"):
            assert hasattr(one, name), f"{one.__name__} has no {name}"
        for method, values in ((one.encode, {"add_special_tokens": True}), (one.decode, {"skip_special_tokens": True})):
            options = {} if method is one.encode else {"clean_up_tokenization_spaces": False}
            inspect.signature(method).bind(None, "a", **values, **options)
