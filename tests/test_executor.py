"""Evaluations spread over an executor give the same plan as those made here, and what a worker takes down with it is run here."""

import os
import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

import paretorch
from paretorch import Budget
from paretorch.capture import capture
from paretorch.data import Batch
from paretorch.ir.builder import build
from paretorch.ir.errors import LoweringError
from paretorch.ir.types import TensorType
from paretorch.metrics import top1
from paretorch.rewrites.normalize import normalize
from paretorch.spread import CHUNKS, Ahead, Sent, between_looks, is_loss, outputs_of, spread
from tests.zoo import make

DEVICE = "fake-compute"  # prices are fixed there, so only the evaluations could differ


def searched(executor: Executor | None, budget: Budget | None = None) -> paretorch.Optimized:
    model, inputs = make("vit_class")
    torch.manual_seed(0)
    data: list[Any] = [torch.randn_like(inputs[0]) for _ in range(24)]
    if budget is not None:
        data = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in data]
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setenv("PARETORCH_CACHE", folder)  # else what an earlier search measured would be read from there
        options = {"rules": ["layer_skipping", "tome"], "data": data, "executor": executor}
        return paretorch.optimize(model, inputs, target=DEVICE, budget=budget or Budget(drift=0.2), **options)


@pytest.fixture(scope="module")
def alone() -> str:
    """The plan without an executor."""
    return searched(None).plan.to_json()


class Watched(Executor):
    """Another executor whose tasks first call `before(folder)`."""

    def __init__(self, inner: Executor, before: Callable[[Path], None], folder: Path) -> None:
        self.inner, self.before, self.folder = inner, before, folder

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.inner.submit(watched, self.before, self.folder, function, *args, **kwargs)


def watched(before: Callable[[Path], None], folder: Path, function: Callable[..., Any], *args: Any) -> Any:
    before(folder)
    return function(*args)


def sign(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


def die_once(folder: Path) -> None:
    """The second task to get here takes its process down."""
    for name in ("first", "second"):
        try:
            (folder / name).touch(exist_ok=False)
        except FileExistsError:
            continue
        if name == "second":
            os.kill(os.getpid(), signal.SIGKILL)
        return


def processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with processes() as made:
        yield made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A client of two dask workers, each a process of its own."""
    distributed = pytest.importorskip("distributed")
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as made,
        distributed.Client(made) as client,
    ):
        yield client


# the same plan, from wherever


def test_same_plan_from_threads(alone: str) -> None:
    with ThreadPoolExecutor(2) as executor:
        found = searched(executor)
    assert found.plan.to_json() == alone
    assert found.plan.choices
    assert not [note for note in found.report.notes if "executor" in note]


def test_same_plan_from_processes(alone: str, tmp_path: Path, pool: Executor) -> None:
    found = searched(Watched(pool, sign, tmp_path))
    assert found.plan.to_json() == alone
    workers = {int(path.name) for path in tmp_path.iterdir()}
    assert len(workers) > 1
    assert os.getpid() not in workers


def test_same_plan_from_dask(alone: str, tmp_path: Path, cluster: Any) -> None:
    found = searched(Watched(cluster.get_executor(), sign, tmp_path))
    assert found.plan.to_json() == alone
    workers = {int(path.name) for path in tmp_path.iterdir()}
    assert len(workers) > 1
    assert os.getpid() not in workers


def test_a_metric_that_cannot_be_pickled(pool: Executor) -> None:
    def metric(outputs: Any, labels: Any) -> torch.Tensor:
        return top1(outputs, labels)

    budget = Budget(metric=metric, max_drop=0.4)
    assert searched(pool, budget).plan.to_json() == searched(None, budget).plan.to_json()


# workers that die


def test_a_broken_pool_costs_only_time(alone: str, tmp_path: Path) -> None:
    with processes() as executor:
        found = searched(Watched(executor, die_once, tmp_path))
    assert found.plan.to_json() == alone
    (note,) = [note for note in found.report.notes if "executor" in note]
    assert "evaluations were run here because the executor lost them: Broken" in note


def test_a_killed_dask_worker_costs_only_time(alone: str, tmp_path: Path, cluster: Any) -> None:
    found = searched(Watched(cluster.get_executor(), die_once, tmp_path))
    assert found.plan.to_json() == alone
    (note,) = [note for note in found.report.notes if "executor" in note]
    assert "run here because the executor lost them: KilledWorker" in note


class Sloppy(Executor):
    """Loses the first task of each kind of loss, and runs the others."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        task: Future[Any] = Future()
        if self.errors:
            task.set_exception(self.errors.pop(0))
        else:
            task.set_result(function(*args, **kwargs))
        return task


def half(number: int) -> float:
    return number / 2


def test_losses_are_run_here() -> None:
    lost = [OSError("no route\nto host"), EOFError(), CancelledError("gone")]
    assert spread(Sloppy(*lost), half, [(n,) for n in range(5)]) == (
        [0.0, 0.5, 1.0, 1.5, 2.0],
        ["OSError: no route", "EOFError: no message", "CancelledError: gone"],
    )


def test_an_executor_that_was_shut_down() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    results, losses = spread(executor, half, [(3,)])
    assert results == [1.5]
    assert "cannot schedule new futures after shutdown" in losses[0]


def test_an_error_of_the_task_is_raised() -> None:
    with ThreadPoolExecutor(2) as executor, pytest.raises(TypeError, match="unsupported operand"):
        spread(executor, half, [(1,), ("a",)])
    assert not is_loss(TypeError())
    with pytest.raises(OSError, match="its own"):
        spread(Sloppy(OSError("lost")), fail, [()])


def fail() -> None:
    raise OSError("its own")


def rounded(x: torch.Tensor) -> list[torch.Tensor]:
    return [x.bfloat16(), x.T]


@pytest.mark.parametrize("kind", ["pool", "cluster"])
def test_tensors_come_back_as_they_were(kind: str, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(kind)
    executor = made if kind == "pool" else made.get_executor()
    x = torch.randn(3, 4)
    results, losses = spread(executor, rounded, [(x,), (x,)])
    assert not losses
    for left, right in results:
        assert torch.equal(left, x.bfloat16())
        assert torch.equal(right, x.T)
        assert right.stride() == x.T.stride()


def test_what_cannot_be_pickled_is_run_here(pool: Executor) -> None:
    results, losses = spread(pool, call, [(lambda: 1,), (float,)])
    assert results == [1, 0.0]
    assert "pickle" in losses[0]


def call(function: Callable[[], Any]) -> Any:
    return function()


class Weighing(Executor):
    """Runs tasks at once; sizes: bytes of the arguments of each."""

    def __init__(self) -> None:
        self.sizes: list[list[int]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.sizes.append([len(arg) for arg in args if isinstance(arg, bytes)])
        task: Future[Any] = Future()
        task.set_result(function(*args))
        return task


def test_a_part_is_sent_without_the_whole() -> None:
    executor, rows = Weighing(), torch.arange(100_000.0).view(1000, 100)
    results, _ = spread(executor, torch.sum, [(rows[:1],), (rows[1:2],)])
    assert [float(total) for total in results] == [float(rows[0].sum()), float(rows[1].sum())]
    assert all(size < 10_000 for (size,) in executor.sizes)


def test_few_arguments_wait_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paretorch.spread.IN_FLIGHT", 3000)
    waiting: list[Future[Any]] = []

    class Slow(Executor):
        def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            task: Future[Any] = Promise(lambda: function(*args))
            waiting.append(task)
            assert sum(not task.done() for task in waiting) <= 2
            return task

    class Promise(Future[Any]):
        def __init__(self, made: Callable[[], Any]) -> None:
            super().__init__()
            self.made = made

        def result(self, timeout: float | None = None) -> Any:
            self.set_result(self.made())
            return super().result(timeout)

    results, losses = spread(Slow(), torch.sum, [(torch.full((400,), float(n)),) for n in range(6)])
    assert [float(total) for total in results] == [400.0 * n for n in range(6)]
    assert not losses


# batches between two looks


def batches(count: int, samples: int) -> list[Batch]:
    return [Batch((torch.full((samples, 1), float(n)),), None, samples) for n in range(count)]


def test_groups_end_where_the_judge_looks() -> None:
    assert [len(group) for group in between_looks(batches(20, 4), 8, 100)] == [2, 2, 4, 8, 4]
    assert [len(group) for group in between_looks(batches(20, 4), 8, 3)] == [2, 2, 3, 1, 3, 3, 2, 3, 1]
    assert between_looks([], 8, 3) == []


def run_here(function: Any, argument_lists: Any) -> list[Any]:
    return [function(*arguments) for arguments in argument_lists]


def test_a_graph_is_sent_a_few_times() -> None:
    sent: list[int] = []

    def run(function: Any, argument_lists: Any) -> list[Any]:
        sent.append(len(argument_lists))
        return run_here(function, argument_lists)

    given, graph = batches(40, 4), build("double", lambda b, x: b.mul(x, 2.0), x=TensorType("f32", (4, 1)))
    ahead = Ahead(Sent.of(graph), between_looks(given, 64, 1000), run)
    assert [float(ahead(*batch.inputs)[0][0]) for batch in given] == [2.0 * n for n in range(40)]
    assert sent == [CHUNKS, CHUNKS, CHUNKS]


def test_a_batch_in_no_group_is_run_alone() -> None:
    graph = build("double", lambda b, x: b.mul(x, 2.0), x=TensorType("f32", (4, 1)))
    ahead = Ahead(Sent.of(graph), [], run_here)
    assert torch.equal(ahead(torch.ones(4, 1))[0], torch.full((4, 1), 2.0))


@pytest.mark.parametrize("name", ["llama", "bert", "swin"])
def test_what_is_sent_is_the_graph(name: str) -> None:
    model, inputs = make(name)
    graph = normalize(capture(model, inputs).graph)
    there = pickle.loads(pickle.dumps(Sent.of(graph)))
    with torch.no_grad():
        assert all(map(torch.equal, there(*inputs), graph.run(*inputs)))


def test_what_torch_cannot_run_is_told_as_without_an_executor() -> None:
    graph = Sent.of(build("product", lambda b, x: b.mul(x, b.constant("two", torch.ones(2))), x=TensorType("f32", (4, 1))))
    wrong = [(torch.ones(4, 3),)] * 2
    assert str(outputs_of(graph, wrong)).startswith("torch cannot run this plan: The size of tensor a (3)")
    with pytest.raises(LoweringError, match="torch cannot run this plan"):
        Ahead(graph, [wrong], run_here)(*wrong[0])
