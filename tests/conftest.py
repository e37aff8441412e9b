"""Shapes are checked at run time in tests; fixtures that several files share."""

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start: see below

from jaxtyping import install_import_hook

install_import_hook(["distill_sampler.reading.head", "distill_sampler.reading.token_stats"], "beartype.beartype")

from pathlib import Path  # noqa: E402

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402

from distill_sampler import ScoredDataset  # noqa: E402
from tests import tiny  # noqa: E402

datasets.disable_progress_bars()
torch.set_num_threads(1)  # threads wait for each other longer than these models take


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def dataset(tokenizer: PreTrainedTokenizerBase) -> ScoredDataset:
    """Six sums with an answer of each teacher: 18 samples. Not to be changed."""
    return ScoredDataset(tiny.tokenised(tiny.candidates(), tokenizer), end_token_ids=[257])


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny.model()


@pytest.fixture(scope="session")
def student_folder() -> Path:
    """The real student, SmolLM2-135M-Instruct."""
    pytest.importorskip("gguf", reason="the extra 'demo' is not installed")
    from distill_sampler.cli import demo_parts

    try:
        return demo_parts.student_folder()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def student(student_folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(student_folder)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real traces and the papers' numbers, which lie beside the checkout where the project is developed."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.exists():
        pytest.skip("the folder with the papers' reference numbers is not beside this checkout")
    return folder


@pytest.fixture(autouse=True)
def _accelerates_environment() -> Iterator[None]:
    """Older releases of transformers write settings of a trainer (`torch_compile`) into the environment of the process,
    where the next trainer finds them."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)
