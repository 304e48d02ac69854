"""README and docs: links lead somewhere, commands name scripts, flags and keys that exist.

That the commands work is tested by `tests/commands`, which runs them.
"""

import functools
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from config import KEYS as DECLARED

from .commands import tables
from .commands.pages import CHINESE, PAGES, ROOT, commands, unmarked

KEYS = {*DECLARED, *(key.rpartition(".")[0] for key in DECLARED)}
COMMANDS = [command for page in PAGES for command in commands(page)]


@functools.cache
def flags_of(script):
    words = [sys.executable, script, "-h"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {plain(flag) for flag in re.findall(r"(?<![\w-])--?[a-z][\w-]*", result.stdout)}


def plain(flag):
    """A flag whatever its dashes: the help shows one spelling."""
    return flag.lstrip("-").replace("-", "_")


OTHERS = [ROOT / "CONTRIBUTING.md", *ROOT.glob(".github/*.md")]


@pytest.mark.parametrize("page", [*PAGES, *CHINESE, *OTHERS], ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:\]\(|srcset=\")([^)\s\"]+)[)\"]", text):
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
def test_commands_are_in_blocks_that_are_run_of_scripts_flags_keys_and_files_that_exist(page):
    assert unmarked(page) == []
    for command in commands(page):
        if command.language == "python":
            compile(command.text, command.where, "exec")
            continue
        words = shlex.split(command.text)
        while re.fullmatch(r"\w+=\S*", words[0]):  # NAME=value in front
            words.pop(0)
        for script in re.findall(r"(?<!\S)[\w./-]+\.(?:py|sh|txt)\b", " ".join(words)):
            assert (ROOT / script).is_file(), words
            if script.endswith(".py") and words[:2] == ["python", script]:
                used = {plain(w.partition("=")[0]) for w in words if re.match(r"--?[a-z]", w)}
                assert used <= flags_of(script), words
        for word in words:
            assert word in KEYS or not re.fullmatch(r"[A-Z_]+(\.[A-Z_]+)+", word), word
            config = re.search(r"configs/[\w/]+\.yaml", word)
            assert not config or (ROOT / config[0]).is_file(), word


def in_step(page):
    """What a page in another language has to have in common with it, by kind, in any order."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"(\d+) 万", lambda match: f"{int(match[1]) / 100:g}", prose)  # ten thousands
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    words = re.sub(r"`[^`]+`|\]\([^)]*\)|https?:\S+", " ", prose)
    number = r"(?<![\w.-])\d[\d,.]*(?:e-\d+)?(?<![,.])"
    return {
        "commands": sorted(command.text for command in commands(page)),
        "names, flags, keys": sorted(set(spans)),
        "tables": [
            sorted(re.findall(number, row, re.ASCII))
            for row in re.findall(r"^ *\|.*$", words, re.MULTILINE)
        ],
        "numbers": sorted(set(re.findall(number, words, re.ASCII))),
        "pictures": re.findall(r"!\[[^]]*\]\(([^)]+)\)", text),
        "links elsewhere": sorted(re.findall(r"\]\((https?:[^)]+)\)", text)),
    }


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_a_chinese_page_is_in_step_with_its_english_one_and_each_links_the_other(page):
    english = page.with_name(page.name.replace("_cn.md", ".md"))
    expected, found = in_step(english), in_step(page)
    for kind, things in expected.items():
        assert found[kind] == things, kind
    for one, other in ((page, english), (english, page)):
        assert f"]({other.name})" in one.read_text(encoding="utf-8").splitlines()[0]


def test_every_page_for_users_has_a_chinese_twin_and_a_way_back():
    """The pages about how the project is built and was measured are in English alone."""
    english = {"architecture", "performance", "reliability", "scaling"}
    twins = {page.stem.removesuffix("_cn") for page in CHINESE}
    assert {page.stem for page in PAGES} - twins == english
    for page in (ROOT / "docs").glob("*.md"):
        head = page.read_text(encoding="utf-8").splitlines()[:6]
        readme = "README_cn.md" if page in CHINESE else "README.md"
        assert any(f"](../{readme})" in line for line in head), page.name


def test_the_readme_is_short_and_its_tables_fit_a_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 12 * 1024
    for row in re.findall(r"^\|.*$", text, re.MULTILINE):  # some 8 pixels a character, of 800
        assert len(re.sub(r"\]\([^)]*\)|[\[|]", "", row)) <= 100, row


def test_the_tables_of_how_commands_are_run_hold_nothing_that_no_page_says():
    texts = [command.text for command in COMMANDS]
    for pattern in tables.ELSEWHERE:
        assert any(re.fullmatch(pattern, text) for text in texts), pattern
    for pattern in (*tables.NEEDS, *tables.LEAVES):
        assert any(re.search(pattern, text) for text in texts), pattern
    for pattern, replacement, _ in tables.CHANGES:
        before, texts = texts, [re.sub(pattern, replacement, text) for text in texts]
        assert texts != before, pattern
    for files, pattern, _, _ in tables.IN_THE_CLONE:
        found = list(ROOT.glob(files))
        assert found and all(re.search(pattern, path.read_text()) for path in found), files


def test_forms_and_citation_can_be_read_and_workflow_and_ci_run_the_tests():
    files = [ROOT / "CITATION.cff", *ROOT.glob(".github/*/*.yml")]
    read = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}
    assert {"bug.yml", "tests.yml"} < set(read)
    job = read["tests.yml"]["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"] == ["3.9", "3.11", "3.12", "3.13"]
    assert any(step.get("run", "").startswith("sh run_tests.sh") for step in job["steps"])
    ci = (ROOT / ".ci" / "run").read_text()
    for command in COMMANDS:
        if ".ci/run" in (tables.elsewhere(command.text) or "") and command.text.startswith("sh "):
            assert command.text in ci, command.where
