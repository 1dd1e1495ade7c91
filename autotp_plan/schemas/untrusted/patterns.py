"""Regular expressions that a stranger wrote, matched in a time that is linear in the name.

Python's `re` tries the ways to match one after the other, and `(a+)+b` has more of them than there is time. A pattern
with few ways is left to `re`. For any other the same parse tree is run as an automaton, which reads each character once
(Thompson, "Regular expression search algorithm", 1968): it answers whether a name matches from its beginning, and that
is all that rules ask. Both give the same answer. What an automaton cannot do (a backreference, a lookaround in the
middle) is refused where `re` would have too many ways. The package `regex` has a time limit, and takes all memory for
`((a{999}){999}){999}`; RE2 reads `$` and `\\d` in another way than `re`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from autotp_plan.schemas.untrusted.re_internals import parse, sre

FEW_WAYS = 1 << 18
"""Ways to match a name of `SHORT` characters that are tried one after the other."""
SHORT = 128
MAX_PATTERN = 100_000
"""Characters of a pattern."""
_MAX_STATES = 20_000
_MAX_REMEMBERED = 100_000
_MAX_STEPS = 3_000_000
"""States that an automaton looks at before it is given up; what is remembered is not looked at again."""
_PLAIN_FLAGS = re.UNICODE | re.VERBOSE


class SlowPatternError(ValueError):
    """A pattern may take without end. The message says what in it; the caller knows where."""


class BoundedPattern:
    """A regular expression that matches in bounded time.

    Raises:
        re.error: as `re.compile`, also OverflowError and RecursionError.
        SlowPatternError: it has too many ways to match, and what an automaton cannot do.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN:
            raise SlowPatternError(f"{len(pattern)} characters")
        self.pattern = pattern
        self._compiled = re.compile(pattern)
        self._tree: Any = parse(pattern)
        self._few = _ways(self._tree, SHORT) <= FEW_WAYS
        self._repeats = _ways(self._tree, SHORT) > _ways(self._tree, 1)
        self._automata: list[tuple[bool, _Automaton]] | None = None
        if not self._few:
            self._automata = _automata(self._tree, self._compiled.flags)

    @property
    def weight(self) -> int:
        """What matching a name costs, in about a microsecond."""
        return (1 if self._few else 10) + len(self.pattern) // 100

    def match(self, name: str) -> bool:
        """Whether a name matches from its beginning, as `re.match` says.

        Raises:
            SlowPatternError: it takes too many steps; or a name of more than `SHORT` characters, and what an automaton
            cannot do.
        """
        if self._few and (len(name) <= SHORT or not self._repeats):
            return self._compiled.match(name) is not None
        if self._automata is None:
            self._automata = _automata(self._tree, self._compiled.flags)
        return all(automaton.matches(name) is wanted for wanted, automaton in self._automata)


def _ways(tree: Any, length: int) -> float:
    """At most how many ways a part of a pattern has to match the beginning of `length` characters."""
    found = 1.0
    for operation, value in tree:
        found *= _ways_of(operation, value, length)
        if found > FEW_WAYS:
            return float("inf")
    return found


def _ways_of(operation: Any, value: Any, length: int) -> float:
    if operation is sre.BRANCH:
        return sum(_ways(branch, length) for branch in value[1])
    if operation is sre.SUBPATTERN:
        return _ways(value[-1], length)
    if operation in _REPEATS:
        least, most, body = value
        ways = _ways(body, length)
        most = min(most, max(length, least))
        if ways > 1 and most > 1:
            return float("inf") if most * (ways - 1) > 64 else ways**most * (most - least + 1)
        return float((most - least + 1) * ways)
    if operation in (sre.ASSERT, sre.ASSERT_NOT):
        return _ways(value[1], length)
    if operation is sre.GROUPREF_EXISTS:
        return float("inf")
    if operation in _ATOMIC:
        return _ways(value, length)
    return 1.0


_REPEATS = [sre.MAX_REPEAT, sre.MIN_REPEAT] + [getattr(sre, n) for n in ("POSSESSIVE_REPEAT",) if hasattr(sre, n)]
_ATOMIC = [getattr(sre, name) for name in ("ATOMIC_GROUP",) if hasattr(sre, name)]


def _automata(tree: Any, flags: int) -> list[tuple[bool, _Automaton]]:
    """The automaton of a pattern, and before it those of its first lookaheads, with whether each must match."""
    if flags & ~_PLAIN_FLAGS:
        raise SlowPatternError("flags such as (?i)")
    parts = list(tree)
    found: list[tuple[bool, _Automaton]] = []
    while parts and parts[0][0] in (sre.ASSERT, sre.ASSERT_NOT) and parts[0][1][0] == 1:
        operation, (_, body) = parts.pop(0)
        found.append((operation is sre.ASSERT, _Automaton(body)))
    return [*found, (True, _Automaton(parts))]


Test = Callable[[str], bool]


@dataclass(slots=True)
class _State:
    """One of an automaton: it reads a character, or stands at a place, or leads on at once; `next` are states."""

    test: Test | None = None
    place: Any = None
    next: tuple[int, ...] = ()


class _Automaton:
    """A nondeterministic automaton; the sets of states that names lead to are remembered."""

    def __init__(self, tree: Iterable[tuple[Any, Any]]) -> None:
        self._states = [_State()]  # the one that accepts
        self._start = self._sequence(list(tree), 0)
        self._places = {state.place for state in self._states if state.place is not None}
        self._after: dict[Any, frozenset[int]] = {}
        self._steps = 0

    def matches(self, name: str) -> bool:
        """Whether the automaton accepts a beginning of a name."""
        current = self._step(frozenset({self._start}), "", name, 0)
        for at, character in enumerate(name):
            if 0 in current or not current:
                return 0 in current
            current = self._step(current, character, name, at + 1)
        return 0 in current

    def _step(self, current: frozenset[int], character: str, name: str, at: int) -> frozenset[int]:
        """The states after a character, where `at` characters of the name are read; `""` reads none."""
        stands = frozenset(place for place in self._places if _stands(place, name, at))
        key = (current, character, stands)
        found = self._after.get(key)
        if found is None:
            read = self._read(current, character) if character else current
            found = self._reached(read, stands)
            self._steps += len(current) + len(found)
            if self._steps > _MAX_STEPS:
                raise SlowPatternError(f"more than {_MAX_STEPS} steps for the names that it is to match")
            if len(self._after) >= _MAX_REMEMBERED:
                self._after.clear()
            self._after[key] = found
        return found

    def _read(self, current: frozenset[int], character: str) -> set[int]:
        states = (self._states[number] for number in current)
        return {one for state in states if state.test and state.test(character) for one in state.next}

    def _reached(self, numbers: Iterable[int], stands: frozenset[Any]) -> frozenset[int]:
        """The states that are reached without reading, at a place where `stands` are."""
        found: set[int] = set()
        pending = list(numbers)
        while pending:
            number = pending.pop()
            if number in found:
                continue
            found.add(number)
            state = self._states[number]
            if state.test is None and (state.place is None or state.place in stands):
                pending += state.next
        return frozenset(found)

    def _add(self, state: _State) -> int:
        if len(self._states) >= _MAX_STATES:
            raise SlowPatternError(f"more than {_MAX_STATES} places: large numbers in braces")
        self._states.append(state)
        return len(self._states) - 1

    def _sequence(self, parts: Sequence[tuple[Any, Any]], then: int) -> int:
        """The state at which a part of a pattern begins that is followed by the state `then`."""
        for operation, value in reversed(parts):
            then = self._part(operation, value, then)
        return then

    def _part(self, operation: Any, value: Any, then: int) -> int:
        if operation is sre.BRANCH:
            return self._add(_State(next=tuple(self._sequence(list(branch), then) for branch in value[1])))
        if operation is sre.SUBPATTERN:
            if value[1] or value[2]:
                raise SlowPatternError("flags such as (?i:...)")
            return self._sequence(list(value[-1]), then)
        if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, body = value
            return self._repeat(least, most, body, then)
        if operation is sre.AT:
            return self._add(_State(place=value, next=(then,)))
        test = _test(operation, value)
        if test is None:
            raise SlowPatternError("a backreference, a lookaround after the beginning, or an atomic group")
        return self._add(_State(test=test, next=(then,)))

    def _repeat(self, least: int, most: int, body: Any, then: int) -> int:
        parts = list(body)
        if most is sre.MAXREPEAT:
            loop = self._add(_State())
            self._states[loop].next = (self._sequence(parts, loop), then)
            then = loop
        else:
            end = then
            for _ in range(most - least):
                then = self._add(_State(next=(self._sequence(parts, then), end)))
        for _ in range(least):
            then = self._sequence(parts, then)
        return then


def _test(operation: Any, value: Any) -> Test | None:
    """What a character must be; None for an operation that reads no single one."""
    if operation is sre.LITERAL:
        return chr(value).__eq__
    if operation is sre.NOT_LITERAL:
        return chr(value).__ne__
    if operation is sre.ANY:
        return "\n".__ne__
    if operation is sre.CATEGORY:
        return _CATEGORIES[value]
    if operation is sre.RANGE:
        first, last = map(chr, value)
        return lambda character: first <= character <= last
    if operation is sre.IN:
        members = [test for one, of in value if one is not sre.NEGATE and (test := _test(one, of)) is not None]
        wanted = value[0][0] is not sre.NEGATE
        return lambda character: any(test(character) for test in members) is wanted
    return None


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _is_digit(character: str) -> bool:
    return character.isdecimal()


_CATEGORIES: dict[Any, Test] = {
    sre.CATEGORY_DIGIT: _is_digit,
    sre.CATEGORY_NOT_DIGIT: lambda character: not _is_digit(character),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda character: not character.isspace(),
    sre.CATEGORY_WORD: _is_word,
    sre.CATEGORY_NOT_WORD: lambda character: not _is_word(character),
}


def _stands(place: Any, name: str, at: int) -> bool:
    """Whether a place such as `$` is where `at` characters of a name are read."""
    if place in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
        return at == 0
    if place is sre.AT_END:
        return at == len(name) or (at == len(name) - 1 and name[at] == "\n")
    if place is sre.AT_END_STRING:
        return at == len(name)
    if not name:  # of an empty name before Python 3.14, both are wrong
        return place is sre.AT_NON_BOUNDARY and re.match(r"\B", "") is not None
    before, after = (_is_word(one) for one in _around(name, at))
    return (before is not after) is (place is sre.AT_BOUNDARY)


def _around(name: str, at: int) -> Iterator[str]:
    yield name[at - 1] if at else " "
    yield name[at] if at < len(name) else " "
