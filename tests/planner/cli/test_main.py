"""The command: exit status 0 or 2, a message that says what to do, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autotp_plan.planner import cli
from autotp_plan.planner.cli.main import main
from autotp_plan.schemas import documents
from autotp_plan.schemas.plan.document import Plan
from autotp_plan.schemas.shards.manifest import Manifest
from tests.helpers.checkpoints import LLAMA_CONFIG, write_checkpoint, write_llama

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the command in-process; the paths it is given may be relative to `tmp_path`."""

    def invoke(*arguments: Any, status: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == status, result.output
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama")


@pytest.fixture
def plan_file(run: Run, llama: Path, tmp_path: Path) -> Path:
    run("compile", "--model", llama, "--tp", 2, "-o", tmp_path / "plan.json")
    return tmp_path / "plan.json"


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_compile_check_presplit_and_show_work_on_each_others_files(run: Run, llama: Path, tmp_path: Path) -> None:
    plan_file, shards = tmp_path / "plan.json", tmp_path / "shards"
    result = run("compile", "--model", llama, "--tp", 2, "-o", plan_file)
    assert result.stdout.startswith(f"{plan_file}: 21 parameters at TP=2; ")
    result = run("check", plan_file, "--checkpoint", llama)
    assert result.stdout == f"{plan_file}: the plan is sound and {llama} holds what it says\n"
    assert run("check", plan_file).stdout == f"{plan_file}: the plan is sound\n"
    result = run("presplit", plan_file, "--checkpoint", llama, "-o", shards)
    assert f"{shards}: 5 files" in result.stdout
    assert Manifest.read(shards).tp_size == 2
    assert run("presplit", plan_file, "--checkpoint", llama, "-o", tmp_path / "b", "--quiet").output == ""


def test_show_as_a_table(run: Run, plan_file: Path) -> None:
    output = run("show", plan_file).stdout
    assert "LlamaForCausalLM at TP=2, 21 parameters" in output
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in output.splitlines() if line.strip()}
    assert lines["model.layers.{0..1}."] == "", "a heading, and the names of its rows without it"
    assert lines["self_attn.k_proj.weight"] == "16 x 32 column 1/2 of dim 0 1.00 KiB preset llama #2"
    assert lines["lm_head.weight"].startswith("64 x 32 column, gathered 1/2 of dim 0 2.00 KiB")
    assert "replicated: 320 B on every rank" in output


def test_show_as_json_is_a_contract(run: Run, plan_file: Path) -> None:
    shown = json.loads(run("show", plan_file, "--format", "json").stdout)
    assert shown.keys() == {"tp_size", "parameters"}
    assert shown["tp_size"] == 2
    assert len(shown["parameters"]) == 21
    for entry in shown["parameters"]:
        assert list(entry) == ["name", "shape", "dtype", "style", "rule", "dim", "intervals"]
    by_name = {entry["name"]: entry for entry in shown["parameters"]}
    assert by_name["model.layers.0.mlp.down_proj.weight"] == {
        "name": "model.layers.0.mlp.down_proj.weight", "shape": [32, 48], "dtype": "BF16", "style": "row",
        "rule": "preset llama #5", "dim": 1, "intervals": [[[0, 24]], [[24, 48]]],
    }  # fmt: skip
    assert by_name["model.norm.weight"] == {
        "name": "model.norm.weight", "shape": [32], "dtype": "BF16", "style": "replicated",
        "rule": "default for 1-D", "dim": None, "intervals": [[[0, 32]], [[0, 32]]],
    }  # fmt: skip


def test_markup_in_names_is_shown_as_it_is(run: Run, tmp_path: Path) -> None:
    """Square brackets and colons are no markup of the table."""
    names = ["a[/b].w", "[bold]x.w", ":smile:.w"]
    config = {"architectures": ["[/Model]"], "model_type": "[red]"}
    folder = write_checkpoint(tmp_path / "odd", dict.fromkeys(names, (2,)), config)
    run("compile", "--model", folder, "--tp", 2, "-o", tmp_path / "plan.json")
    output = run("show", tmp_path / "plan.json").stdout
    assert all(name in output for name in [*names, "[/Model]"])


def test_the_same_command_writes_the_same_bytes(run: Run, llama: Path, plan_file: Path, tmp_path: Path) -> None:
    run("compile", "--model", llama, "--tp", 2, "-o", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == plan_file.read_bytes()


def test_the_first_spec_file_decides_before_later_ones_and_the_deepspeed_config(
    run: Run, llama: Path, tmp_path: Path
) -> None:
    for name, pattern in (("a", "gate"), ("b", "(gate|up)"), ("c", "down")):
        spec = {"layer_specs": [{"patterns": [f".*{pattern}_proj.weight"], "partition_type": "skip"}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(spec))
    section = {"autotp_size": 2, "keep_module_on_host": True}
    (tmp_path / "ds.json").write_text(json.dumps({"tensor_parallel": section}))
    specs = [part for name in "abc" for part in ("--spec", tmp_path / f"{name}.json")]
    plan_file = tmp_path / "plan.json"
    result = run("compile", "--model", llama, "--ds-config", tmp_path / "ds.json", "-o", plan_file, *specs)
    assert "note: keep_module_on_host is not applied" in result.stderr
    decided = {entry.name.split(".")[-2]: str(entry.rule) for entry in Plan.read(plan_file).parameters}
    assert (decided["gate_proj"], decided["up_proj"]) == ("spec file 1 #1", "spec file 2 #1")


def test_faults_of_all_files_are_told_together(run: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"layer_spec": []}')
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "ds.json").write_text('{"tensor_parallel": {"autotp_sise": 2}}')
    before = files_of(tmp_path)
    result = run("compile", "--model", llama, "--tp", 2, "-o", tmp_path / "plan.json", "--spec", tmp_path / "a.json",
                 "--spec", tmp_path / "b.json", "--ds-config", tmp_path / "ds.json", status=2)  # fmt: skip
    assert result.stdout == ""
    for part in (f"{tmp_path / 'a.json'}: layer_spec", 'did you mean "layer_specs"?', "the spec file is not JSON",
                 'did you mean "autotp_size"?', "3 errors; nothing was written"):  # fmt: skip
        assert part in result.stderr
    assert files_of(tmp_path) == before


def test_a_compile_that_fails_writes_nothing(run: Run, llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    output.write_text("old")
    before = files_of(tmp_path)
    result = run("compile", "--model", llama, "--tp", 5, "-o", output, status=2)
    assert "TP sizes that work for the whole model: 1, 2, 4" in result.stderr
    assert result.stdout == ""
    assert (files_of(tmp_path), output.read_text()) == (before, "old")


LONG = "x" * 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "--model", "{llama}", "--tp", "2", "-o", "{tmp}/no/plan.json"], "the file cannot be written"),
        (["compile", "--model", "{llama}", "--tp", "2", "-o", "{llama}"], "the file cannot be written"),
        (["compile", "--model", "{llama}", "--tp", "2", "-o", f"{{tmp}}/{LONG}"], "File name too long"),
        (["compile", "--model", f"{{tmp}}/{LONG}", "--tp", "2", "-o", "{tmp}/x"], "File name too long"),
        (["compile", "--model", "{llama}", "--tp", "2", "-o", "{tmp}/x", "--spec", LONG], "File name too long"),
        (["compile", "--model", "{tmp}/none", "--tp", "2", "-o", "{tmp}/x"], "there is no safetensors checkpoint here"),
        (["compile", "--model", "{plan}", "--tp", "2", "-o", "{tmp}/x"], "there is no safetensors checkpoint here"),
        (["compile", "--model", "{llama}", "-o", "{tmp}/x"], "the TP size is missing"),
        (["compile", "--model", "{llama}", "--tp", "0", "-o", "{tmp}/x"], "the TP size makes no sense"),
        (["compile", "--model", "{llama}", "--tp", "two", "-o", "{tmp}/x"], "'two' is not a valid integer"),
        (["compile", "--model", "{llama}", "--tp", "2"], "Missing option '-o'"),
        (
            ["compile", "--model", "{llama}", "--tp", "2", "-o", "{tmp}/x", "--preset", "bert"],
            "there is no such preset",
        ),
        (
            ["compile", "--model", "{llama}", "--tp", "2", "-o", "{tmp}/x", "--spec", "{tmp}/none"],
            "cannot read the spec",
        ),
        (
            ["compile", "--model", "{llama}", "--tp", "2", "-o", "{tmp}/x", "--ds-config", "{llama}"],
            "cannot read the Deep",
        ),
        (["show", "{tmp}/none.json"], "cannot read the plan"),
        (["show", "{llama}/config.json"], "the plan lacks a key"),
        (["show", "{llama}/model.safetensors"], "the plan is not JSON"),
        (["show", "{plan}", "--format", "yaml"], "'yaml' is not one of 'table', 'json'"),
        (["check", "{tmp}"], "cannot read the plan"),
        (["check", "{plan}", "--checkpoint", "{tmp}"], "there is no safetensors checkpoint here"),
        (["presplit", "{plan}", "--checkpoint", "{llama}", "-o", "{llama}"], "a folder that is not empty"),
        (["presplit", "{plan}", "--checkpoint", "{tmp}/none", "-o", "{tmp}/x"], "there is no safetensors checkpoint"),
        (["presplit", "{plan}", "--checkpoint", "{llama}", "-o", "{tmp}/x", "--workers", "0"], "positive numbers"),
        (["presplit", "{plan}", "--checkpoint", "{llama}", "-o", f"{{tmp}}/{LONG}"], "File name too long"),
        (["frobnicate"], "No such command"),
    ],
)
def test_a_users_mistake_is_told_and_changes_nothing(
    run: Run, plan_file: Path, llama: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    before = files_of(tmp_path)
    filled = [argument.format(llama=llama, tmp=tmp_path, plan=plan_file) for argument in arguments]
    result = run(*filled, status=2)
    assert message in result.stderr
    assert result.stdout == ""
    assert files_of(tmp_path) == before


def test_a_plan_of_another_checkpoint_is_refused_and_nothing_is_written(
    run: Run, plan_file: Path, tmp_path: Path
) -> None:
    other = write_llama(tmp_path / "other", num_hidden_layers=3, intermediate_size=96)
    before = files_of(tmp_path)
    for command in (["check", plan_file, "--checkpoint", other],
                    ["presplit", plan_file, "--checkpoint", other, "-o", tmp_path / "out"]):  # fmt: skip
        result = run(*command, status=2)
        assert "model.layers.{0..1}.mlp.down_proj.weight" in result.stderr
        assert "the checkpoint has a tensor that the plan does not know" in result.stderr
    assert files_of(tmp_path) == before


def test_a_plan_that_was_changed_by_hand_is_refused(run: Run, plan_file: Path) -> None:
    plan_file.write_text(plan_file.read_text().replace('"tp_size": 2', '"tp_size": 3'))
    for command in (["show"], ["check"]):
        assert "the plan was changed after it was compiled" in run(*command, plan_file, status=2).stderr


def test_an_error_of_the_operating_system_is_a_message_without_traceback(
    run: Run, plan_file: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root no permission is missing, so that the refusal is made up."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(llama))

    monkeypatch.setattr(Path, "exists", refuse)
    result = run("check", plan_file, "--checkpoint", llama, status=2)
    assert "the operating system refused" in result.stderr
    assert str(llama) in result.stderr


# as a process


def command(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "autotp_plan.planner.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False, **options,
    )  # fmt: skip


def test_exit_status_and_streams_of_the_installed_command(plan_file: Path, llama: Path, tmp_path: Path) -> None:
    done = command("show", plan_file)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 200
    failed = command("compile", "--model", llama, "--tp", 3, "-o", tmp_path / "x")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "error: a weight cannot be split evenly over the ranks" in failed.stderr
    assert "\x1b" not in failed.stderr, "no colours in a pipe"
    assert command("--version").stdout.startswith("autotp-plan")
    assert "presplit" in command("--help").stdout


def test_a_closed_pipe_ends_the_command_in_silence(plan_file: Path) -> None:
    """`autotp-plan show plan.json --format json | head -1`."""
    shell = f"{sys.executable} -m autotp_plan.planner.cli.main show {plan_file} --format json | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""


def test_an_interrupted_process_leaves_no_plan(llama: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {"w": (2,)}, LLAMA_CONFIG)
    reader, writer = os.pipe()
    output = tmp_path / "plan.json"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "autotp_plan.planner.cli",
            "compile",
            "--model",
            str(folder),
            "--tp",
            "2",
            "-o",
            str(output),
            "--spec",
            f"/dev/fd/{reader}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[reader],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what it starts with &
    )
    pipe = Path(f"/proc/self/fd/{reader}").readlink()
    opened = Path(f"/proc/{process.pid}/fd")
    for _ in range(3000):  # until the process has opened the pipe too, and waits
        if [link for link in opened.iterdir() if link.is_symlink() and link.readlink() == pipe][1:]:
            break
        time.sleep(0.01)
    process.send_signal(2)
    _, stderr = process.communicate(timeout=30)
    os.close(reader)
    os.close(writer)
    assert process.returncode == 1
    assert "Aborted!" in stderr
    assert not output.exists()


def test_a_fingerprint_is_of_the_contents(plan_file: Path) -> None:
    data = json.loads(plan_file.read_text())
    fingerprint = data.pop("fingerprint")
    assert documents.fingerprint(data) == fingerprint


def test_a_table_in_a_pipe_is_never_cut(run: Run, tmp_path: Path) -> None:
    """A long name, a shape and a unit are there in full: what a pipe is read by has no width."""
    folder = tmp_path / "long"
    name = "model.layers.0." + "a_very_long_module_name_." * 8
    shapes = {f"{name}{leaf}.weight": (64, 64) for leaf in ("up", "down", "other")}
    write_checkpoint(folder, shapes, config={})
    spec = tmp_path / "spec.json"
    rules = [{"patterns": [".*up\\.weight$"], "partition_type": "column", "unit": 8}]
    rules += [{"patterns": [".*down\\.weight$"], "partition_type": "row", "unit": 8}]
    rules += [{"patterns": [".*other\\.weight$"], "partition_type": "skip"}]
    spec.write_text(json.dumps({"layer_specs": rules}))
    run("compile", "--model", folder, "--tp", 2, "--preset", "none", "--spec", spec, "-o", tmp_path / "long.json")
    shown = run("show", tmp_path / "long.json").stdout
    (line,) = [line for line in shown.splitlines() if "up.weight" in line]
    assert name.removeprefix("model.layers.0.") + "up.weight" in line
    assert all(cell in line for cell in ("64 x 64", "column", "1/2 of dim 0", "spec file #1"))
    assert f"computed in full on every rank: {name}other" in shown


def test_what_is_computed_in_full_is_named_by_the_largest_module(run: Run, tmp_path: Path) -> None:
    shapes = {
        "model.tower.layers.0.fc.weight": (4, 4), "model.tower.layers.1.fc.weight": (4, 4), "model.tower.n.bias": (4,),
        "model.text.0.mlp.up.weight": (4, 4), "model.text.0.mlp.gate.weight": (4, 4), "model.text.0.mlp.n.weight": (4,),
        "model.text.0.mlp.gathered.weight": (4, 4), "model.text.0.mlp.down.weight": (4, 4),
    }  # fmt: skip
    write_checkpoint(tmp_path / "model", shapes, config={})
    rules = [
        {"patterns": [".*up\\.weight$"]},
        {"patterns": [".*down\\.weight$"], "partition_type": "row"},
        {"patterns": [".*gathered\\.weight$"], "gather_output": True},
        {"patterns": [".*(tower|gate).*weight$"], "partition_type": "skip"},
    ]
    (tmp_path / "spec.json").write_text(json.dumps({"layer_specs": rules}))
    plan = tmp_path / "plan.json"
    arguments = ("--preset", "none", "--spec", tmp_path / "spec.json", "-o", plan)
    run("compile", "--model", tmp_path / "model", "--tp", 2, *arguments)
    shown = run("show", plan).stdout.splitlines()
    assert "computed in full on every rank: model.text.0.mlp.gate, model.tower" in shown
    assert "gathered, so that what follows is computed in full on every rank: model.text.0.mlp.gathered" in shown
    assert not [line for line in run("show", plan, "--format", "json").stdout.splitlines() if "in full" in line]


def test_unequal_shares_are_advised_only_where_they_help(run: Run, llama: Path, tmp_path: Path) -> None:
    """8 heads on 3 ranks may be unequal, on 64 they may not; nor is it advised to who asked for them."""
    three, many = (("compile", "--model", llama, "--tp", n, "-o", tmp_path / "plan.json") for n in (3, 64))
    assert "--uneven" in run(*three, status=2).output
    run(*three, "--uneven")
    assert "--uneven" not in run(*many, status=2).output
    assert "--uneven" not in run(*many, "--uneven", status=2).output


def test_a_plan_is_not_written_over_a_pipe_or_a_link(run: Run, llama: Path, tmp_path: Path) -> None:
    pipe, link, target = tmp_path / "pipe", tmp_path / "link.json", tmp_path / "target.json"
    os.mkfifo(pipe)
    link.symlink_to(target)
    refused = run("compile", "--model", llama, "--tp", 2, "-o", pipe, status=2)
    assert "no plain file" in refused.output and pipe.is_fifo()
    run("compile", "--model", llama, "--tp", 2, "-o", link)
    assert link.is_symlink() and Plan.read(target).tp_size == 2


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model.safetensors"])
def test_a_file_of_a_checkpoint_that_is_a_pipe_is_not_waited_for(
    run: Run, llama: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(llama, tmp_path / "folder")
    (folder / name).unlink(missing_ok=True)
    if name.endswith("index.json"):  # of the two, model.safetensors would be read
        (folder / "model.safetensors").unlink()
    os.mkfifo(folder / name)
    refused = run("compile", "--model", folder, "--tp", 2, "-o", tmp_path / "new.json", status=2).output
    assert name in refused
    assert name.endswith("safetensors") or "no plain file" in refused


@pytest.mark.timeout(60)
def test_a_document_that_is_a_pipe_is_not_waited_for(run: Run, llama: Path, plan_file: Path, tmp_path: Path) -> None:
    pipe, new = tmp_path / "pipe", tmp_path / "new.json"
    os.mkfifo(pipe)
    given = ("compile", "--model", llama, "--tp", 2, "-o", new)
    for arguments in (
        ("show", pipe),
        ("check", pipe),
        ("export", pipe, "--to", "deepspeed"),
        ("presplit", pipe, "--checkpoint", llama, "-o", tmp_path / "shards"),
        (*given, "--spec", pipe),
        (*given, "--ds-config", pipe),
    ):
        refused = run(*arguments, status=2).output
        assert "no plain file" in refused and "write what it gives to a file" in refused
    assert not new.exists()


def test_a_plan_is_printed_where_standard_output_is_asked_for(run: Run, llama: Path, plan_file: Path) -> None:
    for output in ("-", "/dev/stdout"):
        result = run("compile", "--model", llama, "--tp", 2, "-o", output)
        assert result.stdout == plan_file.read_text()
        assert "21 parameters at TP=2" in result.stderr
    printed = run("export", plan_file, "--to", "deepspeed").stdout
    assert run("export", plan_file, "--to", "deepspeed", "-o", "-").stdout == printed


def test_export_and_infer_do_not_replace_a_pipe(run: Run, plan_file: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused = run("export", plan_file, "--to", "deepspeed", "-o", pipe, status=2)
    assert "no plain file" in refused.output and pipe.is_fifo() and "`-o -` prints it" in refused.output


def test_one_file_of_the_command_prints() -> None:
    """What is printed elsewhere would not be made visible first."""
    folder = Path(cli.__path__[0])
    printing = {path.name for path in folder.glob("*.py") if "click.echo" in path.read_text()}
    assert printing == {"output.py"}
    assert all(
        "visible" in line for line in (folder / "main.py").read_text().splitlines() if "console.print(line" in line
    )


def test_names_of_a_checkpoint_do_not_act_on_the_terminal(run: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "own", {"\x1b[31mup.weight": (4, 4)}, {"model_type": "own"})
    output = tmp_path / "plan.json"
    refused = run("compile", "--model", folder, "--tp", 2, "-o", output, status=2)
    (tmp_path / "spec.json").write_text(json.dumps({"layer_specs": [{"patterns": [".*"], "partition_type": "skip"}]}))
    run("compile", "--model", folder, "--tp", 2, "--spec", tmp_path / "spec.json", "-o", output)
    for text in (refused.output, run("show", output).output):
        assert "\\x1b[31mup.weight" in text and "\x1b" not in text
