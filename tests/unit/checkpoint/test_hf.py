"""Test model lookup, JSON reading, and strict validation of config.json."""

import errno
import json
import logging
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from jaxinfer.checkpoint import hub, plain_json, size_limits
from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.hf import added_token, apply_overrides, read_config, read_generation_config
from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.checkpoint.plain_json import read_json
from jaxinfer.checkpoint.size_limits import check_sizes
from jaxinfer.errors import CheckpointError, ConfigError, OfflineError
from jaxinfer.layers.rope_config import RopeConfig


def write(folder: Path, name: str = "config.json", **content: object) -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder


def named(error: pytest.ExceptionInfo, *texts: str) -> None:
    for text in texts:
        assert text in str(error.value)


# --- The folder ---------------------------------------------------------------------------------------


@pytest.fixture
def downloads(monkeypatch):
    """Replace the Hub client: record calls; raise or return `downloads["answer"]`."""
    calls = {"answer": RuntimeError("the Hub was asked")}

    def snapshot_download(model, **options):
        calls.update(model=model, **options)
        if isinstance(calls["answer"], BaseException):
            raise calls["answer"]
        return calls["answer"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return calls


def test_a_directory_is_used_as_it_is(tmp_path, monkeypatch, downloads):
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(str(tmp_path)) == resolve_model(tmp_path) == tmp_path
    assert resolve_model("gpt2") == Path("gpt2")
    assert resolve_model("~/gpt2") == tmp_path / "gpt2"


@pytest.mark.parametrize("model", ["./absent", "../absent", "/absent", "~/absent", "a/b/c", "a/", "", Path("a/b")])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch, downloads, model):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist") as error:
        resolve_model(model)
    named(error, repr(str(model)))
    assert "model" not in downloads


def test_a_file_is_not_a_directory(tmp_path, downloads):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(tmp_path / "model.bin")
    with pytest.raises(TypeError, match="model"):
        resolve_model(None)


def test_a_hub_id_is_fetched_with_its_revision(downloads):
    downloads["answer"] = "/cache/snapshot"
    assert resolve_model("owner/name", "v1") == Path("/cache/snapshot")
    assert (downloads["model"], downloads["revision"]) == ("owner/name", "v1")


def test_only_what_is_read_is_fetched(downloads):
    downloads["answer"] = "/cache"
    resolve_model("owner/name")
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "merges.txt",
    ]
    unwanted = [
        "modeling_x.py",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "original/params.json",
        "original/tokenizer.model",
        "fp16/model.safetensors",
        "README.md",
    ]
    patterns = {name: downloads[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + unwanted, **patterns)) == wanted


def http_error(kind):
    """Return an HTTP error as raised by the client, for whichever HTTP library it uses."""
    error = kind.__new__(kind)
    Exception.__init__(error, "refused")
    return error


def disk_full():
    error = RuntimeError("transfer failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return error


@pytest.mark.parametrize(
    ("cause", "texts"),
    [
        (lambda: http_error(errors.GatedRepoError), ["gated", "https://huggingface.co/owner/name", "HF_TOKEN"]),
        (lambda: http_error(errors.RepositoryNotFoundError), ["no such public model", "HF_TOKEN"]),
        (lambda: http_error(errors.RevisionNotFoundError), ["no revision 'v9'"]),
        (disk_full, ["disk", "full", "HF_HOME"]),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), ["disk", "full", "HF_HOME"]),
        (lambda: errors.LocalEntryNotFoundError("no route\nto host"), ["no route", "connection", "HF_HOME"]),
        (lambda: ConnectionResetError("reset by peer"), ["ConnectionResetError: reset by peer", "connection"]),
        (lambda: KeyError(), ["KeyError: no message", "connection"]),
    ],
)
def test_why_the_hub_cannot_serve_and_what_to_do(downloads, cause, texts):
    downloads["answer"] = cause()
    with pytest.raises(OfflineError) as error:
        resolve_model("owner/name", "v9")
    named(error, "'owner/name'", "hf download owner/name --local-dir", *texts)
    assert error.value.__cause__ is downloads["answer"]


def test_offline_says_which_setting_did_it_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(OfflineError) as error:
        resolve_model("owner/name")
    named(error, "HF_HUB_OFFLINE", str(tmp_path / "hub"), "HF_HOME", "--local-dir")
    assert not list(tmp_path.iterdir())


def test_what_is_no_hub_id_is_said_so():
    with pytest.raises(CheckpointError, match="neither a directory nor a Hub id"):
        resolve_model("owner/na me?")


def test_an_interrupt_is_not_swallowed(downloads):
    downloads["answer"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        resolve_model("owner/name")


# --- JSON ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("[1]", ["object", "list"]),
        ("{", ["not usable JSON"]),
        ('{"a": 1, "a": 2}', ["'a'", "twice"]),
        ('{"b": {"a": 1, "a": 1}}', ["'a'", "twice"]),
        ('{"a": NaN}', ["NaN"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"a": ' + "9" * 5000 + "}", ["not usable JSON"]),
        (b'{"a": "\xff"}', ["not usable JSON"]),
    ],
)
def test_bad_json_names_the_file(tmp_path, text, texts):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as error:
        read_json(path)
    named(error, str(path), *texts)


def test_json_of_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_json, "MAX_JSON_BYTES", 10)
    write(tmp_path, a="0123456789")
    with pytest.raises(CheckpointError, match=r"config\.json has 19 bytes; a JSON file may have 10"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"absent\.json"):
        read_json(tmp_path / "absent.json")


def test_json_that_real_checkpoints_use_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"limit": [0.0, Infinity]}')
    assert read_json(path) == {"limit": [0.0, float("inf")]}


# --- config.json --------------------------------------------------------------------------------------


def test_overrides_lie_on_top(tmp_path):
    write(tmp_path, a=1, b=2, rope_scaling={"type": "linear"})
    overrides = {"b": None, "rope_scaling": {"factor": 2.0}, "c": 3}
    assert read_config(tmp_path, overrides) == {"a": 1, "b": None, "rope_scaling": {"factor": 2.0}, "c": 3}
    plain = {"a": 1, "b": 2, "rope_scaling": {"type": "linear"}}
    assert read_config(tmp_path) == read_config(tmp_path, {}) == plain
    for bad in ("a=1", [("a", 1)], {1: 2}):
        with pytest.raises(TypeError, match="hf_overrides"):
            read_config(tmp_path, bad)


def test_a_missing_config_lists_what_is_there(tmp_path):
    write(tmp_path, "vocab.json")
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    named(error, str(tmp_path), "config.json", "found vocab.json")
    with pytest.raises(CheckpointError, match="found nothing"):
        read_config(tmp_path / "absent")


def test_auto_map_is_ignored_logged_once_and_never_run(tmp_path, caplog):
    write(tmp_path, model_type="phi3", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with caplog.at_level(logging.INFO, logger="jaxinfer"):
        assert read_config(tmp_path)["model_type"] == "phi3"
    [record] = caplog.records
    assert "auto_map" in record.message and "never executed" in record.message


@pytest.mark.parametrize("name", ["quantization_config", "compression_config", "quantization"])
def test_a_quantised_format_that_is_not_read_is_refused(tmp_path, name):
    write(tmp_path, **{name: {"quant_method": "aqlm", "bits": 4}})
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path)
    named(error, name, "aqlm", "formats that are read: fp8")


def test_generation_config_is_optional(tmp_path):
    assert read_generation_config(tmp_path) == {}
    write(tmp_path, "generation_config.json", eos_token_id=[1, 2])
    assert read_generation_config(tmp_path) == {"eos_token_id": [1, 2]}
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="generation_config"):
        read_generation_config(tmp_path)


@pytest.mark.parametrize(
    "value", [0, -1, 2**22 + 1, pytest.param(10**5000, id="10**5000"), 1.5, 32000.5, "32000", True, [1]]
)
def test_sizes_are_checked_before_anything_is_made_of_them(value):
    for check in (
        lambda: check_sizes({"vocab_size": value}, "hidden_size", "vocab_size"),
        lambda: ConfigReader({"vocab_size": value}, "llama").get_int("vocab_size"),
    ):
        with pytest.raises(ConfigError) as error:
            check()
        named(error, "vocab_size=", str(2**22))
        assert len(str(error.value)) < 200


def test_good_and_absent_sizes_pass():
    check_sizes({"vocab_size": 2**22, "hidden_size": 1, "head_dim": None}, *size_limits.SIZE_CAPS)


def test_getters_give_types_and_defaults():
    config = {"i": 3, "f": 1e-5, "whole": 1, "b": False, "s": "silu", "none": None, "d": {"x": 1}}
    reader = ConfigReader(config, "llama")
    assert (reader.get_int("i"), reader.get_float("f")) == (3, 1e-5)
    assert (reader.get_bool("b"), reader.get_str("s")) == (False, "silu")
    assert reader.get_float("whole") == 1.0 and isinstance(reader.get_float("whole"), float)
    assert reader.get_int("none", 7) == 7 and reader.get_int("absent", None) is None
    assert reader.get_bool("absent", True) is True and reader.get_str("absent", "x") == "x"
    assert reader.get("d") == {"x": 1} and reader.get("absent", ()) == ()
    assert type(ConfigReader({"size": 8192.0}, "llama").get_int("size")) is int
    assert ConfigReader({"first": 0}, "qwen2").get_int("first", least=0) == 0


@pytest.mark.parametrize(
    ("getter", "value"),
    [
        ("get_int", 1.5),
        ("get_int", True),
        ("get_int", "1"),
        ("get_int", 0),
        ("get_int", 2**31),
        ("get_float", "1"),
        ("get_float", True),
        ("get_float", float("inf")),
        ("get_float", 10**400),
        ("get_bool", 1),
        ("get_bool", "true"),
        ("get_str", 1),
        ("get_str", ["silu"]),
        ("get_int", None),
        ("get_float", None),
        ("get_bool", None),
        ("get_str", None),
        ("get", None),
    ],
)
def test_getters_name_family_field_and_value(getter, value):
    with pytest.raises(ConfigError) as error:
        getattr(ConfigReader({"field": value}, "llama"), getter)("field")
    named(error, "llama", "field")
    if value is not None and value != 10**400:
        named(error, repr(value))


def test_what_nobody_read_is_refused_with_the_remedy():
    reader = ConfigReader(
        {
            "hidden_size": 8,
            "logit_scale": 0.25,
            "alibi": True,
            "skipped": 1,
            "off": False,
            "nothing": None,
            "empty": [],
            "zero": 0,
        },
        "llama",
    )
    reader.get_int("hidden_size")
    reader.skip("skipped")
    with pytest.raises(ConfigError) as error:
        reader.finish()
    named(
        error,
        "llama",
        "logit_scale=0.25",
        "alibi=True",
        "off=False",
        "zero=0",
        "hf_overrides={'logit_scale': None, 'alibi': None, 'off': None, 'zero': None}",
        '--hf-overrides \'{"logit_scale": null, "alibi": null, "off": null, "zero": null}\'',
    )
    for passed in ("hidden_size", "skipped", "nothing", "empty"):
        assert passed not in str(error.value)


@pytest.mark.parametrize(
    ("value", "values", "passes"),
    [
        (True, (True,), True),
        (None, (True,), True),
        (1, (True,), False),
        (False, (True,), False),
        (1, (1.0,), True),
        (0, (False,), False),
        ("rope", ("rope", "rotary"), True),
        ([1], ([1],), True),
        ({}, (), False),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_an_attribute_that_may_have_one_value(value, values, passes, later):
    """Unsupported values raise immediately, or in `finish`; an empty value counts as absent."""
    reader = ConfigReader({"is_causal": value}, "llama")

    def check() -> None:
        if later:
            reader.restrict({"is_causal": values})
            reader.finish()
        else:
            reader.require("is_causal", *values)
            reader.finish()

    if passes:
        check()
        return
    with pytest.raises(ConfigError) as error:
        check()
    named(error, "llama", f"is_causal={value!r}", "hf_overrides={'is_causal': None}")


def test_what_a_family_requires_may_still_be_read():
    reader = ConfigReader({"logit_scale": 0.25}, "cohere2")
    reader.restrict({"logit_scale": (1,)})
    assert reader.get_float("logit_scale") == 0.25
    reader.finish()


def test_notes_of_tools_are_logged_once(caplog):
    notes = {
        "unsloth_version": "2025.1",
        "_x": 3,
        "wandb_run": "r",
        "kobart_version": 2.0,
        "mlp_dropout": 0.1,
        "license": "mit",
    }
    for _ in range(2):
        with caplog.at_level(logging.INFO, logger="jaxinfer"):
            ConfigReader(notes, "a family of its own").finish()
    [record] = caplog.records
    assert all(name in record.message for name in notes)


def test_null_is_a_value_only_where_a_family_says_so():
    reader = ConfigReader({"cap": None, "size": None}, "gemma2")
    reader.defaults(size=8, other=9)
    reader.defaults_if_absent(cap=50.0, window=7)
    assert [reader.get(name, None) for name in ("size", "other", "cap", "window")] == [8, 9, None, 7]


def test_rope_fields_are_read_together():
    reader = ConfigReader({"rope_theta": 5e5, "rope_scaling": None, "max_position_embeddings": 64}, "llama")
    assert reader.rope(8).theta == 5e5
    reader.finish()
    with pytest.raises(ConfigError, match="'mrope'.*supported: default, linear"):
        ConfigReader({"rope_scaling": {"type": "mrope"}, "max_position_embeddings": 64}, "llama").rope(8)


def test_the_patterns_fetch_no_code():
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in hub.ALLOW_PATTERNS)


# --- Nested configurations ----------------------------------------------------------------------------


def test_the_sizes_of_parts_are_checked_under_their_name():
    with pytest.raises(ConfigError, match=r"^text_config\.vocab_size=0 must be"):
        check_sizes({"vocab_size": 4, "text_config": {"vocab_size": 0}}, "vocab_size")


def test_a_part_is_finished_with_the_whole():
    config = {"size": 1, "vision_config": {"size": 2, "unread": 3}, "text_config": {"size": 4}}
    reader = ConfigReader(config, "internvl")
    vision, text = reader.part("vision_config"), reader.part("text_config", size=5)
    assert [part.get_int("size") for part in (reader, vision, text)] == [1, 2, 5]
    with pytest.raises(ConfigError) as error:
        reader.finish()
    named(error, "vision_config={'unread': 3}", "hf_overrides={'vision_config': {'unread': None}}")
    vision.skip("unread")
    reader.finish()


@pytest.mark.parametrize("value", [None, [], "x"])
def test_a_part_that_is_no_object_is_refused(value):
    with pytest.raises(ConfigError, match="internvl.*text_config"):
        ConfigReader({"text_config": value}, "internvl").part("text_config")


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_a_scaling_laid_over_a_rope_keeps_its_base(name):
    """transformers 5 stores the base in the object that the override replaces."""
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "max_position_embeddings": 64}
    yarn = {"rope_type": "yarn", "factor": 4.0}

    def theta(overrides):
        return RopeConfig.from_hf(apply_overrides(config, overrides), 8).theta

    assert theta({name: yarn}) == 1e5
    assert theta({name: yarn | {"rope_theta": 5e5}}) == 5e5
    assert theta({name: yarn, "rope_theta": 5e5}) == 5e5
    assert theta({name: yarn, "rope_theta": None}) == 1e4
    part = apply_overrides({"text_config": config}, {"text_config": {name: yarn}})["text_config"]
    assert RopeConfig.from_hf(part, 8).theta == 1e5
    assert apply_overrides(config, {name: None}) == config | {name: None}


def test_overrides_of_a_part_leave_the_rest_of_it():
    config = {"text_config": {"a": 1, "b": 2}, "rope_scaling": {"a": 1}}
    assert apply_overrides(config, {"text_config": {"b": None}, "rope_scaling": {"b": 2}}) == {
        "text_config": {"a": 1, "b": None},
        "rope_scaling": {"b": 2},
    }
    assert config["text_config"] == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<x>": 7, "<y>": 8}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<x>"}, "8": {"content": "<y>"}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 8, "content": "<y>"}, {"id": 7, "content": "<x>"}]}),
    ],
)
def test_the_id_of_an_added_token_is_read_from_whichever_file_has_it(tmp_path, name, content):
    write(tmp_path, name, **content)
    assert added_token(tmp_path, "<x>") == 7 and added_token(tmp_path, "<z>") is None


@pytest.mark.parametrize(
    "content",
    [
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"seven": {"content": "<x>"}}},
        {"added_tokens_decoder": {"7": "<x>"}},
        {"added_tokens_decoder": {"7" * 5000: {"content": "<x>"}}},
        {"added_tokens_decoder": {"9999999999": {"content": "<x>"}}},
    ],
)
def test_files_of_another_shape_name_no_token(tmp_path, content):
    write(tmp_path, "tokenizer_config.json", **content)
    write(tmp_path, "tokenizer.json", added_tokens={"<x>": 7})
    write(tmp_path, "added_tokens.json", **{"<x>": "7"})
    assert added_token(tmp_path, "<x>") is None
