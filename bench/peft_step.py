"""PEFT's LoRA step on torch, as a ratio to its own forward, on the shapes of bench/step_time.

pip install -e '.[parity]'
python -m bench.peft_step
"""

from __future__ import annotations

import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common import table, write_json


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    tokens = torch.randint(0, 49152, (4, 128))

    def forward() -> None:
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=tokens, labels=tokens)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    seconds: dict[str, list[float]] = {"forward": [], "step": []}
    for round_ in range(12):
        for name, call in (("forward", forward), ("step", step)):
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(s / f for s, f in zip(seconds["step"], seconds["forward"], strict=True))
    rows = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    table(
        ("", "ms"),
        [(n, f"{ms:.0f}") for n, ms in rows.items()] + [("step / forward", f"{ratio:.2f}")],
        "PEFT LoRA r=16",
    )
    write_json("peft_step", {"torch": torch.__version__, "ms": rows, "over_forward": ratio})


if __name__ == "__main__":
    main()
