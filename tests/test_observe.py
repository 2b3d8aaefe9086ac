"""Metrics of a real run, as Prometheus finds them, and the dashboard that shows them."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pipeline.config import TranscribeConfig
from pipeline.output import Output
from pipeline.summary import Summary, summarize
from tests.conftest import make_config
from tests.fault_proxy import FaultProxy, Request
from tests.ray_head import Head, free_port, start_head

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "pipeline" / "embedded" / "samples"
DASHBOARD: dict[str, Any] = json.loads((ROOT / "infra" / "grafana-dashboard.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
OURS = "ray_shardscribe_"
PARTS = ("_bucket", "_count", "_sum")  # of a histogram

pytestmark = pytest.mark.timeout(600)  # a cluster and a run on it, on two cores that others may share


# a run and what was scraped meanwhile


@dataclass(frozen=True, slots=True)
class Series:
    """A series with its values, as the endpoints of a cluster showed it."""

    name: str
    labels: dict[str, str]
    values: list[float]

    @property
    def value(self) -> float:
        return self.values[-1]


@dataclass(frozen=True, slots=True)
class Observed:
    """What a run has left: its exit code, the audio that it had planned, its output, the series that were there at any
    time, and the URL of the Prometheus that has watched it."""

    code: int
    planned_s: float
    summary: Summary
    records: list[dict[str, Any]]
    began: float
    series: list[Series]
    prometheus: str | None

    def of(self, name: str) -> list[Series]:
        return [series for series in self.series if series.name == OURS + name]

    def total(self, name: str) -> float:
        return sum(series.value for series in self.of(name))

    def labels(self, name: str) -> set[str]:
        """Labels that a series of this full name has; none when there is no such series."""
        return {label for series in self.series if series.name == name for label in series.labels}


class Scraper:
    """Reads every endpoint that Ray's service discovery names, again and again, in a thread of its own."""

    def __init__(self, discovery: Path) -> None:
        self._discovery = discovery
        self._found: dict[tuple[str, frozenset[tuple[str, str]]], list[float]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def series(self) -> list[Series]:
        return [Series(name, dict(labels), values) for (name, labels), values in list(self._found.items())]

    def wait_for(self, is_there: Callable[[list[Series]], bool], limit_s: float = 60) -> None:
        began = time.monotonic()
        while not is_there(self.series):
            assert time.monotonic() - began < limit_s, sorted({series.name for series in self.series})
            time.sleep(0.1)

    def _loop(self) -> None:
        while not self._end.wait(0.5):
            for target in self._targets():
                try:
                    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                        text = answer.read().decode()
                except OSError:  # not yet, or not in time: it is asked again
                    continue
                for family in text_string_to_metric_families(text):
                    for sample in family.samples:
                        self._found.setdefault((sample.name, frozenset(sample.labels.items())), []).append(sample.value)

    def _targets(self) -> list[str]:
        if not self._discovery.exists():
            return []
        return [target for group in json.loads(self._discovery.read_text()) for target in group["targets"]]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory, s3_options: dict[str, dict[str, Any]]) -> Iterator[Observed]:
    """The embedded student on a sample shard and on two files that are no audio; the first upload of a unit fails."""
    folder = tmp_path_factory.mktemp("observed")
    (bad := folder / "bad").mkdir()
    (bad / "noise.wav").write_bytes(b"this is no audio at all")
    (bad / "nothing.wav").write_bytes(b"")
    interval = {"RAY_metrics_report_interval_ms": "1000"}  # 10 s otherwise
    store = urllib.parse.urlsplit(s3_options["s3"]["endpoint_url"])
    assert store.port is not None
    with (
        FaultProxy(store.port, first_upload_fails) as proxy,
        start_head({"PYTHONPATH": str(ROOT), **interval}) as head,
        Scraper(discovery := head.folder / "prom_metrics_service_discovery.json") as scraper,
        prometheus_of(discovery, folder) if shutil.which("prometheus") else nullcontext() as prometheus,
    ):
        config = make_config(
            [str(SAMPLES / "mixed-00000.tar"), str(bad)],
            "s3://observed/out",
            Path("embedded/student"),
            units={"target_s": 8},
            engine={"batch_size": 4},
            ray={"address": head.address, "units_in_flight": 1},  # commits one after the other make a speed
            storage={
                "options": {"s3": s3_options["s3"] | {"endpoint_url": proxy.url}},
                "retry": {"first_wait_s": 0.01},
            },
        )
        make_bucket(s3_options["s3"])
        scraper.wait_for(lambda series: bool(series))
        began = time.time()
        ended = transcribe(config, head, folder)
        summary = summarize(output := Output(config.output, config.storage.access))
        keys = [key for done in output.committed().values() for key in done.keys]
        scraper.wait_for(lambda series: any(is_count_of_units(each, len(keys)) for each in series))
        time.sleep(3)  # what the engines counted last is on its way, and Prometheus looks every second
        planned_s = sum(split.estimated_s for split in output.read_plan().splits)
        records = list(output.records(keys))
        yield Observed(ended.returncode, planned_s, summary, records, began, scraper.series, prometheus)


def first_upload_fails(request: Request) -> Any:
    is_upload = request.method == "PUT" and "/transcripts/" in request.target
    return "error_500" if is_upload and request.seen == 0 else None


def is_count_of_units(series: Series, count: int) -> bool:
    return series.name == f"{OURS}committed_units_total" and series.value == count


def make_bucket(options: dict[str, Any]) -> None:
    keys = {"aws_access_key_id": options["key"], "aws_secret_access_key": options["secret"]}
    client = boto3.client("s3", endpoint_url=options["endpoint_url"], region_name="us-east-1", **keys)
    client.create_bucket(Bucket="observed")


def transcribe(config: TranscribeConfig, head: Head, folder: Path) -> subprocess.CompletedProcess[str]:
    (conf := folder / "conf.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", "from jobs.cli import app; app()", "transcribe", str(conf)]
    ended = subprocess.run(command, cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode in (0, 3), ended.stderr
    return ended


@contextmanager
def prometheus_of(discovery: Path, folder: Path) -> Iterator[str]:
    """A Prometheus with infra/prometheus.yml, but for where the discovery file is and how often it looks."""
    config = yaml.safe_load((ROOT / "infra" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    job["scrape_interval"] = "1s"
    (sd,) = job["file_sd_configs"]
    assert [Path(file).name for file in sd["files"]] == [discovery.name]
    sd |= {"files": [str(discovery)], "refresh_interval": "1s"}
    (path := folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    listen = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={listen}"], stdout=log, stderr=log)
        try:
            yield f"http://{listen}"
        finally:
            process.terminate()
            process.wait()


def test_what_is_committed_is_counted(observed: Observed) -> None:
    summary = observed.summary
    assert observed.code == 3 and summary.units_committed > 3 and summary.audio_s > 50
    assert observed.total("committed_audio_seconds_total") == pytest.approx(summary.audio_s)
    assert observed.total("committed_units_total") == summary.units_committed
    assert observed.total("committed_segments_total") == summary.num_segments
    assert observed.total("storage_retries_total") == summary.units_committed, "each was uploaded twice"
    assert observed.planned_s > 0
    # the plan says tenths of a second, a split at a time
    assert observed.total("expected_audio_seconds_total") == pytest.approx(observed.planned_s, abs=0.2)


def test_failures_are_counted_by_their_code_alone(observed: Observed) -> None:
    reasons = {series.labels["reason"]: series.value for series in observed.of("failures_total")}
    assert reasons == observed.summary.errors == {"not_audio": 1, "empty_file": 1}


def test_engines_count_what_they_decode(observed: Observed) -> None:
    audio_s = observed.total("engine_audio_seconds_total")
    padded_s = observed.total("engine_padded_audio_seconds_total")
    assert audio_s == pytest.approx(sum(record["decoded_s"] for record in observed.records))
    assert audio_s <= padded_s < 2 * audio_s
    num_decoded = observed.summary.num_segments - observed.summary.num_failed
    assert num_decoded / 4 <= observed.total("engine_batches_total") <= num_decoded, "4 a batch at most"
    busy_s = [record["busy_s"] for record in observed.records]
    assert 0 < observed.total("engine_busy_seconds_total") < sum(busy_s), "a unit waits, too"
    assert observed.total("engine_unit_seconds_count") == len(busy_s)
    (waiting,) = observed.of("engine_waiting_segments")
    # how many wait at the moment of a report is chance; tests/engine/test_batching.py holds the number itself
    assert 0 <= min(waiting.values) <= max(waiting.values) < observed.summary.num_segments


def test_series_say_no_more_of_a_run_than_its_id(observed: Observed) -> None:
    ours = [series for series in observed.series if series.name.startswith(OURS)]
    of_ray = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "le"}
    of_ray |= {label for series in ours for label in series.labels if label.startswith("otel_scope_")}
    assert {label for series in ours for label in series.labels} - of_ray == {"run_id", "reason"}
    (run_id,) = {series.labels["run_id"] for series in ours}
    assert {record["run_id"] for record in observed.records} == {run_id}
    assert len(ours) < 60, "one engine's and the driver's"


# the dashboard


def selectors(expression: str) -> list[promql.VectorSelector]:
    found: list[Any] = []
    promql.walk(parsed(expression), found.append)
    return [node for node in found if isinstance(node, promql.VectorSelector)]


def matched_labels(expression: str) -> set[str]:
    """Those that two sides of an operator are matched by."""
    found: list[Any] = []
    promql.walk(parsed(expression), found.append)
    modifiers = [node.modifier for node in found if isinstance(node, promql.BinaryExpr) and node.modifier is not None]
    return {label for modifier in modifiers if modifier.matching for label in modifier.matching.labels}


def grouping_labels(expression: str) -> set[str]:
    found: set[str] = set()

    def look(node: Any) -> None:
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            assert node.modifier.type == promql.AggModifierType.By, "what is dropped depends on what is there"
            found.update(node.modifier.labels)

    promql.walk(parsed(expression), look)
    return found


def parsed(expression: str) -> promql.Expr:
    """Raises ValueError where PromQL does not allow it."""
    return promql.parse(expression.replace("$__rate_interval", "1m"))


def variables() -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


def queries() -> list[str]:
    """Every expression of the dashboard; a variable's becomes what it takes the label from, grouped by that label."""
    of_variables = []
    for variable in variables().values():
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert match, variable["query"]
            of_variables.append(f"count by ({match[2]}) ({match[1]})")
    return [*EXPRESSIONS, *of_variables]


@pytest.mark.parametrize("expression", queries(), ids=itertools.count(1))
def test_every_metric_and_label_of_the_dashboard_is_exported(expression: str, observed: Observed) -> None:
    found = selectors(expression)
    assert found
    for selector in found:
        exported = observed.labels(selector.name)
        assert exported, f"no series is named {selector.name}"
        used = {matcher.name for matcher in selector.matchers.matchers}
        used |= grouping_labels(expression) | matched_labels(expression)
        assert used <= exported, f"{selector.name} has no {used - exported}"


def test_every_metric_is_on_the_dashboard(observed: Observed) -> None:
    shown = {selector.name for expression in EXPRESSIONS for selector in selectors(expression)}
    exported = {series.name for series in observed.series if series.name.startswith(OURS)}
    assert len(exported) > 10
    base = {name for name in exported if not name.endswith(PARTS)}
    histograms = {name.removesuffix(part) for name in exported for part in PARTS if name.endswith(part)}
    assert base <= shown and all(f"{name}_bucket" in shown for name in histograms)


def test_legends_name_labels_that_the_expression_keeps() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            used = set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
            assert used <= grouping_labels(target["expr"]), panel["title"]


def test_every_query_is_about_one_run_or_one_cluster() -> None:
    for expression in EXPRESSIONS:
        for selector in selectors(expression):
            matchers = [(matcher.name, matcher.value) for matcher in selector.matchers.matchers]
            of_run = selector.name.startswith(OURS)
            assert matchers == [("run_id", "$run") if of_run else ("SessionName", "$session")], expression


def test_grafana_can_import_it() -> None:
    assert DASHBOARD["title"] and DASHBOARD["uid"] and "id" not in DASHBOARD
    assert DASHBOARD["schemaVersion"] >= 37, "Grafana 10"
    known = variables()
    assert known["datasource"]["type"] == "datasource" and known["datasource"]["query"] == "prometheus"
    assert list(known)[0] == "datasource", "others ask it"
    for variable in known.values():
        assert variable["type"] == "datasource" or variable["datasource"] == DATASOURCE
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(DASHBOARD)))
    assert used == known.keys()
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids) and all(isinstance(number, int) for number in ids)
    for panel in PANELS:
        assert panel["type"] in ("stat", "timeseries", "table") and panel["title"]
        assert panel["description"].endswith(".") and len(panel["description"]) < 120
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == DATASOURCE
        assert all(target["datasource"] == DATASOURCE for target in panel["targets"])
        references = [target["refId"] for target in panel["targets"]]
        assert references and len(set(references)) == len(references)


def test_panels_fill_the_grid_and_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]
    height = max(y for _, y in taken) + 1
    assert taken.keys() == {(x, y) for x in range(24) for y in range(height)}, "24 columns, and no hole"


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus: not here; apt-get install prometheus")
@pytest.mark.parametrize("expression", EXPRESSIONS, ids=itertools.count(1))
def test_every_panel_shows_figures(expression: str, observed: Observed) -> None:
    """Prometheus itself answers, over the time of the run."""
    (run_id,) = {record["run_id"] for record in observed.records}
    (session,) = {series.labels["SessionName"] for series in observed.of("committed_units_total")}
    query = expression.replace("$__rate_interval", "5s").replace("$run", run_id).replace("$session", session)
    values = {"query": query, "start": observed.began, "end": time.time(), "step": 1}
    url = f"{observed.prometheus}/api/v1/query_range?{urllib.parse.urlencode(values)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        result = json.load(answer)["data"]["result"]
    assert any(math.isfinite(float(value)) for series in result for _, value in series["values"]), query
