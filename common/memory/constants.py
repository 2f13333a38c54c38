"""What only a GPU can show: everything in the memory plan that is assumed and was never measured here.

The rest of the plan is counted: parameters from a model's modules, activations from the project's own passes. Each
number below is from the documentation of its library or from experience, on the safe side, and
`pytest -m gpu tests/gpu/test_memory_cuda.py` measures it. The shares of a card's speed at the end are for times, which
`python -m benchmarks.gpu --recipe NAME` measures.
"""

GIB = 2**30

# A process's context on a GPU: kernels of torch, cuBLAS and vLLM, and handles. Nobody's allocator shows it.
CUDA_CONTEXT = int(1.1 * GIB)
# What cuBLAS keeps for its products: 32 MiB on Hopper, 8 elsewhere, for each of torch's handles.
CUBLAS_WORKSPACE = 64 * 2**20
CONTEXT_AND_WORKSPACE = CUDA_CONTEXT + CUBLAS_WORKSPACE
# Memory that torch has reserved and that no tensor can use, as a share of what its tensors take.
FRAGMENTATION = 0.05

# vLLM: prompt tokens of one forward pass, its default for a GPU of this kind, and the tensors of width `intermediate`
# and `hidden` that are alive at the same time in it.
VLLM_BATCHED_TOKENS = 8192
VLLM_INTERMEDIATES, VLLM_HIDDENS = 3, 6
# The same on a CPU; more gains nothing and needs more memory for activations.
VLLM_BATCHED_TOKENS_ON_CPU = 16384
# Tensors of (sequences, vocabulary) in float32 that its sampler has at once: logits, log-probs, sorted, noise.
VLLM_LOGITS = 4
# CUDA graphs of all batch sizes; they stay while the engine sleeps.
VLLM_GRAPHS = int(0.5 * GIB)
# What stays free beside an engine whose share is chosen, as a share of the GPU: the numbers above may be wrong.
SPARE = 0.03
# The same beside a cache in main memory, which other processes use too.
SPARE_ON_CPU = 0.05
# The most of a GPU that an engine is given: it starts when the context is there already.
VLLM_LARGEST_SHARE = 0.9
# Completions at full length that an engine must have room for where its share is chosen: with fewer, most of a group
# waits for the others.
FEWEST_SEQUENCES = 8

# A Python process with torch, transformers and vLLM, in main memory: with CUDA's libraries, and without.
HOST_PROCESS_CUDA, HOST_PROCESS_CPU = 4 * GIB, GIB

# A pass of a model that nobody can predict: tensors of width `intermediate` and `hidden` for each token and layer, and
# where attention is not flash, (rows, heads, length, length) in float32 as often as this.
PASS_INTERMEDIATES, PASS_HIDDENS, PASS_SCORES = 8, 16, 3

# All of them by name, for what a plan prints.
ASSUMED = {
    "CUDA context": f"{CONTEXT_AND_WORKSPACE / 1e9:.2f} GB",
    "fragmentation": f"{FRAGMENTATION:.0%} of torch's tensors",
    "vLLM's graphs": f"{VLLM_GRAPHS / 1e9:.2f} GB",
    "vLLM's activations": f"of {VLLM_BATCHED_TOKENS:,} tokens",
}

# What of a card's rates (cards.py) a run reaches: of memory bandwidth while vLLM decodes, of FLOPS while it reads
# prompts and decodes, and of FLOPS in our own passes (model FLOPs utilisation; recomputed layers count as work).
DECODING_BANDWIDTH, SAMPLING_FLOPS, PASS_FLOPS = 0.6, 0.4, 0.35
# Seconds of Python, scheduling and sampling in each round of decoding, in which every running completion gets a token.
DECODING_ROUND = 0.003
# What collective operations reach of the links within a machine and between machines, in which all cards of a machine
# send at once. 0.5 of eight network cards of 50 GB/s is the 200 GB/s of all_gather over 256 H100:
# github.com/NVIDIA/nccl/issues/1218. One card alone reaches 46 to 48 GB/s: github.com/NVIDIA/nccl-tests/issues/290.
PEERS, NETWORK = 0.7, 0.5
# Seconds that an operation takes whatever its size: within a machine, and for each further machine of a ring.
OPERATION, OPERATION_OF_NODE = 20e-6, 10e-6
# Bytes/s of main memory for an optimizer there, on the processors of one rented GPU.
HOST_BANDWIDTH = 40e9
