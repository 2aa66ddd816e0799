"""Which pods may load a model of a type: ModelMesh's MM_TYPE_CONSTRAINTS."""

import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from mesh.placement.type_constraints import TypeConstraints

CONSTRAINTS = {
    "rt:gpu": {"required": ["gpu", "zone-a|zone-b"], "preferred": ["fast", "near"]},
    "_default": {"required": ["_no_runtime"]},
}


@pytest.mark.parametrize(
    ("labels", "is_allowed"),
    [
        (("gpu", "zone-a"), True),
        (("gpu", "zone-b", "other"), True),
        (("gpu",), False),
        (("zone-a",), False),
        ((), False),
    ],
)
def test_type_constraints_need_every_required_entry(labels: tuple[str, ...], is_allowed: bool) -> None:
    assert TypeConstraints(json.dumps(CONSTRAINTS)).of("rt:gpu").allows(labels) == is_allowed


def test_type_constraints_count_preferred_entries() -> None:
    constraint = TypeConstraints(json.dumps(CONSTRAINTS)).of("rt:gpu")
    assert [constraint.num_preferred(labels) for labels in ((), ("fast",), ("near", "fast"))] == [0, 1, 2]


def test_type_constraints_default_applies_to_other_types() -> None:
    constraints = TypeConstraints(json.dumps(CONSTRAINTS))
    assert not constraints.of("mt:other").allows(("gpu", "zone-a"))
    assert TypeConstraints("").of("mt:other").allows(())


def test_type_constraints_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "constraints"
    file.write_text("{}")
    constraints = TypeConstraints(f"@{file}", check_s=0.0)
    assert constraints.of("rt:gpu").allows(())
    file.write_text(json.dumps(CONSTRAINTS))
    assert not constraints.of("rt:gpu").allows(())
    file.write_text("{")
    assert not constraints.of("rt:gpu").allows(()), "a broken file changes nothing"


def test_type_constraints_refuse_another_shape() -> None:
    with pytest.raises(ConfigError, match="type_constraints"):
        TypeConstraints('{"rt:gpu": {"required": "gpu"}}')
