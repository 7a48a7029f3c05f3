"""The documentation is run: every command and piece of code in it either runs here or has a stated reason not to."""

from __future__ import annotations

import ast
import email
import email.message
import functools
import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import pytest

from bench import figures
from kvplug.config import Config
from kvplug.engines import SUPPORTED, release

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("kvplug", "shm", "rdma", "adapters", "tests", "bench", "examples")),
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
]
POOL = f"docs-test-{os.getpid()}"

RUN_ELSEWHERE = {
    "./justw demo": "the demo's own test runs it",
    "./justw test": "this is it",
    "./justw test-fast": "these tests are in it",
    "./justw install": "changes the environment that runs this",
    "./justw lint": "tests/unit/test_house.py does what it does",
    "./justw bench": "takes minutes; the benches are collected by it",
    "./justw stress": "the stress test runs it with few kills",
    "pip install": "needs a package index; the wheel is built and looked into below",
    "VLLM_PLUGINS=kvplug vllm serve": "the tests with real engines do it",
    "kvplug agent": "serves until it is stopped; its own tests run it",
    "sglang serve": "the tests with real servers do it",
    "docker run": "there is no docker here",
    "python examples/": "tests/unit/test_examples.py runs them",
}
"""Commands that are not run here, by how they begin, and why. `./justw` recipes are checked to exist all the same."""


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        if not page.exists():
            continue
        fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
        text = page.read_text()
        for match in fence.finditer(text):
            yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


ALL = list(blocks())
PYTHON = [block for block in ALL if block.language == "python"]
SHELL = [block for block in ALL if block.language in ("sh", "console", "bash")]
TOML = [block for block in ALL if block.language == "toml"]


def environment(tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVPLUG_")}
    bin_folder = str(Path(sys.executable).parent)
    clean |= {"XDG_CONFIG_HOME": str(tmp_path), "KVPLUG_POOL": POOL, "KVPLUG_SIZE": "64mib"}
    return clean | {"PATH": bin_folder + os.pathsep + clean.get("PATH", "")}


def run(command: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=240, check=False
    )


def remove_pool(name: str, tmp_path: Path) -> None:
    run(["kvplug", "rm", "--force", "--pool", name], tmp_path)


def test_the_pages_have_something_to_run() -> None:
    assert PYTHON
    assert SHELL
    assert TOML


@pytest.mark.parametrize("block", ALL, ids=str)
def test_every_block_says_its_language(block: Block) -> None:
    assert block.language in ("python", "sh", "bash", "console", "toml", "text"), "```text is for what is not run"


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs_as_printed(block: Block, tmp_path: Path) -> None:
    text, pools = under_own_names(block.text)
    try:
        done = run([sys.executable, "-c", text], tmp_path)
        assert done.returncode == 0, done.stderr
        check_comments(text, done.stdout)
    finally:
        for name in {*pools, POOL}:
            remove_pool(name, tmp_path)


def under_own_names(code: str) -> tuple[str, set[str]]:
    """The code with other names for its pools, and those: who tries the example keeps the pool that it made."""
    pools = set(re.findall(r'KvStore\(\s*"([\w.-]+)"', code))
    for name in pools:
        code = code.replace(f'"{name}"', f'"{POOL}-{name}"')
    return code, {f"{POOL}-{name}" for name in pools}


def test_an_example_that_somebody_runs_is_not_disturbed() -> None:
    for block in PYTHON:
        text, pools = under_own_names(block.text)
        assert set(re.findall(r'KvStore\(\s*"([\w.-]+)"', text)) == pools
        assert all(str(os.getpid()) in name for name in pools)


def check_comments(code: str, output: str) -> None:
    """What a comment behind a top-level print says is what the print prints: `print(x)  # [0]: stored` prints [0]."""
    promised = re.findall(r"print\(.*\)\s+#\s*(\[[^\]]*\])", code)
    lines = output.splitlines()
    assert lines[: len(promised)] == promised if promised else True


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_run_as_printed(block: Block, tmp_path: Path) -> None:
    try:
        run_commands(block, tmp_path)
    finally:
        remove_pool(POOL, tmp_path)


def run_commands(block: Block, tmp_path: Path) -> None:
    for line in block.text.splitlines():
        command = line.split("  #")[0].strip()
        if not command or command.startswith("#"):
            continue
        if command.startswith("./justw "):
            recipe = shlex.split(command)[1]
            shown = subprocess.run(
                [Path(sys.executable).parent / "just", "--show", recipe],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert shown.returncode == 0, f"{command}: {shown.stderr}"
        if any(command.startswith(known) for known in RUN_ELSEWHERE):
            continue
        words = shlex.split(command)
        assert words[0] == "kvplug", f"{block}: nobody runs {command!r}: run it here or give a reason in RUN_ELSEWHERE"
        if "--pool" in words:
            words[words.index("--pool") + 1] = POOL
        if words[1] in ("stat", "rm"):
            make_pool(POOL, tmp_path)
        done = run(words, tmp_path)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def make_pool(name: str, tmp_path: Path) -> None:
    code = f"from kvplug import KvStore; KvStore({name!r}, '64mib').close()"
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", TOML, ids=str)
def test_settings_files_are_taken_as_printed(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    path.write_text(block.text)
    monkeypatch.setenv("KVPLUG_CONFIG", str(path))
    Config()


# ---- tables and links


def settings_table() -> str:
    """README's lines for the settings, made from the schema."""
    shown = {
        "pool": "`u<uid>`",
        "size": "¼ of the memory that the container may use, at most ½ of what it and /dev/shm have left for a pool",
        "min_block": "`16kib`",
        "slab": "`auto`",
        "peers": "",
        "verbs_device": "",
    }
    lines = []
    for name, field in Config.model_fields.items():
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        value = shown.get(name, "" if default is None else f"`{default}`")
        choices = [f"`{choice}`" for choice in get_args(field.annotation) if get_origin(field.annotation) is Literal]
        meaning = f"{' or '.join(choices)}. {field.description}" if choices else field.description
        lines.append(f"| `{name}` | `KVPLUG_{name.upper()}` | {value} | {meaning} |")
    return "\n".join(lines)


def test_readmes_settings_are_the_schemas() -> None:
    lines = [
        line for line in (ROOT / "README.md").read_text().splitlines() if "`KVPLUG_" in line and line.startswith("|")
    ]
    assert "\n".join(lines) == settings_table(), "README should have:\n" + settings_table()
    assert Config.defaults().min_block == 16 * 1024


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.exists()], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


# ---- versions, and what stands beside the sources


def constant(name: str, pattern: str) -> str:
    """The value of the one constant of that name in a file of that name, wherever it lies."""
    (text,) = [
        found for path in ROOT.glob(pattern) for found in re.findall(rf"^{name}.* = (.*)$", path.read_text(), re.M)
    ]
    return str(ast.literal_eval(text))


def test_the_page_of_versions_has_the_codes_numbers() -> None:
    rows = dict(re.findall(r"^\| (\w[\w ]+) \| ([\d.]+) \|", (ROOT / "docs" / "versions.md").read_text(), re.MULTILINE))
    assert rows == {
        "package": constant("__version__", "kvplug/__init__.py"),
        "segment format": constant("FORMAT", "shm/layout.py"),
        "wire protocol": constant("VERSION", "rdma/**/protocol.py"),
        "keys": re.sub(r"\D", "", constant("_MAGIC", "kvplug/**/namespace.py").removesuffix(r"\x00'")),
    }


NOW = [
    *(page for page in PAGES if page.name != "CHANGELOG.md" and page.parent.name != "decisions"),
    *(ROOT / "adapters" / engine / "README.md" for engine in SUPPORTED),
]
"""Pages that say what is; the others tell what was once."""


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_supported_releases_are_those_of_the_table(page: Path) -> None:
    """``vLLM 0.30 to 0.32``, wherever a page says that."""
    for name, found in re.findall(r"(vLLM|SGLang) (\d[\d.]*\d to \d[\d.]*\d)", page.read_text()):
        assert found == str(SUPPORTED[name.lower()]), f"{page}: {name} {found}"


@pytest.mark.parametrize("engine", ["vLLM", "SGLang"])
def test_readmes_table_and_the_engines_page_name_the_supported_releases(engine: str) -> None:
    table = SUPPORTED[engine.lower()]
    words = f"{engine} {table}"
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {words}, CPU |")]
    used = ".".join(map(str, release(table.built[-1])[: table.numbers]))
    assert f"most tests use {used}" in row
    for version in table.mixed:
        assert f"{'.'.join(map(str, release(version)[: table.numbers]))} is run mixed" in row
    assert words in (ROOT / "docs" / f"{engine.lower()}.md").read_text()


def test_the_changelog_begins_with_this_version_and_says_what_drops_the_cache() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    newest = text.split("\n## ")[1]
    assert constant("__version__", "kvplug/__init__.py") in newest.splitlines()[0]
    assert newest.splitlines()[4:].index("### Drops the cache") < newest.splitlines()[4:].index("### Added")
    assert f"pool format {constant('FORMAT', 'shm/layout.py')}" in text


def test_hosted_ci_runs_the_same_command_as_any_other() -> None:
    steps = re.findall(r"^ *- run: (.*)$", (ROOT / ".github" / "workflows" / "ci.yml").read_text(), re.MULTILINE)
    assert steps[-1] == "bash .ci/run"
    assert (ROOT / ".ci" / "run").exists()


def test_an_issue_has_what_doctor_says() -> None:
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert "Output of `kvplug doctor`" in text
    for page in re.findall(r"[\w/]+\.md", text):
        assert (ROOT / page).exists(), page


def test_hooks_run_what_lint_runs() -> None:
    """`just lint`, which the tests run too, has each hook's command."""
    hooks = re.findall(r"entry: \.venv/bin/python (.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    recipe = (ROOT / "Justfile").read_text().split("\nlint: ")[1].split("\n\n")[0]
    assert len(hooks) == recipe.count("{{ py }}") == 3
    for hook in hooks:
        assert "{{ py }} " + hook.removesuffix(" --force-exclude") in recipe, hook


def test_api_pages_are_of_modules_that_exist() -> None:
    (names,) = re.findall(r'^api_modules := "(.*)"$', (ROOT / "Justfile").read_text(), re.MULTILINE)
    assert "kvplug.store" in names.split()
    for name in names.split():
        assert (importlib.import_module(name).__doc__ or "").strip(), name


# ---- decisions

DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
DECISION_PARTS = ["Context", "Measured", "Decision", "Cost"]


def test_decisions_are_numbered_without_gaps_and_listed_in_order() -> None:
    numbers = [int(page.name[:4]) for page in DECISIONS]
    assert numbers == list(range(1, len(numbers) + 1))
    listed = re.findall(r"^\| \[\d{4}\]\((.*?)\) \| (.*) \|$", (DECISIONS[0].parent / "README.md").read_text(), re.M)
    titles = [page.read_text().splitlines()[0].removeprefix(f"# {page.name[:4]}. ") for page in DECISIONS]
    assert listed == [(page.name, title) for page, title in zip(DECISIONS, titles, strict=True)]


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_says_why_what_was_measured_and_what_it_costs(page: Path) -> None:
    parts = re.split(r"^## (.*)$", page.read_text(), flags=re.MULTILINE)
    assert parts[1::2] == DECISION_PARTS
    assert all(len(text.strip()) > 20 for text in parts[2::2]), "no part is empty"


# ---- figures and pictures


def table_rows(page: Path, head: str) -> list[str]:
    """The rows under a table's head, in Markdown."""
    lines = page.read_text().splitlines()
    first = lines.index(head) + 2
    return list(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))


def test_the_table_of_figures_has_those_that_the_bench_prints() -> None:
    """In their order and their words, so that what a run leaves can be put there."""
    rows = [row.split(" | ")[:3] for row in table_rows(ROOT / "docs" / "figures.md", figures.HEAD[0])]
    assert rows == [[f"| {figure.what}", figure.better(), figure.target()] for figure in figures.FIGURES]


def test_every_figure_is_read_alone() -> None:
    names = [figure.what for figure in figures.FIGURES]
    assert len(set(names)) == len(names)
    assert not [name for name in names if re.search(r"\b(the same|of them)\b", name)]


def test_readmes_figures_are_among_them() -> None:
    rows = table_rows(ROOT / "README.md", figures.HEAD[0])
    assert rows
    assert set(rows) <= set(table_rows(ROOT / "docs" / "figures.md", figures.HEAD[0]))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A copy of docs/ that may be changed."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "docs"


def make_pictures(docs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, docs / "images" / "make.py", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_pictures_are_what_their_texts_make() -> None:
    done = make_pictures(ROOT / "docs", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("page", "before", "after", "picture"),
    [
        ("images/overview.txt", "even after kill -9", "or not", "overview.svg"),
        ("figures.md", "| 0.085 |", "| 0.086 |", "first-token.svg"),
    ],
)
def test_a_picture_that_its_text_does_not_make_is_found(
    pictures: Path, page: str, before: str, after: str, picture: str
) -> None:
    text = (pictures / page).read_text()
    assert text.count(before) == 1
    (pictures / page).write_text(text.replace(before, after))
    done = make_pictures(pictures, "--check")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"{picture} is not what make.py makes: python docs/images/make.py"]
    assert make_pictures(pictures).returncode == 0
    assert make_pictures(pictures, "--check").returncode == 0


def test_words_that_are_wider_than_their_box_make_no_picture(pictures: Path) -> None:
    path = pictures / "images" / "overview.txt"
    path.write_text(path.read_text().replace("even after kill -9", "even after all of it was killed by kill -9"))
    done = make_pictures(pictures)
    assert done.returncode != 0
    assert "is wider than its box of 170 pixels" in done.stderr


# ---- the FAQ's messages are those that the code says


@functools.cache
def messages() -> str:
    """Every text in the sources, with … for what is put in when the program runs."""
    found = []
    for folder in ("kvplug", "shm", "rdma", "adapters"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def faq_headings() -> list[str]:
    return re.findall(r"^### `(.*)`$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("heading", faq_headings())
def test_the_faqs_messages_are_said_by_the_code(heading: str) -> None:
    pieces = [piece for piece in re.split("…", heading) if len(piece.strip(" ,;:()")) >= 4]
    assert pieces, "a heading has a piece of text that can be searched for"
    said = messages()
    for piece in pieces:
        assert piece.strip() in said, f"no source says {piece!r}"


def vllm_reasons() -> list[str]:
    """What docs/vllm.md says that the engine's log says, piece by piece."""
    head = "| reason in the log | what to do |"
    text = (ROOT / "docs" / "vllm.md").read_text()
    assert text.count(head) == 2
    rows = [line for part in text.split(head)[1:] for line in part.split("\n\n")[0].splitlines()[2:]]
    return [reason for row in rows for reason in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


@pytest.mark.parametrize("reason", vllm_reasons())
def test_the_reasons_that_turn_kvplug_off_in_vllm_are_said_by_the_code(reason: str) -> None:
    said = messages()
    for piece in reason.split("…"):
        assert piece.strip() in said, f"no source says {piece!r}"


def test_the_counters_in_the_page_on_vllm_are_those_that_there_are() -> None:
    there = set(re.findall(r"`(kvplug_\w+)_total`", (ROOT / "docs" / "vllm.md").read_text()))
    assert there
    source = (ROOT / "adapters" / "vllm" / "metrics.py").read_text()
    counters = {f"kvplug_{name}" for name in re.findall(r'^    "\w+": \(\s*"(\w+)"', source, re.MULTILINE)}
    assert there <= counters | set(re.findall(r'name="(kvplug_\w+)"', source))


def test_a_message_that_nobody_says_would_be_found() -> None:
    assert "this is said by " + "no source of kvplug" not in messages()


# ---- what is installed


def check_index_page(page: email.message.Message) -> None:
    """An index shows README without the checkout: no link leads nowhere there, and nothing else is lost."""
    assert page["Author"]
    assert page["Description-Content-Type"] == "text/markdown"
    assert page["License-Expression"] == "Apache-2.0"
    assert page["Summary"]
    text, readme = str(page.get_payload()), (ROOT / "README.md").read_text()
    assert re.findall(r"\]\((?![a-z]+:|#)[^)]*\)", text) == []
    assert "![" in readme
    assert not re.search(r"!\[|!\w+[^\n]*\(`docs/images", text), "a picture is told in words"
    linked = re.findall(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)", readme)
    assert linked
    for words, path in linked:
        assert words in text
        assert f"`{path}`" in text
    assert len(text.splitlines()) == len(readme.splitlines())
    assert page.get_all("Project-URL", []) == [], "an address that stands there is one that exists"


def test_a_wheel_has_every_source_and_nothing_else(tmp_path: Path) -> None:
    """Built from a copy, since a build leaves folders behind."""
    import zipfile

    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("kvplug", "shm", "rdma", "adapters"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("kvplug-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        check_index_page(email.message_from_bytes(archive.read(metadata)))
    wanted = {"kvplug/" + str(path.relative_to(ROOT / "kvplug")) for path in (ROOT / "kvplug").rglob("*.py")}
    for name in ("shm", "rdma", "adapters"):
        wanted |= {f"kvplug/{name}/" + str(path.relative_to(ROOT / name)) for path in (ROOT / name).rglob("*.py")}
    assert inside == wanted | {"kvplug/py.typed"}
    # The wheel's files come before the editable checkout's, and work without it.
    code = "import kvplug.shm, kvplug.rdma, kvplug.adapters, kvplug.config; print(kvplug.shm.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / "installed" / "kvplug" / "shm" / "__init__.py")


def test_a_source_archive_has_what_it_takes_to_build_and_to_read(tmp_path: Path) -> None:
    """Built from a copy of what git has or would add, without the links: tar would follow none of them."""
    import shutil
    import tarfile

    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("no git here to say what belongs to the checkout")
    files = [name for name in listing.stdout.decode().split("\0") if name and not (ROOT / name).is_symlink()]
    for name in filter(lambda name: (ROOT / name).is_file(), files):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, tmp_path / "copy"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames() if not name.endswith((".pyc", "/"))}
    sources = {
        name for name in files if name.startswith(("kvplug/", "shm/", "rdma/", "adapters/", "docs/", "examples/"))
    }
    beside = {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert sources | beside | {"tests/vectors/keys.json", "tests/vectors/make_keys.py"} <= inside
    assert [name for name in inside if "__pycache__" in name or name.startswith(("bench", "tests/unit", ".ci"))] == []


def test_a_python_started_in_a_checkout_that_is_not_installed_finds_all_of_it() -> None:
    """-S leaves out site-packages, and with them the mapping that an editable installation makes."""
    code = "import sys; sys.path.insert(0, ''); import kvplug.rdma, kvplug.errors; print(kvplug.rdma.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert Path(done.stdout.strip()).resolve() == ROOT / "rdma" / "__init__.py"


@pytest.mark.parametrize("where", ["the checkout", "elsewhere"])
def test_the_checkout_is_importable_from(where: str, tmp_path: Path) -> None:
    """By the links in kvplug/ where the checkout is first on sys.path, by the editable installation elsewhere."""
    code = "import kvplug, kvplug.shm, kvplug.rdma, kvplug.adapters.vllm; print(kvplug.shm.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT if where == "the checkout" else tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert Path(done.stdout.strip()).resolve() == ROOT / "shm" / "__init__.py"
