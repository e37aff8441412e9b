"""Several nodes: two launchers, as on two machines with a process each, give the order and scores of one process."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests import tiny
from tests.distributed.launcher import LIMIT, launch
from tests.distributed.test_launch import CONFIGS, HERE, trained

NUMBERS = 3 + 2 + 1
"""Of each sample: three of the Rank-Surprisal Ratio, two for each metric, and its tokens."""


def test_the_file_to_try_differs_from_the_one_to_use_by_its_processes_alone() -> None:
    tried, used = (
        yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8")) for name in ("cpu_nodes.yaml", "nodes.yaml")
    )
    differs = {name for name in tried | used if tried.get(name) != used.get(name)}
    assert differs == {"use_cpu", "num_processes", "mixed_precision"}
    assert tried["num_machines"] == used["num_machines"] == 2


def free_port() -> int:
    with socket.socket() as of:
        of.bind(("127.0.0.1", 0))
        return int(of.getsockname()[1])


@pytest.mark.slow
def test_two_nodes_score_plan_and_train_as_one_process_does(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    rows = tiny.candidates(8)
    with open(tmp_path / "candidates.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    paths = [str(tmp_path / "student"), str(tmp_path / "candidates.jsonl")]
    port = str(free_port())
    nodes = []
    for rank in range(2):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu_nodes.yaml")]
        command += ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        command += [str(HERE / "launcher.py"), str(LIMIT), str(HERE / "sft_run.py"), *paths, str(tmp_path / "two")]
        nodes.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
    try:
        said = [node.communicate(timeout=LIMIT + 120)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said[0][-3000:] + said[1][-3000:]
    done = launch(HERE / "sft_run.py", *paths, str(tmp_path / "one"), "--batch-size", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    both = [json.loads((tmp_path / "two" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    one = json.loads((tmp_path / "one" / "rank-0.json").read_text())
    assert [report["world_size"] for report in both] == [2, 2]
    assert both[0]["plans"] == both[1]["plans"] == one["plans"]
    assert trained(both) == trained([one])
    np.testing.assert_allclose(both[0]["scores"][0], one["scores"][0], rtol=1e-5)
    assert one["sent"] == [[], []]
    for sent in (*both[0]["sent"], *both[1]["sent"]):  # of each epoch
        scores = [size for size in sent if size > 8]  # what is smaller is a count or a hash
        assert sum(scores) == 8 * NUMBERS * len(rows)
