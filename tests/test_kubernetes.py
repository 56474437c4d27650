"""launch/kubernetes.yaml: valid by Kubernetes' own schemas, its numbers agree, and its pods' commands train on two hosts."""

import json
import os
import re
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from cluster import hosts
from conftest import REPOSITORY
from test_launch import ENDLESS, SAMPLE, TINY, read

from pdl.config import load_config

KUBERNETES = "1.33"
KINDS = {"Job", "Service", "PersistentVolumeClaim"}


def manifests() -> dict[str, dict]:
    documents = yaml.safe_load_all((REPOSITORY / "launch/kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


def job() -> dict:
    return manifests()["Job"]["spec"]


def pod() -> dict:
    return job()["template"]["spec"]


def variables(container: dict) -> dict[str, str]:
    """As a pod's container gets them, in the namespace `default`: $(NAME) stands for one that was set before."""
    found = {}
    for variable in container["env"]:
        value = variable.get("value")
        if value is None:
            assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.namespace"}}
            value = "default"
        found[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
    return found


# --- the manifest ---


def validate(manifest: dict) -> None:
    """Against Kubernetes' own schemas, which the package brings along; unknown keys are refused."""
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_the_manifest_is_valid():
    assert set(manifests()) == KINDS
    for manifest in manifests().values():
        validate(manifest)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("completion", 2),
        ("completions", "two"),
        ("podFailurePolicy.rules", [{"onExitCodes": {"operator": "In", "values": [2]}}]),
        ("template.spec.terminationGracePeriod", 720),
        ("template.spec.containers", [{"image": "no name"}]),
    ],
)
def test_the_schemas_find_mistakes(path, value):
    manifest = manifests()["Job"]
    *parents, key = ["spec", *path.split(".")]
    place = manifest
    for parent in parents:
        place = place[parent]
    place[key] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(manifest)


def test_its_parts_fit_together():
    names = {manifest["metadata"]["name"] for manifest in manifests().values()}
    assert names == {"pdl"}  # so that the pods are pdl-0, pdl-1, ...
    service = manifests()["Service"]["spec"]
    assert service == {"clusterIP": "None", "selector": {"batch.kubernetes.io/job-name": "pdl"}}
    assert pod()["subdomain"] == "pdl"

    first, train = pod()["initContainers"][0], pod()["containers"][0]
    assert first["image"] == train["image"]
    assert variables(first) == variables(train)
    assert variables(train)["RDZV_ENDPOINT"].startswith("pdl-0.pdl.default.svc.cluster.local:")
    assert job()["completionMode"] == "Indexed"
    assert variables(train)["NNODES"] == str(job()["completions"]) == str(job()["parallelism"])
    assert pod()["terminationGracePeriodSeconds"] > int(variables(train)["STOP_SECONDS"])

    assert {mount["name"] for mount in train["volumeMounts"]} == {volume["name"] for volume in pod()["volumes"]}
    assert {volume["name"]: volume.get("persistentVolumeClaim") for volume in pod()["volumes"]}["data"] == {
        "claimName": "pdl"
    }
    mounted = [Path(mount["mountPath"]) for mount in train["volumeMounts"]]
    written = [variables(train)["PDL_CACHE"], variables(train)["HF_HOME"], train["args"][-1].partition("=")[2]]
    assert all(any(Path(path).is_relative_to(place) for place in mounted) for path in written)
    config, *overrides = train["args"]
    ranks = job()["completions"] * train["resources"]["limits"]["nvidia.com/gpu"]
    assert load_config(config, overrides, ranks).accumulation(ranks) == 1


def outcome(code: int, disrupted: bool = False) -> str:
    """What becomes of the Job when a pod's container ends with a code, by the first rule that fits."""
    for rule in job()["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes and code in codes["values"] and codes["operator"] == "In":
            return rule["action"]
        if "onPodConditions" in rule and disrupted:
            return rule["action"]
    return "Count"


def test_exit_codes_decide_on_another_try():
    assert pod()["restartPolicy"] == "Never"  # a failure policy needs it
    assert outcome(2) == "FailJob"
    assert outcome(75) == outcome(75, disrupted=True) == outcome(137, disrupted=True) == "Ignore"
    assert outcome(1) == outcome(137) == "Count"
    assert job()["successPolicy"]["rules"] == [{"succeededIndexes": "0"}]


# --- the pods ---


@pytest.mark.cluster
def test_two_pods_train_and_stop_on_the_signal_that_kubernetes_sends_process_1(tmp_path):
    if reason := hosts.missing():
        pytest.skip(reason)
    run = tmp_path / "run"
    first, train = pod()["initContainers"][0], pod()["containers"][0]
    given = variables(train) | {"PDL_CACHE": os.environ["PDL_CACHE"], "NPROC": "1"}
    name = given["RDZV_ENDPOINT"].partition(":")[0]
    # A container's process is the first of its process namespace.
    contained = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
    network = hosts.Network(tmp_path)
    try:
        # A pod knows its own name; the others' are known when their containers run.
        names = [tmp_path / f"hosts-{number}" for number in range(2)]
        for number, host in enumerate(network.hosts):
            names[number].write_text(
                f"127.0.0.1 localhost\n{host.address} {name.replace('pdl-0', f'pdl-{number}', 1)} pdl-{number}\n"
            )
            host.run("mount", "--bind", names[number], "/etc/hosts")
            host.run("hostname", f"pdl-{number}")
        prepare = [*contained, *first["command"], *first["args"]]
        network.hosts[0].run(*prepare, **given)
        waiting = network.hosts[1].start(*prepare, **given)
        time.sleep(2)
        assert not waiting.ended()
        with names[1].open("a") as file:
            file.write(f"{network.hosts[0].address} {name}\n")
        assert waiting.wait(timeout=30) == 0

        command = [*contained, *train["command"], SAMPLE, *TINY, *ENDLESS, f"training.output_dir={run}"]
        pods = [
            host.start(*command, output=tmp_path / f"output-{number}", **given)
            for number, host in enumerate(network.hosts)
        ]

        def said() -> str:
            return "".join(pod.said() for pod in pods)

        deadline = time.monotonic() + 240
        while read(run / "metrics.jsonl").count("\n") < 3:
            assert time.monotonic() < deadline and not any(pod.ended() for pod in pods), said()
            time.sleep(0.1)
        script = min(
            pid for pid, line in network.hosts[1].processes().items() if line.startswith(" ".join(train["command"]))
        )
        network.hosts[1].run("kill", "-TERM", str(script))
        assert [pod.wait(timeout=120) for pod in pods] == [75, 75], said()
        assert "training on 2 ranks" in said()
        assert json.loads((run / "status.json").read_text())["state"] == "stopped"
        assert [host.processes() for host in network.hosts] == [{}, {}]
    finally:
        network.close()
