#!/usr/bin/env bash
# Mooncake 0.3.13.post1: a batch get that names one key twice says that both were read, and fills the last buffer only.
#
# batch_get_into and batch_get_into_multi_buffers answer one byte count per entry. Entries of one batch with the same key
# are put into a map by key before the transfer, so only the last entry's buffers are written; the others' counts are
# positive all the same, and whoever trusts them computes with what was in the buffer before. Ask for each key once.
#
# The second part: batch_get_into_multi_buffers with more room than the object has. Its check, and its sibling
# batch_get_into, let a larger destination pass; from a memory replica it answers -800 (TRANSFER_FAIL).
#
# Needs libibverbs.so.1 (Debian: libibverbs1), also without RDMA. Ports 50151 and 50152 on loopback.
set -euo pipefail
ldconfig -p | grep -q "libibverbs\.so\.1 " || { echo "needs libibverbs.so.1 (Debian: libibverbs1)"; exit 2; }
folder=$(mktemp -d)
trap 'kill "$master" 2>/dev/null || true; rm -rf "$folder"' EXIT
master=
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mooncake-transfer-engine-non-cuda==0.3.13.post1 'numpy>=1.26'
"$folder/venv/bin/mooncake_master" --rpc_address=127.0.0.1 --rpc_port=50151 --metrics_host=127.0.0.1 --metrics_port=50152 \
    >"$folder/master.log" 2>&1 &
master=$!
"$folder/venv/bin/python" - 2>"$folder/client.log" <<'PY'
import os
import socket
import time

import numpy as np
from mooncake.store import MooncakeDistributedStore

for _ in range(300):
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 50151)) == 0:
            break
    time.sleep(0.1)
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 64 << 20, 16 << 20, "tcp", "", "127.0.0.1:50151") == 0
memory = np.zeros(4 << 20, np.uint8)
at = memory.ctypes.data
assert store.register_buffer(at, memory.nbytes) == 0
memory[:100] = 7
assert store.batch_put_from(["k"], [at], [100]) == [0]
seen = {}
for name, get in {
    "batch_get_into": lambda a, b: store.batch_get_into(["k", "k"], [a, b], [100, 100]),
    "batch_get_into_multi_buffers": lambda a, b: store.batch_get_into_multi_buffers(["k"] * 2, [[a], [b]], [[100]] * 2),
}.items():
    memory[1000:3000] = 0
    told = get(at + 1000, at + 2000)
    seen[name] = told, int((memory[1000:1100] == 7).sum()), int((memory[2000:2100] == 7).sum())
    print(f"{name}, one key twice: answer {told}; right bytes: {seen[name][1]} in the first buffer, {seen[name][2]} in the second")
larger = store.batch_get_into_multi_buffers(["k"], [[at + 1000]], [[300]]), store.batch_get_into(["k"], [at + 1000], [300])
print(f"100 bytes into 300: batch_get_into_multi_buffers {larger[0]}, batch_get_into {larger[1]}", flush=True)
same = all(one == ([100, 100], 0, 100) for one in seen.values()) and larger == ([-800], [100])
if not same:
    print("the behaviour has changed", flush=True)
os._exit(0 if same else 1)
PY
