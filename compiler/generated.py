"""The generated kernels of one graph, and their place in a saved result: sources as they were, and which calls of the graph each region holds, by
which template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from paretorch.codegen.kernel import Kernel, Part
from paretorch.codegen.regions import can_compute, region_of
from paretorch.codegen.triton_runtime import Priced, kernels_of
from paretorch.codegen.tuning import Tuner
from paretorch.ir.graph import Graph

MEMBER = "kernels.json"


@dataclass(frozen=True)
class Generated:
    """kernels: one for all regions that differ in names only; regions: of the graph, with what was predicted for each."""

    kernels: tuple[Kernel, ...] = ()
    regions: tuple[Priced, ...] = ()

    @classmethod
    def of(cls, regions: Sequence[Priced], tuner: Tuner | None = None) -> Generated:
        """tuner: chooses the schedules, None for the templates' defaults. Raises LoweringError."""
        return cls(tuple(kernels_of(regions, tuner)[0]), tuple(regions))

    def members(self, graph: Graph) -> dict[str, bytes]:
        """Files of a saved result: each kernel's source, and a list of kernels and regions."""
        sources = {_path(kernel.name): kernel.source.encode() for kernel in self.kernels}
        plain = [{key: value for key, value in asdict(kernel).items() if key != "source"} for kernel in self.kernels]
        places = {node: place for place, node in enumerate(graph.calls)}
        regions = [
            [[places[node] for node in region.nodes if can_compute(node)], predicted, region.template] for region, predicted in self.regions
        ]
        return {**sources, MEMBER: json.dumps({"kernels": plain, "regions": regions}, indent=1).encode()}

    @classmethod
    def from_members(cls, members: dict[str, bytes], graph: Graph) -> Generated:
        """What a result was saved with; nothing if it was saved for a processor."""
        if MEMBER not in members:
            return cls()
        body, calls = json.loads(members[MEMBER]), graph.calls
        kernels = []
        for row in body["kernels"]:
            row["parameters"] = tuple((name, kind) for name, kind in row["parameters"])
            row["parts"] = tuple(
                Part(part["name"], tuple((name, kind) for name, kind in part["parameters"]), part["schedule"]) for part in row["parts"]
            )
            kernels.append(Kernel(source=members[_path(row["name"])].decode(), **row))
        regions = [
            (replace(region_of([calls[place] for place in places]), template=template), tuple(predicted) if predicted is not None else None)
            for places, predicted, template in body["regions"]
        ]
        return cls(tuple(kernels), tuple(regions))


def _path(name: str) -> str:
    return f"kernels/{name}.py"
