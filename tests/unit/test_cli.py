"""The `kvplug` command on real pools: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvplug import KvStore, __version__
from kvplug.config import Config
from kvplug.errors import PoolNotFoundError
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


@pytest.fixture(scope="module", autouse=True)
def no_lock_files_left() -> Iterator[None]:
    """The command never deletes a name's lock file; of these names nobody else knows."""
    yield
    for path in Path("/dev/shm").glob(f"kvplug.{POOL}*.lock"):
        path.unlink()


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


def test_an_unknown_command_is_refused() -> None:
    assert kvplug("frobnicate").returncode == 2


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
    assert rows(kvplug("pools").stdout)[pool][-3:] == ["not", "in", "use"], "the dead hold nothing"


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
        names = [field.name for field in dataclasses.fields(store.stats())]
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
    assert "can't work here until mended" in done.stdout
    assert json.loads(kvplug("doctor", "--json", KVPLUG_SIZE="900tb").stdout)["ok"] is False


def test_output_in_a_pipe_has_no_colours_and_no_padding(pool: str) -> None:
    for command in ("doctor", "pools", "config", "stat"):
        output = kvplug(command, TERM="xterm-256color").stdout
        assert "\x1b" not in output
        assert all(line == line.rstrip() for line in output.splitlines())
