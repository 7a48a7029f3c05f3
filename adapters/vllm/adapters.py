"""LoRA adapters as the engine's workers hold them: what they read, when, and what of it can be known.

An adapter is never known by its path, name or id alone: between two looks at a path other files may lie there, and an
id may stand for what was read long ago. A worker reads an adapter when a request first needs it, and again after its
cache had no room for it, or after a change of the model's weights. Where it can't pin memory it maps the files, and
copies from them each time that the adapter gets a place on the device. So the files are read here before the worker
reads them, and looked at again after each copy (:class:`kvplug.identity.weights.AdapterFiles`). The scheduler is told
what came of it; a job that it made before an adapter's content changed in this worker is not carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvplug.adapters.vllm.jobs import AdapterLoad, Job, Rank, WorkerReport
from kvplug.errors import NamespaceError
from kvplug.identity.weights import AdapterFiles

ELSEWHERE = "its weights are not, or not only, the files at its path (tensorizer_config_dict)"
"""Why an adapter can't be known whose weights come from another place than its configuration."""


class HeldAdapters:
    """One worker's adapters; used on the engine's thread alone."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._reading: dict[int, AdapterFiles | str] = {}
        self._files: dict[int, AdapterFiles | str] = {}
        self._content: dict[int, bytes | None] = {}
        self._changes = 0
        self._told_so_far = 0
        self._news: list[AdapterLoad] = []
        self._listed: Callable[[], Iterable[int]] = tuple
        self._told: frozenset[int] = frozenset()
        self._brought: dict[str, tuple[int, bytes, set[int]]] = {}
        """Per request what was loaded from the pool for an adapter that this worker had yet to read."""
        self._contradicted: set[int] = set()

    # -- what the engine does ----------------------------------------------------------------------------------------

    def reads(self, number: int, path: str | None, listed: Callable[[], Iterable[int]]) -> None:
        """The engine is about to read an adapter from a local path; None: its weights are not what lies there.
        ``listed``: the ids of those that it has."""
        self._listed = listed
        try:
            self._reading[number] = ELSEWHERE if path is None else AdapterFiles(path)
        except NamespaceError as error:
            self._reading[number] = str(error)

    def not_read(self, number: int) -> None:
        """The engine could not use what it has read. What it has under this id, if anything, it keeps."""
        self._reading.pop(number, None)

    def copied(self, number: int) -> None:
        """The engine has copied an adapter to where the model reads it."""
        new = number in self._reading
        if new:
            self._files[number] = self._reading.pop(number)
        files = self._files.get(number)
        if files is None:  # not from files: a dummy of a warm-up
            return
        content, why = None, ""
        if isinstance(files, str):
            why = files
        else:
            try:
                content = files.check().digest
            except NamespaceError as error:
                why = str(error)
        self._judge_brought(number, content)
        before = self._content.get(number)
        changed = number in self._content and (content is None or content != before)
        if not new and not changed:
            return
        self._content[number] = content
        self._changes += changed
        self._news.append(AdapterLoad(self._rank, number, content, why, self._changes, self._next_order()))

    def _next_order(self) -> int:
        self._told_so_far += 1
        return self._told_so_far

    def _judge_brought(self, number: int, content: bytes | None) -> None:
        for request_id, (adapter, expected, blocks) in list(self._brought.items()):
            if adapter == number and expected != content:
                del self._brought[request_id]
                self._contradicted |= blocks

    # -- jobs --------------------------------------------------------------------------------------------------------

    def refuses(self, job: Job) -> bool:
        """Whether an adapter that a job's blocks depend on may not be what the scheduler took it for."""
        if job.adapter_changes is not None and job.adapter_changes.get(self._rank, 0) != self._changes:
            return True
        if job.adapter is None or job.request_id is None:
            return False
        number, content, may_be_read_later = job.adapter
        if number in self._listed():
            if self._content.get(number) != content:
                return True
        elif not may_be_read_later:
            return True
        if may_be_read_later:  # it may be let go, or replaced, and be read again before the request runs
            self._brought[job.request_id] = (number, content, _block_ids(job))
        return False

    def spoils(self, job: Job) -> bool:
        """Whether a load that is over has brought blocks of what its request's adapter no longer is."""
        if job.adapter is None:
            return False
        number, content, may_be_read_later = job.adapter
        if number in self._listed():
            return self._content.get(number) != content
        return not may_be_read_later

    def contradicted(self) -> set[int]:
        """Ids of blocks that were loaded for an adapter which turned out to be another, since the last call."""
        blocks, self._contradicted = self._contradicted, set()
        return blocks

    def finished(self, request_ids: Iterable[str]) -> None:
        """These requests are over."""
        for request_id in request_ids:
            self._brought.pop(request_id, None)

    # -- reports -----------------------------------------------------------------------------------------------------

    def add_to(self, report: WorkerReport | None) -> WorkerReport | None:
        """A report with what is new here."""
        held = frozenset(self._listed())
        if not self._news and held == self._told:
            return report
        report = report or WorkerReport()
        report.adapters, self._news = (*report.adapters, *self._news), []
        self._told = held
        report.held[self._rank] = self._next_order(), held
        self._files = {number: files for number, files in self._files.items() if number in held}
        return report


def _block_ids(job: Job) -> set[int]:
    return {block for group in job.groups for block in group.block_ids.tolist()}
