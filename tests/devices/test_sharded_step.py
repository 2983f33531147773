"""In semi-auto parallel, a rank's attention has its share of rows, heads and positions, and sends the halo alone."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from devices import graphs, platforms
from devices.sharded_step import CASES

HERE = Path(__file__).parent


@pytest.mark.devices
@pytest.mark.parametrize("case", CASES)
def test_the_share_of_a_rank(case, tmp_path):
    reason = platforms.missing("Ascend")
    if reason:
        pytest.skip(reason)
    stubs, saved = tmp_path / "stubs", tmp_path / "graphs"
    stubs.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MS_", "GLOG_", "RANK_"))}
    environment = {
        **kept, **platforms.make("Ascend", stubs), "RANK_SIZE": "4", "RANK_ID": "1", "DEVICE_ID": "0",
        "MS_SUBMODULE_LOG_v": "{}", "MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": str(saved),
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parent.parent, HERE.parent)))}
    process = subprocess.run([sys.executable, HERE / "sharded_step.py", case], cwd=stubs, env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    assert "compiled" in process.stdout.splitlines(), process.stdout[-3000:]
    _, queries, keys, halo = CASES[case]
    calls, sent = graphs.attention(saved, "[aA]ttention")
    assert calls == [(queries, keys)]
    assert {name for name, _ in sent} == {"AlltoAllV"} and max(size for _, size in sent) == halo
