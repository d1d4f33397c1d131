"""The command line with images, on a tiny InternVL."""

import json

import numpy as np
import pytest
from PIL import Image
from support import scripts
from support.images import ROWS, write_folder

pytestmark = [pytest.mark.xdist_group("internvl"), pytest.mark.slow]


@pytest.fixture(scope="module")
def command():
    """`main` of scripts/generate.py."""
    return scripts.load("generate").main


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str, str]:
    """A checkpoint and two images."""
    folder = tmp_path_factory.mktemp("files")
    values = np.random.default_rng(0).integers(0, 256, (30, 70, 3), np.uint8)
    Image.fromarray(values).save(folder / "a.png")
    Image.fromarray(values[:, :30]).save(folder / "b.jpg")
    return tuple(str(path) for path in (write_folder(folder / "model"), folder / "a.png", folder / "b.jpg"))


def ask(command, capsys, files, *arguments: str) -> list[dict]:
    common = ["--model", files[0], "--max-model-len", "128", "--max-tokens", "6", "--json"]
    assert command([*common, *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_images_go_with_every_prompt(command, capsys, files):
    a, b = files[1:]
    whole = ask(
        command,
        capsys,
        files,
        "--image",
        a,
        "--image",
        b,
        "--prompt",
        "<image> and <image>",
        "--prompt",
        "<image><image>",
    )
    one = ask(command, capsys, files, "--image", a, "--prompt", "<image>")
    chat = ask(command, capsys, files, "--image", a, "--chat", "--prompt", "hello")
    assert [len(whole), len(one), len(chat)] == [2, 1, 1]
    ids = [row["prompt_token_ids"] for row in (*whole, *one, *chat)]
    token = max(map(max, ids))
    assert [row.count(token) for row in ids] == [ROWS * tiles for tiles in (3 + 1, 3 + 1, 3, 3)]
    assert all(len(row["outputs"][0]["token_ids"]) for row in (*whole, *one, *chat))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("/nowhere/cat.png", "--image /nowhere/cat.png: No such file"),
        (__file__, "cannot identify image file"),
    ],
)
def test_a_file_that_is_no_image_is_one_line(command, capsys, files, file, words):
    assert command(["--model", files[0], "--image", file, "--prompt", "<image>"]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments", [["--image", "x.png"], ["--image", "x.png", "--prompt", "a"], ["--image", "x.png", "--model", "m"]]
)
def test_images_need_a_model_and_a_prompt(command, capsys, arguments):
    with pytest.raises(SystemExit):
        command(arguments)
    assert "--image needs --model" in capsys.readouterr().err
