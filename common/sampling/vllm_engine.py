"""The vLLM engine. Workarounds for vllm are in the vllm_ files that it uses.

The engine runs in the training process. Creating one would change much of that process: random state, threads, the
environment, process groups, the garbage collector. All of this is avoided or undone here. policy_sampler.py decides
what to sample with which seeds, models/weights.py what is pushed.

Works with vLLM 0.25 to 0.32. vllm is imported inside functions: it takes seconds, and may not be installed.
"""

import gc
import importlib.util
import logging
import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from common.environment import num_threads, preserved_random_state, process_unchanged
from common.mistakes import WrongNumbers
from common.models.configs import read_config
from common.models.weights import checkpoint_shapes, complete_weights
from common.rollouts import Completion
from common.sampling import (
    vllm_corrections,
    vllm_drawing,
    vllm_memory,
    vllm_reload,
    vllm_startup,
    vllm_support,
    vllm_trial,
)
from common.sampling.protocol import Finished, SamplingSettings
from common.sampling.vllm_group import Group, Request, without_compiling
from common.sampling.vllm_startup import EngineSettings
from common.sampling.vllm_trial import Refused

logger = logging.getLogger("nanorlhf")

# With fewer weights, the matrices of a sampling step on the CPU are too small for several threads: with 0.5 million,
# two threads take 1.2 to 1.4 times as long as one.
_MIN_WEIGHTS_FOR_THREADS = 5_000_000


class Engine:
    """vLLM, with the shapes of all tensors of a complete push by checkpoint name, and the processes that share it.

    Deleting it frees its memory and keeps the process groups of the trainer.
    """

    def __init__(self, llm: Any, shapes: dict[str, tuple[int, ...]], settings: EngineSettings) -> None:
        self.llm = llm
        self.dtype = settings.dtype
        self.shapes = shapes
        self.group = Group(settings.tensor_parallel)
        self.shut_down = weakref.finalize(self, _shut_down, llm.llm_engine.engine_core)


def create_engine(settings: EngineSettings) -> Engine:
    """Start vLLM in this process; every process of a distributed run must call this at the same time.

    A model that vLLM's own class does not sample from rightly runs in transformers' class, within vLLM.

    Raises:
        ValueError: if vLLM is not installed, or if it does not build the model, does not take its weights, drops some
            of them, or cannot sample with them.
    """
    check_installed()
    config = read_config(settings.model, trust_remote_code=settings.trust_remote_code)
    vllm_support.check_configuration(config, settings.max_model_len)
    shapes = checkpoint_shapes(settings.model, config)  # first: vLLM replaces configuration classes of transformers
    with vllm_support.imported():
        arguments = vllm_startup.engine_arguments(settings, config)
        supported = vllm_support.supported_config(arguments)
    if vllm_support.has_state(supported):
        # It would keep states at the ends of blocks, and cut prompts there: see enable_chunked_prefill.
        arguments["enable_prefix_caching"] = False
    try:
        engine = _create(settings, arguments, shapes, config)
    except Refused as refusal:
        if supported.using_transformers_backend() or vllm_support.has_routing_bias(shapes):
            raise _with_way_out(refusal, settings) from refusal.__cause__
        try:
            engine = _create(settings, arguments | {"model_impl": "transformers"}, shapes, config)
        except Refused:
            raise _with_way_out(refusal, settings) from None
        logger.info("%s It samples from transformers' own class instead, which is slower.", refusal.reason)
    # After an exception it would print 30 kB of engine state. Set here, because LLM() configures the parent logger.
    logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)
    return engine


def _with_way_out(refusal: Refused, settings: EngineSettings) -> Refused:
    """The refusal; that of an engine of several processes says that one of a single process may do."""
    if settings.tensor_parallel == 1:
        return refusal
    remedy = "Pass --vllm_tensor_parallel 1, if vLLM runs the model but not in parts, or --sampler transformers."
    return Refused(f"{refusal.reason} (vllm_tensor_parallel={settings.tensor_parallel})", remedy)


def _create(
    settings: EngineSettings, arguments: dict[str, Any], shapes: dict[str, tuple[int, ...]], config: PreTrainedConfig
) -> Engine:
    """An engine that was tried out; one that is refused leaves nothing behind."""
    with vllm_support.imported():
        from vllm import LLM

        if _Groups.users:  # an engine that nobody uses may wait for the collector, with groups of another size
            gc.collect()
        _Groups.owned |= not torch.distributed.is_initialized()
        vllm_startup.add_expert_group()
        with (
            vllm_startup.without_side_effects(shapes),
            vllm_startup.cache_for(settings),
            vllm_corrections.kernels_for(settings.dtype),
            vllm_corrections.corrected_classes(config),
        ):
            _Groups.users += 1  # before the start: the collector may free an earlier engine during it
            try:
                with vllm_trial.refused(settings.model, "build"):
                    engine = Engine(LLM(**arguments), shapes, settings)
            except BaseException:
                _leave_groups()
                raise
    try:
        engine.llm.apply_model(vllm_corrections.use_bias_of_head)
        engine.llm.apply_model(lambda model: vllm_support.check_built_model(model, config, settings.max_model_len))
        _try_out(engine, settings.model)
    except BaseException:
        engine.shut_down()
        raise
    return engine


def _try_out(engine: Engine, model: str) -> None:
    """Push zeros and sample a token; whatever fails is our refusal, before any weights are loaded."""
    [device] = engine.llm.apply_model(lambda model: next(model.parameters()).device)
    [name] = engine.llm.apply_model(lambda model: type(model).__name__)
    zeros = vllm_trial.zeros_of(engine.shapes, dtype=getattr(torch, engine.dtype), device=device)
    settings = SamplingSettings(temperature=1.0, max_tokens=1, stop_token_ids=())
    with vllm_trial.refused(model, "take the weights of"), vllm_trial.all_read(zeros, name):
        _reload(engine, zeros.items())
    with vllm_trial.refused(model, "sample from"):
        generate(engine, [Request(prompt_ids=[[0]], settings=settings, num_generations=1, seeds=[0])])
        _drop_cache(engine)


def matrix_dtype(engine: Engine) -> torch.dtype | None:
    """The type in which vLLM keeps every matrix of its model; None if some are in another, such as float32 routers."""
    [dtypes] = engine.llm.apply_model(
        lambda model: {each.dtype for each in model.parameters() if each.dim() > 1 and each.is_floating_point()}
    )
    return next(iter(dtypes)) if len(dtypes) == 1 else None


def check_installed() -> None:
    """Raise a ValueError if vLLM is not installed; imports nothing."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "sampler=vllm, but the package vllm is not installed: it is the default for sampling completions. "
            "Run `make install`, or pass --sampler transformers."
        )


def generate(engine: Engine, requests: list[Request], finished: Finished | None = None) -> list[list[Completion]]:
    """Sample completions without changing the random state of the process.

    Args:
        engine: awake, with weights.
        requests: of all processes that share the engine, the same ones in the same order in each of them.
        finished: as in Sampler.generate; prompts are numbered through all requests.

    Returns:
        For each request, its prompts x num_generations completions, rows of one prompt adjacent.
    """
    prompts = [{"prompt_token_ids": ids} for request in requests for ids in request.prompt_ids]
    params = [sampling_params(each.settings, each.num_generations, seed) for each in requests for seed in each.seeds]
    small = few_weights(map(math.prod, engine.shapes.values())) and not torch.cuda.is_available()
    try:
        with (
            vllm_memory.explained("sample"),
            preserved_random_state(),
            num_threads(1 if small else None),
            _reporting(engine, finished),
            vllm_corrections.kernels_for(engine.dtype),
            vllm_drawing.quick_drawing(),
            without_compiling(engine.group.size),
        ):
            outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    except BaseException:
        abort_requests(engine)
        raise
    completions = [completion for output in outputs for completion in _completions(output)]
    engine.group.check_same(completions)
    rows = iter(completions)
    return [list(islice(rows, request.num_rows)) for request in requests]


def few_weights(sizes: Iterable[int]) -> bool:
    """Whether a model with weights of these sizes is sampled from faster by one thread of the CPU than by several."""
    return sum(sizes) < _MIN_WEIGHTS_FOR_THREADS


def sampling_params(settings: SamplingSettings, num_generations: int, seed: int | None) -> Any:
    """What vLLM is asked for with one prompt.

    Args:
        settings: how tokens are drawn.
        num_generations: completions of the prompt.
        seed: of the first of them; None: greedy.

    Returns:
        vllm.SamplingParams.
    """
    from vllm import SamplingParams

    return SamplingParams(
        n=num_generations,
        seed=seed,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_tokens=settings.max_tokens,
        stop_token_ids=list(settings.stop_token_ids),
        ignore_eos=True,  # stop_token_ids is the one list of end tokens
        logprobs=0,  # of the sampled token only
        flat_logprobs=True,
        detokenize=False,
    )


def _completions(output: Any) -> list[Completion]:
    """The completions of a finished request."""
    samples = output.outputs
    reasons = {sample.finish_reason for sample in samples}
    assert reasons <= {"stop", "length"}, reasons
    return [Completion(list(s.token_ids), s.logprobs.logprobs, s.finish_reason == "length") for s in samples]


@contextmanager
def _reporting(engine: Engine, finished: Finished | None) -> Iterator[None]:
    """Call `finished` for each request of LLM.generate, which itself returns only when all have ended.

    After each step, processes that share the engine may leave.
    """
    if finished is None and engine.group.size == 1:
        yield
        return
    core, first = engine.llm.llm_engine, engine.llm.request_counter.counter  # requests are numbered one by one

    def step() -> list[Any]:
        outputs = type(core).step(core)
        for output in outputs if finished is not None else ():
            if output.finished:
                finished(int(output.request_id) - first, _completions(output))
        engine.group.after_step()
        return outputs

    core.step = step
    try:
        yield
    finally:
        del core.step


def push_weights(engine: Engine, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Replace all weights of the engine and drop what it cached under the old ones.

    Args:
        engine: awake, at least its weights.
        weights: (checkpoint name, tensor) of every weight, in any order; each tensor must not change before the last
            one of its layer was taken.

    Raises:
        ValueError: if a name is unknown, repeated or missing, a shape differs, or vLLM does not take a weight.
        WrongNumbers: if a weight is NaN. After this or any other exception, the engine must not be used before a push
            succeeds.
    """
    with vllm_memory.explained("take the new weights"):
        _reload(engine, without_nan(complete_weights(weights, engine.shapes)))
    _drop_cache(engine)


def without_nan(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights; NaN, which would only show in the completions, ends the run as other wrong numbers do."""
    for name, tensor in weights:
        # The sum is quick to compute, and NaN if any number is.
        if tensor.is_floating_point() and tensor.sum(dtype=torch.float32).isnan() and tensor.isnan().any():
            raise WrongNumbers(
                f"push of {name}: the policy's own weight has {int(tensor.isnan().sum())} NaN among {tensor.numel()} "
                "numbers, so it cannot be sampled from. If the policy has just been loaded, its files are damaged; "
                "else training has diverged: start from a checkpoint before that, with a lower --learning_rate."
            )
        yield name, tensor
        del tensor  # before the next one is made


def _reload(engine: Engine, weights: Iterable[tuple[str, Tensor]]) -> None:
    config = engine.llm.llm_engine.vllm_config
    with vllm_corrections.kernels_for(engine.dtype):
        engine.llm.apply_model(lambda model: vllm_reload.reload(model, weights, config))


def _drop_cache(engine: Engine) -> None:
    # Cache blocks are found by their tokens: without this, prompts would reuse blocks of the old weights.
    if not engine.llm.reset_prefix_cache():
        raise RuntimeError("the cache could not be reset: requests are running. Call abort_requests first.")


def abort_requests(engine: Engine) -> None:
    """Drop unfinished requests, which stay in the engine after an exception and would come back in the next call."""
    core = engine.llm.llm_engine
    core.abort_request(list(core.output_processor.request_states), internal=True)
    core.output_processor.parent_requests.clear()
    # A pass needs all processes of an engine, and the others may have no error. Their run ends with this one's.
    while engine.group.size == 1 and core.has_unfinished_requests():
        core.step()


def sleep(engine: Engine, level: int) -> None:
    """Free the GPU's memory: level 1 keeps the weights in host memory, level 2 drops them. CUDA only."""
    with vllm_memory.explained("go to sleep"):
        engine.llm.sleep(level=level)


def wake(engine: Engine, part: str) -> None:
    """Allocate memory for "weights" or for the "kv_cache" again. CUDA only."""
    # vLLM's pool allocates from the driver, which cannot use the freed blocks that torch caches.
    torch.cuda.empty_cache()
    with vllm_memory.explained("wake up"):
        engine.llm.wake_up(tags=[part])


# ----------------------------------------------------------------------------------------------- deleting an engine


class _Groups:
    """vLLM's process groups are shared by all engines of the process."""

    users = 0  # engines that are there or starting
    # vLLM made the default group, so it is not the trainer's.
    owned = False


def _shut_down(core: Any) -> None:
    """Free an engine's memory; with the last engine, destroy vLLM's process groups too."""
    with process_unchanged(), vllm_startup.keeping_groups():
        if not torch.accelerator.is_available():  # vLLM calls both here even on the CPU
            torch.accelerator.synchronize = torch.accelerator.empty_cache = vllm_startup.do_nothing
        core.shutdown()
    _leave_groups()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _leave_groups() -> None:
    """An engine is gone or could not be made: without another, vLLM's process groups go too."""
    from vllm.distributed import parallel_state

    _Groups.users -= 1
    if _Groups.users == 0 and torch.distributed.is_initialized():  # else all groups are destroyed already
        parallel_state.destroy_model_parallel()
        if _Groups.owned:
            parallel_state.destroy_distributed_environment()
            _Groups.owned = False
