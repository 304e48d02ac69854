"""What README.md and docs/*.md tell their readers to run, in the order of the pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_ALL = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CHINESE = [page for page in _ALL if page.stem.endswith("_cn")]  # say what the English pages say
PAGES = [page for page in _ALL if page not in CHINESE]

_BLOCK_OR_SPAN = re.compile(r"^ *```(\w*)\n(.*?)^ *```|(?<!`)`([^`]+)`", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"(\w+=\S* )*(python3?|sh|pip|srun|sbatch|tensorboard|visualdl) ")


class Command(NamedTuple):
    page: Path
    line: int  # of the page
    language: str  # sh or python
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def commands(page: Path) -> list[Command]:
    """A page's commands: ``sh`` lines, ``python`` blocks, and those between backticks in text."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in _BLOCK_OR_SPAN.finditer(text):
        language, block, span = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        if span is not None:
            span = " ".join(span.split())
            if _COMMAND.match(span):
                found.append(Command(page, line, "sh", span))
        elif language == "python":
            found.append(Command(page, line, language, block))
        elif language == "sh":
            found += [Command(page, line + n, "sh", words) for n, words in _lines(block)]
    return found


def _lines(block: str):
    number, lines = 1, block.replace("\\\n", "\\\0").splitlines()
    for line in lines:
        command = re.sub(r"(^|\s+)#.*", "", line.replace("\\\0", " ")).strip()
        if command:
            yield number, re.sub(r"\s+", " ", command)
        number += 1 + line.count("\0")


def unmarked(page: Path) -> list[str]:
    blocks = [m.groups()[:2] for m in _BLOCK_OR_SPAN.finditer(page.read_text(encoding="utf-8"))]
    lines = [line for lang, text in blocks if text and not lang for line in text.splitlines()]
    return [line for line in lines if _COMMAND.match(line.strip().removeprefix("$ "))]
