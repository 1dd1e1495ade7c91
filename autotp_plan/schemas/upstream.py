"""Names that other packages do not promise to keep, and the error when one of them has moved.

Only files called `*internals.py` say such names; each looks them up here when it needs them, so that a new version of
the package ends in a sentence and not in a wrong result. `tests/**/test_canaries.py` looks up all of them at once.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autotp_plan.schemas.errors import Fault, MissingDependencyError

_MISSING = object()


def private(owner: Any, name: str, package: str, used_for: str) -> Any:
    """`owner.name`, an attribute that is private to `package`.

    Args:
        owner: a module, class or object of the package.
        name: the attribute.
        package: the distribution, such as `deepspeed`.
        used_for: what this project needs it for, in words that follow "for".

    Raises:
        MissingDependencyError: the installed version of the package has no such attribute.
    """
    found = getattr(owner, name, _MISSING)
    if found is _MISSING:
        raise moved(package, f"{_title(owner)}.{name}", "no such attribute", f"the attribute, for {used_for}")
    return found


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While active, `owner.name` is `value`; afterwards it is what it was before.

    Args:
        owner: a module, class or object that has the attribute, itself or through its class.
        name: the attribute.
        value: what it is meanwhile.
    """
    is_own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def moved(package: str, where: str, got: str, expected: str) -> MissingDependencyError:
    """The error for a package that is not (any more) as this project needs it; it names the installed version."""
    return MissingDependencyError(
        Fault(
            code="upstream-changed",
            what=f"{package} {version(package)} is not as autotp-plan needs it",
            where=where,
            got=got,
            expected=expected,
            next=f"install a version of {package} that autotp-plan was tried with: pip install 'autotp-plan[train]'",
        )
    )


def version(package: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(of an unknown version)"


def _title(owner: Any) -> str:
    own_name = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None)
    if own_name is None:
        own_name = type(owner).__qualname__
        owner = type(owner)
    module = getattr(owner, "__module__", None)
    return f"{module}.{own_name}" if module else str(own_name)
