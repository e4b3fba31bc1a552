"""The plan file: strict to read, pleasant to edit, and composable."""

import json
import re

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan, TowerPlan, check_period, compose

# No deadline: the time of a single example says nothing on a busy machine.
property_test = settings(deadline=None, max_examples=50)

COUPLED = (("vlm", "action"),)


def pi0_plan(keep=(0, 2, 3), depth=4):
    tower = TowerPlan(depth, tuple(keep))
    return PrunePlan(
        "pi0", {"vlm": tower, "action": tower}, COUPLED, "clp", {"vlm+action": {"scores": [None, 0.5]}}, "why"
    )


def edited(**changes):
    """The JSON of a good plan with one slip."""
    return pi0_plan().to_json() | changes


@st.composite
def keeps(draw, depth):
    return tuple(sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1))))


@st.composite
def plan_chains(draw, length):
    """Depth and kept blocks by tower of plans that follow each other; a plan may leave a tower unnamed.

    Plain data: beartype, which checks what is built from it, draws random items, and strategies must not.
    """
    depths = {"vlm": draw(st.integers(1, 8)), "vision": draw(st.integers(1, 8))}
    chain = []
    for _ in range(length):
        named = draw(st.sets(st.sampled_from(sorted(depths))))
        towers = {name: (depths[name], draw(keeps(depths[name]))) for name in sorted(named)}
        depths |= {name: len(keep) for name, (_, keep) in towers.items()}
        chain.append(towers)
    return chain


def plans(chain):
    return [PrunePlan("pi0", {name: TowerPlan(*tower) for name, tower in towers.items()}) for towers in chain]


def test_of_keeps_every_block_of_towers_not_named():
    plan = PrunePlan.of("pi0", {"vision": 2, "vlm": 3}, {"vlm": [1]})
    assert plan.towers["vision"].keep == (0, 1)
    assert plan.removed("vlm") == (0, 2)
    assert plan.removed("action") == ()
    assert PrunePlan.of("pi0", {"vision": 2}).is_identity
    assert not plan.is_identity


def test_of_rejects_an_unknown_tower():
    with pytest.raises(InputError, match="no tower 'vllm'; its towers are 'vlm'"):
        PrunePlan.of("pi0", {"vlm": 2}, {"vllm": [0]})


def test_save_and_load_are_inverse(tmp_path):
    path = tmp_path / "plan.json"
    pi0_plan().save(path)
    assert PrunePlan.load(path) == pi0_plan()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_saved_plan_has_index_lists_on_one_line(tmp_path):
    pi0_plan().save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert '      "keep": [0, 2, 3]' in lines
    assert '  "coupled": [["vlm", "action"]],' in lines
    assert '  "schema": 1,' in lines


def test_edited_keep_is_what_is_read(tmp_path):
    path = tmp_path / "plan.json"
    pi0_plan().save(path)
    path.write_text(path.read_text().replace("[0, 2, 3]", "[0, 3]"))
    assert PrunePlan.load(path).removed("vlm") == (1, 2)


def test_keys_with_an_underscore_are_comments():
    data = edited(_why="block 1 looked odd")
    data["towers"]["vlm"]["_note"] = "by hand"
    assert PrunePlan.from_json(data) == pi0_plan()


def test_only_schema_kind_and_towers_are_required():
    plan = PrunePlan.from_json({"schema": 1, "kind": "pi0", "towers": {"vlm": {"depth": 2, "keep": [0]}}})
    assert plan == PrunePlan("pi0", {"vlm": TowerPlan(2, (0,))})


def with_tower(**tower):
    good = {"depth": 4, "keep": [0, 2, 3]}
    return edited(towers={"vlm": good | tower, "action": good})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"the plan must be an object \{...\}, not \[\]"),
        (edited(schema=2), "schema 2; this version reads schema 1"),
        (edited(schema="1"), "schema must be a whole number"),
        (edited(kind=""), "empty 'kind'"),
        (edited(kind=3), "kind must be text, not 3"),
        (edited(criterium="clp"), "unknown key 'criterium'; did you mean 'criterion'"),
        (edited(xyz=1), "unknown key 'xyz'; known are schema"),
        ({"schema": 1, "kind": "pi0"}, "the key 'towers' is missing"),
        (edited(towers=[1]), "towers must be an object"),
        (edited(scores=[1]), "scores must be an object"),
        (edited(scores={"vlm": float("nan")}), "no JSON values"),
        (edited(coupled=["vlm"]), "coupled must be a list"),
        (edited(coupled=[["vlm", "vision"]]), "couples tower 'vision', but has no such tower"),
        (with_tower(keeep=[0]), "tower 'vlm': unknown key 'keeep'; did you mean 'keep'"),
        (with_tower(depth=None), "tower 'vlm': depth must be a whole number, not null"),
        (with_tower(depth=0), "tower 'vlm': depth is 0"),
        (with_tower(keep="0,1"), "tower 'vlm': keep must be a list"),
        (with_tower(keep=[0, 2.0]), "tower 'vlm': every index in keep must be a whole number, not 2.0"),
        (with_tower(keep=[True]), "tower 'vlm': every index in keep must be a whole number, not true"),
        (with_tower(keep=[]), "tower 'vlm': keep is empty"),
        (with_tower(keep=[0, 4]), "tower 'vlm': keep names block 4, but the blocks are numbered 0 to 3"),
        (with_tower(keep=[-1, 2]), "tower 'vlm': keep names block -1"),
        (with_tower(keep=[0, 2, 2]), "tower 'vlm': keep names block 2 twice"),
        (with_tower(keep=[0, 3, 2]), "tower 'vlm': keep names block 2 after block 3; sort"),
        (with_tower(keep=[0, 3]), "'vlm' and 'action' are coupled, but only 'action' keeps block 2"),
        (with_tower(depth=5), "'vlm' and 'action' are coupled, but have 5 and 4 blocks"),
    ],
)
def test_from_json_rejects_what_cannot_be_meant(data, message):
    with pytest.raises(InputError, match=message):
        PrunePlan.from_json(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": 1,\n "kind": }', "no valid JSON: line 2"),
        (b'{"schema": 1, "schema": 1}', "the key 'schema' occurs twice"),
        (b'{"schema": NaN}', "NaN is no JSON number"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
        (b'{"schema": 1, "kind": "pi0"}', "'towers' is missing"),
    ],
)
def test_load_names_the_file_and_the_slip(tmp_path, content, message):
    path = tmp_path / "edited.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"edited.json:? .*{message}"):
        PrunePlan.load(path)


def test_load_of_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"none\.json cannot be read: No such file"):
        PrunePlan.load(tmp_path / "none.json")


def test_check_against_accepts_the_model_of_the_plan():
    pi0_plan().check_against({"vision": 27, "vlm": 4, "action": 4})


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ({"vlm": 4}, "prunes tower 'action', but the model's towers are 'vlm'"),
        ({"vlm": 4, "action": 3}, "for a 'action' tower of 4 blocks, but the model's has 3"),
    ],
)
def test_check_against_rejects_another_model(depths, message):
    with pytest.raises(InputError, match=message):
        pi0_plan().check_against(depths)


@property_test
@given(plan_chains(2))
def test_compose_keeps_what_pruning_twice_keeps(chain):
    first, then = plans(chain)
    both = compose(first, then)
    for name in first.towers.keys() | then.towers.keys():
        depth = (first.towers if name in first.towers else then.towers)[name].depth
        blocks = list(range(depth))
        for plan in (first, then):
            blocks = [blocks[i] for i in plan.towers[name].keep] if name in plan.towers else blocks
        assert both.towers[name] == TowerPlan(depth, tuple(blocks))


@property_test
@given(plan_chains(3))
def test_compose_is_associative(chain):
    p, q, r = plans(chain)
    left, right = compose(compose(p, q), r), compose(p, compose(q, r))
    assert (left.towers, left.coupled, left.criterion) == (right.towers, right.coupled, right.criterion)


@property_test
@given(plan_chains(1))
def test_identity_is_neutral_in_compose(chain):
    (plan,) = plans(chain)
    before = PrunePlan.of("pi0", {name: tower.depth for name, tower in plan.towers.items()})
    after = PrunePlan.of("pi0", {name: len(tower.keep) for name, tower in plan.towers.items()})
    assert compose(before, plan) == compose(plan, after) == plan


@property_test
@given(plan_chains(1))
def test_json_round_trip_is_exact(chain):
    (plan,) = plans(chain)
    assert PrunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_compose_records_both_reasons():
    tower = TowerPlan(3, (0, 1))
    then = PrunePlan("pi0", {"vlm": tower, "action": tower}, COUPLED, "jumps", {"vlm+action": {"scores": [1]}})
    both = compose(pi0_plan(), then)
    assert both.criterion == "clp, then jumps"
    assert both.scores == {"first": pi0_plan().scores, "then": then.scores}
    assert both.coupled == COUPLED
    assert both.notes == "why"


def test_compose_uncouples_when_one_plan_does():
    then = PrunePlan("pi0", {"vlm": TowerPlan(3, (0,)), "action": TowerPlan(3, (0, 1))})
    assert compose(pi0_plan(), then).coupled == ()
    both = TowerPlan(3, (0, 1))
    coupled = PrunePlan("pi0", {"vlm": both, "action": both}, COUPLED)
    assert compose(PrunePlan("pi0", pi0_plan().towers), coupled).coupled == ()
    elsewhere = PrunePlan("pi0", {"vision": TowerPlan(3, (0,))})
    assert compose(pi0_plan(), elsewhere).coupled == COUPLED


def test_compose_rejects_plans_that_do_not_follow_each_other():
    with pytest.raises(InputError, match="'vlm' tower was already pruned to 3 blocks, but the plan is for 4"):
        compose(pi0_plan(), pi0_plan())
    with pytest.raises(InputError, match="cannot prune a 'pi0' checkpoint by a plan for 'pi05'"):
        compose(pi0_plan(), PrunePlan("pi05", {}))


@pytest.mark.parametrize("keep", [[0, 1, 4, 5, 8, 11], [2, 3, 4, 9, 10], [0, 3, 8, 9, 12, 13, 14, 15], [4], [0, 1]])
def test_lists_that_keep_the_alternation(keep):
    check_period(keep, 2, "dit", depth=16)
    check_period(keep[1:], 1, "dit", depth=16)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([1], "block 1 cannot take place 0, .* 2 kinds; keep 0 instead, or keep 2 instead, or also keep 0$"),
        ([0, 2, 5], "block 2 cannot take place 1, .*; also keep 1, or leave out 2$"),
        ([0, 2, 4], "block 2 cannot take place 1, .*; keep 1 instead, or keep 3 instead$"),
        (
            [0, 1, 3],
            "block 3 cannot take place 2, .*; keep 2 instead, or keep 4 instead, or also keep 2, or leave out 3$",
        ),
        (
            [0, 1, 2, 4],
            "block 4 cannot take place 3, .*; keep 3 instead, or keep 5 instead, or also keep 3, or leave out 4$",
        ),
    ],
)
def test_a_block_that_cannot_take_its_place_and_what_could(keep, message):
    with pytest.raises(InputError, match=rf"tower 'dit': {message}"):
        check_period(keep, 2, "dit", depth=6)


def test_three_kinds_alternate_too():
    check_period([0, 4, 5, 6], 3, "vlm", depth=9)
    with pytest.raises(InputError, match=r"block 5 cannot take place 1, .* 3 kinds; keep 4 instead, or keep 7 instead"):
        check_period([0, 5], 3, "vlm", depth=9)


@property_test
@given(st.integers(1, 3), st.lists(st.booleans(), min_size=1, max_size=9).filter(any))
def test_following_the_advice_ends_in_a_list_that_fits(period, kept):
    keep = [block for block, stays in enumerate(kept) if stays]
    for _ in range(20):
        try:
            check_period(keep, period, "dit", depth=len(kept))
        except InputError as error:
            found = re.search(r"block (\d+) cannot take place (\d+).*?; (keep|also keep|leave out) (\d+)", str(error))
            block, place, way, other = int(found[1]), int(found[2]), found[3], int(found[4])
            assert keep[place] == block and (block - place) % period
            keep[place : place + 1] = {"keep": [other], "also keep": [other, block], "leave out": []}[way]
        if not keep:  # one block that cannot be first
            return
    check_period(keep, period, "dit", depth=len(kept))


def test_a_plan_is_saved_where_its_address_says(monkeypatch):
    """A plain path would make of the address a local folder ``gs:``."""
    written, remote = [], type(epath.Path("gs://bucket/file"))
    monkeypatch.setattr(
        remote, "write_text", lambda self, text, encoding: written.append((str(self), json.loads(text)))
    )
    monkeypatch.setattr(remote, "replace", lambda self, target: written.append(str(target)))
    plan = pi0_plan()
    plan.save("gs://bucket/plan.json")
    assert written == [("gs://bucket/plan.json.partial", plan.to_json()), "gs://bucket/plan.json"]
