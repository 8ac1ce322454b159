"""Training gives the curves it gave before; golden_curves.py made what tests/golden/ holds."""

import itertools
import json

import pytest
from golden_curves import CASES, GOLDEN, UPDATES, curve, make_world
from running import STRATEGIES

# float32 on one thread. The plain kernels of a processor without vector instructions give curves
# that differ from those of AVX-512 by less than 1e-5 of their values.
TOLERANCE = {"rel": 1e-4, "abs": 1e-5}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("golden"))


def _golden(case):
    return json.loads((GOLDEN / f"{case}.json").read_text())


def test_every_strategy_has_a_curve():
    others = {"pretrain_enhancer", "enhance"}
    assert {case.split(".")[0] for case in CASES} == set(STRATEGIES) - others
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(CASES)


def test_no_two_curves_are_the_same():
    for one, other in itertools.combinations(CASES, 2):
        assert _golden(one)["losses"] != pytest.approx(
            _golden(other)["losses"], rel=10 * TOLERANCE["rel"]
        )


@pytest.mark.parametrize("case", CASES)
def test_training_follows_its_golden_curve(case, world, tmp_path):
    golden, found = _golden(case), curve(case, world, tmp_path)
    assert len(found["losses"]) == UPDATES
    assert found["losses"] == pytest.approx(golden["losses"], **TOLERANCE)
    for one, other in zip(found["valid"], golden["valid"], strict=True):
        assert one == pytest.approx(other, **TOLERANCE)
