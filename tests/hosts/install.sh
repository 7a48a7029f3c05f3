#!/usr/bin/env bash
# Installs what the tests of several hosts on one machine need beside the test engines: iproute2. Debian, as root.
set -euo pipefail
if command -v ip >/dev/null && command -v tc >/dev/null; then exit 0; fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends iproute2
