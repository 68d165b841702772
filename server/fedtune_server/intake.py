"""Tasks out, updates in: what one client is asked for, and how its answer becomes part of a round."""

import asyncio
import time

from fedtune.errors import WireError, problem
from fedtune.rounds import MAX_WEIGHT
from fedtune.wire.convert import manifest_to_proto
from fedtune.wire.v1 import coordinator_pb2 as pb
from fedtune_server import records
from fedtune_server.blobs import Draft
from fedtune_server.guard import DuplicateError
from fedtune_server.ledger import PAYLOAD, UP
from fedtune_server.metrics import Metrics
from fedtune_server.open_round import OpenRound
from fedtune_server.records import TaskRow, UpdateRow
from fedtune_server.run import Run


def task_message(run: Run, task: TaskRow, deadline_s: float) -> pb.ServerMessage:
    """Returns what tells a client to work."""
    template = run.shared.method.template(run.version.state, task.member)
    message = pb.Task(
        task_id=task.task_id,
        round=task.round,
        version=run.version.number,
        state_digest=run.version.digest,
        update=manifest_to_proto(template),
        deadline_s=deadline_s,
        member=pb.Member(rank=task.member.rank, alpha=task.member.alpha, depth=task.member.depth),
    )
    return pb.ServerMessage(task=message)


async def take(
    run: Run, work: OpenRound, task: TaskRow, header: pb.SubmitHeader, draft: Draft, metrics: Metrics
) -> None:
    """Decodes, checks and folds a complete update, then makes it durable. Only after that does it count.

    Raises:
        WireError: the update is not what it must be; the round is as it was.
        StorageError: the disk refused; the round is as it was.
    """
    row = _row(task, header)
    view = await asyncio.to_thread(draft.view)
    async with work.lock:
        accepted = list(work.updates.values())
        await asyncio.to_thread(work.total.add, task, view, row.weight, accepted, work.tasks)
    bytes_up = {(row.round, row.client, UP, PAYLOAD): row.nbytes}
    try:
        await asyncio.to_thread(draft.publish, row.digest)
        started = time.monotonic()
        await run.store.commit(records.write_update(row, bytes_up))
    except BaseException:
        work.total.forget()
        raise
    run.healthy = True
    metrics.committed(time.monotonic() - started)
    run.book.recorded(bytes_up)
    work.updates[row.client] = row
    run.events.emit(
        "update_accepted",
        round=row.round,
        client=row.client,
        weight=row.weight,
        bytes=row.nbytes,
        metrics=dict(row.metrics),
    )


def same(row: UpdateRow, header: pb.SubmitHeader) -> bool:
    """True when `header` announces the update that was accepted; raises DuplicateError for any other."""
    if row.digest != header.sha256:
        raise DuplicateError(
            problem(f"update of {row.client} in round {row.round}", f"SHA-256 {row.digest}", header.sha256)
        )
    return True


def _row(task: TaskRow, header: pb.SubmitHeader) -> UpdateRow:
    client, weight = task.member.id, int(header.weight)
    if not 1 <= weight <= MAX_WEIGHT:
        raise WireError(problem(f"weight of {client}", f"1 to {MAX_WEIGHT}", weight))
    metrics = {key: float(value) for key, value in header.metrics.items()}
    return UpdateRow(task.round, client, header.sha256, weight, int(header.nbytes), metrics)
