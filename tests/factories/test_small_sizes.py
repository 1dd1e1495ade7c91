"""What the arguments of a function count, found out by trying, and small values for them."""

from __future__ import annotations

from autotp_plan.factories.module_factory import ModuleFactory
from autotp_plan.factories.small_sizes import roles_of

OWN = "tests.helpers.own_models"


def test_what_each_argument_counts() -> None:
    roles = roles_of(ModuleFactory(name=f"{OWN}:Nano", arguments={"n_layer": 12}), {})
    assert roles.widths == ("n_embd",) and roles.heads == ("n_head",) and roles.kv_heads == ()
    assert roles.layers == {"n_layer": 2} and roles.words == ("vocab_size",) and roles.lengths == ("block_size",)
    roles = roles_of(ModuleFactory(name=f"{OWN}:gated"), {})
    assert roles.widths == ("dim", "ffn_dim") and roles.kv_heads == ("n_kv_heads",)
    assert roles.layers == {"depth": 2}


def test_divided_widths_keep_the_heads() -> None:
    roles = roles_of(ModuleFactory(name=f"{OWN}:gated", arguments={"dim": 4096, "n_heads": 32, "ffn_dim": 11008}), {})
    found = dict(roles.divided())
    assert list(found) == sorted(found, reverse=True) and found[1]["dim"] == 4096
    assert all(changes["dim"] % (4 * 32) == 0 for changes in found.values())
    assert found[max(found)] == {"depth": 2, "vocab_size": 256, "dim": 128, "ffn_dim": 344}


def test_pairs_tell_sizes_apart() -> None:
    roles = roles_of(ModuleFactory(name=f"{OWN}:gated"), {})
    for first, second in (({**roles.values, **one}, {**roles.values, **other}) for one, other in roles.pairs()):
        assert all(first[key] != second[key] for key in ("dim", "ffn_dim", "n_heads"))
        assert first["dim"] % first["n_heads"] == 0 == second["dim"] % second["n_heads"]
    first, second = next(iter(roles.pairs()))
    assert first["dim"] != first["ffn_dim"] and first["n_kv_heads"] == 2 and second["n_kv_heads"] == 3
