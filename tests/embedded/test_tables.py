"""The table of what quantizing costs: how it is measured, and how it is drawn up."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from jobs import quantize
from pipeline.config import validate
from pipeline.distill.config import QuantizeConfig
from pipeline.embedded.evaluation import HELDOUT_FOLDER
from pipeline.embedded.tables import SETS, Bench, Measured, System, read_or_measure, to_markdown
from tests.distill.sources import write_manifest

STUDENT = System("student", "student", 16, None, None)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first six recordings of every held-out set."""
    folder = tmp_path_factory.mktemp("sets")
    for name in SETS:
        with (
            tarfile.open(HELDOUT_FOLDER / f"{name}.tar") as source,
            tarfile.open(folder / f"{name}.tar", "w") as target,
        ):
            for member, _ in zip(source, range(12), strict=False):
                file = source.extractfile(member)
                assert file is not None
                target.addfile(member, io.BytesIO(file.read()))
    return folder


def test_the_student_is_no_distance_from_itself_and_two_bits_are(sets: Path, tmp_path: Path) -> None:
    options = {
        "model": "embedded/student",
        "output": str(tmp_path / "int2"),
        "calibration": {"sources": [str(write_manifest(tmp_path / "m.jsonl", 1))], "samples_per_language": 1},
        "format": "int2",
        "algorithm": "rtn",
    }
    quantize.run(validate(QuantizeConfig, options, "test"), Console(quiet=True))
    bench = Bench(sets)
    student, _ = read_or_measure(STUDENT, tmp_path / "measured", bench)
    coarse = bench.measure(System("int2-rtn", "rtn", 2, None, tmp_path / "int2"))
    teacher = bench.measure(System("teacher", "teacher", 16, None, None))
    for name in SETS:
        assert len(student.errors[name]) == len(student.ce[name]) == len(student.tokens[name]) == 6
        assert abs(sum(student.kl[name])) < 1e-4 < sum(student.kl_teacher[name])
        assert abs(sum(teacher.kl_teacher[name])) < 1e-4 < sum(teacher.kl[name])
        assert sum(coarse.kl[name]) > 10 * sum(student.kl_teacher[name])
        assert sum(coarse.ce[name]) > sum(student.ce[name]) and sum(coarse.errors[name]) > sum(student.errors[name])
        assert coarse.words == student.words and coarse.tokens == student.tokens
    assert coarse.decoder_bytes < 0.15 * student.decoder_bytes
    again, made = read_or_measure(STUDENT, tmp_path / "measured", None)
    assert again == student and made is None, "what is measured is not measured again"


def measured(errors: float, ce: float, kl: float) -> Measured:
    """Two dozen recordings a set, that vary a little."""

    def each(value: float) -> dict[str, list[float]]:
        return {name: [value + 0.1 * value * (i % 3 - 1) for i in range(24)] for name in SETS}

    counts = {name: [int(errors) + i % 2 for i in range(24)] for name in SETS}
    ten = {name: [10] * 24 for name in SETS}
    return Measured(counts, ten, ten, each(ce), each(kl), each(kl + 1), 1000)


def test_what_is_won_back_is_a_share_of_what_was_lost_with_its_certainty() -> None:
    systems: dict[str, tuple[System, Measured]] = {
        "teacher": (System("teacher", "teacher", 16, None, None), measured(0, 0.5, 3.0)),
        "student": (STUDENT, measured(1, 1.0, 0.0)),
    }
    for seed, more in enumerate((0.0, 0.2)):
        for kind, its in (("awq", measured(3, 2.0 + more, 1.0)), ("qad", measured(1, 1.2 + more, 0.9))):
            system = System(f"int4-{kind}-{seed}", kind, 4, seed, Path("x"))
            systems[system.name] = system, its
    text = to_markdown(systems)
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in text.splitlines() if "|" in line}
    assert "| teacher | 5.00 %" in text
    assert "student INT4 AWQ + QAD | 15.00 ± 0.00 %" in text and " 0.1300 ± 0.0141 " in text
    errors, ce, kl = (rows["English WER", name] for name in ("errors", "cross-entropy", "KL to the student"))
    assert "+20.00 % (+20.00 to +20.00)" in errors and "100 %" in errors and errors.endswith("| yes |")
    assert "73 %" in ce and ce.endswith("| yes |")
    assert "10 %" in kl and kl.endswith("| no |")


def test_nothing_lost_has_no_share() -> None:
    student = measured(1, 1.0, 0.0)
    better = replace(student, ce={name: [each / 2 for each in its] for name, its in student.ce.items()})
    systems = {
        "student": (STUDENT, student),
        "a": (System("a", "awq", 4, 0, Path("x")), better),
        "q": (System("q", "qad", 4, 0, Path("x")), better),
    }
    assert "nothing lost" in next(
        line for line in to_markdown(systems).splitlines() if "cross-entropy" in line and "WER" in line and "+" in line
    )
