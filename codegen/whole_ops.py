"""The templates of whole ops, by name."""

from paretorch.codegen.attention import ATTENTION
from paretorch.codegen.match_tokens import MATCH_TOKENS
from paretorch.codegen.whole_op import WholeOp

WHOLE_OPS: dict[str, WholeOp] = {template.name: template for template in (ATTENTION, MATCH_TOKENS)}
