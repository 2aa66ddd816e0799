"""The pages in docs/: every link leads somewhere, the index names every page, and the commands that they show exist.

A table of any tracked Markdown file has at most `TABLE_COLUMNS` columns of text.
"""

import re
import subprocess
from pathlib import Path

import msgspec
import pytest

from mesh.cli.main import VERBS
from runtime.api.anthropic.types import MessagesBody
from runtime.api.ollama.types import ChatRequest, GenerateRequest, Options
from runtime.api.openai.embeddings import EmbeddingsBody
from runtime.api.openai.types import ChatBody, CompletionBody
from runtime.api.openai_responses.types import ResponsesBody

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
TABLE_COLUMNS = 160
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]*)(#[^)\s]*)?\)")


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in LINK.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor and found.suffix == ".md":
            assert anchor[1:] in headings(found), f"{page.name} links to {target}{anchor}"


def test_tables_stay_under_160_columns() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True)
    too_long = [
        f"{name}:{number} has {len(line)}"
        for name in tracked.stdout.split("\0")[:-1]
        for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1)
        if line.lstrip().startswith("|") and len(line) > TABLE_COLUMNS
    ]
    assert too_long == []


def test_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, f"docs/README.md does not name {page.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist(page: Path) -> None:
    verbs = re.findall(r"(?:^|`|/)repertory ([a-z][a-z-]*)", page.read_text(), re.MULTILINE)
    assert {verb for verb in verbs if verb not in VERBS} == set()


@pytest.mark.parametrize(
    "body",
    [ChatBody, CompletionBody, EmbeddingsBody, ResponsesBody, MessagesBody, ChatRequest, GenerateRequest, Options],
)
def test_pages_of_the_apis_name_every_field(body: type[msgspec.Struct]) -> None:
    pages = (ROOT / "docs" / name for name in ("api.md", "api-others.md", "api-tools.md"))
    marked = re.findall(r"`([^`]+)`", "".join(page.read_text() for page in pages))
    named = {word for text in marked for word in re.findall(r"\w+", text)}
    missing = [field for field in body.__struct_fields__ if field not in named and not field.startswith("guided_")]
    assert missing == []
