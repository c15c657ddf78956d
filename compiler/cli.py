"""The command line: paretorch demo, optimize, why, devices, calibrate, show."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from paretorch.ir.errors import InputError, ParetorchError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Makes trained PyTorch models faster within a stated loss.")

ModelArgument = Annotated[str, typer.Argument(help="module:function that returns (model, example_inputs)")]
TargetOption = Annotated[str, typer.Option(help="device[:chip][:runtime], for example cpu, cpu:onnxruntime, cuda:h100")]


@app.command()
def demo(
    html: Annotated[Path | None, typer.Option(help="where to write the report as a page")] = None,
    quick: Annotated[bool, typer.Option(help="fewer held-out images, for a first look")] = False,
) -> None:
    """Optimise a small trained vision transformer at several budgets, on images that it never saw. Needs no network."""
    from paretorch.demo.run import run

    run(html or Path("paretorch-demo.html"), quick=quick)


@app.command()
def optimize(
    model: ModelArgument,
    data: Annotated[str | None, typer.Option(help="module:function that returns batches of inputs, or of (inputs, labels)")] = None,
    target: TargetOption = "cpu",
    drift: Annotated[float | None, typer.Option(help="allowed drift of the outputs; needs --data")] = None,
    measure: Annotated[str, typer.Option(help="relative, cosine, kl or top1")] = "relative",
    max_drop: Annotated[float | None, typer.Option(help="allowed drop of --metric; needs --data")] = None,
    metric: Annotated[str, typer.Option(help="top1, spearman, f1, perplexity, or module:function of (outputs, labels)")] = "top1",
    without: Annotated[list[str] | None, typer.Option(help="a rule or family to leave out; may be repeated")] = None,
    time_limit: Annotated[float | None, typer.Option(help="seconds")] = None,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="where to save the result")] = None,
    html: Annotated[Path | None, typer.Option(help="where to write the report as a page")] = None,
) -> None:
    """Optimise a model of yours and print the report."""
    import paretorch

    built, example = _pair(_load(model)())
    scorer: Any = None if max_drop is None else _load(metric) if ":" in metric else metric
    budget = paretorch.Budget(drift=drift, measure=measure, metric=scorer, max_drop=max_drop)
    batches = None if data is None else _load(data)()
    result = paretorch.optimize(
        built, example, target=target, budget=budget, data=batches, without=without or (), time_limit=time_limit, seed=seed, progress=True
    )
    Console().print(str(result.report), markup=False, highlight=False)
    if html is not None:
        result.report.to_html(html)
    if output is not None:
        result.save(output)


@app.command()
def why(rule: str, model: ModelArgument, target: TargetOption = "cpu") -> None:
    """Say what became of a rule or family on a model: where it is legal, where not, and the sentence for each."""
    import paretorch
    from paretorch.explain import explain
    from paretorch.offers import offers

    paretorch.rules_named([rule])
    built, example = _pair(_load(model)())
    typer.echo(explain(offers(built, example, target=target), rule))


@app.command()
def devices() -> None:
    """List the devices that plans can be made for, with the source of their numbers."""
    from paretorch.cost_model.devices import DEVICES

    table = Table("device", "memory bandwidth, GB/s", "peak, TFLOP/s", "source")
    for device in DEVICES.values():
        peaks = ", ".join(f"{dtype} {rate / 1e12:.1f}" for dtype, rate in device.peak_flops_per_s.items())
        table.add_row(device.name, f"{device.bandwidth_bytes_per_s / 1e9:.0f}", peaks, device.source)
    Console().print(table)


@app.command()
def calibrate(thorough: Annotated[bool, typer.Option(help="take up to a minute instead of seconds")] = False) -> None:
    """Measure this machine's runtimes anew and keep the result for later calls."""
    from paretorch.codegen.runtimes import RUNTIMES
    from paretorch.cost_model.calibrate import calibrate as measure

    usable = {name: runtime for name, runtime in RUNTIMES.items() if runtime.refuses() is None}
    typer.echo(str(measure(usable, thorough=thorough, cache=False)))


@app.command()
def show(path: Path, graph: Annotated[bool, typer.Option(help="print the rewritten graph as well")] = False) -> None:
    """Print the report of a saved result."""
    import paretorch

    result = paretorch.load(path)
    Console().print(str(result.report), markup=False, highlight=False)
    if graph:
        typer.echo(str(result.graph))


def _load(reference: str) -> Any:
    """The object that "package.module:name" names. Raises InputError."""
    module, _, name = reference.partition(":")
    if not name:
        raise InputError(f"{reference!r} names no function; expected module:function, for example mypkg.models:build")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise InputError(f"cannot import {module!r}: {error}") from error
    except AttributeError as error:
        raise InputError(f"the module {module!r} has no {name!r}") from error


def _pair(built: Any) -> tuple[Any, Any]:
    if not isinstance(built, tuple) or len(built) != 2:
        raise InputError(f"the model function returned {type(built).__name__}; expected a pair (model, example_inputs)")
    return built


def main() -> None:
    """Run the command line; our own errors are printed without a traceback."""
    try:
        app()
    except ParetorchError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False)
        sys.exit(1)
