"""The command line with sound, on a tiny Whisper."""

import json
import wave

import numpy as np
import pytest
from support import scripts
from support.whisper import sound, write_folder

pytestmark = [pytest.mark.xdist_group("whisper"), pytest.mark.slow]


@pytest.fixture(scope="module")
def command():
    """`main` of scripts/generate.py."""
    return scripts.load("generate").main


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """A checkpoint, and stereo at another rate than the model's."""
    folder = tmp_path_factory.mktemp("files")
    samples = np.stack([sound(2.3, 1, 22_050)] * 2, axis=1)
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((2, 2, 22_050, 0, "NONE", ""))
        file.writeframes((samples * 2**14).astype("<i2").tobytes())
    return str(write_folder(folder / "model")), str(folder / "a.wav")


def test_a_transcript_with_times(command, capsys, files):
    common = ["--model", files[0], "--audio", files[1], "--language", "en"]
    assert command([*common, "--json"]) == 0
    [found] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found["file"] == files[1] and found["language"] == "en" and found["duration"] == pytest.approx(2.3, abs=0.01)
    assert command(common) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{files[1]} (2.3 s, en)"
    assert lines[0].startswith(f"[{found['segments'][0]['start']:.2f} - {found['segments'][0]['end']:.2f}]")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("/nowhere/a.wav", "/nowhere/a.wav: No such file"),
        (__file__, "is not a WAV file of integer or float samples"),
    ],
)
def test_a_file_that_is_no_sound_is_one_line(command, capsys, files, file, words):
    assert command(["--model", files[0], "--audio", file]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--audio", "a.wav"],
        ["--audio", "a.wav", "--model", "m", "--prompt", "x"],
        ["--audio", "a.wav", "--model", "m", "--n", "2"],
        ["--language", "en"],
        ["--task", "translate", "--model", "m", "--prompt", "x"],
    ],
)
def test_flags_that_do_not_go_together(command, capsys, arguments):
    with pytest.raises(SystemExit):
        command(arguments)
    assert "--audio" in capsys.readouterr().err
