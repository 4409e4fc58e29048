"""Recipes as text, as YAML and as a picture; and what is refused, with the reason."""

import math

import pytest

from locum.errors import UserError
from locum.method import from_yaml, names, to_yaml
from locum.paper import find
from locum.reinforce import (
    D3S,
    GAE,
    HAPO,
    HOSTS,
    KL,
    THR,
    TWGRPO,
    Clip,
    CoT2,
    Flat,
    GroupCentred,
    GroupNormalised,
    HAPOClip,
    Informative,
    Overlong,
    Piece,
    Recipe,
    SequenceMean,
    SPOTree,
    TokenMean,
)
from locum.reinforce.recipe import ORDER, of

CATALOGUE = names("reinforce", "Piece")
PAPERS = [name for name in CATALOGUE if find(name, default=None) is not None]
ALONE = [  # pieces that are complete recipes on their host
    name for name in CATALOGUE if name not in ("gae", "batchcentred", "persequence", "spochainadvantage")
]
TEXTS = [
    "grpo",
    "dapo + clip(low=0.1) + d3s",
    "dr_grpo + constant(length=512)",
    "gspo + clip(low=inf, high=inf) + kl(beta=0.01)",
    "ppo + gae(lam=1.0, kl=0.05)",
    "reinforce + flat(group_size=4)",
    "dapo + overlong(max_length=20, cache=4) + informative(max_batches=2)",
    "grpo + d3s(rows=(4, 8), tokens=(0.2, 1.0), scope='group+batch', shares=(2, 8))",
    "dapo + thr(beta=-inf) + twgrpo(divergence='kl')",
    "dapo + haporedistribute + hapoclip(alpha=0.5)",
]


def recipes() -> list[Recipe]:
    return [
        *(Recipe(host) for host in HOSTS),
        *(Recipe.read(name) for name in ALONE),
        *(Recipe.read(text) for text in TEXTS),
        Recipe("dapo", (D3S() | HAPOClip(),)),
        of(SPOTree((3, 2), segment_tokens=30)),
        of(CoT2(mode="dirichlet"), [D3S()]),
    ]


@pytest.mark.parametrize("recipe", recipes(), ids=str)
def test_as_text_and_as_yaml_and_back(recipe: Recipe) -> None:
    assert from_yaml(to_yaml(recipe)) == recipe
    if not any(type(p).__name__ == "Pieces" for p in recipe.pieces):
        assert Recipe.read(str(recipe)) == recipe
        assert str(Recipe.read(str(recipe))) == str(recipe)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_written_as_it_is_read(text: str) -> None:
    assert str(Recipe.read(text)) == text


@pytest.mark.parametrize("name", CATALOGUE)
def test_pieces_are_values(name: str) -> None:
    piece = CATALOGUE[name]()
    assert from_yaml(to_yaml(piece)) == piece
    assert hash(piece) == hash(CATALOGUE[name]())


def test_spaces_and_capitals_and_the_dot_of_a_part_do_not_matter() -> None:
    expected = Recipe("dapo", (HAPOClip(alpha=0.5), D3S()))
    for text in (
        "dapo + hapo.clip(alpha=0.5) + d3s",
        "dapo+HAPOClip( alpha = 0.5 )+D3S",
        " dapo  +hapoclip(alpha=.5)+ d3s()",
    ):
        assert Recipe.read(text) == expected


def test_a_plus_in_quotes_or_brackets_is_no_plus() -> None:
    assert Recipe.read("grpo + d3s(scope='group+batch')").pieces == (D3S(scope="group+batch"),)
    assert Recipe.read('grpo + d3s(scope="group+batch")').pieces == (D3S(scope="group+batch"),)


def test_infinity_can_be_written() -> None:
    assert Recipe.read("grpo + thr(beta=-inf)").pieces == (THR(beta=-math.inf),)
    assert Recipe.read("grpo + clip(low=inf)").clip == Clip(low=math.inf)


# Papers on their hosts.


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_name_is_its_recipe(name: str) -> None:
    piece = CATALOGUE[name]()
    recipe = Recipe.read(name)
    assert recipe == of(piece)
    assert recipe.host == piece.host
    assert set(piece.stages()) <= set(recipe.stages)
    taken = {stage.slot for stage in piece.stages() if stage.single}
    assert {s for s in piece.setting if s.slot not in taken} <= set(recipe.stages)


def test_what_a_paper_sets_gives_way_to_other_pieces() -> None:
    assert Recipe.read("thr").clip == Clip(0.2, 0.2)
    assert Recipe.read("thr + clip(high=0.28)").clip == Clip(0.2, 0.28)
    assert Recipe.read("thr + clip(high=0.28)").aggregate == TokenMean(denominator="all")
    assert Recipe.read("dapo + thr").clip == Clip(0.2, 0.28)  # behind a baseline it sets nothing


def test_pieces_by_a_bar() -> None:
    both = TWGRPO() | D3S()
    assert both.items == (TWGRPO(), D3S())
    assert (both | HAPOClip()).items == (TWGRPO(), D3S(), HAPOClip())
    assert (HAPOClip() | both).items == (HAPOClip(), TWGRPO(), D3S())
    assert both.stages() == (TWGRPO(), D3S())
    assert of(both) == of(TWGRPO(), [D3S()]) == Recipe.read("twgrpo + d3s")
    assert (HAPO() | D3S()).setting == HAPO().setting
    assert of(HAPO() | D3S()) == Recipe.read("hapo + d3s")
    assert of(HAPO() | D3S()).host == "dapo"


def test_recipes_by_a_bar() -> None:
    assert Recipe("dapo") | D3S() | KL() == Recipe("dapo", (D3S(), KL()))
    assert Recipe("dapo") | (D3S() | KL()) == Recipe("dapo", (D3S(), KL()))
    assert Recipe("grpo", (D3S(),)) | Recipe("dapo", (KL(),)) == Recipe("dapo", (D3S(), KL()))
    with pytest.raises(UserError, match="one baseline, not both dapo and gspo"):
        Recipe("dapo") | Recipe("gspo")


# What is refused.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grop", "unknown piece of a recipe 'grop': did you mean 'grpo'?"),
        ("grpo + d3", "unknown piece of a recipe 'd3': did you mean 'd3s'?"),
        ("grpo + hapo.clipp(alpha=1)", "unknown piece of a recipe 'hapo.clipp': did you mean 'hapoclip'?"),
        ("grpo + d3s(row=(2, 4))", "unknown field of D3S 'row': did you mean 'rows'?"),
        ("grpo + dapo", "the baseline dapo comes first in a recipe, not behind other terms"),
        ("d3s + grpo", "the baseline grpo comes first in a recipe, not behind other terms"),
        ("", "a recipe begins with a baseline or a paper"),
        ("+ d3s", "a recipe begins with a baseline or a paper"),
        ("grpo +", "cannot read ''"),
        ("grpo + d3s)", "cannot read 'd3s)'"),
        ("grpo + d3s(rows=)", "cannot read the settings of 'd3s(rows=)'"),
        ("grpo + d3s(rows=print(1))", "they must be plain values"),
        ("grpo + d3s(rows=x)", "they must be plain values"),
        ("grpo + clip(0.1)", "write the settings of clip by name, like clip(low=...)"),
        ("grpo + clip(low=-1)", "Clip.low must be >= 0, got -1"),
        ("grpo + d3s(tokens=(0.5, 1.5))", "D3S.tokens must be two shares in (0, 1], got (0.5, 1.5)"),
        ("grpo + hapo(tau=-1.0)", "tau must be finite and >= 0, got -1.0"),
        ("grpo + kl + kl", "both kl and kl bring one"),
        ("grpo + clip + clip", "a recipe has one clip stage, and both clip and clip bring one"),
        ("hapo + groupcentred", "one advantage stage, and both hapo and groupcentred bring one"),
        ("hapo + hapo.clip", "HAPOClip is in this recipe twice"),
        ("spochain + spotree", "a recipe has one sample stage, and both spochain and spotree bring one"),
        ("grpo + flat(group_size=1)", "GroupNormalised compares the completions of a prompt, and Flat.group_size is 1"),
        ("ppo + informative", "Informative compares the completions of a prompt"),
        ("gdpo + d3s", "D3S needs 'entropy', which neither ELBO nor Flat can tell"),
        ("grpo + spochainadvantage", "SPOChainAdvantage needs 'cut', which neither Autoregressive nor Flat can tell"),
        ("spochain + overlong", "SPOChainSample values states by the rewards of texts"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as found:
        Recipe.read(text)
    assert message in str(found.value)


def test_an_unknown_baseline() -> None:
    with pytest.raises(UserError, match="unknown baseline 'gspoo': did you mean 'gspo'"):
        Recipe("gspoo")


def test_the_reason_says_what_to_do_about_two_stages_in_one_slot() -> None:
    with pytest.raises(UserError, match="leave one of them out, or take single parts of it"):
        Recipe.read("hapo + spotreeadvantage")


def test_slots_that_hold_several() -> None:
    recipe = Recipe.read("dapo + thr + d3s + twgrpo + overlong + hapo.clip + hapo.redistribute")
    assert [type(s).__name__ for s in recipe.stages if s.slot == "weigh"] == ["THR", "D3S", "TWGRPO"]
    assert [type(s).__name__ for s in recipe.stages if s.slot == "adapt"] == ["HAPOClip", "HAPORedistribute"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: locum.reinforce.recipe.Recipe\nhost: grpoo\n", "unknown baseline 'grpoo'"),
        ("method: locum.reinforce.recipe.Recipe\nhsot: grpo\n", "unknown field of Recipe 'hsot': did you mean 'host'?"),
        ("method: reinforce.d3\n", "unknown method of reinforce 'd3'"),
        ("method: reinforce.d3s\ntokens: [0.5, 2.0]\n", "D3S.tokens must be"),
        ("[1, 2]", "a method in YAML is a mapping"),
    ],
)
def test_bad_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as found:
        from_yaml(text)
    assert message in str(found.value)


# The pipeline.


@pytest.mark.parametrize("recipe", recipes(), ids=str)
def test_the_pipeline_lists_every_stage_once_and_in_order(recipe: Recipe) -> None:
    drawn, slots = recipe.pipeline(), list(ORDER.values())
    assert len(drawn) == len(recipe.stages)
    assert [slots.index(d["slot"]) for d in drawn] == sorted(slots.index(d["slot"]) for d in drawn)
    for slot in ("likelihood", "sample", "advantage", "ratio", "clip", "aggregate"):
        assert sum(d["slot"] == slot for d in drawn) == 1
    each = [d["each"] for d in drawn]
    assert each == sorted(each)  # what is done once a batch comes before what is done in every minibatch
    assert {d["each"] for d in drawn if d["slot"] in ("adapt", "ratio", "clip", "aggregate", "penalty")} == {
        "minibatch"
    }


def test_the_pipeline_says_where_a_stage_comes_from() -> None:
    drawn = {d["stage"]: d["from"] for d in Recipe.read("hapo + d3s(tokens=(0.2, 1.0))").pipeline()}
    assert drawn["hapoclip"] == drawn["hapoadvantage"] == drawn["hapotemperature"] == "hapo"
    assert drawn["d3s(tokens=(0.2, 1.0))"] == "d3s"
    assert drawn["tokenmean"] == drawn["informative"] == "dapo"


def test_hosts_by_their_stages() -> None:
    for host in HOSTS:
        assert Recipe(host).host == host
    assert Recipe("grpo").filter is None
    assert Recipe("dapo").filter == Informative()
    assert Recipe("grpo").aggregate == SequenceMean()
    assert Recipe("dr_grpo").advantage == GroupCentred()
    assert Recipe("ppo").advantage == GAE()
    assert Recipe("ppo").sample == Flat(1)
    assert Recipe("grpo", (GroupNormalised(ddof=0), Flat(4), Overlong(9, 3))).sample == Flat(4)


def test_what_is_needed_is_the_union() -> None:
    assert Recipe("grpo").needs == frozenset()
    assert Recipe.read("dapo + d3s + kl + thr").needs == {"entropy", "ref_logp", "scores"}
    assert Recipe("ppo").live == {"value"}
    assert Recipe.read("dapo + hapo.clip(stats='minibatch')").live == {"entropy"}
    assert Recipe.read("dapo + hapo.clip(alpha=0.0)").needs == frozenset()


def test_recipes_are_values() -> None:
    one, other = Recipe.read("dapo + d3s"), Recipe("dapo", (D3S(),))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Recipe.read("dapo + d3s(per='row')")
    assert isinstance(D3S(), Piece)
