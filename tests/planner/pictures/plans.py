"""Plans that no compiler made: to draw names of strangers, and very much of everything."""

from __future__ import annotations

from autotp_plan.schemas.layout import Layout, SubParameter
from autotp_plan.schemas.plan.document import ModelIdentity, Parameter, Plan
from autotp_plan.schemas.plan.rule_ref import RuleRef

HOSTILE = (
    "<script>document.documentElement.dataset.pwned = 1</script>",
    '"><img src=x onerror="document.documentElement.dataset.pwned = 2">',
    "'><svg onload=document.documentElement.dataset.pwned=3>",
    "</title></style></script><script>document.documentElement.dataset.pwned = 4</script>",
    "]]><!--",
    "&lt;b&gt;",
    "javascript:document.documentElement.dataset.pwned=5",
    "\x1b[31m\u202etxet\x00\ufffe",
    "a" * 5000,
)


def layout(rows: int, columns: int, tp_size: int) -> Layout:
    """An even layout of rows."""
    each = rows // tp_size
    return Layout(
        shape=(rows, columns),
        dim=0,
        sub_parameters=(SubParameter(size=rows, unit=1),),
        intervals=tuple(((rank * each, rank * each + each),) for rank in range(tp_size)),
    )


def plan(names: tuple[str, ...], tp_size: int = 2, architecture: str = "Model", rule: str = "preset x #1") -> Plan:
    """A plan of column-parallel weights of these names."""
    return Plan(
        model=ModelIdentity(model_type="x", architecture=architecture, config=None, inventory="sha256:" + "0" * 64),
        tp_size=tp_size,
        layouts={"one": layout(64 * tp_size, 64, tp_size)},
        parameters=tuple(
            Parameter(name=name, layout="one", dtype="BF16", style="column", rule=RuleRef.from_value(rule))
            for name in names
        ),
    )
