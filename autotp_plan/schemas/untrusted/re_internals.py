"""The parse tree of Python's `re`, which has no public name.

`tests/schemas/untrusted/test_patterns.py` compares what is made of it with `re` itself, on patterns of every kind.
"""

from __future__ import annotations

import sys
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as constants  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as constants
    import sre_parse as parser

sre: Any = constants
"""Names of the operations in a tree."""


def parse(pattern: str) -> Any:
    """The tree of a pattern: `(operation, value)` one after the other. Raises re.error."""
    return parser.parse(pattern)
