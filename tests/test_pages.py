"""The pages hold together: links, pictures, commands; Chinese pages say what English ones do."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, load

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/**/*.md")])
TRANSLATED = [page for page in PAGES if page.name.endswith(".zh-CN.md")]
PROGRAMS = {path.name: path for path in ROOT.glob("*/*.py")}


def named(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """A page's text without its blocks of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def code(page):
    """The lines of a page's blocks of code, without the comments behind commands."""
    text = page.read_text()
    fenced = re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (?! *[-*|])(.*)$", text, re.MULTILINE)
    return [re.sub(r" +# .*", "", line) for line in indented], fenced


def commands():
    """(page, what follows python) for every command on the English pages that starts a program."""
    for page in PAGES:
        if page not in TRANSLATED:
            for line in code(page)[0]:
                for command in re.split(r" && |; ", line):
                    if found := re.match(r"\S*python3? (?=\S*\.py\b)(.*)", command):
                        yield page, found[1]


def anchor(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_pictures_resolve(page):
    found = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose(page))
    for target in found + re.findall(r"<img[^>]*\ssrc=\"([^\"]+)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if fragment and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), target
        elif fragment:
            line = int(fragment.removeprefix("L"))
            assert line <= len(file.read_text().splitlines()), target
        if file.suffix == ".md" and file.with_suffix(".zh-CN.md").exists() and page in TRANSLATED:
            assert file.name == page.name.replace(".zh-CN", ""), f"{target}: there is a Chinese one"


@pytest.mark.parametrize("command", sorted({c for _, c in commands()}))
def test_options_in_commands_are_those_of_the_programs(command):
    """Names in capitals stand for what a reader has; a launcher's argument is a command, too."""
    name, *options = shlex.split(command)
    if name.endswith("machines.py"):
        place = options.index("--index") + 2
        name, *options = options[place:]
    if name.endswith("cpu.py") and options[0].endswith(".py"):
        name, *options = options
    if name == "SCRIPT" or name.endswith("cpu.py"):
        return
    path = PROGRAMS[name.split("/")[-1]]
    if "/" in name:
        assert (ROOT / name) == path, name
    if path in SCRIPTS.values():
        if "--resume" in options:
            where = options.index("--resume")
            del options[where : where + 2]
        load(path).parse_args([option for option in options if option not in ("[OPTIONS]",)])
    else:
        source = path.read_text()
        for option in options:
            if option.startswith("--"):
                assert f'"{option}"' in source, option


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({c for _, c in commands() if "synthetic" in c}))
def test_commands_that_need_no_download_run(command, tmp_path):
    name, *options = shlex.split(command)
    path = PROGRAMS[name.split("/")[-1]]
    words = [sys.executable, path, *options, "--log_dir", tmp_path]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "Test accuracy" in done.stdout


@pytest.mark.parametrize("page", TRANSLATED, ids=named)
def test_chinese_page_has_what_the_english_one_has(page):
    english = page.with_name(page.name.replace(".zh-CN", ""))
    picture = r"(?:!\[[^\]]*\]\(|<img[^>]*\ssrc=\")([^)\s\"]+)"
    for pattern in (r"^(#+) ", picture, r"\]\((?!https?:)([^)#\s]+)"):
        ours, theirs = (re.findall(pattern, prose(p), re.MULTILINE) for p in (page, english))
        ours = [re.sub(r"(\.zh-CN)?\.(md|png)$", r".\2", found) for found in ours]
        theirs = [re.sub(r"(\.zh-CN)?\.md$", ".md", found) for found in theirs]
        assert sorted(ours) == sorted(theirs)
    for found in re.findall(picture, prose(page)):
        ours = re.sub(r"(\.zh-CN)?\.png$", ".zh-CN.png", found)
        assert found == ours or not (page.parent / ours).exists(), "there is a Chinese one"
    tables = [re.findall(r"^(\|.*)\|$", prose(p), re.MULTILINE) for p in (page, english)]
    assert [row.count("|") for row in tables[0]] == [row.count("|") for row in tables[1]]
    assert code(page) == code(english)


def test_every_page_is_translated_and_reached():
    english = {page for page in PAGES if page not in TRANSLATED}
    assert {page.with_suffix(".zh-CN.md") for page in english} == set(TRANSLATED)
    reached, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop().resolve()
        if page not in reached:
            reached.add(page)
            targets = re.findall(r"\]\((?!http)([^)#\s]+\.md)", prose(page))
            left += [page.parent / target for target in targets]
    assert {page.resolve() for page in PAGES} <= reached
