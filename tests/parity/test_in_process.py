"""Shared steps equal stock steps, swept in the test process: over threads for one call, over processes for whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import ranks as threads
from families.tiny import Tiny
from families.tiny.common import residuals
from families.tiny.flux import flux
from families.tiny.wan import wan
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import inprocess
from parity.inprocess import Job, error, load, noise, run, sample

from para_core.settings import Cache, Parallel

pytestmark = pytest.mark.usefixtures("comfy")
TOLERANCE = 1e-5  # relative, per forward, float32
NEVER = Cache(threshold=1e-9)

sweep = settings(derandomize=True, deadline=None, max_examples=25)
degrees = st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda pair: 2 <= pair[0] * pair[1] <= 4)


# -- one call, ranks are threads --------------------------------------------------------------------------------------


def apart(tiny: Tiny, ring: int = 1, ulysses: int = 1) -> float:
    """The relative error of a shared call."""
    model, call = tiny
    (result,), _ = threads.shared(model, [call], ring, ulysses)
    return threads.error(result, threads.stock(model, call))


@sweep
@given(
    pair=degrees,
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(3, 11), st.integers(3, 11)),
    text=st.integers(4, 9),
    heads=st.integers(1, 5),
)
def test_flux_call_on_any_mesh_size_text_and_heads_equals_stock(pair, batch, size, text, heads) -> None:
    assert apart(flux(heads=heads, batch=batch, size=size, text=text), pair[0], min(pair[1], heads)) < TOLERANCE


@sweep
@given(
    pair=degrees,
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 3), st.integers(3, 7), st.integers(3, 7)),
    text=st.integers(1, 9),
    heads=st.integers(1, 5),
)
def test_wan_call_on_any_mesh_size_text_and_heads_equals_stock(pair, batch, size, text, heads) -> None:
    assert apart(wan(heads=heads, batch=batch, size=size, text=text), pair[0], min(pair[1], heads)) < TOLERANCE


CONTROL = {"input": [True, False], "output": [True, False, True]}  # blocks with residuals
REFERENCE = [noise(2, 16, 6, 10, seed=9)]
MASK = (noise(46, 46, seed=4) > 1.5).float() * -1e4

# how the model is built, and what its call is given besides
FLUX_VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "control": ({}, dict(control=residuals(CONTROL, 35))),
    "control_one_row_for_all": ({}, dict(control=residuals(CONTROL, 35, batch=1))),
    "kontext_reference": ({}, dict(ref_latents=REFERENCE)),
    "two_references": ({}, dict(ref_latents=[*REFERENCE, noise(2, 16, 4, 4, seed=10)], ref_latents_method="index")),
    "uxo_reference": ({}, dict(ref_latents=REFERENCE, ref_latents_method="uxo")),
    "reference_and_control_of_the_image_only": ({}, dict(ref_latents=REFERENCE, control=residuals(CONTROL, 35))),
    "additive_mask": ({}, dict(attention_mask=MASK)),
    "mask_per_image": ({}, dict(attention_mask=torch.stack([MASK, MASK.flip(0)])[:, None])),
    "no_guidance": ({}, dict(guidance=None)),
    "flux2": (dict(second=True), {}),
    "flux2_reference_at_timestep_zero": (
        dict(second=True, batch=1),
        dict(ref_latents=[noise(1, 16, 5, 6, seed=9)], ref_latents_method="index_timestep_zero"),
    ),
}


@pytest.mark.parametrize("ring, ulysses", [(1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("variant", FLUX_VARIANTS)
def test_what_flux_may_be_given_is_honoured_on_cut_tokens(variant: str, ring: int, ulysses: int) -> None:
    build, extra = FLUX_VARIANTS[variant]
    model, call = flux(**build)
    assert apart((model, call | extra), ring, ulysses) < TOLERANCE


@pytest.mark.parametrize("ring", [2, 3])
def test_boolean_mask_in_a_ring_equals_the_additive_mask_it_stands_for(ring: int) -> None:
    model, call = flux(attention_mask=MASK)
    (result,), _ = threads.shared(model, [call | dict(attention_mask=MASK == 0)], ring)
    assert threads.error(result, threads.stock(model, call)) < TOLERANCE  # stock CPU attention adds a boolean mask as numbers


@pytest.mark.parametrize("name", ["control", "kontext_reference", "additive_mask"])
def test_those_options_change_the_stock_result(name: str) -> None:
    model, call = flux()
    assert threads.error(threads.stock(model, call | FLUX_VARIANTS[name][1]), threads.stock(model, call)) > 1e-3


WAN_VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "timestep_per_frame": ({}, dict(timestep=torch.tensor([[0.0, 700.0, 650.0], [0.0, 300.0, 250.0]]))),
    "image_to_video": (dict(model_type="i2v"), dict(clip_fea=noise(2, 9, 1280, seed=6))),
    "reference_frame": (dict(build=dict(in_dim_ref_conv=16)), dict(reference_latent=noise(2, 16, 6, 10, seed=7))),
    "context_latents": ({}, dict(context_latents=[noise(2, 16, 1, 6, 8, seed=8)])),
    "concatenated_frames": ({}, dict(time_dim_concat=noise(2, 16, 1, 6, 10, seed=8))),
}


@pytest.mark.parametrize("ring, ulysses", [(1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("variant", WAN_VARIANTS)
def test_what_wan_may_be_given_is_honoured_on_cut_tokens(variant: str, ring: int, ulysses: int) -> None:
    build, extra = WAN_VARIANTS[variant]
    assert apart(wan(**build, **extra), ring, ulysses) < TOLERANCE


# -- whole runs, ranks are processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, blocks, size", [("flux", "double_blocks", (9, 14)), ("wan", "blocks", (3, 6, 10))])
def test_all_hooks_on_one_rank_are_bit_identical_and_leave_nothing(kind: str, blocks: str, size: tuple[int, ...]) -> None:
    model, job = load(kind), Job(kind, size, steps=3, cfg=5.0)
    expected = sample(model, job)
    diffusion_model = model.model.diffusion_model
    before, during = inprocess.footprint(diffusion_model), set()

    def look(*_) -> None:
        during.update(inprocess.changed(before, inprocess.footprint(diffusion_model)))

    result, report = run(model, job, Parallel(gpus=1), NEVER, callback=look)
    assert {name for name in during if name.startswith(blocks) and name.count(".") == 1} == {
        f"{blocks}.{index}" for index in range(len(getattr(diffusion_model, blocks)))
    }, "every block had hooks"
    assert "" in during, "the model's entry was replaced"
    assert torch.equal(result, expected)
    assert report["ranks"] == 1 and report["cached"] == 0 and len(report["changes"]) == report["forwards"] == 3
    assert not inprocess.changed(before, inprocess.footprint(diffusion_model))
    assert torch.equal(sample(model, job), expected), "and the stock model is as it was"


@pytest.mark.parametrize("ranks, stop_at", [(2, 0), (2, 1)])
def test_an_error_in_the_middle_of_a_run_leaves_nothing_on_the_model(ranks: int, stop_at: int) -> None:
    model, job = load("flux"), Job(steps=3)
    expected = sample(model, job)
    before = inprocess.footprint(model.model.diffusion_model)

    class Stop(Exception):
        pass

    def callback(step, *_) -> None:
        if step == stop_at:
            raise Stop

    with pytest.raises(Stop):
        run(model, job, NEVER, Parallel(ranks), callback=callback)
    assert not inprocess.changed(before, inprocess.footprint(model.model.diffusion_model))
    assert "memory_required" not in vars(model.model)
    result, report = run(model, job, Parallel(ranks))
    assert report["ranks"] == ranks and error(result, expected) < TOLERANCE * job.steps


PARITY: dict[str, tuple[Job, Parallel, list[int], int]] = {
    # name: job, settings, expected [batch, ring, ulysses], expected forwards
    "2_as_many_text_tokens_as_ranks": (Job(tokens=(2, 2)), Parallel(2), [1, 1, 2], 2),
    "2_row_split_of_equal_texts": (Job(cfg=5.0), Parallel(2), [2, 1, 1], 2),
    "2_lanes": (Job(cfg=5.0, tokens=(11, 7), batch=3), Parallel(2), [2, 1, 1], 4),
    "2_lanes_of_unequal_rows": (Job(cfg=5.0, tokens=(7, 11)), Parallel(2, batch_degree=2), [2, 1, 1], 4),
    "2_heun": (Job(sampler="heun", steps=3, size=(5, 5)), Parallel(2, ring_degree=2), [1, 2, 1], 5),
    "2_wan_batch_of_3": (Job("wan", (3, 5, 7), batch=3), Parallel(2), [2, 1, 1], 2),
    "3_batch_of_5": (Job(batch=5), Parallel(3), [3, 1, 1], 2),
    "3_lanes_on_two_of_three": (Job(cfg=5.0, tokens=(11, 7)), Parallel(3, batch_degree=2), [2, 1, 1], 4),
    "4_unified": (Job(size=(7, 11), batch=2), Parallel(4, batch_degree=1, ring_degree=2, ulysses_degree=2), [1, 2, 2], 2),
    "4_lanes_with_ring": (Job(cfg=5.0, tokens=(11, 7)), Parallel(4, ring_degree=2), [2, 2, 1], 4),
    "4_wan_rows_with_ulysses": (Job("wan", (3, 5, 7), cfg=5.0), Parallel(4, ulysses_degree=2), [2, 1, 2], 2),
    "4_wan_uneven_rows": (Job("wan", (3, 5, 7), cfg=5.0, batch=3), Parallel(4), [4, 1, 1], 2),
}


@pytest.mark.parametrize("ranks, name", [(case[1].gpus, name) for name, case in PARITY.items()])
def test_run_over_processes_equals_stock(ranks: int, name: str) -> None:
    job, parallel, expected_degrees, forwards = PARITY[name]
    model = load(job.kind)
    result, report = run(model, job, parallel)
    assert report["notes"] == [] and report["degrees"] == expected_degrees and report["forwards"] == forwards
    assert error(result, sample(model, job)) < TOLERANCE * forwards


CLAMPED = {
    "2_more_than_there_are": (Job(), Parallel(2, ulysses_degree=3), [1, 1, 2], "1 x 1 x 3 ranks were asked for and there are 2"),
    "2_batch_of_one_row": (Job(), Parallel(2, batch_degree=2), [1, 1, 2], "Batch degree 2 is more than there are prompts and images"),
    "2_text_shorter_than_ranks": (Job(tokens=(1, 1)), Parallel(2), [1, 1, 1], "The shortest segment has only 1 tokens"),
    "3_more_ranks_than_image_tokens": (Job(size=(2, 3)), Parallel(3, ring_degree=3), [1, 2, 1], "3 x 1 is more than the 2 tokens"),
    "3_one_wan_token": (Job("wan", (1, 2, 2)), Parallel(3), [1, 1, 1], "The shortest segment has only 1 tokens"),
    "4_more_than_heads": (Job(), Parallel(4, ulysses_degree=4), [1, 1, 3], "Ulysses degree 4 is more than there are attention heads (3)"),
    "4_short_text_in_one_lane": (Job(cfg=5.0, tokens=(11, 1)), Parallel(4), [2, 1, 1], "The shortest segment has only 1 tokens"),
}


@pytest.mark.parametrize("ranks, name", [(case[1].gpus, name) for name, case in CLAMPED.items()])
def test_degrees_that_cannot_be_met_are_lowered_and_said_once(ranks: int, name: str) -> None:
    job, parallel, expected_degrees, words = CLAMPED[name]
    model, job = load(job.kind), job.but(steps=3)
    result, report = run(model, job, parallel)
    assert report["degrees"] == expected_degrees
    assert len(report["notes"]) == 1 and words in report["notes"][0]
    assert error(result, sample(model, job)) < TOLERANCE * job.steps


def control_of(job: Job) -> dict[str, Any]:
    """Conditioning options with a ControlNet whose residuals are fixed."""
    import comfy.controlnet

    class FixedControl(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            rows = -(-x_noisy.shape[-2] // 2) * -(-x_noisy.shape[-1] // 2)
            held = residuals(CONTROL, rows, 384, x_noisy.shape[0])
            return {kind: [None if tensor is None else 0.3 * tensor for tensor in tensors] for kind, tensors in held.items()}

    return {"control": FixedControl()}


@pytest.mark.parametrize("ranks, ring", [(2, 1), (3, 3)])
def test_control_and_reference_latents_in_a_whole_run_equal_stock(ranks: int, ring: int) -> None:
    parallel = Parallel(ranks, ring_degree=ring)
    model, job = load("flux"), Job(cfg=1.0)
    extra = {**control_of(job), "reference_latents": [noise(1, 16, 6, 5, seed=9)]}
    expected = sample(model, job, extra=extra)
    assert error(expected, sample(model, job)) > 1e-3
    result, report = run(model, job, parallel, extra=extra)
    assert report["ranks"] == parallel.gpus and report["notes"] == []
    assert error(result, expected) < TOLERANCE * job.steps


@pytest.mark.parametrize("ranks", [2])
def test_changed_batch_size_and_shape_from_run_to_run_need_no_new_group(ranks: int) -> None:
    model = load("flux")
    for job in (Job(), Job(batch=2), Job(size=(12, 5), cfg=5.0), Job()):
        result, report = run(model, job, Parallel(ranks))
        assert report["ranks"] == ranks
        assert error(result, sample(model, job)) < TOLERANCE * job.steps


# -- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, kind, size", [(2, "flux", (9, 14)), (2, "wan", (3, 6, 10))])
def test_lora_strength_changes_the_result_as_stock_does_and_sends_patches_only(ranks: int, kind: str, size: tuple[int, ...]) -> None:
    from para_core.comfy import sidecars

    job = Job(kind, size)
    plain = sample(load(kind), job)
    run(load(kind), job, Parallel(ranks))  # from here on the workers hold the model
    counts = sidecars.group().counts
    models, results = counts["models"], {}
    for strength in (0.5, 1.0, 0.5, 0.0):
        patches = counts["patches"]
        model = inprocess.with_lora(kind, strength) if strength else load(kind)
        expected = sample(model, job)
        result, report = run(model, job, Parallel(ranks))
        assert report["ranks"] == ranks and error(result, expected) < TOLERANCE * job.steps
        assert counts["patches"] == patches + 1, "to the one worker"
        results[strength] = result
    assert counts["models"] == models, "the model itself did not travel again"
    assert error(results[0.5], plain) > 1e-3 and error(results[1.0], results[0.5]) > 1e-3
    patches = counts["patches"]
    run(load(kind), job, Parallel(ranks))
    assert (counts["models"], counts["patches"]) == (models, patches), "an unchanged model sends nothing"


@pytest.mark.parametrize("ranks", [2])
def test_weights_are_sent_while_the_model_s_device_is_the_current_one(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may be on another card than the process's first, and kernels that patch or quantise weights run on the current one."""
    import comfy.model_management

    from para_core.comfy import sidecars

    current: list[torch.device] = []
    seen: list[list[torch.device]] = []
    sent = sidecars.load

    @contextmanager
    def context(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(comfy.model_management, "cuda_device_context", context)
    monkeypatch.setattr(sidecars, "load", lambda patcher, *rest: (seen.append([*current]), sent(patcher, *rest)))
    run(load("flux"), Job("flux", steps=1), Parallel(ranks))
    assert seen == [[torch.device("cpu")]]
