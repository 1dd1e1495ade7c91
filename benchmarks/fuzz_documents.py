"""python -m benchmarks.fuzz_documents [--documents 5000] [--seed 0] [--seconds 10] [--memory-mib 1024]

Changes documents of every kind at random, with what is known to hurt (a million names in braces, patterns with many
ways, symbols, deep lists, control characters, numbers without end, flipped and missing bytes), and gives each to the
commands that read it, in a process of its own. That must end with status 0, 1 or 2 and without a traceback, within the
seconds of processor time and the memory that are given. Prints counts, and every document that does not; then the
status is 1.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from click.testing import CliRunner

from autotp_plan.planner import compile_plan, presplit
from autotp_plan.planner.cli.main import main as command
from autotp_plan.planner.rules.preset_files import preset_text
from autotp_plan.planner.sequence_parallel import with_sequence_parallel
from autotp_plan.schemas import documents
from autotp_plan.schemas.jobs.job_folder import sealed
from autotp_plan.schemas.jobs.job_manifest import ABOUT_NAME, LATEST_NAME, JobManifest
from autotp_plan.schemas.shards.manifest import MANIFEST_NAME
from autotp_plan.schemas.spec import SpecFile
from tests.helpers.checkpoints import LLAMA_CONFIG, write_llama

MILLION = "{0..999999}"
NASTY: list[Any] = [
    None, True, 0, -1, 1, 3, 64, 65536, 10**6, 2**31, 2**62, 2**64, 10**40, 1.5, 1e308, "", "a", "\x1b[31m", "\u202e",
    "\0", "../x", "/dev/zero", "x" * 5000, MILLION, f"m.{MILLION}.w", "{0..3}", "{", "*", ".**", "a.*.b.*.c", [], {},
    [[]], [0] * 3000, ["a"] * 3000, {"a": {"b": {"c": 1}}}, r"(([a-z_.0-9])+)+!$", r"(.*)*(.*)*(.*)*x$", r"(a|b)*\1",
    ".*" * 50 + "!", "(?:(?:a|b)?){3000}x", "((a{1000}){1000}){1000}", "(" * 500, "hidden_size", "max(s0, s0)",
    "tp_size // 0", "a" * 201, "hidden_size ** 9", "10**10**10", "not not x", "sha256:" + "0" * 64, "BF16", "column",
    "vocab", "error", "uneven",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of document: where it lies, its value, what is run on it, and how its fingerprint is made to fit again."""

    path: Path
    value: Any
    runs: tuple[tuple[str, ...], ...]
    seal: Callable[[Any], Any] | None = None
    as_header: bool = False

    def write(self, text: str) -> None:
        raw = text.encode("utf-8", errors="surrogatepass")
        self.path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(self.num_bytes) if self.as_header else raw)

    @property
    def num_bytes(self) -> int:
        """Of the tensors that an unchanged header describes."""
        return max(one["data_offsets"][1] for name, one in self.value.items() if name != "__metadata__")


def sealed_document(data: Any) -> Any:
    """With a fingerprint that fits, as who wants to deceive would write it."""
    if not isinstance(data, dict):
        return data
    rest = {key: value for key, value in data.items() if key not in ("fingerprint", "verified", "rules")}
    try:
        return {**rest, "fingerprint": documents.fingerprint(rest)}
    except (UnicodeEncodeError, TypeError):
        return data


def kinds(work: Path) -> dict[str, Kind]:
    """A valid document of every kind, with the files that belong to it."""
    llama, several = write_llama(work / "llama"), write_llama(work / "several", num_files=3)
    for name in ("with-config", "with-header"):
        shutil.copytree(llama, work / name)
    preset = json.loads(preset_text("llama"))
    spec_value = {
        **preset,
        "symbols": {**preset["symbols"], "s0": ["hidden_size", "max(s1, s1)"], "s1": "s2 + 1", "s2": 3},
        "module_attributes": [
            {"patterns": [r".*self_attn$"], "attributes": {"heads": "num_attention_heads // tp_size"}}
        ],
        "ignored_tensors": ["model.layers.*.x", "y.**"],
        "ignored_layers": {"model.layers": "num_nextn_predict_layers"},
        "defaults": {**preset["defaults"], "num_nextn_predict_layers": 0},
        "num_layers": "num_hidden_layers",
    }
    left_out = ("$schema", "aliases", "model_types", "deepspeed_presets")
    user = {key: value for key, value in spec_value.items() if key not in left_out}
    plan = compile_plan(llama, tp_size=2, preset="none", specs=[SpecFile.from_dict(user)])
    (work / "plan.json").write_text(plan.to_json())
    presplit(plan, llama, work / "shards", workers=1)
    tag = work / "job" / "step4"
    tag.mkdir(parents=True)
    (tag / "mp_rank_00.pt").write_bytes(bytes(1000))
    about = JobManifest(plan=plan.fingerprint, tp_size=1, dp_size=1, zero_stage=1, position=(0, 4), step=4,
                        client_state=(), files=tuple(sealed(tag, [tag / "mp_rank_00.pt"], 0)))  # fmt: skip
    (tag / ABOUT_NAME).write_text(about.to_json())
    (work / "job" / LATEST_NAME).write_text("step4")
    out, at = str(work / "out.json"), str
    made = ("compile", "--tp", "2", "-o", out, "--model")
    llamas = ("compile", "--tp", "2", "-o", out, "--preset", "llama", "--model")  # nothing is inferred, with torch
    section = {"tensor_parallel": {"autotp_size": 2, "partition_config": {"layer_specs": user["layer_specs"][:3]}},
               "bf16": {"enabled": True}}  # fmt: skip
    rank = {"tp_ranks": [0, 1], "peak": 3, "when": "backward", "at_peak": [{"what": "weights", "bytes": 3}],
            "traffic": [{"operation": "all-reduce", "group": "tensor", "count": 1, "bytes": 2}]}  # fmt: skip
    estimate = {
        "plan": plan.fingerprint,
        "settings": {"memory": 9},
        "measured": True,
        "missing": ["x"],
        "ranks": [rank],
    }
    shards, job, given = work / "shards" / MANIFEST_NAME, tag / ABOUT_NAME, work / "given.json"
    index = several / "model.safetensors.index.json"
    header = (llama / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    config = work / "with-config" / "config.json"
    sharded_stream = with_sequence_parallel(plan).to_dict()
    return {
        "plan": Kind(given, sharded_stream, (("show", at(given)), ("check", at(given), "--checkpoint", at(llama)),
                     ("export", at(given), "--to", "deepspeed"), ("show", at(given), "--html", out, "--svg", out),
                     ("diff", at(work / "plan.json"), at(given))), sealed_document),
        "estimate": Kind(given, estimate, (("show", at(work / "plan.json"), "--html", out, "--estimate", at(given)),)),
        "spec": Kind(given, user, ((*made, at(llama), "--preset", "none", "--spec", at(given)),)),
        "spec beside a preset": Kind(given, user, ((*made, at(llama), "--spec", at(given)),)),
        "ds-config": Kind(given, section, (("compile", "-o", out, "--model", at(llama), "--ds-config", at(given)),)),
        "config": Kind(config, dict(LLAMA_CONFIG), ((*llamas, at(config.parent)),
                       ("check", at(work / "plan.json"), "--checkpoint", at(config.parent)))),
        "index": Kind(index, json.loads(index.read_text()), ((*llamas, at(several)),)),
        "header": Kind(work / "with-header" / "model.safetensors", json.loads(header[8 : 8 + length]),
                       ((*llamas, at(work / "with-header")),), None, True),
        "manifest": Kind(shards, json.loads(shards.read_text()), (("check", at(shards.parent)),), sealed_document),
        "job": Kind(job, json.loads(job.read_text()), (("check", at(work / "job")),), sealed_document),
    }  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a document: the object or list, and the key or number."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        node = pending.pop()
        for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            found.append((node, key))
            pending.append(child)
    return found


def change(value: Any, random: Random) -> Any:
    """A document with one place changed."""
    found = places(value)
    if not found or random.random() < 0.01:
        return copy.deepcopy(random.choice(NASTY))
    node, key = random.choice(found)
    action = random.randrange(7)
    if action == 0:
        del node[key]
    elif action == 1:
        other, at = random.choice(found)
        if at in (other if isinstance(other, dict) else range(len(other))):
            node[key] = copy.deepcopy(other[at])
    elif action == 2 and isinstance(node, dict):
        node[str(random.choice(NASTY))[:200]] = copy.deepcopy(random.choice(NASTY))
    elif action == 3 and isinstance(node, list):
        node += [copy.deepcopy(node[key]) for _ in range(random.choice([1, 2, 50, 500]))]
    elif action == 4 and isinstance(node[key], int):
        node[key] = node[key] * random.choice([-1, 2, 1000, 10**12]) + random.choice([-1, 0, 1])
    elif action == 5 and isinstance(node[key], str):
        at = random.randrange(len(node[key]) + 1)
        node[key] = node[key][:at] + str(random.choice(NASTY))[:3000] + node[key][at:]
    else:
        node[key] = copy.deepcopy(random.choice(NASTY))
    return value


def changed_text(kind: Kind, random: Random) -> str:
    """The text of a changed document; of one in ten the text itself is changed too."""
    value = copy.deepcopy(kind.value)
    for _ in range(random.choice([1, 1, 2, 3, 8])):
        value = change(value, random)
    if kind.seal is not None and random.random() < 0.7:
        value = kind.seal(value)
    text = json.dumps(value)
    if random.random() < 0.1:
        at = random.randrange(len(text) + 1)
        put = random.choice(["", "\0", "{", "[" * 2000, "NaN", '"', ",", "9" * 5000, "\ud800", "\ufeff"])
        text = text[:at] + put + text[at + random.randrange(5) :]
    return text


def run_alone(kind: Kind, report: Path, seconds: int, memory: int) -> str:
    """What came of a document, in a child process: `fine`, or what went wrong."""
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
            faults = []
            for arguments in kind.runs:
                result = CliRunner().invoke(command, list(arguments))
                wrong = result.exception is not None and not isinstance(result.exception, SystemExit)
                if wrong or result.exit_code not in (0, 1, 2) or "Traceback" in result.output:
                    trace = "".join(traceback.format_exception(*result.exc_info)) if result.exc_info else ""
                    faults.append(f"{' '.join(arguments)}\n{trace[-1500:]}")
                elif "\x1b" in result.output:
                    faults.append("a control character was printed")
            report.write_text("\n".join(faults))
        finally:
            os._exit(0)
    deadline = time.monotonic() + 30 * seconds  # of a busy machine; what counts is processor time
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hang: waits without end"
        time.sleep(0.002)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "hang: too much processor time" if number in (signal.SIGXCPU, signal.SIGKILL) else f"signal {number}"
    text = report.read_text() if report.exists() else "no report"
    report.unlink(missing_ok=True)
    return text or "fine"


def fuzz(
    count: int, seed: int, seconds: int, memory: int, keep: Path | None = None
) -> tuple[dict[str, int], list[str]]:
    """Give `count` changed documents to the commands.

    Returns:
        how many of each kind there were, and what went wrong, with the kind and number of the document.
    """
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        every = kinds(work)
        for kind in every.values():  # and import here what each child would
            for text in (json.dumps([]), json.dumps(kind.value)):
                kind.write(text)
                results = [CliRunner().invoke(command, list(arguments)) for arguments in kind.runs]
            assert all(result.exit_code in (0, 1) for result in results), results[0].output
        for number in range(count):
            name = list(every)[number % len(every)]
            kind, random = every[name], Random(f"{seed} {number}")
            text = changed_text(kind, random)
            kind.write(text)
            outcome = run_alone(kind, work / "report", seconds, memory)
            counts[name] += 1
            if outcome != "fine":
                wrong.append(f"{name} {number}: {outcome}")
                if keep is not None:
                    (keep / f"{name.replace(' ', '-')}-{number}.json").write_text(text, errors="surrogatepass")
            kind.write(json.dumps(kind.value))
            if number % 500 == 499:
                print(f"{number + 1} of {count}, {len(wrong)} wrong", file=sys.stderr, flush=True)
    return dict(counts), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--memory-mib", type=int, default=1024)
    parser.add_argument("--keep", type=Path, help="folder for the documents that go wrong")
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    counts, wrong = fuzz(options.documents, options.seed, options.seconds, options.memory_mib << 20, options.keep)
    for line in wrong:
        print(line)
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    print(f"{sum(counts.values())} documents, {len(wrong)} wrong, in {time.monotonic() - started:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
