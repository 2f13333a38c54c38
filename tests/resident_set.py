"""A real pass of a model on the CPU: what its process takes, beside the same pass without numbers.

Prints a line of JSON, in bytes above what was there before: fake, resident.
"""

import json
from pathlib import Path

import torch
import transformers

from common.memory.fake import both_passes, output, rows_of
from common.memory.passes import PassSettings
from common.update.batches import weighted_loss

CONFIG = transformers.Qwen2Config(
    **{"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 704, "vocab_size": 16000, "tie_word_embeddings": True},
)
SETTINGS = PassSettings(method="full", weights=torch.float32, compute=torch.float32, attention="sdpa")
ROWS = (4, 512, 256)


def resident(name: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024


def main() -> None:
    rollouts = rows_of(*ROWS)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG, attn_implementation="sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # written to, so that its pages are there

    def run() -> None:
        weighted_loss(-output(model, rollouts) * rollouts.advantages, rollouts).backward()

    run()  # what is made once
    Path("/proc/self/clear_refs").write_text("5")
    start = resident("VmRSS")
    run()
    grown = resident("VmHWM") - start
    fake, _ = both_passes(CONFIG, SETTINGS, rollouts)
    print(json.dumps({"fake": fake.peak, "resident": grown}))


if __name__ == "__main__":
    main()
