"""The benchmark's own machinery, and that every command runs: on tiny models, so no number here means anything."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from record import RECORDS, Record, Stale
from rows import TimeIsUp, attempt

BENCH = Path(__file__).resolve().parent


def test_readme_and_results_say_what_the_records_say() -> None:
    for name, text in pages.pages(pages.read(RECORDS)).items():
        page = (pages.ROOT / name).read_text(encoding="utf-8")
        assert page == pages.between(page, name, text), f"{name}: run `bench.py report`"


def bench(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, str(BENCH / "bench.py"), *arguments, "--cpu", "--out", str(out)]
    return subprocess.run(call, capture_output=True, text=True, timeout=170, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """What all commands record with --quick."""
    out = tmp_path_factory.mktemp("bench")
    done = bench(out, "--quick", "--commit", "one")
    assert done.returncode == 0, done.stdout + (out / "bench.log").read_text()
    return Record.read(next(out.glob("*.json")))


def test_every_command_runs_and_no_row_of_it_fails(quick: Record) -> None:
    assert {table: [row.get("failed") for row in rows if "failed" in row] for table, rows in quick.tables.items()} == {
        name: [] for name in ("overhead", "steps", "attention", "cache", "group", "profile", "share")
    }
    ways = {(row["case"], row["way"]): row for row in quick.tables["steps"]}
    assert list(ways) == [
        *(("flux-1024", way) for way in ("stock", "1 rank, exact, off", "2 ranks, exact, off")),
        *(("defaults", way) for way in ("stock", "Accelerate, 1 rank", "Accelerate, 2 ranks")),
    ]
    assert ways["flux-1024", "2 ranks, exact, off"]["ranks"] == 2
    assert all(row["error"] < 1e-5 and 0 < row["launch_ms"] and 0 < row["step_ms"] for row in ways.values())
    assert all(row["over"] == 1 and row["remembered"] for row in quick.tables["attention"] if row["way"] in ("auto", "exact"))
    assert all(row["kinds_ms"]["matrices"] > 0 and row["longest"] for name in ("profile", "share") for row in quick.tables[name])
    assert [row["ranks"] for row in quick.tables["share"]] == [1, 2, 2]
    hits = [row for row in quick.tables["cache"] if row["way"].startswith("hit")]
    assert hits and all(row["cached_steps"] >= 3 for row in hits)
    assert quick.machine["commit"] == "one" and {row["memory"] for row in quick.tables["steps"]} == {"CPU"}


def test_a_later_call_adds_what_is_missing_and_measures_nothing_twice(comfy: None, quick: Record, tmp_path: Path) -> None:
    import attention_kernels
    import bench as command
    import caching
    import steps

    before = {name: [dict(row) for row in quick.tables[name]] for name in ("steps", "attention", "cache")}
    before["attention"][0]["failed"] = "as if"
    Record(tmp_path / "cut.json", quick.machine, before).write()
    given = options(resume=tmp_path / "cut.json", out=tmp_path / "out", quick=True, backends="exact", modes="off")
    record = command.begin(given)
    assert record.path == tmp_path / "out" / "cut.json" and len(record.tables["attention"]) == len(before["attention"]) - 1
    for case in ("flux-1024", "defaults"):
        steps.measure(record, case, given, tmp_path)
    caching.measure(record, given)
    attention_kernels.measure(record, given)
    after = Record.read(record.path)
    assert after.tables["steps"] == before["steps"] and after.tables["cache"] == before["cache"]
    keys = [{(row["case"], row["way"]) for row in rows} for rows in (after.tables["attention"], before["attention"])]
    assert keys[0] == keys[1] and not any("failed" in row for row in after.tables["attention"])
    assert after.find("attention", case="Wan 720p", way="pytorch") == before["attention"][-8]


def test_forwards_of_the_model_that_runs_are_timed_also_where_it_is_a_copy(comfy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import cases
    import comfy.model_base
    from sizes import CASES, tiny

    from para_core.comfy import attach, compiling, static
    from para_core.settings import Compile

    case, stock = tiny(CASES["flux-1024"]), comfy.model_base.BaseModel.apply_model
    model, copy = cases.build(case), cases.build(case)
    monkeypatch.setattr(compiling, "settled", lambda *_: True)
    monkeypatch.setattr(static, "copy", lambda *_: copy)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert cases.sample(attach.attach(model, Compile("compile")), case).launch > 0
    assert comfy.model_base.BaseModel.apply_model is stock


def test_kernels_have_a_kind_and_the_device_idles_where_none_runs(comfy: None) -> None:
    from kernel_times import STEPS, by_length, covered, idle, kind

    assert idle([(5.0, 6.0), (0.0, 2.0), (1.0, 4.0), (2.0, 3.0)]) == [1.0] and idle([]) == []
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 4.0)]) == 5.0 and covered([]) == 0.0
    found = (1, 1e-3), (2, 5e-3), (0, 0), (0, 0), (1, 0.5)
    assert by_length([1.0, 2.0, 3.0, 500.0]) == [[count / STEPS, round(ms / STEPS, 3)] for count, ms in found]
    names = ("nvjet_sm90_tst", "flash_fwd_kernel", "ncclDevKernel", "Memcpy DtoD", "triton_poi_fused_linear", "vectorized_add")
    assert [kind(name) for name in names] == ["matrices", "attention", "messages", "copies", "element by element", "element by element"]


def test_a_new_record_takes_no_other_ones_name(tmp_path: Path) -> None:
    import bench as command

    given = options(resume=None, out=tmp_path, quick=False, cpu=True, what=["steps"])
    assert len({command.begin(given).path for _ in range(3)}) == 3


def test_a_record_of_another_commit_is_not_gone_on_with(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json")
    record.take({"commit": "one", "torch": "2", "device": "a card"})
    record.take({"commit": "one", "torch": "2", "device": "a card"})
    for other in ({"commit": "two"}, {"device": "another"}, {"driver": "5"}):
        with pytest.raises(Stale, match=next(iter(other))):
            record.take({"commit": "one", "torch": "2", "device": "a card", **other})
    Record(record.path, {"commit": "unknown"}).write()
    with pytest.raises(Stale, match="--commit"):
        Record.read(record.path).resume()


def options(**changes: Any) -> Namespace:
    return Namespace(**{"deadline": time.time() + 60, "row_limit": 60, **changes})


def test_a_row_that_raises_is_written_as_failed_and_the_next_one_goes_on(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json")
    with attempt(record, "steps", {"case": "a", "way": "b"}, options()) as row:
        row["step_ms"] = 1.0
        raise ValueError("no such kernel\nand more")
    with attempt(record, "steps", {"case": "a", "way": "c"}, options()) as row:
        written = Record.read(record.path).find("steps", case="a", way="c")
        assert written is not None and "failed" in written, "a process that ends here has said what it was doing"
        row["step_ms"] = 2.0
    first, second = Record.read(record.path).tables["steps"]
    assert first == {"case": "a", "way": "b", "failed": "ValueError: no such kernel", "took_s": first["took_s"]}
    assert second["step_ms"] == 2.0 and "failed" not in second
    with pytest.raises(TimeIsUp), attempt(record, "steps", {"case": "a", "way": "d"}, options(deadline=0.0)):
        pass
    assert record.find("steps", way="d") is None


def test_a_row_that_hangs_ends_its_process_and_is_not_tried_again_in_that_call(tmp_path: Path) -> None:
    script = (
        f"import sys, time; sys.path.insert(0, {str(BENCH)!r})\n"
        "from argparse import Namespace; from pathlib import Path; from record import Record; from rows import attempt\n"
        f"record = Record.read(Path({str(tmp_path / 'record.json')!r}))\n"
        "with attempt(record, 'steps', {'case': 'a', 'way': 'b'}, Namespace(deadline=9e9, row_limit=0.2)):\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script.replace("9e9", "9e10")], capture_output=True, timeout=60, check=False)
    record = Record.read(tmp_path / "record.json")
    assert done.returncode == 1 and "took too long" in record.tables["steps"][0]["failed"]
    record.machine = {"commit": "one"}
    record.resume()
    assert record.tables["steps"] == [], "a later call tries it again"


def step(way: str, ms: float, **more: Any) -> dict[str, Any]:
    return {"case": "flux-1024", "way": way, "memory": "native", "step_ms": ms, **more}


def made(time: str, **tables: Any) -> Record:
    machine = {"time": time, "date": time[:10], "commit": "abc", "torch": "2.11", "device": "1 x NVIDIA H100"}
    return Record(Path("made"), machine, tables)


def test_pages_show_the_newest_record_of_a_case_with_other_packages_and_failures(tmp_path: Path) -> None:
    older = made("2026-01-01T10:00", steps=[step("stock", 300.0), {**step("stock", 9.0), "case": "wan-480p"}])
    failed = {"case": "flux-1024", "way": "1 rank, auto, off", "memory": "native", "failed": "RuntimeError: no"}
    newer = made(
        "2026-01-01T11:00",
        steps=[step("stock", 200.0), step("2 ranks, auto, off", 100.0, ranks=2), failed],
        peers=[{**step("diffusers, native", 160.0), "memory": "torch's own"}],
    )
    for names in (("a", "b"), ("b", "a")):
        for record, name in zip((older, newer), names, strict=True):
            record.path = tmp_path / f"{name}.json"
            record.write()
        found = pages.pages(pages.read(tmp_path))
        readme, results = found["README.md"], found["tests/bench/RESULTS.md"]
        assert "| stock | 200.0 | `████████████` 1.00 |" in readme and "300.0" not in readme
        assert "| 2 GPUs, auto, off | 100.0 | `████████████████████████` 2.00 |" in readme and "several GPUs" not in readme
        assert "| diffusers, native | 160.0 | `███████████████` 1.25 |" in readme
        assert "failed: RuntimeError: no" in results and "RuntimeError" not in readme
        assert results.index(pages.TITLES["flux-1024"]) < results.index(pages.TITLES["wan-480p"])


def test_a_later_record_of_several_devices_leaves_the_tables_of_one() -> None:
    one = made("2026-01-01T10:00", steps=[step("stock", 200.0)])
    two = made("2026-01-01T11:00", steps=[step("stock", 190.0), step("2 ranks, exact, graph", 100.0, ranks=2)])
    two.machine["device"] = "2 x NVIDIA H200"
    results = pages.pages([two, one])["tests/bench/RESULTS.md"]
    assert results.count(pages.TITLES["flux-1024"]) == 2 and results.index("| stock | 200.0") < results.index("| stock | 190.0")


def test_numbers_of_the_cpu_are_not_shown_as_speed() -> None:
    record = made("2026-01-01T11:00", steps=[step("stock", 200.0)])
    record.machine["device"] = "x86_64 CPU"
    assert "200" not in json.dumps(pages.pages([record]))
