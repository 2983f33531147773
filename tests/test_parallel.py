"""Sequences and batches over several processes: every number equals that of one process."""
import functools
import json
import os
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import psutil
import pytest

import parallel_worker as worker
import train
from local_attention import parallel
from local_attention.parallel import documents

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900  # seconds; a job of two ranks takes ninety if nothing else runs


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(folder, ranks, *command):
    """Start a job of some ranks, which listen only on loopback; return it and the file of its output."""
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1",
                   "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "MS_RETRY_INTERVAL_LOWER": "1",
                   "MS_RETRY_INTERVAL_UPPER": "1", "MS_NODE_TIMEOUT": "5"}
    log = folder / "job.log"
    with open(log, "w") as output:
        job = subprocess.Popen([shutil.which("msrun", path=str(scripts)), f"--worker_num={ranks}",
                                f"--local_worker_num={ranks}", "--master_addr=127.0.0.1",
                                f"--master_port={free_port()}", "--join=True", f"--log_dir={folder / 'logs'}",
                                *map(str, command)], cwd=folder, env=environment, stdout=output, stderr=output)
    return job, log


def finish(job, log, limit=LIMIT):
    """Return the job's status and output. A job that runs longer than the limit is ended."""
    try:
        return job.wait(limit), log.read_text()
    except subprocess.TimeoutExpired:
        for process in (*psutil.Process(job.pid).children(recursive=True), job):
            process.kill()
        job.wait()
        pytest.fail(f"still running after {limit} s:\n{log.read_text()}")


def waited_too_long(folder, output):
    """Whether a job failed only because a rank waited too long: on a busy machine, a collective on CPU gives up after
    ten seconds. No rank has another error, and none was killed."""
    logs = "\n".join(path.read_text() for path in folder.glob("logs/worker_*.log"))
    errors = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b.*", logs, re.MULTILINE)
    return (re.search(r" wait receiving .*failed| CollectiveWait .*failed", logs) is not None
            and "Error code: -" not in output
            and all("RuntimeError: Launch kernel failed" in error or error == "RuntimeError: " for error in errors))


def attempts(folder):
    """Yield a folder with data for a job, and a second one in case the first job waits too long."""
    for name in ("first", "second"):
        (folder / name).mkdir()
        (folder / name / "data").write_text(words())
        yield folder / name


def results_of(parent, ranks, *sections):
    """Return the folder of a job, and what its ranks computed."""
    for folder in attempts(parent):
        status, output = finish(*start(folder, ranks, ROOT / "tests" / "parallel_worker.py", folder, *sections))
        if status == 0 or not waited_too_long(folder, output):
            break
    assert status == 0, output
    return folder, [dict(np.load(folder / f"{rank}.npz")) for rank in range(ranks)]


def joined(parts, how):
    if how == "same":
        for part in parts[1:]:
            np.testing.assert_array_equal(part, parts[0])
        return parts[0]
    if how in ("mean", "sum"):
        return getattr(np, how)(parts, 0)
    return np.concatenate(parts, how)


def assert_equal_to_one_process(parts, ranks, name, mode):
    tolerance = 5e-3 if "float16" in name else 2e-5
    tolerance = 5e-2 if "bfloat16" in name else tolerance
    for key, (how, wanted) in one_process(name, ranks).items():
        if mode == "graph" and key.endswith("/logits"):
            continue  # they would need another graph, and the loss is made from them
        found = joined([part[key.replace("/pynative/", f"/{mode}/")] for part in parts], how)
        assert found.shape == wanted.shape, key
        largest = np.abs(wanted).max()
        if key.endswith("mlp.4.bias"):  # adding one number to all the scores of a head changes nothing
            largest = 1e-2
        assert largest > 3e-6, key
        np.testing.assert_allclose(found, wanted, atol=tolerance * largest + 1e-7, rtol=0, err_msg=key)


@functools.cache
def one_process(name, ranks):
    return worker.compute(name, worker.Place(), "pynative", ranks)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    sections = ("cases", "emulated", "bytes", "refusals", "example", "training", "disagreements", "left padding",
                "model_train")
    return results_of(tmp_path_factory.mktemp("two"), 2, *sections)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    """Run four ranks in a grid, then three of them on their own."""
    return results_of(tmp_path_factory.mktemp("four"), 4, "grid", "cases", "emulated")[1]


@pytest.mark.parametrize("name, mode", worker.runs(2))
def test_two_ranks_equal_one_process(two_ranks, name, mode):
    assert_equal_to_one_process(two_ranks[1], 2, name, mode)


@pytest.mark.more_ranks
@pytest.mark.parametrize("name, mode", worker.runs(3))
def test_three_ranks_equal_one_process(four_ranks, name, mode):
    assert_equal_to_one_process(four_ranks[:3], 3, name, mode)


@pytest.mark.more_ranks
def test_a_grid_of_sequences_and_batches_equals_one_process(four_ranks):
    for mode in worker.MODES:
        for key, (how, wanted) in one_process(worker.GRID, 2).items():
            if mode == "graph" and key.endswith("/logits"):
                continue
            found = [part["grid, " + key.replace("/pynative/", f"/{mode}/")] for part in four_ranks]
            if key.endswith("/loss"):
                found = np.mean(found[::2])  # each half has its own loss; the caller combines them
            elif key.endswith("/logits"):
                found = np.concatenate([joined(found[:2], 1), joined(found[2:], 1)])
            else:
                found = joined(found, how)
            np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max() + 1e-7, err_msg=key)


def test_the_exchange_of_other_platforms_on_two_ranks(two_ranks):
    assert_emulated(two_ranks[1], 2)


@pytest.mark.more_ranks
def test_the_exchange_of_other_platforms_on_three_ranks(four_ranks):
    assert_emulated(four_ranks[:3], 3)


def assert_emulated(parts, ranks):
    for name in worker.EMULATED:
        function, case = worker.CASES[name]
        for key, (how, wanted) in function(name, worker.Place(), "pynative", ranks, **{**case, "n": 15}).items():
            found = joined([part[f"{name}/emulated/{key}"] for part in parts], how)
            np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=f"{name}/{key}")


AGREEMENT = 2 * 4 * 4  # bytes: four numbers of each of two ranks


def test_bytes_do_not_depend_on_the_length(two_ranks):
    heads, batch, halo = worker.B * worker.H, worker.B, worker.W
    keys_and_values = 2 * heads * halo * worker.D * 4
    for part in two_ranks[1]:
        for n in (4 * worker.W, 40 * worker.W):  # to agree, one forward with the mask, and one backward
            assert part[f"bytes/{n}"].tolist() == [3, AGREEMENT + 2 * keys_and_values + batch * halo * 4]


def test_bytes_are_those_of_the_heads_of_keys(two_ranks):
    for part in two_ranks[1]:
        for kv_heads in (8, 2):
            assert part[f"bytes/8 on {kv_heads}"] - AGREEMENT == 2 * 2 * kv_heads * worker.B * worker.W * worker.D * 4


def test_places_in_documents_that_began_ranks_before(monkeypatch):
    random, ranks, n, b = np.random.default_rng(0), 7, 3, 60
    ids = np.repeat(random.integers(-1, 3, (b, ranks * n)), 4, 1)[:, :ranks * n].astype(np.int32)
    ids[:, n:2 * n] = np.where(random.random((b, 1)) < .5, ids[:, n - 1:n], ids[:, n:2 * n])
    slices, edges = [ms.Tensor(part) for part in np.split(ids, ranks, 1)], []
    groups = [parallel.Group("", rank, ranks) for rank in range(ranks)]

    def noted(group, mine):
        edges.append(mine)
        return ms.ops.tile(mine, (1, ranks))

    monkeypatch.setattr(documents, "every_rank", noted)
    for group, part in zip(groups, slices):
        parallel.places(group, part)
    monkeypatch.setattr(documents, "every_rank", lambda group, mine: ms.ops.cat(edges[:ranks], 1))
    found = np.concatenate([parallel.places(group, part).asnumpy() for group, part in zip(groups, slices)], 1)
    wanted = np.zeros_like(ids)
    for i in range(1, ranks * n):
        wanted[:, i] = np.where((ids[:, i] == ids[:, i - 1]) & (ids[:, i] >= 0), wanted[:, i - 1] + 1, 0)
    np.testing.assert_array_equal(found, wanted)
    assert wanted.max() > 2 * n


def test_the_example_learns(two_ranks):
    losses = re.findall(r"loss of 512 tokens (\S+)", (two_ranks[0] / "logs" / "worker_0.log").read_text())
    assert len(losses) == 4 and float(losses[-1]) < float(losses[0]) / 2


def test_model_train_of_the_page_averages_gradients(two_ranks):
    """The ranks see other sequences, and their weights are the same after two steps."""
    parts = two_ranks[1]
    names = [name for name in parts[0] if name.startswith("model_train/")]
    assert not np.array_equal(*(part["model_train/data"] for part in parts)) and len(names) > 5
    for name in names:
        if name != "model_train/data":
            np.testing.assert_array_equal(parts[0][name], parts[1][name], err_msg=name)
    logs = [(two_ranks[0] / "logs" / f"worker_{rank}.log").read_text() for rank in (0, 1)]
    losses = [re.findall(r"loss is (\S+)", log) for log in logs]
    assert [len(each) for each in losses] == [2, 2] and losses[0] != losses[1]


def test_what_the_page_on_scaling_predicts(monkeypatch, capsys):
    page = (ROOT / "docs" / "scaling.md").read_text()
    for settings in ([], re.search(r"`(--token-seconds .*?)`", page).group(1).split()):
        monkeypatch.setattr(sys, "argv", ["scaling.py", "predict", *settings])
        runpy.run_path(str(ROOT / "docs" / "scaling.py"), run_name="__main__")
        assert capsys.readouterr().out in page


WAITED = """\
[ERROR] DISTRIBUTED(8487) [collective_ops_impl.cc:259] ReduceBroadcastAllReduce] Reduce wait receiving [1] failed.
Traceback (most recent call last):
RuntimeError: Launch kernel failed, name:Default/AllReduce-op0
"""


@pytest.mark.parametrize("logs, output, jobs", [
    (["", WAITED.replace("Reduce wait receiving [1]", "CollectiveWait [const pair]")], "", 2),
    (["", WAITED.replace("Error: Launch", "Error: \n- Kernel error:\nLaunch")], "", 2),
    (["", WAITED], "Error code: 1.", 2), ([WAITED, WAITED], "", 2), (["", WAITED], "Error code: -11.", 1),
    (["AssertionError: of our own", WAITED], "", 1), ([WAITED + "ValueError: q"], "", 1), (["", ""], "", 1),
    (["RuntimeError: Launch kernel failed, name:Default/MatMul-op0"], "", 1)])
def test_a_job_that_waited_too_long_is_run_once_more_and_no_other(logs, output, jobs, tmp_path, monkeypatch):
    started = []

    def start(folder, *command):
        started.append(folder)
        (folder / "logs").mkdir()
        for rank, log in enumerate(logs):
            (folder / "logs" / f"worker_{rank}.log").write_text(log)
        return ()

    monkeypatch.setitem(globals(), "start", start)
    monkeypatch.setitem(globals(), "finish", lambda: (1, output))
    with pytest.raises(AssertionError):
        results_of(tmp_path, 2)
    assert len(started) == jobs and all((folder / "data").exists() for folder in started)


# train.py


def words():
    return " ".join(random.Random(0).choices(["def", "return", "attention", "window", "of", "the\n"], k=3000))


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one_with_twice_the_batch(two_ranks, tmp_path, monkeypatch):
    folder, _ = two_ranks
    monkeypatch.chdir(folder)
    train.main([*worker.TINY, "--data", "data", "--batch-size", "6", "--out", str(tmp_path / "one")])
    wanted = records_of(tmp_path / "one")
    assert wanted[0]["loss"] - wanted[-1]["loss"] > 1
    for mode in worker.MODES:  # the second run died and was resumed
        found = records_of(folder / mode)
        assert [record["step"] for record in found] == list(range(1, 21))
        for a, b in zip(found, wanted):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
            assert a.get("validation") == pytest.approx(b.get("validation"), abs=1e-4)
        assert sorted(path.name for path in (folder / mode).iterdir()) == [
            "checkpoint.ckpt", "curve.png", "heads.png", "metrics.jsonl", "settings.json"]


def checkpointed(parent):
    """Return the folder, job and log of a training that is past its first checkpoint, and still runs."""
    settings = [*worker.TINY, "--steps", "100000", "--mode", "pynative"]
    for folder in attempts(parent):
        job, log = start(folder, 2, ROOT / "train.py", *settings, "--data", "data", "--batch-size", "3", "--out", "run")
        limit = time.monotonic() + LIMIT
        while job.poll() is None and time.monotonic() < limit:
            if (folder / "run" / "checkpoint.ckpt").exists():
                return folder, job, log
            time.sleep(0.1)
        _, output = finish(job, log, 0.1)
        if not waited_too_long(folder, output):
            break
    pytest.fail(output)


def test_a_rank_that_is_killed_ends_the_job_and_is_named(tmp_path):
    folder, job, log = checkpointed(tmp_path)
    try:
        process, = (child for parent in psutil.Process(job.pid).children() for child in parent.children()
                    if child.environ().get("RANK_ID") == "1" and child.environ()["MS_ROLE"] == "MS_WORKER")
        process.kill()
        killed = time.monotonic()
    finally:
        status, output = finish(job, log, 60)
    assert status != 0 and time.monotonic() - killed < 60 and not waited_too_long(folder, output)
    assert "train.py: rank 1 was killed by SIGKILL" in (folder / "logs" / "worker_1.log").read_text(), output
    left = [process for process in psutil.process_iter() if process.is_running() and str(tmp_path) in
            " ".join(process.cmdline())]
    assert not left
    values = ms.load_checkpoint(str(folder / "run" / "checkpoint.ckpt"))
    assert int(values["step"].asnumpy()) % 3 == 0
