"""The kernels that are really installed, on a real GPU: run this file where there is one. Skipped elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from unit.packed import packs_like_copies

from para_core.attention.backends import BACKENDS, pytorch
from para_core.attention.choice import Chooser, request_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

SHAPES = [(1, 24, 24, 1024, 1024, 128), (2, 12, 12, 333, 77, 64), (1, 8, 2, 512, 512, 128)]
"""B, H, Hkv, S, M, D."""
ERROR = {"sage": 0.08, "sage3": 0.2, "comfy-kitchen": 0.05}


def tensors(shape, dtype=torch.bfloat16):
    batch, heads, kv_heads, rows, keys, dim = shape
    generator = torch.Generator("cuda").manual_seed(0)
    make = {"device": "cuda", "dtype": dtype, "generator": generator}
    # Views of (S, B, H, D) memory, as they come out of an exchange.
    q = torch.randn(rows, batch, heads, dim, **make).permute(1, 2, 0, 3)
    kv = torch.randn(keys, batch, 2 * kv_heads, dim, **make)
    return q, kv[:, :, :kv_heads].permute(1, 2, 0, 3), kv[:, :, kv_heads:].permute(1, 2, 0, 3)


def masks(shape):
    batch, _, _, rows, keys, _ = shape
    generator = torch.Generator("cuda").manual_seed(1)
    full = torch.rand(batch, 1, rows, keys, device="cuda", generator=generator) > 0.3
    full[:, :, 0] = False
    bias = torch.randn(1, 1, rows, keys, device="cuda", dtype=torch.bfloat16, generator=generator)
    return {"none": None, "keys": full[:, :, 1:2], "full": full, "additive": bias}


def relative(out, exact):
    return ((out.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kind", ["none", "keys", "full", "additive"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("needs_lse", [False, True], ids=["out", "lse"])
def test_each_installed_kernel_gives_the_formulas_result_for_each_call_it_takes(backend, shape, kind, needs_lse):
    if reason := backend.probe():
        pytest.skip(reason)
    q, k, v = tensors(shape)
    mask = masks(shape)[kind]
    request = request_of(q, k, mask, 0.1, needs_lse=needs_lse)
    if reason := "no log-sum-exp" if needs_lse and backend.run_lse is None else backend.refuse(request):
        pytest.skip(reason)
    before = k.clone()
    exact, exact_lse = pytorch.plain(q.float(), k.float(), v.float(), mask=mask, scale=0.1)
    if needs_lse:
        out, lse = backend.run_lse(q, k, v, mask=mask, scale=0.1)
        assert lse.dtype == torch.float32 and torch.equal(lse.isneginf(), exact_lse.isneginf())
        torch.testing.assert_close(lse, exact_lse, rtol=1e-2, atol=3e-2)
    else:
        out = backend.run(q, k, v, mask=mask, scale=0.1)
    assert out.shape == q.shape and out.dtype == q.dtype and torch.isfinite(out).all()
    out = out.masked_fill(exact_lse.isneginf()[..., None], 0)  # rows without keys may hold anything finite
    assert relative(out, exact) < ERROR.get(backend.name, 8e-3)
    assert torch.equal(k, before), "the kernel has changed its input"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_computes_every_dtype_and_passes_its_own_check(dtype):
    said = []
    choice = Chooser("auto", say=said.append)
    q, k, v = tensors((1, 24, 24, 9000, 9000, 128), dtype)
    choice.begin_forward()
    out = choice.kernel(SimpleNamespace(low_precision=True)).run(q, k, v, mask=None, scale=None)
    exact, _ = pytorch.plain(q.float()[:, :, :256], k.float(), v.float(), mask=None, scale=None)
    assert relative(out[:, :, :256], exact) < 0.1 and choice.end_forward() and said == []


def test_the_check_of_quantised_kernels_does_not_disturb_a_graph_capture():
    choice = Chooser("auto", say=lambda _: None)
    choice.will_capture = True
    q, k, v = tensors((1, 24, 24, 9000, 9000, 128))
    kernel = choice.kernel(SimpleNamespace(low_precision=True))
    for _ in range(2):
        choice.begin_forward()
        eager = kernel.run(q, k, v, mask=None, scale=None)
    if not all(choice._captured.values()):
        pytest.skip(f"not captured: {choice._captured}")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        choice.begin_forward()
        out = kernel.run(q, k, v, mask=None, scale=None)
    graph.replay()
    torch.testing.assert_close(out, eager)
    assert choice.end_forward()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_graph_holds_a_kernel_or_the_chooser_refuses_to_capture_it(backend):
    q, k, v = tensors((1, 24, 24, 512, 512, 128))
    if reason := backend.probe() or backend.refuse(request_of(q, k, None, None)):
        pytest.skip(reason)
    choice = Chooser("auto", say=lambda _: None, table=(backend,), order=lambda request: (backend.name,))
    choice.will_capture = True
    kernel = choice.kernel(SimpleNamespace(low_precision=True))
    kernel.run(q, k, v, mask=None, scale=None)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = kernel.run(q, k, v, mask=None, scale=None)
    except RuntimeError as error:
        assert "where a CUDA graph does not see them" in str(error)
        assert backend.name == "sage", "every other kernel is captured"
        return
    v.mul_(-1)
    expected = kernel.run(q, k, v, mask=None, scale=None)
    graph.replay()
    assert relative(out, expected.float()) < 1e-2


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 12, 12, 37, 64), (2, 12, 12, 5, 128), (1, 24, 12, 9, 80), (3, 48, 48, 2, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_messages_are_packed_and_unpacked_as_by_plain_copies(shape, ranks, dtype):
    packs_like_copies(shape, ranks, device="cuda", dtype=dtype)
    packs_like_copies(shape, ranks, parts=3, device="cuda", dtype=dtype)
