#!/usr/bin/env bash
# msgspec 0.22.0: not every message that can't be decoded raises MsgspecError.
#
# msgspec documents DecodeError for input that is malformed. A MessagePack or JSON string whose bytes are no UTF-8 raises
# the built-in UnicodeDecodeError, and nesting beyond the interpreter's limit raises RecursionError. Neither is a
# MsgspecError, so `except msgspec.MsgspecError` around a decoder of what a peer sent lets them pass, and a thread that
# reads from a socket dies. Catch (MsgspecError, UnicodeError, RecursionError) in one place.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q msgspec==0.22.0
"$folder/venv/bin/python" - <<'PY'
import sys

import msgspec

print("msgspec", msgspec.__version__)
cases = {
    "MessagePack, a str of two bytes that are no UTF-8": (msgspec.msgpack.decode, b"\xa2\xff\xfe", UnicodeDecodeError),
    "JSON, the same": (msgspec.json.decode, b'"\xff\xfe"', UnicodeDecodeError),
    "MessagePack, 2000 arrays in one another": (msgspec.msgpack.decode, b"\x91" * 2000 + b"\xc0", RecursionError),
    "MessagePack, a str that is cut short": (msgspec.msgpack.decode, b"\xa9ab", msgspec.DecodeError),
}
changed = False
for what, (decode, data, expected) in cases.items():
    try:
        decode(data)
        seen = "no error"
    except Exception as error:
        seen = type(error)
    name = getattr(seen, "__name__", seen)
    documented = isinstance(seen, type) and issubclass(seen, msgspec.MsgspecError)
    print(f"{what}: {name}, {'a' if documented else 'NOT a'} MsgspecError")
    changed |= seen is not expected
sys.exit("the behaviour has changed" if changed else 0)
PY
