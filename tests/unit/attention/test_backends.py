"""What each backend takes, and how it calls the package behind it. The packages are stand-ins; see test_cuda for the real ones."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from para_core.attention.backends import BACKENDS, Request, base, comfy_kitchen, cudnn, flash, pytorch, sage, sage3

GOOD = Request(torch.bfloat16, "cuda", (9, 0), 24, 24, 4608, 4608, 128)
BACKEND_FILES = (comfy_kitchen, cudnn, flash, sage, sage3)
q, k, v = torch.randn(2, 6, 5, 64), torch.randn(2, 2, 7, 64), torch.randn(2, 2, 7, 64)


@pytest.fixture(autouse=True)
def fresh_probes():
    """Probes are cached for the life of the process."""

    def clear():
        for module in BACKEND_FILES:
            for value in vars(module).values():
                getattr(value, "cache_clear", lambda: None)()

    clear()
    yield
    clear()


@pytest.fixture
def install(monkeypatch):
    """``install(name, function=...)``: pretend that a package is installed."""

    def pretend(name, **functions):
        module = ModuleType(name)
        module.__spec__ = object()
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return pretend


def attention(q, k, v, scale=None, mask=None):
    return pytorch.run(q, k, v, mask=mask, scale=scale)


def test_the_table_names_each_backend_once_and_tells_how_to_install_it():
    names = [backend.name for backend in BACKENDS]
    assert sorted(names) == sorted({"pytorch", "cudnn", "flash", "sage", "sage3", "comfy-kitchen"})
    assert all(backend.install for backend in BACKENDS)
    assert {backend.name for backend in BACKENDS if not backend.exact} == {"sage", "sage3", "comfy-kitchen"}


def test_probes_answer_with_a_reason_or_nothing_and_never_raise():
    for backend in BACKENDS:
        reason = backend.probe()
        assert reason is None or (reason and not reason.endswith("."))


@pytest.mark.parametrize(
    "error", [ImportError("undefined symbol"), OSError("libcudart.so"), RuntimeError("built for torch 2.4"), AssertionError()]
)
def test_a_broken_install_is_a_reason_not_an_error(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(base, "find_spec", lambda name: object())
    monkeypatch.setattr(base, "import_module", fail)
    reason = sage.BACKEND.probe()
    assert "does not load" in reason and type(error).__name__ in reason


def test_a_package_without_the_function_is_a_reason(install):
    install("flash_attn")
    assert flash.BACKEND.probe() == "the package flash_attn has no flash_attn_func"


def test_an_old_comfy_kitchen_names_the_version_that_has_the_kernel(install):
    install("comfy_kitchen")
    assert "has no int8 attention; 0.2.40 has" in comfy_kitchen.BACKEND.probe()


def refusals():
    every = (cudnn, flash, sage, sage3, comfy_kitchen)
    for module in every:
        yield module, {"device_type": "cpu", "capability": (0, 0)}, "not on cpu"
        yield module, {"dtype": torch.float32}, "float32"
        yield module, {"capability": (7, 0)}, "compute capability"
    for module in (cudnn, flash, sage, sage3):
        yield module, {"mask": "bool"}, "no mask"
        yield module, {"mask": "additive"}, "no mask"
    for module in (cudnn, sage, sage3):
        yield module, {"head_dim": 256}, "head dims"
    yield flash, {"head_dim": 264}, "head dims"
    yield comfy_kitchen, {"head_dim": 264}, "head dims"
    yield comfy_kitchen, {"needs_lse": True}, "log-sum-exp"
    yield cudnn, {"head_dim": 100}, "head dims"
    yield cudnn, {"kv_len": 1}, "single key"
    yield sage, {"capability": (10, 0)}, "10.0"
    yield sage, {"capability": (8, 7)}, "8.7"
    yield sage3, {"capability": (12, 0), "has_scale": True}, "scale"
    yield sage3, {"capability": (9, 0)}, "compute capability"
    yield sage3, {"capability": (12, 0), "head_dim": 96}, "head dims"


@pytest.mark.parametrize(("module", "change", "reason"), [pytest.param(*r, id=f"{r[0].BACKEND.name} {r[1]}") for r in refusals()])
def test_what_a_backend_cannot_take_is_refused_with_the_reason(install, module, change, reason):
    install_all(install)
    base_request = replace(GOOD, capability=(12, 0)) if module is sage3 else GOOD
    assert module.BACKEND.refuse(base_request) is None
    assert reason in module.BACKEND.refuse(replace(base_request, **change))


def install_all(install):
    install("sageattention", sageattn=sageattn_2)
    install("sageattn3", sageattn3_blackwell=lambda *a, **kw: None)
    install("flash_attn", flash_attn_func=lambda *a, **kw: None)
    install("comfy_kitchen", int8_attention=lambda *a, **kw: None, int8_attention_is_available=lambda: True)


def test_a_comfy_kitchen_kernel_that_does_not_fit_the_device_is_refused(install):
    install("comfy_kitchen", int8_attention=None, int8_attention_is_available=lambda: False)
    assert "does not fit" in comfy_kitchen.BACKEND.refuse(GOOD)


def test_pytorch_takes_everything():
    for change in ({}, {"mask": "bool"}, {"dtype": torch.float64}, {"head_dim": 500}, {"needs_lse": True}, {"device_type": "mps"}):
        assert pytorch.BACKEND.refuse(replace(GOOD, **change)) is None


# --- the stand-ins have the signatures of the real functions


def sageattn_1(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    assert not kwargs and tensor_layout == "NHD" and q.stride(-1) == 1
    k -= k.mean(1, keepdim=True)
    return attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=sm_scale).transpose(1, 2).contiguous()


def sageattn_2(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert not kwargs and tensor_layout == "NHD" and q.stride(-1) == 1
    out, lse = pytorch.run_lse(*(t.transpose(1, 2) for t in (q, k, v)), mask=None, scale=sm_scale)
    out = out.transpose(1, 2).contiguous()
    return (out, lse) if return_lse else out


def test_sage_1_is_called_right_and_leaves_k_alone(install):
    install("sageattention", sageattn=sageattn_1)
    assert sage.BACKEND.probe() is None
    assert "version 1" in sage.BACKEND.refuse(replace(GOOD, needs_lse=True))
    assert "64, 96 and 128" in sage.BACKEND.refuse(replace(GOOD, head_dim=80))
    before = k.clone()
    out = sage.BACKEND.run(q, k, v, mask=None, scale=0.3)
    torch.testing.assert_close(out, attention(q, k, v, 0.3))
    assert torch.equal(k, before)


def test_sage_2_is_called_right_with_and_without_log_sum_exp(install):
    install("sageattention", sageattn=sageattn_2)
    torch.testing.assert_close(sage.BACKEND.run(q, k, v, mask=None, scale=0.3), attention(q, k, v, 0.3))
    out, lse = sage.BACKEND.run_lse(q, k, v, mask=None, scale=None)
    torch.testing.assert_close(out, attention(q, k, v))
    assert lse.shape == (2, 6, 5) and lse.dtype == torch.float32
    assert sage.BACKEND.refuse(replace(GOOD, head_dim=80, needs_lse=True)) is None


def test_sage_gets_copies_of_k_and_v_that_are_slices_of_a_message(install):
    seen = []
    install("sageattention", sageattn=lambda q, k, v, **kw: seen.append((k, v)) or sageattn_2(q, k, v, **kw))
    sys.modules["sageattention"].sageattn.__signature__ = inspect.signature(sageattn_2)
    message = torch.randn(7, 2, 4, 64)
    sliced_k, sliced_v = (t.permute(1, 2, 0, 3) for t in message.chunk(2, 2))
    out, _ = sage.BACKEND.run_lse(q, sliced_k, sliced_v, mask=None, scale=None)
    torch.testing.assert_close(out, attention(q, sliced_k, sliced_v))
    assert all(t.storage_offset() == 0 for t in seen[0])


def test_sage_3_is_called_right_and_leaves_k_alone(install):
    def blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
        assert attn_mask is None and not kwargs and q.shape[1] == k.shape[1]
        k -= k.mean(2, keepdim=True)
        return attention(q, k, v)

    install("sageattn3", sageattn3_blackwell=blackwell)
    for keys, values in ((k, v), (k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))):
        before = keys.clone()
        torch.testing.assert_close(sage3.BACKEND.run(q, keys, values, mask=None, scale=None), attention(q, keys, values))
        assert torch.equal(keys, before)


def test_flash_attn_is_called_right_with_and_without_log_sum_exp(install):
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, *, return_attn_probs=False):
        out, lse = pytorch.run_lse(*(t.transpose(1, 2) for t in (q, k, v)), mask=None, scale=softmax_scale)
        out = out.transpose(1, 2)
        return (out, lse, None) if return_attn_probs else out

    install("flash_attn", flash_attn_func=flash_attn_func)
    torch.testing.assert_close(flash.BACKEND.run(q, k, v, mask=None, scale=0.3), attention(q, k, v, 0.3))
    out, lse = flash.BACKEND.run_lse(q, k, v, mask=None, scale=0.3)
    torch.testing.assert_close(out, attention(q, k, v, 0.3))
    torch.testing.assert_close(lse, pytorch.plain(q, k, v, mask=None, scale=0.3)[1])


def test_comfy_kitchen_is_called_right(install):
    def int8_attention(q, k, v, *, scale=None, attn_mask=None):
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        return attention(q, k, v, scale, attn_mask)

    install("comfy_kitchen", int8_attention=int8_attention)
    assert comfy_kitchen.BACKEND.probe() is None
    mask = torch.randn(1, 1, 1, 7)
    turned = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(comfy_kitchen.BACKEND.run(turned, k, v, mask=mask, scale=0.3), attention(q, k, v, 0.3, mask))


# --- pytorch


def reference(q, k, v, mask, scale):
    """Output and log-sum-exp in float64, by the formula."""
    k, v = (t.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.masked_fill(lse.isneginf(), 0)[..., None]) @ v, lse


@settings(max_examples=60, deadline=None)
@given(
    path=st.sampled_from([pytorch.run_lse, pytorch.plain]),
    mask=st.sampled_from([None, "bool", "additive"]),
    rows=st.sampled_from([1, 5]),
    groups=st.sampled_from([1, 3]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 1000),
)
def test_pytorchs_log_sum_exp_is_the_formulas_also_in_rows_without_keys(path, mask, rows, groups, scale, seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3 // groups, 7, 8), torch.randn(2, 3 // groups, 7, 8)
    bias = None if mask is None else torch.randn(2, 1, rows, 7)
    if bias is not None:
        blocked = bias > 0.5
        blocked[0, 0, 0] = True
        bias = ~blocked if mask == "bool" else bias.masked_fill(blocked, float("-inf"))
    out, lse = path(q, k, v, mask=bias, scale=scale)
    expected, expected_lse = reference(q, k, v, bias, scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-6)
    assert lse.dtype == torch.float32


def test_the_plain_path_gives_the_same_in_small_pieces(monkeypatch):
    mask = torch.randn(2, 1, 5, 7)
    whole = pytorch.plain(q, k, v, mask=mask, scale=None)
    monkeypatch.setattr(pytorch, "_SCORES_AT_ONCE", 2 * 6 * 7 * 2)
    for got, expected in zip(pytorch.plain(q, k, v, mask=mask, scale=None), whole, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mask", [None, torch.randn(2, 6, 5, 7), torch.rand(1, 1, 1, 7) > 0.4])
def test_pytorch_takes_grouped_queries_with_and_without_a_mask(mask):
    expanded = [t.repeat_interleave(3, 1) for t in (k, v)]
    torch.testing.assert_close(pytorch.run(q, k, v, mask=mask, scale=None), F.scaled_dot_product_attention(q, *expanded, attn_mask=mask))
