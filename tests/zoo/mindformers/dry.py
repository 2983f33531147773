"""Compiles training steps of mindformers in MindSpore's dry run, one for each way to be parallel, and checks that the
attention of a rank has its share of rows, heads and queries, the keys that they see, and no collective but the halo.

    python dry.py FOLDER [case ...]      with the folder `tests` in PYTHONPATH, for its stubs of devices
"""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

from devices import graphs, platforms

HERE = Path(__file__).resolve().parent
DEFAULTS = dict(dp=1, tp=1, cp=1, pp=1, n=4096, rows=2, window=1024, heads=8, kv_heads=4, width=64)
CASES = {
    "dp 2": dict(dp=2), "dp 8": dict(dp=8, rows=8, n=2048), "tp 2": dict(tp=2), "tp 2, sp": dict(tp=2, sp=True),
    "dp 2, tp 2": dict(dp=2, tp=2), "cp 2": dict(cp=2), "cp 4": dict(cp=4, n=8192), "pp 2": dict(pp=2),
    "dp 2, cp 2, tp 2": dict(dp=2, cp=2, tp=2), "tp 2, sp, pp 2": dict(tp=2, sp=True, pp=2),
    "optimizer, dp 2": dict(dp=2, shard_optimizer=True)}
CASES.update({f"{name}, packed": {**case, "packed": True} for name, case in list(CASES.items())})
ALIKE = ("dp 2", "tp 2, sp", "dp 2, packed")  # of these, mindformers' own step sends the same bytes


def compiled(folder, environment, case, rank, ranks):
    """Compile a step in a process; return its folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MS_", "RANK_"))}
    packages = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, HERE / "step.py", json.dumps(case)], cwd=environment["MS_OM_PATH"], text=True,
        env={**kept, **environment, "RANK_SIZE": str(ranks), "RANK_ID": str(rank), "DEVICE_ID": "0", "GLOG_v": "3",
             "PYTHONPATH": packages, "MS_SUBMODULE_LOG_v": "{}", "MS_DEV_SAVE_GRAPHS": "1",
             "MS_DEV_SAVE_GRAPHS_PATH": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    if "compiled" not in process.stdout.splitlines():
        raise RuntimeError(process.stdout[-3000:])
    return folder


def share(case):
    """Return the numbers of queries times heads, and of keys, of a rank that is not the first of its sequence; and how
    many elements its halo has."""
    rows, n = case["rows"] // case["dp"] // case["pp"], case["n"] // case["cp"]
    halo = case["window"] - 1 if case["cp"] > 1 else 0
    kv_heads = case["kv_heads"] // case["tp"]
    rows_of_halo = 1 if case.get("packed") else rows  # packed rows are one
    elements = 2 * rows_of_halo * kv_heads * halo * case["width"] + (4 * halo if halo and case.get("packed") else 0)
    return rows * n * case["heads"] // case["tp"], n + halo, elements


def check(name, folder, environment):
    """Compile a case; return what is wrong, and a line of what was seen."""
    case = {**DEFAULTS, **CASES[name]}
    ranks = math.prod(case[key] for key in ("dp", "tp", "cp", "pp"))
    rank = case["tp"] * (1 if case["cp"] > 1 else 0)  # the second slice of a sequence
    folder = compiled(folder / name.replace(", ", "_").replace(" ", ""), environment, CASES[name], rank, ranks)
    calls, exchanged = graphs.attention(folder)
    queries, keys, halo = share(case)
    wrong = [] if calls else ["no fused operator"]
    for q, k in calls:
        if math.prod(q) != queries * case["width"]:
            wrong.append(f"queries {q}, and {queries} times {case['width']} is the share")
        if not case.get("packed") and k[2] != keys:
            wrong.append(f"{k[2]} keys, not {keys}")
    if {kind for kind, _ in exchanged} - {"AlltoAllV"}:
        wrong.append(f"collectives {exchanged}")
    if halo and max(size for _, size in exchanged) != halo or not halo and exchanged:
        wrong.append(f"a halo of {exchanged}, not {halo}")
    total = graphs.sent(folder)
    first = calls[0] if calls else (None, None)
    return wrong, f"queries {first[0]}, keys {first[1]}, sent {total}", total


def main(folder, names):
    folder = Path(folder).resolve()
    reason = platforms.missing("Ascend")
    if reason:
        sys.exit(reason)
    stubs = folder / "stubs"
    shutil.rmtree(stubs, ignore_errors=True)
    stubs.mkdir(parents=True)
    environment, failed = platforms.make("Ascend", stubs), []
    for name in names or CASES:
        try:
            wrong, seen, total = check(name, folder, environment)
            if name in ALIKE and not wrong:
                case = {**CASES[name], "ours": False}
                ranks = math.prod({**DEFAULTS, **case}[key] for key in ("dp", "tp", "cp", "pp"))
                theirs = graphs.sent(compiled(folder / "theirs", environment, case, 0, ranks))
                wrong += [] if theirs == total else [f"theirs sends {theirs}"]
            if name == "cp 4" and not wrong:
                theirs = graphs.sent(compiled(folder / "theirs", environment, {**CASES[name], "ours": False}, 1, 4))
                part = total["AlltoAllV"] / sum(theirs.get(kind, 0) - total.get(kind, 0)
                                                for kind in ("AllGather", "ReduceScatter"))
                seen += f", {part:.2f} of theirs"
                wrong += [] if part <= .25 else [f"{part} of theirs, {theirs}"]
        except RuntimeError as error:
            wrong, seen = [str(error)], ""
        print(f"{name:25} {'WRONG: ' + '; '.join(wrong) if wrong else 'right'}: {seen}", flush=True)
        failed += [name] if wrong else []
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
