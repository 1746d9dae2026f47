"""The list of all metric tags, shared by the code that writes metrics and the code that reads them.

TensorBoard and Weights & Biases show a metric under its tag. A tag never changes: the event files of old runs hold it.
"""

EVENT_FILES = "events.out.tfevents.*"  # TensorBoard's, one per start of a job

# TorchTitan's
LOSS = "loss_metrics/global_avg_loss"
WORST_LOSS = "loss_metrics/global_max_loss"  # of the rank with the highest
GRAD_NORM = "grad_norm"
LEARNING_RATE = "lr"
TOKENS_SEEN = "n_tokens_seen"  # by all ranks, since step 1
TOKENS_PER_SECOND = "throughput(tps)"  # per device
TFLOPS = "tflops"
MFU = "mfu(%)"
TIME_END_TO_END = "time_metrics/end_to_end(s)"
DATA_LOADING_TIME = "time_metrics/data_loading(s)"
DATA_LOADING_PERCENT = "time_metrics/data_loading(%)"
GPU_ACTIVE = "memory/max_active(GiB)"
GPU_RESERVED = "memory/max_reserved(GiB)"
GPU_ALLOC_RETRIES = "memory/num_alloc_retries"
GPU_OOMS = "memory/num_ooms"
VALIDATION = "validation_metrics"  # what stands before the tags of memory
VALIDATION_LOSS = f"{VALIDATION}/loss"
VALIDATION_PERPLEXITY = f"{VALIDATION}/perplexity"
VALIDATION_TOKENS_PER_SECOND = f"{VALIDATION}/throughput(tps)"

# Time and memory. The worst rank is the one that uses most memory.
STEP_TIME = "time_metrics/step(s)"
PROCESS_RSS = "memory/process_rss(GiB)"
PROCESS_RSS_PERCENT = "memory/process_rss(%)"
PROCESS_PEAK_RSS = "memory/process_peak_rss(GiB)"
PROCESS_PEAK_RSS_PERCENT = "memory/process_peak_rss(%)"
WORST_RANK = "memory/worst_rank"
WORST_RANK_ACTIVE = "memory/worst_rank_active(GiB)"
WORST_RANK_RESERVED = "memory/worst_rank_reserved(GiB)"
WORST_RANK_RSS = "memory/worst_rank_rss(GiB)"
WORST_RANK_PEAK_RSS = "memory/worst_rank_peak_rss(GiB)"
CAPACITY = "memory/capacity(GiB)"
EXPERTS_SAVED = "memory/experts_kept(GiB)"
EXPERTS_EVICTED = "memory/experts_shed(GiB)"
SAVE_PERCENT = "moe/save_percent"

# Health of the job
ALLOC_RETRIES = "health/alloc_retries"
OOMS = "health/ooms"
NON_FINITE = "health/non_finite"
SKIPPED_STEPS = "health/skipped_steps"
RESUMES = "health/resumes"
KERNEL_COMPILES = "moe/kernel_compiles"

# Balance of the experts
MAXVIO_MEAN = "moe/maxvio_batch_mean"
MAXVIO_MAX = "moe/maxvio_batch_max"
MAXVIO_LAYER = "moe_maxvio/layer_"  # two digits follow at least, see `maxvio_layer`
DEAD_EXPERTS = "moe/dead_experts"
WORST_RANK_LOAD = "moe/worst_ep_rank_load"  # tokens of the expert-parallel rank with most, over an even share
MAXVIO_GLOBAL_MEAN = f"{VALIDATION}/maxvio_global_mean"  # over all tokens of a validation: mean of the layers
MAXVIO_GLOBAL_MAX = f"{VALIDATION}/maxvio_global_max"
VALIDATION_DEAD_EXPERTS = f"{VALIDATION}/dead_experts"
BIAS_MIN = "moe/bias_min"
BIAS_MAX = "moe/bias_max"
DROPPED_TOKENS = "moe/dropped_tokens"
ENTROPY_MEAN = "moe/router_entropy_mean"
ENTROPY_MIN = "moe/router_entropy_min"
AUX_LOSS = "moe/aux_loss_mean"  # unweighted, mean of the layers; only of jobs that have it
Z_LOSS = "moe/router_z_loss_mean"

# Not scalars
RUN = "run"  # text: one JSON object per start of the job
RUN_IN_FILE = f"{RUN}/text_summary"  # how SummaryWriter.add_text writes it
LOAD = "moe/load"  # tensor (MoE layers, E), float16: tokens of an expert relative to the mean of its layer
LOAD_IMAGE = "moe/load_per_layer_and_expert"


def maxvio_layer(layer_id: int) -> str:
    """Tag of the MaxVio of one MoE layer."""
    return f"{MAXVIO_LAYER}{layer_id:02}"


def maxvio_layer_id(tag: str) -> int | None:
    """The layer whose MaxVio has this tag; None for any other tag."""
    number = tag.removeprefix(MAXVIO_LAYER)
    return int(number) if number != tag and number.isdecimal() else None
