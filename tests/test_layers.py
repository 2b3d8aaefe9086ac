"""Who may import whom: downward only, as the README's design section draws it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# from the bottom up; a module may import its own layer's siblings only where the layer is a package
LAYERS = (
    ("pipeline.redact", "pipeline.languages", "pipeline.section", "pipeline.cluster", "pipeline.alone"),
    ("pipeline.machine",),
    ("pipeline.labels_config", "pipeline.streams_config"),
    ("pipeline.schema", "pipeline.config", "pipeline.text", "pipeline.urls"),
    ("pipeline.units", "pipeline.retry"),
    (
        "pipeline.attempts",
        "pipeline.storage_errors",
        "pipeline.storage",
        "pipeline.listing",
        "pipeline.audio",
        "pipeline.vad",
        "pipeline.segmentation",
        "pipeline.placement",
        "pipeline.metrics",
    ),
    ("pipeline.sources", "pipeline.output", "pipeline.rolling", "pipeline.figures", "pipeline.phrases"),
    ("pipeline.engine",),
    ("pipeline.read", "pipeline.segment", "pipeline.transcribe", "pipeline.label", "pipeline.commit"),
    ("pipeline.progress", "pipeline.observe", "pipeline.summary", "pipeline.calibrate", "pipeline.funnel"),
    ("pipeline.report", "pipeline.distill", "pipeline.export", "pipeline.follow"),
    ("pipeline.evaluate",),
    ("pipeline.graph", "pipeline.embedded"),
    ("pipeline.bench",),
    ("pipeline.bench_streams",),
    ("jobs.mistakes", "jobs.options"),
    (
        "jobs.transcribe",
        "jobs.follow",
        "jobs.family_tower",
        "jobs.status",
        "jobs.funnel",
        "jobs.export",
        "jobs.report",
        "jobs.evaluate",
        "jobs.evaluate_streaming",
        "jobs.demo",
        "jobs.models",
        "jobs.family",
        "jobs.submit",
        "jobs.pack",
        "jobs.quantize",
        "jobs.distill",
        "jobs.distill_tower",
        "jobs.tables",
        "jobs.bench_pipeline",
        "jobs.bench",
    ),
    ("jobs.submit_cli", "jobs.evaluate_cli"),
    ("jobs.cli",),
)
PACKAGES = (
    "pipeline.sources",
    "pipeline.engine",
    "pipeline.embedded",
    "pipeline.report",
    "pipeline.evaluate",
    "pipeline.distill",
    "pipeline.export",
    "pipeline.follow",
)
SIBLINGS = {
    ("pipeline.listing", "pipeline.storage"),
    ("pipeline.storage", "pipeline.storage_errors"),
    ("pipeline.summary", "pipeline.progress"),
    ("pipeline.funnel", "pipeline.progress"),
    ("jobs.bench", "jobs.bench_pipeline"),
    ("jobs.tables", "jobs.transcribe"),
    ("jobs.tables", "jobs.quantize"),
    ("jobs.tables", "jobs.distill"),
    ("jobs.family_tower", "jobs.tables"),
    ("jobs.family_tower", "jobs.distill_tower"),
}
STEPS = LAYERS[7]


def modules() -> list[str]:
    files = [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return sorted(name for name in names if not name.endswith("__init__"))


def imports(module: str) -> set[str]:
    """Modules of ours that `module` imports, anywhere in its file."""
    tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    known = set(modules())
    ours = {name for name in found if name.split(".")[0] in ("pipeline", "jobs")}
    return {name if name in known else name.rpartition(".")[0] for name in ours}


def place(module: str) -> tuple[int, str]:
    """Layer number and the entry of `LAYERS` that a module belongs to."""
    for number, layer in enumerate(LAYERS):
        for entry in layer:
            if module == entry or module.startswith(f"{entry}."):
                return number, entry
    raise AssertionError(f"{module} has no place in the layers: add it to LAYERS and to the README")


@pytest.mark.parametrize("module", modules())
def test_imports_go_downward(module: str) -> None:
    number, entry = place(module)
    for imported in imports(module):
        below, other = place(imported)
        allowed = below < number or (entry == other and entry in PACKAGES) or (module, imported) in SIBLINGS
        assert allowed, f"{module} imports {imported}, which is not below it"


def test_only_the_graph_knows_ray_data_and_only_engines_load_models() -> None:
    for module in modules():
        text = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text()
        if module != "pipeline.graph":
            assert "ray.data" not in text, f"{module} mentions ray.data"
        if not module.startswith(("pipeline.engine.", "pipeline.embedded.", "pipeline.bench")):
            assert "from qwen_asr" not in text and "import transformers" not in text, f"{module} loads models"
