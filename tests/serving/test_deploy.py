"""What `deploy/` holds reads as what it is meant to be, and names what there is."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from fastapi.testclient import TestClient

from cogvx_fast import demo_checkpoint
from cogvx_fast.cli import app
from cogvx_fast.serving.api import build
from cogvx_fast.serving.context import Context, Limits
from cogvx_fast.serving.models import Models
from cogvx_fast.serving.orders import Served
from cogvx_fast.serving.ray_arguments import Arguments

DEPLOY = Path(__file__).parents[2] / "deploy"
METRIC = re.compile(r"\b(cogvx_\w+?)\b(?:\{([^}]*)\})?")


def read(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def expressions():
    """Of Grafana's panels and Prometheus's alerts."""
    board = json.loads((DEPLOY / "grafana/dashboards/cogvx.json").read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return panels + [rule["expr"] for group in read("alerts.yml")["groups"] for rule in group["rules"]]


@pytest.fixture
def given(store, files, place, add):
    """The labels of each metric that `/metrics` gives, of a server that has done something."""
    served = Served.of(demo_checkpoint(), "demo", None, None, "float32", "cpu")
    job = add()
    store.complete(job.id, store.take(job.id, "w", 10), {"stage_seconds": {}, "made_steps": 4}, 1)
    store.count(seconds_decode=1.0)
    store.seen("w", {"ready": True, "model": "demo", "device": "cpu", "memory": 0})
    client = TestClient(build(Context(Models([served]), store, files, None, Limits(), place)))
    found = {}
    for line in client.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, labels = re.match(r"(\w+)(?:\{(.*)\})?", line).groups()
            found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels or ""))
    return found


def test_dashboard_and_alerts_name_metrics_that_there_are(given):
    named = set()
    for expression in expressions():
        for name, selector in METRIC.findall(expression):
            assert name in given, expression
            assert set(re.findall(r"(\w+)=", selector)) <= given[name], expression
            named.add(name)
        for labels in re.findall(r"\b(?:by|without) \(([^)]*)\)", expression):
            wanted = {label.strip() for label in labels.split(",")}
            assert all(wanted <= given[name] for name, _ in METRIC.findall(expression)), expression
    assert named == set(given), "each of them is shown or watched"


def test_legends_name_labels_that_there_are(given):
    board = json.loads((DEPLOY / "grafana/dashboards/cogvx.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert all(labels <= given[name] for name, _ in METRIC.findall(target["expr"])), panel["title"]


def options_of(command):
    """The names of a command's options."""
    found = typer.main.get_command(app).commands[command].params
    return {name for parameter in found for name in parameter.opts}


def test_commands_have_options_that_there_are():
    command = next(line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.startswith("CMD"))
    for words in (json.loads(command.removeprefix("CMD ")), read("compose.yaml")["services"]["server"]["command"]):
        assert words[0] == "serve"
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options and options <= options_of("serve")


def test_compose_mounts_what_there_is_and_listens_at_this_machine():
    compose = read("compose.yaml")
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"], volume
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert all("${" in str(value) for key, value in service.get("environment", {}).items() if "PASSWORD" in key)
    assert set(read("compose.gpu.yaml")["services"]) <= set(compose["services"])
    target = read("prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"][0]
    assert target == "server:8000" and read("prometheus.yml")["rule_files"] == ["alerts.yml"]
    assert read("grafana/provisioning/datasources/prometheus.yml")["datasources"][0]["url"] == "http://prometheus:9090"
    mounted = compose["services"]["grafana"]["volumes"][1].split(":")[1]
    assert read("grafana/provisioning/dashboards/cogvx.yml")["providers"][0]["options"]["path"] == mounted


def test_the_image_is_made_of_files_that_there_are():
    lines = (DEPLOY / "Dockerfile").read_text()
    assert "USER 10001" in lines and "HEALTHCHECK" in lines and '"--api-keys-file"' in lines
    kept = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert all((DEPLOY.parent / name).exists() for name in kept)
    for line in lines.splitlines():
        if line.startswith("COPY") and "--from" not in line:
            assert all(source == "." or source in kept for source in shlex.split(line)[1:-1])


def test_rays_manifest_gives_arguments_that_it_takes():
    service = read("rayservice.yaml")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "cogvx_fast.serving.ray_app:build"
    arguments = Arguments.of(application["args"])
    assert arguments.sources() == {"2b": "THUDM/CogVideoX-2b"}
    cluster = service["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["maxReplicas"] >= arguments.max_replicas * arguments.gpus_per_replica
    for pod in (cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]):
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert any(str(arguments.api_keys_file).startswith(m["mountPath"]) for m in container["volumeMounts"])
    constraints = (DEPLOY.parent / "constraints.txt").read_text().split()
    assert f"ray=={cluster['rayVersion']}" in constraints, "the version in the image is that of the cluster"
