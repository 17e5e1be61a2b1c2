"""Arrows point forward: rooms import what comes before them, and no paper's room another paper's."""
import ast
from pathlib import Path

import pytest

import l2rec

ROOT = Path(l2rec.__file__).parent
MAY_IMPORT = {                                          # besides themselves
    "data": set(), "evaluation": {"data"}, "training": {"data", "evaluation", "baselines"}, # the measurements of speed train a baseline
    "baselines": {"data", "evaluation", "training"},
    **{paper: {"data", "evaluation", "training", "baselines"} for paper in ("dual_view", "mail", "hisam")},
    "reporting": {"data", "evaluation", "training"}}


def imported_rooms(file: Path) -> set[str]:
    "Rooms that a file of the library imports, its own left out."
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 2: found |= {node.module.split(".")[0]} if node.module else {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("l2rec."): found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import): found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("l2rec.")}
    return found - {file.parent.name}


def test_every_room_is_known(): assert {p.parent.name for p in ROOT.glob("*/*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_point_forward(room):
    for file in (ROOT / room).glob("*.py"): assert imported_rooms(file) <= MAY_IMPORT[room], file.name


def test_an_import_is_seen(tmp_path):
    file = tmp_path / "mail" / "tower.py"
    file.parent.mkdir()
    file.write_text("from ..hisam.attention import scores\nimport l2rec.reporting.tables\ndef late():\n    from l2rec.dual_view import router\n    from .fills import distinct\n")
    assert imported_rooms(file) == {"hisam", "reporting", "dual_view"}
