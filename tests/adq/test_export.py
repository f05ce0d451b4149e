"""`adq-search export` as a user meets it, and adq.quantize with the bits that it writes."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import pytest
import tiny_task
import torch
from torch import nn

import adq
from adq.cli import main
from adq.quant.apply import bits_of
from adq.quant.evaluate import evaluate
from adq.quant.modules import original_weight, weight_quantizer


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Terminal:
    """Runs commands in one folder, in this process: imports are paid once."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def __call__(self, *arguments: str) -> Done:
        self.monkeypatch.setattr(sys, "argv", ["adq-search", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = self.capsys.readouterr()
        return Done(int(stopped.value.code or 0), printed.out, printed.err)

    def refused(self, *arguments: str) -> str:
        """The one line of an error that a user can mend."""
        done = self(*arguments)
        assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done
        assert done.err.startswith("error: ")
        return done.err


@pytest.fixture
def terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return Terminal(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study with input bits, `runs/done`."""
    folder = tmp_path_factory.mktemp("study")
    adq.search(
        "tiny_task:make_task",
        adq.Budget(bits=3.5),
        bits=(2, 4),
        act_bits=(4,),
        trials=3,
        epochs=1,
        final_epochs=1,
        device="cpu",
        study="done",
        out=str(folder / "runs"),
    )
    return folder


@pytest.fixture
def there(terminal: Terminal, study: Path) -> Terminal:
    shutil.copytree(study / "runs", terminal.folder / "runs")
    return terminal


def front_of(there: Terminal) -> dict:
    return json.loads((there.folder / "runs/done/front.json").read_text())


def edit_front(there: Terminal, **changes: object) -> None:
    path = there.folder / "runs/done/front.json"
    path.write_text(json.dumps(front_of(there) | changes))


def exported(there: Terminal, *arguments: str) -> dict:
    done = there("export", *arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_the_packed_file_is_copied_whole_and_told_in_numbers(there: Terminal) -> None:
    front = front_of(there)
    for id in (front["best"], "uniform-2"):
        told = exported(there, "done", "--point", id)
        point = next(p for p in front["points"] + front["uniform"] if p["id"] == id)
        written = there.folder / f"done-{id}.safetensors"
        kept = there.folder / "runs/done" / point["weights"]
        assert written.read_bytes() == kept.read_bytes()
        assert (told["file"], told["format"], told["point"]) == (written.name, "adq", id)
        assert told["size_bytes"] == written.stat().st_size
        assert told["budget_bytes"] == point["size_bytes"]
        fp32 = tiny_task.TinyNet().state_dict().values()
        assert told["fp32_bytes"] == sum(v.numel() * v.element_size() for v in fp32)


@pytest.mark.parametrize("format", ["adq", "onnx", "torch"])
def test_a_written_model_computes_what_the_packed_one_does(there: Terminal, format: str) -> None:
    told = exported(there, "done", "--format", format, "--out", "model.bin")["compared"]
    task = tiny_task.make_task()
    x = torch.cat([inputs for inputs, _ in task.validation])
    packed = adq.load("runs/done", tiny_task.TinyNet(), kernels="torch")
    with torch.no_grad():
        expected = packed(x)
    if format == "onnx":
        session = onnxruntime.InferenceSession("model.bin")
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    elif format == "torch":
        found = torch.export.load(str(there.folder / "model.bin")).module()(x)
    else:
        found = adq.load("model.bin", tiny_task.TinyNet())(x)
    # 600 input values a sample may lie at a threshold, where rounding decides the level: see
    # load_packed_; on this fixed data none does
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert told["samples"] == 300  # the first batch is all of it
    assert told["max_difference"] == pytest.approx((found - expected).abs().max().item(), abs=1e-5)
    assert told["largest_output"] == pytest.approx(expected.abs().max().item())
    assert told["same_predictions"] == 1.0
    whole = evaluate(packed, task.validation, task.loss, task.metric).metric
    assert told["metric"] == told["packed_metric"] == pytest.approx(whole)


def test_text_names_file_sizes_and_errors(there: Terminal) -> None:
    done = there("export", "done", "--format", "onnx", "--point", "best")
    size = (there.folder / "done-best.onnx").stat().st_size
    assert f"done-best.onnx: onnx of {front_of(there)['best']}, {size} bytes" in done.out
    assert "against the budget's count" in done.out
    assert "of FP32's" in done.out
    assert "largest difference of outputs" in done.out
    assert "100.0% equal predictions" in done.out


def test_a_packed_file_is_enough(there: Terminal) -> None:
    shutil.move(there.folder / "runs/done/best.safetensors", there.folder / "mine.safetensors")
    shutil.rmtree(there.folder / "runs")
    told = exported(there, "mine.safetensors", "--format", "onnx")
    assert told["file"] == "mine.onnx"
    assert (told["point"], told["budget_bytes"]) == (None, None)
    assert told["compared"]["same_predictions"] == 1.0
    exported(there, "mine.safetensors", "--format", "bits")
    assert adq.BitVector.load("mine.bits.json").weight
    assert "holds one model only" in there.refused("export", "mine.safetensors", "--point", "knee")
    assert "name another one with --out" in there.refused("export", "mine.safetensors")


def test_bits_are_those_of_the_point_packed_or_not(there: Terminal) -> None:
    front = front_of(there)
    point = front["points"][0]
    exported(there, "done", "--format", "bits", "--point", point["id"], "--out", "b.json")
    expected = adq.BitVector(point["weight_bits"], point["act_bits"])
    assert adq.BitVector.load("b.json") == expected
    unpacked = [p | {"weights": None} for p in front["points"]]
    edit_front(there, points=unpacked, split="validation")
    exported(there, "done", "--format", "bits", "--point", point["id"], "--out", "c.json")
    assert adq.BitVector.load("c.json") == expected
    line = there.refused("export", "done", "--point", point["id"])
    assert "is not packed yet" in line
    assert "'adq-search resume done'" in line
    assert not list(there.folder.glob("*.safetensors"))


def test_policies_are_written_with_what_their_reader_should_know(there: Terminal) -> None:
    done = there("export", "done", "--format", "modelopt")
    assert "mtq.quantize(model, json.load(open('done-best.modelopt.json'))" in done.out
    assert "learned codebooks" in done.out
    best = next(p for p in front_of(there)["points"] if p["id"] == front_of(there)["best"])
    entries = json.loads((there.folder / "done-best.modelopt.json").read_text())["quant_cfg"]
    bits = {e["quantizer_name"]: e["cfg"]["num_bits"] for e in entries[1:]}
    assert bits == {
        **{f"{name}.weight_quantizer": b for name, b in best["weight_bits"].items()},
        **{f"{name}.input_quantizer": b for name, b in best["act_bits"].items()},
    }
    for format in ("nncf", "torchao"):
        assert f"format {format}: " in there.refused("export", "done", "--format", format)
    assert not list(there.folder.glob("*.nncf.json"))


def test_the_knee_and_models_that_are_not_there(there: Terminal) -> None:
    front = front_of(there)
    edit_front(there, points=front["points"][:1])
    assert "does not bend anywhere" in there.refused("export", "done", "--point", "knee")
    line = there.refused("export", "done", "--point", "t9999")
    assert f"expected best, knee or one of {front['points'][0]['id']}, uniform-" in line
    ends = [(0.3, 1000.0, 2.0), (0.8, 2000.0, 2.2), (0.9, 9000.0, 3.4)]
    bent = [
        front["points"][0]
        | {"id": f"t{i}", "validation_metric": m, "size_bytes": int(s), "average_bits": b}
        for i, (m, s, b) in enumerate(ends)
    ]
    edit_front(there, points=bent)
    assert exported(there, "done", "--point", "knee", "--format", "bits")["point"] == "t1"
    assert (there.folder / "done-knee.bits.json").exists()


def test_a_missing_or_damaged_model_is_one_line_and_no_file(there: Terminal) -> None:
    front = front_of(there)
    best = next(p for p in front["points"] if p["id"] == front["best"])
    path = there.folder / "runs/done" / best["weights"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for format in ("adq", "onnx", "modelopt"):
        assert "checksum" in there.refused("export", "done", "--format", format)
    path.unlink()
    assert "'adq-search resume done' makes it again" in there.refused("export", "done")
    (there.folder / "runs/done/front.json").unlink()
    assert "has no front yet" in there.refused("export", "done")
    assert "no study 'other' in runs; there are: done" in there.refused("export", "other")
    assert "format: expected one of adq, onnx" in there.refused("export", "done", "--format", "x")
    assert not [p for p in there.folder.iterdir() if p.name != "runs"]


def test_where_the_study_is_and_where_the_file_goes(there: Terminal) -> None:
    (there.folder / "runs").rename(there.folder / "elsewhere")
    bits = ("--format", "bits")
    assert exported(there, "done", *bits, "--out", "elsewhere")["file"] == "done-best.bits.json"
    exported(there, "elsewhere/done", *bits, "--out", "one.json")
    target = there.folder / "one.json"
    first = hashlib.sha256(target.read_bytes()).hexdigest()
    target.write_text("old")
    done = there("--out", "elsewhere", "export", "done", *bits, "--out", str(target))
    assert done.code == 0
    assert hashlib.sha256(target.read_bytes()).hexdigest() == first  # written over
    line = there.refused("export", "elsewhere/done", *bits, "--out", "no/such.json")
    assert "cannot write no/such.json" in line


def test_a_task_given_in_python_leaves_the_copy_and_the_bits(
    terminal: Terminal,
) -> None:
    adq.search(
        tiny_task.make_task(), adq.Budget(bits=3.5), out="runs", study="own", bits=(2, 4), trials=1,
        epochs=0, final_epochs=0, device="cpu",
    )  # fmt: skip
    told = exported(terminal, "own")
    assert told["compared"] is None
    assert "it was given in Python" in told["notes"][0]
    assert exported(terminal, "own", "--format", "bits")["size_bytes"] > 0
    assert "format onnx needs the task" in terminal.refused("export", "own", "--format", "onnx")


@pytest.mark.parametrize("made_by", ["the study", "export"])
def test_a_bits_file_trains_in_a_plain_pytorch_loop(there: Terminal, made_by: str) -> None:
    path = "runs/done/best.bits.json"
    if made_by == "export":
        path = exported(there, "done", "--format", "bits")["file"]
    task = tiny_task.make_task()
    torch.manual_seed(0)
    plain = task.model()
    model = adq.quantize(plain, path, task.train)
    best = next(p for p in front_of(there)["points"] if p["id"] == front_of(there)["best"])
    assert bits_of(model) == adq.BitVector(best["weight_bits"], best["act_bits"])
    layers = [model.get_submodule(name) for name in best["weight_bits"]]
    weights = [original_weight(layer).detach().clone() for layer in layers]
    levels = [weight_quantizer(layer).levels.clone() for layer in layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        total = 0.0
        for inputs, targets in task.train:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            adq.update_codebooks(model)
            optimizer.step()
            total += loss.item()
        losses.append(total)
    assert losses[-1] < losses[0]
    for layer, weight in zip(layers, weights, strict=True):
        assert not torch.equal(original_weight(layer), weight)
    moved = [
        not torch.equal(weight_quantizer(layer).levels, before)
        for layer, before in zip(layers, levels, strict=True)
    ]
    # 8-bit codebooks of a few dozen weights keep their levels: see update_codebooks
    assert any(moved)
    assert all(len(row.unique()) <= 2**b for layer, b in zip(layers, best["weight_bits"].values(),
               strict=True) for row in layer.weight)  # fmt: skip


def test_bits_files_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    task, path = tiny_task.make_task(), tmp_path / "bits.json"
    model = task.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def refused(content: str | None) -> str:
        if content is not None:
            path.write_text(content)
        with pytest.raises(adq.InputError) as error:
            adq.quantize(model, str(path), task.train)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert f"{path}: not a readable bit-vector file" in refused(None)
    assert f"{path}: not a readable bit-vector file" in refused("{")
    assert "expected a JSON object with 'weight_bits'" in refused("[3]")
    assert "layer 'conv9', which TinyNet does not have" in refused('{"weight_bits": {"conv9": 3}}')
    assert "is a BatchNorm2d; quantizable are" in refused('{"weight_bits": {"bn1": 3}}')
    assert "expected a whole number from 2 to 8, got 9" in refused('{"weight_bits": {"out": 9}}')
    assert "expected schema 'adq-bits/1', got 'x'" in refused('{"schema": "x", "weight_bits": {}}')
    path.write_text('{"weight_bits": {"out": 3}, "act_bits": {"out": 3}}')
    with pytest.raises(adq.InputError, match="need batches to calibrate"):
        adq.quantize(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
