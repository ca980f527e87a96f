"""The exchange of attention where there is a GPU: two ranks, what arrives and, on two cards, how long it takes.

    python tests/gpu/exchange.py          cuDNN, SageAttention and comfy-kitchen, where installed, and blocks; tables last (minutes)
    python tests/gpu/exchange.py --cpu    the same with CPU ranks and small tensors, to see that the script works
    python tests/gpu/exchange.py NAME     only these kernels, or blocks
    ... --compiled                        quantising compiled, rank 0's through inductor's C++ wrapper (add a minute or two)

On one card both ranks use it, which shows whether results are right, not what they cost: only quantising alone is timed there,
by one rank. Rank 0 has the allocator of ComfyUI's own process (cudaMallocAsync), rank 1 torch's own.

First table: a call of 1537 tokens by two ranks, shared in every way. `exact`: relative error against float32 on one rank;
`alone`: that of the kernel itself there; `way`: against the same kernel, shared the plain way; `parts`: whether heads in parts
give the same bits as heads at once; `graph`: whether a captured call, replayed on other tensors, gives what an eager one gives.
Second table: milliseconds of packing and unpacking what leaves a rank, as it is and as bytes; plain operations, then compiled.
Third table, two cards: milliseconds of attention alone, the exchange alone, and both, eager and in a graph.
Fourth table: FLUX models of a few compiled blocks. `stock`: relative error of one rank's eager forwards against float32; `error`:
that of two ranks' compiled ones; `ms`, on two cards: of a forward, the MLP beside the exchange or not.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parents[1])  # this folder holds names of others
sys.path.append(str(HERE.parent))

import torch  # noqa: E402

from gpu import blocks  # noqa: E402
from gpu.processes import SHOWN, Process, put  # noqa: E402
from para_core.attention import wire  # noqa: E402
from para_core.attention.backends import BACKENDS, Backend, pytorch  # noqa: E402
from para_core.attention.choice import request_of  # noqa: E402
from para_core.attention.exchange import Exchange, Way, attend  # noqa: E402
from para_core.attention.message import BYTES, PARTS, Bytes, Piece  # noqa: E402
from para_core.execution import gain  # noqa: E402
from para_core.group.communicator import Communicator, Meshes  # noqa: E402
from para_core.group.link import measure  # noqa: E402
from para_core.sequence.layout import Joint, balanced  # noqa: E402
from para_core.sequence.mesh import Degrees  # noqa: E402

KERNELS = ("cudnn", "sage", "comfy-kitchen")
WAYS = {"plain": Way(), "bytes": Way(wire=True), "2 parts": Way(parts=2), "bytes, 4 parts": Way(wire=True, parts=4)}
SHAPES = {"FLUX 1024²": (24, 4608, 128), "Wan 480p 81f": (40, 32760, 128)}
SMALL = {"small": (6, 192, 16)}
LIMIT = 300  # seconds a kernel
COLLECTIVE = 120.0  # seconds; one rank may be compiling meanwhile
QUANTISED = 0.03
"""The most that travelling as bytes may add (unit-normal data: 1e-2)."""


class Local:
    """A backend as the kernel of an exchange."""

    def __init__(self, backend: Backend):
        self.backend, self.has_lse = backend, backend.run_lse is not None

    def run(self, q, k, v, *, mask, scale):
        return self.backend.run(q, k, v, mask=mask, scale=scale)

    def run_lse(self, q, k, v, *, mask, scale):
        return self.backend.run_lse(q, k, v, mask=mask, scale=scale)


class Nothing(Local):
    """No arithmetic: what is left is the exchange."""

    def run(self, q, k, v, *, mask, scale):
        return q


# -- the parent: starts two ranks a kernel, prints the tables ---------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*(backend.name for backend in BACKENDS), blocks.NAME]))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        with torch.inference_mode():
            inside(options.rank, options.store, options.names[0], cpu=options.cpu, compiled=options.compiled)
        return
    started, tables, failed = time.time(), {"right": [], "bytes": [], "times": [], "blocks": []}, 0
    for name in options.names or (*(("pytorch",) if options.cpu else KERNELS), blocks.NAME):
        rows, text = outcome(name, cpu=options.cpu, compiled=options.compiled)
        failed += sum("FAIL" in row for _, row in rows)
        for table, row in rows:
            tables[table].append(row)
        if text:
            print(text, flush=True)
    heads = {
        "right": f"{'kernel':14}{'mode':9}{'way':16}{'exact':9}{'alone':9}{'way':9}{'parts':7}{'graph':7}ok",
        "bytes": f"{'shape':15}{'as it is':>10}{'bytes':>10}{'compiled':>10}   {'MB sent':>8}{'GB/s copied':>12}",
        "times": f"{'kernel':14}{'shape':15}{'way':16}{'attention':>10}{'exchange':>10}{'both':>10}{'exposed':>9}"
        f"{'in a graph':>12}{'exposed':>9}",
        "blocks": blocks.HEAD,
    }
    for table, rows in tables.items():
        if rows:
            print("\n" + heads[table], *dict.fromkeys(rows), sep="\n")
    print(f"\n{time.time() - started:.0f} s, {failed} not ok")
    sys.exit(bool(failed))


def outcome(name: str, *, cpu: bool, compiled: bool) -> tuple[list[tuple[str, str]], str]:
    """Rows of the tables by a kernel's two ranks, and what they said if something went wrong."""
    with tempfile.TemporaryDirectory(prefix="paradit-gpu-") as folder:
        call = [sys.executable, str(Path(__file__).resolve()), name, "--store", str(Path(folder) / "store"), *(["--cpu"] if cpu else [])]
        call += ["--compiled"] if compiled else []
        ranks = []
        for rank in range(2):
            # ranks that share a card are taken for a mistake unless they seem to be on two machines
            own = {"NCCL_HOSTID": f"paradit-rank{rank}"} if not cpu and torch.cuda.device_count() < 2 else {}
            own |= {} if rank or cpu or name == blocks.NAME else {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
            own |= {} if rank or cpu or not compiled else {"TORCHINDUCTOR_CPP_WRAPPER": "1"}
            ranks.append(Process([*call, "--rank", str(rank)], own, said=not rank))
        late = time.time() + LIMIT
        codes = [process.end(max(1.0, late - time.time())) for process in ranks]
    rows = [(table, row) for table, row in ranks[0].rows]
    if codes != ["0", "0"]:
        rows.append(("right", f"{name:14}FAIL: the ranks ended with {' and '.join(codes)}"))
        return rows, "\n".join("\n".join([f"-- rank {rank}", *process.lines[-SHOWN:]]) for rank, process in enumerate(ranks))
    return rows, "\n".join(line for line in ranks[0].lines if line.startswith("SAY "))


# -- a rank -----------------------------------------------------------------------------------------------------------------


def inside(rank: int, store: str, name: str, *, cpu: bool, compiled: bool) -> None:
    faulthandler.dump_traceback_later(LIMIT - 10)  # where it hangs, if it does
    cards = 0 if cpu else torch.cuda.device_count()
    device = torch.device("cpu") if cpu else torch.device("cuda", rank % cards)
    if cpu:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    if name == blocks.NAME:
        comm = Communicator.join(store, name, rank, 2, device, COLLECTIVE)
        for row in blocks.rows(comm, device, cpu=cpu, timed=cpu or cards > 1):
            say("blocks", row, comm)
        return end(comm, device)
    backend = next(backend for backend in BACKENDS if backend.name == name)
    heads, tokens, dim = (6, 77, 16) if cpu else (24, 1537, 128)
    dtype = torch.float32 if cpu else torch.bfloat16
    probe = torch.empty(1, device=device, dtype=dtype).expand(1, heads, tokens, dim)
    if reason := backend.probe() or backend.refuse(request_of(probe, probe, None, None)):
        if rank == 0:
            print(f"SAY {name}: {reason}")
        return
    comm = Communicator.join(store, "exchange", rank, 2, device, COLLECTIVE)
    right(Ranks(comm, backend, device, dtype, compiled=compiled), heads, tokens, dim)
    if rank == 0 and name == ("pytorch" if cpu else KERNELS[0]):
        for shape, sizes in (SMALL if cpu else SHAPES).items():
            packing(shape, *sizes, device, dtype)
    if cpu or cards > 1:
        found = measure(comm, device)
        if rank == 0:
            print(f"SAY link: {found.latency * 1e6:.0f} us, {found.rate / 1e9:.0f} GB/s")
        for shape, sizes in (SMALL if cpu else SHAPES).items():
            times(Ranks(comm, backend, device, dtype, compiled=compiled), shape, *sizes)
    end(comm, device)


def end(comm: Communicator, device: torch.device) -> None:
    comm.all_reduce(torch.zeros(1, device=device))
    comm.settle()
    comm.close()


class Ranks:
    """This rank's half of calls that both make."""

    def __init__(self, comm: Communicator, backend: Backend, device: torch.device, dtype: torch.dtype, *, compiled: bool):
        self.comm, self.backend, self.device, self.dtype = comm, backend, device, dtype
        self.meshes = Meshes(comm)
        self.bytes = Bytes(*wire.compiled()) if compiled else BYTES

    def tensors(self, heads: int, tokens: int, dim: int, seed: int) -> list[torch.Tensor]:
        """q, k, v ``(1, H, S, D)`` of all rows; keys with a part in common."""
        make = torch.Generator().manual_seed(seed)
        found = [torch.randn(1, tokens, heads, dim, generator=make) for _ in range(3)]
        found[1] += 3 * torch.randn(1, 1, heads, dim, generator=make)
        return [tensor.to(self.device, self.dtype).transpose(1, 2) for tensor in found]

    def own(self, joint: Joint, tensor: torch.Tensor) -> torch.Tensor:
        start = sum(joint.rows[: self.comm.rank])
        rows = joint.rank_major[start : start + joint.rows[self.comm.rank]].to(self.device)
        return tensor[:, :, rows]

    def exchange(self, joint: Joint, mode: str) -> Exchange:
        mesh = self.meshes.mesh(Degrees(ulysses=2) if mode == "ulysses" else Degrees(ring=2))
        return Exchange(mesh, joint, joint, Local(self.backend), bytes=self.bytes)

    def call(self, exchange: Exchange, way: Way, tensors: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: attend(exchange, *tensors, way=way)


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.float() - exact.float()).norm() / exact.float().norm())


def right(ranks: Ranks, heads: int, tokens: int, dim: int) -> None:
    """One call in every way, against one rank."""
    joint = Joint((balanced(tokens // 3, 2), balanced(tokens - tokens // 3, 2)))
    whole, others = (ranks.tensors(heads, tokens, dim, seed) for seed in (0, 1))
    exact = ranks.own(joint, pytorch.plain(*whole, mask=None, scale=None)[0])
    alone = relative(ranks.own(joint, ranks.backend.run(*whole, mask=None, scale=None)), exact)
    for mode in ("ulysses", *(["ring"] if ranks.backend.run_lse is not None else [])):
        exchange, plain, once = ranks.exchange(joint, mode), None, {}
        for name, way in WAYS.items():
            if mode == "ring" and way.parts > 1:
                continue
            local = [ranks.own(joint, tensor) for tensor in whole]
            out = ranks.call(exchange, way, local)()
            plain = out if plain is None else plain
            error, added = relative(out, exact), relative(out, plain)
            same = same_bits(ranks, exchange, way, local, out, once)
            graph = captured(ranks, exchange, way, local, [ranks.own(joint, tensor) for tensor in others])
            limit = 1.5 * alone + 1e-6 + (QUANTISED if way.wire else 0)
            wrong = not error <= limit or not added <= (QUANTISED + alone if way.wire else alone + 1e-6) or graph == "differs"
            wrong = wrong or same == "differ" and ranks.backend.exact
            wrong = agreed(ranks, wrong)
            text = f"{ranks.backend.name:14}{mode:9}{name:16}{error:<9.1e}{alone:<9.1e}{added:<9.1e}{same:7}{graph:7}"
            say("right", text + ("FAIL" if wrong else "ok"), ranks.comm)
        local[2][..., 0, 0] = float("nan") if ranks.comm.rank else 1.0
        seen = torch.isnan(ranks.call(exchange, WAYS["bytes"], local)()).any()
        say("right", f"{ranks.backend.name:14}{mode:9}{'NaN, as bytes':57}{'FAIL' if agreed(ranks, not seen) else 'ok'}", ranks.comm)


def same_bits(ranks: Ranks, exchange: Exchange, way: Way, local: list[torch.Tensor], out: torch.Tensor, once: dict) -> str:
    if way.parts == 1:
        once[way.wire] = out
        return "-"
    return "same" if torch.equal(once.get(way.wire, out), out) else "differ"


def captured(ranks: Ranks, exchange: Exchange, way: Way, tensors: list[torch.Tensor], others: list[torch.Tensor]) -> str:
    """Capture a call, replay it on other tensors, and compare with an eager call of those."""
    if ranks.device.type != "cuda" or ranks.backend.name == "sage":  # SageAttention 2 launches where a capture does not see it
        return "-"
    call = ranks.call(exchange, way, tensors)
    call()
    torch.cuda.synchronize()
    graph = record(call)
    for tensor, other in zip(tensors, others, strict=True):
        tensor.copy_(other)
    expected = call().clone()
    graph[1].zero_()
    graph[0].replay()
    torch.cuda.synchronize()
    return "same" if torch.equal(graph[1], expected) else "near" if relative(graph[1], expected) < 1e-2 else "differs"


def record(call: Callable[[], torch.Tensor], count: int = 1) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(count):
            out = call()
    return graph, out


def agreed(ranks: Ranks, wrong: object) -> bool:
    """Whether any rank found something wrong."""
    found = torch.tensor([float(bool(wrong))], device=ranks.device)
    ranks.comm.all_reduce(found)
    return bool(found.item())


def say(table: str, row: str, comm: Communicator | None = None) -> None:
    if comm is None or comm.rank == 0:
        put(table, row)


def spent(call: Callable[[], object], device: torch.device, count: int) -> float:
    """Milliseconds of a call, the median of five times ``count``."""
    call()
    found = []
    for _ in range(5):
        if device.type == "cuda":
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            for _ in range(count):
                call()
            marks[1].record()
            torch.cuda.synchronize(device)
            found.append(marks[0].elapsed_time(marks[1]) / count)
        else:
            started = time.perf_counter()
            for _ in range(count):
                call()
            found.append((time.perf_counter() - started) * 1e3 / count)
    return median(found)


def packing(shape: str, heads: int, tokens: int, dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """What one rank of two packs for the other and unpacks from it, no exchange between them."""
    piece = Piece(1, tokens // 2, tokens // 2, heads // 2, heads // 2, dim)
    sources, targets = ([torch.randn(1, *piece.q, device=device).to(dtype) for _ in range(3)] for _ in range(2))
    found = []
    for form in (PARTS, BYTES, Bytes(*wire.compiled()) if device.type == "cuda" else None):
        if form is None:  # a CPU's compiler is not what is asked about
            found.append(float("nan"))
            continue
        block = torch.empty(1, form.size(piece), dtype=form.dtype or dtype, device=device)

        def there_and_back(form=form, block=block) -> None:
            form.write(block, piece, *sources)
            form.read(block, piece, *targets)

        found.append(spent(there_and_back, device, 10))
    rate = gain.memory_rate(device) if device.type == "cuda" else float("nan")
    say("bytes", f"{shape:15}" + "".join(f"{ms:10.3f}" for ms in found) + f"   {BYTES.size(piece) / 1e6:8.1f}{rate / 1e9:12.0f}")


def times(ranks: Ranks, shape: str, heads: int, tokens: int, dim: int) -> None:
    """Attention, exchange and both: what of the exchange is not hidden."""
    joint = Joint((balanced(tokens, 2),))
    whole = ranks.tensors(heads, tokens, dim, 0)
    share = slice(0, heads // 2)
    count = 10 if tokens < 10000 else 3
    heads_of_one = [tensor[:, share] for tensor in whole]
    attention = spent(lambda: ranks.backend.run(*heads_of_one, mask=None, scale=None), ranks.device, count)
    local = [ranks.own(joint, tensor) for tensor in whole]
    for name, way in WAYS.items():
        exchange = ranks.exchange(joint, "ulysses")
        both = spent(ranks.call(exchange, way, local), ranks.device, count)
        graph = float("nan")
        if ranks.device.type == "cuda" and ranks.backend.name != "sage":
            replay, _ = record(ranks.call(exchange, way, local), count)
            graph = spent(replay.replay, ranks.device, 2) / count
        exchange.kernel = Nothing(ranks.backend)
        only = spent(ranks.call(exchange, way, local), ranks.device, count)
        figures = f"{attention:10.3f}{only:10.3f}{both:10.3f}{both - attention:9.3f}{graph:12.3f}{graph - attention:9.3f}"
        say("times", f"{ranks.backend.name:14}{shape:15}{name:16}{figures}", ranks.comm)


if __name__ == "__main__":
    main()
