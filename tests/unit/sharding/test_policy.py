"""Placement patterns: tactics of modules, and invalid patterns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.errors import ConfigError
from jaxinfer.sharding.policy import EXPERTS, REPLICATE, SHARD, TACTICS, Placement, any_layer

MODULES = ["embedding", "layers", "layers.0", "layers.0.attention", "layers.0.mlp", "layers.1", "layers.1.mlp", "norm"]
INSIDE = ["layers.0.attention.qkv", "layers.0.mlp.down"]


@pytest.mark.parametrize(
    ("patterns", "replicated"),
    [
        ({}, []),
        ({"*": "shard"}, []),
        ({"*": "replicate"}, MODULES),
        ({"*.mlp": "replicate"}, ["layers.0.mlp", "layers.1.mlp"]),
        ({"layers.0": "replicate"}, ["layers.0", "layers.0.attention", "layers.0.mlp"]),
        ({"layers.?.mlp": "replicate", "layers.1": "shard"}, ["layers.0.mlp", "layers.1.mlp"]),
        ({"layers": "replicate", "*.mlp": "shard"}, ["layers", "layers.0", "layers.0.attention", "layers.1"]),
        ({"layers.[1-9]*": "replicate"}, ["layers.1", "layers.1.mlp"]),
        ({"norm": "replicate", "n*": "replicate"}, ["norm"]),
    ],
)
def test_a_pattern_is_for_all_within_unless_another_names_a_module_further_inside(patterns, replicated):
    placement = Placement(patterns)
    placement.check(MODULES, INSIDE)
    assert [path for path in MODULES if placement.tactic(path) == REPLICATE] == replicated


names = st.sampled_from(["a", "b", "0", "1", "mlp"])
paths = st.lists(names, min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(paths, st.sampled_from(TACTICS)), paths)
def test_the_innermost_matching_path_decides(patterns, path):
    around = [pattern for pattern in patterns if path == pattern or path.startswith(f"{pattern}.")]
    expected = patterns[max(around, key=len)] if around else SHARD
    assert Placement(patterns).tactic(path) == expected


@given(st.permutations([("layers", "replicate"), ("*.mlp", "shard"), ("layers.0.*", "shard"), ("norm", "replicate")]))
def test_the_order_of_patterns_does_not_matter(patterns):
    same = Placement(dict(sorted(patterns)))
    assert [Placement(dict(patterns)).tactic(path) for path in MODULES] == [same.tactic(path) for path in MODULES]


def test_contradicting_patterns_for_one_module_are_both_named():
    with pytest.raises(
        ConfigError, match=r"'layers.0.mlp' is matched by '\*.mlp' \(shard\) and by 'layers.0.\*' \(replicate"
    ):
        Placement({"*.mlp": "shard", "layers.0.*": "replicate"}).tactic("layers.0.mlp")


def test_a_pattern_without_a_match_is_refused_with_the_modules():
    with pytest.raises(ConfigError, match=r"'\*.mpl' matches no module; modules: .*layers.\*.mlp, norm"):
        Placement({"*.mpl": "shard"}).check(MODULES, INSIDE)


def test_a_pattern_for_part_of_a_whole_module_is_refused_with_that_module():
    with pytest.raises(ConfigError, match="'layers.0.mlp.down', which is part of .* match 'layers.0.mlp' instead"):
        Placement({"*.down": "replicate"}).check(MODULES, INSIDE)


@pytest.mark.parametrize("pattern", ["*", "layers", "layers.1", "*.mlp", "layers.1.mlp"])
def test_the_experts_tactic_may_match_an_enclosing_module(pattern: str):
    placement = Placement({pattern: "experts"})
    placement.check(MODULES, INSIDE, ["layers.1.mlp"])
    assert placement.tactic("layers.1.mlp") == EXPERTS


@pytest.mark.parametrize("pattern", ["norm", "layers.0", "*.attention"])
def test_the_experts_tactic_is_refused_for_modules_without_experts(pattern: str):
    with pytest.raises(
        ConfigError,
        match=r"is given 'experts', but matches no module with experts; modules with experts: layers.\*.mlp",
    ):
        Placement({pattern: "experts"}).check(MODULES, INSIDE, ["layers.1.mlp"])
    with pytest.raises(ConfigError, match="this model has none, use 'shard'"):
        Placement({pattern: "experts"}).check(MODULES, INSIDE)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"*.mlp": "sharded"}, r"the tactic of '\*.mlp' is 'sharded'; supported: shard, replicate"),
        ({"": "shard"}, "a pattern must be a string such as .* got ''"),
    ],
)
def test_a_wrong_pattern_or_tactic_is_named(patterns, message):
    with pytest.raises(ConfigError, match=message):
        Placement(patterns)


def test_a_placement_is_made_from_user_input():
    given = Placement({"norm": "replicate"})
    assert Placement.of(given) is given
    assert Placement.of({"norm": "replicate"}) == given
    assert Placement.of(None) == Placement()


def test_any_layer_replaces_layer_numbers():
    assert any_layer("layers.11.attention") == "layers.*.attention"
    assert any_layer("layers.3") == "layers.*"
    assert any_layer("block2.norm") == "block2.norm"


def test_contradicting_patterns_for_an_enclosing_module_are_refused():
    """`layers.*` matches all layers, so "layers.0" would otherwise be ignored silently."""
    placement = Placement({"layers.*": "replicate", "layers.0": "shard"})
    with pytest.raises(
        ConfigError, match=r"'layers.0' is matched by 'layers.\*' \(replicate\) and by 'layers.0' \(shard\)"
    ):
        placement.check(["layers", "layers.0", "layers.0.mlp", "layers.1", "layers.1.mlp"])
