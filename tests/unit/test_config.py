"""Settings: environment over file over defaults, nothing unknown, and every error says value, source and remedy."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug import config as settings
from kvplug import hostmem, layers
from kvplug.config import Config, explain, load
from kvplug.errors import ConfigError
from kvplug.sizes import format_size, parse_size

GIB = 1024**3
MIB = 1024**2


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("KVPLUG_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))


def write_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "xdg" / "kvplug" / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---- sizes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("30gb", 30 * 1000**3),
        ("512mib", 512 * 1024**2),
        ("65536", 65536),
        (65536, 65536),
        ("16kib", 16384),
        ("16 KiB", 16384),
        ("1.5gb", 1_500_000_000),
        ("0.5kib", 512),
        ("2tb", 2 * 1000**4),
        ("1tib", 1024**4),
        ("7b", 7),
        (" 8mb ", 8_000_000),
        ("0", 0),
    ],
)
def test_sizes_are_read_by_their_units(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("30g", "30gb (powers of 1000) or 30gib (powers of 1024)"),
        ("30 gigs", "unknown unit 'gigs'"),
        ("lots", "such as 30gb"),
        ("", "such as 30gb"),
        ("-1gb", "such as 30gb"),
        (-1, "negative"),
        ("0.3b", "not a whole number of bytes"),
        ("1e9", "such as 30gb"),
        ("99999999tb", "2**62"),
        (True, "true or false"),
        ("٣gb", "such as 30gb"),
    ],
)
def test_what_is_no_size_is_refused_with_what_to_write(text: str | int, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert says in str(caught.value)


@given(st.integers(0, 2**62))
def test_plain_bytes_come_back_as_they_are(nbytes: int) -> None:
    assert parse_size(str(nbytes)) == parse_size(nbytes) == nbytes


@given(st.integers(0, 2**62))
def test_a_printed_size_is_within_five_percent_and_can_be_read_again(nbytes: int) -> None:
    text = format_size(nbytes)
    assert nbytes >= 1000 * 1024**4 or len(text.split()[0]) <= len("1023.9")
    assert abs(float(text.split()[0]) * parse_size("1" + text.split()[1].lower()) - nbytes) <= 0.05 * nbytes


def test_sizes_are_printed_for_people() -> None:
    assert [format_size(n) for n in (0, 300, 1024, 64 * 1024**2, 6318718976, 2**40, -1024)] == [
        "0 B",
        "300 B",
        "1 KiB",
        "64 MiB",
        "5.9 GiB",
        "1 TiB",
        "-1 KiB",
    ]


# ---- where a value comes from


def test_environment_goes_over_file_and_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(tmp_path, 'size = "64mib"\npolicy = "lru"\nquarantine_grace_s = 7\n')
    monkeypatch.setenv("KVPLUG_SIZE", "128mib")
    config = load(quarantine_grace_s=9)
    assert (config.size, config.policy, config.quarantine_grace_s, config.verify) == (128 * 1024**2, "lru", 9, "never")
    sources = {setting.name: setting.source for setting in explain()[0]}
    assert sources["size"] == "environment KVPLUG_SIZE"
    assert sources["policy"] == f"file {path}"
    assert sources["verify"] == "default"
    assert list(sources) == list(Config.model_fields), "every setting is explained, in the schema's order"


def test_the_names_of_the_layers_are_those_of_the_schema() -> None:
    assert tuple(Config.model_fields) == layers.NAMES


@pytest.mark.parametrize("given", [None, "given", "", "a/b"])
@pytest.mark.parametrize("variable", ["", "env", ".env"])
@pytest.mark.parametrize("text", ["", 'pool = "file"', "pool = 3", 'pool = "a b"', "siez = 1", "pool = "])
def test_commands_that_need_the_pools_name_alone_get_the_same_one(
    given: str | None, variable: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the same error."""
    write_file(tmp_path, text)
    monkeypatch.setenv("KVPLUG_POOL", variable)
    said = []
    for way in (lambda: load(pool=given).pool, lambda: layers.pool_name(given)):
        try:
            said.append(("name", way()))
        except ConfigError as error:
            said.append(("error", str(error)))
    assert said[0] == said[1]


def test_another_setting_that_does_not_fit_does_not_hide_the_pools_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPLUG_SIZE", "30g")
    monkeypatch.setenv("KVPLUG_POOL", "mine")
    assert layers.pool_name() == "mine"
    monkeypatch.setenv("KVPLUG_POLL", "other")
    with pytest.raises(ConfigError, match="did you mean KVPLUG_POOL"):
        layers.pool_name()


def test_every_setting_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "pool": "p-1",
        "size": "64mib",
        "verify": "always",
        "policy": "fifo",
        "persist": "until-last-exit",
        "lock_timeout_s": "0.25",
        "min_block": "32kib",
        "slab": "4mib",
        "prefault": "false",
        "quarantine_grace_s": "2.5",
        "pin_budget_share": "0.25",
        "reserve_budget_share": "0.75",
        "store_hold_share": "0.1",
        "weights_id": "llama@1",
        "trust_mm_ids": "1",
        "unsupported_engine_ok": "yes",
        "cuda": "on",
        "agent_listen": "10.0.0.7:9411",
        "agent_advertise": "[2001:db8::7]:9411",
        "auth_key": "only-for-tests-of-kvplug",
        "tls_cert": "cert.pem",
        "tls_key": "key.pem",
        "tls_ca": "ca.pem",
        "lease_s": "5",
        "peer_timeout_s": "0.5",
        "peer_connections": "2",
        "data_path": "tcp",
        "verbs_binding": "ibverbs",
        "verbs_device": "mlx5_0, mlx5_1",
        "agent_pin_share": "0.1",
        "cache_node": "true",
        "peers": "10.0.0.8:9410, [::1]:9410",
        "directory_url": "redis://:only-for-tests@10.0.0.9",
        "directory_ttl_s": "3",
        "directory_timeout_s": "0.01",
        "fetch_timeout_s": "0.7",
    }
    assert values.keys() == Config.model_fields.keys(), "a new setting has its line here"
    defaults = load()
    for name, value in values.items():
        monkeypatch.setenv(f"KVPLUG_{name.upper()}", value)
    config = load()
    same = [name for name in values if getattr(config, name) == getattr(defaults, name)]
    assert not same, f"the environment did not change {same}"
    assert (config.slab, config.prefault) == (4 * 1024**2, False)


def test_a_secret_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by what lists the settings, nor by an error about it, nor by the settings' own text."""
    monkeypatch.setenv("KVPLUG_AUTH_KEY", "only-for-tests-of-kvplug")
    monkeypatch.setenv("KVPLUG_DIRECTORY_URL", "redis://:only-for-tests@10.0.0.9")
    said = [repr(load()), str(load())]
    said += [text for one in explain()[0] for text in (one.text, str(one.value), repr(one))]
    monkeypatch.setenv("KVPLUG_AUTH_KEY", "only-for-tests")
    with pytest.raises(ConfigError) as caught:
        load()
    assert "16 to 4096 characters" in str(caught.value)
    assert "14" not in str(caught.value), "nor its length"
    assert not [text for text in (*said, str(caught.value)) if "only-for-tests" in text]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AUTHKEY", "hunter2"),
        ("DIRECTORYURL", "redis://u:hunter2@h"),
        ("AUTH_KEY", "hunter2"),
        ("AUTH_KEY", "hunter2" * 600),
        ("DIRECTORY_URL", "http://u:hunter2@h"),
        ("DIRECTORY_URL", "redis://u:hunter2@h:port"),
        ("TLS_KEY", "hunter2"),
    ],
)
def test_a_secret_that_is_misspelt_or_does_not_fit_is_not_quoted(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the environment and from the file, by what loads the settings and by what lists them."""
    monkeypatch.setenv(f"KVPLUG_{name}", value)
    said = []
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            load()
        said += [str(caught.value), repr(explain())]
        assert explain()[1], "and the list says that something is wrong"
        monkeypatch.delenv(f"KVPLUG_{name}", raising=False)
        write_file(tmp_path, f'{name.lower()} = "{value}"\n')
    assert not [text for text in said if "hunter2" in text]


def test_the_smallest_sizes_that_the_message_names_make_a_pool() -> None:
    from kvplug.shm.layout import Geometry

    least = Config(size="2mib")
    Geometry.plan(least.size, min_block=least.min_block, slab_bytes=least.slab)
    for slab in ("64kib", "16kib"):
        least = Config(size="1mib", slab=slab)
        Geometry.plan(least.size, min_block=least.min_block, slab_bytes=least.slab)
    with pytest.raises(ConfigError, match=r"smallest size .* is \d+ bytes") as caught:
        Geometry.plan(1 << 20)
    told = int(str(caught.value).split(" is ")[-1].split()[0])
    Geometry.plan(told)
    with pytest.raises(ConfigError):
        Geometry.plan(told - 1)


def test_what_is_wrong_keeps_no_sound_setting_from_being_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path, 'policy = "lru"\nsiez = 1\nslab = 65536\nmin_block = 131072\n')
    monkeypatch.setenv("KVPLUG_VERIFY", "sometimes")
    monkeypatch.setenv("KVPLUG_PIN_BUDGET_SHARE", "7")
    settings, wrong = explain()
    assert {one.name: one.value for one in settings}["policy"] == "lru"
    left_out = Config.model_fields.keys() - {one.name for one in settings}
    assert left_out == {"verify", "pin_budget_share", "slab", "min_block"}
    assert len(wrong) == 4, wrong
    for part in ("'siez'", "'sometimes'", "pin_budget_share = '7'", "slab (65536 bytes) is not a multiple"):
        assert [text for text in wrong if part in text], part


@pytest.mark.parametrize(
    "address", ["10.0.0.7", ":9410", "host:", "host:port", "host:99999", "host:٣", "a:1;b:2", "http://a:1", "a b:1"]
)
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ConfigError, match="is not host:port"):
        Config(agent_listen=address)


def test_peers_are_addresses_between_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPLUG_PEERS", " a:1,b:2 ,")
    assert load().peers == ("a:1", "b:2")
    assert {one.text for one in explain()[0] if one.name == "peers"} == {"a:1, b:2"}
    assert Config(peers=("a:1",)).peers == ("a:1",)
    with pytest.raises(ConfigError, match="'b' is not host:port"):
        Config(peers=("a:1", "b"))


def test_tls_is_whole_or_not_there() -> None:
    with pytest.raises(ConfigError, match="only tls_cert set"):
        Config(tls_cert="cert.pem")


def test_a_variable_set_to_nothing_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPLUG_POLICY", "")
    assert load().policy == "tail_first"


def test_kvplug_config_names_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path, 'policy = "lru"\n')
    other = tmp_path / "other.toml"
    other.write_text('policy = "fifo"\n')
    monkeypatch.setenv("KVPLUG_CONFIG", str(other))
    assert load().policy == "fifo"


def test_without_a_home_there_is_no_file_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/nonexistent")
    assert load().policy == "tail_first"


@pytest.mark.parametrize(
    "variable",
    [
        "KVPLUG_ENABLE",
        "KVPLUG_FAILPOINT",
        "KVPLUG_KERNELS",
        "KVPLUG_TEST_LIBRARY",
        "KVPLUG_TEST_SEED",
        "KVPLUG_SERVICE_HOST",
        "KVPLUG_PORT_8000_TCP_ADDR",
        "KVPLUG_API_SERVICE_PORT",
    ],
)
def test_what_is_no_setting_but_known_is_left_alone(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "x")
    load()


# ---- what does not fit


def test_all_that_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPLUG_SIZE", "30g")
    monkeypatch.setenv("KVPLUG_POLICY", "newest")
    with pytest.raises(ConfigError, match=r"'30g'.*; and .*'newest'"):
        load()
    monkeypatch.setenv("KVPLUG_SIZ", "1gb")
    monkeypatch.setenv("KVPLUG_POLIC", "lru")
    with pytest.raises(ConfigError, match=r"KVPLUG_SIZ .*; and .*KVPLUG_POLIC "):
        load()


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("KVPLUG_SIZ", "1gb", ["KVPLUG_SIZ ", "did you mean KVPLUG_SIZE?"]),
        ("KVPLUG_size", "1gb", ["KVPLUG_size", "did you mean KVPLUG_SIZE?"]),
        ("KVPLUG_QUUX", "1", ["KVPLUG_QUUX", "the known ones are KVPLUG_POOL"]),
        ("KVPLUG_SIZE", "30g", ["'30g'", "environment KVPLUG_SIZE", "30gib"]),
        ("KVPLUG_SIZE", "3", ["'3'", "environment KVPLUG_SIZE", "at least 2mib"]),
        ("KVPLUG_VERIFY", "sometimes", ["'sometimes'", "environment KVPLUG_VERIFY", "'never' or 'always'"]),
        ("KVPLUG_LOCK_TIMEOUT_S", "nan", ["lock_timeout_s", "environment KVPLUG_LOCK_TIMEOUT_S"]),
        ("KVPLUG_LOCK_TIMEOUT_S", "0", ["greater than 0"]),
        ("KVPLUG_POOL", "../x", ["'../x'", "A-Z a-z 0-9"]),
        ("KVPLUG_POOL", ".x", ["'.x'", "does not start with a dot"]),
        ("KVPLUG_POOL", "x\n", ["A-Z a-z 0-9"]),
        ("KVPLUG_POOL", "p" * 65, ["1 to 64"]),
        ("KVPLUG_PIN_BUDGET_SHARE", "1.5", ["less than or equal to 1"]),
        ("KVPLUG_MIN_BLOCK", "48kib", ["power of two", "32768 or 65536"]),
        ("KVPLUG_PREFAULT", "maybe", ["'maybe'", "environment KVPLUG_PREFAULT"]),
        ("KVPLUG_CONFIG", "/nonexistent/kvplug.toml", ["/nonexistent/kvplug.toml", "KVPLUG_CONFIG", "does not exist"]),
    ],
)
def test_an_error_from_the_environment_says_value_source_and_remedy(
    variable: str, value: str, says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        load()
    for part in says:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value), "one line, fit for a log"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("siez = 1", ["'siez'", "did you mean size?"]),
        ("[kvplug]\nsize = 1", ["'kvplug'", "the known ones are pool"]),
        ('size = "30g"', ["'30g'", "file "]),
        ("size = true", ["true or false"]),
        ("size = [1]", ["[1]", "file "]),
        ("pool = 3", ["setting pool = 3", "file "]),
        ("size = ", ["can't be used", "TOML"]),
        ("slab = 65536\nmin_block = 131072", ["slab (65536 bytes) is not a multiple of min_block (131072 bytes)"]),
    ],
)
def test_an_error_from_the_file_says_value_source_and_remedy(text: str, says: list[str], tmp_path: Path) -> None:
    path = write_file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load()
    for part in says:
        assert part in str(caught.value)
    assert str(path) in str(caught.value) or "don't go together" in str(caught.value)


def test_a_binary_file_is_refused_and_not_a_crash(tmp_path: Path) -> None:
    write_file(tmp_path, "").write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(ConfigError, match="can't be used"):
        load()


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (Path.mkdir, "it is a folder"),
    "a link that leads nowhere": (lambda path: path.symlink_to("/nonexistent/x"), "a symbolic link that leads nowhere"),
    "a link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "a pipe": (os.mkfifo, "not a regular file"),
    "not UTF-8": (lambda path: path.write_bytes(b'pool = "\xff"'), "not UTF-8 text (byte 8 is 0xff)"),
    "not TOML": (lambda path: path.write_text("size: 1gb"), "one `name = value` a line"),
    "huge": (lambda path: path.write_bytes(b"#" * (1 << 21)), "larger than 1 MiB"),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", FILES)
def test_a_settings_file_that_can_not_be_used_says_why(
    kind: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_file(tmp_path, "")
    path.unlink()
    make, says = FILES[kind]
    make(path)
    if named:
        monkeypatch.setenv("KVPLUG_CONFIG", str(path))
    with pytest.raises(ConfigError) as caught:
        load()
    assert f"the settings file {path}" in str(caught.value)
    assert says in str(caught.value)
    assert explain()[1] == [str(caught.value)]
    assert len(explain()[0]) == len(Config.model_fields)


def test_a_file_of_a_user_that_is_not_there_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvplug.adapters.sglang.flags import parse_settings

    monkeypatch.setenv("KVPLUG_CONFIG", "~no-such-user/kvplug.toml")
    with pytest.raises(ConfigError, match=r"~no-such-user/kvplug\.toml, named by KVPLUG_CONFIG, does not exist"):
        load()
    with pytest.raises(ConfigError, match=r"@~no-such-user/kvplug\.json: the file can't be read"):
        parse_settings("@~no-such-user/kvplug.json")


def test_an_unknown_argument_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="did you mean size"):
        load(sise="1gb")
    with pytest.raises(ConfigError, match="given in the code"):
        Config(size="1")


# ---- what a Config is


def test_a_config_cannot_be_changed_but_another_made_and_checked() -> None:
    config = load(pool="a", size="64mib")
    with pytest.raises(Exception, match="frozen"):
        config.pool = "b"
    other = config.with_changes(pool="b", size=None)
    assert (config.pool, other.pool, other.size) == ("a", "b", 64 * 1024**2)
    with pytest.raises(ConfigError):
        config.with_changes(pool="b/c")


def test_a_config_travels_to_another_process_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(pool="a", size="64mib")
    sent = pickle.dumps(config)
    monkeypatch.setenv("KVPLUG_POOL", "other")
    assert pickle.loads(sent) == config


def test_the_default_pool_is_the_users_own() -> None:
    assert load().pool == f"u{os.getuid()}"


def test_the_default_size_is_a_quarter_of_memory_and_half_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(memory: int, shm: hostmem.ShmSpace | None, used: int = 0) -> int:
        monkeypatch.setattr(hostmem, "memory", lambda _="/": hostmem.Memory(memory, used, "test"))
        monkeypatch.setattr(hostmem, "shm_space", lambda _="": shm)
        return settings.default_size_bytes()

    shm = hostmem.ShmSpace(16 * GIB, 15 * GIB)
    assert machine(16 * GIB, shm) == 4 * GIB
    assert machine(16 * GIB, shm, used=15 * GIB) == GIB // 2 - 32 * MIB, "64 MiB of memory stay free"
    assert machine(16 * GIB, hostmem.ShmSpace(16 * GIB, 2 * GIB)) == GIB - 8 * MIB, "16 MiB of /dev/shm stay free"
    assert machine(16 * GIB, hostmem.ShmSpace(0, 0)) == 4 * GIB, "a tmpfs without a limit"
    assert machine(16 * GIB, None) == 4 * GIB, "no /dev/shm: the size is still one, the pool says what is missing"
    assert machine(0, None) > 0
    assert machine(0, hostmem.ShmSpace(64 * MIB, 28 * MIB)) == 6 * MIB


@given(st.integers(0, 2**40), st.integers(0, 2**41), st.integers(0, 2**40), st.integers(0, 2**40))
def test_the_default_size_fits_wherever_any_pool_does(limit: int, used: int, total: int, free: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostmem, "memory", lambda _="/": hostmem.Memory(limit, used, "test"))
        patch.setattr(hostmem, "shm_space", lambda _="": hostmem.ShmSpace(total, min(free, total)))
        room, size = hostmem.room(), settings.default_size_bytes()
        assert room is None or room.fits(size) or room.nbytes < 2 * MIB
        assert Config().size == size


# ---- how much memory there is: trees of files as kernels lay them out


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:   8388608 kB\n"


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    found = hostmem.memory(tree(tmp_path, {"proc/meminfo": MEMINFO}))
    assert (found.limit_bytes, found.used_bytes) == (16 * GIB, 8 * GIB)


def test_the_lowest_limit_on_the_way_up_counts_in_version_2(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/pods/one/container\n",
        "sys/fs/cgroup/pods/one/container/memory.max": "max\n",
        "sys/fs/cgroup/pods/one/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/pods/one/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/pods/one/memory.stat": f"anon 5\ninactive_file {1 * GIB}\n",
        "sys/fs/cgroup/pods/memory.max": f"{8 * GIB}\n",
    }
    found = hostmem.memory(tree(tmp_path, files))
    assert (found.limit_bytes, found.used_bytes) == (4 * GIB, 2 * GIB)
    assert found.source.endswith("pods/one/memory.max")


def test_a_container_sees_its_limit_at_the_mounts_root(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{2 * GIB}\n"}
    assert hostmem.memory(tree(tmp_path, files)).limit_bytes == 2 * GIB


def test_version_1_limits_count_and_no_limit_is_none(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "9:memory:/docker/abc\n8:cpu,cpuacct:/docker/abc\n",
        "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/docker/abc/memory.stat": f"total_inactive_file {GIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    found = hostmem.memory(tree(tmp_path, files))
    assert (found.limit_bytes, found.used_bytes) == (3 * GIB, GIB)
    (tmp_path / "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert hostmem.memory(tmp_path).limit_bytes == 16 * GIB


def test_nothing_to_read_is_zero_and_not_a_crash(tmp_path: Path) -> None:
    assert hostmem.memory(tmp_path).limit_bytes == 0
    assert hostmem.shm_space(str(tmp_path / "absent")) is None


def test_this_machine_has_memory_and_shm() -> None:
    assert hostmem.memory().limit_bytes > 0
    space = hostmem.shm_space()
    assert space is not None
    assert space.free_bytes >= 0


def test_every_setting_is_read_by_something() -> None:
    """A setting that changes nothing is a promise that is not kept."""
    root = Path(settings.__file__).resolve().parents[1]
    sources = [
        path.read_text()
        for folder in ("kvplug", "shm", "rdma", "adapters")
        for path in (root / folder).rglob("*.py")
        if path.name not in ("config.py", "doctor.py")
    ]
    unread = [
        name
        for name in Config.model_fields
        if not any(re.search(rf"(config|load\(\))\.{name}\b", text) for text in sources)
    ]
    assert not unread
