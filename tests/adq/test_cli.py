"""The command line as a user meets it: results on stdout, one line and exit code 2 on bad input."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from wsgiref.util import setup_testing_defaults

import optuna_dashboard
import pytest
from optuna.storages import RDBStorage

from adq.cli import main
from adq.search.config import StudyConfig

TESTS = Path(__file__).parents[1] / "support"
QUICK = [
    "--task", "tiny_task:make_task", "--bits", "2,4", "--trials", "3", "--epochs", "1",
    "--final-epochs", "1", "--device", "cpu",
]  # fmt: skip


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Terminal:
    """Runs commands in one folder, in this process: imports are paid once."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def __call__(self, *arguments: str) -> Done:
        self.monkeypatch.setattr(sys, "argv", ["adq-search", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = self.capsys.readouterr()  # type: ignore[attr-defined]
        return Done(int(stopped.value.code or 0), printed.out, printed.err)

    def refused(self, *arguments: str) -> str:
        """The one line of an error that a user can mend."""
        done = self(*arguments)
        lines = [line for line in done.err.splitlines() if not line.startswith("[")]
        assert (done.code, done.out, len(lines)) == (2, "", 1), done
        assert lines[0].startswith("error: ")
        return lines[0]


@pytest.fixture
def terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return Terminal(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished study, `runs/done`, made by the real command."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(TESTS / "tiny_task.py", folder)
    command = [Path(sys.executable).with_name("adq-search"), "--budget-bits", "3.5", *QUICK]
    done = subprocess.run(
        [*command, "--study", "done", "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "printed.json").write_text(done.stdout)
    (folder / "progress.txt").write_text(done.stderr)
    return folder


@pytest.fixture
def with_study(terminal: Terminal, finished: Path) -> Terminal:
    shutil.copytree(finished / "runs", terminal.folder / "runs")
    return terminal


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its content; locks are empty and come and go."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['adq-search', '--help']\n"
        "from adq.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'optuna', 'ray', 'sklearn', 'vl_convert', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in (
        "resume",
        "list",
        "show",
        "pareto",
        "compare",
        "sensitivity",
        "--budget-bits",
        "--act-bits",
    ):
        assert word in done.stdout


def test_importing_adq_loads_nothing_heavy() -> None:
    code = "import sys, adq; assert not {'torch', 'optuna', 'ray', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_prints_the_front_as_json_and_progress_as_plain_lines(finished: Path) -> None:
    printed = json.loads((finished / "printed.json").read_text())
    assert printed == json.loads((finished / "runs/done/front.json").read_text())
    progress = (finished / "progress.txt").read_text()
    assert "search 3/3" in progress
    assert "best so far" in progress
    assert "\x1b" not in progress  # no terminal, no escape codes


def test_show_and_list_name_the_study_and_its_best_point(with_study: Terminal) -> None:
    front = json.loads((with_study.folder / "runs/done/front.json").read_text())
    shown = json.loads(with_study("show", "done", "--json").out)
    assert shown["status"] == "finished"
    assert shown["front"] == front
    assert shown["best"] == front["best"]
    assert json.loads(with_study("list", "--json").out) == [
        {"study": "done", "task": "tiny_task:make_task", "status": "finished"}
    ]
    text = with_study("show", "done").out
    for point in front["points"]:
        assert point["id"] in text
        assert f"{point['metric']:.4f} ± {point['metric_stderr']:.4f}" in text
    assert f"{front['fp32_metric']:.4f}" in text
    assert "uniform-4" in text


def test_the_studies_folder_may_stand_before_or_behind_the_subcommand(
    with_study: Terminal,
) -> None:
    os.rename(with_study.folder / "runs", with_study.folder / "elsewhere")
    assert "done" in with_study("list", "--out", "elsewhere").out
    assert "done" in with_study("--out", "elsewhere", "list").out
    assert "done" not in with_study("list").out
    by_path = with_study("show", "elsewhere/done", "--json")
    assert json.loads(by_path.out)["study"] == "done"
    front = with_study("--out", "elsewhere", "pareto", "done").out
    assert front == with_study("pareto", "done", "--out", "elsewhere").out
    assert json.loads(front)["study"] == "done"


@pytest.mark.parametrize("format", ["json", "csv", "png", "html"])
def test_pareto_writes_what_the_study_holds(with_study: Terminal, format: str) -> None:
    target = with_study.folder / f"written.{format}"
    done = with_study("pareto", "done", "--format", format, "--out", str(target))
    assert (done.code, done.out) == (0, "")
    name = "report.html" if format == "html" else f"front.{format}"
    kept = with_study.folder / "runs/done" / name
    if format in ("json", "csv"):
        assert target.read_bytes() == kept.read_bytes()
    else:
        assert target.read_bytes()[:8] == kept.read_bytes()[:8]


def test_pareto_of_a_study_given_by_its_path_writes_the_file(with_study: Terminal) -> None:
    path, target = with_study.folder / "runs/done", with_study.folder / "f.csv"
    done = with_study("pareto", str(path), "--format", "csv", "--out", str(target))
    assert (done.code, done.out) == (0, "")
    assert target.read_bytes() == (path / "front.csv").read_bytes()


@pytest.mark.parametrize("content", ["[]", "3", '{"points": [{"id": "x"}]}', '{"schema": "x/1"}'])
@pytest.mark.parametrize("name", ["results.json", "front.json"])
def test_json_of_another_shape_is_no_traceback(
    with_study: Terminal, name: str, content: str
) -> None:
    (with_study.folder / "runs/done" / name).write_text(content)
    assert with_study("list").code == 0
    if name == "front.json":
        assert "front.json" in with_study.refused("pareto", "done")
    else:
        assert with_study("pareto", "done").code == 0  # results.json only says that it is finished


def test_a_front_of_an_older_version_is_named(with_study: Terminal) -> None:
    old = {"schema": "adq-front/1", "study": "done", "points": []}
    (with_study.folder / "runs/done/front.json").write_text(json.dumps(old))
    for command in ("show", "pareto"):
        line = with_study.refused(command, "done")
        assert "expected schema adq-front/2, got 'adq-front/1'" in line


def test_pareto_under_tighter_budgets_holds_the_models_within_and_names_the_best(
    with_study: Terminal,
) -> None:
    path = with_study.folder / "runs/done/front.json"
    data = json.loads(path.read_text())
    cheap = data["points"][0]
    dear = cheap | {"id": "dear", "average_bits": 3.49, "validation_metric": 2.0, "weights": None}
    path.write_text(json.dumps(data | {"points": [cheap, dear]}))
    limit = str(cheap["average_bits"])
    done = with_study("pareto", "done", "--budget-bits", limit)
    front = json.loads(done.out)
    assert (front["points"], front["best"]) == ([cheap], cheap["id"])
    assert front["budget"] == {"average_bits": cheap["average_bits"]}
    assert f"best within these budgets: {cheap['id']}, runs/done/{cheap['weights']}" in done.err
    done = with_study("pareto", "done", "--budget-size-mb", "1", "--format", "csv")
    assert len(done.out.splitlines()) == 3
    assert "best within these budgets: dear, not packed" in done.err
    assert "no model of study 'done' is within it" in with_study.refused(
        "pareto", "done", "--budget-gbops", "1e-9"
    )


def another(with_study: Terminal, **changes: object) -> None:
    """A study `again`, with a front that differs by `changes`."""
    runs = with_study.folder / "runs"
    shutil.copytree(runs / "done", runs / "again")
    path = runs / "again/front.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"study": "again"} | changes))


@pytest.mark.parametrize("format", ["json", "csv", "png", "html"])
def test_compare_prints_the_hypervolumes_and_writes_the_comparison(
    with_study: Terminal, format: str
) -> None:
    another(with_study)
    target = with_study.folder / f"both.{format}"
    done = with_study("compare", "done", "runs/again", "--out", str(target))
    front = json.loads((with_study.folder / "runs/done/front.json").read_text())
    assert done.code == 0
    assert done.out.count(f"{front['hypervolume']['value']:.4f}") == 2
    assert "hypervolumes up to accuracy 0 and 3.85 bits a weight" in done.out
    content = target.read_bytes()
    start = {"png": b"\x89PNG", "csv": b"study,id,", "json": b"{", "html": b"<!doctype html>"}
    assert content.startswith(start[format])


def test_compare_as_json_and_in_another_folder(with_study: Terminal) -> None:
    another(with_study)
    os.rename(with_study.folder / "runs", with_study.folder / "elsewhere")
    done = with_study("compare", "done", "again", "--json", "--out", "elsewhere")
    assert [s["study"] for s in json.loads(done.out)["studies"]] == ["done", "again"]


def test_compare_refuses_in_one_line(with_study: Terminal) -> None:
    another(with_study, task="other")
    assert "their task differs" in with_study.refused("compare", "done", "again")
    assert "expected 2 to" in with_study.refused("compare", "done")
    assert "no study 'nix'" in with_study.refused("compare", "done", "nix")
    refused = with_study.refused("compare", "done", "again", "--out", "both.pdf")
    assert "expected a file that ends in .json, .csv, .png, .html, got 'both.pdf'" in refused


def test_a_partial_front_is_shown_as_what_it_is(with_study: Terminal) -> None:
    """As Ctrl-C leaves it: validation metrics, and nothing packed."""
    path = with_study.folder / "runs/done/front.json"
    data = json.loads(path.read_text())
    points = [point | {"weights": None} for point in data["points"]]
    path.write_text(json.dumps(data | {"split": "validation", "points": points, "uniform": []}))
    (with_study.folder / "runs/done/results.json").unlink()
    shown = with_study("show", "done")
    assert shown.code == 0
    assert "partial: stopped before the final training, reported on validation" in shown.out
    assert "validation accuracy" in shown.out
    assert "not packed" in shown.out
    assert json.loads(with_study("show", "done", "--json").out)["front"]["split"] == "validation"


def test_optuna_dashboard_shows_named_objectives_and_readable_parameters(
    with_study: Terminal,
) -> None:
    folder = with_study.folder / "runs/done"
    storage = RDBStorage(f"sqlite:///{folder}/study.db")
    application = optuna_dashboard.wsgi(storage)

    def get(path: str) -> bytes:
        environ: dict[str, Any] = {}
        setup_testing_defaults(environ)
        answers: list[str] = []
        body = application(environ | {"PATH_INFO": path}, lambda status, *_: answers.append(status))
        assert answers == ["200 OK"]
        return b"".join(body)

    (summary,) = json.loads(get("/api/studies"))["study_summaries"]
    assert summary["study_name"] == "done"
    study = json.loads(get(f"/api/studies/{summary['study_id']}"))
    assert study["objective_names"] == ["accuracy", "average_bits"]
    assert study["directions"] == ["maximize", "minimize"]
    records = {p.stem: json.loads(p.read_text()) for p in (folder / "trials").iterdir()}
    assert {f"{trial['number']:04d}" for trial in study["trials"]} == set(records)
    for trial in study["trials"]:
        record = records[f"{trial['number']:04d}"]
        for parameter in trial["params"]:
            kind, _, layer = parameter["name"].partition(":")
            assert kind == "weight"
            assert parameter["param_external_value"] == str(record["bits"]["weight_bits"][layer])
        assert trial["params"]
        metric, bits = record["validation"]["metric"], record["costs"]["average_bits"]
        assert trial["values"] == [metric, bits]
    storage.engine.dispose()


def test_a_text_for_a_number_in_front_json_is_damage(with_study: Terminal) -> None:
    path = with_study.folder / "runs/done/front.json"
    front = json.loads(path.read_text())
    front["points"][0]["metric"] = "abc"
    path.write_text(json.dumps(front))
    for arguments in (["show", "done"], ["pareto", "done", "--format", "html"]):
        assert "is damaged" in with_study.refused(*arguments)


def test_what_a_task_prints_is_no_result(terminal: Terminal) -> None:
    shutil.copy(TESTS / "tiny_task.py", terminal.folder)
    lines = ["import tiny_task", "def make_task():", "    print('hello')"]
    loud = "\n".join([*lines, "    return tiny_task.make_task()"])
    (terminal.folder / "loud.py").write_text(loud)
    options = ["--task", "loud:make_task", "--bits", "2,4", "--trials", "1", "--device", "cpu"]
    quick = ["--epochs", "0", "--final-epochs", "0", "--fp32-epochs", "0", "--json"]
    done = terminal("--budget-bits", "3.5", *options, *quick)
    assert json.loads(done.out)["study"] == "loud-1"
    assert "hello" in done.err


def test_a_refused_extension_leaves_the_finished_study_as_it_was(with_study: Terminal) -> None:
    before = fingerprint(with_study.folder / "runs/done")
    with_study.monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(TESTS)])
    with_study.monkeypatch.delitem(sys.modules, "tiny_task")
    with_study.refused("resume", "done", "--trials", "9")  # its task is not in this folder
    assert fingerprint(with_study.folder / "runs/done") == before
    assert json.loads(with_study("list", "--json").out)[0]["status"] == "finished"


def test_a_name_taken_in_the_folder_leaves_nothing_in_a_shared_storage(
    with_study: Terminal,
) -> None:
    shutil.copy(TESTS / "tiny_task.py", with_study.folder)
    storage = f"sqlite:///{with_study.folder}/shared.db"
    options = [*QUICK, "--budget-bits", "3.5", "--study", "done", "--storage", storage]
    assert "exists already" in with_study.refused(*options)
    assert with_study(*options, "--out", "elsewhere").code == 0


def test_resuming_a_finished_study_trains_nothing_again(with_study: Terminal) -> None:
    records = with_study.folder / "runs/done"
    before = {p: p.stat().st_mtime_ns for p in records.rglob("*/*.json")}
    done = with_study("resume", "done", "--json")
    assert done.code == 0
    assert json.loads(done.out) == json.loads((records / "front.json").read_text())
    assert before == {p: p.stat().st_mtime_ns for p in records.rglob("*/*.json")}


def test_a_finished_study_can_be_extended(with_study: Terminal) -> None:
    folder = with_study.folder / "runs/done"
    shutil.copy(TESTS / "tiny_task.py", with_study.folder)
    before = fingerprint(folder / "trials")
    assert with_study("resume", "done", "--trials", "4").code == 0
    after = fingerprint(folder / "trials")
    assert before.items() <= after.items()
    assert len(after) == 4
    assert "expected at least as many" in with_study.refused("resume", "done", "--trials", "3")


def test_sensitivity_gives_every_layer_and_leaves_no_study(terminal: Terminal) -> None:
    shutil.copy(TESTS / "tiny_task.py", terminal.folder)
    options = ["--task", "tiny_task:make_task", "--bits", "2,4", "--device", "cpu"]
    done = terminal("sensitivity", *options, "--json")
    assert done.code == 0
    proxies = {p["proxy"]: p for p in json.loads(done.out)["proxies"]}
    assert set(proxies) == set(StudyConfig().proxy_names)
    assert all(p["unit"] == "expected loss increase" for p in proxies.values())
    layers = proxies[StudyConfig().proxy_names[0]]["weight"]["layers"]
    assert [p.name for p in (terminal.folder / "runs").iterdir()] == [".cache"]
    text = terminal("sensitivity", *options).out
    assert all(layer in text for layer in layers)
    for name in ("scores.csv", "scores.json", "scores.png"):
        assert terminal("sensitivity", name, *options).code == 0
    content = {name: (terminal.folder / name).read_bytes() for name in
               ("scores.csv", "scores.json", "scores.png")}  # fmt: skip
    assert content["scores.png"].startswith(b"\x89PNG")
    lines = content["scores.csv"].decode().splitlines()
    assert len(lines) == 1 + sum(len(p["weight"]["layers"]) * len(p["weight"]["bits"])
                                 for p in proxies.values())  # fmt: skip
    again = json.loads(content["scores.json"])["proxies"]
    assert [p["weight"] for p in again] == [p["weight"] for p in proxies.values()]
    assert "ends in .csv, .json or .png" in terminal.refused("sensitivity", "scores.txt", *options)


def test_a_study_file_gives_options_and_an_option_overrides_it(terminal: Terminal) -> None:
    shutil.copy(TESTS / "tiny_task.py", terminal.folder)
    lines = [
        'task = "tiny_task:make_task"', "budget-bits = 3.5", "bits = [2, 4]", "trials = 9",
        "epochs = 0", "final-epochs = 0", 'study = "from-file"', 'device = "cpu"',
    ]  # fmt: skip
    (terminal.folder / "study.toml").write_text("\n".join(lines))
    assert terminal("--config", "study.toml", "--trials", "2").code == 0
    assert len(list((terminal.folder / "runs/from-file/trials").iterdir())) == 2
    resolved = (terminal.folder / "runs/from-file/study.toml").read_text()
    assert "trials = 2" in resolved
    assert terminal("show", "from-file").code == 0


BAD_INPUT = {
    "no budget": ([], r"no budget.*--budget-bits"),
    "unknown task": (["--task", "nothing", "--budget-bits", "3"], "unknown task 'nothing'.*digits"),
    "no module": (["--task", "nowhere:make", "--budget-bits", "3"], "no module 'nowhere'"),
    "task raises": (
        ["--task", "bad:raises", "--budget-bits", "3"],
        r"failed: RuntimeError: no data today \(.*bad.py:\d+\)",
    ),
    "loss raises": (
        ["--task", "bad:loss_raises", "--budget-bits", "3"],
        r"FP32 training: KeyError: 'gone' \(.*bad.py:\d+\)",
    ),
    "NaN loss": (["--task", "bad:nan_loss", "--budget-bits", "3"], "loss became nan in epoch 1"),
    "NaN metric": (["--task", "bad:nan_metric", "--budget-bits", "3"], "the metric is nan"),
    "task exits": (["--task", "bad:leaves", "--budget-bits", "3"], "failed: SystemExit: 0"),
    "model raises": (["--task", "bad:no_model", "--budget-bits", "3"], "ZeroDivisionError"),
    "budget too small": (
        ["--task", "bad:good", "--budget-bits", "1.5"],
        r"budget-bits 1.5 is below the smallest reachable.* reaches [\d.]+ to [\d.]+$",
    ),
    "budget too large": (
        ["--task", "bad:good", "--budget-bits", "9"],
        "budget-bits 9 is above the largest reachable",
    ),
    "size too small": (
        ["--task", "bad:good", "--budget-size-mb", "0.000001"],
        "budget-size-mb 1e-06 is below the smallest reachable",
    ),
    "negative budget": (["--budget-bits", "-1"], "budget-bits.*expected a positive number"),
    "no number": (["--budget-bits", "many"], "budget-bits"),
    "bits out of range": (["--budget-bits", "3", "--bits", "1,2"], "bits: expected.*got '1,2'"),
    "no CUDA": (
        ["--task", "bad:good", "--budget-bits", "3", "--device", "cuda"],
        "device cuda: no CUDA device",
    ),
    "unknown device": (
        ["--task", "bad:good", "--budget-bits", "3", "--device", "tpu9"],
        "device: expected cpu, cuda",
    ),
    "unknown option": (["--buget-bits", "3"], "No such option: --buget-bits"),
    "folder under a file": (
        ["--task", "bad:good", "--budget-bits", "3", "--out", "bad.py/runs"],
        "cannot create a study in bad.py/runs",
    ),
    "storage": (
        ["--task", "bad:good", "--budget-bits", "3", "--storage", "sqlite:////no/such/f.db"],
        "storage sqlite:////no/such/f.db cannot be used",
    ),
    "study name": (["--budget-bits", "3", "--study", "a/b"], "study: expected a plain name"),
    "existing study": (
        ["--task", "bad:good", "--budget-bits", "3", "--study", "done"],
        "study 'done' exists already",
    ),
    "no study file": (["--config", "none.toml"], "cannot read study file none.toml"),
    "unknown key": (["--config", "key.toml"], r"key.toml: unknown key 'budget_bits'; did you mean"),
    "wrong value": (["--config", "value.toml"], "value.toml: key 'trials': expected a whole"),
    "no TOML": (["--config", "bad.py"], "bad.py is not valid TOML"),
    "no weights": (
        ["--task", "bad:good", "--budget-bits", "3", "--weights", "bad.py"],
        "weights bad.py: not a state dict",
    ),
    "missing study": (["resume", "nothing"], "no study 'nothing' in runs; there are: done"),
    "show missing": (["show", "nothing"], "no study 'nothing'"),
    "pareto format": (["pareto", "done", "--format", "pdf"], "format: expected one of json"),
    "pareto target": (
        ["pareto", "done", "--out", "bad.py/front.json"],
        "cannot write bad.py/front.json",
    ),
    "misplaced option": (["--trials", "3", "list"], "options before 'list': only --out"),
}

BAD_TASKS = """
from dataclasses import replace
import torch
from tiny_task import make_task as good

def raises():
    raise RuntimeError("no data\\ntoday")

def loss_raises():
    return replace(good(), loss=lambda o, t: {}["gone"])

def nan_loss():
    return replace(good(), loss=lambda o, t: o.sum() * torch.nan)

def no_model():
    return replace(good(), model=lambda: 1 // 0)

def nan_metric():
    return replace(good(), metric=lambda o, t: o[:, 0] * torch.nan)

def leaves():
    raise SystemExit(0)
"""


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line_and_changes_nothing(case: str, with_study: Terminal) -> None:
    shutil.copy(TESTS / "tiny_task.py", with_study.folder)
    (with_study.folder / "bad.py").write_text(BAD_TASKS)
    (with_study.folder / "key.toml").write_text("budget_bits = 3\n")
    (with_study.folder / "value.toml").write_text('budget-bits = 3\ntrials = "many"\n')
    with_study.monkeypatch.delitem(sys.modules, "bad", raising=False)
    before = fingerprint(with_study.folder / "runs/done")
    arguments, message = BAD_INPUT[case]
    line = with_study.refused(*arguments)
    assert re.search(message, line), line
    assert fingerprint(with_study.folder / "runs/done") == before


@pytest.mark.parametrize("argument", ["resume", "show", "pareto"])
@pytest.mark.parametrize("name", ["study.toml", "front.json", "results.json", "study.db"])
def test_a_damaged_study_is_named_and_left_as_it_is(
    with_study: Terminal, name: str, argument: str
) -> None:
    shutil.copy(TESTS / "tiny_task.py", with_study.folder)
    (with_study.folder / "runs/done" / name).write_bytes(b"\x00garbage\xff" * 300)
    before = fingerprint(with_study.folder / "runs/done")
    if argument == "resume" and name in ("front.json", "results.json"):
        assert with_study("resume", "done").code == 0  # remade from the records
        return
    if (argument, name) in (
        ("show", "study.db"),
        ("pareto", "study.db"),
        ("pareto", "results.json"),
    ):
        assert with_study(argument, "done").code == 0  # not needed to show a front
        return
    assert "done" in with_study.refused(argument, "done")
    assert fingerprint(with_study.folder / "runs/done") == before


def test_a_profile_is_a_table_that_a_search_can_take(terminal: Terminal) -> None:
    sys.path.append(str(TESTS))
    done = terminal("profile", "times.json", "--task", "tiny_task:make_task", "--bits", "4,8",
                    "--first-last-bits", "0", "--repeats", "5", "--device", "cpu")  # fmt: skip
    assert done.code == 0, done.err
    table = json.loads((terminal.folder / "times.json").read_text())
    assert table["schema"] == "adq-latency/2"
    assert table["entries"]
    assert "use it with --latency times.json" in done.out
    assert "ends in .json" in terminal.refused("profile", "times.txt")


def test_a_latency_budget_holds_and_is_shown(terminal: Terminal) -> None:
    sys.path.append(str(TESTS))
    code = "def seconds(layer, weight_bits, act_bits):\n    return weight_bits * 1e-6\n"
    (terminal.folder / "my_times.py").write_text(code)
    done = terminal(
        *QUICK, "--budget-latency-ms", "0.025", "--latency", "my_times:seconds", "--json"
    )
    assert done.code == 0, done.err
    front = json.loads(done.out)
    assert front["points"]
    for point in front["points"]:
        expected = sum(point["weight_bits"].values()) * 1e-6
        assert point["latency_s"] == pytest.approx(expected)
        assert expected <= 0.025e-3
    shown = terminal("show", "tiny_task-1")
    assert " ms " in shown.out
