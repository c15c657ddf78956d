"""The templates of whole ops, by name."""

from paretorch.codegen.attention import ATTENTION
from paretorch.codegen.kernel import Region
from paretorch.codegen.match_tokens import MATCH_TOKENS
from paretorch.codegen.product_file import PRODUCTS
from paretorch.codegen.split_product import SPLIT_PRODUCTS
from paretorch.codegen.whole_op import WholeOp, own_node

WHOLE_OPS: dict[str, WholeOp] = {template.name: template for template in (ATTENTION, MATCH_TOKENS, PRODUCTS, SPLIT_PRODUCTS)}


def not_taken(region: Region) -> str | None:
    """None, or why the template of a region's whole op does not take it."""
    template = WHOLE_OPS[region.template]
    if not region.writes:
        return "nobody uses its values"
    return template.refuses(own_node(region)) if template.joins is None else template.joins(region)
