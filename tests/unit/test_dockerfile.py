"""The Dockerfile: what it copies is sent to the build, its extras exist, and it runs as no root with a health check."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_what_is_copied_is_sent_to_the_build_and_nothing_else():
    copied = {name for line in re.findall(r"^COPY (?!--)(.*) \S+$", TEXT, re.MULTILINE) for name in line.split()}
    assert copied and all((ROOT / name).exists() for name in copied)
    first, *lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*" and {line[1:] for line in lines if line.startswith("!")} == copied


def test_both_targets_install_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = re.findall(r"\*\.whl\)\[([^\]]+)\]", TEXT)
    assert len(installed) == 2 and all(name in extras for line in installed for name in line.split(","))
    assert ["cuda13" in line for line in installed] == [True, False]
    assert re.findall(r"^FROM \S+ AS (\S+)", TEXT, re.MULTILINE) == ["build", "base", "cuda", "cpu"]


def test_it_runs_as_a_user_and_asks_for_health():
    targets = TEXT.split("FROM base AS ")[1:]
    assert all(target.rstrip().endswith("USER 10001") for target in targets)
    assert "/health'" in TEXT and TEXT.count("\nHEALTHCHECK") == 1 and "\nVOLUME /cache" in TEXT
