"""What nodes attach, and what the run says about it."""

from __future__ import annotations

from pathlib import Path

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


def test_workers_that_do_not_start_ahead_of_a_run_do_not_end_the_prompt(comfy, monkeypatch, caplog):
    from types import SimpleNamespace

    import torch

    from para_core.comfy import sidecars
    from para_core.group.group import Group
    from para_core.settings import Parallel

    def start() -> SimpleNamespace:
        raise OSError(12, "Cannot allocate memory")

    group = Group(Path("none"), lambda *_: {})
    monkeypatch.setattr(group._pool, "start", start)
    monkeypatch.setattr(sidecars, "group", lambda: group)
    sidecars.warm(Parallel(2), torch.device("cpu"))
    assert "Cannot allocate memory" in caplog.text


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


CARDS = {"RTX 4090": (8, 9, 128), "RTX 3090": (8, 6, 82), "RTX 3060": (8, 6, 28)}
CARDS |= {"GTX 1080": (6, 1, 20), "T400": (7, 5, 6), "5090": (12, 0, 170)}


@pytest.mark.parametrize(
    ("cards", "settings", "found", "said"),
    [
        (("RTX 4090", "RTX 4090"), {}, [1], []),
        (("RTX 4090", "RTX 3090", "RTX 3060"), {}, [1, 2], []),
        (("RTX 4090", "RTX 4090", "T400"), {}, [1], ["cuda:2 is left out, unless the input devices names it: it has 6 multiprocessors"]),
        (("RTX 4090", "T400", "RTX 4090"), {"gpus": 2}, [2], ["cuda:1 is left out"]),
        (("RTX 4090", "GTX 1080"), {}, [], ["no kernels for its compute capability 6.1"]),
        (("RTX 4090", "T400"), {"devices": "1"}, [1], []),
        (("T400", "RTX 4090"), {}, [1], []),
        (("5090", "RTX 4090"), {}, [1], []),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value, tuple) else None,
)
def test_cards_that_can_be_of_no_use_are_left_out_unless_they_are_named(comfy, monkeypatch, cards, settings, found, said):
    """A card for the display beside those that compute would have all of them wait, or fail."""
    from types import SimpleNamespace

    import torch

    from para_core.comfy import sidecars
    from para_core.settings import Parallel

    def properties(index):
        major, minor, count = CARDS[cards[index]]
        return SimpleNamespace(major=major, minor=minor, multi_processor_count=count)

    heard: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    unknown = [] if "GTX 1080" not in cards else ["sm_75", "compute_80"]
    for built in (["sm_75", "sm_80", "sm_86", "sm_90a", "sm_120", "compute_120"], unknown):
        heard.clear()
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda built=built: built)
        assert sidecars.devices(Parallel(**settings), torch.device("cuda", 0), heard.append) == [f"cuda:{index}" for index in found]
        assert len(heard) == len(said) and all(words in sentence for words, sentence in zip(said, heard, strict=True))


@pytest.mark.parametrize(("shown", "cause"), [("0", "--cuda-device 0, which hides all others"), (None, "can be used.")])
@pytest.mark.parametrize("settings", [{"gpus": 2}, {"gpus": 2, "devices": "1"}], ids=["count", "named"])
def test_a_flag_of_comfyui_that_hides_gpus_is_named_where_they_are_missed(comfy, monkeypatch, shown, cause, settings):
    from types import SimpleNamespace

    import torch

    from para_core.comfy import sidecars
    from para_core.settings import Parallel

    heard: list[str] = []
    monkeypatch.setattr(sidecars.comfy.cli_args, "args", SimpleNamespace(cuda_device=shown))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert sidecars.devices(Parallel(**settings), torch.device("cuda", 0), heard.append) == []
    assert heard and all(cause in sentence for sentence in heard[-1:]) and ("hides" in heard[0]) is (shown is not None)


def test_a_worker_is_told_its_card_by_the_name_that_all_processes_know(comfy, monkeypatch):
    from types import SimpleNamespace

    import torch

    from para_core.comfy import sidecars

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: SimpleNamespace(uuid=f"GPU {place.index}"))
    told = [sidecars._hello(1, device, 2)["card"] for device in ("cuda:1", "cpu")]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: SimpleNamespace())
    assert [*told, sidecars._hello(1, "cuda:1", 2)["card"]] == ["GPU 1", "", ""]


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
    warnings = [record.getMessage() for record in caplog.records if (record.name, record.levelname) == ("paradit", "WARNING")]
    assert warnings == [f"[ParaDiT] {note}"]
    assert inprocess.error(latent, inprocess.sample(inprocess.load("flux_small"), job)) == 0.0
