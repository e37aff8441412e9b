"""Stand-ins: a character-level tokenizer with a ChatML template, random models with two layers, toy candidates.

They guarantee what the tests rely on: every sample has other tokens, a group's candidates differ in length, and a
model is a function of its seed.
"""

from __future__ import annotations

from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEACHERS = ("ada", "bob", "cy")


def tokenizer(*merged: tuple[str, str]) -> PreTrainedTokenizerFast:
    """One token for each byte, and ChatML's two markers (`<|im_end|>` is EOS and padding).

    Args:
        merged: pairs of bytes that are one token each, such as `("Ċ", "Ċ")` for two newlines.
    """
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merged)]
    specials = ["<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=list(merged)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


VOCAB = 258


def model(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A Llama of two layers whose logits are far from uniform, so that ranks and surprisals vary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "eos_token_id": 257,
            "pad_token_id": 257,
            "bos_token_id": 256,
            **overrides,
        }
    )
    return LlamaForCausalLM(config)


def candidates(num_prompts: int = 6) -> datasets.Dataset:
    """Sums with an answer of each teacher, in TRL's conversational prompt-completion format."""
    rows = []
    for number in range(num_prompts):
        question = f"What is {number} + {number * 7}?"
        for place, teacher in enumerate(TEACHERS):
            answer = f"{teacher}: " + "because it is so, " * place + f"the answer is {number * 8}."
            rows.append(
                {
                    "prompt": [{"role": "user", "content": question}],
                    "completion": [{"role": "assistant", "content": answer}],
                    "prompt_id": f"sum-{number}",
                    "teacher": teacher,
                }
            )
    return datasets.Dataset.from_list(rows)


def tokenised(rows: datasets.Dataset, tok: PreTrainedTokenizerFast) -> datasets.Dataset:
    """Prepared as a trainer would: `input_ids`, and `labels` for the completion with its end marker."""

    def prepare(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = tok.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tok.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}

    return rows.map(prepare)
