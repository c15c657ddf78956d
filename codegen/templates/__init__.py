"""Kernel templates, by name."""

from paretorch.codegen.kernel import KernelTemplate
from paretorch.codegen.templates.elementwise import ELEMENTWISE
from paretorch.codegen.templates.long_row import LONG_ROW
from paretorch.codegen.templates.row import ROW

TEMPLATES: dict[str, KernelTemplate] = {template.name: template for template in (ELEMENTWISE, ROW, LONG_ROW)}
