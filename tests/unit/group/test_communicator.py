"""The communicator over real gloo: every collective against its definition, and how failures end.

Where two CUDA devices are visible, the collectives are checked over NCCL too.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from unit.group.ranks import run_ranks

from para_core.group.communicator import CommunicationFailed, Communicator, Meshes
from para_core.sequence.mesh import Degrees

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool]
PROMPT_S = 3.0  # much less than any timeout given below
LARGE = 1 << 25  # elements; more than sockets buffer, so that a transfer is still under way a moment later

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))]


def world_size(device: str) -> int:
    return 4 if device == "cpu" else min(4, torch.cuda.device_count())


def join(
    rank: int, size: int, store: Path, name: str = "first", device: str = "cpu", timeout_s: float = 60.0, **options: Any
) -> Communicator:
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    return Communicator.join(store, name, rank, size, device, timeout_s, **options)


def numbers(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """The same on every rank for the same seed; small integers, so that sums are exact in every dtype."""
    values = torch.randint(0, 8, (count,), generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8))


# -- what the collectives do ------------------------------------------------------------------------------------------


def all_to_all_program(rank: int, size: int, store: Path, device: str) -> None:
    comm = join(rank, size, store, device=device)
    rng = random.Random(7)
    for case in range(3 * len(DTYPES)):
        dtype = DTYPES[case % len(DTYPES)]
        sizes = [[rng.choice([0, 0, 1, 2, 5, 33]) for _ in range(size)] for _ in range(size)]  # [from][to]
        if case == 0:
            sizes = [[0] * size] * size
        pieces = [[numbers(sizes[a][b], dtype, hash((case, a, b))) for b in range(size)] for a in range(size)]
        sent = torch.cat(pieces[rank]).to(comm.device)
        received = torch.zeros(sum(sizes[a][rank] for a in range(size)), dtype=dtype, device=comm.device)
        comm.all_to_all(received, sent, [sizes[a][rank] for a in range(size)], sizes[rank])
        assert same(received, torch.cat([pieces[a][rank] for a in range(size)])), (case, dtype, sizes)
    comm.close()


def started_all_to_all_program(rank: int, size: int, store: Path, device: str) -> None:
    """Several under way at once; of each rank's own pieces some are copied, some left out of what is sent, some of what arrives."""
    comm = join(rank, size, store, device=device)
    rng = random.Random(3)
    waits, checks = [], []
    for case in range(3 * len(DTYPES)):
        dtype = DTYPES[case % len(DTYPES)]
        sizes = [[rng.choice([0, 1, 2, 33]) for _ in range(size)] for _ in range(size)]  # [from][to]
        pieces = [[numbers(sizes[a][b], dtype, hash((case, a, b))) for b in range(size)] for a in range(size)]
        outward, inward = list(sizes[rank]), [sizes[a][rank] for a in range(size)]
        parts, expected = list(pieces[rank]), [pieces[a][rank] for a in range(size)]
        received = torch.zeros(sum(inward), dtype=dtype, device=comm.device)
        if case % 3 == 0:
            outward[rank], parts[rank] = 0, parts[rank][:0]
            expected[rank] = numbers(inward[rank], dtype, 99)
            received.split(inward)[rank].copy_(expected[rank])
        elif case % 3 == 1:
            inward[rank], expected[rank] = 0, expected[rank][:0]
            received = received.new_zeros(sum(inward))
        sent = torch.cat(parts).to(comm.device)
        if case % 2:
            waits.append(comm.start_all_to_all(received, sent, inward, outward))
        else:
            comm.all_to_all(received, sent, inward, outward)
        checks.append((case, received, torch.cat(expected)))
    for wait in waits:
        wait()
    for case, received, whole in checks:
        assert same(received, whole), case
    comm.close()


def reduce_and_broadcast_program(rank: int, size: int, store: Path, device: str) -> None:
    comm = join(rank, size, store, device=device)
    for dtype in [*FLOATS, torch.int64, torch.int32, torch.uint8]:
        for count in (1, 3, 1000):
            tensor = numbers(count, dtype, rank).to(comm.device)
            comm.all_reduce(tensor)
            assert same(tensor, sum((numbers(count, dtype, r) for r in range(1, size)), numbers(count, dtype, 0))), dtype
    for dtype in DTYPES:
        for root in range(size):
            for shape in ((), (0,), (5,), (2, 3, 4)):
                count = torch.Size(shape).numel()
                tensor = numbers(count, dtype, rank).reshape(shape).to(comm.device)
                comm.broadcast(tensor, root)
                assert same(tensor.reshape(-1), numbers(count, dtype, root)), (dtype, root, shape)
    with pytest.raises(ValueError, match="contiguous"):
        comm.broadcast(torch.zeros(4, 4, device=comm.device).t())
    comm.close()


def shift_program(rank: int, size: int, store: Path, device: str) -> None:
    """A ring with uneven and empty pieces, several shifts under way, other collectives in between."""
    comm = join(rank, size, store, device=device)
    rows = [3, 0, 5, 1][:size]
    for dtype in DTYPES:
        held = numbers(rows[rank] * 2, dtype, rank).reshape(rows[rank], 2).to(comm.device)
        for step in range(1, size):
            source = (rank - step) % size
            coming = torch.zeros(rows[source], 2, dtype=dtype, device=comm.device)
            wait = comm.shift(held, (rank + 1) % size, coming, (rank - 1) % size)
            again = torch.zeros_like(coming)
            wait_again = comm.shift(held, (rank + 1) % size, again, (rank - 1) % size)
            if device == "cpu":
                total = torch.ones(2)
                comm.all_reduce(total)
                assert total.tolist() == [size, size]
            wait_again()
            wait()
            assert same(coming, numbers(rows[source] * 2, dtype, source).reshape(rows[source], 2)) and same(again, coming), (dtype, step)
            held = coming
    backwards = torch.zeros(4, device=comm.device)
    comm.shift(torch.full((4,), float(rank), device=comm.device), (rank - 1) % size, backwards, (rank + 1) % size)()
    assert backwards.tolist() == [(rank + 1) % size] * 4
    # Only the first and the last rank take part.
    nothing = torch.empty(0, device=comm.device)
    if rank == 0:
        comm.shift(nothing, size - 1, backwards, size - 1)()
        assert backwards.tolist() == [7.0] * 4
    elif rank == size - 1:
        comm.shift(torch.full((4,), 7.0, device=comm.device), 0, nothing, 0)()
    comm.all_reduce(backwards)
    comm.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "program", [all_to_all_program, started_all_to_all_program, reduce_and_broadcast_program, shift_program], ids=lambda p: p.__name__
)
def test_collectives_do_what_the_protocol_says_for_uneven_sizes_and_all_dtypes(program: Callable, device: str, tmp_path: Path) -> None:
    run_ranks(program, world_size(device), tmp_path / "store", device)


def test_alone_every_collective_is_a_copy_and_needs_no_store() -> None:
    comm = Communicator.join("/nowhere/store", "alone", 0, 1, "cpu", 1.0)
    sent, received = torch.arange(5.0), torch.zeros(5)
    comm.all_to_all(received, sent, [5], [5])
    assert torch.equal(received, sent)
    comm.shift(sent + 1, 0, received, 0)()
    assert torch.equal(received, sent + 1)
    comm.all_reduce(received)
    comm.broadcast(received)
    assert torch.equal(received, sent + 1)
    assert comm.split([0]) is comm
    comm.settle()
    comm.close()
    with pytest.raises(CommunicationFailed):
        comm.all_reduce(received)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch comes with NCCL")
def test_without_nccl_a_group_of_gpus_fails_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "1")
    monkeypatch.delenv("NCCL_GRAPH_REGISTER")
    with pytest.raises(CommunicationFailed, match="comes without NCCL"):
        Communicator.join(tmp_path / "store", "first", 0, 2, "cuda:0", 1.0, 1.0)
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["NCCL_GRAPH_REGISTER"]) == ("eth7", "0"), "the user's choice, and ours"


# -- meshes -----------------------------------------------------------------------------------------------------------


def mesh_program(rank: int, size: int, store: Path) -> list[Any]:
    world = join(rank, size, store)
    meshes = Meshes(world)
    seen = []
    for degrees in [Degrees(1, 2, 2), Degrees(2, 1, 2), Degrees(1, 1, 3), Degrees(1, 4, 1), Degrees(3, 1, 1), Degrees(1, 2, 2)]:
        mesh = meshes.mesh(degrees)
        assert meshes.mesh(degrees) is mesh
        if mesh is None:
            seen.append(None)
            continue
        for comm in (mesh.sequence, mesh.ulysses, mesh.ring):
            assert isinstance(comm, Communicator) and comm.ranks[comm.rank] == rank and comm.size == len(comm.ranks)
            total = torch.tensor([float(rank)])
            comm.all_reduce(total)
            assert total.item() == sum(comm.ranks)
        assert mesh.ulysses.rank == mesh.sequence.rank % degrees.ulysses and mesh.ring.rank == mesh.sequence.rank // degrees.ulysses
        seen.append([mesh.sequence.ranks, mesh.ulysses.ranks, mesh.ring.ranks])
    with pytest.raises(ValueError, match="8 ranks"):
        meshes.mesh(Degrees(2, 2, 2))
    world.close()
    return seen


def test_meshes_place_batch_parts_first_then_rings_with_ulysses_neighbours_adjacent(tmp_path: Path) -> None:
    by_rank = run_ranks(mesh_program, 4, tmp_path / "store")
    unified, batched, three, ring, parts, again = zip(*by_rank, strict=True)
    everyone = (0, 1, 2, 3)
    assert list(unified) == [[everyone, (0, 1), (0, 2)], [everyone, (0, 1), (1, 3)], [everyone, (2, 3), (0, 2)], [everyone, (2, 3), (1, 3)]]
    assert list(batched) == [[(0, 1), (0, 1), (0,)], [(0, 1), (0, 1), (1,)], [(2, 3), (2, 3), (2,)], [(2, 3), (2, 3), (3,)]]
    assert list(three) == [[(0, 1, 2), (0, 1, 2), (rank,)] for rank in range(3)] + [None]
    assert list(ring) == [[everyone, (rank,), everyone] for rank in range(4)]
    assert list(parts) == [[(rank,)] * 3 for rank in range(3)] + [None]
    assert again == unified


# -- failures ---------------------------------------------------------------------------------------------------------


def failure_of(act: Callable[[], Any]) -> tuple[float, str]:
    """Seconds until ``act`` raised ``CommunicationFailed``, and its message."""
    begin = time.monotonic()
    with pytest.raises(CommunicationFailed) as raised:
        act()
    return time.monotonic() - begin, str(raised.value)


def reduce(comm: Communicator) -> None:
    comm.all_reduce(torch.ones(3))


def peer_aborts_program(rank: int, size: int, store: Path) -> float:
    comm = join(rank, size, store)
    mesh = Meshes(comm).mesh(Degrees(1, 3, 1))
    assert mesh is not None
    reduce(comm)
    if rank == 0:
        time.sleep(0.5)
        comm.abort()
        comm.abort()
    seconds, _ = failure_of(lambda: reduce(comm))
    seconds += failure_of(lambda: reduce(comm))[0]  # and it stays so
    seconds += failure_of(lambda: comm.split([0, 1] if rank < 2 else [2, 1]))[0] if rank == 0 else 0
    comm.close()
    fresh = join(rank, size, store, name="second")
    reduce(fresh)
    fresh.close()
    return seconds


def test_an_abort_fails_the_peers_pending_collectives_and_the_next_communicator_works(tmp_path: Path) -> None:
    assert max(run_ranks(peer_aborts_program, 3, tmp_path / "store")) < PROMPT_S


def own_abort_program(rank: int, size: int, store: Path) -> float:
    if rank != 1:
        comms = [join(rank, size, store, name) for name in ("collective", "shift")]
        time.sleep(2.0)
        return float(len(comms) - 2)
    seconds = 0.0
    for name, act in (("collective", receive_broadcast), ("shift", receive_shift)):
        comm = join(rank, size, store, name)
        threading.Timer(0.3, comm.abort).start()
        seconds += failure_of(partial(act, comm))[0]
        begin = time.monotonic()
        comm.close()
        comm = None  # type: ignore[assignment]
        seconds += time.monotonic() - begin
    return seconds


def receive_broadcast(comm: Communicator) -> None:
    comm.broadcast(torch.zeros(4))


def receive_shift(comm: Communicator) -> None:
    comm.shift(torch.empty(0), 0, torch.zeros(4), 0)()


def test_an_abort_from_another_thread_fails_this_ranks_pending_collective_or_shift(tmp_path: Path) -> None:
    assert max(run_ranks(own_abort_program, 3, tmp_path / "store")) < PROMPT_S


def subgroup_abort_program(rank: int, size: int, store: Path) -> float:
    comm = join(rank, size, store)
    pair = comm.split([0, 1] if rank < 2 else [2, 3])
    reduce(pair)
    if rank in (0, 2):
        threading.Timer(0.3, comm.abort).start()
        time.sleep(1.0)
        return failure_of(lambda: reduce(pair))[0]
    return failure_of(lambda: reduce(pair))[0]


def test_an_abort_reaches_subgroups(tmp_path: Path) -> None:
    assert max(run_ranks(subgroup_abort_program, 4, tmp_path / "store")) < PROMPT_S


def killed_peer_program(rank: int, size: int, store: Path) -> float:
    comm = join(rank, size, store)
    reduce(comm)
    if rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    return failure_of(lambda: reduce(comm))[0]


def test_a_killed_peer_fails_pending_collectives_at_once(tmp_path: Path) -> None:
    first, killed, third = run_ranks(killed_peer_program, 3, tmp_path / "store")
    assert killed is None and max(first, third) < PROMPT_S


class Noticed(RuntimeError):
    """What a watcher of the processes raises."""


def killed_in_transfer_program(rank: int, size: int, store: Path) -> float:
    """Gloo itself may not notice before its timeout that the sender of half a message has died."""
    begin = time.monotonic()

    def on_wait() -> None:
        if time.monotonic() > begin + 1.5:
            raise Noticed

    comm = join(rank, size, store, on_wait=on_wait)
    tensor = torch.zeros(LARGE)
    begin = time.monotonic()
    if rank == 0:
        threading.Thread(target=comm.broadcast, args=(tensor,), daemon=True).start()
        time.sleep(0.03)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises((Noticed, CommunicationFailed)):
        comm.broadcast(tensor)
    comm.abort()
    comm.close()
    comm = None  # type: ignore[assignment]
    return time.monotonic() - begin


def test_a_watcher_ends_the_wait_for_a_peer_killed_within_a_message_and_closing_does_not_block(tmp_path: Path) -> None:
    killed, *others = run_ranks(killed_in_transfer_program, 3, tmp_path / "store")
    assert killed is None and max(others) < PROMPT_S


def stopped_peer_program(rank: int, size: int, store: Path) -> float:
    comm = join(rank, size, store, timeout_s=1.5)
    reduce(comm)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return failure_of(lambda: reduce(comm))[0]


def test_a_stopped_peer_fails_collectives_after_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] did not end") as ended:
        run_ranks(stopped_peer_program, 2, tmp_path / "store", limit_s=4)
    assert "(True, " in str(ended.value)  # rank 0 has returned


def absent_peer_program(rank: int, size: int, store: Path) -> tuple[float, str]:
    if rank == 2:
        return 0.0, ""
    if rank == 1:
        return failure_of(lambda: join(rank, size, store, join_timeout_s=1.0))

    begin = time.monotonic()

    def on_wait() -> None:
        if time.monotonic() > begin + 0.3:
            raise Noticed

    with pytest.raises(Noticed):
        join(rank, size, store, on_wait=on_wait)
    return time.monotonic() - begin, ""


def test_joining_ends_when_a_rank_does_not_come_and_names_it(tmp_path: Path) -> None:
    watched, waiting, _ = run_ranks(absent_peer_program, 3, tmp_path / "store")
    assert watched[0] < 1.0
    assert 0.9 < waiting[0] < PROMPT_S and "rank 2 did not join" in waiting[1]


# -- what it leaves open ----------------------------------------------------------------------------------------------


def listening_program(rank: int, size: int, store: Path) -> dict[str, Any]:
    def listening() -> list[str]:
        return [connection.laddr.ip for connection in psutil.Process().net_connections("inet") if connection.status == psutil.CONN_LISTEN]

    before, variables = listening(), dict(os.environ)
    comm = join(rank, size, store)
    Meshes(comm).mesh(Degrees(1, 2, 2))
    reduce(comm)
    during = listening()
    idle = time.process_time()
    time.sleep(0.5)
    idle = time.process_time() - idle
    reduce(comm)
    comm.close()
    assert not torch.distributed.is_initialized()
    return {"before": before, "during": during, "after": listening(), "idle": idle, "environment": dict(os.environ) == variables}


def test_gloo_listens_on_loopback_only_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for seen in run_ranks(listening_program, 4, tmp_path / "store"):
        assert seen["before"] == seen["after"] == []
        assert seen["during"] and set(seen["during"]) == {"127.0.0.1"}
        assert seen["idle"] < 0.05
        assert seen["environment"]
