#!/usr/bin/env bash
# SGLang 0.5.23: a hook that is registered after HookRegistry.apply_hooks() may be applied by a second call, or never.
#
# register() takes a late hook without a word. A second apply_hooks() applies it if nobody had hooked that function
# before; where any other plugin had, the function counts as done and the late hook is passed over, without an exception
# or a line in the log. So a plugin that works alone stops working beside another that hooks the same function. Look at
# the function itself after applying, or register everything before the first apply_hooks().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps sglang==0.5.23
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import importlib.util
import json
import logging
import sys

# The module needs the standard library only; the package around it would bring torch.
files = importlib.metadata.files("sglang")
path = next(one for one in files if str(one).endswith("srt/plugins/hook_registry.py")).locate()
spec = importlib.util.spec_from_file_location("hook_registry", path)
module = sys.modules["hook_registry"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
Registry, AFTER = module.HookRegistry, module.HookType.AFTER

said = []


class Keep(logging.Handler):
    def emit(self, record):
        said.append((record.levelname, record.getMessage()))


logging.getLogger("hook_registry").addHandler(Keep(logging.WARNING))
calls = []
Registry.register("json.dumps", lambda *_args, **_kwargs: calls.append("another plugin's, early"), AFTER)
Registry.apply_hooks()
Registry.register("json.dumps", lambda *_args, **_kwargs: calls.append("late, on a function that was hooked"), AFTER)
Registry.register("json.loads", lambda *_args, **_kwargs: calls.append("late, on one that was not"), AFTER)
Registry.apply_hooks()
json.dumps({})
json.loads("{}")
print("sglang", importlib.metadata.version("sglang"))
print("hooks that were called:", calls)
print("warnings and errors that were logged:", said)
expected = ["another plugin's, early", "late, on one that was not"]
sys.exit(0 if (calls, said) == (expected, []) else "the behaviour has changed")
PY
