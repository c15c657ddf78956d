"""What measured rates depend on, and where they are kept between calls."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from paretorch.cost_model.curves import Sample
from paretorch.cost_model.devices import cpu_features, cpu_model
from paretorch.cost_model.probes import DISPATCH, GPU_PROBES, PROBES

FORMAT = 2  # raised when what probes compute, or what is kept of them, changes
PACKAGE = {"onnxruntime": "onnxruntime", "openvino": "openvino"}  # the package, beside torch, whose version a runtime's rates depend on


def fingerprint(runtime: str, thorough: bool, place: str) -> dict[str, str]:
    """All that the rates of one runtime depend on; a change of any part makes them void."""
    return {
        "format": f"{FORMAT} {probes_digest()}",
        "runtime": runtime,
        "form": "thorough" if thorough else "quick",
        "processor": cpu_model() if place == "cpu" else torch.cuda.get_device_name(),
        "features": cpu_features() if place == "cpu" else str(torch.version.cuda or torch.version.hip),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "package": _version(PACKAGE[runtime]) if runtime in PACKAGE else "",
    }


@cache
def probes_digest() -> str:
    """Changes with the set of probes and their sizes."""
    rows = [(p.name, p.curve, p.shape, p.rows, p.repeats * p.ops, p.axis, p.narrowed, p.half) for p in (DISPATCH, *PROBES, *GPU_PROBES)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:8]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def cache_folder() -> Path:
    """PARETORCH_CACHE if it is set, else the user's cache folder."""
    own = os.environ.get("PARETORCH_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paretorch"


def path_of(marks: dict[str, str]) -> Path:
    """The file for rates with this fingerprint."""
    digest = hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"calibration-{marks['runtime']}-{digest}.json"


def read(marks: dict[str, str]) -> tuple[Sample, ...] | None:
    """The samples kept for this fingerprint; None if there are none, or the file is damaged or another's."""
    try:
        kept = json.loads(path_of(marks).read_text())
        if kept["fingerprint"] != marks:
            return None
        found = tuple(Sample(**{**row, "at": tuple(float(x) for x in row["at"])}) for row in kept["samples"])
        sound = all(s.seconds > 0 and s.amount >= 0 and s.at and min(s.at) > 0 for s in found)
    except (OSError, ValueError, KeyError, TypeError):  # measured again, and the file is then replaced
        return None
    return found if found and sound else None


def write(marks: dict[str, str], samples: Sequence[Sample], date: str) -> str | None:
    """Keep samples; None, or a sentence if the folder cannot be written."""
    path = path_of(marks)
    text = json.dumps({"fingerprint": marks, "date": date, "samples": [asdict(sample) for sample in samples]}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}")
        half.write_text(text)
        half.replace(path)
    except OSError as error:
        return f"not kept for later calls: {error}"
    return None
