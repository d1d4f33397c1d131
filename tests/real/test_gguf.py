"""The GGUF files of real checkpoints are read as the folders that transformers makes of them."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("gguf", reason="reads GGUF files; it comes with the extra `test` for Python 3.11")

from jaxinfer.checkpoint.gguf_folder import open_weights
from jaxinfer.checkpoint.hf import read_config
from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.inputs.chat import render_chat
from jaxinfer.inputs.tokenizer import load_tokenizer
from jaxinfer.loading import weights

WORKSHOP = Path(__file__).parent / "data" / "workshop.txt"
TEXTS = (
    "Привет, как дела?\n\n\tx",
    "你好，今天天气",
    "\U0001f468\u200d\U0001f469 é \N{LATIN SMALL LIGATURE FI}",
    " def f(x):\n    return x  # it's",
    "",
)
CHAT = [{"role": "user", "content": "Name three colours of the rainbow."}]

pytestmark = pytest.mark.slow


@pytest.fixture
def file(model) -> Path:
    """The file that the model's folder was made from."""
    path = model.folder.with_name(f"{model.folder.name}.gguf")
    assert path.is_file(), f"there is no {path}; run tests/real/make.py"
    return path


def test_tensors_and_configuration_are_equal_bit_for_bit(model, file):
    folder = resolve_model(file)
    assert weights.parse(read_config(folder))[1] == weights.parse(read_config(model.folder))[1]
    with open_weights(folder) as ours, open_weights(model.folder) as theirs:
        assert set(ours.names()) == set(theirs.names())
        for name in theirs.names():
            found = ours.read(name).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(found.view(np.uint16), theirs.read(name).view(np.uint16), err_msg=name)
            theirs.release()


def test_texts_and_chats_have_the_same_tokens(model, file):
    ours, theirs = load_tokenizer(file), model.tokenizer
    for text in (*TEXTS, WORKSHOP.read_text(encoding="utf-8")):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
    if theirs.chat_template is not None:
        assert render_chat(ours, CHAT) == render_chat(theirs, CHAT)
    assert ours.get_vocab() == theirs.get_vocab()
