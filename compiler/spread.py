"""Independent calls spread over any concurrent.futures.Executor: processes, a dask cluster's `Client.get_executor()`, Ray's.

The results are those of running the calls here: same order, same number of threads. What a worker takes down with it is run here instead.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paretorch.codegen.reduced import with_wide_weights
from paretorch.data import Batch
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph

CHUNKS = 8  # tasks per group of batches: each carries the weights, so they are few
IN_FLIGHT = 2e9  # bytes of arguments that are packed at a time
# The executor's failures, not the task's. Where a task itself raised one of these, running it here raises it again.
LOSSES = (BrokenExecutor, CancelledError, OSError, EOFError, pickle.PickleError)

Inputs = tuple[Tensor, ...]
Spread = Callable[[Callable[..., Any], Sequence[Sequence[Any]]], list[Any]]  # function, argument lists -> results


def spread(executor: Executor, function: Callable[..., Any], argument_lists: Sequence[Sequence[Any]]) -> tuple[list[Any], list[str]]:
    """(results, losses): `function(*arguments)` of each list, in order; for each call that was lost and run here, why, as one line.

    Everything must be picklable unless the executor has threads. What `function` raises is raised here.
    """
    results: list[Any] = []
    losses: list[str] = []
    waiting: deque[_Task] = deque()
    send = _Sender(executor, function, argument_lists)

    def collect() -> None:
        task = waiting.popleft()
        try:
            results.append(send.unpack(task.future.result()))
        except Exception as error:
            if not is_loss(error):
                raise
            losses.append(_line(error))
            results.append(function(*task.arguments))

    try:
        for arguments in argument_lists:
            waiting.append(send(arguments))
            while len(waiting) > 1 and sum(task.size for task in waiting) > IN_FLIGHT:
                collect()
        while waiting:
            collect()
    finally:
        for task in waiting:  # after an error or Ctrl-C nobody waits for the rest
            task.future.cancel()
    return results, losses


def is_loss(error: BaseException) -> bool:
    """Whether this says that the executor lost a task: its worker died, the task was cancelled, or it could not be sent."""
    return isinstance(error, LOSSES) or type(error).__module__.partition(".")[0] == "distributed"  # dask's, such as KilledWorker


@dataclass(frozen=True)
class _Task:
    """size: bytes that were packed for this task alone."""

    future: Future[Any]
    arguments: Sequence[Any]
    size: int


class _Sender:
    """Submits calls. Other processes get packed arguments and give a packed result; an argument of several calls is packed once.

    Left to themselves, processes would hold an open file per tensor, and dask waits forever for a tensor in bf16.
    """

    def __init__(self, executor: Executor, function: Callable[..., Any], argument_lists: Sequence[Sequence[Any]]) -> None:
        self._executor, self._function, self._threads = executor, function, torch.get_num_threads()
        self._shares_memory = isinstance(executor, ThreadPoolExecutor)
        self._uses = Counter(id(argument) for arguments in argument_lists for argument in arguments)
        self._kept: dict[int, bytes] = {}

    def __call__(self, arguments: Sequence[Any]) -> _Task:
        if self._shares_memory:
            return _Task(self._submitted(_with_threads, arguments), arguments, 0)
        try:
            packed = [self._packed(argument) for argument in arguments]
        except Exception as error:  # whatever an object raises that cannot be pickled
            return _Task(_failed(error), arguments, 0)
        size = sum(len(data) for argument, data in zip(arguments, packed, strict=True) if self._uses[id(argument)] == 1)
        return _Task(self._submitted(_run_packed, packed), arguments, size)

    def unpack(self, result: Any) -> Any:
        return result if self._shares_memory else _unpack(result)

    def _packed(self, argument: Any) -> bytes:
        data = self._kept[id(argument)] if id(argument) in self._kept else _pack(argument)
        if self._uses[id(argument)] > 1:
            self._kept[id(argument)] = data
        return data

    def _submitted(self, run: Callable[..., Any], arguments: Sequence[Any]) -> Future[Any]:
        try:
            return self._executor.submit(run, self._threads, self._function, *arguments)
        except Exception as error:  # broken or shut down: the call itself did not run yet
            return _failed(error)


def _failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(BrokenExecutor(_line(error)))
    return future


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(pytree.tree_map_only(Tensor, _own, value), buffer)
    return buffer.getvalue()


def _own(tensor: Tensor) -> Tensor:
    """Without the rest of what it is a part of: a batch of a large tensor takes that along when it is saved."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)  # from our own processes


def _run_packed(threads: int, function: Callable[..., Any], *arguments: bytes) -> bytes:
    return _pack(_with_threads(threads, function, *map(_unpack, arguments)))


def _with_threads(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run with the caller's number of threads, since sums are rounded in an order that depends on it."""
    before = torch.get_num_threads()
    if threads == before:
        return function(*arguments)
    torch.set_num_threads(threads)
    try:
        return function(*arguments)
    finally:
        torch.set_num_threads(before)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


class Sent:
    """A graph as plain torch that can be pickled; flat tensors in, flat tuple out.

    A GraphModule is traced again when it is unpickled, and for that time torch patches the modules that other threads of the worker run.
    """

    def __init__(self, source: str, modules: dict[str, str], values: dict[str, Any], constants: dict[str, Tensor]) -> None:
        """source: a function `forward`; modules, values: the names that it uses, modules by their path; constants: what it takes from self."""
        self._parts = (source, modules, values, constants)
        scope = {**{name: import_module(path) for name, path in modules.items()}, **values}
        exec(source, scope)
        self._forward, self._self = scope["forward"], SimpleNamespace(**constants)

    @classmethod
    def of(cls, graph: Graph) -> Sent:
        """The graph; its constants are not copied, but for integer weights, which are multiplied out."""
        graph = with_wide_weights(graph)
        twin, names = graph.copy(), {name: f"constant_{place}" for place, name in enumerate(graph.constants)}
        for node in twin.nodes:
            if node.op == "get_attr":
                node.target = names[str(node.target)]
        code = twin.fx.python_code("self")
        modules = {name: value.__name__ for name, value in code.globals.items() if isinstance(value, ModuleType)}
        values = {name: value for name, value in code.globals.items() if name not in modules}
        return cls(code.src, modules, values, {names[name]: tensor for name, tensor in graph.constants.items()})

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        return tuple(self._forward(self._self, *inputs))

    def __reduce__(self) -> tuple[Any, ...]:
        return Sent, self._parts


def between_looks(batches: Sequence[Batch], first: int, most: int) -> list[list[Inputs]]:
    """The inputs of the batches, in groups that end where a judge looks: at `first` samples, and whenever their number has doubled.

    most: batches in a group.
    """
    groups: list[list[Inputs]] = [[]]
    count, look = 0, first
    for batch in batches:
        groups[-1].append(batch.inputs)
        count += batch.count
        if count >= look or len(groups[-1]) == most:
            groups.append([])
        if count >= look:
            look = 2 * count
    return [group for group in groups if group]


class Ahead:
    """A graph that is called with one batch after another: when the first of a group is asked for, the whole group is run, spread."""

    def __init__(self, graph: Sent, groups: Sequence[list[Inputs]], run: Spread) -> None:
        self._graph, self._run = graph, run
        self._groups = {_key(inputs): group for group in groups for inputs in group}
        self._ready: dict[tuple[int, ...], tuple[Any, ...]] = {}  # of one group, so that memory stays bounded

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        """Flat outputs. Raises LoweringError if torch cannot run the graph."""
        key = _key(inputs)
        if key not in self._groups:
            return self._outputs([inputs])[0]
        if key not in self._ready:
            self._ready.clear()
            self._ready.update(zip(map(_key, self._groups[key]), self._outputs(self._groups[key]), strict=True))
        return self._ready[key]

    def _outputs(self, group: list[Inputs]) -> list[tuple[Any, ...]]:
        size = -(-len(group) // CHUNKS)
        chunks = [(self._graph, group[start : start + size]) for start in range(0, len(group), size)]
        found = self._run(outputs_of, chunks) if len(chunks) > 1 else [outputs_of(*chunks[0])]
        outputs: list[tuple[Any, ...]] = []
        for part in found:
            if isinstance(part, str):
                raise LoweringError(part)
            outputs += part
        return outputs


def _key(inputs: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(id, inputs))  # the groups keep them alive


def outputs_of(graph: Sent, batches: Sequence[Inputs]) -> list[tuple[Any, ...]] | str:
    """Flat outputs of each batch, or the first line of what torch said; a plain function, so that any executor can run it."""
    try:
        with running_plan():
            return [graph(*inputs) for inputs in batches]
    except LoweringError as error:
        return str(error)


@contextmanager
def running_plan() -> Iterator[None]:
    """Without gradients; what torch raises because it cannot run a plan's graph is a LoweringError with its first line."""
    try:
        with torch.no_grad():
            yield
    except (RuntimeError, NotImplementedError) as error:
        raise LoweringError(f"torch cannot run this plan: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
