# SPDX-License-Identifier: Apache-2.0
"""What the documentation names is there, and what it shows runs."""

import importlib
import importlib.util
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PLACES = ("ospec_jax/", "tests/", "docs/", "configs/", "notebooks/", "tools/")
MOVED = ROOT / "CHANGELOG.md"
"""Names what is no more."""

TOOL = runpy.run_path(str(ROOT / "tools" / "make_cli_page.py"))
SHARED_FLAGS = [
    flag for group in TOOL["GROUPS"] for flag in TOOL["shared_flags"](group)
]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_blocks(text: str) -> str:
    """Prose, without what stands between fences."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Headings of a page, as links name them."""
    headings = re.findall(
        r"^#+ (.*)$", without_blocks(page.read_text()), flags=re.MULTILINE
    )
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {word.replace(" ", "-") for word in words}


def resolve(name: str):
    """The module, or the thing in it, that a dotted name stands for."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            fields = getattr(found, "__dataclass_fields__", {})
            found = fields[part] if part in fields else getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text()))
    for link in links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), link
        if anchor:
            assert anchor in anchors(place), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`([\w./-]+)`", without_blocks(page.read_text())):
        if name.startswith(PLACES) and page != MOVED:
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_that_are_given_import(page):
    names = re.findall(r"`(ospec_jax(?:\.\w+)+)", without_blocks(page.read_text()))
    for name in names:
        if page != MOVED:
            resolve(name)


def test_modules_that_moved_are_where_the_changelog_says():
    rows = re.findall(
        r"^\| `(ospec_jax[\w.]+)` \| (`ospec.*) \|$", MOVED.read_text(), re.M
    )
    assert len(rows) > 30
    for before, now in rows:
        for name in re.findall(r"`([\w.]+)`", now):
            importlib.import_module(name)
        # A room may have the name of a module that moved into it.
        is_room = (ROOT / before.replace(".", "/")).is_dir()
        assert is_room or importlib.util.find_spec(before) is None, before


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9000


def test_the_map_of_the_package_is_right():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^ospec_jax/\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    inside, _, outside = block[1].partition("configs/ ")
    names = re.findall(r"^  ((?:[\w/.]+ )+)", inside, re.MULTILINE)
    for name in " ".join(names).split():
        assert (ROOT / "ospec_jax" / name).exists(), name
    for name in re.findall(r"^([\w/]+)", "configs/ " + outside, re.MULTILINE):
        assert (ROOT / name).exists(), name

    rooms = {path.parent.name for path in ROOT.glob("ospec_jax/*/__init__.py")}
    assert rooms <= {name.split("/")[0] for name in " ".join(names).split()}


def test_floors_are_those_of_the_architecture():
    floors = runpy.run_path(str(ROOT / "tests" / "test_architecture.py"))["FLOORS"]
    text = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    told = [set(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows]
    assert told == [set(rooms) for rooms in floors]


def test_modules_of_the_rooms_exist():
    text = (ROOT / "docs" / "design.md").read_text()
    section = text.partition("## Rooms\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)
    assert len(rows) > 10
    for room, modules in rows:
        for name in set(re.findall(r"`(\w+)`", modules)) - {"ospec"}:
            place = ROOT / "ospec_jax" / room / name
            assert place.is_dir() or place.with_suffix(".py").exists(), place


def test_the_command_line_page_is_that_of_the_code():
    """Else run tools/make_cli_page.py."""
    text = TOOL["PAGE"].read_text()
    assert text == TOOL["whole_page"](text)


@pytest.mark.parametrize("command", TOOL["COMMANDS"])
def test_every_command_and_flag_says_what_it_is(command):
    function = TOOL["COMMANDS"][command]
    assert TOOL["summary_of"](function)
    by_hand = TOOL["PAGE"].read_text().partition(TOOL["MARKER"])[0]
    assert f"`ospec {command}" in by_hand
    assert TOOL["EXAMPLES"][command].startswith(f"ospec {command}")
    for flag in [*TOOL["own_flags"](function), *SHARED_FLAGS]:
        assert flag.text, flag.name


@pytest.mark.parametrize("command", ["generate", "replay", "distill"])
def test_flags_are_those_that_the_command_prints(command, capsys, monkeypatch):
    """The page reads signatures itself; here they are held against the parser."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("sys.argv", ["ospec", command, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module("ospec_jax.cli").main()
    printed = set(re.findall(r"(?<![\w-])--[\w-]+", capsys.readouterr().out))

    function = TOOL["COMMANDS"][command]
    flags = list(TOOL["own_flags"](function))
    if TOOL["has_shared_flags"](function):
        flags += SHARED_FLAGS
    names = {name for flag in flags for name in flag.name.split(", ")}
    assert {name for name in names if name.startswith("--")} <= printed


def test_messages_name_flags_that_there_are():
    flags = [*SHARED_FLAGS]
    for function in TOOL["COMMANDS"].values():
        flags += TOOL["own_flags"](function)
    known = {name for flag in flags for name in flag.name.split(", ")}
    known |= {"--help", "--version", "--tyro"}

    # Those of other programs.
    files = (ROOT / "ospec_jax").rglob("*.py")
    others = ("_platform.py", "native.py", "hub.py", "rows.py")
    text = "\n".join(file.read_text() for file in files if file.name not in others)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text))
    assert len(named) > 30
    assert named - known == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_are_shown_have_these_flags(page):
    if page == MOVED:
        return
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in "\n".join(blocks).splitlines():
        shown = re.search(r"(?:^|[=\d] )ospec ([\w-]+)(.*)", line)
        if shown is None or shown[1] not in TOOL["COMMANDS"]:
            assert shown is None, line
            continue
        function = TOOL["COMMANDS"][shown[1]]
        flags = list(TOOL["own_flags"](function))
        if TOOL["has_shared_flags"](function):
            flags += SHARED_FLAGS
        known = {name for flag in flags for name in flag.name.split(", ")}
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown[2]))
        assert named <= known | {"--help"}, line


def test_the_families_are_listed():
    from ospec_jax.drafters.registry import FAMILIES

    text = (ROOT / "docs" / "drafts.md").read_text()
    assert set(FAMILIES) <= set(re.findall(r"^\| `([\w]+)` \|", text, re.MULTILINE))


def test_the_learners_and_losses_are_listed():
    from ospec_jax.learners.losses import LOSSES
    from ospec_jax.learners.registry import LEARNER_NAMES

    text = (ROOT / "docs" / "learners.md").read_text()
    cells = re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
    listed = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert {*LEARNER_NAMES, *LOSSES} <= listed


@pytest.mark.filterwarnings("ignore:the mean acceptance length")
def test_the_check_of_an_extension_runs(capsys):
    text = (ROOT / "docs" / "extending.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(block, "extending.md", "exec"), {})
    assert float(capsys.readouterr().out) >= 1


@pytest.mark.slow
def test_the_first_pages_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    try:
        exec(compile(block, "README.md", "exec"), {})
    except FileNotFoundError as error:
        pytest.skip(f"SmolLM2 is neither here nor to be downloaded: {error}")
    assert (tmp_path / "my-draft").is_dir()
    assert len(capsys.readouterr().out) > 20
