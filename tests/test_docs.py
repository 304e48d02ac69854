"""README and docs: links lead somewhere, commands name scripts, flags and keys that exist."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from config import _all_keys, get_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = set(_all_keys(get_config()))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page):
    """The commands of a page's sh blocks, as lists of words."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=\S*", words[0]):  # NAME=value in front
                words.pop(0)
            if words:
                yield words


@functools.cache
def help_of(script):
    result = subprocess.run(
        [sys.executable, script, "-h"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles]
            assert heading in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_scripts_and_flags_that_exist(page):
    for words in commands(page):
        scripts = [word for word in words if word.endswith((".py", ".sh"))]
        for script in scripts[:1]:
            assert (ROOT / script).is_file(), words
            if script.endswith(".py") and words[0] == "python" and words[1] == script:
                known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(script)))
                used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
                assert used <= known, (words, used - known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_config_keys_and_files_that_exist(page):
    for words in commands(page):
        for word in words:
            if re.fullmatch(r"[A-Z_]+(\.[A-Z_]+)+", word):
                assert word in KEYS, word
            config = re.search(r"configs/[\w/]+\.yaml", word)
            if config:
                assert (ROOT / config[0]).is_file(), word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
