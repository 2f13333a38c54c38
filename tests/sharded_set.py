"""The update of a policy that is spread over processes, on the CPU: what its process takes, beside the plan's bytes.

For `torchrun -m tests.sharded_set`. The main process prints a line of JSON for all weights and one for an adapter, in
bytes: what the plan has for weights and moments, and above them for gradients, what is gathered and passes; and what
every process took for both.
"""

import ctypes
import gc
import json
from collections.abc import Callable

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object

from common.logprobs import without_adapter
from common.memory.fake import output, rows_of
from common.memory.tenants import Numbers, Sizes, learner
from common.memory.work import Work
from common.models.loading import add_adapter
from common.sharding import shard
from common.update.batches import weighted_loss
from common.update.learner import Learner
from GRPO.grpo_trainer import GRPOConfig
from tests.resident_set import resident

CONFIG = transformers.Qwen2Config(
    **{"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2},
    **{"intermediate_size": 2048, "vocab_size": 32000, "tie_word_embeddings": True},
)
SMALL = transformers.Qwen2Config(
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"intermediate_size": 64, "vocab_size": 100, "tie_word_embeddings": True},
)
ROW, COMPLETION = 256, 128


def main() -> None:
    accelerator = Accelerator(cpu=True)
    for use_lora in (False, True):
        measure(accelerator, use_lora=use_lora)
    accelerator.state.destroy_process_group()


def measure(accelerator: Accelerator, *, use_lora: bool) -> None:
    """Print the line of one kind of training."""
    processes = accelerator.num_processes
    config = GRPOConfig(
        **{"model": "x", "max_prompt_length": ROW - COMPLETION, "max_completion_length": COMPLETION},
        **{"use_lora": use_lora, "lora_r": 16, "gradient_checkpointing": True, "kl_coef": 0.0},
    )
    rollouts = rows_of(2, ROW, COMPLETION)
    rollouts.advantages += 1.0
    rollouts.token_weights += 1.0

    def policy(shape: transformers.Qwen2Config) -> tuple[Sizes, Callable[[int], None]]:
        """Sizes of a model that is spread, and what updates it."""
        model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")
        sizes = Sizes.of(model, config)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if use_lora:
            model = add_adapter(model, config, task_type="CAUSAL_LM")
        shard(without_adapter(model), accelerator.device)
        trained = Learner("policy", model, config)

        def update(step: int) -> None:
            weighted_loss(-output(model, rollouts) * rollouts.advantages, rollouts).backward()
            trained.optimizer_step(step, accelerator)

        update(1)  # makes the moments, and what is made once
        return sizes, update

    policy(SMALL)  # loads the libraries
    gc.collect()
    before = settled()
    sizes, update = policy(CONFIG)
    start = settled(reset=True)
    update(2)
    found = gather_object([{"held": start - before, "grown": resident("VmHWM") - start}])
    if accelerator.is_main_process:
        numbers = Numbers(dtype=torch.float32, processes=processes, spread=processes, attention="sdpa", is_fused=False)
        tenant = learner("policy", sizes, config, numbers)
        gathered, passes = tenant.gathered.beside(Work(config, processes).of(tenant, 2 * ROW))
        grown = tenant.gradients + max(gathered + passes, tenant.step)
        planned = {"held": tenant.weights + tenant.moments, "grown": grown}
        parts = {"gradients": tenant.gradients, "gathered": gathered, "passes": passes, "weights": tenant.weights}
        parts["parameters"] = sizes.parameters
        print(json.dumps({"planned": planned, "taken": found, "parts": parts}), flush=True)


def settled(*, reset: bool = False) -> int:
    """Bytes of this process without what its allocator keeps."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    if reset:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    return resident("VmRSS")


if __name__ == "__main__":
    main()
