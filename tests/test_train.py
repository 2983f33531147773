"""train.py: exact resuming, the files of a run, and the messages for wrong options or data."""
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor

import train
from training.data import (
    batches_of, checksum, order_0_entropy, pack, read_documents, rows_of, standard_library, training_batches,
    validation_batches)
from training.folder import read_metrics, taken
from training.pictures import running_mean
from training.settings import make_parser, read_settings, run_folder
from training.trainer import BITS, learning_rate

TINY = ("--dim 16 --depth 1 --heads 2 --dim-head 8 --seq-len 24 --windows 8 --batch-size 3 --grad-accum 2 "
        "--warmup 2 --validate-every 2 --validate-batches 2 --sample-every 4 --sample-len 5 --save-every 3 "
        "--steps 8").split()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Return a compressed file of a few thousand random words."""
    path = tmp_path_factory.mktemp("data") / "words.txt.gz"
    chosen = random.Random(0).choices(["def", "return", "attention", "window", "of", "the\n"], k=3000)
    path.write_bytes(gzip.compress(" ".join(chosen).encode()))
    return str(path)


@pytest.fixture
def run(words, device, tmp_path):
    """Call train.py's main with tiny settings, or with none to resume; return the records of the run so far."""
    def call(out, *arguments):
        settings = [] if "--resume" in arguments else [*TINY, "--data", words, "--device", device]
        train.main([*settings, "--out", str(tmp_path / out), *arguments])
        return [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
    return call


def losses(records):
    return [(record["step"], record["loss"], record.get("validation")) for record in records]


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_resume_is_exact(run, mode, monkeypatch, tmp_path):
    """A run that dies, and is later interrupted, logs bit by bit what an undisturbed run logs, once it is resumed."""
    whole = run("whole", "--mode", mode)

    take_step = train.Trainer.train_step

    def disturbed(trainer, batches):
        loss = take_step(trainer, batches)
        if trainer.step == disturbance[0]:
            disturbance[1]()
        return loss

    def die():
        raise MemoryError

    monkeypatch.setattr(train.Trainer, "train_step", disturbed)
    disturbance = 5, die  # after the checkpoint of step 3, and after step 4 was logged
    with pytest.raises(MemoryError):
        run("parts", "--mode", mode)
    disturbance = 7, lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert losses(run("parts", "--resume")) == losses(whole[:7])
    disturbance = 0, None
    assert losses(run("parts", "--resume")) == losses(whole)
    assert [step for step, _, _ in losses(whole)] == list(range(1, 9))


def test_what_a_run_leaves_behind(run, tmp_path, monkeypatch, capsys):
    records = run("new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "checkpoint.ckpt", "curve.png", "heads.png", "metrics.jsonl", "settings.json"]
    for name in ("curve.png", "heads.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")
    settings = json.loads((tmp_path / "new" / "settings.json").read_text())
    assert settings["seq_len"] == 24 and settings["learning_rate"] == make_parser().get_default("learning_rate")
    assert [record["step"] for record in records if "validation" in record] == [2, 4, 6, 8]
    assert [record["step"] for record in records if "sample" in record] == [4, 8]
    assert np.isfinite([record["loss"] for record in records]).all()
    printed, bar = capsys.readouterr()
    assert "compiling" in bar and "8/8" in bar and "bits=" in bar and "validation bits=" in bar
    assert "order-0 entropy" in printed and records[-1]["sample"] in printed
    with pytest.raises(SystemExit, match="already holds a run"):
        run("new")
    with pytest.raises(SystemExit, match="--seq-len is 24 in the run that --resume continues, and cannot become 48"):
        run("new", "--resume", "--seq-len", "48")
    assert not {"generate", "tokens", "export", "compare"} & set(settings)
    generates_and_compares(tmp_path, monkeypatch, capsys)


def generates_and_compares(tmp_path, monkeypatch, capsys):
    """The run "new" writes text, and its curve is drawn beside another's. (One run serves both tests.)"""
    monkeypatch.chdir(tmp_path)
    new, written = ["--out", str(tmp_path / "new")], []
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()}
    for more in (["def ", "--tokens", "7"], ["def ", "--tokens", "7"], ["def ", "--tokens", "7", "--seed", "3"],
                 [""], ["h\u00e9\udcff", "--tokens", "1", "--temperature", "0.1"]):
        train.main([*new, "--generate", *more])
        written.append(capsys.readouterr().out[:-1])
    assert written[0].startswith("def ") and written[0] == written[1] != written[2]
    assert written[4].startswith("h\u00e9\ufffd")
    assert [len(text) for text in written] == [11, 11, 11, 5, 4]
    for more, message in [(["--generate", "a\ud800"], r"'\\ud800' of 'a\\ud800' is not in the vocabulary"),
                          (["--generate", "a", "--dim", "8"], "--dim is 16 in the run that --generate uses"),
                          (["--generate", "a", "--steps", "9"], "--steps is 8 in the run that --generate uses")]:
        with pytest.raises(SystemExit, match=message):
            train.main([*new, *more])
    with pytest.raises(SystemExit, match="there is nothing to generate with, none/checkpoint.ckpt does not exist"):
        train.main(["--out", "none", "--generate", "a"])
    train.main([*new, "--export", "model.onnx"])
    assert "model.onnx" in capsys.readouterr().out
    vocabulary = json.loads((tmp_path / "model.json").read_text())
    assert vocabulary["vocabulary"] == "bytes" and vocabulary["num_tokens"] == 256
    session = pytest.importorskip("onnxruntime").InferenceSession("model.onnx")
    assert [one.shape for one in session.get_inputs()] == [[1], [1], *vocabulary["rings"]]
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()}

    page = (Path(train.__file__).parent / "docs" / "usage.md").read_text(encoding="utf-8")
    block, = re.findall(r"```text\n(import json\n.*?)```", page, re.DOTALL)
    exec(block.replace("runs/1", "new"), {})
    assert len(capsys.readouterr().out) > 100

    (tmp_path / "other").mkdir()
    for name in ("settings.json", "metrics.jsonl"):
        (tmp_path / "other" / name).write_text((tmp_path / "new" / name).read_text().replace('"dim": 16', '"dim": 8'))
    train.main(["--compare", "new", "other"])
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == "The curves of new, other are in compare.png.\n"
    for more, message in [(["new", "none"], "none holds no run: No such file"),
                          (["new", "--out", "new/a.xyz"], "new/a.xyz cannot be drawn: .* 'xyz' is not supported")]:
        with pytest.raises(SystemExit, match=message):
            train.main(["--compare", *more])


def test_a_checkpoint_that_is_cut_short_takes_nobody_s_place(run, monkeypatch, tmp_path):
    run("cut", "--steps", "3", "--mode", "pynative")
    before = (tmp_path / "cut" / "checkpoint.ckpt").read_bytes()

    def cut_short(network, path, append_dict):
        Path(path).write_bytes(before[:100])
        raise OSError("no space left")

    monkeypatch.setattr(train.ms, "save_checkpoint", cut_short)
    with pytest.raises(OSError):
        run("cut", "--resume", "--steps", "5")
    assert (tmp_path / "cut" / "checkpoint.ckpt").read_bytes() == before
    monkeypatch.undo()
    assert [record["step"] for record in run("cut", "--resume", "--steps", "5")] == [1, 2, 3, 4, 5]


def test_a_line_that_is_cut_short_is_no_record(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl", 5) == [{"step": 1}, {"step": 2}]


def test_a_run_goes_on_with_as_many_processes(run, tmp_path):
    run("alone", "--steps", "3", "--mode", "pynative")
    path = tmp_path / "alone" / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ranks": 2}))
    with pytest.raises(SystemExit, match="2 processes trained the run that --resume continues, and 1 cannot"):
        run("alone", "--resume")


def test_processes_share_the_batches_of_one():
    text = np.tile(np.arange(250, dtype=np.uint8)[:, None], 8)
    ids = text.astype(np.int32) + 100
    one = make_parser().parse_args(["--seq-len", "7", "--grad-accum", "2", "--batch-size", "6"])
    each = make_parser().parse_args(["--seq-len", "7", "--grad-accum", "2", "--batch-size", "2"])
    each.ranks = 3
    for batches, *step in ((training_batches, 3), (validation_batches,)):
        parts = [batches((text, ids), each, *step, rank=rank) for rank in range(3)]
        for number, (_, rows, their_ids) in enumerate(batches((text, ids), one, *step)):
            together = np.concatenate([part[number][1].asnumpy() for part in parts])
            np.testing.assert_array_equal(together, rows.asnumpy())
            np.testing.assert_array_equal(together + 100, their_ids.asnumpy())


def test_steps_can_be_added(run):
    assert [record["step"] for record in run("longer", "--steps", "3", "--mode", "pynative")] == [1, 2, 3]
    assert [record["step"] for record in run("longer", "--resume", "--steps", "5")] == [1, 2, 3, 4, 5]
    with pytest.raises(SystemExit, match="at step 5 already, after --steps 4"):
        run("longer", "--resume", "--steps", "4")


def test_streams_and_global_layers(run):
    records = run("both", "--num-residual-streams", "2", "--global-layers", "1", "--steps", "2", "--mode", "pynative")
    assert np.isfinite([record["loss"] for record in records]).all() and "sample" in records[-1]
    assert len(run("both", "--resume", "--steps", "3", "--sample-len", "1")) == 3
    with pytest.raises(SystemExit, match="--num-residual-streams is 2 in the run that --resume continues"):
        run("both", "--resume", "--num-residual-streams", "1")
    with pytest.raises(SystemExit, match=r"--global-layers is \[1\] in the run that --resume continues"):
        run("both", "--resume", "--global-layers", "1", "1")


@pytest.mark.parametrize("mode", ["graph", "pynative"])
def test_a_step_of_one_batch_is_that_of_several(mode):
    """The same bytes as one batch and as two give the same gradients, and so the same weights after two steps."""
    text = np.random.default_rng(0).integers(0, 256, 500, np.uint8)
    weights = []
    for sizes in (["--batch-size", "4", "--grad-accum", "1"], ["--batch-size", "2", "--grad-accum", "2"]):
        settings, _ = read_settings([*TINY, *sizes, "--mode", mode])
        trainer, rows = train.Trainer(settings), rows_of(text, None, settings)
        before = trainer.model.to_logits[1].weight.asnumpy().copy()
        for step in range(2):
            trainer.train_step(training_batches(rows, settings, step))
        weights.append(trainer.model.to_logits[1].weight.asnumpy())
    assert np.abs(weights[0] - before).max() > 1e-3
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-5)


@pytest.mark.parametrize("batches, ranks", [(2, 1), (1, 2)])
def test_rows_of_other_numbers_of_labels_count_by_their_labels(batches, ranks):
    """Packed rows of 34 and 64 labels: two batches, or those of two processes, are one batch of both rows."""
    settings, _ = read_settings([*TINY, "--packed", "--seq-len", "64", "--mode", "pynative"])
    random = np.random.default_rng(0)
    rows = pack([random.integers(1, 256, size, np.uint8) for size in (35, 65)], 65)
    trainer = train.Trainer(settings)

    def found(chosen):
        parts = [part for rank in range(settings.ranks) for part in batches_of(rows, chosen, settings, rank)]
        losses, gradients = zip(*(trainer.gradients(*part) for part in parts))
        validation = sum(trainer.validate([part]) for part in parts)
        return [np.sum([np.concatenate([x.asnumpy().ravel() for x in each]) for each in gradients], 0),
                sum(map(float, losses)) * BITS, validation]

    gradient, loss, validation = found(np.array([[0, 1]]))
    settings.ranks = ranks
    sums = found(np.array([[0], [1]]) if batches == 2 else np.array([[0, 1]]))
    np.testing.assert_allclose(sums[0] / ranks, gradient, atol=1e-5 * np.abs(gradient).max())
    assert [each / ranks for each in sums[1:]] == pytest.approx([loss, loss], abs=1e-5)
    assert validation == pytest.approx(loss, abs=1e-5) and np.abs(gradient).max() > 1e-3


def test_learning_rate_rises_and_falls():
    settings = make_parser().parse_args(["--steps", "100", "--warmup", "10", "--learning-rate", "1"])
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10] == 1 and rates[100] == pytest.approx(0)
    assert all(np.diff(rates[10:]) < 0)


def test_running_mean():
    assert running_mean([4, 2, 3]) == pytest.approx([4, 2, 3])
    means = running_mean([0, 1] * 50)  # of five values, and of fewer at the start
    assert means[:6] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2, 2 / 5, 3 / 5]) and len(means) == 100


def test_order_0_entropy():
    assert order_0_entropy(np.arange(256, dtype=np.uint8)) == 8
    assert order_0_entropy(np.array([1, 1, 2, 3], np.uint8)) == 1.5
    assert order_0_entropy(np.zeros(9, np.uint8)) == 0


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder(None, False) == Path("runs/1")
    for name in ("9", "10", "mine"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert run_folder(None, False) == Path("runs/11")
    assert run_folder(None, True) == Path("runs/10")
    assert run_folder("mine", True) == Path("mine")


def test_runs_at_once_have_folders_of_their_own(run, monkeypatch, tmp_path):
    """The folder is made before data are read, so a second run takes another one or, of the same name, none."""
    monkeypatch.chdir(tmp_path)
    settings, folder = read_settings([])
    with taken(folder, settings) as first, taken(folder, settings) as second:
        assert [str(first), str(second)] == ["runs/1", "runs/2"] and first.exists() and second.exists()
    assert not (tmp_path / "runs").exists()
    take_step = train.Trainer.train_step

    def meanwhile(trainer, batches):
        if trainer.step == 4:  # after the checkpoint of step 3
            monkeypatch.setattr(train.Trainer, "train_step", take_step)
            for more in ([], ["--resume"]):
                with pytest.raises(SystemExit, match="another train.py writes to .*same|same already holds a run"):
                    run("same", "--mode", "pynative", *more)
        return take_step(trainer, batches)

    monkeypatch.setattr(train.Trainer, "train_step", meanwhile)
    assert len(run("same", "--mode", "pynative")) == 8


def test_runs_are_no_text(run, monkeypatch, tmp_path):
    """Trained on the folder that it is in, a run reads the files that were there before, then and when resumed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("round and round it goes, " * 40)
    here = [*TINY, "--data", ".", "--mode", "pynative", "--steps"]
    train.main([*here, "1", "--out", "mine"])
    train.main([*here, "1"])
    train.main(["--resume", "--steps", "2"])
    checksums = [json.loads((tmp_path / folder / "settings.json").read_text())["text_checksum"]
                 for folder in ("mine", "runs/1")]
    assert checksums == [checksum(read_documents("text", 24))] * 2
    with pytest.raises(SystemExit, match="--data .*mine lies in the run's folder .*mine, whose files are no text"):
        train.main([*TINY, "--data", "mine", "--out", "mine", "--resume"])


def test_a_text_that_has_changed_is_not_resumed(run, tmp_path):
    text, same = tmp_path / "text", tmp_path / "same"
    text.write_text("round and round it goes, " * 40)
    run("short", "--data", str(text), "--steps", "1", "--mode", "pynative")
    same.write_bytes(text.read_bytes())
    assert len(run("short", "--resume", "--steps", "2", "--data", str(same))) == 2
    same.write_text("round and round it goes, " * 39 + "round and round it went, ")
    with pytest.raises(SystemExit, match="the text of .*same is not that of the run that --resume continues; name the"):
        run("short", "--resume", "--steps", "3")


def test_folder_is_read_in_order_without_what_is_not_text(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_bytes(b"second" * 50)
    (tmp_path / "1.txt.gz").write_bytes(gzip.compress(b"first" * 50))
    (tmp_path / "a.png").write_bytes(b"\0" * 500)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden").write_bytes(b"hidden" * 50)
    training, validation = read_documents(str(tmp_path), seq_len=8)
    assert [each.tobytes() for each in training] == [b"first" * 50, (b"second" * 50)[:-55]]
    assert [each.tobytes() for each in validation] == [(b"second" * 50)[-55:]]


def test_standard_library_is_found():
    names = {path.name for path in standard_library()}
    assert {"argparse.py", "gzip.py"} <= names
    assert "conftest.py" not in names


def test_batches_depend_on_seed_and_step_alone():
    text = np.arange(250, dtype=np.uint8)

    def batches(step, seed="0"):
        settings = make_parser().parse_args(["--seq-len", "7", "--grad-accum", "2", "--seed", seed])
        rows = rows_of(text, None, settings)
        return np.stack([batch.asnumpy() for _, batch in training_batches(rows, settings, step)])

    assert batches(3).shape == (2, 4, 8)
    assert (np.diff(batches(3)) == 1).all()
    assert (batches(3) == batches(3)).all()
    assert (batches(3) != batches(4)).any() and (batches(3) != batches(3, "1")).any()


def test_packed_rows_hold_every_byte_once_and_cut_no_document_that_fits():
    random = np.random.default_rng(0)
    documents = [random.integers(1, 256, size, np.uint8) for size in (0, 1, 2, 3, 5, 7, 8, 9, 14, 15, 16, 23, 40, 6, 1)]
    rows, ids = pack(documents, 8)
    assert rows.shape == ids.shape and rows.shape[1] == 8
    pieces = [row[own == number].tobytes() for row, own in zip(rows, ids) for number in range(own.max() + 1)]
    assert (rows[ids == -1] == 0).all() and (ids[rows > 0] >= 0).all()
    assert (np.diff(ids, axis=1)[ids[:, 1:] >= 0] >= 0).all()
    wanted = [document[start:start + 8].tobytes() for document in documents for start in range(0, len(document) - 1, 7)]
    assert sorted(pieces) == sorted(wanted)  # each byte after a document's first is predicted once
    assert sum(len(piece) - 1 for piece in pieces) == sum(max(len(document) - 1, 0) for document in documents)
    alone = sum(len(piece) > 6 for piece in pieces)  # no other piece fits beside these
    assert len(rows) <= alone + -(-sum(len(piece) for piece in pieces if len(piece) <= 6) // 6)


def test_a_packed_run_predicts_each_document_as_if_it_were_alone(run, tmp_path):
    for number in range(40):
        (tmp_path / "many" / str(number)).mkdir(parents=True)
        (tmp_path / "many" / str(number) / "text").write_text(random.Random(number).choice("abc") * (5 + number))
    packed = "--data", str(tmp_path / "many"), "--packed", "--steps", "3", "--batch-size", "2"
    records = run("packed", *packed)
    assert run("packed", "--resume", "--steps", "5")[:3] == records
    settings, _ = read_settings([*TINY, *packed])
    trainer = train.Trainer(settings)
    _, documents = read_documents(settings.data, settings.seq_len)
    rows = rows_of(np.concatenate(documents), documents, settings)
    assert len(rows[0]) < len(documents)
    total, count = 0., 0
    for document in documents:
        for piece in pack([document], 25)[0]:
            piece = piece[piece > 0][None].astype(np.int32)
            total += float(trainer._loss(Tensor(piece))) * (piece.size - 1)
            count += piece.size - 1
    settings.batch_size, settings.validate_batches = len(rows[0]), 1
    assert trainer.validate(validation_batches(rows, settings)) == pytest.approx(total / count * BITS)


def test_windows_by_layer_and_fewer_heads_of_keys(run):
    layers = "--depth", "3", "--windows", "8", "none", "4", "--kv-heads", "1"
    records = run("layers", *layers, "--steps", "2", "--mode", "pynative")
    assert np.isfinite([record["loss"] for record in records]).all()
    assert len(run("layers", "--resume", "--steps", "3", "--windows", "8", "none", "4")) == 3
    with pytest.raises(SystemExit, match=r"--windows is \[8, None, 4\] in the run that --resume continues"):
        run("layers", "--resume", "--windows", "none")
    model = train.Trainer(read_settings([*TINY, *layers])[0]).model
    assert [layer[0].attn_fn.spec.backward for layer in model.layers][::2] == [8, 4]
    assert model.layers[1][0].attn_fn.spec.span(23) == (0, 23) and model.layers[0][0].kv_heads == 1


def test_a_run_of_settings_that_are_none_here_is_not_resumed(run, tmp_path):
    run("before", "--steps", "1", "--mode", "pynative")
    path = tmp_path / "before" / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "window_size": 8}))
    with pytest.raises(SystemExit, match="another version of train.py wrote .*settings.json, .* window_size, which"):
        run("before", "--resume")


@pytest.mark.parametrize("content, message", [
    (None, "does not exist"),
    (b"too short", "holds 9 bytes of text, but --seq-len 24 needs more than 250"),
])
def test_wrong_data(content, message, tmp_path, run):
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        run("none", "--data", str(path))
    assert not (tmp_path / "none").exists()


def test_broken_gz(tmp_path):
    (tmp_path / "data.gz").write_bytes(b"not compressed")
    with pytest.raises(SystemExit, match="data.gz cannot be read"):
        read_documents(str(tmp_path / "data.gz"), seq_len=8)


@pytest.mark.parametrize("arguments, message", [
    (["--unknown", "1"], "unrecognized arguments: --unknown 1"),
    (["--step", "1"], "unrecognized arguments: --step 1"),
    (["--steps", "0"], "invalid positive int value: '0'"),
    (["--learning-rate", "nan"], "invalid positive float value: 'nan'"),
    (["--device", "TPU"], "invalid choice: 'TPU'"),
    (["--windows", "8", "0"], "invalid window value: '0'"),
    (["--export", "a.pb"], "--export wants a file whose name ends in .onnx"),
    (["--tokens", "5"], "--tokens says how many bytes --generate adds, and needs it"),
    (["--resume", "--generate", "a"], "--generate, --export, --compare and --resume exclude each other"),
])
def test_wrong_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        read_settings(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--dim-head", "7"], "'dim_head' must be even"),
    (["--global-layers", "1", "2"], "'layers_insert_global_attn' must be .* from 1 to 1, but got 2"),
    (["--seed", "-1"], "seed"),
    (["--windows", "8", "none"], "'local_attn_window_size' must be an int or a tuple of 1, one for each layer"),
    (["--kv-heads", "3"], "'kv_heads' must be a divisor of the 2 heads, but got 3"),
])
def test_what_the_model_refuses(arguments, message, tmp_path, run):
    with pytest.raises(SystemExit, match=message):
        run("none", *arguments)
    assert not (tmp_path / "none").exists()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(SystemExit, match="nothing to resume"):
        read_settings(["--resume", "--out", str(tmp_path)])


def test_a_message_is_one_line_and_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, train.__file__, "--data", "missing.txt"], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parent)})
    assert done.returncode == 1
    assert done.stderr == "train.py: --data missing.txt does not exist.\n"
    assert not list(tmp_path.iterdir())


def test_sample_cannot_control_a_terminal():
    assert train.printable(b"a\n\tb\x1b[2J\xff") == "a\n\tb\ufffd[2J\ufffd"
