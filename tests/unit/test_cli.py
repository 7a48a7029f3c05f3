"""The `kvplug` command on real pools: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvplug import KvStore, __version__
from kvplug.cli import output
from kvplug.cli.app import COMMANDS
from kvplug.config import Config
from kvplug.errors import PoolNotFoundError
from kvplug.shm.jit import KERNELS
from kvplug.shm.segment import remove_pool, segment_path

POOL = f"cli-test-{os.getpid()}"
KVPLUG = Path(sys.executable).parent / "kvplug"
HOLDER = """
import sys
from kvplug import KvStore
store = KvStore(sys.argv[1], create=False)
print("attached", flush=True)
sys.stdin.read()
"""


def kvplug(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVPLUG_")}
    environment |= {"KVPLUG_POOL": POOL, "KVPLUG_SIZE": "16mib", "XDG_CONFIG_HOME": "/nonexistent", **variables}
    return subprocess.run(
        [KVPLUG, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def pool() -> Iterator[str]:
    """A pool with three blocks in it and nobody attached."""
    store = KvStore(POOL, "16mib")
    keys = np.arange(96, dtype=np.uint8).reshape(3, 32)
    assert (np.asarray(store.put(keys, [np.full(20_000, n, np.uint8) for n in range(3)])) == 0).all()
    store.close()
    yield POOL
    with contextlib.suppress(PoolNotFoundError):
        remove_pool(POOL, force=True)


@pytest.fixture
def holder(pool: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that is attached to the pool."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, pool], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "attached"
    yield process
    process.kill()
    process.communicate()


def rows(output: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}


def test_version_and_help() -> None:
    assert kvplug("--version").stdout == f"kvplug {__version__}\n"
    shown = kvplug("--help")
    assert shown.returncode == 0
    for command in ("doctor", "pools", "stat", "rm", "config"):
        assert command in shown.stdout
        assert kvplug(command, "--help").returncode == 0


def test_without_arguments_it_says_what_there_is() -> None:
    done = kvplug()
    assert (done.returncode, done.stdout) == (2, kvplug("--help").stdout)
    for name, command in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(command.summary)}$", done.stdout, re.MULTILINE), name


WRONG_CALLS = ["frob", "--frob", "stat --frob", "stat more", "stat --pool", "stat --js", "--vers", "a\nb", "rm a\nb"]


@pytest.mark.parametrize("arguments", WRONG_CALLS)
def test_a_wrong_call_is_one_line_and_exit_status_2(arguments: str) -> None:
    """No option can be shortened: what it means could change with a later version."""
    done = kvplug(*arguments.split(" "))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"kvplug: .* \(see `kvplug.* --help`\)\n", done.stderr), done.stderr


def test_a_value_may_begin_with_a_dash() -> None:
    for written in (["--pool", "-x"], ["--pool=-x"]):
        done = kvplug("stat", *written)
        assert done.returncode == 1
        assert "there is no pool '-x'" in done.stderr


IMPORTS = """
import atexit, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
from kvplug.cli import main
main()
"""
NEEDLESS = {"pydantic", "pydantic_settings", "typer", "rich", "prometheus_client", "kvplug.config"}
NEEDLESS_WITH_LIBRARY = {"numba", "asyncio", "inspect", "logging", "decimal", "uuid", "numpy.ma"}
"""numba, which compiles where the package's library is not used, imports all of them."""


@pytest.mark.parametrize("arguments", ["stat", "stat --json", "pools", "pools --json", "rm"])
def test_what_is_called_often_imports_little(arguments: str, pool: str) -> None:
    environment = os.environ | {"KVPLUG_POOL": pool, "XDG_CONFIG_HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *arguments.split()], env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pool in done.stdout
    needless = NEEDLESS | (NEEDLESS_WITH_LIBRARY if KERNELS.library is not None else set())
    assert needless.intersection(done.stderr.split()) == set()


@pytest.mark.parametrize(("arguments", "is_on"), [("pools", False), ("agent --listen nowhere", True)])
def test_only_a_command_that_goes_on_collects_garbage(arguments: str, is_on: bool) -> None:
    code = "import atexit, gc; atexit.register(lambda: print(gc.isenabled())); from kvplug.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split()[-1] == str(is_on)


def test_config_prints_each_value_and_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "kvplug.toml"
    file.write_text('policy = "lru"\n')
    done = kvplug("config", KVPLUG_CONFIG=str(file))
    assert done.returncode == 0
    table = rows(done.stdout)
    assert list(table)[1 : 1 + len(Config.model_fields)] == list(Config.model_fields)
    assert table["size"] == ["size", "16777216", "(16", "MiB)", "environment", "KVPLUG_SIZE"]
    assert table["policy"] == ["policy", "lru", "file", str(file)]
    assert table["verify"] == ["verify", "never", "default"]
    as_json = json.loads(kvplug("config", "--json").stdout)
    assert as_json["size"] == {"value": 16 * 1024**2, "source": "environment KVPLUG_SIZE"}


def test_an_unknown_setting_is_one_line_and_exit_status_1() -> None:
    for command in ("config", "stat", "rm"):
        done = kvplug(command, KVPLUG_SIZ="1gb")
        assert done.returncode == 1, command
        assert done.stderr.startswith(
            "kvplug: unknown setting KVPLUG_SIZ in the environment: did you mean KVPLUG_SIZE?"
        )
        assert ("KVPLUG_POOL" in done.stdout) == (command == "config"), "the other settings are listed all the same"
        assert len(done.stderr.splitlines()) == 1, "no trace"


def test_pools_lists_size_owner_and_use(pool: str, holder: subprocess.Popen[str]) -> None:
    line = rows(kvplug("pools").stdout)[pool]
    assert "0600" in line
    assert line[-2:] == ["in", "use"]
    (found,) = [one for one in json.loads(kvplug("pools", "--json").stdout) if one["name"] == pool]
    assert (found["uid"], found["clients_alive"], found["usable"]) == (os.getuid(), 1, True)
    assert 0 < found["size_bytes"] <= 16 * 1024**2
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert rows(kvplug("pools").stdout)[pool][-1:] == ["unused"], "the dead hold nothing"


def test_pools_says_what_is_wrong_with_a_segment(pool: str) -> None:
    os.truncate(segment_path(pool), 5000)
    (line,) = [line for line in kvplug("pools").stdout.splitlines() if line.startswith(pool)]
    assert "truncated" in line or "bytes" in line
    assert "in use" not in line
    done = kvplug("doctor")
    assert done.returncode == 1, "the pool that is configured can't be used"
    assert "kvplug rm --pool" in done.stdout
    assert kvplug("stat").returncode == 1
    assert kvplug("rm").returncode == 0, "and it can be removed all the same"


def test_stat_prints_every_figure_of_the_pool(pool: str) -> None:
    with KvStore(pool, create=False) as store:
        names = list(store.stats()._fields)
    output = kvplug("stat").stdout
    table = rows(output)
    assert table["sealed_blocks"] == ["sealed_blocks", "3"]
    assert table["size_bytes"][1] == f"{int(table['size_bytes'][1].replace(',', '')):,}"
    assert [name for name in names if name not in output] == []
    figures = json.loads(kvplug("stat", "--pool", pool, "--json").stdout)
    assert list(figures) == names
    assert figures["sealed_blocks"] == 3


def test_stat_of_a_pool_that_is_not_there_makes_none() -> None:
    done = kvplug("stat", "--pool", POOL + "-absent")
    assert done.returncode == 1
    assert f"there is no pool '{POOL}-absent'" in done.stderr
    assert not os.path.exists(segment_path(POOL + "-absent"))


def test_rm_removes_a_pool_that_nobody_uses(pool: str) -> None:
    done = kvplug("rm", "--pool", pool)
    assert done.returncode == 0, done.stderr
    assert not os.path.exists(segment_path(pool))
    assert kvplug("rm", "--pool", pool).returncode == 1, "there is none any more"


def test_rm_refuses_while_a_process_is_attached_unless_forced(pool: str, holder: subprocess.Popen[str]) -> None:
    done = kvplug("rm")
    assert done.returncode == 1
    assert "1 process attached" in done.stderr
    assert os.path.exists(segment_path(pool))
    assert kvplug("rm", "--force").returncode == 0
    assert not os.path.exists(segment_path(pool))
    assert holder.poll() is None, "the process that was attached goes on"


def test_rm_takes_no_path_for_a_name() -> None:
    done = kvplug("rm", "--pool", "../../tmp/x")
    assert done.returncode == 1
    assert "A-Z a-z 0-9" in done.stderr


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"AGENT_LISTEN": "0.0.0.0:0"}, "0.0.0.0"),
        ({"AGENT_LISTEN": "127.0.0.1:{busy}"}, "cannot listen"),
        ({"TLS_CERT": "/nonexistent", "TLS_KEY": "/nonexistent", "TLS_CA": "/nonexistent"}, "tls"),
        ({"DIRECTORY_URL": "http://10.0.0.9"}, "redis://"),
        ({"DIRECTORY_URL": "redis://10.0.0.9"}, "auth_key"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_an_agent_that_can_not_serve_leaves_no_pool(settings: dict[str, str], says: str) -> None:
    name = POOL + "-agent"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        variables = {
            f"KVPLUG_{setting}": value.format(busy=taken.getsockname()[1]) for setting, value in settings.items()
        }
        done = kvplug("agent", "--pool", name, **variables)
    assert done.returncode == 1
    assert says.lower() in done.stderr.lower()
    assert not os.path.exists(segment_path(name))


def test_an_agent_that_can_not_serve_leaves_the_pool_that_was_there(pool: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = kvplug("agent", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert "cannot listen" in done.stderr
    assert os.path.exists(segment_path(pool))


def test_no_name_is_not_the_pool_that_is_configured(pool: str) -> None:
    for command in ("rm", "stat"):
        done = kvplug(command, "--pool", "")
        assert done.returncode == 1
        assert "a pool name is" in done.stderr
    assert os.path.exists(segment_path(pool))


def test_doctor_is_fine_here_and_lists_the_pool(pool: str) -> None:
    done = kvplug("doctor")
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith("kvplug can work here")
    assert f"{pool}: " in done.stdout
    assert json.loads(kvplug("doctor", "--json").stdout)["ok"] is True


def test_doctor_exits_with_1_on_a_fault() -> None:
    done = kvplug("doctor", KVPLUG_SIZE="900tb")
    assert done.returncode == 1
    assert "can't work here until fixed" in done.stdout
    assert json.loads(kvplug("doctor", "--json", KVPLUG_SIZE="900tb").stdout)["ok"] is False


def test_output_in_a_pipe_has_no_colours_and_no_padding(pool: str) -> None:
    for command in ("doctor", "pools", "config", "stat"):
        output = kvplug(command, TERM="xterm-256color", FORCE_COLOR="1").stdout
        assert "\x1b" not in output
        assert all(line == line.rstrip() for line in output.splitlines())


# ---- a pool that is damaged, or another user's ---------------------------------------------------------------------


def test_a_damaged_pool_in_use_is_called_so_and_not_removed(pool: str, holder: subprocess.Popen[str]) -> None:
    path = Path(segment_path(pool))
    with path.open("r+b") as file:
        file.write(b"x" * 64)
    path.chmod(0)
    (line,) = [line for line in kvplug("pools").stdout.splitlines() if line.startswith(pool)]
    assert "in use; " in line
    done = kvplug("doctor")
    assert done.returncode == 1
    assert "1 process attached" in done.stdout
    assert f"stop what is attached, then `kvplug rm --pool {pool}`" in done.stdout
    done = kvplug("rm")
    assert done.returncode == 1
    assert "1 process attached" in done.stderr
    assert path.exists()
    holder.kill()
    holder.wait()
    assert kvplug("rm").returncode == 0


def test_rm_of_another_users_pool_says_who_can(pool: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(segment_path(pool), 65534, -1)
    for arguments in ((), ("--force",)):
        done = kvplug("rm", *arguments)
        assert done.returncode == 1
        assert "belongs to uid 65534" in done.stderr
        assert f"sudo -u '#65534' kvplug rm --pool {pool}" in done.stderr
        assert "another pool name" not in done.stderr
    os.chown(segment_path(pool), 0, -1)


def test_no_command_leaves_anything_for_a_pool_that_is_not_there() -> None:
    name = POOL + "-mistyped"
    for command in ("stat", "rm", "doctor", "pools", "config"):
        kvplug(command, KVPLUG_POOL=name)
    kvplug("rm", "--force", "--pool", name)
    assert [found for found in os.listdir("/dev/shm") if name in found] == []


# ---- where output goes ---------------------------------------------------------------------------------------------


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line of sh in which K is the command and S its exit status, on stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVPLUG_")}
    environment |= {"KVPLUG_POOL": POOL, "KVPLUG_SIZE": "16mib", "XDG_CONFIG_HOME": "/nonexistent", **variables}
    line = line.replace("K ", f"{KVPLUG} ").replace("; S", "; echo status $? >&2")
    return subprocess.run(
        ["sh", "-c", line], env=environment, capture_output=True, timeout=120, check=False, encoding="latin-1"
    )


@pytest.mark.parametrize("command", ["doctor", "config --json", "stat", "--help", "--version"])
def test_output_that_goes_nowhere_is_no_trace(command: str, pool: str) -> None:
    full = shell(f"K {command} >/dev/full; S")
    assert full.stderr.splitlines() == [
        "kvplug: the output can't be written: No space left on device",
        "status 1",
    ]
    both = shell(f"exec 3>&2; (K {command} >&- 2>&- <&-; echo status $? >&3)")
    assert both.stderr.splitlines() == ["status 0"]
    # A reader that is gone before a word is written.
    piped = shell(f"(sleep 0.2; K {command}; S) | true")
    assert piped.stderr.splitlines() == ["status 141"]


def test_a_reader_of_the_first_line_gets_it_and_nobody_complains() -> None:
    first = shell("K doctor | head -1")
    assert (len(first.stdout.splitlines()), first.stderr) == (1, "")


def test_an_error_that_can_not_be_said_is_an_exit_status_all_the_same() -> None:
    assert shell(f"K rm --pool {POOL}-absent 2>/dev/full; exit $?").returncode == 1
    assert shell(f"K rm --pool {POOL}-absent 2>&-; exit $?").returncode == 1


@pytest.mark.parametrize(
    "locale", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_locale_without_the_letters_is_no_trace(locale: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "naïve.toml"
    file.write_text('weights_id = "größer"\npeers = ["a b"]\n')
    for command in ("config", "doctor", "stat"):
        done = shell(f"K {command}", KVPLUG_CONFIG=str(file), **locale)
        assert "Traceback" not in done.stderr
        assert "kvplug" in done.stderr or command == "doctor"
    config = shell("K config", KVPLUG_CONFIG=str(file), **locale)
    assert "naïve.toml" not in config.stderr
    assert "toml" in config.stderr


def on_a_terminal(columns: int, command: str, **variables: str) -> tuple[int, str]:
    """(exit status, all that is shown) of a command on a terminal of its own."""
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    ignored = ("KVPLUG_", "COLUMNS", "LINES", "NO_COLOR", "TERM")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ignored)}
    environment |= {"KVPLUG_POOL": POOL, "KVPLUG_SIZE": "16mib", "XDG_CONFIG_HOME": "/nonexistent", **variables}
    process = subprocess.Popen([KVPLUG, command], env=environment, stdin=far, stdout=far, stderr=far)
    os.close(far)
    shown = b""
    with contextlib.suppress(OSError):  # what reading says at the end
        while piece := os.read(near, 1 << 16):
            shown += piece
    os.close(near)
    return process.wait(120), shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [5, 78, 80])
def test_a_terminal_of_any_width_shows_every_word(columns: int, pool: str) -> None:
    words = {
        "pools": [pool, "0600", "unused"],
        "config": ["lock_timeout_s", "fetch_timeout_s", "environment KVPLUG_SIZE", "16777216 (16 MiB)"],
        "stat": ["sealed_blocks"],
    }
    for command, wanted in words.items():
        status, shown = on_a_terminal(columns, command, TERM="xterm-256color", NO_COLOR="1")
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
        assert status == 0
        assert [word for word in wanted if word not in plain] == [], plain


def test_a_table_lines_up_and_folds_its_last_column_between_words() -> None:
    table = output.table("n", "name", "what", right=("n",))
    table.add_row("7", "größe", output.cell("one two three four five six", "green") + output.cell("-> 十", "cyan"))
    table.add_row("12345", "x", "\x1b[2J")
    assert table.text().splitlines() == [
        "    n  name   what",
        "    7  größe  one two three four five six",
        "              -> 十",
        "12345  x      \\x1b[2J",
    ]
    assert table.least_width == 14 + output.LAST_COLUMN
    assert table.text(30).splitlines()[1:4] == [
        "    7  größe  one two three",
        "              four five six",
        "              -> 十",
    ]
    assert "\x1b[32mone two three\x1b[0m\n" in table.text(30, coloured=True)


def test_colours_are_for_terminals_that_want_them(pool: str) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3\dm")
    assert colour.search(on_a_terminal(200, "doctor", TERM="xterm-256color")[1])
    assert not colour.search(on_a_terminal(200, "doctor", TERM="xterm-256color", NO_COLOR="1")[1])
    assert "\x1b" not in on_a_terminal(200, "doctor", TERM="dumb")[1]


# ---- homes and settings files that can't be used -------------------------------------------------------------------


def as_others() -> None:
    """In a child, before it begins: root gives up its right to read everything."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


HOMES = ("unset", "empty", "not there", "a file", "relative", "closed", "too long", "a link that leads nowhere")


@pytest.mark.parametrize("kind", HOMES)
def test_whatever_the_home_is_like_the_commands_work(kind: str, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / ".config").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    closed.chmod(0)
    homes = {
        "empty": "",
        "not there": str(tmp_path / "nothing"),
        "a file": str(tmp_path / "file"),
        "relative": "some/where",
        "closed": str(closed),
        "too long": "/" + "x" * 5000,
        "a link that leads nowhere": str(tmp_path / "link"),
    }
    ignored = ("KVPLUG_", "XDG_", "HOME", "NUMBA_CACHE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ignored)}
    environment |= {"KVPLUG_POOL": POOL, "KVPLUG_SIZE": "16mib"} | ({"HOME": homes[kind]} if kind in homes else {})
    code = """
        import sys
        from kvplug.cli.app import run
        for command in ("config", "doctor", "pools"):
            try:
                run([command])
            except SystemExit as end:
                assert not end.code, command
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], env=environment, cwd=tmp_path, preexec_fn=as_others,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert "config.toml (not there)" in done.stdout or kind == "unset"
    finally:
        closed.chmod(0o700)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "file", "link"], "nothing was made there"


@pytest.mark.parametrize("named", [True, False])
def test_a_settings_file_that_this_user_may_not_read_is_one_line(named: bool, tmp_path: Path) -> None:
    path = tmp_path / "kvplug" / "config.toml"
    path.parent.mkdir()
    path.touch(0)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KVPLUG_", "XDG_"))}
    environment |= {"KVPLUG_CONFIG": str(path)} if named else {"XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(
        [KVPLUG, "config"], env=environment, preexec_fn=as_others, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch(rf"kvplug: the settings file {path}.* may not read it\. .*\n", done.stderr), done.stderr


def test_an_empty_device_is_an_empty_settings_file_and_a_mark_of_its_encoding_is_none(tmp_path: Path) -> None:
    assert kvplug("config", KVPLUG_CONFIG="/dev/null").returncode == 0
    file = tmp_path / "windows.toml"
    file.write_bytes(b'\xef\xbb\xbfpolicy = "lru"\r\n')
    assert rows(kvplug("config", KVPLUG_CONFIG=str(file)).stdout)["policy"][1] == "lru"
