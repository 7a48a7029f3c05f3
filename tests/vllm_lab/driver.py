"""An in-process vLLM engine behind a line protocol: started once by a test, told many things.

    python -m tests.vllm_lab.driver REPLY_FD

One JSON object per line comes in on stdin, one per line goes out on the file descriptor REPLY_FD (stdout and stderr
belong to vLLM's logs). The first line is the engine's arguments. ``{"do": name, ...}`` calls the function of that
name below; the answer is ``{"ok": value}`` or ``{"error": traceback}``. The step loop is the driver's own, so that a
test can stop between two steps: that is how an abort falls into the middle of a load.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from typing import Any


class Driver:
    """One LLM and the requests that are under way in it."""

    def __init__(
        self,
        model: str,
        force_prefix_caching: bool = False,
        overlapping_steps: bool = False,
        sleeps: bool = False,
        **kwargs: Any,
    ) -> None:
        began = time.monotonic()
        if sleeps:
            from tests.vllm_lab import sleeping

            sleeping.install()
        if force_prefix_caching:
            _keep_on_cpus("cache_config", "enable_prefix_caching")
        if overlapping_steps:
            _keep_on_cpus("scheduler_config", "async_scheduling")
        from vllm import LLM

        self.llm = LLM(model=model, worker_extension_cls="tests.vllm_lab.worker.LabWorker", **kwargs)
        self.engine = self.llm.llm_engine
        if kwargs.get("pipeline_parallel_size", 1) > 1:
            self.llm.collective_rpc("lab_warm_up")
        self.boot_s = time.monotonic() - began
        self.live: dict[str, dict[str, Any]] = {}
        self.done: dict[str, dict[str, Any]] = {}
        self.serial = 0
        self.steps = 0
        self.admitted = 0
        self.broken_calls = 0
        self.schedule_s: list[tuple[float, bool]] = []
        self.lora_ids: dict[str, int] = {}
        self._watch_outputs()

    # -- what the engine is -------------------------------------------------------------------------------------

    def core(self) -> Any:
        """The EngineCore, which is in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."""
        return self.engine.engine_core.engine_core

    def info(self) -> dict[str, Any]:
        import vllm

        scheduler = self.core().scheduler
        config = self.engine.vllm_config
        transfer = config.kv_transfer_config
        return {
            "boot_s": self.boot_s,
            "version": vllm.__version__,
            "connector": type(scheduler.connector).__name__ if scheduler.connector else None,
            "connector_module": type(scheduler.connector).__module__ if scheduler.connector else None,
            "load_failure_policy": getattr(transfer, "kv_load_failure_policy", None),
            "block_size": config.cache_config.block_size,
            "batches": self.core().batch_queue_size,
            "num_blocks": scheduler.kv_cache_config.num_blocks,
            "groups": [type(g.kv_cache_spec).__name__ for g in scheduler.kv_cache_config.kv_cache_groups],
            "worker_pids": self.llm.collective_rpc("lab_pid"),
            "pid": os.getpid(),
            "imported": [name for name in ("numba", "llvmlite", "kvplug.remote.fetcher") if name in sys.modules],
        }

    # -- requests -----------------------------------------------------------------------------------------------

    def add(self, requests: list[dict[str, Any]]) -> list[str]:
        """Queues requests without a step. Keys: prompt (token ids), max_tokens, lora (a folder), salt, logprobs.

        An adapter has a name and an id of its folder's own, or those that lora_name and lora_id give.
        """
        from vllm import SamplingParams

        names = []
        for r in requests:
            name = f"lab-{self.serial}"
            self.serial += 1
            prompt: dict[str, Any] = {"prompt_token_ids": r["prompt"]}
            if r.get("salt") is not None:
                prompt["cache_salt"] = r["salt"]
            lora = self._lora(r) if r.get("lora") else None
            params = SamplingParams(
                temperature=0, max_tokens=r.get("max_tokens", 8), ignore_eos=True, logprobs=r.get("logprobs")
            )
            core_id = self.engine.add_request(name, prompt, params, lora_request=lora)
            self.live[name] = {"core_id": core_id, "start": time.monotonic(), "ttft_s": None, "external": 0, "local": 0}
            names.append(name)
        return names

    def _lora(self, r: dict[str, Any]) -> Any:
        from vllm.lora.request import LoRARequest

        number = r.get("lora_id") or self.lora_ids.setdefault(r["lora"], len(self.lora_ids) + 1)
        return LoRARequest(r.get("lora_name", f"adapter{number}"), number, r["lora"])

    def add_lora(self, request: dict[str, Any]) -> bool:
        """Loads a request's adapter ahead, as a server does that is told of one."""
        return bool(self.engine.add_lora(self._lora(request)))

    def states(self, names: list[str]) -> list[str]:
        """The scheduler's status of each request that is under way."""
        requests = self.core().scheduler.requests
        return [requests[self.live[name]["core_id"]].status.name for name in names]

    def step(self, n: int = 1) -> int:
        """Steps the engine; answers how many requests are still under way."""
        for _ in range(n):
            if not self.engine.has_unfinished_requests():
                break
            outputs = self.engine.step()
            self.steps += 1
            now = time.monotonic()
            self._watch()
            for out in outputs:
                self._take(out, now)
        return len(self.live)

    def _watch_outputs(self) -> None:
        """Keeps each request's prefill statistics, which vLLM itself only adds up, as they leave the engine core."""
        client = self.engine.engine_core
        plain = client.get_output

        def get_output() -> Any:
            outputs = plain()
            by_core_id = {record["core_id"]: record for record in self.live.values()}
            for output in outputs.outputs:
                record = by_core_id.get(output.request_id)
                if record is not None and output.prefill_stats is not None:
                    record["external"] = output.prefill_stats.num_external_cached_tokens
                    record["local"] = output.prefill_stats.num_local_cached_tokens
            return outputs

        client.get_output = get_output

    def _watch(self) -> None:
        """Notes what only the scheduler knows, while it still knows it: block ids and preemptions."""
        scheduler = self.core().scheduler
        for record in self.live.values():
            request = scheduler.requests.get(record["core_id"])
            if request is None:
                continue
            record["preemptions"] = request.num_preemptions
            blocks = scheduler.kv_cache_manager.get_block_ids(record["core_id"])
            if any(blocks):
                record["block_ids"] = [list(group) for group in blocks]

    def _take(self, out: Any, now: float) -> None:
        record = self.live.get(out.request_id)
        if record is None:
            return
        sequence = out.outputs[0]
        if record["ttft_s"] is None and sequence.token_ids:
            record["ttft_s"] = now - record["start"]
        if not out.finished:
            return
        del self.live[out.request_id]
        self.done[out.request_id] = {
            "tokens": list(sequence.token_ids),
            "reason": sequence.finish_reason,
            "cached": out.num_cached_tokens,
            "external": record["external"],
            "local": record["local"],
            "ttft_s": record["ttft_s"],
            "total_s": now - record["start"],
            "preemptions": record.get("preemptions", 0),
            "block_ids": record.get("block_ids"),
            "margin": _margin(sequence.logprobs),
        }

    def wait(self, names: list[str], timeout_s: float = 120.0) -> list[dict[str, Any]]:
        """Steps until all of these have finished; answers their records in this order."""
        deadline = time.monotonic() + timeout_s
        while any(name in self.live for name in names):
            if time.monotonic() > deadline:
                raise TimeoutError(f"still under way after {timeout_s} s: {[n for n in names if n in self.live]}")
            self.step()
        return [self.done.pop(name) for name in names]

    def generate(self, requests: list[dict[str, Any]], timeout_s: float = 120.0) -> list[dict[str, Any]]:
        """Adds all at once and waits for all."""
        return self.wait(self.add(requests), timeout_s)

    def each(self, requests: list[dict[str, Any]], timeout_s: float = 120.0) -> list[dict[str, Any]]:
        """One request after the other, each alone in the engine."""
        return [self.generate([r], timeout_s)[0] for r in requests]

    def abort(self, names: list[str]) -> dict[str, str]:
        """Aborts requests; answers the scheduler's status of each just before."""
        scheduler = self.core().scheduler
        states = {}
        for name in names:
            record = self.live.pop(name, None)
            request = scheduler.requests.get(record["core_id"]) if record else None
            states[name] = request.status.name if request else "GONE"
        self.engine.abort_request(names)
        return states

    def abort_mid_load(self, requests: list[dict[str, Any]], delay_s: float) -> list[str]:
        """Adds requests, steps once so that their loads are issued, waits *delay_s*, aborts; their states before."""
        names = self.add(requests)
        self.engine.step()
        time.sleep(delay_s)
        return list(self.abort(names).values())

    def amid(
        self,
        requests: list[dict[str, Any]],
        call: str,
        args: list[Any],
        hold: str | None = None,
        hold_s: float | None = 0.2,
        delay_s: float = 0.0,
        abort: bool = False,
    ) -> dict[str, Any]:
        """Adds requests, steps, calls a method of the engine core and lets the engine go on; what was seen meanwhile.

        ``hold``: "load" or "store", copies that are stopped and go on ``hold_s`` seconds later, or (None) after the
        call; with "store" the engine is stepped until it holds blocks. ``delay_s``: a pause before the call.
        ``abort``: the requests are aborted before the call.
        """
        core = self.core()
        if hold:
            self.hold_copies(hold)
        names = self.add(requests)
        self.step()
        deadline = time.monotonic() + 60
        while hold == "store" and not self._sides()["stores"].held and time.monotonic() < deadline:
            self.step()
        if hold and hold_s is not None:
            threading.Timer(hold_s, self.let_copies_go).start()
        time.sleep(delay_s)
        known = [core.scheduler.requests.get(self.live[name]["core_id"]) for name in names if name in self.live]
        out: dict[str, Any] = {"names": names, "states": [one.status.name for one in known if one], "error": None}
        if abort:
            self.abort(names)
        try:
            out["answer"] = getattr(core, call)(*args)
        except Exception as error:  # noqa: BLE001 - the test is told
            out["error"] = f"{type(error).__name__}: {error}"
        out["paused"] = core.is_scheduler_paused()
        out["free"] = self.free_blocks()
        if hold and hold_s is None:
            self.let_copies_go()
        core.resume_scheduler()
        if args and "abort" in args:
            self.abort(names)
        return out

    def hold_copies(self, which: str) -> None:
        """From now on the worker stops before it copies ("load" or "store"), until :meth:`let_copies_go`."""
        owner, name = self._sides()["worker"], {"load": "_load_group", "store": "_store_some"}[which]
        plain, gate = getattr(owner, name), threading.Event()

        def held(*args: Any, **kwargs: Any) -> Any:
            gate.wait(60)
            return plain(*args, **kwargs)

        setattr(owner, name, held)
        self._held = owner, name, gate

    def let_copies_go(self) -> None:
        """Ends that."""
        owner, name, gate = self._held
        delattr(owner, name)
        gate.set()

    def shorten_drain(self, seconds: float) -> float:
        """How long the worker waits for copies from now on, in seconds; answers how long it waited so far."""
        from kvplug.adapters.vllm import worker

        before, worker.DRAIN_TIMEOUT_S = worker.DRAIN_TIMEOUT_S, seconds
        return before

    def tell_layouts_again(self) -> dict[str, Any]:
        """Hands the workers' layouts to the scheduler's connector again, as vLLM 0.33 does in ``wake_up``."""
        core = self.core()
        metadata = {}
        for one in core.model_executor.get_kv_connector_handshake_metadata():
            metadata.update(one or {})
        core.scheduler.connector.set_xfer_handshake_metadata_pp_aware(metadata)
        return self._scheduler_side()

    def sleep_and_wake_up(self) -> dict[str, Any]:
        """Sleeps at level 0, keeping requests, and wakes up; ``told``: how often the connector got layouts."""
        connector, told = self.core().scheduler.connector, 0
        plain = connector.set_xfer_handshake_metadata_pp_aware

        def counted(metadata: Any) -> None:
            nonlocal told
            told += 1
            plain(metadata)

        connector.set_xfer_handshake_metadata_pp_aware = counted
        try:
            self.core().sleep(0, "keep")
            self.core().wake_up()
        finally:
            del connector.set_xfer_handshake_metadata_pp_aware
        return {"told": told, **self._scheduler_side()}

    def _scheduler_side(self) -> dict[str, Any]:
        """What must not differ after something that changes nothing."""
        side = self.core().scheduler.connector._scheduler.side
        return {
            "side": id(side),
            "threads": threading.active_count(),
            "held": side.stores.held if side else 0,
            "namespace": side.state.namespace.digest().hex() if side else None,
            "step": side._step if side else None,
        }

    # -- the cache ----------------------------------------------------------------------------------------------

    def reset(self, external: bool = False) -> bool:
        """Empties the device's prefix cache; with ``external`` the connector is told as well."""
        return bool(self.llm.reset_prefix_cache(reset_connector=external))

    def pages(self, block_ids: list[list[int]]) -> Any:
        """Digests of device pages, one entry per rank; see ``LabWorker.lab_pages``."""
        return self.llm.collective_rpc("lab_pages", args=(block_ids,))

    def dump(self, block_ids: list[list[int]], folder: str) -> list[int]:
        """Writes device pages to files; see ``LabWorker.lab_dump``."""
        return self.llm.collective_rpc("lab_dump", args=(block_ids, folder))

    def free_blocks(self) -> int:
        """Blocks that the device's block pool could hand out now."""
        return int(self.core().scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    # -- weights ------------------------------------------------------------------------------------------------

    def reload_weights(self, path: str) -> None:
        """New weights of the same shapes into the living engine, as RL does it."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})

    def pause_and_resume(self) -> None:
        """A pause that empties the caches, as loops that train and serve at once have one around each step."""
        self.core().pause_scheduler("abort", True)
        self.core().resume_scheduler()

    def sleep(self, level: int) -> None:
        """Requests are aborted, the caches emptied, and the weights go, as ``sleeps`` has it."""
        self.core().sleep(level, "abort")

    def wake_up(self, tags: list[str] | None = None) -> bool:
        """Whether all of the engine is awake now."""
        self.core().wake_up(tags)
        return not self.core().model_executor.is_sleeping

    def pause(self) -> None:
        """The first half of :meth:`pause_and_resume`."""
        self.core().pause_scheduler("abort", True)

    def pause_keeping(self) -> None:
        """A pause that empties nothing."""
        self.core().pause_scheduler("keep", False)

    def call(self, method: str, args: list[Any]) -> list[Any]:
        """What a method of the workers answers in each, past the engine's own call of that name."""
        return list(self.llm.collective_rpc(method, args=tuple(args)))

    def resume(self) -> None:
        """The second."""
        self.core().resume_scheduler()

    def write_weights(self, factor: float) -> None:
        """As a trainer does it that has the worker's memory mapped: no call tells the engine."""
        import torch

        with torch.no_grad():
            for tensor in self.core().model_executor.driver_worker.get_model().parameters():
                tensor.mul_(factor)

    def looks_asleep(self) -> int:
        """How often kvplug has read weights that were away."""
        from tests.vllm_lab import sleeping

        return sleeping.looks_asleep

    def known_threads(self) -> int:
        """Threads of this process."""
        return threading.active_count()

    def set_weight_version(self, version: str) -> None:
        """The other way in which an engine learns that its weights are new."""
        self.engine.set_weight_version(version)

    # -- errors -------------------------------------------------------------------------------------------------

    def fail_in(self, side: str, method: str) -> None:
        """From now on this method of the connector's scheduler or worker side raises; :meth:`recover` ends it."""
        owner = self._sides()[side]
        assert callable(getattr(owner, method))

        def broken(*args: Any, **kwargs: Any) -> Any:
            self.broken_calls += 1
            raise ZeroDivisionError(method)

        setattr(owner, method, broken)
        self._broken = owner, method, self._sides()["scheduler"].state.root

    def recover(self) -> int:
        """Ends that, and switches kvplug on again, which switches itself off; how often the method was called."""
        owner, name, root = self._broken
        delattr(owner, name)
        scheduler = self._sides()["scheduler"]
        scheduler.off, scheduler.state.root = False, root
        calls, self.broken_calls = self.broken_calls, 0
        return calls

    def report_too_much(self) -> None:
        """From now on every step reports each load's end anew, and one of a request that there never was."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector = get_kv_transfer_group()
        plain, ended = connector.get_transfer_results, {"a request that nobody has made"}

        def strange(*args: Any) -> Any:
            results = plain(*args)
            ended.update(results.finished_recving or ())
            return dataclasses.replace(results, finished_recving=set(ended))

        connector.get_transfer_results = strange

    def report_as_usual(self) -> None:
        """Ends that."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        del get_kv_transfer_group().get_transfer_results

    def _sides(self) -> dict[str, Any]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        scheduler = self.core().scheduler.connector._scheduler.side
        return {
            "scheduler": scheduler,
            "loads": scheduler.loads,
            "stores": scheduler.stores,
            "worker": get_kv_transfer_group()._worker.side,
        }

    # -- figures ------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Every sample whose name starts with ``vllm:`` or ``kvplug_``, summed over label sets but ``source``."""
        from prometheus_client import REGISTRY

        out: dict[str, float] = {}
        for family in REGISTRY.collect():
            for sample in family.samples:
                if sample.name.startswith(("vllm:", "kvplug_")) and not sample.name.endswith("_created"):
                    source = sample.labels.get("source")
                    name = f'{sample.name}{{source="{source}"}}' if source else sample.name
                    out[name] = out.get(name, 0.0) + sample.value
        return out

    def time_schedule(self) -> None:
        """From now on each ``schedule()`` call is timed, and noted whether it admitted a request."""
        scheduler = self.core().scheduler
        plain = scheduler.schedule

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            output = plain(*args, **kwargs)
            took = time.perf_counter() - began
            admitted = bool(output.scheduled_new_reqs)
            self.schedule_s.append((took, admitted))
            return output

        scheduler.schedule = timed

    def time_connector(self) -> None:
        """From now on the time inside the connector's scheduler-side hooks is summed per engine step."""
        connector = self.core().scheduler.connector
        self.connector_s: list[float] = []
        spent = 0.0

        def wrap(name: str) -> None:
            plain = getattr(connector, name)

            def timed(*args: Any, **kwargs: Any) -> Any:
                nonlocal spent
                began = time.perf_counter()
                try:
                    return plain(*args, **kwargs)
                finally:
                    spent += time.perf_counter() - began

            setattr(connector, name, timed)

        for name in SCHEDULER_HOOKS:
            if hasattr(connector, name):
                wrap(name)
        core = self.core()
        plain_step = core.step_fn

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            spent = 0.0
            waiting = len(core.scheduler.waiting)
            try:
                return plain_step(*args, **kwargs)
            finally:
                if waiting == 0:
                    self.connector_s.append(spent)

        core.step_fn = step

    def timings(self) -> dict[str, list[float]]:
        """What :meth:`time_schedule` and :meth:`time_connector` gathered, in seconds; gathering starts afresh."""
        out = {
            "schedule_quiet_s": [t for t, admitted in self.schedule_s if not admitted],
            "connector_quiet_s": list(getattr(self, "connector_s", [])),
        }
        self.schedule_s.clear()
        if hasattr(self, "connector_s"):
            self.connector_s.clear()
        return out


SCHEDULER_HOOKS = (
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "request_finished_all_groups",
    "take_events",
    "has_pending_push_work",
    "on_new_request",
)
"""The connector's calls on the scheduler's path, in whatever vLLM version has them."""


def _keep_on_cpus(part: str, setting: str) -> None:
    """Keeps a setting on that vLLM's CPU platform turns off. Call before the engine is made.

    Its own prefix cache (MLA): a control with the same schedule needs it. Overlapping steps: devices have them.
    """
    from vllm.platforms.cpu import CpuPlatform

    plain = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        plain(cls, config)
        setattr(getattr(config, part), setting, True)

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _margin(logprobs: Any) -> float | None:
    """Smallest distance between the chosen token's log-probability and the runner-up's, over the whole output."""
    if not logprobs:
        return None
    smallest = float("inf")
    for position in logprobs:
        best = sorted((entry.logprob for entry in position.values()), reverse=True)
        if len(best) > 1:
            smallest = min(smallest, best[0] - best[1])
    return smallest


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as replies:

        def reply(message: dict[str, Any]) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        try:
            driver = Driver(**json.loads(sys.stdin.readline()))
            reply({"ok": driver.info()})
        except Exception:  # noqa: BLE001 — the test is told why the engine did not start
            reply({"error": traceback.format_exc()})
            return
        for line in sys.stdin:
            message = json.loads(line)
            name = message.pop("do")
            if name == "exit":
                driver.engine.engine_core.shutdown()
                break
            try:
                reply({"ok": getattr(driver, name)(**message)})
            except Exception:  # noqa: BLE001 — whatever it is, the test is told
                reply({"error": traceback.format_exc()})


if __name__ == "__main__":
    main()
