"""What nodes attach, and what the run says about it."""

from __future__ import annotations

import pytest
from parity import inprocess


def test_two_nodes_of_a_kind_leave_the_later_one_and_the_run_says_so_once(comfy):
    from para_core.comfy.attach import attach
    from para_core.settings import Cache

    job = inprocess.Job("flux", steps=3)
    model = attach(attach(attach(inprocess.load("flux"), Cache(0.5)), Cache(1e-9)), Cache(1e-9))
    with inprocess.reports() as found:
        latent = inprocess.sample(model, job)
    (report,) = found
    assert report["cached"] == 0, "the later threshold never hits"
    assert inprocess.error(latent, inprocess.sample(inprocess.load("flux"), job)) == 0.0
    (note,) = report["notes"]
    assert note.startswith("Two nodes First Block Cache ") and "the later one wins (threshold 1e-09, " in note


def test_the_report_names_the_attention_kernel_that_ran(comfy):
    from para_core.comfy.attach import attach
    from para_core.settings import Attention

    with inprocess.reports() as found:
        inprocess.sample(attach(inprocess.load("flux"), Attention("exact")), inprocess.Job("flux"))
    (report,) = found
    assert any(line.startswith("pytorch: ") for line in report["attention"])


@pytest.mark.parametrize("rule", ["classic", "forecast"])
def test_a_cache_whose_window_is_empty_says_so_and_leaves_the_run_alone(comfy, rule, caplog):
    from para_core.comfy.attach import attach
    from para_core.settings import Cache

    job = inprocess.Job("flux", steps=6)
    with caplog.at_level("WARNING", logger="paradit"):
        latent = inprocess.sample(attach(inprocess.load("flux"), Cache(5.0, 0.6, 0.4, rule=rule)), job)
    said = [record.getMessage() for record in caplog.records if record.name == "paradit"]
    assert said == ["[ParaDiT] No step is cached: start_percent 0.6 is not below end_percent 0.4."]
    assert inprocess.error(latent, inprocess.sample(inprocess.load("flux"), job)) == 0.0


@pytest.mark.parametrize(
    ("platform", "gpus", "found", "said"),
    [
        ("win32", 2, [], ["Splitting needs Linux: this run stays on one GPU."]),
        ("win32", 1, [], []),
        ("linux", 2, ["cpu"], []),
    ],
)
def test_splitting_elsewhere_than_on_linux_is_left_out_and_said(comfy, monkeypatch, platform, gpus, found, said):
    import torch

    from para_core.comfy import sidecars
    from para_core.settings import Parallel

    heard: list[str] = []
    monkeypatch.setattr(sidecars.sys, "platform", platform)
    assert sidecars.devices(Parallel(gpus), torch.device("cpu"), heard.append) == found
    assert heard == said


def test_splitting_without_torch_distributed_is_left_out_and_said(comfy, monkeypatch):
    import torch

    from para_core.comfy import sidecars
    from para_core.settings import Parallel

    heard: list[str] = []
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert sidecars.devices(Parallel(2), torch.device("cpu"), heard.append) == []
    assert heard == ["Splitting needs torch.distributed, which this PyTorch was built without: this run stays on one GPU."]


@pytest.mark.parametrize(("device", "hip", "named"), [("cuda:0", "7.0", "an AMD GPU"), ("mps", None, "mps")])
def test_other_gpus_than_nvidia_s_are_named_where_splitting_and_graphs_are_left_out(comfy, monkeypatch, device, hip, named):
    from types import SimpleNamespace

    import torch

    from para_core.comfy import compiling, sidecars
    from para_core.settings import Parallel

    heard: list[str] = []
    monkeypatch.setattr(torch.version, "hip", hip)
    assert sidecars.devices(Parallel(2), torch.device(device), heard.append) == []
    heard.append(compiling.against_graphs(SimpleNamespace(load_device=torch.device(device)), SimpleNamespace()))  # type: ignore[arg-type]
    assert len(heard) == 2 and all(f"model runs on {named}" in sentence for sentence in heard)


@pytest.mark.parametrize(("devices", "said"), [("0,2", 1), (" ", 0)])
def test_cuda_devices_are_left_out_on_the_cpu_and_that_is_said(comfy, devices, said):
    import torch

    from para_core.comfy import sidecars
    from para_core.settings import Parallel

    heard: list[str] = []
    assert sidecars.devices(Parallel(2, devices=devices), torch.device("cpu"), heard.append) == ["cpu"]
    assert len(heard) == said and all("left out" in sentence for sentence in heard)


@pytest.mark.parametrize("mode", ["graph", "compile+graph"])
def test_graphs_on_the_cpu_are_left_out_and_that_is_said_once(comfy, monkeypatch, caplog, mode):
    import torch

    from para_core.settings import Compile

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    job = inprocess.Job("flux_small", steps=3)
    with caplog.at_level("WARNING", logger="paradit"):
        latent, report = inprocess.run(inprocess.load("flux_small"), job, Compile(mode))
    (note,) = report["notes"]
    assert note.startswith("No CUDA graphs: ") and "runs on cpu" in note and "compile or off" in note
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [f"[ParaDiT] {note}"]
    assert inprocess.error(latent, inprocess.sample(inprocess.load("flux_small"), job)) == 0.0
