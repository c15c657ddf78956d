"""Saved results: what comes back computes the same, and files that are damaged, foreign or cannot be written are answered with a sentence."""

import io
import json
import pickletools
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import paretorch
from paretorch import Choice, Plan, artifact, capture
from paretorch.artifact import FORMAT, MEMBERS
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.contest import Contender
from paretorch.ir.errors import ArtifactError
from paretorch.ir.hash import structural_hash
from paretorch.ledger import Entry
from paretorch.optimized import Optimized
from paretorch.report import Report, Timing
from paretorch.rewrites.normalize import normalize
from tests.zoo import make


def optimized(name: str, dynamic_shapes=None) -> tuple[Optimized, tuple[torch.Tensor, ...]]:
    """A result made by hand, for whether there is one depends on what was measured."""
    model, inputs = make(name)
    program = capture(model, inputs, dynamic_shapes)
    graph = normalize(program.graph)
    contender = Contender("exact", "eager", graph, RUNTIMES["eager"].compile(graph, program.example), 1e-3)
    plan = Plan((Choice("skip_block", "add_1"), Choice("tome", "add_2", 4)), ("merge_linears",), "eager", structural_hash(graph))
    entry = Entry("tome", "token_merging", "add_2", "taken", "it saves most", 4, 1e-4, 0.01)
    figures = {"predicted_seconds": 1e-3, "measured_seconds": 2e-3, "original_seconds": 3e-3, "peak_memory_bytes": None}
    promise = {"unit": "top-1", "limit": 0.01, "loss": 0.002, "half_width": 0.001, "samples": 100, "attention": 2}
    report = Report(
        "cpu:eager", "eager", **figures, **promise, plan_lines=("tome",), entries=(entry,), notes=("a note",),
        timings=(Timing("original", 3e-3, 0.1, 5, 1.0, 0.9, 1.1),), stages={"capture": 1.0, "analyze": 0.5}, environment={"torch": "2"},
    )  # fmt: skip
    return Optimized(program, contender, plan, report, None), inputs


@pytest.fixture(scope="module")
def bert():
    return optimized("bert")


@pytest.fixture
def saved(bert, tmp_path):
    path = tmp_path / "bert.paretorch"
    bert[0].save(path)
    return path


def rewrite(path: Path, **changes: bytes | None) -> None:
    """The zip again, with other members (dots written as _)."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, content in changes.items():
        full = next(member for member in members if member.replace(".", "_") == name)
        members = {member: kept for member, kept in members.items() if member != full} | ({full: content} if content is not None else {})
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_loaded_is_the_same_function(bert, saved):
    result, inputs = bert
    loaded = paretorch.load(saved)
    assert torch.equal(loaded(*inputs), result(*inputs))
    assert str(loaded.graph) == str(result.graph)
    assert loaded.report == result.report
    assert str(loaded.report) == str(result.report)
    assert loaded.plan == result.plan


def test_what_optimize_returns(tmp_path):
    model, inputs = make("mixer")
    result = paretorch.optimize(model, inputs, target="cpu:eager", rules=[])
    if result.contender is None:  # where the original was the fastest
        pytest.skip(result.report.sentence())
    result.save(tmp_path / "mixer")
    assert torch.equal(paretorch.load(tmp_path / "mixer")(*inputs), result(*inputs))


def test_saving_what_was_loaded_gives_the_same_file(saved, tmp_path):
    paretorch.load(saved).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_any_batch(tmp_path):
    result, (images,) = optimized("vit_class", {"images": {0: "batch"}})
    result.save(tmp_path / "vit")
    loaded = paretorch.load(tmp_path / "vit")
    for batch in (images, torch.cat([images] * 3), images[:1]):
        assert torch.equal(loaded(batch), result(batch))


def test_no_pickle_inside(saved):
    with zipfile.ZipFile(saved) as archive:
        assert set(archive.namelist()) == MEMBERS | {"manifest.json"}
        for name in archive.namelist():
            with pytest.raises(ValueError):  # noqa: PT011  that of pickletools
                pickletools.dis(archive.read(name), out=io.StringIO())


@pytest.mark.parametrize("member", sorted(MEMBERS))
def test_a_changed_byte(saved, member):
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        start = content.index(archive.read(member))
    content[start + 3] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        paretorch.load(saved)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ArtifactError, match="not a saved result of paretorch, or it is damaged"):
        paretorch.load(saved)


def test_a_member_that_is_missing_or_was_exchanged(saved):
    rewrite(saved, plan_json=b"{}")
    with pytest.raises(ArtifactError, match=r"plan.json is missing or its sha256 is not"):
        paretorch.load(saved)
    rewrite(saved, plan_json=None)
    with pytest.raises(ArtifactError, match=r"plan.json is missing"):
        paretorch.load(saved)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ('{"format": 99}', f"format 99; this version reads format {FORMAT}"),
        ("[1]", "its manifest is a list"),
        ("{", "not a saved result"),
        (f'{{"format": {FORMAT}}}', "its manifest has no sha256 of"),
    ],
)
def test_a_foreign_manifest(saved, manifest, message):
    rewrite(saved, manifest_json=manifest.encode())
    with pytest.raises(ArtifactError, match=message):
        paretorch.load(saved)


def test_foreign_files(tmp_path):
    with pytest.raises(ArtifactError, match="no file"):
        paretorch.load(tmp_path / "nothing")
    with zipfile.ZipFile(tmp_path / "foreign.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    (tmp_path / "text").write_text("hello")
    for name in ("foreign.zip", "text", ""):
        with pytest.raises(ArtifactError, match="not a saved result of paretorch"):
            paretorch.load(tmp_path / name)


def test_a_runtime_that_is_not_here(saved, monkeypatch):
    class Absent:
        name = "eager"

        def refuses(self, graph=None):
            return "it is not installed"

    monkeypatch.setitem(RUNTIMES, "eager", Absent())
    with pytest.raises(ArtifactError, match="runtime eager, which cannot be used here: it is not installed"):
        paretorch.load(saved)
    with zipfile.ZipFile(saved) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    rewrite(saved, manifest_json=json.dumps({**manifest, "runtime": "abacus"}).encode())
    with pytest.raises(ArtifactError, match="runtime abacus, which this version does not have"):
        paretorch.load(saved)


def test_tensors_of_a_device_that_is_not_here(saved):
    with zipfile.ZipFile(saved) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    assert manifest["devices"] == {"weights.safetensors": {}, "example.safetensors": {}}
    for member in manifest["devices"]:
        rewrite(saved, manifest_json=json.dumps({**manifest, "devices": {member: {"any": "xpu"}}}).encode())
        with pytest.raises(ArtifactError, match=r"holds tensors for xpu, which is not on this machine"):
            paretorch.load(saved)


def test_tensors_return_to_the_device_they_were_on(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "_devices_here", lambda: ("cpu", "meta"))
    held = {"a": torch.ones(2), "b": torch.ones(3)}
    manifest = {"devices": {"weights.safetensors": artifact._elsewhere({"a": held["a"], "b": held["b"].to("meta")})}}
    read = artifact._tensors("fast", "weights.safetensors", {"weights.safetensors": save(held)}, manifest)
    assert {name: tensor.device.type for name, tensor in read.items()} == {"a": "cpu", "b": "meta"}


def test_a_path_that_cannot_be_written(bert, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "below", tmp_path):
        with pytest.raises(ArtifactError, match=r"cannot write .*; choose a path"):
            bert[0].save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_original_is_not_saved(bert, tmp_path):
    result, _ = bert
    with pytest.raises(ArtifactError, match="the original model was returned"):
        Optimized(result.program, None, result.plan, result.report, None).save(tmp_path / "original")
