# `./justw RECIPE` runs a recipe with nothing installed beforehand but Python; with just at hand, `just RECIPE` does the same.

set shell := ["bash", "-euo", "pipefail", "-c"]

py := ".venv/bin/python"

# most tests wait for other processes, so two files run at a time; `-n 0` for one after the other
two_files := "--numprocesses 2 --dist loadfile --no-loadscope-reorder"

# what programs import, beside kvplug itself
api_modules := "kvplug.store kvplug.handles kvplug.errors kvplug.config kvplug.keys kvplug.identity.weights kvplug.remote.fetcher kvplug.remote.request kvplug.remote.peering kvplug.remote.pool_blocks"

# what can be run
[private]
default:
    @{{ just_executable() }} --justfile {{ justfile() }} --list --unsorted

# run two real engines on one pool, kill one, and print what was reused: just demo --engine sglang
demo *ARGS:
    @bash .ci/setup {{ if ARGS =~ 'sglang' { "sglang" } else { "vllm" } }}
    @{{ py }} -m kvplug.shm.build --level best || true
    {{ py }} bench/demo.py {{ ARGS }}

# unit tests, the pool under fire, real vLLM, real SGLang; with --full also long tests that repeat shorter ones
test *ARGS: engines kernels
    @bash tests/devices/install.sh .venv
    @[ "$(id -u)" != 0 ] || bash tests/hosts/install.sh || true
    {{ py }} -m pytest tests {{ two_files }} {{ ARGS }}

# unit tests only: no engine, a few minutes at most
test-fast *ARGS: install kernels
    {{ py }} -m pytest tests/unit {{ two_files }} {{ ARGS }}

# real RDMA verbs, in emulated machines that this boots; Debian on x86-64, and root once, for QEMU: just test-rdma --guests two
test-rdma *ARGS: install kernels
    @bash tests/rdma_lab/install.sh .venv
    {{ py }} -m tests.rdma_lab.run {{ ARGS }}

# other projects' tests of connectors and stores, run against kvplug: just test-upstream vllm
test-upstream *ARGS: setup kernels
    {{ py }} -m tests.upstream.run {{ ARGS }}

# the figures of docs/figures.md, with ratios to memcpy
bench *ARGS: setup kernels
    {{ py }} -m pytest bench --benchmark-only -p no:cacheprovider {{ ARGS }}

# CUDA copies on a real GPU: the conformance suite, races, a real pool; an error where there is no GPU
test-gpu *ARGS:
    @bash tests/devices/gpu.sh test {{ ARGS }}

# CUDA copies beside the speed of the bus, measured in the same run
bench-gpu:
    @bash tests/devices/gpu.sh bench

# kill processes at random instants and count what went wrong: just stress --kills 2000
stress *ARGS: install kernels
    {{ py }} tests/stress/run.py {{ ARGS }}

# a vLLM engine and two SGLang engines on one pool, under load and kills: just soak --minutes 5
soak *ARGS: setup kernels
    {{ py }} tests/soak/run.py {{ ARGS }}

# the pool's kernels compiled for every level of this machine's processors, beside the sources: just native --machine aarch64
native *ARGS: install
    {{ py }} -m kvplug.shm.build {{ ARGS }}

# a wheel with the compiled kernels of one machine, and a list of what is in it: just wheels aarch64
wheels machine=arch(): install
    {{ py }} -m kvplug.shm.build --machine {{ machine }}
    rm -rf build/lib* build/bdist.*
    SOURCE_DATE_EPOCH="$(git log -1 --format=%ct)" KVPLUG_WHEEL={{ machine }} {{ py }} -m build --wheel --no-isolation
    {{ py }} -m zipfile -l dist/kvplug-*_{{ machine }}.whl

# draw the documentation's pictures from their texts: docs/images
pictures:
    @python3 docs/images/make.py

# ruff and mypy, as the tests run them
lint: install
    {{ py }} -m ruff check .
    {{ py }} -m ruff format --check .
    {{ py }} tests/typecheck.py

# put the sources into ruff's form
fmt: install
    {{ py }} -m ruff check --fix .
    {{ py }} -m ruff format .

# pages of the Python interface, from docstrings: build/api/kvplug.html
api: install
    @{{ py }} -c 'import pdoc' 2>/dev/null || {{ py }} -m pip install -q --disable-pip-version-check -e '.[docs]'
    {{ py }} -m pdoc --docformat restructuredtext --no-show-source -o build/api kvplug {{ api_modules }}

# the compiled kernels for this processor; where they can't be made, numba compiles in each process, and that is said
[private]
kernels: install
    @{{ py }} -m kvplug.shm.build --level best || true

# kvplug with its development tools, and the newest of the test engines (vLLM and SGLang for the CPU, about 4 GB)
setup:
    @bash .ci/setup engine

# the same with the older versions that the tests run; fails where SGLang can't be installed (g++ and OpenSSL's headers)
engines:
    @bash .ci/setup engines

# kvplug with its development tools only
install:
    @bash .ci/setup
