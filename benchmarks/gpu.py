"""Every figure that is asked of the GPU, against ceilings measured in the same run; writes benchmarks/results/gpu.json and prints a table.

python benchmarks/gpu.py                 # kernels, then whole models while LIMIT_S seconds last; what was not reached says so
python benchmarks/gpu.py --kernels       # kernels only
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks.gpu_goals import GOALS, table
from benchmarks.summary import write_summary

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT_S = 440.0
NO_GPU = "benchmarks/gpu.py needs an NVIDIA GPU, and torch finds none here; benchmarks/results/README.md lists its figures as not measured."


def seconds(call: Callable[[], object]) -> float:
    """The median time of a call, with a cold cache before each."""
    import triton

    return float(triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median")) * 1e-3


def ceilings() -> dict[str, float]:
    """Bytes per second of a copy (each byte is read and written), flops per second of a product of random bf16."""
    x = torch.randn(2**28, device="cuda", dtype=torch.float32)
    y = torch.empty_like(x)
    copied = 2 * x.numel() * x.element_size() / seconds(lambda: y.copy_(x))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"copy_bytes_per_s": copied, "matrix_flops_per_s": 2 * 8192**3 / seconds(lambda: a @ b)}


def kernels(copy_bytes_per_s: float) -> Iterator[tuple[str, Callable[[], float]]]:
    """(goal's name, what measures its ratio)."""
    from benchmarks.gpu_kernels import divided, four_bits, matching, scheduled, sized, streaming
    from paretorch.tuning import tuner_here

    def share(make: Any) -> float:
        call, moved = make()
        return float(moved / seconds(call) / copy_bytes_per_s)

    for name, make in streaming().items():
        yield name, lambda make=make: share(make)  # type: ignore[misc]

    def against(pair: tuple[Callable[[], object], Callable[[], object]]) -> float:
        return seconds(pair[1]) / seconds(pair[0])

    yield "attention, bf16 head 128, 16k tokens", lambda: dense(is_causal=False)
    yield "causal attention, bf16 head 128, 16k tokens", lambda: dense(is_causal=True)
    yield "attention with sizes of merged tokens, bf16 head 64, 4k tokens", lambda: against(sized(8, 12, 4096, 64))
    yield "window of 1024 at 16k tokens", windowed
    yield "window of 1024 against 4096 at 32k tokens", proportional
    yield "token matching, bf16 64 x 197 x 64, r = 13", lambda: against(matching())
    yield "product with K divided, bf16 4 x 16384 by 1024", lambda: against(divided())
    yield "weights of four bits, bf16 4 x 4096 by 11008, groups of 128", lambda: against(four_bits())
    yield "tuned schedule of causal attention, bf16 head 128, 16k tokens", lambda: against(scheduled(tuner_here().schedules))  # type: ignore[union-attr, arg-type]


def dense(is_causal: bool) -> float:
    """The fastest of SDPA's backends over ours."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks.gpu_kernels import attention

    call, (query, key, value) = attention(1, 16, 16384, 128, **({"right": 0} if is_causal else {}))
    times = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            try:
                times.append(seconds(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)))
            except RuntimeError as error:  # this build or this GPU lacks that backend
                print(f"  {backend.name}: {str(error).splitlines()[0]}")
    return min(times) / seconds(call)


def windowed() -> float:
    """FlexAttention with the same window over ours."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from benchmarks.gpu_kernels import attention

    call, (query, key, value) = attention(1, 16, 16384, 128, left=1023, right=0)
    mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 1024), None, None, 16384, 16384, device="cuda")
    flexible = torch.compile(flex_attention)
    return seconds(lambda: flexible(query, key, value, block_mask=mask)) / seconds(call)


def proportional() -> float:
    """A quarter of the time with four times the window, over the time with the window."""
    from benchmarks.gpu_kernels import attention

    short, long = (seconds(attention(1, 16, 32768, 128, left=window - 1, right=0)[0]) for window in (1024, 4096))
    return long / 4 / short


def models() -> Iterator[tuple[str, Callable[[], float]]]:
    """Whole models of random weights: torch.compile's time over ours."""
    from benchmarks import gpu_models

    yield "CUDA graph of BERT-base, bf16 1 x 128", lambda: graphed(*gpu_models.bert(1, 128))
    yield "ViT-L/16, bf16 batch 64, exact plan", lambda: whole(*gpu_models.vit())
    yield "ViT-L/16, bf16 batch 64, plan within a drift of 0.1", lambda: whole(*gpu_models.vit(), drift=0.1)
    yield "BERT-base, bf16 batch 32 x 512, exact plan", lambda: whole(*gpu_models.bert())
    yield "Llama 1B prefill, bf16 1 x 2048, exact plan", lambda: whole(*gpu_models.llama_prefill())
    yield "Llama 1B decode, bf16 batch 8 after 1023, exact plan", lambda: whole(*gpu_models.llama_decode())


def graphed(model: torch.nn.Module, inputs: tuple[Any, ...]) -> float:
    """The time of the exact plan's kernels, launched one by one, over that of a replay of them."""
    import paretorch

    result = paretorch.optimize(model, inputs, target="cuda")
    plain, replayed, reasons = forms(result.session)
    ratio = seconds(plain) / seconds(replayed)
    if reasons:
        raise RuntimeError(reasons[0])
    return ratio


def forms(session: Any) -> tuple[Callable[[], object], Callable[[], object], list[str]]:
    """(a call of a session's exact graph on the Triton runtime, the same as a CUDA graph, why the latter is no replay, if so)."""
    from paretorch.codegen.cuda_graphs import Replayed
    from paretorch.codegen.triton_runtime import TritonRuntime

    runtime, example = TritonRuntime(lambda graph: session.fusion.plan(graph).priced, session.tuner), session.program.example
    execute = runtime.compile(session.exact, example)
    replayed = Replayed(execute)
    replayed(*example)
    return lambda: execute(*example), lambda: replayed(*example), replayed.reasons


def whole(model: torch.nn.Module, inputs: tuple[Any, ...], drift: float | None = None) -> float:
    import paretorch

    budget = paretorch.Budget(drift=drift) if drift is not None else None
    data = [tuple(torch.randn_like(x) if x.is_floating_point() else x for x in inputs) for _ in range(8)] if drift is not None else None
    ours = paretorch.optimize(model, inputs, target="cuda", budget=budget, data=data)
    peer = torch.compile(model, mode="max-autotune")
    with torch.no_grad():
        return seconds(lambda: peer(*inputs)) / seconds(lambda: ours(*inputs))


def measured(rows: Iterator[tuple[str, Callable[[], float]]], began: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, measure in rows:
        if time.monotonic() - began > LIMIT_S:
            found[name] = f"*not measured*: {LIMIT_S:.0f} s were over"
            continue
        try:
            found[name] = measure()
        except Exception as error:  # the row says what failed, and the others are measured all the same
            found[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        torch.cuda.empty_cache()
        print(f"{name}: {found[name]}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", action="store_true", help="leave whole models out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 1
    began, limits = time.monotonic(), ceilings()
    ratios = measured(kernels(limits["copy_bytes_per_s"]), began)
    if not options.kernels:
        ratios |= measured(models(), began)
    assert set(ratios) <= {goal.name for goal in GOALS}
    about = {"device": torch.cuda.get_device_name(), "date": date.today().isoformat(), "torch": torch.__version__}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu.json").write_text(json.dumps({**about, "ceilings": limits, "ratios": ratios}, indent=1) + "\n")
    write_summary(RESULTS)
    print("\n".join(table(ratios)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
