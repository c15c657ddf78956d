"""Schedules that were chosen once are kept on disk: by device, kernel and sizes, and a file that cannot be used is answered with a note."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paretorch.codegen import schedule_cache
from paretorch.codegen.regions import schedules_of
from paretorch.codegen.schedule_cache import FILTERED, TIMED, Choice, ScheduleCache
from tests.kernel_cases import FAMILIES, region
from tests.test_tuning import GRAPH, OTHER, Compiler, clock, matching, tuner, warps

pytest.importorskip("triton")


def test_what_is_kept_is_read_back_in_the_order_of_its_candidate(tmp_path: Path) -> None:
    """Sources are written in that order, and are the same to the byte for the same input."""
    one = matching("f16")
    first, again = (list(tuner(tmp_path).schedules([one])[0]) for _ in range(2))
    assert first == again == list(schedules_of(one)[0])
    assert first != sorted(first), "in a file they are sorted"
    assert list(tmp_path.rglob("*.json")), "the second choice was read"


def test_choices_are_kept(tmp_path: Path) -> None:
    times = clock(w4=3.0, w2=2.0, w8=1.0)
    first = tuner(tmp_path, measure=times)
    assert warps(first.schedules([region(GRAPH), region(OTHER)])) == [8, 8]
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    assert kept["marks"]["device"] == "a device"
    row = next(row for row in kept["choices"].values() if row["kernel"] == "add_layer_norm_gelu")
    assert row["schedule"] == {"BLOCK": 2048, "num_warps": 8}
    assert (row["by"], row["seconds"]["BLOCK=2048, num_warps=2"]) == (TIMED, 2.0)
    again = Compiler()
    assert warps(tuner(tmp_path, again, times).schedules([region(GRAPH), region(GRAPH), region(OTHER)])) == [8, 8, 8]
    assert warps(tuner(tmp_path, again).schedules([region(GRAPH)])) == [8]
    assert again.asked == []
    tuner(tmp_path, measure=times).schedules([region(FAMILIES["layer_norm"].graph("bf16", 3, 4096))])
    assert len(json.loads(path.read_text())["choices"]) == 3, "what stood there stays"


def test_another_kernel_another_key(tmp_path: Path) -> None:
    compiler = Compiler()
    graphs = [FAMILIES["layer_norm"].graph(dtype, rows, 2048) for dtype, rows in (("bf16", 3), ("f32", 3), ("bf16", 5), ("bf16", 3))]
    for graph in graphs:
        tuner(tmp_path, compiler).schedules([region(graph)])
    assert len(compiler.asked) == 3, "the last is the first"


def test_a_choice_of_the_static_model_is_timed_where_that_can_be_done(tmp_path: Path) -> None:
    assert warps(tuner(tmp_path).schedules([region(GRAPH)])) == [4]
    (path,) = tmp_path.iterdir()
    assert [row["by"] for row in json.loads(path.read_text())["choices"].values()] == [FILTERED]
    assert warps(tuner(tmp_path, measure=clock(w4=3.0, w2=2.0, w8=1.0)).schedules([region(GRAPH)])) == [8]
    assert warps(tuner(tmp_path).schedules([region(GRAPH)])) == [8]


@pytest.mark.parametrize("damage", ["not json", "[]", '{"choices": {}}', "half", "no warps", "another triton"])
def test_a_file_that_cannot_be_used(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = clock(w4=3.0, w2=2.0, w8=1.0)
    tuner(tmp_path, measure=times).schedules([region(GRAPH)])
    (path,) = tmp_path.iterdir()
    good = path.read_text()
    if damage == "another triton":
        monkeypatch.setattr(schedule_cache, "triton_version", lambda: "0.1")
    else:
        path.write_text({"half": good[: len(good) // 2], "no warps": good.replace('"num_warps": 8', '"num_waves": 8')}.get(damage, damage))
    one = tuner(tmp_path, measure=times)
    assert warps(one.schedules([region(GRAPH)])) == [8]
    assert len(one.notes) == 1
    assert one.notes[0].startswith(str(path))
    assert one.notes[0].endswith("schedules are chosen anew")
    fresh = tuner(tmp_path, measure=times)
    assert (fresh.schedules([region(GRAPH)]), fresh.notes) == (one.schedules([region(GRAPH)]), [])


def test_a_schedule_that_is_no_candidate_is_not_taken(tmp_path: Path) -> None:
    tuner(tmp_path).schedules([region(GRAPH)])
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace('"BLOCK": 2048', '"BLOCK": 64'))
    assert tuner(tmp_path).schedules([region(GRAPH)]) == [schedules_of(region(GRAPH))[0]]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ScheduleCache("a device", "sm_90", tmp_path / "file" / "inside")
    cache.put({"key": Choice("add", {"num_warps": 4}, TIMED)})
    assert cache.get("key") == Choice("add", {"num_warps": 4}, TIMED)
    assert len(cache.notes) == 1
    assert cache.notes[0].startswith("schedules are not kept for later calls: ")
