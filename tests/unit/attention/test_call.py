"""Every form in which ComfyUI calls its attention override, read into one shape and answered in the caller's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from para_core.attention.call import Call, StockKernel, stock

B, S, M, H, D = 2, 5, 7, 3, 4
MASK = torch.zeros(S, M)


def stock_attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """What ComfyUI's own functions do, and nothing else."""
    if not skip_reshape:
        q, k, v = (t.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for t in (q, k, v))
    if mask is not None and mask.ndim == 3:
        mask = mask[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"), enable_gqa=kwargs.get("enable_gqa", False))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def sub_quad(query, key, value, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    return stock_attention(query, key, value, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **kwargs)


def flat(kv_heads=H):
    return torch.randn(B, S, H * D), torch.randn(B, M, kv_heads * D), torch.randn(B, M, kv_heads * D)


def heads_first(t):
    return t.unflatten(-1, (-1, D)).transpose(1, 2)


q, k, v = flat()
OPTIONS = {"transformer_options": {"block": 1}, "_inside_attn_wrapper": True}
FORMS = {
    "mask by name": ((q, k, v, H), {"mask": MASK}),
    "mask by position": ((q, k, v, H, MASK), {}),
    "heads by name": ((q, k, v), {"heads": H, "mask": MASK}),
    "all by name": ((), {"q": q, "k": k, "v": v, "heads": H, "mask": MASK}),
    "names of attention_sub_quad": ((), {"query": q, "key": k, "value": v, "heads": H, "mask": MASK}),
    "names of attention_sub_quad in part": ((q,), {"key": k, "value": v, "heads": H, "mask": MASK}),
    "all by position": ((q, k, v, H, MASK, None, False, False), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_call_form_yields_the_same_views_and_mask(form):
    args, kwargs = FORMS[form]
    call = Call.parse(stock_attention, args, {**kwargs, **OPTIONS})
    for got, given in zip((call.q, call.k, call.v), (q, k, v), strict=True):
        assert torch.equal(got, heads_first(given))
        assert got.data_ptr() == given.data_ptr(), "a copy was made"
    assert call.mask is MASK and call.heads == call.kv_heads == H
    assert call.transformer_options == {"block": 1}
    assert call.low_precision and call.scale is None


@pytest.mark.parametrize("skip_output", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("positional", [False, True])
def test_the_output_has_the_shape_that_the_layout_flags_ask_for(skip, skip_output, positional):
    tensors = [heads_first(t) if skip else t for t in (q, k, v)]
    args = (*tensors, H, MASK, None, skip, skip_output) if positional else (*tensors, H)
    kwargs = {} if positional else {"mask": MASK, "skip_reshape": skip, "skip_output_reshape": skip_output}
    call = Call.parse(stock_attention, args, kwargs)
    answer = call.output(F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=call.mask))
    assert torch.equal(answer, stock_attention(*args, **kwargs))
    assert answer.shape == ((B, H, S, D) if skip_output else (B, S, H * D))


def test_grouped_queries_keep_their_fewer_key_heads():
    q, k, v = flat(kv_heads=1)
    call = Call.parse(stock_attention, (q, k, v, H), {"enable_gqa": True})
    assert (call.heads, call.kv_heads) == (H, 1)
    call = Call.parse(stock_attention, (heads_first(q), heads_first(k), heads_first(v), H), {"enable_gqa": True, "skip_reshape": True})
    assert (call.heads, call.kv_heads) == (H, 1)


def test_only_an_explicit_false_forbids_low_precision():
    assert not Call.parse(stock_attention, (q, k, v, H), {"low_precision_attention": False}).low_precision
    for kwargs in ({"low_precision_attention": True}, {"low_precision_attention": None}, {}):
        assert Call.parse(stock_attention, (q, k, v, H), kwargs).low_precision


def test_scale_and_precision_are_read():
    call = Call.parse(stock_attention, (q, k, v, H), {"scale": 0.3, "attn_precision": torch.float32})
    assert call.scale == 0.3 and call.attn_precision is torch.float32


@pytest.mark.parametrize(("args", "kwargs"), [((q, k, v), {}), ((q, k), {"heads": H}), ((), {"heads": H})])
def test_a_call_without_tensors_or_heads_is_a_type_error(args, kwargs):
    with pytest.raises(TypeError):
        Call.parse(stock_attention, args, kwargs)


def test_too_many_positions_are_a_type_error():
    with pytest.raises(TypeError):
        Call.parse(stock_attention, (q, k, v, H, None, None, False, False, 1), {})


def test_widths_that_no_head_fits_are_a_value_error():
    with pytest.raises(ValueError, match="12 is not divisible by 5"):
        Call.parse(stock_attention, (q, k, v, 5), {})
    with pytest.raises(ValueError, match="10 is not divisible"):
        Call.parse(stock_attention, (q, k[..., :10], v[..., :10], H), {})


def test_stock_answers_with_the_very_arguments_of_the_call():
    seen = []

    def func(*args, **kwargs):
        seen.append((args, kwargs))
        return q

    kwargs = {"mask": MASK, "low_precision_attention": False, **OPTIONS}
    call = Call.parse(func, (q, k, v, H), kwargs)
    assert stock(call) is q and StockKernel(call).original() is q
    for args, given in seen:
        assert all(a is b for a, b in zip(args, (q, k, v, H), strict=True)) and given == kwargs
    previous_seen = []
    assert stock(call, lambda *args, **kwargs: previous_seen.append((args, kwargs))) is None
    assert previous_seen[0][0][0] is func and previous_seen[0][1] == kwargs


@pytest.mark.parametrize("func", [stock_attention, sub_quad])
@pytest.mark.parametrize("args_by_name", [False, True])
def test_the_stock_kernel_computes_other_rows_and_heads_with_the_calls_keywords(func, args_by_name):
    seen = {}

    def spy(*args, **kwargs):
        seen.update(kwargs, heads=args[3])
        return func(*args, **kwargs)

    names = dict(zip(("query", "key", "value") if func is sub_quad else ("q", "k", "v"), (q, k, v), strict=True))
    kwargs = {"scale": 0.3, "low_precision_attention": False, "mask": MASK, **OPTIONS}
    args = () if args_by_name else (q, k, v, H)
    call = Call.parse(spy, args, {**kwargs, **(names | {"heads": H} if args_by_name else {})})
    q2, k2, v2 = torch.randn(B, 2, 6, D), torch.randn(B, 2, 9, D), torch.randn(B, 2, 9, D)
    mask = torch.randn(1, 1, 6, 9)
    out = StockKernel(call).run(q2, k2, v2, mask=mask, scale=call.scale)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q2, k2, v2, attn_mask=mask, scale=0.3))
    assert seen["heads"] == 2 and seen["skip_reshape"] and seen["skip_output_reshape"] and seen["_inside_attn_wrapper"]
    assert seen["low_precision_attention"] is False and seen["transformer_options"] == {"block": 1}


def test_the_stock_kernel_is_called_as_from_inside_the_wrapper_so_that_no_override_runs_again():
    seen = {}
    call = Call.parse(lambda *args, **kwargs: seen.update(kwargs), (q, k, v, H), {"transformer_options": {}})
    StockKernel(call).run(call.q, call.k, call.v, mask=None, scale=None)
    assert seen["_inside_attn_wrapper"] is True and "scale" not in seen


def test_a_previous_override_is_the_stock_kernel_and_gets_the_wrapped_function():
    def previous(func, q, k, v, heads, **kwargs):
        assert func is stock_attention
        return 2 * func(q, k, v, heads, **kwargs)

    call = Call.parse(stock_attention, (q, k, v, H), dict(OPTIONS))
    kernel = StockKernel(call, previous)
    assert not kernel.has_lse
    torch.testing.assert_close(
        kernel.run(call.q, call.k, call.v, mask=None, scale=None), 2 * F.scaled_dot_product_attention(call.q, call.k, call.v)
    )
