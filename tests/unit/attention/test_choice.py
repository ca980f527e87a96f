"""Which kernel computes a call: refusals, fallbacks, what is said and counted, and the check of those that quantise."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from para_core.attention import choice as choice_module
from para_core.attention.backends import BACKENDS, Backend, Request, pytorch
from para_core.attention.call import Call, StockKernel
from para_core.attention.choice import LONG, SETTINGS, SHORT, Chooser, preferred, request_of
from para_core.attention.selfcheck import ROWS

B, H, S, D = 2, 3, 100, 16


@dataclass
class Fake:
    """A backend whose every answer a test decides."""

    name: str
    exact: bool = True
    missing: str | None = None
    refusal: str | None = None
    lse: bool = True
    error: Exception | None = None
    spoil: object = None
    """``spoil(out) -> out``: what the kernel gets wrong."""
    spoil_lse: object = None
    calls: int = 0
    masks: list = field(default_factory=list)

    def run(self, q, k, v, *, mask, scale):
        return self.run_lse(q, k, v, mask=mask, scale=scale)[0]

    def run_lse(self, q, k, v, *, mask, scale):
        self.calls += 1
        self.masks.append(mask)
        if self.error is not None:
            raise self.error
        out, lse = pytorch.run_lse(q, k, v, mask=mask, scale=scale)
        return self.spoil(out) if self.spoil else out, self.spoil_lse(lse) if self.spoil_lse else lse

    def backend(self):
        return Backend(
            self.name,
            self.exact,
            f"pip install {self.name}",
            lambda: self.missing,
            lambda request: self.refusal,
            self.run,
            self.run_lse if self.lse else None,
        )


def chooser(setting, *fakes, order=("sage", "cudnn", "flash"), **options):
    said = []
    table = (*(fake.backend() for fake in fakes), pytorch.BACKEND)
    return Chooser(setting, say=said.append, table=table, order=lambda request: order, **options), said


def tensors(heads=H, rows=S):
    torch.manual_seed(0)
    return torch.randn(B, heads, rows, D), torch.randn(B, heads, rows, D), torch.randn(B, heads, rows, D)


def run(choice, *, mask=None, scale=None, low_precision_ok=True, qkv=None):
    return kernel_of(choice, low_precision_ok=low_precision_ok).run(*(qkv or tensors()), mask=mask, scale=scale)


def kernel_of(choice, *, low_precision_ok=True):
    """What computes a call where neither stock's function nor another override does."""
    return choice.kernel(SimpleNamespace(low_precision=low_precision_ok))


def call(**kwargs):
    q = torch.randn(B, S, H * D)

    def func(q, k, v, heads, mask=None, **_):
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) if t.ndim == 3 else t for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return Call.parse(func, (q, q, q, H), kwargs)


def test_the_first_backend_of_the_order_that_takes_the_call_computes_it():
    cudnn, flash = Fake("cudnn"), Fake("flash")
    choice, said = chooser("auto", cudnn, flash)
    run(choice)
    assert (cudnn.calls, flash.calls, choice.uses, said) == (1, 0, {"cudnn": 1}, [])


def test_a_refused_call_goes_to_the_next_and_is_counted_by_reason():
    cudnn, flash = Fake("cudnn", refusal="it takes no mask"), Fake("flash")
    choice, said = chooser("auto", cudnn, flash)
    for _ in range(3):
        run(choice)
    assert flash.calls == 3 and choice.counts == {("flash", "cudnn: it takes no mask"): 3} and said == []
    assert choice.report() == ["flash: 3 calls", "flash instead of cudnn: it takes no mask (3 calls)"]


def test_a_missing_backend_that_nobody_named_is_passed_over_in_silence():
    choice, said = chooser("auto", Fake("cudnn", missing="no GPU"), Fake("flash"))
    run(choice)
    assert choice.uses == {"flash": 1} and not choice.counts and said == []


def test_a_missing_backend_that_was_named_is_told_once_with_what_installs_it_and_counted():
    choice, said = chooser("flash", Fake("cudnn"), Fake("flash", missing="the package flash_attn is not installed"))
    for rows in (S, S, 2 * S):
        run(choice, qkv=tensors(rows=rows))
    assert said == [
        "Attention backend flash is not available here: the package flash_attn is not installed. To install it: pip install flash."
    ]
    assert choice.counts == {("cudnn", "flash: the package flash_attn is not installed"): 3}


def test_a_named_backend_comes_before_the_order():
    choice, _ = chooser("flash", Fake("cudnn"), Fake("flash"))
    run(choice)
    assert choice.uses == {"flash": 1}


def test_sage_3_stands_in_for_sage_where_only_it_is_installed():
    choice, _ = chooser("sage", Fake("sage", exact=False, missing="not installed"), Fake("sage3", exact=False), Fake("cudnn"))
    run(choice)
    assert choice.uses == {"sage3": 1}


def test_exact_never_quantises():
    sage, cudnn = Fake("sage", exact=False), Fake("cudnn", refusal="no")
    choice, _ = chooser("exact", sage, cudnn)
    run(choice)
    assert sage.calls == 0 and choice.uses == {"pytorch": 1}


def test_a_named_exact_backend_is_not_replaced_by_one_that_quantises():
    sage = Fake("sage", exact=False)
    choice, _ = chooser("cudnn", sage, Fake("cudnn", refusal="no"))
    run(choice)
    assert sage.calls == 0 and choice.uses == {"pytorch": 1}


@pytest.mark.parametrize("setting", ["auto", "sage"])
def test_a_model_that_forbids_low_precision_gets_an_exact_kernel_and_others_still_quantise(setting):
    sage = Fake("sage", exact=False)
    choice, _ = chooser(setting, sage, Fake("cudnn"))
    run(choice, low_precision_ok=False)
    assert sage.calls == 0 and choice.counts == {("cudnn", "sage: the model forbids quantised attention here"): 1}
    run(choice)
    assert sage.calls == 1
    assert choice.kernel(call(low_precision_attention=False)) is not choice.kernel(call())
    choice.kernel(call(low_precision_attention=False)).run(*tensors(), mask=None, scale=None)
    assert sage.calls == 1


@pytest.mark.parametrize("mask", [torch.rand(S, S) > 0.5, torch.randn(B, S, S), torch.randn(B, H, 1, S)])
def test_masks_reach_the_kernel_in_4d_and_are_honoured(mask):
    cudnn = Fake("cudnn")
    choice, _ = chooser("auto", cudnn)
    q, k, v = tensors()
    whole = mask if mask.ndim == 4 else mask[:, None] if mask.ndim == 3 else mask
    torch.testing.assert_close(run(choice, mask=mask), F.scaled_dot_product_attention(q, k, v, attn_mask=whole))
    assert cudnn.masks[0].ndim == 4


def test_a_call_that_needs_log_sum_exp_goes_to_a_backend_that_has_it():
    choice, _ = chooser("auto", Fake("cudnn", lse=False), Fake("flash"))
    q, k, v = tensors()
    out, lse = kernel_of(choice).run_lse(q, k, v, mask=None, scale=0.2)
    assert choice.counts == {("flash", "cudnn: it gives no log-sum-exp"): 1}
    torch.testing.assert_close(lse, (q @ k.mT * 0.2).logsumexp(-1))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.2))


@pytest.mark.parametrize("error", [RuntimeError("no kernel image.\nmore"), AssertionError("head dim"), TypeError("scale")])
def test_a_kernel_that_raises_is_replaced_for_that_kind_of_call_and_said_once(error):
    cudnn = Fake("cudnn", error=error)
    choice, said = chooser("auto", cudnn, Fake("flash"))
    for _ in range(3):
        run(choice)
    assert cudnn.calls == 1 and choice.uses == {"flash": 3} and sum(choice.counts.values()) == 3
    assert len(said) == 1 and str(error).splitlines()[0].rstrip(".") in said[0] and "more" not in said[0]


def test_running_out_of_memory_is_no_reason_to_fall_back():
    choice, _ = chooser("auto", Fake("cudnn", error=torch.cuda.OutOfMemoryError("full")))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(choice)


def test_an_error_of_the_last_resort_is_raised():
    choice, _ = chooser("pytorch")
    with pytest.raises(RuntimeError):
        run(choice, qkv=[torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 5), torch.randn(1, 1, 3, 5)])


def test_without_a_setting_the_stock_function_is_the_kernel_and_a_ring_gets_the_exact_log_sum_exp():
    choice, _ = chooser(None)
    one = call()
    kernel = choice.kernel(one)
    assert isinstance(kernel, StockKernel) and kernel.call is one and kernel.has_lse and choice.has_lse
    q, k, v = tensors()
    mask = torch.rand(S, S) > 0.5
    torch.testing.assert_close(kernel.run_lse(q, k, v, mask=mask, scale=None)[0], F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_a_previous_override_stays_the_local_kernel_whatever_the_setting():
    def previous(func, *args, **kwargs):
        return 2 * func(*args, **kwargs)

    for setting in (None, "auto", "sage"):
        choice, said = chooser(setting, Fake("sage"), previous=previous)
        kernel = choice.kernel(call())
        assert isinstance(kernel, StockKernel) and kernel.previous is previous and not kernel.has_lse and not choice.has_lse
        assert len(said) == (setting == "sage")


def test_an_unknown_setting_is_an_error():
    with pytest.raises(ValueError, match="nonsense"):
        Chooser("nonsense")


def test_every_setting_computes_on_this_machine():
    q, k, v = tensors()
    for setting in SETTINGS:
        choice = Chooser(setting, say=lambda _: None)
        torch.testing.assert_close(run(choice), F.scaled_dot_product_attention(q, k, v))
        out, lse = kernel_of(choice).run_lse(q, k, v, mask=None, scale=None)
        torch.testing.assert_close(lse, (q @ k.mT * D**-0.5).logsumexp(-1))


def request(capability, kv_len, kind="cuda"):
    return Request(torch.bfloat16, kind, capability, 24, 24, kv_len, kv_len, 128)


def test_the_static_order_follows_the_measurements():
    assert preferred(request((9, 0), 4608))[0] == "cudnn"
    assert preferred(request((9, 0), 16896))[:2] == ("sage", "cudnn")
    assert preferred(request((8, 9), 4608))[:2] == ("sage", "comfy-kitchen")
    assert preferred(request((8, 9), SHORT - 1))[0] == "flash"
    assert preferred(request((9, 0), LONG - 1))[0] == "cudnn"
    assert preferred(request((0, 0), 4608, "hip"))[0] == "comfy-kitchen"
    for kind in ("cpu", "mps", "xpu"):
        assert preferred(request((0, 0), 4608, kind)) == ("pytorch",)
    names = {backend.name for backend in BACKENDS}
    for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        for kv_len in (77, 4608, 75600):
            order = preferred(request(capability, kv_len))
            assert set(order) <= names and "pytorch" in order and "sage3" not in order


def test_a_request_describes_the_call():
    q, k = torch.randn(1, 6, 5, 8), torch.randn(1, 2, 7, 8)
    described = request_of(q, k, torch.zeros(1, 1, 5, 7, dtype=torch.bool), 0.1, needs_lse=True, low_precision_ok=False)
    assert described == Request(torch.float32, "cpu", (0, 0), 6, 2, 5, 7, 8, "bool", True, False, True) and described.grouped
    assert request_of(q, q, torch.zeros(1, 1, 5, 5), None).mask == "additive" and request_of(q, q, None, None).mask == "none"


# --- the check of kernels that quantise


def noisy(level):
    return lambda out: out + level * out.norm() / out.numel() ** 0.5 * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))


def steps(choice, forwards=1, layers=2, **options):
    outs = []
    for _ in range(forwards):
        choice.begin_forward()
        outs += [run(choice, **options) for _ in range(layers)]
        outs.append(choice.end_forward())
    return outs


def test_a_kernel_within_the_bound_is_kept_and_its_error_remembered():
    sage = Fake("sage", exact=False, spoil=noisy(0.04))
    choice, said = chooser("sage", sage)
    steps(choice, forwards=3)
    assert sage.calls == 6 and said == [] and choice.check.worst["sage"] == pytest.approx(0.04, rel=0.2)


def test_a_kernel_beyond_the_bound_is_replaced_for_the_rest_of_the_run_with_one_sentence():
    sage = Fake("sage", exact=False, spoil=noisy(0.3))
    choice, said = chooser("sage", sage, Fake("cudnn"))
    q, k, v = tensors()
    out = steps(choice, forwards=2)[0]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    assert sage.calls == 1 and choice.uses == {"cudnn": 4} and len(said) == 1 and "differs from exact attention by 0.3" in said[0]
    assert sum(choice.counts.values()) == 4 and "sage" in choice.replaced
    run(choice, qkv=tensors(rows=2 * S))
    assert sage.calls == 1, "other shapes must not bring it back"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_first_forward_is_found_before_the_output_is_used(value):
    sage = Fake("sage", exact=False, spoil=lambda out: out * value)
    choice, said = chooser("sage", sage)
    out, trusted = steps(choice, layers=1)
    assert torch.isfinite(out).all() and trusted and len(said) == 1 and "NaN" in said[0]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_in_a_later_forward_is_found_at_its_end_and_the_kernel_replaced(value):
    sage = Fake("sage", exact=False)
    choice, said = chooser("sage", sage)
    assert steps(choice, forwards=2)[-1]
    sage.spoil = lambda out: torch.cat((out[:, :, :-1], out[:, :, -1:] * value), 2) if sage.calls == 5 else out
    rows = ROWS + 1  # the last row is looked at
    choice, said = chooser("sage", sage)
    sage.calls = 0
    first, second, third = (steps(choice, qkv=tensors(rows=rows))[-1] for _ in range(3))
    assert (first, second) == (True, True) and third is False
    assert len(said) == 1 and "sage" in choice.replaced
    assert steps(choice, qkv=tensors(rows=rows))[-1], "the exact kernel has taken over"


def test_a_wrong_log_sum_exp_is_found():
    sage = Fake("sage", exact=False, spoil_lse=lambda lse: lse / 0.6931)
    choice, said = chooser("sage", sage)
    q, k, v = tensors()
    _, lse = kernel_of(choice).run_lse(q, k, v, mask=None, scale=None)
    torch.testing.assert_close(lse, (q @ k.mT * D**-0.5).logsumexp(-1))
    assert len(said) == 1 and "log-sum-exp" in said[0]


def test_every_layer_is_compared_once_per_kind_of_call():
    choice, _ = chooser("sage", Fake("sage", exact=False))
    steps(choice, forwards=3, layers=4)
    assert choice.check.compared == 4
    steps(choice, forwards=2, layers=4, qkv=tensors(rows=2 * S))
    assert choice.check.compared == 8


def test_a_layer_that_only_fails_later_in_the_forward_is_found():
    sage = Fake("sage", exact=False)
    sage.spoil = lambda out: noisy(0.5)(out) if sage.calls == 3 else out
    choice, said = chooser("sage", sage)
    steps(choice, layers=4)
    assert sage.calls == 3 and choice.uses == {"sage": 2, "pytorch": 2} and len(said) == 1


def test_exact_kernels_are_not_checked():
    cudnn = Fake("cudnn", spoil=noisy(0.5))
    choice, _ = chooser("cudnn", cudnn)
    steps(choice)
    assert choice.check.compared == 0 and choice.uses == {"cudnn": 2}


def test_broken_inputs_are_not_blamed_on_the_kernel():
    sage = Fake("sage", exact=False)
    choice, said = chooser("sage", sage)
    q, k, v = tensors()
    run(choice, qkv=(q, k, v * float("nan")))
    kernel_of(choice).run_lse(q * float("nan"), k, v, mask=None, scale=None)
    assert said == [] and sage.calls == 2


@pytest.mark.parametrize(("left", "kept"), [(7.0, True), (float("nan"), False)])
def test_rows_without_keys_may_hold_anything_finite(left, kept):
    mask = torch.ones(S, S, dtype=torch.bool)
    mask[::2] = False
    sage = Fake("sage", exact=False, spoil=lambda out: out.masked_fill(~mask.any(1)[:, None], left))
    choice, said = chooser("sage", sage)
    run(choice, mask=mask)
    assert ("sage" in choice.uses) is kept and (said == []) is kept


@pytest.mark.parametrize("held", [True, False])
def test_a_kernel_that_a_graph_would_not_hold_ends_the_capture(monkeypatch, held):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(choice_module, "is_captured", lambda backend, *_: asked.append(backend.name) or held)
    choice, _ = chooser("auto", Fake("cudnn"))
    backend, q = choice._decide(request_of(*tensors()[:2], None, None)).candidates[0], tensors()[0]
    choice.mind_capture(backend, q)
    assert asked == [], "nobody captures"
    choice.will_capture = True
    choice.mind_capture(backend, q)
    choice.mind_capture(backend, q)
    assert asked == ["cudnn"], "tried once"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if held:
        choice.mind_capture(backend, q)
    else:
        with pytest.raises(RuntimeError, match="attention backend cudnn launches its kernels where a CUDA graph does not see them"):
            choice.mind_capture(backend, q)
