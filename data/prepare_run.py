"""Preparing a folder: the plan, the processes that work it off, and what is written at the end."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from longreel.data.captions import read_captions
from longreel.data.contact_sheet import write_contact_sheet
from longreel.data.heap import keep_memory
from longreel.data.prepare_config import PrepareConfig, describe, made_by, plan_groups
from longreel.data.prepare_group import Done, GroupWorker, Job, part_path
from longreel.data.prepare_summary import finish, report
from longreel.data.processes import ProcessDied, shared_out
from longreel.data.shard_files import (
    DATASET,
    INDEX,
    NULL_TEXT,
    PARTS,
    SHARDS,
    SHEET,
    ShardError,
    read_rows,
    shard_is_whole,
    write_json,
)
from longreel.data.shards import ShardDataset
from longreel.data.sources import Sources, find_sources
from longreel.models.publish import publish_tensors


def prepare(config: PrepareConfig) -> None:
    """Do what `python data/prepare.py` does; see PrepareConfig. This process keeps memory that it frees (keep_memory).

    Raises:
        ValueError: captions, folders or models are not as described, or `out` holds another preparation.
        OSError: files cannot be read or written, or a process died.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    entries, caption_problems = read_captions(config.captions)
    sources = find_sources(config.videos, entries)
    rank, world = config.place
    keep_memory()
    job, worker = _begin(config, sources)
    console.print(
        f"{len(sources.videos)} captioned videos in {len(job.groups)} groups"
        + (f", of which rank {rank} of {world} has {len(range(rank, len(job.groups), world))}" if world > 1 else "")
    )
    left = [group for group in range(rank, len(job.groups), world) if not _is_done(job, group)]
    done_before = len(range(rank, len(job.groups), world)) - len(left)
    if done_before:
        console.print(f"{done_before} groups were done before")
    _remove_partial_files(config, left)
    _work_off(job, worker, left, console)
    missing = [group for group in range(len(job.groups)) if not _is_done(job, group)]
    if missing:
        console.print(f"{len(missing)} groups are left to other ranks; the last rank to finish writes {INDEX}")
        return
    summary = finish(job, sources, caption_problems)
    if summary["clips"]:
        write_contact_sheet(config.out / SHEET, ShardDataset(config.out), worker.autoencoder, count=config.sheet_clips)
    report(config, summary, console)


def _begin(config: PrepareConfig, sources: Sources) -> tuple[Job, GroupWorker]:
    """The job, and this process's worker; `out` holds this preparation from here on."""
    groups = plan_groups(sources.videos, config.cut)
    draft = Job(config=config, videos=sources.videos, groups=tuple(groups), fingerprint="")
    worker = GroupWorker(draft, config.torch_device)
    info = describe(config, sources.videos, worker.autoencoder, worker.encoder)
    job = Job(config=config, videos=draft.videos, groups=draft.groups, fingerprint=info["fingerprint"])
    worker.job = job
    for folder in (config.out / SHARDS, config.out / PARTS):
        folder.mkdir(parents=True, exist_ok=True)
    present = config.out / DATASET
    if present.is_file():
        try:
            before = json.loads(present.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{present}: not JSON: {error}") from error
        if before.get("fingerprint") != job.fingerprint:
            were, now = made_by(before), made_by(info)
            differing = [name for name in now if were.get(name) != now[name]]
            raise ValueError(
                f"out: {config.out} holds another preparation, with other "
                f"{', '.join(differing) or 'videos or captions'}; give another folder, or remove that one"
            )
    else:
        write_json(present, info)
    if info["text_stored"]:
        from longreel.models.autoencoders import DTYPES

        null_text = worker.encoder.encode([""])[0].to(DTYPES[config.latent_dtype])
        publish_tensors(config.out / NULL_TEXT, {"text": null_text.contiguous()})
    return job, worker


def _is_done(job: Job, group: int) -> bool:
    """Whether a group's rows and all the shards they name are there, whole and of this preparation."""
    try:
        rows, notes = read_rows(part_path(job.config.out, group))
    except ShardError:
        # Not there, or cut off where the machine went down: it is made again.
        return False
    shards = {row["shard"] for row in rows}
    return notes.get("fingerprint") == job.fingerprint and all(
        shard_is_whole(job.config.out / SHARDS / shard) for shard in shards
    )


def _remove_partial_files(config: PrepareConfig, groups: list[int]) -> None:
    """What a killed process left half written; of the groups of other ranks nothing, they may be at work."""
    _, world = config.place
    ours = set(groups)
    for path in [path for folder in (SHARDS, PARTS) for path in (config.out / folder).glob(".*.partial")]:
        group = re.match(r"\.(\d+)[.-]", path.name)
        if group is not None and int(group[1]) in ours:
            shutil.rmtree(path, ignore_errors=True)
    if world == 1:
        for path in config.out.glob(".*.partial"):
            shutil.rmtree(path, ignore_errors=True)


def _work_off(job: Job, worker: GroupWorker, groups: list[int], console: Console) -> None:
    sizes = {group: sum(job.videos[piece.video].size / piece.count for piece in job.groups[group]) for group in groups}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    clips = frames = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("prepare", total=max(1, sum(sizes.values())), counts="")
        # The largest first, so that no process is left with it at the end.
        for done in _results(job, worker, sorted(groups, key=sizes.__getitem__, reverse=True)):
            clips, frames = clips + done.clips, frames + done.frames
            progress.update(task, advance=sizes[done.group], counts=f"{clips} clips, {frames:,} frames")


def _results(job: Job, worker: GroupWorker, groups: list[int]) -> Iterator[Done]:
    """Each group as it is finished."""
    processes = min(job.config.num_processes, len(groups))
    if processes <= 1:
        # As in every process of several, so that no bit depends on how many there are.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(worker.run, groups)
        finally:
            torch.set_num_threads(threads)
        return
    try:
        yield from shared_out(_worker, (job,), groups, processes=processes)
    except ProcessDied as error:
        if error.exit_code >= 0:
            raise
        raise OSError(
            f"{error} (out of memory, or killed); run the same command again to go on, with fewer --processes if "
            "memory is short"
        ) from error


def _worker(job: Job) -> Callable[[int], Done]:
    """What works off groups in a process of its own."""
    torch.set_num_threads(1)
    keep_memory()
    return GroupWorker(job, job.config.torch_device).run
