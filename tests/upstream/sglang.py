"""SGLang's own tests of a running server, against a real server with kvplug in linker mode.

SGLang 0.5.23 has no source distribution, and its wheel leaves out the folder ``test/`` of its repository. The tests
that others are meant to run against a server of theirs it does ship (``sglang.test.kits``): so they come from the
release that tests/sglang_lab/install.sh has put there. What they assert: log-probabilities on cached pages against
computed ones, how much of a prompt comes from the storage after a flush, pauses, aborts, several turns in branches.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from tests.lab.env import temporary_pool
from tests.lab.models import LLAMA, model_dir
from tests.sglang_lab import env
from tests.sglang_lab.server import SglangServer
from tests.upstream import common

EXPECTED = common.HERE / "sglang.toml"
KITS = "sglang_kits.py"
LIMIT_S = 1500.0
MODEL = {"vocab_size": 32768, "max_position_embeddings": 16384}
"""The kits draw tokens up to 32000, and chains of prompts that grow."""
MODES = ("linker",)
ARGUMENTS = (
    *("--load-format", "dummy", "--json-model-override-args", json.dumps(MODEL)),
    *("--context-length", "16384", "--max-total-tokens", "32768", "--max-running-requests", "16"),
    *("--chunked-prefill-size", "2048"),
)


def _run(mode: str) -> dict[str, common.Outcome]:
    """All kits against one server with kvplug in this mode; outcomes by ``mode::class::test``."""
    with temporary_pool(f"upstream-{mode}") as pool, tempfile.TemporaryDirectory(prefix="kvplug-upstream-") as folder:
        log = Path(folder, "server.log")
        with SglangServer(LLAMA, log, pool=pool, mode=mode, size="1gib", arguments=ARGUMENTS) as server:  # type: ignore[arg-type]
            server.ready()
            own = env.base_env(env={"UPSTREAM_SERVER": server.url(""), "UPSTREAM_MODEL": str(model_dir(LLAMA))})
            own["PYTHONPATH"] = os.pathsep.join([str(common.INSIDE), own["PYTHONPATH"]])
            found = common.run_tests(mode, [KITS], common.INSIDE, own, LIMIT_S, "--tb=short")
            stored = server.metrics().get("kvplug_stored_pages_total", 0)
            loaded = server.metrics().get("kvplug_loaded_pages_total", 0)
            errors = server.metrics().get("kvplug_errors_total", 0)
            print(f"    {mode}: {stored:.0f} pages stored, {loaded:.0f} loaded, {errors:.0f} errors", flush=True)
            fine = "passed" if stored and loaded and not errors and "kvplug: OFF" not in log.read_text() else "failed"
            found[f"{KITS}::kvplug was at work"] = common.Outcome(fine, f"{stored} {loaded} {errors}")
    return {f"{mode}::{test.partition('::')[2]}": outcome for test, outcome in found.items()}


def main(groups: list[str]) -> int:
    """Run the kits, or those modes that ``groups`` names; 1 if anything is not as sglang.toml expects it."""
    modes = groups or list(MODES)
    for mode in modes:
        if mode not in MODES:
            print(f"{mode}: it is one of {', '.join(MODES)}")
            return 2
    return common.report("SGLang", common.run_groups(modes, _run), EXPECTED, modes)
