"""What `infra/` promises: valid where it is used, installed as the Makefile installs, commands and sizes that fit."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import typer
import yaml
from moto import mock_aws
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.cli import app
from pipeline.config import TranscribeConfig, load_config

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
DOCKERFILE = INFRA / "Dockerfile"
RAYJOB = INFRA / "rayjob.yaml"
AWS = INFRA / "ray-cluster-aws.yaml"

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning")


def parse_command(line: str) -> None:
    """Raises click's error for a command of ours or Ray's with an option or argument that it does not know."""
    from ray.scripts.scripts import cli as ray_cli  # not above: the filter over its warnings works in tests

    program, *arguments = shlex.split(line, comments=True)
    command: Any = {"shardscribe": typer.main.get_command(app), "ray": ray_cli}[program]
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context(command.name, arguments)


def commands_in_comments(path: Path) -> list[str]:
    comments = "\n".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
    return re.findall(r"^ +((?:shardscribe|ray) .*)$", comments.replace("\\\n", " "), flags=re.MULTILINE)


def pip_steps(text: str) -> list[list[str]]:
    """The arguments of each `pip install`, less what changes only its output and cache."""
    silent = {"--quiet", "--disable-pip-version-check", "--no-cache-dir"}
    steps = re.findall(r"pip install (.*)$", text, flags=re.MULTILINE)
    return [[word for word in shlex.split(step) if word not in silent] for step in steps]


@pytest.mark.parametrize("path", [RAYJOB, AWS], ids=lambda path: path.name)
def test_the_commands_in_the_comments_exist(path: Path) -> None:
    commands = commands_in_comments(path)
    assert commands
    for command in commands:
        parse_command(command)


# the image


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line]


def test_the_image_installs_what_the_makefile_installs() -> None:
    for_users = [
        [word.replace(".[dev]", ".") for word in step if word != "--editable"]
        for step in pip_steps((ROOT / "Makefile").read_text())
        if "--no-deps" not in step  # which tests alone need
    ]
    steps = pip_steps(DOCKERFILE.read_text())
    assert steps[: len(for_users)] == for_users
    assert steps[len(for_users) :] == [["-c", "constraints.txt", "boto3"]]
    assert re.search(r"^boto3==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)


def test_the_image_holds_what_the_package_is_built_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    copied: set[str] = set()
    for name, arguments in instructions():
        if name == "COPY":
            copied |= set(arguments.split()[:-1])
        elif name == "RUN" and arguments.endswith("constraints.txt ."):
            assert needed <= copied, "when it is installed"
    assert needed | {"constraints.txt"} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_has_the_projects_python_and_runs_as_a_user() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    steps = instructions()
    assert steps[0] == ("FROM", f"python:{project['tool']['mypy']['python_version']}-slim-bookworm")
    assert ("USER", "ray") in steps and ("ENV", "HOME=/home/ray") in steps
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER"}
    for name, arguments in steps:
        assert name in known
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", arguments], check=True)


# Kubernetes


def fields(required: Iterable[str] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"}}
POD = fields(
    spec=fields(
        ["containers"],
        nodeSelector=TEXTS,
        tolerations=list_of(fields(key=TEXT, operator={"enum": ["Exists", "Equal"]}, value=TEXT, effect=TEXT)),
        containers=list_of(
            fields(
                ["name", "image", "resources"],
                name=TEXT,
                image=TEXT,
                envFrom=list_of(
                    fields(secretRef=fields(["name"], name=TEXT), configMapRef=fields(["name"], name=TEXT))
                ),
                resources=fields(requests=QUANTITIES, limits=QUANTITIES),
                volumeMounts=list_of(fields(["name", "mountPath"], name=TEXT, mountPath=TEXT, readOnly=FLAG)),
            )
        ),
        volumes=list_of(
            fields(["name"], name=TEXT, configMap=fields(name=TEXT), persistentVolumeClaim=fields(claimName=TEXT))
        ),
    )
)
# The fields used here, with the names, types and requirements that KubeRay 1.7.0 gives them in
# ray-operator/config/crd/bases/ray.io_rayjobs.yaml (github.com/ray-project/kuberay, Apache-2.0); any other is refused.
# The whole file is 25,000 lines; infra/rayjob.yaml was held against it as well.
RAYJOB_FIELDS = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(["name"], name=TEXT),
    spec=fields(
        ["entrypoint", "rayClusterSpec"],
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=WHOLE,
        backoffLimit=WHOLE,
        rayClusterSpec=fields(
            ["headGroupSpec", "rayVersion"],
            rayVersion=TEXT,
            enableInTreeAutoscaling=FLAG,
            autoscalerOptions=fields(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=WHOLE),
            authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
            headGroupSpec=fields(["template"], rayStartParams=TEXTS, template=POD),
            workerGroupSpecs=list_of(
                fields(
                    ["groupName", "minReplicas", "maxReplicas", "template"],
                    groupName=TEXT,
                    replicas=WHOLE,
                    minReplicas=WHOLE,
                    maxReplicas=WHOLE,
                    rayStartParams=TEXTS,
                    template=POD,
                )
            ),
        ),
    ),
)


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    return list(yaml.safe_load_all(RAYJOB.read_text()))[1]  # type: ignore[no-any-return]


@pytest.fixture
def rayjob_config(tmp_path: Path) -> TranscribeConfig:
    config_map = next(yaml.safe_load_all(RAYJOB.read_text()))
    [(name, text)] = config_map["data"].items()
    (tmp_path / name).write_text(text)
    return load_config(TranscribeConfig, tmp_path / name)


def groups(rayjob: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]}


def limits(group: dict[str, Any]) -> dict[str, str]:
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]  # type: ignore[no-any-return]


def test_the_rayjob_has_the_fields_of_the_crd(rayjob: dict[str, Any]) -> None:
    jsonschema.validate(rayjob, RAYJOB_FIELDS)


def test_the_rayjob_runs_its_config_map(rayjob: dict[str, Any], rayjob_config: TranscribeConfig) -> None:
    config_map = next(yaml.safe_load_all(RAYJOB.read_text()))
    parse_command(rayjob["spec"]["entrypoint"])
    head = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    [mount] = head["containers"][0]["volumeMounts"]
    [volume] = head["volumes"]
    assert mount["name"] == volume["name"] and volume["configMap"]["name"] == config_map["metadata"]["name"]
    [name] = config_map["data"]
    assert rayjob["spec"]["entrypoint"].split()[-1] == f"{mount['mountPath']}/{name}"
    assert rayjob_config.ray.address == "auto", "the cluster of the node it runs on"
    assert f"shardscribe status {rayjob_config.output}" in commands_in_comments(RAYJOB)


def test_the_rayjobs_config_asks_for_all_nodes_and_no_more(
    rayjob: dict[str, Any], rayjob_config: TranscribeConfig
) -> None:
    cpu, gpu = groups(rayjob)["cpu"], groups(rayjob)["gpu"]
    assert rayjob_config.ray.read_tasks == cpu["maxReplicas"] * int(limits(cpu)["cpu"])
    gpus = gpu["maxReplicas"] * int(limits(gpu)["nvidia.com/gpu"])
    assert rayjob_config.ray.num_gpus and rayjob_config.ray.engines == gpus / rayjob_config.ray.num_gpus
    assert rayjob_config.ray.num_cpus <= int(limits(gpu)["cpu"])
    for group in (cpu, gpu):
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"], "Ray counts on the limits"


def test_every_pod_of_the_rayjob_has_the_image_and_the_credentials(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [pod["template"]["spec"]["containers"][0] for pod in pods]
    assert len({container["image"] for container in containers}) == 1
    secrets = re.findall(r"create secret generic (\S+)", RAYJOB.read_text())
    assert secrets == [cluster["authOptions"]["secretName"], containers[0]["envFrom"][0]["secretRef"]["name"]]
    assert all(container["envFrom"] == containers[0]["envFrom"] for container in containers)
    assert "--from-literal=auth_token=" in RAYJOB.read_text(), "the key that KubeRay reads"


def test_the_rayjob_and_the_image_have_the_same_ray(rayjob: dict[str, Any]) -> None:
    assert f"\nray=={rayjob['spec']['rayClusterSpec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_no_work_runs_on_a_head() -> None:
    rayjob = list(yaml.safe_load_all(RAYJOB.read_text()))[1]
    assert rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    cluster = yaml.safe_load(AWS.read_text())
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in cluster["head_start_ray_commands"][-1]


def test_the_pod_monitor_asks_every_pod_of_a_ray_cluster(rayjob: dict[str, Any]) -> None:
    monitor = yaml.safe_load((INFRA / "podmonitor.yaml").read_text())
    spec = fields(
        ["selector", "podMetricsEndpoints"],
        selector=fields(matchLabels={"const": {"ray.io/is-ray-node": "yes"}}),
        podMetricsEndpoints=list_of(fields(["port"], port={"const": "metrics"}, interval={"pattern": r"^\d+s$"})),
    )
    metadata = fields(["name"], name=TEXT, labels={"type": "object"})
    version, kind = {"const": "monitoring.coreos.com/v1"}, {"const": "PodMonitor"}
    required = ["apiVersion", "kind", "metadata", "spec"]
    jsonschema.validate(monitor, fields(required, apiVersion=version, kind=kind, metadata=metadata, spec=spec))
    cluster = rayjob["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert "metrics-export-port" not in group["rayStartParams"], "KubeRay names its own port `metrics`"


# EC2


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(AWS.read_text())  # type: ignore[no-any-return]


def test_ray_accepts_the_cluster_file(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    for kind in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert prepared[kind] == [], "all is in the image"


def test_rays_start_commands_exist(cluster: dict[str, Any]) -> None:
    for command in (*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]):
        parse_command(command)


def test_ec2_takes_every_node_as_described(cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    region = cluster["provider"]["region"]
    with mock_aws():
        iam, ec2 = boto3.client("iam", region_name=region), boto3.client("ec2", region_name=region)
        for profile in ("shardscribe-head", "shardscribe-worker"):
            iam.create_instance_profile(InstanceProfileName=profile)
        for name, node in cluster["available_node_types"].items():
            [instance] = ec2.run_instances(MinCount=1, MaxCount=1, **node["node_config"])["Instances"]
            is_head = name == cluster["head_node_type"]
            assert instance.get("InstanceLifecycle") == (None if is_head else "spot")
            assert node.get("min_workers", 0) == 0
            if not is_head:
                [found] = ec2.describe_instance_types(InstanceTypes=[instance["InstanceType"]])["InstanceTypes"]
                gpus = sum(gpu["Count"] for gpu in found.get("GpuInfo", {"Gpus": []})["Gpus"])
                described = {"CPU": found["VCpuInfo"]["DefaultVCpus"]} | ({"GPU": gpus} if gpus else {})
                assert node["resources"] == described


def test_the_submitted_job_asks_for_all_nodes_and_no_more(cluster: dict[str, Any]) -> None:
    [command] = [line for line in commands_in_comments(AWS) if line.startswith("shardscribe submit")]
    words = shlex.split(command)
    overrides = [value for flag, value in zip(words, words[1:], strict=False) if flag == "--set"]
    config = load_config(TranscribeConfig, ROOT / words[3], overrides)
    nodes = cluster["available_node_types"]
    gpu_nodes = {node["max_workers"] for node in nodes.values() if "GPU" in node["resources"]}
    assert gpu_nodes == {config.ray.engines} and config.ray.num_gpus == 1
    assert config.ray.read_tasks == nodes["cpu"]["max_workers"] * nodes["cpu"]["resources"]["CPU"]
    assert cluster["max_workers"] == nodes["cpu"]["max_workers"] + config.ray.engines
    assert f"{cluster['docker']['image']} ." in DOCKERFILE.read_text()


def test_nodes_of_the_cluster_ask_for_the_token(cluster: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}, "where Ray looks for it"
