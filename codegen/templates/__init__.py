"""Kernel templates, by name."""

from paretorch.codegen.kernel import KernelTemplate
from paretorch.codegen.templates.elementwise import ELEMENTWISE
from paretorch.codegen.templates.row_norm import LAYER_NORM, RMS_NORM

TEMPLATES: dict[str, KernelTemplate] = {template.name: template for template in (ELEMENTWISE, LAYER_NORM, RMS_NORM)}
